"""RoAd and (IA)³, held to PEFT and to the papers' formulas."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import nn

from deltune.adapters.attach import attach, merge, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft, save_peft, with_peft
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_is_pefts(variant, tmp_path):
    held_to_peft(peft.RoadConfig(variant=variant, group_size=8, target_modules=LLAMA), tmp_path)


@pytest.mark.parametrize("feed_forward", [["down_proj"], r".*\.down_proj", []], ids=str)
def test_ia3_is_pefts_on_both_sides(feed_forward, tmp_path):
    config = peft.IA3Config(target_modules=LLAMA, feedforward_modules=feed_forward)
    model = held_to_peft(config, tmp_path, changes=1e-4)
    on_input = [name for name, delta in model.named_modules() if type(delta).__name__ == "Ia3" and delta.on_input]
    assert len(on_input) == (2 if feed_forward else 0)


def test_a_file_that_does_not_say_which_layers_are_feed_forward_is_refused(tmp_path):
    folder = save_peft(with_peft(tiny_model(), peft.IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"])), tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"feedforward_modules"', '"feedforward_modules_once"'))
    with pytest.raises(AdapterError, match="feedforward_modules"):
        load_adapter(tiny_model(), folder)


def layer(n_in, n_out):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, n_out)).double()


def shaken(model):
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_turns_the_halves_of_each_group(variant):
    n, size = 12, 4
    model = layer(5, n)
    x = torch.randn(3, 5, dtype=torch.float64)
    y = model(x)
    attach(model, named("road", variant=variant, group_size=size, dtype="auto"))
    assert sum(p.numel() for p in trainable(model).values()) == 2 * {"road_1": n // 2, "road_2": n, "road_4": 2 * n}[variant]
    shaken(model)
    delta = model[0].adapters["default"]
    theta, alpha, h = delta.road_theta.tolist(), delta.road_alpha.tolist(), size // 2
    R = torch.zeros(n, n, dtype=torch.float64)
    for group in range(n // size):
        for j in range(h):
            first, second = group * size + j, group * size + h + j
            for row, other, sign in ((first, second, -1), (second, first, 1)):
                if variant == "road_1":
                    c = s = group * h + j
                elif variant == "road_2":
                    c = s = row
                else:
                    c, s = 2 * group * size + row % size, 2 * group * size + size + row % size
                R[row, row] = alpha[c] * math.cos(theta[c])
                R[row, other] = sign * alpha[s] * math.sin(theta[s])
    assert (model(x) - y @ R.T).abs().max() < 1e-12
    assert (merge(model)(x) - y @ R.T).abs().max() < 1e-12


def test_a_group_that_does_not_divide_the_outputs_is_an_error_that_names_what_would():
    with pytest.raises(AdapterError, match=r"group_size 8 must be even and divide its 12 outputs; 2, 4, 6, 12 would"):
        attach(layer(5, 12), named("road", group_size=8))


def test_ia3_scales_inputs_of_feed_forward_layers_and_outputs_and_biases_of_others():
    torch.manual_seed(0)
    for feed_forward, l_of in (([], 7), (["0"], 5)):
        model = layer(5, 7)
        W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
        attach(model, named("ia3", feed_forward=feed_forward, dtype="auto"))
        shaken(model)
        strength = next(iter(trainable(model).values())).detach().flatten()
        assert strength.numel() == l_of
        x = torch.randn(3, 5, dtype=torch.float64)
        expected = (strength * x) @ W.T + b if feed_forward else strength * (x @ W.T + b)
        assert (model(x) - expected).abs().max() < 1e-12
        assert (merge(model)(x) - expected).abs().max() < 1e-12


def test_a_feed_forward_layer_that_is_none_of_the_adapted_is_an_error():
    with pytest.raises(AdapterError, match=r"feed_forward: 'down_prj' matches none of the adapted modules, e\.g\. model\.layers\.0\."):
        attach(tiny_model(), named("ia3", targets=LLAMA, feed_forward=["down_prj"]))
    attach(tiny_model(), named("ia3", targets=["k_proj", "v_proj"]))  # the default names many models' layers


def test_a_small_step_from_one_is_not_lost_in_bfloat16():
    """1 + 1e-3 is 1 in bfloat16; the distance from 1 is kept apart."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    attach(model, named("ia3"))
    x = torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    with torch.no_grad():
        next(iter(trainable(model).values())).fill_(1 + 3e-3)  # half way to the next bfloat16 after 1 is 3.9e-3
    below = model(torch.full((1, 4), 1.9921875, dtype=torch.bfloat16))  # 2 − 2⁻⁷: a step of 6e-3 reaches 2
    assert torch.equal(model(x), x) and torch.equal(below, torch.full((1, 4), 2.0, dtype=torch.bfloat16))
