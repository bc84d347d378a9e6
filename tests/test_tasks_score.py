"""Scores of options are those of each row alone through plain transformers, whatever is shared, batched or padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltune.evaluation.tasks import score as module
from deltune.evaluation.tasks.score import Request, Work, score, shares
from deltune.models.attention import NAME, register
from deltune.models.head import describe
from tests.architectures import KINDS, small
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def every_stretch_is_worth_it(monkeypatch):
    monkeypatch.setattr(module, "WORTH", 4)


def requests(vocab: int, seed: int = 0, lengths: tuple[int, ...] = (1, 6, 6, 9)) -> list[Request]:
    """Two heads, of which each has questions of several lengths; options of one token, of several, and with equal starts."""
    draw = np.random.default_rng(seed)
    words = lambda count: draw.integers(3, vocab, count).tolist()  # noqa: E731
    found = []
    for head in (words(17), words(12), []):
        for length in lengths:
            prompt = head + words(length + (0 if head else 5))
            found.append(Request(prompt, [[letter] for letter in words(4)]))
            same = words(2)
            found.append(Request(prompt, [words(1), words(5), same + words(1), same + words(3)]))
    found.append(Request(found[0].prompt[:17], [words(2), words(1)]))  # a question that others only continue
    return found


def one_by_one(model, requests) -> list[list[float]]:
    found = []
    for request in requests:
        found.append([])
        for option in request.options:
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([[*request.prompt, *option]])).logits[0].double().log_softmax(-1)
            first = len(request.prompt)
            found[-1].append(sum(log_p[first + i - 1, token].item() for i, token in enumerate(option)))
    return found


def close(found, expected, tolerance=1e-5):
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("name", "attention"), [*((name, NAME) for name in KINDS), ("gpt2", "eager"), ("mistral_window", "sdpa")])
def test_every_architecture_scores_as_row_by_row(name, attention):
    register()
    model = small(name, attention)
    asked = requests(model.config.vocab_size, lengths=(1, 6, 6))
    assert shares(model)
    work = Work()
    close(score(model, asked, head=describe(model), batch=3, work=work), one_by_one(model, asked))
    assert work.computed < work.asked / 2


def test_every_batch_size_and_no_sharing_give_the_same():
    model = tiny_model()
    asked = requests(model.config.vocab_size)
    expected = one_by_one(model, asked)
    for batch in (1, 2, 7, 100):
        for share in (True, False):
            for head in (None, describe(model)):
                close(score(model, asked, head=head, batch=batch, share=share), expected)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
def test_adapters_and_learned_prompts(method):
    from deltune.adapters.attach import attach
    from deltune.adapters.config import named
    from tests.adapted import shaken

    model = shaken(attach(tiny_model(), named(method))).eval()
    assert shares(model)
    asked = requests(250)
    close(score(model, asked, batch=4), one_by_one(model, asked))


def test_in_bfloat16_a_model_still_shares():
    model = tiny_model().bfloat16()
    asked = requests(250)
    assert shares(model)
    found = score(model, asked)
    assert np.abs(np.concatenate(found) - np.concatenate(score(model.float(), asked))).max() < 0.5


def test_autocast_shares_too():
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert shares(model)


def test_a_model_that_forgets_its_cache_is_found_out(monkeypatch):
    """Wrong positions after a cache: each row is then computed whole, and right."""
    model = tiny_model()
    inner = model.model.rotary_emb.forward
    monkeypatch.setattr(model.model.rotary_emb, "forward", lambda x, position_ids: inner(x, position_ids - position_ids.min()))
    assert not shares(model)
    asked = requests(250)
    work = Work()
    close(score(model, asked, work=work), one_by_one(model, asked))
    assert work.computed > work.asked / 2


def test_modes_and_random_state_are_as_before():
    model = tiny_model(attention_dropout=0.5).train()
    state = torch.get_rng_state()
    score(model, requests(250)[:3])
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_nothing_asked_is_nothing_answered():
    assert score(tiny_model(), []) == []
    with pytest.raises(ValueError, match="token"):
        score(tiny_model(), [Request([], [[1]])])


def test_a_tree_holds_each_row_once():
    """Joined along its branches the tree gives the rows back, and every wanted token is asked for exactly once."""
    asked = requests(30, seed=3)
    rows, wanted = module._rows(asked)
    nodes, ends, slots = module._tree(rows, wanted, 4), [], []
    while nodes:
        node = nodes.pop()
        assert node.parent is None or (node.start == node.parent.stop and np.array_equal(node.ids[: node.start], node.parent.ids[: node.start]))
        slots += [(tuple(node.ids[: position + 1].tolist()), token, slot) for position, token, slot in node.wanted]
        assert all(node.start <= position < node.stop for position, _, _ in node.wanted)
        ends.append(tuple(node.ids[: node.stop].tolist()))
        nodes += node.children
    assert set(ends) >= {tuple(row.tolist()) for row in rows} and len(set(ends)) == len(ends)
    expected = []
    for slot, (prompt, option) in enumerate((request.prompt, option) for request in asked for option in request.options):
        whole = (*prompt, *option)
        expected += [(whole[: len(prompt) + i], token, slot) for i, token in enumerate(option)]
    assert sorted(slots) == sorted(expected)
