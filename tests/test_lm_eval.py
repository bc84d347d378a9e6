"""lm-evaluation-harness on our scoring: it agrees with its own Hugging Face model, and on a task of local rows with our
runner, number by number."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from deltune.errors import ConfigError, DataError, ModelError
from deltune.evaluation.lm_eval import MISSING, generate_options, harness
from deltune.evaluation.tasks.catalogue import TASKS
from deltune.evaluation.tasks.item import Item
from deltune.evaluation.tasks.run import Way, answer, questions
from deltune.evaluation.tasks.templates import TEMPLATES, prompt
from deltune.models.folder import BUNDLED
from deltune.models.generation import GenerateOptions, context_window
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def bundled():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32), AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def sample(real_data):
    """A real question of each subject, the shortest one."""
    found: dict[str, Item] = {}
    for item in sorted(TASKS["mmlu"].read(real_data / "mmlu"), key=lambda item: len(item.question + "".join(item.choices))):
        found.setdefault(item.group, item)
    return sorted(found.values(), key=lambda item: item.id)


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def theirs(model, tokenizer, **settings):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, **settings)


def harness_results(lm, sample, folder):
    """The task as a user of the harness would write it: rows in a file, no code."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"prompt": prompt(item, TEMPLATES["mmlu"], [], "letters"), "answer": item.answer, "id": item.id} for item in sample]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = {
        "task": "local_mmlu", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "doc_to_text": "prompt", "doc_to_choice": list("ABCD"), "doc_to_target": "answer", "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    found = lm_eval.simple_evaluate(model=lm, tasks=[task], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))
    scores = {one["doc"]["id"]: [value for value, _ in one["filtered_resps"]] for one in found["samples"]["local_mmlu"]}
    return found["results"]["local_mmlu"]["acc,none"], scores


def test_the_harness_and_our_runner_agree_on_one_task(bundled, sample, tmp_path):
    """Three ways to the same numbers: our runner, the harness on our scoring, the harness on its own Hugging Face model."""
    model, tokenizer = bundled
    way = Way(TEMPLATES["mmlu"], "letters")
    asked = questions(sample, way, [], tokenizer, context_window(model))
    ours = {one.id: one for part in answer(model, tokenizer, asked, way, batch=4) for one in part}
    assert not any(question.num_cut for question in asked)
    accuracy, adapted = harness_results(harness(model, tokenizer, batch=4), sample, tmp_path)
    known_accuracy, known = harness_results(theirs(model, tokenizer), sample, tmp_path)
    assert len(sample) == len(ours) == len(adapted) == len(known) == 57
    for id in adapted:
        assert adapted[id] == pytest.approx(known[id], abs=1e-3)
        total = math.log(sum(map(math.exp, known[id])))
        assert ours[id].scores == pytest.approx([value - total for value in known[id]], abs=1e-3)
    right = sum(one.correct for one in ours.values())
    assert right / 57 == pytest.approx(accuracy) == pytest.approx(known_accuracy) and 0 < right < 57


PAIRS = [
    ("The cat", " sat on the mat"), ("The cat", " sat"), ("", "Alone"), ("Ends in a space ", "word"), ("New\n", "line"),
    ("q " * 400, "far too long"), ("a" * 511, "bc"), ("<s>Given", " its BOS"),
]  # fmt: skip


@pytest.mark.parametrize("real", [True, False], ids=["bundled", "tiny"])
def test_likelihoods_are_the_harness_own(bundled, real):
    model, tokenizer = bundled if real else (tiny_model(), tiny_tokenizer())
    requests = instances("loglikelihood", *PAIRS)
    ours, known = harness(model, tokenizer, batch=2).loglikelihood(requests), theirs(model, tokenizer).loglikelihood(requests)
    for (value, greedy), (expected, most) in zip(ours, known, strict=True):
        assert value == pytest.approx(expected, abs=1e-3) and greedy == most


def test_a_continuation_that_greedy_decoding_would_give_is_told(bundled):
    model, tokenizer = bundled
    lm = harness(model, tokenizer)
    (said,) = lm.generate_until(instances("generate_until", ("The cat", {"max_gen_toks": 4})))
    found = lm.loglikelihood(instances("loglikelihood", ("The cat", said), ("The cat", said + "qz")))
    assert [greedy for _, greedy in found] == [True, False]


def test_perplexities_of_texts_longer_than_the_window_are_the_harness_own():
    model, tokenizer = tiny_model(max_position_embeddings=32), tiny_tokenizer()
    requests = instances("loglikelihood_rolling", ("Short.",), ("A longer text that fills several windows of the model. " * 4,), ("",))
    ours = harness(model, tokenizer).loglikelihood_rolling(requests)
    known = theirs(model, tokenizer).loglikelihood_rolling(requests[:2])
    assert ours == pytest.approx([*known, 0.0], abs=1e-3)


def test_generated_texts_are_the_harness_own(bundled):
    model, tokenizer = bundled
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    contexts = ["Repeat: window\n", "Who are you?\n", "Swap tiger and bottle.\nSwap lamp and door.\n", "x " * 600]
    requests = instances("generate_until", *((text, settings) for text in contexts), (contexts[0], {**settings, "max_gen_toks": 2}))
    ours, known = harness(model, tokenizer).generate_until(requests), theirs(model, tokenizer).generate_until(requests)
    assert ours == known and len(set(ours)) > 2


def test_settings_of_a_generation_mean_what_they_say():
    assert generate_options({}) == GenerateOptions(max_new_tokens=256)
    assert generate_options({"until": "\n\n", "max_new_tokens": 5}) == GenerateOptions(max_new_tokens=5, stop=("\n\n",))
    assert generate_options({"do_sample": True, "top_k": 5}).temperature == 1.0
    assert generate_options({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert generate_options({"temperature": 0.7, "top_p": 0.9}) == GenerateOptions(temperature=0.7, top_p=0.9)
    with pytest.raises(ConfigError, match="num_beams would have no effect"):
        generate_options({"num_beams": 4})


def test_chat_templates_are_rendered_and_their_bos_is_not_doubled():
    lm = harness(tiny_model(), tiny_tokenizer())
    text = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<s><|user|>\nHi\n<|assistant|>\n"
    assert lm.tok_encode(text).count(lm.tokenizer.bos_token_id) == 1


def test_what_cannot_be_scored_is_named():
    lm = harness(tiny_model(max_position_embeddings=32), tiny_tokenizer())
    with pytest.raises(DataError, match="has no token of its own"):
        lm.loglikelihood(instances("loglikelihood", ("context", "")))
    with pytest.raises(DataError, match="a continuation has 40 tokens, and the model's window 32"):
        lm.loglikelihood(instances("loglikelihood", ("context", "x" * 40)))
    with pytest.raises(ConfigError, match="32 new tokens leave no room"):
        lm.generate_until(instances("generate_until", ("context", {"max_gen_toks": 32})))
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither BOS nor EOS"):
        harness(tiny_model(), tokenizer)


def test_without_the_harness_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ConfigError) as error:
        harness(tiny_model(), tiny_tokenizer())
    assert str(error.value) == MISSING and "deltune[lm-eval]" in MISSING
