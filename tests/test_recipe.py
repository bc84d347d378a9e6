"""A recipe makes its tensor again, exactly as long as neither it nor what it is made of has changed."""

from __future__ import annotations

import copy
import gc
import weakref

import torch

from deltune.recipe import recipe_of, set_recipe


def doubled(x):
    return set_recipe(x * 2, lambda x: x * 2, x)


def test_what_is_made_is_the_tensor_without_gradient():
    x = torch.randn(3, requires_grad=True)
    y = doubled(x)
    made = recipe_of(y).make(recipe_of(y).saved)
    assert torch.equal(made, y) and not made.requires_grad
    assert recipe_of(x) is None


def test_a_change_in_place_ends_it():
    for changed in (0, 1):
        x = torch.randn(3)
        pair = (x, doubled(x))
        assert recipe_of(pair[1]) is not None
        pair[changed].add_(1)
        assert recipe_of(pair[1]) is None


def test_a_view_or_a_copy_has_none():
    y = doubled(torch.randn(2, 3))
    assert recipe_of(y.reshape(6)) is None and recipe_of(y + 0) is None and recipe_of(y.detach()) is None
    with torch.no_grad():
        assert recipe_of(y.clone()) is None


def test_nothing_is_kept_where_nothing_is_saved():
    x = torch.randn(3)
    with torch.no_grad():
        assert recipe_of(doubled(x)) is None
    with torch.inference_mode():
        assert recipe_of(doubled(x * 1)) is None


def test_a_recipe_goes_with_its_tensor():
    x = torch.randn(3)
    alive = weakref.ref(x)
    y = doubled(x)
    del x
    assert alive() is not None
    gc.disable()
    try:
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_a_node_saves_what_the_recipe_is_made_of():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, recipe):
            ctx.recipe = recipe
            ctx.save_for_backward(*recipe.saved)
            return y * y

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad * ctx.recipe.make(ctx.saved_tensors), None

    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = doubled(x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z = Square.apply(y, recipe_of(y))
    assert len(kept) == 1 and kept[0] is x
    z.sum().backward()
    assert torch.allclose(x.grad, 8 * x.detach())


def test_it_works_on_the_meta_device():
    x = torch.randn(3, device="meta")
    recipe = recipe_of(doubled(x))
    assert recipe.make(recipe.saved).shape == (3,)


def test_a_deep_copy_is_no_other_tensors_recipe():
    y = doubled(torch.randn(3))
    other = copy.deepcopy(y)
    recipe = recipe_of(other)
    assert recipe is None or torch.equal(recipe.make(recipe.saved), other)
