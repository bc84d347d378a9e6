"""Rows in the schemas of public data sets: what each is turned into, how it is recognised, and what is said of rows that are none."""

from __future__ import annotations

import json

import pytest

from deltune.data.conversation import BadRow
from deltune.data.detect import detect
from deltune.data.formats import ROLES, Schema
from deltune.errors import DataError
from tests.encoded import all_marked, prepared, write_rows
from tests.tiny import tiny_tokenizer

U, A = "<|user|>\n", "\n<|assistant|>\n"


def chat(*turns):
    return "<s>" + "".join(f"{U}{ask}{A}«{answer}</s>»" for ask, answer in turns)


def message(id, parent, role, text, rank=None, **more):
    """A row of OpenAssistant's messages table."""
    row = {"message_id": id, "parent_id": parent, "user_id": "u", "text": text, "role": role, "lang": "en", "review_count": 3}
    return row | {"review_result": True, "deleted": False, "rank": rank, "synthetic": False, "message_tree_id": "t1", "tree_state": "ready_for_export"} | more


MESSAGES = [
    message("t1", None, "prompter", "Hi"),
    message("a", "t1", "assistant", "worse", 1),
    message("b", "t1", "assistant", "best", 0),
    message("x", "t1", "assistant", "gone", -1, deleted=True),
    message("c", "b", "prompter", "More"),
    message("d", "c", "assistant", "unranked"),
    message("e", "c", "assistant", "ranked", 2),
    message("f", "c", "assistant", "spam", 0, review_result=False),
    message("g", "e", "prompter", "nobody answered this"),
]


def nested(id):
    row = next(dict(m) for m in MESSAGES if m["message_id"] == id)
    return row | {"replies": [nested(m["message_id"]) for m in MESSAGES if m["parent_id"] == id]}


CORE = {  # unnatural instructions
    "instruction": "Add.",
    "instances": [
        {"instruction_with_input": "Add.\n1 2", "input": "1 2", "constraints": "None.", "output": "3"},
        {"instruction_with_input": "Add.\n2 2", "input": "2 2", "constraints": "A number.", "output": "4"},
    ],
}
REFORMULATED = CORE | {"reformulations": [{"instruction": "Sum up {INPUT}", "instruction_with_input": "Sum up 1 2", "input": "1 2", "output": "3"}]}
EXAM = {
    "textbox_q_instruction": "回答", "textbox_q_context": "文", "textbox_question": "问", "textbox_answer": "C",
    "textbox_answer_analysis": "因为", "subject": "语文",
}  # fmt: skip
ROUNDS = {f"round_{i}": {"response": json.dumps({"Q": f"q{i}", "A": f"a{i}"})} for i in range(3)}

# rows in the published schema -> the format that is found in them, and the examples they give
SHAPES = {
    "chip2": ([{"text": "<human>: 2+2?\n<bot>: 4", "metadata": {"source": "unified_chip2"}}], "dialogue", [chat(("2+2?", "4"))]),
    "chip2, answer of lines": ([{"text": "<human>: List.\n<bot>: a:\n- b\n<bot> is no mark here"}], "dialogue", [chat(("List.", "a:\n- b\n<bot> is no mark here"))]),
    "guanaco": ([{"text": "### Human: Hi### Assistant: Yo\n\nyo### Human: Bye### Assistant: See you"}], "dialogue", [chat(("Hi", "Yo\n\nyo"), ("Bye", "See you"))]),
    "trees": ([{"message_tree_id": "t1", "tree_state": "ready_for_export", "prompt": nested("t1")}], "tree", [chat(("Hi", "best"), ("More", "ranked"))]),
    "messages table": (MESSAGES, "tree_rows", [chat(("Hi", "best"), ("More", "ranked"))]),
    "two trees": (
        [*MESSAGES[:3], message("t2", None, "prompter", "Ho", message_tree_id="t2"), message("z", "t2", "assistant", "ho", message_tree_id="t2")],
        "tree_rows",
        [chat(("Hi", "best")), chat(("Ho", "ho"))],
    ),
    "seed tasks": (
        [{"id": "seed_task_0", "name": "n", "instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "0"}], "is_classification": False}],
        "instances",
        [chat(("Add.\n1 2", "3")), chat(("Add.", "0"))],
    ),
    "unnatural core": ([CORE], "instances", [chat(("Add.\n1 2", "3")), chat(("Add.\n2 2", "4"))]),
    "unnatural full": ([REFORMULATED, CORE | {"reformulations": None}], "instances", [
        *(both := [chat(("Add.\n1 2", "3")), chat(("Add.\n2 2", "4"))]), chat(("Sum up 1 2", "3")), *both,
    ]),
    "supernatural, hub": (
        [{"task_name": "task1", "id": "task1-0", "definition": "Add.", "inputs": "1 2", "targets": "3"}],
        "task (input=inputs, output=targets)", [chat(("Add.\n1 2", "3"))],
    ),
    "coig exam": ([EXAM], "exam", [chat(("回答\n文\n问", "因为\nC"))]),
    "coig exam, no analysis": ([EXAM | {"textbox_q_context": "", "textbox_answer_analysis": ""}], "exam", [chat(("回答\n问", "C"))]),
    "coig translated": ([{"trans_instruction": "翻", "trans_input": "入", "trans_output": "出", "task_name_in_eng": "t"}], "alpaca", [chat(("翻\n入", "出"))]),
    "coig rounds": ([ROUNDS], "rounds", [chat(("q0", "a0"), ("q1", "a1"), ("q2", "a2"))]),
    "flan": ([{"inputs": "2+2?", "targets": "4", "task": "sum"}], "input_output (input=inputs, output=targets)", [chat(("2+2?", "4"))]),
    "flan, templates": ([{"inputs": "2+2?", "targets": "4", "_template_idx": 0, "_task_source": "Flan2021", "_task_name": "sum", "_template_type": "zs_opt"}], "input_output", [chat(("2+2?", "4"))]),
    "longform": ([{"input": "Write.", "output": "Text.", "source": "C4", "subset": "S"}], "input_output", [chat(("Write.", "Text."))]),
    "alpaca-gpt4": ([{"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is an instruction ..."}], "alpaca", [chat(("Add.\n1 2", "3"))]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_published_rows_are_recognised_and_train_their_answers(tmp_path, name):
    rows, format, expected = SHAPES[name]
    tokenizer = tiny_tokenizer()
    result = prepared(write_rows(tmp_path / "a.jsonl", rows), tokenizer, max_length=4096)
    assert result.report.sources[0].format.startswith(format)
    assert all_marked(result.train, tokenizer) == expected
    assert result.report.rejected == 0


def test_tasks_of_a_file_are_rows_that_share_its_definition(tmp_path):
    """natural-instructions' tasks/*.json, with the keys of the release."""
    body = {
        "Contributors": ["A"], "Source": ["s"], "Categories": ["c"], "Definition": ["Add.", "Be right."],
        "Positive Examples": [{"input": "0 0", "output": "0", "explanation": "e"}], "Negative Examples": [],
        "Instances": [{"id": "task1-0", "input": "1 2", "output": ["3", "three"]}, {"id": "task1-1", "input": "2 2", "output": ["4"]}],
        "Instance License": ["Apache 2.0"],
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "tasks" / "task001_add.json"
    file.write_text(json.dumps(body, indent=4))
    tokenizer = tiny_tokenizer()
    result = prepared(tmp_path / "tasks", tokenizer)
    assert result.report.sources[0].format == "task (definition=Definition)"
    assert all_marked(result.train, tokenizer) == [chat(("Add.\nBe right.\n1 2", "3")), chat(("Add.\nBe right.\n2 2", "4"))]
    assert result.train[1].row == f"{file}[1]"
    body["Instances"][1]["output"] = [""]
    file.write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"task001_add\.json\[1\]: output is empty"):
        prepared(tmp_path / "tasks", tokenizer)


HH = "\n\nHuman: Hi\n\nAssistant: Yo\n\nyo\n\nHuman: Bye\n\nAssistant: See you"


def test_hh_rlhf_is_asked_for_by_name_and_trains_the_preferred_answers(tmp_path):
    tokenizer = tiny_tokenizer()
    file = write_rows(tmp_path / "a.jsonl", [{"chosen": HH, "rejected": HH.replace("See you", "Go")}])
    data = prepared(file, tokenizer, format="hh-rlhf").train
    assert all_marked(data, tokenizer) == [chat(("Hi", "Yo\n\nyo"), ("Bye", "See you"))]
    with pytest.raises(DataError, match=r"preference pairs .* data\.format=hh-rlhf"):
        prepared(file, tokenizer)


def test_documents_have_their_title(tmp_path):
    tokenizer = tiny_tokenizer()
    row = {"id": 2, "uniqueKey": "0", "titleUkey": "2", "dataType": "t", "title": "Title", "content": "Body"}
    file = tmp_path / "part-1.json"
    file.write_text(json.dumps([row, row | {"content": "Title and body"}]))
    result = prepared(file, tokenizer, mode="pretrain")
    assert result.report.sources[0].format == "titled"
    assert all_marked(result.train, tokenizer) == ["T«itle Body</s>»", "T«itle and body</s>»"]
    with pytest.raises(DataError, match=r"data\.mode=pretrain"):
        prepared(file, tokenizer)
    # a title and a content of unknown make are not joined unless that is asked for
    plain = write_rows(tmp_path / "b.jsonl", [{"title": "T", "content": "Body"}])
    assert all_marked(prepared(plain, tokenizer, mode="pretrain").train, tokenizer) == ["B«ody</s>»"]
    assert all_marked(prepared(plain, tokenizer, mode="pretrain", format="wudao").train, tokenizer) == ["T« Body</s>»"]


def test_dialogues_are_texts_when_pretraining(tmp_path):
    tokenizer = tiny_tokenizer()
    file = write_rows(tmp_path / "a.jsonl", [{"text": "<human>: a\n<bot>: b"}])
    assert all_marked(prepared(file, tokenizer, mode="pretrain").train, tokenizer) == ["<«human>: a\n<bot>: b</s>»"]


def test_guanaco_as_qlora_trained_it(tmp_path):
    """QLoRA gives an empty input and the whole text as output: everything but its first token is trained. The same text
    comes from a frame with the marks, and from the column read as a document."""
    text = "### Human: Hi### Assistant: Yo"
    tokenizer = tiny_tokenizer()
    file = write_rows(tmp_path / "a.jsonl", [{"text": text}])
    assert all_marked(prepared(file, tokenizer, mode="pretrain", format="text").train, tokenizer) == ["#«## Human: Hi### Assistant: Yo</s>»"]
    frame = {"template": "plain", "prefix": "### Human: ", "postfix": "### Assistant: "}
    assert all_marked(prepared(file, tokenizer, **frame).train, tokenizer) == ["### Human: Hi### Assistant: «Yo</s>»"]
    assert all_marked(prepared(file, tokenizer, **frame, train_on_source=True).train, tokenizer) == ["#«## Human: Hi### Assistant: Yo</s>»"]


def test_an_instruction_of_several_wordings_takes_one_and_always_the_same(tmp_path):
    wordings = ["Add.", "Sum up.", "What is the sum?"]
    rows = [{"instruction": wordings, "input": str(i), "output": str(i)} for i in range(60)]
    tokenizer = tiny_tokenizer()
    first, again = (all_marked(prepared(write_rows(tmp_path / f"{n}.jsonl", rows), tokenizer).train, tokenizer) for n in "ab")
    assert first == again
    assert all(10 <= sum(w in text for text in first) <= 30 for w in wordings)


def test_instructions_take_the_alpaca_frame_where_there_is_no_template(tmp_path):
    for name in ("seed tasks", "supernatural, hub", "coig exam"):
        rows, _, _ = SHAPES[name]
        report = prepared(write_rows(tmp_path / "a.jsonl", rows), tiny_tokenizer(chat_template=None), max_length=4096).report
        assert report.sources[0].template == "alpaca", name


# ---- what is wrong with a row

TREE = {"prompt": nested("t1")}
BAD = [
    ("dialogue", {"text": "Hello"}, "text begins with 'Hello', with no speaker's mark"),
    ("dialogue", {"text": "<human>: a\n<bot>:  "}, "turn 2 (bot) is empty"),
    ("dialogue", {"text": "### Human: a"}, "there is no assistant message"),
    ("dialogue", {"text": 3}, "text must be text, but is a number"),
    ("tree", {"prompt": {"role": "prompter", "text": "a", "replies": []}}, "there is no assistant message"),
    ("tree", {"prompt": {"role": "robot", "text": "a"}}, "prompt has role 'robot'; known are prompter, assistant"),
    ("tree", {"prompt": {"role": "prompter", "text": " "}}, "prompt.text is empty"),
    ("tree", {"prompt": {"role": "prompter", "text": "a", "replies": [3]}}, "reply 1 must be a message with text, role and replies, but is a number"),
    ("tree_rows", MESSAGES[0] | {"messages": [MESSAGES[0], MESSAGES[4]]}, "message 'c' answers 'b', which is not among the rows of its tree"),
    ("tree_rows", MESSAGES[0] | {"messages": [MESSAGES[1] | {"parent_id": "a"}]}, "no message of the tree is without parent_id"),
    ("tree_rows", MESSAGES[0] | {"messages": [MESSAGES[0], MESSAGES[1], MESSAGES[1]]}, "message 'a' is there twice"),
    ("tree_rows", MESSAGES[0] | {"messages": [MESSAGES[0] | {"message_id": ["t1"]}]}, "message_id must be text, but is a list"),
    ("tree_rows", MESSAGES[0] | {"messages": [MESSAGES[0], MESSAGES[1] | {"parent_id": ["t1"]}]}, "message 'a' answers ['t1']"),
    ("tree", {"prompt": {"role": ["prompter"], "text": "a"}}, "prompt has role ['prompter']"),
    ("tree_rows", MESSAGES[0] | {"messages": [{"message_id": "a", "text": "x"}]}, "no key 'role'; keys found: message_id, text; a message needs"),
    ("instances", {"instruction": "a", "instances": [{"input": "b"}]}, "instances[0].output must be text, but is null"),
    ("instances", {"instruction": "a", "instances": [{"input": "b", "output": "c"}, {"input": "b", "output": ""}]}, "instances[1].output is empty"),
    ("instances", {"instruction": "a", "instances": [], "reformulations": [3]}, "reformulations[0] is a number, not an object with input and output"),
    ("task", {"definition": "a", "input": "b", "output": []}, "output is an empty list"),
    ("task", {"definition": [3], "input": "b", "output": "c"}, "a part of definition must be text, but is a number"),
    ("exam", {"instruction": "a", "question": "b", "answer": " "}, "answer is empty"),
    ("rounds", {"round_0": {"response": "{"}}, "round_0.response is text that is not valid JSON"),
    ("rounds", {"round_0": {"response": {"Q": "a"}}}, "round_0.response must be an object with Q and A"),
    ("rounds", {"round_0": {"response": {"Q": "a", "A": "b"}}, "round_3": {"response": {"Q": "a", "A": ""}}}, "round_3.response.A is empty"),
    ("titled", {"title": "a", "content": " "}, "content is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "reason"), BAD)
def test_a_row_that_does_not_fit_says_where(format, row, reason):
    needed, optional = ROLES[format]
    with pytest.raises(BadRow) as error:
        Schema(format, {role: role for role in (*needed, *optional)}).conversations(row)
    assert reason in str(error.value)


def test_every_format_of_this_kind_has_a_good_and_a_bad_row():
    basic = {"alpaca", "prompt_completion", "input_output", "sharegpt", "messages", "text"}
    assert set(ROLES) - basic == {format for format, _, _ in BAD}
    assert set(ROLES) - basic - {"titled"} <= {format.partition(" ")[0] for _, format, _ in SHAPES.values()}


def test_a_broken_tree_names_its_first_row_and_leaves_others_whole(tmp_path):
    other = [m | {"message_tree_id": "t0", "message_id": "0" + m["message_id"], "parent_id": m["parent_id"] and "0" + m["parent_id"]} for m in MESSAGES[:3]]
    rows = [*other, MESSAGES[0], *MESSAGES[4:], {"message_id": "lone"}, *other]
    file = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=rf"{file}:4: message 'c' answers 'b'"):
        prepared(file, tiny_tokenizer())
    counts = prepared(file, tiny_tokenizer(), on_bad="skip").report.counts
    assert (counts.rows, counts.used, counts.rejected) == (4, 2, 2)


def test_a_stream_of_trees_resumes_between_trees(tmp_path):
    rows = []
    for i in range(9):
        rows += [m | {"message_tree_id": f"t{i}", "text": f"{m['text']} {i}"} for m in MESSAGES]
    tokenizer, settings = tiny_tokenizer(), {"streaming": True, "stream_block": 2, "max_length": 4096}
    file = write_rows(tmp_path / "a.jsonl", rows)
    whole = [e.ids.tolist() for e in prepared(file, tokenizer, **settings).train.take(18)]
    assert len({tuple(ids) for ids in whole[:9]}) == 9
    stream = prepared(file, tokenizer, **settings).train
    stream.take(3)
    other = prepared(file, tokenizer, **settings).train
    other.load_state(stream.state())
    assert [e.ids.tolist() for e in other.take(15)] == whole[3:]


def test_foreign_shapes_are_not_taken_for_others():
    for row, expected in (
        ({"prompt": "text", "completion": "b"}, "prompt_completion"),
        ({"text": "Humans: no mark"}, "text"),
        ({"instruction": "a", "instances": "b", "output": "c"}, "alpaca"),
        ({"message_tree_id": "t", "messages": [{"role": "user", "content": "a"}]}, "messages"),
    ):
        assert detect([row], format="auto", fields={}, mode="sft", name="x").format == expected


# ---- turns

TWO = {"messages": [
    {"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}, {"role": "user", "content": "e"},
]}  # fmt: skip
SYSTEM = "<s><|system|>\ns\n"
TURNS = {
    "all": [f"{SYSTEM}{U}a{A}«b</s>»{U}c{A}«d</s>»{U}e\n"],
    "each": [f"{SYSTEM}{U}a{A}«b</s>»", f"{SYSTEM}{U}a{A}b</s>{U}c{A}«d</s>»"],
    "last": [f"{SYSTEM}{U}a{A}b</s>{U}c{A}«d</s>»"],
}


@pytest.mark.parametrize("turns", TURNS)
def test_an_example_for_the_conversation_for_each_answer_or_for_the_last(tmp_path, turns):
    tokenizer = tiny_tokenizer()
    result = prepared(write_rows(tmp_path / "a.jsonl", [TWO]), tokenizer, turns=turns)
    assert all_marked(result.train, tokenizer) == TURNS[turns]
    assert (result.report.rows, result.report.used, result.report.examples) == (1, 1, len(TURNS[turns]))


def test_turns_leave_out_what_a_row_does_not_train(tmp_path):
    messages = [m | ({"weight": 0} if m["content"] == "d" else {}) for m in TWO["messages"]]
    tokenizer = tiny_tokenizer()
    file = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    for turns in ("each", "last"):
        assert all_marked(prepared(file, tokenizer, turns=turns).train, tokenizer) == [f"{SYSTEM}{U}a{A}«b</s>»"]


def test_every_answer_is_trained_once_with_each_turn_apart(tmp_path):
    """In a plain frame, where the tokens of an answer do not depend on the rest."""
    tokenizer = tiny_tokenizer(chat_template=None)
    file = write_rows(tmp_path / "a.jsonl", [TWO, SHAPES["guanaco"][0][0] | {"messages": TWO["messages"][1:]}])
    trained = {}
    for turns in ("all", "each"):
        data = prepared(file, tokenizer, turns=turns).train
        trained[turns] = [int(label) for i in range(len(data)) for label in data[i].labels if label != -100]
    assert trained["each"] == trained["all"]


def test_a_long_history_loses_its_beginning(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=None)
    row = {"messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["abcd", "efgh", "ijkl", "mn"], strict=True)]}
    data = prepared(write_rows(tmp_path / "a.jsonl", [row]), tokenizer, turns="last", max_source_length=5).train
    assert all_marked(data, tokenizer) == ["</s>ijkl«mn</s>»"]


def test_turns_have_no_effect_on_documents(tmp_path):
    with pytest.raises(DataError, match=r"data\.turns has no effect"):
        prepared(write_rows(tmp_path / "a.jsonl", [{"text": "a"}]), tiny_tokenizer(), mode="pretrain", turns="each")
