"""Prompts: what stands in them, what comes before an answer, which exemplars, and templates of the user's own."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter

import pytest

from deltune.config import check
from deltune.data.render import ALPACA_WITHOUT_INPUT
from deltune.errors import ConfigError, DataError
from deltune.evaluation.statistics import proportion, wilson_interval
from deltune.evaluation.tasks.catalogue import TASKS
from deltune.evaluation.tasks.item import PROTOCOLS, Item, permuted
from deltune.evaluation.tasks.templates import TEMPLATES, options, prompt, shots_for, template_named

ITEM = Item("t:1", "high_school_biology", "A {passage}.", "Which {one}?", ("red", "{blue}"), 1)
SHOT = Item("t:2", "high_school_biology", "", "What?", ("one", "two"), 0)
SUM = Item("g:1", "", "", "2 + 2?", (), ("4",))
WORKED = Item("g:2", "", "", "1 + 1?", (), ("2",), "One and one are 2.")


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_prompt_ends_in_a_space_and_the_space_is_the_answers(name):
    template = TEMPLATES[name]
    assert template.problems() == [] and template.help
    for protocol in PROTOCOLS:
        for shots in ([], [SHOT]):
            for item in (ITEM, SHOT):
                text = prompt(item, template, shots, protocol)
                assert text and not text.endswith(" ")
                for option in options(item, template, protocol):
                    assert option.startswith(" ") == (not text.endswith(("\n", "：")))
                    assert not option.startswith(("  ", "\n"))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("protocol", ["letters", "likelihood"])
def test_a_prompts_tokens_stay_its_own_when_an_option_follows(real_data, name, protocol):
    """With real merges: the joined text begins with the prompt's tokens, so that all options share them."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(real_data / "tokenizers/torchtune_tokenizer.json")).encode
    text = prompt(ITEM, TEMPLATES[name], [SHOT], protocol)
    alone = encode(text, add_special_tokens=False).ids
    for option in options(ITEM, TEMPLATES[name], protocol):
        joined = encode(text + option, add_special_tokens=False)
        assert joined.ids[: len(alone)] == alone
        assert joined.offsets[len(alone)][0] == len(text) and len(joined.ids) > len(alone)


PLAIN = "A {passage}.\n\nWhich {one}?\nA. red\nB. {blue}\nAnswer:"


def test_the_parts_are_put_together_as_they_are_written():
    plain = TEMPLATES["plain"]
    assert prompt(ITEM, plain, [], "letters") == prompt(ITEM, plain, [], "generation") == PLAIN
    assert prompt(ITEM, plain, [SHOT], "letters") == "What?\nA. one\nB. two\nAnswer: A\n\n" + PLAIN
    assert options(ITEM, plain, "letters") == options(ITEM, plain, "generation") == [" A", " B"]


def test_whole_choices_are_compared_without_being_listed():
    plain = TEMPLATES["plain"]
    assert prompt(ITEM, plain, [SHOT], "likelihood") == "What?\nAnswer: one\n\nA {passage}.\n\nWhich {one}?\nAnswer:"
    assert options(ITEM, plain, "likelihood") == [" red", " {blue}"]


def test_an_empty_choice_is_the_end_of_its_line():
    item = Item("t:8", "", "", "q", ("x", "", " "), 1)
    assert options(item, TEMPLATES["plain"], "likelihood") == [" x", "\n", "\n"]
    assert options(item, TEMPLATES["panda-zh"], "likelihood") == ["x", "\n", "\n"]


def test_alpacas_frame_is_the_one_that_training_uses():
    text = prompt(ITEM, TEMPLATES["alpaca"], [], "letters")
    inner = PLAIN.removesuffix("\nAnswer:")
    assert text == f"{ALPACA_WITHOUT_INPUT}\n\n### Instruction:\n{inner}\n\n### Response:\n"
    assert options(ITEM, TEMPLATES["alpaca"], "letters") == ["A", "B"]
    assert "\nAnswer: A\n\n" in prompt(ITEM, TEMPLATES["alpaca"], [SHOT], "letters")


def test_pandallms_prompts_to_the_byte_at_zero_shots():
    """Instruction, blank line, no exemplars, blank line; each option ends its line and a blank line follows the list."""
    assert prompt(ITEM, TEMPLATES["reclor"], [], "generation") == (
        "Answer the following question with the given context:\n\n" + "\n\n"
        "Context:\nA {passage}.\n\nQuestion:\nWhich {one}?\n\nOptions:\nA: red\nB: {blue}\n" + "\n\nThe answer is"
    )
    assert prompt(ITEM, TEMPLATES["panda-zh"], [], "generation") == (
        "阅读下面的文章并从选项中选择的答案回答问题：\n\n" + "\n\n"
        "A {passage}.\n\n问题：\nWhich {one}?\n\n选项：\nA: red\nB: {blue}\n" + "\n\n本题的答案是："
    )
    assert options(ITEM, TEMPLATES["panda-zh"], "letters") == ["A", "B"]


def test_chinese_stems_name_the_choices():
    assert prompt(ITEM, TEMPLATES["zh-stems"], [SHOT], "letters").endswith("\n甲、red\n乙、{blue}\n答案：")
    assert options(ITEM, TEMPLATES["zh-stems"], "letters") == ["甲", "乙"]


def test_a_yes_or_no_question_compares_the_words():
    item = Item("s:1", "", "Fish swim.", "Do fish swim?", ("yes", "no"), 0)
    assert prompt(item, TEMPLATES["yes-no"], [], "letters") == "Question: Do fish swim?\nAnswer:"
    assert prompt(item, TEMPLATES["yes-no-facts"], [], "letters") == "Facts: Fish swim.\nQuestion: Do fish swim?\nAnswer:"
    assert options(item, TEMPLATES["yes-no"], "letters") == options(item, TEMPLATES["yes-no"], "likelihood") == [" yes", " no"]


def test_exemplars_of_sums_show_the_work():
    assert prompt(SUM, TEMPLATES["gsm8k"], [WORKED, SUM], "generation") == (
        "Question: 1 + 1?\nAnswer: One and one are 2.\n#### 2\n\nQuestion: 2 + 2?\nAnswer: 4\n\nQuestion: 2 + 2?\nAnswer:"
    )


def test_what_cannot_be_compared_or_named_is_refused():
    with pytest.raises(ConfigError, match="g:1 has no choices"):
        options(SUM, TEMPLATES["plain"], "letters")
    with pytest.raises(DataError, match=r"t:9: 3 choices, and the template has 2 labels"):
        options(Item("t:9", "", "", "q", ("1", "2", "3"), 0), TEMPLATES["yes-no"], "letters")


# -- exemplars ----------------------------------------------------------------------------------------------------


def pool_of(*groups, each=5):
    return [Item(f"dev:{group}{i}", group, "", f"{group} {i}?", ("x", "y"), i % 2) for group in groups for i in range(each)]


def test_the_own_group_comes_first_in_its_order():
    pool = pool_of("b", "a", "c")
    asked = Item("t:1", "a", "", "?", ("x", "y"), 0)
    assert [shot.id for shot in shots_for(asked, pool, 3, seed=0)] == ["dev:a0", "dev:a1", "dev:a2"]
    assert [shot.id for shot in shots_for(asked, pool, 5, seed=9)] == [f"dev:a{i}" for i in range(5)]
    more = shots_for(asked, pool, 8, seed=1)
    assert [shot.group for shot in more[:5]] == ["a"] * 5 and {shot.group for shot in more[5:]} <= {"b", "c"}
    assert len(shots_for(asked, pool, 99, seed=1)) == 15 and shots_for(asked, pool, 0, seed=1) == []


def test_an_item_is_never_its_own_exemplar():
    pool = pool_of("a", each=4)
    for item in pool:
        assert item not in shots_for(item, pool, 4, seed=0)
        twin = Item("other:1", item.group, item.context, item.question, ("y", "x"), 0)  # from another file, in another order
        assert item not in shots_for(twin, pool, 4, seed=0)
        assert len(shots_for(twin, pool, 4, seed=0)) == 3
        reworded = dataclasses.replace(item, question="In other words?")  # by id
        assert item not in shots_for(reworded, pool, 4, seed=0)


def test_exemplars_without_groups_are_drawn_by_the_seed_and_shared():
    pool = pool_of("", each=300)
    items = [Item(f"t:{i}", "", "", f"item {i}?", ("x", "y"), 0) for i in range(20)]
    first = shots_for(items[0], pool, 5, seed=3)
    assert all(shots_for(item, pool, 5, seed=3) == first for item in items)  # one prefix for all
    assert shots_for(items[0], pool, 3, seed=3) == first[:3]
    drawn = {tuple(shot.id for shot in shots_for(items[0], pool, 5, seed=seed)) for seed in range(20)}
    assert len(drawn) == 20
    left = shots_for(first[0], pool, 5, seed=3)
    assert left[:4] == first[1:] and first[0] not in left and len(left) == 5


# -- the order of choices -----------------------------------------------------------------------------------------


def test_permuted_choices_keep_their_answer(real_data):
    items = TASKS["mmlu"].read(real_data / "mmlu")
    moved = [permuted(item, seed=1) for item in items]
    for before, after in zip(items, moved, strict=True):
        assert after.choices[after.answer] == before.choices[before.answer]
        assert sorted(after.choices) == sorted(before.choices) and after.id == before.id
    assert moved == [permuted(item, seed=1) for item in items] != [permuted(item, seed=2) for item in items]
    orders = {tuple(map(before.choices.index, after.choices)) for before, after in zip(items, moved, strict=True)}
    assert len({order for order in orders if len(set(order)) == 4}) == 24  # each item has an order of its own
    counts = Counter(item.answer for item in moved)
    assert all(proportion(counts[place], len(items)).low < 0.25 < proportion(counts[place], len(items)).high for place in range(4))
    assert permuted(SUM, seed=1) == SUM


# -- scoring functions that know all, or nothing ------------------------------------------------------------------

REAL = {"mmlu": "mmlu", "c3-d": "c3", "c3-m": "c3", "logiqa2": "logiqa2", "logiqa2-zh": "logiqa2"}


@pytest.mark.parametrize("protocol", ["letters", "likelihood"])
@pytest.mark.parametrize("task", REAL)
def test_on_all_real_rows_who_knows_is_always_right_and_who_guesses_is_at_chance(real_data, task, protocol):
    items, template = TASKS[task].read(real_data / REAL[task]), template_named(TASKS[task].template)
    guess, right, guessed, chance = random.Random(f"{task} {protocol}"), 0, 0, 0.0
    for item in items:
        text, texts = prompt(item, template, [], protocol), options(item, template, protocol)
        wanted = item.choices[item.answer] if protocol == "likelihood" else "ABCD"[item.answer]
        scores = [float(option.strip() == wanted.strip()) for option in texts]  # knows the answer's text, not its place
        right += scores.index(max(scores)) == item.answer or texts[scores.index(max(scores))] == texts[item.answer]
        guessed += guess.randrange(len(texts)) == item.answer
        chance += 1 / len(texts)
        assert len(texts) == len(item.choices) and item.question in text
    low, high = wilson_interval(guessed, len(items), z=3.89)  # one in 10,000 misses, since there are ten of these
    assert right == len(items) and low < chance / len(items) < high


# -- templates of the user's own ----------------------------------------------------------------------------------


def test_a_file_of_ones_own_starts_from_a_named_template(tmp_path):
    (tmp_path / "own.yaml").write_text('base: zh\ncue: "\\n选择："\nlabels: [一, 二]\nreverse: true\n', "utf-8")
    own = template_named(str(tmp_path / "own.yaml"))
    assert prompt(ITEM, own, [], "letters") == "A {passage}.\n\n问题：Which {one}?\n一. red\n二. {blue}\n选择："
    assert own.reverse and own.space == TEMPLATES["zh"].space
    (tmp_path / "own.json").write_text(json.dumps({"cue": "\nSo:", "header": "About {subject}. {{Choose}}\n"}), "utf-8")
    text = prompt(ITEM, template_named(str(tmp_path / "own.json")), [], "letters")
    assert text.startswith("About high school biology. {Choose}\nA {passage}.") and text.endswith("\nSo:")


REFUSED = {
    "quest: '{question}'": "question",
    "question: 'Question'": "must hold {question}",
    "frame: '{cue}'": "must hold {prompt}",
    "choice: '{letter}. {text}'": "names {letter}; {label}, {text} may stand in it",
    "header: 'about {context}'": "names {context}; {subject} may stand in it",
    "context: 'a { brace'": "is not a template",
    "cue: 'Answer: '": "ends in a space",
    "cue: \"Answer:\\n\"": "must be empty after a cue",
    "labels: [A, A]": "must be different",
    "stop: ['']": "holds an empty text",
    "cleaner: letter": "must have one group",
    "cleaner: '('": "is not a regular expression",
    "reverse: perhaps": "reverse=perhaps",
    "base: mmluu": "base=mmluu",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_wrong_in_a_file_is_named(tmp_path, line):
    (tmp_path / "own.yaml").write_text(line + "\n", "utf-8")
    with pytest.raises(ConfigError) as error:
        template_named(str(tmp_path / "own.yaml"))
    assert REFUSED[line] in str(error.value) and "own.yaml" in str(error.value)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"template=reclorr: there are plain, .*Did you mean reclor\?"):
        template_named("reclorr")


def test_built_templates_are_what_the_table_says():
    for template in TEMPLATES.values():
        assert check.build(type(template), vars(template)) == template
