"""Several adapters as one: held to dense formulas written out entry by entry, and to PEFT's add_weighted_adapter."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

from deltune.adapters.attach import active, adapters, attach, switch
from deltune.adapters.combine import HOW, combine
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.lora import LoraConfig
from deltune.errors import AdapterError
from tests.peft_twin import TOLERANCE, save_peft
from tests.test_adapters_convert import change
from tests.test_adapters_methods import IDS, far, model_of, shaken
from tests.tiny import tiny_model

WEIGHTS = [0.7, -1.3]


def two(first="lora", second="lora", places=("linear", "conv"), **changes):
    """A float64 model with adapters `one` and `two` (of rank 2 and 3), moved off their starts, and their ΔW by place."""
    model = model_of(torch.float64)
    attach(model, named(first, rank=2, targets=list(places), dtype="auto", **changes), name="one")
    attach(model, named(second, rank=3, targets=list(places), dtype="auto"), name="two", seed=1)
    shaken(model, names=("one", "two"))
    return model, {place: [change(model, place, name) for name in ("one", "two")] for place in places}


@pytest.mark.parametrize("how", ["sum", "linear", "cat", "svd"])
@pytest.mark.parametrize("second", ["lora", "dora"])
def test_sums_are_the_sum_of_the_changes(how, second):
    model, changes = two(second=second)
    weights = None if how == "sum" else WEIGHTS
    if how == "cat" and second == "dora":
        with pytest.raises(AdapterError, match=r"adapter two \(dora\) has no factors B and A"):
            combine(model, ["one", "two"], weights, how, "both")
        return
    rank = 12 if how == "svd" else None
    made = combine(model, ["one", "two"], weights, how, "both", rank=rank, svd="full")
    assert active(model) == ["one", "two"] and adapters(model)["both"].delta == "lora"
    for place, (one, other) in changes.items():
        expected = one + other if how == "sum" else WEIGHTS[0] * one + WEIGHTS[1] * other
        assert (change(model, place, "both") - expected).abs().max() < 1e-9 * max(1.0, float(expected.abs().max()))
        if second == "lora":
            assert made.ranks[place] == 5
        assert made.errors[place] < 1e-6


def test_a_rank_cuts_the_sum_to_its_best_part_and_tells_the_error():
    model, changes = two()
    made = combine(model, ["one", "two"], WEIGHTS, "linear", "both", rank=3)
    for place, (one, other) in changes.items():
        values = torch.linalg.svdvals(WEIGHTS[0] * one + WEIGHTS[1] * other).square()
        assert made.ranks[place] == 3
        assert made.errors[place] == pytest.approx(float(values[3:].sum() / values.sum()) ** 0.5, rel=1e-9)


def by_loops(changes, weights, density, how, kept=None):
    """TIES and magnitude pruning, an entry at a time. `kept`: which entries of each change stay, where they are drawn."""
    flat = [one.flatten().tolist() for one in changes]
    for i, values in enumerate(flat):
        if kept is None:
            stays = set(sorted(range(len(values)), key=lambda j: -abs(values[j]))[: int(density * len(values) + 1e-9)])
            flat[i] = [v if j in stays else 0.0 for j, v in enumerate(values)]
        else:
            flat[i] = [v / density if kept[i][j] else 0.0 for j, v in enumerate(values)]
    result = []
    for entries in zip(*flat, strict=True):
        chosen = list(zip(entries, weights, strict=True))
        if how.endswith("ties"):
            elected = 1 if sum(entries) >= 0 else -1
            chosen = [(v, w) for v, w in chosen if v * elected > 0]
            result.append(sum(v * w for v, w in chosen) / max(1, len(chosen)))
        else:
            result.append(sum(v * w for v, w in chosen))
    return torch.tensor(result, dtype=torch.float64).view_as(changes[0])


@pytest.mark.parametrize("how", ["ties", "magnitude_prune"])
def test_pruning_and_election_are_as_the_papers_say(how):
    model, changes = two(second="dora")
    combine(model, ["one", "two"], WEIGHTS, how, "both", rank=16, density=0.3, svd="full")
    for place, dense in changes.items():
        assert (change(model, place, "both") - by_loops(dense, WEIGHTS, 0.3, how)).abs().max() < 1e-9


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_random_pruning_is_drawn_from_the_seed_and_keeps_the_mean(how):
    model, changes = two()
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        combine(model, ["one", "two"], [1.0, 1.0], how, name, rank=16, density=0.6, seed=seed, svd="full")
    for place, dense in changes.items():
        found = change(model, place, "a")
        assert torch.equal(found, change(model, place, "again")) and not torch.equal(found, change(model, place, "b"))
        for i, j in ((0, 0), (1, 2), (3, 1)):  # each entry is one that some choice of kept entries gives
            possible = [
                by_loops([d[i : i + 1, j : j + 1] for d in dense], [1.0, 1.0], 0.6, how, [[first], [second]]).item()
                for first in (True, False) for second in (True, False)
            ]
            assert min(abs(found[i, j].item() - value) for value in possible) < 1e-9
    single, share = model_of(torch.float64), []
    attach(single, LoraConfig(rank=2, targets=["linear"], dtype="auto"), name="one")
    shaken(single, names=("one",))
    for seed in range(20):
        combine(single, ["one"], None, "dare_linear", f"c{seed}", rank=12, density=0.6, seed=seed, svd="full")
        share.append(float((change(single, "linear", f"c{seed}").abs() > 1e-9).double().mean()))
    assert sum(share) / len(share) == pytest.approx(0.6, abs=0.03)  # 3,840 draws have a deviation of 0.008


def test_layers_of_only_some_adapters_and_modules_trained_in_full_go_along():
    model = model_of(torch.float64)
    attach(model, LoraConfig(rank=2, targets=["linear"], dtype="auto", modules_to_save=["lm_head"]), name="one")
    attach(model, named("dora", rank=2, targets=["linear", "conv"], dtype="auto"), name="two")
    shaken(model, names=("one", "two"))
    changes = {name: change(model, place, name) for name, place in (("two", "conv"),)}
    made = combine(model, ["one", "two"], [0.5, 2.0], "linear", "both", svd="full")
    assert set(made.ranks) == {"linear", "conv"}
    assert (change(model, "conv", "both") - 2 * changes["two"]).abs().max() < 1e-9
    assert torch.equal(model.lm_head.adapters["both"].weight, model.lm_head.adapters["one"].weight)
    model = model_of()
    for name in ("one", "two"):
        attach(model, LoraConfig(targets=["linear"], modules_to_save=["lm_head"]), name=name)
        switch(model, [])
    with pytest.raises(AdapterError, match="lm_head is trained in full by adapters one and two"):
        combine(model, ["one", "two"])


# ---------------------------------------------------------------- PEFT


def with_two(config_of_one, config_of_two):
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(tiny_model().double(), config_of_one, adapter_name="one", autocast_adapter_dtype=False).eval()
        wrapped.add_adapter("two", config_of_two, autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    return wrapped


def delta_of(model, place, name):
    layer = model.get_submodule(place)
    return layer.adapters[name].delta(None).detach()


PLACES = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
CASES = [
    ("linear", "factors", "linear", {}),
    ("ties", "factors", "ties", {"density": 0.4}),
    ("ties", "factors", "ties", {"density": 0.4, "sign": "frequency"}),
    ("magnitude_prune", "factors", "magnitude_prune", {"density": 0.4}),
    ("cat", "products", "cat", {}),
    ("svd", "products", "svd", {"rank": 3}),
    ("ties", "products", "ties_svd", {"density": 0.4}),
    ("ties", "products", "ties_svd", {"density": 0.4, "sign": "frequency"}),
    ("magnitude_prune", "products", "magnitude_prune_svd", {"density": 0.4}),
]


@pytest.mark.parametrize(("how", "of", "theirs", "settings"), CASES)
def test_peft_combines_to_the_same(tmp_path, how, of, theirs, settings):
    kind = {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6}
    second = peft.LoraConfig(r=4, **(kind | ({} if of == "factors" else {"use_rslora": True})))
    wrapped = with_two(peft.LoraConfig(r=4, **kind), second)
    save_peft(wrapped, tmp_path)
    words = {{"density": "density", "rank": "svd_rank", "sign": "majority_sign_method"}[key]: value for key, value in settings.items()}
    # on one side PEFT rounds weights to float32 by making a tensor of them; these have no more digits than that
    weights = [0.75, -1.25]
    wrapped.add_weighted_adapter(["one", "two"], weights, "both", combination_type=theirs, **words)
    model = tiny_model().double()
    for name in ("one", "two"):
        load_adapter(model, tmp_path, name=name)
    made = combine(model, ["one", "two"], weights, how, "both", of=of, svd="full", **settings)
    tolerance = 1e-6 if of == "factors" else TOLERANCE  # their square roots are float32 too
    for place in PLACES:
        expected = wrapped.base_model.model.get_submodule(place).get_delta_weight("both")
        assert (delta_of(model, place, "both") - expected).abs().max() < tolerance
        assert expected.abs().max() > 1e-3 and made.ranks[place] == (8 if how == "cat" else settings.get("rank", 4))


def test_the_combination_is_a_file_like_any_other(tmp_path):
    model, _ = two(rank_pattern={"conv": 4})
    made = combine(model, ["one", "two"], WEIGHTS, name="both")
    assert dict(made.ranks) == {"linear": 5, "conv": 7}
    switch(model, "both")
    answer = model(IDS)
    save_adapter(model, tmp_path, name="both")
    assert far(load_adapter(model_of(torch.float64), tmp_path)(IDS), answer) < 1e-12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"how": "mean"}, "how is 'mean'; it can be sum, linear, cat, svd"),
        ({"names": "one"}, "a list of different adapters is needed"),
        ({"names": ["one", "one"]}, "a list of different adapters is needed"),
        ({"names": ["one", "x"]}, "no adapter 'x'"),
        ({"weights": [1.0]}, "a number for each of one, two is needed"),
        ({"weights": [1.0, float("nan")]}, "a number for each of one, two is needed"),
        ({"how": "sum", "weights": [1.0, 2.0]}, "weights have no effect with how=sum"),
        ({"how": "cat", "rank": 2}, "rank has no effect with how=cat"),
        ({"how": "ties"}, "density is None"),
        ({"how": "dare_ties", "density": 1.5}, "density is 1.5"),
        ({"how": "svd", "density": 0.5}, "density has no effect with how=svd"),
        ({"how": "linear", "sign": "frequency"}, "sign has no effect with how=linear"),
        ({"sign": "most"}, "sign is 'most'"),
        ({"of": "factors", "how": "cat"}, "of=factors has no effect with how=cat"),
        ({"of": "factors", "rank": 2}, "of=factors has no effect with how=linear and a rank"),
        ({"of": "factors"}, "of=factors needs one rank, and these adapters have 2, 3"),
        ({"rank": 0}, "rank is 0"),
        ({"name": "one"}, "has an adapter 'one' already"),
    ],
)
def test_settings_that_do_not_fit_are_refused_and_leave_the_model(settings, message):
    model, _ = two(places=("linear",))
    before = model(IDS)
    with pytest.raises(AdapterError, match=message):
        combine(model, **({"names": ["one", "two"]} | settings))
    assert list(adapters(model)) == active(model) == ["one", "two"] and torch.equal(model(IDS), before)


def test_every_way_is_among_those_that_are_tried():
    tried = {how for how, *_ in CASES} | {"sum", "dare_linear", "dare_ties"}
    assert tried == set(HOW)
