"""Beams, constraints and the other fields of transformers' GenerationConfig: as transformers alone computes them, one prompt at
a time, and the same in any batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import GenerationConfig

from deltune.errors import ConfigError
from deltune.models import decoding
from deltune.models.choosing import Trie
from deltune.models.decoding import ELSEWHERE, REFUSED, DecodingConfig
from deltune.models.generation import GenerateOptions, eos_ids, generate, stream
from tests.test_generate_model import TOKENIZER, chatty

EOS = sorted(eos_ids(chatty(), TOKENIZER))
PROMPTS = [[5, 9, 2], [7], list(range(60, 100)), [11, 3], [200, 201, 202, 203, 204], [7], list(range(20, 110))]
SAID = generate(chatty(seed=3), TOKENIZER, [PROMPTS[0]], GenerateOptions(max_new_tokens=4))[0].ids  # what can be made to end answers


def options(temperature=0.0, max_new_tokens=12, stop=(), choices=(), seed=42, **fields) -> GenerateOptions:
    return GenerateOptions(temperature=temperature, max_new_tokens=max_new_tokens, stop=stop, choices=choices, seed=seed, decoding=DecodingConfig(**fields))


def transformers_alone(model, ids: list[int], **fields) -> list[int]:
    """The new tokens of `model.generate`, by fields that transformers is given itself."""
    settings = GenerationConfig(**{"max_new_tokens": 12, "do_sample": False, "pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": EOS} | fields)
    with torch.no_grad():
        found = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), generation_config=settings)
    new = found[0, len(ids) :].tolist()
    ends = settings.eos_token_id
    return new[: 1 + next((i for i, token in enumerate(new) if token in ends), len(new))]


def test_every_field_of_transformers_has_a_place_or_a_reason():
    theirs = set(vars(GenerationConfig()))
    ours = {field.name for field in dataclasses.fields(DecodingConfig)} - {"bad_words", "watermark", "stop_ids"}
    assert ours | set(ELSEWHERE) | set(REFUSED) == theirs
    assert not ours & set(ELSEWHERE) and not ours & set(REFUSED) and not set(ELSEWHERE) & set(REFUSED)


# ours -> what transformers is given, where these differ
FIELDS = [
    ({"num_beams": 3}, {}),
    ({"num_beams": 4, "length_penalty": -1.0}, {}),
    ({"num_beams": 3, "early_stopping": True, "length_penalty": 2.0}, {}),
    ({"num_beams": 2, "no_repeat_ngram_size": 2}, {}),
    ({"min_new_tokens": 6, "stop_ids": SAID[1:2]}, {"min_new_tokens": 6, "eos_token_id": EOS + SAID[1:2]}),
    ({"min_length": 8, "stop_ids": SAID[1:2]}, {"min_length": 8, "eos_token_id": EOS + SAID[1:2]}),
    ({"no_repeat_ngram_size": 1}, {}),
    ({"encoder_no_repeat_ngram_size": 1}, {}),
    ({"encoder_repetition_penalty": 3.0}, {}),
    ({"suppress_tokens": list(range(0, 200))}, {}),
    ({"begin_suppress_tokens": list(range(0, 200))}, {}),
    ({"forced_eos_token_id": 77}, {}),
    ({"forced_bos_token_id": 78}, {}),
    ({"exponential_decay_length_penalty": [2.0, 3.0]}, {"exponential_decay_length_penalty": (2, 3.0)}),
    ({"guidance_scale": 3.0}, {}),
    ({"watermark": {"bias": 8.0, "context_width": 1.0}}, {"watermarking_config": {"bias": 8.0, "context_width": 1, "greenlist_ratio": 0.25, "hashing_key": 15485863, "seeding_scheme": "lefthash"}}),
    ({"use_cache": False}, {}),
    ({"cache_implementation": "static"}, {}),
    ({"stop_ids": SAID[2:3]}, {"eos_token_id": EOS + SAID[2:3]}),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), FIELDS, ids=["+".join(ours) for ours, _ in FIELDS])
def test_a_field_does_what_it_does_in_transformers_in_any_batch(ours, theirs):
    model = chatty(seed=3)
    found = generate(model, TOKENIZER, PROMPTS, options(**ours), batch=4)
    for ids, answer in zip(PROMPTS, found, strict=True):
        given = theirs or ours
        if "watermarking_config" in given:
            from transformers import WatermarkingConfig

            given = {"watermarking_config": WatermarkingConfig(**given["watermarking_config"])}
        assert answer.ids == transformers_alone(model, ids, **given)


NO_CHANGE = {"use_cache", "cache_implementation"}


@pytest.mark.parametrize("ours", [ours for ours, _ in FIELDS if not NO_CHANGE & set(ours)], ids="+".join)
def test_these_fields_change_an_answer(ours):
    """Else the test above would hold nothing."""
    model = chatty(seed=3)
    without = {"stop_ids": ours["stop_ids"]} if len(ours) > 1 and "stop_ids" in ours else {}
    assert generate(model, TOKENIZER, PROMPTS, options(**ours)) != generate(model, TOKENIZER, PROMPTS, options(**without))


def test_words_are_kept_out_or_favoured_however_they_are_written():
    model = chatty(seed=3)
    free = generate(model, TOKENIZER, PROMPTS, options())
    word = TOKENIZER.decode([free[0].ids[1]])
    assert word.strip() and word in free[0].text
    for answer in generate(model, TOKENIZER, PROMPTS, options(bad_words=[word])):
        assert free[0].ids[1] not in answer.ids
    other = TOKENIZER.decode([(free[0].ids[1] + 40) % 200 + 33])
    assert all(other in answer.text for answer in generate(model, TOKENIZER, PROMPTS, options(sequence_bias={other: 200.0}, max_new_tokens=3)))


@pytest.mark.parametrize("fields", [{"typical_p": 0.3}, {"epsilon_cutoff": 0.05}, {"eta_cutoff": 0.9}, {"top_h": 0.3}])
def test_drawn_tokens_stay_among_those_that_transformers_keeps(fields):
    model = chatty(seed=3)
    (warper,) = decoding.warpers(DecodingConfig(**fields))
    outside = 0
    for number in range(10):
        (answer,) = generate(model, TOKENIZER, [PROMPTS[0]], options(1.5, 4, **fields), numbers=[number])
        (free,) = generate(model, TOKENIZER, [PROMPTS[0]], options(1.5, 4), numbers=[number])
        for ids, allowed in ((answer.ids, True), (free.ids, False)):
            for i, token in enumerate(ids):
                before = torch.tensor([PROMPTS[0] + ids[:i]])
                with torch.no_grad():
                    scores = model(before).logits[:, -1] / 1.5
                kept = bool(torch.isfinite(warper(before, scores))[0, token])
                assert kept or not allowed
                outside += not kept
    assert outside > 0  # without the field, tokens are drawn that it would have kept out


def test_beams_that_draw_depend_on_seed_and_number_alone():
    model = chatty(seed=3)
    state = torch.random.get_rng_state()
    one = generate(model, TOKENIZER, PROMPTS, options(1.5, num_beams=2), batch=4)
    assert one == generate(model, TOKENIZER, PROMPTS, options(1.5, num_beams=2), batch=1)
    assert one[2:3] == generate(model, TOKENIZER, PROMPTS[2:3], options(1.5, num_beams=2), numbers=[2])
    assert one != generate(model, TOKENIZER, PROMPTS, options(1.5, num_beams=2, seed=43))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_stop_string_cuts_what_a_search_found():
    model = chatty(seed=3)
    (free,) = generate(model, TOKENIZER, [PROMPTS[0]], options(num_beams=3))
    middle = free.text[2:5]
    (cut,) = generate(model, TOKENIZER, [PROMPTS[0]], options(num_beams=3, stop=(middle,)))
    assert cut.stopped_by == "stop" and cut.text == free.text[: free.text.index(middle)]
    assert "".join(stream(model, TOKENIZER, PROMPTS[0], options(num_beams=3))) == free.text


CHOICES = ("yes", "yes, indeed", "no", "perhaps")


@pytest.mark.parametrize("fields", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_only_listed_texts_come_out_and_a_text_that_begins_another_can(fields, temperature):
    seen = set()
    for seed in range(3):
        model = chatty(seed=seed)
        for answer in generate(model, TOKENIZER, PROMPTS, options(temperature, 20, choices=CHOICES, **fields), batch=4):
            assert answer.text in CHOICES and answer.stopped_by == "eos"
            seen.add(answer.text)
    assert len(seen) > 1


def test_the_most_probable_listed_text_is_found_by_enough_beams():
    """Held to the log-probability of each text with its EOS, one after the other."""
    model = chatty(seed=3)
    texts = [TOKENIZER(text, add_special_tokens=False)["input_ids"] + [TOKENIZER.eos_token_id] for text in CHOICES]
    for prompt in PROMPTS:
        scores = []
        for ids in texts:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
            scores.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()))
        (answer,) = generate(model, TOKENIZER, [prompt], options(max_new_tokens=20, choices=CHOICES, num_beams=8, length_penalty=0.0))
        assert answer.text == CHOICES[scores.index(max(scores))]


def test_a_trie_knows_what_may_follow():
    trie = Trie([[1, 2, 9], [1, 3, 9], [4, 9], [1, 2, 5, 9]])
    assert trie.after([]) == [1, 4] and trie.after([1]) == [2, 3] and trie.after([1, 2]) == [9, 5]
    assert trie.after([1, 2, 9]) == [] and trie.after([7]) == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"length_penalty": 2.0}, "length_penalty has no effect without beams"),
        ({"typical_p": 0.5}, "typical_p has no effect while temperature is 0"),
        ({"exponential_decay_length_penalty": [1.0]}, "two numbers"),
        ({"watermark": {"colour": 1.0}}, "watermark has colour; there are greenlist_ratio"),
        ({"use_cache": False, "cache_implementation": "static"}, "without effect"),
    ],
)
def test_what_would_have_no_effect_is_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        options(**fields)
    with pytest.raises(ConfigError, match="has no tokens"):
        generate(chatty(), TOKENIZER, PROMPTS[:1], options(choices=("",)))
