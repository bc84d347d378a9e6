"""`deltune generate`: only the answer on standard output; a file's answers in its order, and a file that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltune.commands import generate as command
from deltune.commands.prompts import PromptWriter, parse, read_prompts
from deltune.data.config import DataConfig
from deltune.data.conversation import BadRow, Conversation, Message
from deltune.data.encode import Encoder
from deltune.errors import ConfigError, DataError
from deltune.models.generation import GenerateOptions, generate, render_prompt
from deltune.settings import GenerateSettings, load
from tests.test_generate_model import chatty
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose answers differ from prompt to prompt."""
    place = tmp_path_factory.mktemp("chatty")
    chatty().save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


def prompts_file(tmp_path, rows) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def expected(prompts, **options) -> list[str]:
    tokenizer = tiny_tokenizer()
    return [a.text for a in generate(chatty(), tokenizer, [render_prompt(tokenizer, p) for p in prompts], GenerateOptions(**options))]


def test_one_prompt_prints_its_answer_and_nothing_else(folder, capsys):
    assert command.main([f"model={folder}", "prompt=hello, you", "max_new_tokens=12", "system=Be kind."]) == 0
    tokenizer = tiny_tokenizer()
    ids = render_prompt(tokenizer, "hello, you", "Be kind.")
    answer = generate(chatty(), tokenizer, [ids], GenerateOptions(max_new_tokens=12))[0]
    assert capsys.readouterr().out == answer.text + "\n"
    with pytest.raises(ConfigError, match="empty"):
        command.main([f"model={folder}", "prompt= "])


def test_an_adapter_answers_as_the_model_it_was_saved_from(folder, tmp_path, capsys):
    import torch

    from deltune import LoraConfig, attach, save_adapter
    from deltune.models.config import ModelConfig
    from deltune.models.load import load as load_model

    model = attach(load_model(ModelConfig(path=str(folder))), LoraConfig(rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    answer = generate(model, tokenizer, [render_prompt(tokenizer, "hello")], GenerateOptions(max_new_tokens=12))[0]
    assert answer.text != expected(["hello"], max_new_tokens=12)[0]
    command.main([f"model={folder}", f"adapter={tmp_path / 'adapter'}", "prompt=hello", "max_new_tokens=12"])
    assert capsys.readouterr().out == answer.text + "\n"


QUESTIONS = [f"question {'x' * (n % 5)} {n}" for n in range(9)]


def test_a_files_answers_come_in_its_order(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "CHUNK", 2)
    file, out = prompts_file(tmp_path, [{"prompt": q, "id": n} for n, q in enumerate(QUESTIONS)]), tmp_path / "answers.jsonl"
    words = [f"model={folder}", f"file={file}", f"out={out}", "max_new_tokens=10", "batch=2"]
    command.main(words)
    lines = lines_of(out)
    assert [line["prediction"] for line in lines] == expected(QUESTIONS, max_new_tokens=10)
    assert [line["input"]["id"] for line in lines] == list(range(9))
    assert [line["row"] for line in lines] == [f"{file}:{n}" for n in range(1, 10)]
    assert len({line["prediction"] for line in lines}) > 5
    whole = out.read_bytes()
    command.main(words)
    assert out.read_bytes() == whole, "a finished file is left as it is"


@pytest.mark.parametrize("drawn", [[], ["temperature=1.0"]])
def test_an_interrupted_file_goes_on_to_the_same_bytes(folder, tmp_path, drawn):
    file, out = prompts_file(tmp_path, [{"prompt": q} for q in QUESTIONS]), tmp_path / "answers.jsonl"
    words = [f"model={folder}", f"file={file}", f"out={out}", "max_new_tokens=10", *drawn]
    command.main(words)
    whole = out.read_bytes()
    for cut in (0, 1, 200, len(whole) // 2, len(whole) - 1):
        out.write_bytes(whole[:cut])
        command.main([*words, "batch=3"])
        assert out.read_bytes() == whole, cut


def test_answers_made_otherwise_are_not_mixed(folder, tmp_path):
    file, out = prompts_file(tmp_path, [{"prompt": q} for q in QUESTIONS[:2]]), tmp_path / "answers.jsonl"
    words = [f"model={folder}", f"file={file}", f"out={out}", "max_new_tokens=4"]
    command.main(words)
    with pytest.raises(ConfigError, match=r"max_new_tokens was 4 and is 5"):
        command.main([*words[:3], "max_new_tokens=5"])
    prompts_file(tmp_path, [{"prompt": "other"}])
    with pytest.raises(ConfigError, match="other files"):
        command.main(words)
    (tmp_path / "answers.settings.json").unlink()
    with pytest.raises(ConfigError, match="nothing says what made it"):
        command.main(words)


def test_a_foreign_line_in_the_output_is_named(folder, tmp_path):
    file, out = prompts_file(tmp_path, [{"prompt": q} for q in QUESTIONS[:3]]), tmp_path / "answers.jsonl"
    words = [f"model={folder}", f"file={file}", f"out={out}", "max_new_tokens=4"]
    command.main(words)
    lines = out.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for bad, reason in ((["{}"], "not an answer"), ([lines[0]], "stands there twice"), (['{"row": "z:1"}'], "no row of the file")):
        out.write_text("\n".join([*lines[:1], *bad]) + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=rf"answers.jsonl:2: .*{reason}"):
            command.main(words)


def test_without_out_the_answers_are_printed_as_json_lines(folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\nsecond\n")
    command.main([f"model={folder}", f"file={file}", "max_new_tokens=6"])
    lines = [json.loads(line) for line in capsys.readouterr().out.rstrip("\n").split("\n")]
    assert [line["prediction"] for line in lines] == expected(["first", "second"], max_new_tokens=6)
    assert [line["row"] for line in lines] == [f"{file}:1", f"{file}:3"]


def test_csv_and_json_files_of_prompts(folder, tmp_path):
    (tmp_path / "p.csv").write_text('question,answer\n"a, b",c\n')
    (tmp_path / "p.json").write_text('[{"instruction": "do", "input": "this", "output": "ref"}]')
    for name, conversation in (("p.csv", [("user", "a, b", "")]), ("p.json", [("user", "do", "this")])):
        _, (prompt,) = read_prompts(str(tmp_path / name))
        assert [(m.role, m.content, m.input) for m in prompt.conversation.messages] == conversation


def test_prompts_that_leave_no_room_are_named_before_anything_is_answered(folder, tmp_path):
    out = tmp_path / "o.jsonl"
    file = prompts_file(tmp_path, [{"prompt": "ok"}, {"prompt": "x" * 600}])
    with pytest.raises(DataError, match=r"prompts.jsonl:2: .* 512"):
        command.main([f"model={folder}", f"file={file}", f"out={out}"])
    assert out.read_text() == ""


# -- rows ----------------------------------------------------------------------------------------------------------


def test_a_training_rows_answer_is_left_out():
    for row, turns in [
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, ["s", "a"]),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}, ["a", "b", "c"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a"]),
        ({"conversations": [{"role": "user", "content": "a"}]}, ["a"]),
        ({"instruction": "a", "output": "b", "history": [["h", "i"]], "system": "s"}, ["s", "h", "i", "a"]),
        ({"prompt": "a", "completion": "b"}, ["a"]),
        ({"question": "a", "answer": "b"}, ["a"]),
        ({"text": "a"}, ["a"]),
    ]:
        conversation, _ = parse(row)
        assert [message.content for message in conversation.messages] == turns


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"output": "b"}, "no prompt; keys found: output"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 3}, "must be text"),
        ({"messages": "a"}, "list of messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "robot"),
        ([1], "not an object"),
    ],
)
def test_rows_without_a_prompt_are_named(row, reason, tmp_path):
    with pytest.raises(BadRow, match=reason):
        parse(row)
    file = prompts_file(tmp_path, [{"prompt": "fine"}, row])
    with pytest.raises(DataError, match=r"prompts.jsonl:2: "):
        read_prompts(str(file))


# -- prompts are those of training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
@pytest.mark.parametrize("format", ["messages", "alpaca"])
def test_a_prompt_is_what_stands_before_the_answer_in_training(template, format):
    tokenizer = tiny_tokenizer()
    parts = {"system": "S.", "meta_prompt": "M ", "prefix": "<", "postfix": ">"}
    settings = load(GenerateSettings, mapping={"prompt": "x", "template": template, **parts})
    turns = (Message("user", "hello", input="in" if format == "alpaca" else ""), Message("assistant", "first", train=True), Message("user", "more"))
    encoder = Encoder(DataConfig(template=template, **parts), tokenizer, format)
    ((examples, _),) = encoder.encode([[Conversation((*turns, Message("assistant", "the real answer", train=True)))]])
    row = examples[-1]
    answer = tokenizer("the real answer")["input_ids"] + [tokenizer.eos_token_id]
    start = len(row.ids) - len(answer)
    assert row.ids[start:].tolist() == answer
    assert PromptWriter(settings, tokenizer).conversation(Conversation(turns), format) == row.ids[:start].tolist()


@pytest.mark.parametrize("with_template", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_render_prompt_writes_what_training_writes_by_default(with_template, bos):
    """The model's own room cannot see the data's; this holds the two together."""
    tokenizer = tiny_tokenizer() if with_template else tiny_tokenizer(None)
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    writer = PromptWriter(load(GenerateSettings, mapping={"prompt": "x"}), tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for messages in (turns[:1], turns, [{"role": "system", "content": "S"}, *turns]):
        assert render_prompt(tokenizer, messages) == writer.messages(messages)
    assert render_prompt(tokenizer, "a").count(256) == int(bos or with_template)


def test_a_run_without_chat_template_is_asked_in_the_frame_it_was_trained_in(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=None)
    (tmp_path / "adapter").mkdir()
    start = {"kind": "start", "description": {"data": {"sources": [{"template": "alpaca"}]}}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(start) + "\n")

    def asked(adapter) -> str:
        settings = load(GenerateSettings, mapping={"prompt": "x"})
        object.__setattr__(settings, "adapter", adapter)
        return tokenizer.decode(PromptWriter(settings, tokenizer).messages([{"role": "user", "content": "Go."}]))

    assert asked(None) == "Go."
    assert asked(str(tmp_path / "adapter")).endswith("### Instruction:\nGo.\n\n### Response:\n")
