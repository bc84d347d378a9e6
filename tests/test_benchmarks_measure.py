"""The benchmark's judgement: ratios within rounds, verdicts, equality of loss, and what a result says of them."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import parts, report
from benchmarks.cases import CPU, GPU, PARTS
from benchmarks.measure import Candidate, Target, Timed, ratio, slope, still_open, unequal, verdict
from benchmarks.suite import chosen
from benchmarks.work import Shape

PAIR = {"ours": Candidate("ours"), "peft": Candidate("peft")}


def timed(*seconds: float, tokens: int = 100, transient: int = 0) -> Timed:
    return Timed(list(seconds), list(seconds), [tokens] * len(seconds), [transient] * len(seconds))


def test_a_ratio_is_the_median_of_ratios_within_rounds():
    # the medians alone would say 2.0 / 2.0: a slow round must slow both
    both = {"ours": timed(1.0, 2.0, 4.0), "peft": timed(1.5, 3.0, 2.0)}
    assert ratio(Target("speed", "ours", "peft", 1.0), both) == pytest.approx(1.5)
    assert ratio(Target("time", "ours", "peft", 1.0), both) == pytest.approx(1 / 1.5)


def test_speed_counts_useful_tokens():
    both = {"ours": timed(1.0, tokens=100), "peft": timed(1.0, tokens=200)}
    assert ratio(Target("speed", "ours", "peft", 1.0), both) == pytest.approx(0.5)


def test_a_missing_peer_is_not_measured_and_not_met():
    target = Target("speed", "ours", "litgpt", 1.3)
    assert ratio(target, {"ours": timed(1.0)}) is None
    assert verdict(target, None)["met"] is None


def test_who_has_nothing_left_to_tell_sits_out():
    targets = (Target("speed", "ours", "far", 1.0), Target("speed", "ours", "near", 1.9))
    three = {"ours": timed(1.0, 1.0, 1.0), "far": timed(2.0, 2.0, 2.0), "near": timed(2.0, 2.0, 2.0), "free": timed(1.0, 1.0, 1.0)}
    assert still_open(targets, three) == {"ours", "near"}
    assert still_open(targets[:1], three) == set()
    assert still_open(targets[:1], three | {"far": timed(2.0, 0.5, 2.0)}) == {"ours", "far"}  # one round says otherwise
    assert still_open(targets, {name: Timed(one.seconds[:2], [], one.tokens[:2]) for name, one in three.items()}) == set(three)


def test_a_ratio_is_of_the_rounds_in_which_both_took_part():
    both = {"ours": timed(1.0, 1.0, 1.0, 9.0, 9.0), "peft": timed(2.0, 2.0, 2.0)}
    assert ratio(Target("speed", "ours", "peft", 1.0), both) == pytest.approx(2.0)


def test_what_is_of_ours_alone_needs_no_peer():
    alone = {"ours": Timed([1.0], [1.0], [4096], peak=[11_000_000_000])}
    assert ratio(Target("peak", "ours", "12 GB", 12.0), alone) == pytest.approx(11.0)
    assert ratio(Target("tokens", "ours", "one card", 4096.0), alone) == 4096
    assert verdict(Target("peak", "ours", "12 GB", 12.0), 11.0)["met"] is True
    assert verdict(Target("tokens", "ours", "one card", 300_000.0), 4096.0)["met"] is False
    assert verdict(Target("mfu", "ours", "989 TFLOP/s", 0.55), 0.6)["met"] is True


@pytest.mark.parametrize(("what", "value", "met"), [("speed", 1.3, True), ("speed", 1.29, False), ("time", 1.3, True), ("transient", 1.31, False)])
def test_a_bound_is_held_on_its_own_side(what, value, met):
    assert verdict(Target(what, "ours", "peft", 1.3), value)["met"] is met


def test_float32_losses_are_equal_to_a_hundred_thousandth():
    assert not unequal(PAIR, {"ours": [1.0, 2.0], "peft": [1.0, 2.00001]}, "float32")
    (complaint,) = unequal(PAIR, {"ours": [1.0, 2.0], "peft": [1.0, 2.0001]}, "float32")
    assert "ours and peft differ by 5.0e-05" in complaint


def test_bf16_losses_may_be_twice_as_far_as_the_peer_is_from_float32():
    losses = {"ours": [1.05], "peft": [1.0]}
    assert unequal(PAIR, losses, "bfloat16")
    assert unequal(PAIR, losses, "bfloat16", reference=[0.99])
    assert not unequal(PAIR, losses, "bfloat16", reference=[0.97])


@pytest.mark.parametrize("losses", [[], [1.0], [math.nan, 1.0]])
def test_losses_that_are_missing_or_not_numbers_are_unequal(losses):
    assert unequal(PAIR, {"ours": losses, "peft": [1.0, 1.0]}, "bfloat16")


def test_other_work_is_not_held_to_the_same_loss():
    assert not unequal({**PAIR, "ours": Candidate("ours", equal_to=None)}, {"ours": [9.0], "peft": [1.0]}, "float32")


def test_a_part_whose_results_differ_is_not_timed():
    with pytest.raises(ValueError, match="not bitsandbytes'"):
        parts.values_rows(lambda *_, **__: {"same": False, "ratio": 7.0}, toy=False)
    method = {"time": 1.0, "peft_time": 0.7, "rounds": 2, "losses": [1.0, 2.0], "same": False}
    with pytest.raises(ValueError, match="dora"):
        parts.methods_rows(lambda *_: {"lora": method | {"same": True}, "dora": method}, 2, toy=False)


def test_a_part_names_its_worst_method():
    measured = {"lora": {"time": 1.0, "peft_time": 0.7, "same": True}, "boft": {"time": 1.6, "same": True}, "oft": {"time": 1.2, "peft_time": 1.1, "same": True}}
    rows, _ = parts.methods_rows(lambda *_: measured, 2, toy=False)
    assert [(row["what"], row["measured"], row["met"]) for row in rows] == [
        ("time, median over methods", 1.2, False), ("time, slowest method (boft)", 1.6, False), ("time, worst against PEFT's own (oft)", 1.1, False),
    ]  # fmt: skip


def test_slope_is_that_of_the_line():
    assert slope([(256, 130.0), (1024, 514.0), (2048, 1026.0)]) == pytest.approx(0.5)


def test_every_target_names_candidates_of_its_case():
    for name, case in {**CPU, **GPU}.items():
        for target in case.targets:
            assert target.ours in case.candidates, name
            assert target.peer in case.candidates or target.what in ("mfu", "peak", "tokens"), name
        for candidate in case.candidates.values():
            assert candidate.equal_to is None or candidate.equal_to in case.candidates, name


def test_a_case_stands_for_all_of_its_own_and_a_wrong_name_is_refused():
    known = [*CPU, *PARTS]
    assert chosen("C5", known) == ["C5", "C5-gsm8k", "C5-alpaca"]
    assert chosen("C1", known) == ["C1"]
    with pytest.raises(SystemExit, match="no case 'C99'"):
        chosen("C99", known)


def test_the_work_of_a_step_is_the_formula():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = Shape(hidden=64, layers=2, inter=96, vocab=128, heads=4, kv_heads=2)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False))
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.matmul_parameters == sum(w.numel() for w in linear)
    assert shape.adapter_parameters(3) == sum(3 * sum(w.shape) for w in linear if w.shape[0] != 128)


def made(failed: list[str]) -> dict:
    row = Timed([1.0], [1.0], [100], [5], [2.0], 1.5, 0.1).row(1e9, 1e12, 1)
    record = {
        "title": "a case", "failed": failed, "absent": {"litgpt": "does not import"}, "candidates": {"ours": row, "peft": row},
        "targets": [verdict(Target("speed", "ours", "peft", 1.3), 1.4)], "seconds": 1.0, "cpu_seconds": 2.0, "commit": "0123456789ab", "load": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
        "setting": {"dtype": "bfloat16", "micro_batch": 2, "length": 16, "rank": 4, "rounds": 1, "steps": 1},
    }  # fmt: skip
    machine = {"processor": "a processor", "features": [], "cores": 2, "system": "Linux", "python": "3", "versions": {}, "commit": None}
    return {"suite": "cpu", "toy": False, "machine": machine, "peers": {},
            "gemm_gflops": {}, "not_there": {"C7": "why"}, "cases": {"C1": record}}  # fmt: skip


def test_a_result_says_what_was_met_and_what_was_absent(tmp_path):
    report.write(made([]), tmp_path)
    text = (tmp_path / "suite.md").read_text()
    assert "| C1 | speed | ours | peft | 1.4 | >= 1.3 | met |" in text
    assert "litgpt: does not import" in text
    assert "C7 (why)" in text
    assert "Commit 0123456789ab; 1 s, 2 s of CPU; load averages 0.1 0.2 0.3 before, 0.4 0.5 0.6 after." in text
    assert report.kept(tmp_path, gpu=False, toy=False).keys() == {"C1"}
    assert report.kept(tmp_path, gpu=True, toy=False) == {}
    assert json.loads((tmp_path / "suite.json").read_text())["cases"]["C1"]["targets"][0]["met"] is True
    assert (tmp_path / "suite_speed.png").stat().st_size > 1000


def test_curves_are_drawn_of_what_was_measured_at_two_points(tmp_path):
    result = made([])
    report.write(result, tmp_path)
    assert not (tmp_path / "suite_rank.png").exists() and not (tmp_path / "suite_length.png").exists()
    record = result["cases"]["C1"]
    result["cases"] |= {"rank-64": record | {"setting": record["setting"] | {"rank": 64}}}
    result["cases"] |= {f"C6-{length}": record | {"setting": record["setting"] | {"length": length}} for length in (1024, 2048)}
    report.write(result, tmp_path)
    assert (tmp_path / "suite_rank.png").stat().st_size > 1000 and (tmp_path / "suite_length.png").stat().st_size > 1000


def test_a_case_whose_losses_differ_meets_nothing():
    result = made(["ours and peft differ by 1.0e+00"])
    assert "FAILED equality: C1" in report.summary(result)
    assert "| C1 | speed | ours | peft |  | >= 1.3 | not measured |" in report.markdown(result)
