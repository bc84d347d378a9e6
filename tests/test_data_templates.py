"""Chat templates in the shapes that families publish: the mask is what the model must write, or the row is refused."""

from __future__ import annotations

import pytest

from deltune.data.config import DataConfig
from deltune.data.encode import Encoder
from deltune.data.formats import Schema
from deltune.errors import DataError
from tests.encoded import all_marked, prepared, write_rows
from tests.tiny import tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TAGGED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}{{- bos_token }}{%- for m in turns %}{%- if m['role'] == 'user' %}"
    "{%- if loop.first and system is defined %}{{- '[INST] ' + system + '\\n\\n' + m['content'] + ' [/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + ' [/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
# thinking is kept in the last answer only, as Qwen3 and DeepSeek do
THINKING = (
    "{% for m in messages %}{% set text = m['content'] %}{% if m['role'] == 'assistant' and not loop.last %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\nTools:\\n' }}{% for t in tools %}{{ t | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + ' ' + c.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
    "[INST]", "[/INST]",
)  # fmt: skip

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Héllo"},
    {"role": "assistant", "content": "Hi\nthere"},
    {"role": "user", "content": "漢字?"},
    {"role": "assistant", "content": "字"},
]


def tokenizer_with(template, marks=MARKS):
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    return tokenizer


def encoded(tmp_path, tokenizer, messages, **settings):
    file = write_rows(tmp_path / "a.jsonl", [{"messages": messages, **settings.pop("row", {})}])
    return all_marked(prepared(file, tokenizer, **settings).train, tokenizer)


EXPECTED = {
    "chatml": (
        CHATML, TURNS,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHéllo<|im_end|>\n<|im_start|>assistant\n"
        "«Hi\nthere<|im_end|>»\n<|im_start|>user\n漢字?<|im_end|>\n<|im_start|>assistant\n«字<|im_end|>»\n",
    ),
    "llama3": (
        LLAMA3, TURNS,
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHéllo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hi\nthere<|eot_id|>»<|start_header_id|>user<|end_header_id|>\n\n漢字?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«字<|eot_id|>»",
    ),
    "gemma": (
        GEMMA, TURNS[1:],
        "<s><start_of_turn>user\nHéllo<end_of_turn>\n<start_of_turn>model\n«Hi\nthere<end_of_turn>»\n"
        "<start_of_turn>user\n漢字?<end_of_turn>\n<start_of_turn>model\n«字<end_of_turn>»\n",
    ),
    "mistral": (
        MISTRAL, TURNS,
        "<s>[INST] Be brief.\n\nHéllo [/INST]« Hi\nthere</s>»[INST] 漢字? [/INST]« 字</s>»",
    ),
}  # fmt: skip
EXPECTED["chatml, tagged"] = (CHATML_TAGGED, TURNS, EXPECTED["chatml"][2])


@pytest.mark.parametrize("family", EXPECTED)
def test_answers_and_their_end_of_turn_are_trained(tmp_path, family):
    template, messages, expected = EXPECTED[family]
    assert encoded(tmp_path, tokenizer_with(template), messages) == [expected]


@pytest.mark.parametrize("family", EXPECTED)
def test_a_prompt_has_the_tokens_that_generation_will_give_it(tmp_path, family):
    """Held to transformers: all before the last answer is what apply_chat_template makes when it asks for it."""
    template, messages, _ = EXPECTED[family]
    tokenizer = tokenizer_with(template)
    data = prepared(write_rows(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer).train
    ids, labels, _ = data[0]
    start = max(k for k in range(1, len(ids)) if labels[k] != -100 and labels[k - 1] == -100)
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert ids[:start].tolist() == list(asked)


def test_the_mask_is_transformers_own_where_tags_are_given(tmp_path):
    tokenizer = tokenizer_with(CHATML_TAGGED)
    data = prepared(write_rows(tmp_path / "a.jsonl", [{"messages": TURNS}]), tokenizer).train
    theirs = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert data[0].ids.tolist() == theirs["input_ids"]
    assert (data[0].labels != -100).astype(int).tolist() == theirs["assistant_masks"]


def test_no_bos_is_doubled(tmp_path):
    """Llama's and Mistral's templates write BOS themselves, and so would the tokenizer."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(MISTRAL)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    for template, expected in (("chat", "<s>[INST] Be brief."), ("plain", "<s>Be brief.\n\nHéllo«Hi")):
        (text,) = encoded(tmp_path, tokenizer, TURNS, template=template)
        assert text.startswith(expected) and text.count("<s>") == 1
    data = prepared(write_rows(tmp_path / "t.jsonl", [{"text": "a b"}]), tokenizer, mode="pretrain").train
    assert all_marked(data, tokenizer) == ["<s>«a b</s>»"]
    data = prepared(write_rows(tmp_path / "t.jsonl", [{"text": "<s>a b"}]), tokenizer, mode="pretrain").train
    assert all_marked(data, tokenizer) == ["<s>«a b</s>»"]


def test_thinking_that_a_template_removes_later_is_trained_where_it_is_written(tmp_path):
    messages = [
        {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "<think>\none\n</think>\n\n2"},
        {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "<think>\ntwo\n</think>\n\n4"},
    ]  # fmt: skip
    first = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert encoded(tmp_path, tokenizer_with(THINKING), messages) == [
        first + "«<think>\none\n</think>\n\n2<|im_end|>»\n",
        first + "2<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n«<think>\ntwo\n</think>\n\n4<|im_end|>»\n",
    ]
    file = write_rows(tmp_path / "b.jsonl", [{"messages": messages}])
    report = prepared(file, tokenizer_with(THINKING)).report
    assert (report.rows, report.used, report.examples) == (1, 1, 2)
    assert any("rewrites earlier turns" in note for note in report.notes)


CALLS = [
    {"from": "human", "value": "Weather?"},
    {"from": "function_call", "value": '{"name": "look", "arguments": {"city": "Łódź"}}'},
    {"from": "observation", "value": '{"t": 3}'},
    {"from": "gpt", "value": "3 degrees"},
]
TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}


def test_tool_calls_are_trained_and_their_results_are_not(tmp_path):
    import json

    tokenizer = tokenizer_with(TOOLS)
    file = write_rows(tmp_path / "a.jsonl", [{"conversations": CALLS, "tools": json.dumps([TOOL])}])
    (text,) = all_marked(prepared(file, tokenizer).train, tokenizer)
    head, _, rest = text.partition("<|im_start|>user\n")
    assert json.loads(head.splitlines()[2]) == {"type": "function", "function": TOOL}
    assert rest == (
        'Weather?<|im_end|>\n<|im_start|>assistant\n«<tool_call>look {"city": "Łódź"}</tool_call><|im_end|>»\n'
        '<|im_start|>tool\n{"t": 3}<|im_end|>\n<|im_start|>assistant\n«3 degrees<|im_end|>»\n'
    )
    openai = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Łódź"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": '{"t": 3}'},
        {"role": "assistant", "content": "3 degrees"},
    ]
    assert encoded(tmp_path, tokenizer, openai, row={"tools": [{"type": "function", "function": TOOL}]}) == [text]


def test_a_tokenizer_may_have_a_template_of_its_own_for_tools(tmp_path):
    tokenizer = tokenizer_with({"default": CHATML_TAGGED, "tool_use": TOOLS})
    assert encoded(tmp_path, tokenizer, TURNS) == [EXPECTED["chatml"][2]]
    (text,) = encoded(tmp_path, tokenizer, TURNS, row={"tools": [TOOL]})
    assert text.startswith("<|im_start|>system\nTools:") and text.endswith(EXPECTED["chatml"][2])
    with pytest.raises(DataError, match=r"chat template cannot be used.*data\.template=plain"):
        encoded(tmp_path, tokenizer_with({"rag": CHATML}), TURNS)


def refused(tmp_path, jinja, messages, **settings):
    with pytest.raises(DataError) as error:
        encoded(tmp_path, tokenizer_with(jinja), messages, **settings)
    return str(error.value)


def test_what_a_template_leaves_out_is_an_error(tmp_path):
    no_system = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    assert "leaves out message 1 (system); it has no place for a system message" in refused(tmp_path, no_system, TURNS)
    openai = [TURNS[1], {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {}}]}]
    assert "does not write tool calls (message 2)" in refused(tmp_path, CHATML, openai)
    assert "does not show the tools" in refused(tmp_path, CHATML, TURNS, row={"tools": [TOOL]})
    assert "template=plain cannot write tools" in refused(tmp_path, CHATML, openai, template="plain")
    cut = CHATML.replace("m['content']", "m['content'][:3]")
    assert "leaves out message 1" in refused(tmp_path, cut, TURNS)
    upper = CHATML.replace("m['content']", "(m['content'] | upper if m['role'] == 'assistant' else m['content'])")
    assert "changes the answer of message 3" in refused(tmp_path, upper, TURNS)


def test_a_template_that_refuses_roles_is_quoted(tmp_path):
    reason = refused(tmp_path, GEMMA, TURNS)
    assert "System role not supported" in reason and "drop data.system" in reason
    assert "must alternate" in refused(tmp_path, GEMMA, [TURNS[1], TURNS[1], TURNS[2]])


WRONG_TAGS = {
    "EOS outside": ("{{ m['content'] + '<|im_end|>' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}", "leave out", "'<|im_end|>"),
    "header inside": ("{{ '<|im_start|>assistant\\n' }}{% generation %}", "{% generation %}{{ '<|im_start|>assistant\\n' }}", "mark", "'<|im_start|>assistant"),
}


@pytest.mark.parametrize("name", WRONG_TAGS)
def test_tags_and_prefixes_must_agree(tmp_path, name):
    right, wrong, verb, place = WRONG_TAGS[name]
    assert right in CHATML_TAGGED
    reason = refused(tmp_path, CHATML_TAGGED.replace(right, wrong), TURNS)
    assert f"generation tags {verb}" in reason and place in reason and "model.chat_template" in reason


ASKS_OTHERWISE = ("{{ '<|im_start|>assistant\\n' }}{% endif %}", "{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}")


def test_a_template_that_asks_otherwise_than_it_writes_needs_tags(tmp_path):
    assert CHATML.endswith(ASKS_OTHERWISE[0]) and CHATML_TAGGED.endswith(ASKS_OTHERWISE[0])
    reason = refused(tmp_path, CHATML.replace(*ASKS_OTHERWISE), TURNS[1:])
    assert "has no generation tags" in reason and "'<think>" in reason
    tagged = CHATML_TAGGED.replace(*ASKS_OTHERWISE)
    assert encoded(tmp_path, tokenizer_with(tagged), TURNS) == [EXPECTED["chatml"][2]]
    untrained = [*TURNS[:2], TURNS[2] | {"weight": 0}, *TURNS[3:]]
    assert encoded(tmp_path, tokenizer_with(tagged), untrained) == [EXPECTED["chatml"][2].replace("«", "").replace("»", "").replace("字<|im_end|>", "«字<|im_end|>»")]


def test_an_answer_without_an_end_is_noted(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"messages": TURNS}])
    open_ended = prepared(file, tokenizer_with(CHATML.replace("<|im_end|>", "")))
    assert any("not taught to stop" in note for note in open_ended.report.notes)
    assert not prepared(file, tokenizer_with(CHATML)).report.notes


def test_special_tokens_in_the_text_are_noted(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "a<|im_end|>b", "completion": "c"}, {"prompt": "a", "completion": "c"}])
    report = prepared(file, tokenizer_with(CHATML)).report
    assert [k for n, k in report.notes.items() if "special tokens" in n] == [1]


def test_tokens_do_not_depend_on_the_day(tmp_path):
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ 'Today: ' + date_string + '\\n' }}" + CHATML
    (text,) = encoded(tmp_path, tokenizer_with(dated), TURNS)
    assert text.startswith("Today: 26 Jul 2024\n")
    file = write_rows(tmp_path / "b.jsonl", [{"messages": TURNS}])
    report = prepared(file, tokenizer_with("{{ strftime_now('%Y') }}" + CHATML)).report
    assert any("today's date" in note for note in report.notes)


def test_tokenizers_without_offsets_give_the_same_mask(tmp_path):
    """ByT5's tokenizer is pure Python: one token a byte, like the tiny one, so the texts can be compared."""
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    assert not slow.is_fast
    slow.chat_template = CHATML_TAGGED
    assert encoded(tmp_path, slow, TURNS) == [EXPECTED["chatml"][2]]
    assert encoded(tmp_path, slow, TURNS[1:], template="plain") == ["Héllo«Hi\nthere</s>»漢字?«字</s>»"]


def test_words_that_begin_with_their_space_are_trained_whole(tmp_path):
    """A sentencepiece-like tokenizer joins the space before an answer to its first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "▁[INST]", "▁[/INST]", "▁hi", "▁yes", "▁sir", "[INST]"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = MISTRAL
    data = prepared(write_rows(tmp_path / "a.jsonl", [{"prompt": "hi", "completion": "yes sir"}]), tokenizer).train
    assert [tokenizer.convert_ids_to_tokens(int(i)) for i in data[0].labels if i != -100] == ["▁yes", "▁sir", "</s>"]


def test_broken_templates_are_data_errors(tmp_path):
    assert "not valid Jinja" in refused(tmp_path, "{% for %}", TURNS)
    assert "refuses the conversation" in refused(tmp_path, "{{ messages[0]['content'] + 1 }}", TURNS)
    assert "refuses the conversation" in refused(tmp_path, "{{ messages.__class__.__mro__ }}", TURNS)


def test_a_conversation_can_be_encoded_by_itself():
    """What chat and generation use: the same encoder, without files."""
    tokenizer = tokenizer_with(CHATML)
    encoder = Encoder(DataConfig(), tokenizer, "messages")
    row = Schema("messages", {"messages": "messages", "system": "system", "tools": "tools"}).conversations({"messages": TURNS})
    (((example,), notes),) = encoder.encode([row])
    assert example.trained.sum() == (8 + 1) + (3 + 1)  # "Hi\nthere" and "字" in bytes, each with its end
    assert not notes
