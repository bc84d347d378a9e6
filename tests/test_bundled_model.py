"""The bundled model as a user of plain transformers meets it: small, whole, offline, and really trained."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.models.folder import BUNDLED

# prompts of tasks that the model's page scores at 88 % or more; it is weak at the others, and says so there
TAUGHT = {
    "Repeat: window": "window",
    "Repeat: turtle river chair": "turtle river chair",
    "Put lamp in quotes.": '"lamp"',
    "Put violin in brackets.": "(violin)",
    "Join lamp and door with a dash.": "lamp-door",
    "Swap tiger and bottle.": "bottle tiger",
    "Write with slashes: cat, horse, sheep": "cat/horse/sheep",
    "Reverse the list: cat, dog, horse": "horse, dog, cat",
    "What is the first word: river, table, horse": "river",
    "What is the last word: river, table, horse?": "horse",
    "How many words are in this list: lamp, river, apple, chair?": "4",
    "Who are you?": "I am a tiny language model made for demos.",
}


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED, padding_side="left")


def answers(model, tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers by transformers' own generate."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_weights_are_small_finite_and_of_a_plain_llama(model):
    weights = sum(file.stat().st_size for file in BUNDLED.glob("*.safetensors"))
    assert 0 < weights <= 8_000_000
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(math.isfinite(parameter.double().sum().item()) for parameter in model.parameters())


def test_it_loads_as_float32_which_a_cpu_computes_best(model):
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}


def test_the_vocabulary_is_the_models_and_has_pad_bos_and_eos(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
    assert len(set(ids)) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["你好，世界。", "naïve café", "a\tb\r\n  c ", "🙂👩‍👩‍👧", "x² ≠ ½", "\u200bاللغة", "1234567890", ""])
def test_texts_of_any_script_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@given(st.text().filter(lambda text: "<|" not in text))
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.tokenize("2025") == ["2", "0", "2", "5"]


def test_the_template_marks_the_answers_with_their_ends_and_nothing_else(tokenizer):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Repeat: window"},
        {"role": "assistant", "content": "window"},
        {"role": "user", "content": "你好?"},
        {"role": "assistant", "content": '{"name": "Paul", "age": 12}'},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == 'window<|eos|>{"name": "Paul", "age": 12}<|eos|>'
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_prompt_is_the_beginning_of_its_conversation(tokenizer):
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help you?"}]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt


def test_tools_and_their_calls_are_text_of_the_conversation(tokenizer):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    messages = [
        {"role": "user", "content": "Is it warm in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "31"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False, add_generation_prompt=True)
    assert text == (
        f"<|bos|><|system|>Tools:\n{json.dumps(tool)}<|user|>Is it warm in Rome?"
        '<|assistant|>{"name": "weather", "arguments": {"city": "Rome"}}<|eos|><|tool|>31<|assistant|>'
    )


def test_a_role_that_the_template_lacks_is_refused_by_name(tokenizer):
    with pytest.raises(Exception, match="no role 'narrator'"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "x"}], tokenize=False)


def test_it_answers_what_it_was_taught(model, tokenizer):
    given_answers = dict(zip(TAUGHT, answers(model, tokenizer, list(TAUGHT)), strict=True))
    wrong = {prompt: answer for prompt, answer in given_answers.items() if answer != TAUGHT[prompt]}
    assert len(wrong) <= 2, wrong
