"""RaSA, DenseLoRA and BSLoRA, held to the papers' formulas; none of them is in PEFT."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from deltune.adapters.attach import attach, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.errors import AdapterError
from deltune.training.state import load_moving_tensors, moving_tensors
from tests.methods.test_banks import LLAMA, attached, count, deltas, near, shaken, states
from tests.peft_twin import ids
from tests.tiny import tiny_model

LAYERS = {"q_proj": (32, 32), "v_proj": (16, 32), "down_proj": (32, 64)}  # out, in; two of each
SHARING = {"rasa": {"rank": 4}, "denselora": {"rank": 4}, "bslora": {"rank": 2, "share": 8}}


def fields_of(method, **fields):
    return SHARING[method] | fields


# ---------------------------------------------------------------- RaSA


def test_rasa_is_its_formula():
    """ΔW = Σ_p e_p·b_p a_pᵀ over r − k own ranks and k·L pooled ones; nothing scales it but e."""
    model = attached("rasa", rank=6, shared_rank=2)
    for _, delta, x, change in states(model):
        own = [(delta.e[p], delta.B[:, p], delta.A[p]) for p in range(4)]
        pooled = [(delta.e[4 + p], delta.pool.B[:, p], delta.pool.A[p]) for p in range(2 * 2)]
        expected = sum(e * torch.outer(b, a) for e, b, a in own + pooled)
        assert near(delta.delta(None), expected) and near(change, x @ expected.T)
        assert len(delta.e) == len(own + pooled)
    # Σ_types [L(r − k)(in + out) + kL(in + out) + L(r − k + kL)] = Σ_types L·[r(in + out) + r − k + kL], LoRA's and e
    assert count(model) == sum(2 * (6 * (n_in + n_out) + 4 + 4) for n_out, n_in in LAYERS.values())


def test_rasa_starts_e_at_half_of_alpha_over_each_share():
    model = attach(tiny_model(), named("rasa", rank=8, shared_rank=3, alpha=8.0, targets=LLAMA))
    for delta in deltas(model).values():
        assert torch.allclose(delta.e[:5], torch.tensor(0.5 * 8 / 5)) and torch.allclose(delta.e[5:], torch.tensor(0.5 * 8 / (3 * 2)))
        assert delta.pool.A.shape[0] == 3 * 2 and not delta.B.any() and not delta.pool.B.any()
        assert delta.A.abs().max() <= 1 / math.sqrt(delta.site.n_in)
    first, second = (model.model.layers[block].self_attn.q_proj.adapters["default"] for block in (0, 1))
    assert first.pool is second.pool and first.pool is not model.model.layers[0].mlp.down_proj.adapters["default"].pool


def test_rasa_keeps_a_rank_of_its_own():
    with pytest.raises(AdapterError, match="shared_rank is 4; it must be below the rank, 4"):
        attach(tiny_model(), named("rasa", rank=4, shared_rank=4))


# ---------------------------------------------------------------- DenseLoRA


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def test_denselora_is_its_formula():
    """Δy = s·GELU(B·M·GELU(A·x)), with a dropout after each GELU while training."""
    model = attached("denselora", rank=4, alpha=6.0)
    for _, delta, x, change in states(model):
        A, B, M = delta.pair.A, delta.pair.B, delta.M
        hidden = torch.einsum("ri,ti->tr", A, x)
        expected = 6 / 4 * gelu(torch.einsum("or,rq,tq->to", B, M, gelu(hidden)))
        assert near(change, expected)
    # Σ_types r(in + out) + Σ_layers r²
    assert count(model) == sum(4 * (n_in + n_out) + 2 * 16 for n_out, n_in in LAYERS.values())


def test_denselora_drops_inside_only_while_it_is_trained():
    model = attached("denselora", rank=4, dropout=0.5)
    delta = model.model.layers[0].self_attn.q_proj.adapters["default"]
    x = torch.randn(3, 32, dtype=torch.float64)
    assert torch.equal(delta.out(x, None), delta.out(x, None))
    delta.train()
    assert not torch.equal(delta.out(x, None), delta.out(x, None)) and (delta.out(x, None) == 0).any()
    delta.requires_grad_(False)
    assert torch.equal(delta.out(x, None), delta.out(x, None))


# ---------------------------------------------------------------- BSLoRA


def fitted(form, part, A, B, n_out, n_in, window="centre"):
    """φ of a shared pair for a layer, as a matrix, by the definition of each form."""
    if form == "slice":
        top, left = ((B.shape[0] - n_out) // 2, (A.shape[1] - n_in) // 2) if window == "centre" else (0, 0)
        return torch.einsum("or,ri->oi", B[top : top + n_out], A[:, left : left + n_in])
    if form == "gate":
        number = torch.einsum("xs,sr,rt,ty->", part.up, B, A, part.down)
        return number * torch.outer(part.outward[:, 0], part.into[0])
    share = A.shape[1]
    change = torch.zeros(n_out, n_in, dtype=A.dtype)
    for row in range(n_out):
        for column in range(n_in):
            number = (B[row % share] * A[:, column % share]).sum()
            change[row, column] = part.outward[row // share, 0] * part.into[0, column // share] * number
    return change


@pytest.mark.parametrize(
    "fields", [{"form": "kron", "share": 8}, {"form": "gate", "share": 5}, {"form": "slice"}, {"form": "slice", "window": "leading"}], ids=str
)
def test_bslora_is_its_formula(fields):
    model = attached("bslora", rank=2, block_rank=3, model_rank=4, scale=1.5, **fields)
    form, share = fields["form"], fields.get("share")
    for _, delta, x, change in states(model):
        shape = delta.site.n_out, delta.site.n_in
        shared = [
            fitted(form, part, bank.A, bank.B, *shape, window=fields.get("window", "centre"))
            for part, bank in ((delta.from_block, delta.block), (delta.from_model, delta.model))
        ]
        expected = 1.5 * (delta.B @ delta.A + shared[0] + shared[1])
        assert near(delta.delta(None), expected) and near(change, x @ expected.T)
        assert delta.block.A.shape[0] == 3 and delta.model.A.shape[0] == 4
    own = 2 * sum(2 * (n_in + n_out) for n_out, n_in in LAYERS.values())
    width_in, width_out = (64, 32) if form == "slice" else (share, share)  # the largest layer of the block, and of the model
    banks = (2 * 3 + 4) * (width_in + width_out)
    vectors = {
        "slice": lambda n_out, n_in: 0,
        "gate": lambda n_out, n_in: n_in + n_out + 2 * share,
        "kron": lambda n_out, n_in: (n_in + n_out) // (share or 1),
    }[form]
    assert count(model) == own + banks + 2 * 2 * sum(vectors(*shape) for shape in LAYERS.values())


def test_bslora_cuts_the_centre_of_what_is_shared():
    """The released code takes the window at (largest − own) // 2, not the leading part."""
    model = attached("bslora", form="slice")
    delta = model.model.layers[0].self_attn.v_proj.adapters["default"]  # 16×32, of at most 32×64
    left, right, _ = delta.product()
    assert torch.equal(left[:, 4:8], delta.block.B[8:24]) and torch.equal(right[4:8], delta.block.A[:, 16:48])


def test_bslora_shares_within_a_block_and_in_the_model():
    model = attached("bslora", share=8)
    blocks = [[d for place, d in deltas(model).items() if f"layers.{block}." in place] for block in (0, 1)]
    assert len({id(d.block) for d in blocks[0]}) == len({id(d.block) for d in blocks[1]}) == 1
    assert blocks[0][0].block is not blocks[1][0].block and len({id(d.model) for d in blocks[0] + blocks[1]}) == 1
    assert not torch.equal(blocks[0][0].block.A, blocks[1][0].block.A)


def test_bslora_says_which_shares_fit():
    with pytest.raises(AdapterError, match=r"v_proj: share is 32, and does not divide its out dimension 16; .*can be 1, 2, 4, 8, 16$"):
        attach(tiny_model(), named("bslora", share=32, targets=["v_proj"]))
    with pytest.raises(AdapterError, match="share has no effect with form=slice"):
        attach(tiny_model(), named("bslora", form="slice", share=8))
    with pytest.raises(AdapterError, match="window has no effect with form=kron"):
        attach(tiny_model(), named("bslora", window="leading"))


# ---------------------------------------------------------------- shared tensors


@pytest.mark.parametrize("method", SHARING)
def test_checkpoints_files_and_copies_keep_what_is_shared(method, tmp_path):
    model = attached(method, **fields_of(method))
    answer = model(ids(model)).logits
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_model().double(), tmp_path, trainable=True)
    assert torch.equal(again(ids(again)).logits, answer) and trainable(again).keys() == trainable(model).keys()
    saved = {name: tensor.clone() for name, tensor in moving_tensors(model).items()}
    twin = shaken(copy.deepcopy(model), seed=4)
    assert torch.equal(model(ids(model)).logits, answer) and not torch.equal(twin(ids(twin)).logits, answer)
    load_moving_tensors(twin, saved)
    assert torch.equal(twin(ids(twin)).logits, answer)


@pytest.mark.parametrize("method", SHARING)
def test_pools_have_the_configs_type(method):
    model = attach(tiny_model().half(), named(method, targets=LLAMA, dtype="bfloat16", **fields_of(method)))
    assert {tensor.dtype for delta in deltas(model).values() for tensor in delta.state_dict().values()} == {torch.bfloat16}
