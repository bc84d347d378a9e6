"""Answers of a model: the same tokens alone, in a batch, streamed, and without a cache; and nothing else disturbed."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from deltune.errors import ConfigError, ModelError, NumericsError
from deltune.models.choosing import nucleus
from deltune.models.generation import (
    GenerateOptions,
    context_window,
    end_of_turn,
    eos_ids,
    generate,
    render_prompt,
    stream,
)
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPTS = [[5, 9, 2], [7], list(range(60, 100)), [11, 3], [200, 201, 202, 203, 204], [7]]


def greedy_loop(model, ids: list[int], count: int, eos: set[int]) -> list[int]:
    """The slow way: the whole sequence through the model for each token, no cache, no padding."""
    ids, new = list(ids), []
    with torch.no_grad():
        while len(new) < count and not (new and new[-1] in eos):
            new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new


def chatty(seed: int = 0, **changes):
    """A model with larger weights, whose answers to different prompts differ and sometimes end."""
    model = tiny_model(seed, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_greedy_answers_are_those_of_the_plain_loop(batch):
    model = chatty()
    eos = eos_ids(model, TOKENIZER)
    answers = generate(model, TOKENIZER, PROMPTS, GenerateOptions(max_new_tokens=24), batch=batch)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = greedy_loop(model, prompt, 24, eos)
        assert answer.ids == expected
        assert answer.stopped_by == ("eos" if expected[-1] in eos else "length")
        assert answer.num_prompt_tokens == len(prompt)
        assert answer.text == TOKENIZER.decode(expected, skip_special_tokens=True)
    assert len({tuple(answer.ids) for answer in answers}) == 5, "the prompts are answered alike; the test shows nothing"


def test_learned_positions_are_those_of_the_unpadded_prompt():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=264, n_positions=48, n_embd=32, n_layer=2, n_head=4, bos_token_id=256, eos_token_id=257)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(50.0)
    # the window of 48 cuts the answer to the longest prompt short, and must not cut the others
    for prompt, answer in zip(PROMPTS, generate(model, TOKENIZER, PROMPTS, GenerateOptions(max_new_tokens=20)), strict=True):
        expected = greedy_loop(model, prompt, min(20, 48 - len(prompt)), {257})
        assert answer.ids == expected
        if expected[-1] != 257:
            assert answer.stopped_by == ("context" if len(prompt) == 40 else "length")


def test_every_eos_of_the_folder_ends_an_answer():
    model = chatty()
    free = generate(model, TOKENIZER, [PROMPTS[0]], GenerateOptions(max_new_tokens=12))[0]
    last = free.ids[5]
    model.generation_config.eos_token_id = [257, last]
    assert eos_ids(model, TOKENIZER) == {257, last}
    answer = generate(model, TOKENIZER, [PROMPTS[0]], GenerateOptions(max_new_tokens=12))[0]
    assert answer.ids == free.ids[: free.ids.index(last) + 1]
    assert answer.stopped_by == "eos"
    model.generation_config.eos_token_id = ["x"]
    with pytest.raises(ModelError, match="eos_token_id"):
        generate(model, TOKENIZER, [PROMPTS[0]])


def test_the_templates_end_of_turn_ends_an_answer():
    """Base models of chat families name <|endoftext|> as EOS, and their template ends turns with <|im_end|>."""
    tokenizer = tiny_tokenizer("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>") == 259
    assert eos_ids(tiny_model(), tokenizer) == {257, 259}
    assert end_of_turn(tiny_tokenizer()) == 257
    for template in (None, "{% for m in messages %}{{ m.content }}. {% endfor %}", "{{ raise_exception('no') }}"):
        assert end_of_turn(tiny_tokenizer(template)) is None
    model = chatty()
    free = generate(model, TOKENIZER, [PROMPTS[0]], GenerateOptions(max_new_tokens=12))[0]
    place = max(range(len(free.ids)), key=lambda i: free.ids.index(free.ids[i]))  # the last token that is new
    with torch.no_grad():  # in its place the model now says the end of turn
        model.lm_head.weight[259], model.lm_head.weight[free.ids[place]] = model.lm_head.weight[free.ids[place]].clone(), 0.0
    answer = generate(model, tokenizer, [PROMPTS[0]], GenerateOptions(max_new_tokens=12))[0]
    assert (answer.ids, answer.stopped_by) == ([*free.ids[:place], 259], "eos")
    assert place > 1


def test_the_folders_generation_config_draws_nothing():
    """Published folders carry do_sample, temperature and penalties; what is asked for here is what happens."""
    model = chatty()
    expected = generate(model, TOKENIZER, PROMPTS, GenerateOptions(max_new_tokens=10))
    own = model.generation_config
    own.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=3, max_length=4, suppress_tokens=list(range(200)))
    assert generate(model, TOKENIZER, PROMPTS, GenerateOptions(max_new_tokens=10)) == expected
    assert model.generation_config is own


def test_stop_strings_end_the_text_before_them():
    model = chatty()
    free = generate(model, TOKENIZER, PROMPTS, GenerateOptions(max_new_tokens=24))
    for number, answer in enumerate(free[:5]):
        stop = answer.text[3:5]
        assert len(stop) == 2, "the answer is too short to show anything"
        options = GenerateOptions(max_new_tokens=24, stop=("never said", stop))
        stopped = generate(model, TOKENIZER, PROMPTS, options)[number]
        assert stopped.text == answer.text[: answer.text.index(stop)]
        assert stopped.stopped_by == "stop"
        assert stopped.ids == answer.ids[: len(stopped.ids)] and len(stopped.ids) < len(answer.ids)
        assert "".join(stream(model, TOKENIZER, PROMPTS[number], options)) == stopped.text


def test_a_special_token_can_be_a_stop_string():
    model = chatty()
    free = generate(model, TOKENIZER, [PROMPTS[2]], GenerateOptions(max_new_tokens=6))[0]
    tokenizer = tiny_tokenizer()
    text = tokenizer.convert_ids_to_tokens(free.ids[3])
    from tokenizers import AddedToken

    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(text, special=True)]})
    answer = generate(model, tokenizer, [PROMPTS[2]], GenerateOptions(max_new_tokens=6, stop=(text,)))[0]
    assert (answer.ids, answer.stopped_by) == (free.ids[: free.ids.index(free.ids[3]) + 1], "stop")


@pytest.mark.parametrize("changes", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3}])
def test_streamed_text_is_the_generated_text(changes):
    model = chatty()
    options = GenerateOptions(max_new_tokens=20, **changes)
    answers = generate(model, TOKENIZER, PROMPTS, options, batch=4)
    for number, answer in enumerate(answers):
        pieces = list(stream(model, TOKENIZER, PROMPTS[number], options, number=number))
        assert "".join(pieces) == answer.text
        assert len(pieces) > 1


def test_a_stream_computes_in_the_precision_around_it():
    model, seen = chatty(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        streamed = "".join(stream(model, TOKENIZER, PROMPTS[0], GenerateOptions(max_new_tokens=6)))
        assert streamed == generate(model, TOKENIZER, PROMPTS[:1], GenerateOptions(max_new_tokens=6))[0].text
    assert set(seen) == {torch.bfloat16}


def test_a_closed_stream_ends_at_the_next_token():
    """A model that says "a" for ever is held in its third call, if it comes to that, until the reader has gone."""
    model, calls, reader_gone = tiny_model(), [], threading.Event()

    def say_a(module, inputs, output):
        calls.append(1)
        if len(calls) == 3:
            reader_gone.wait(60)
        output.logits[..., TOKENIZER.convert_tokens_to_ids("a")] = 1e4

    hook = model.register_forward_hook(say_a)
    pieces = stream(model, TOKENIZER, [5], GenerateOptions(max_new_tokens=500))
    assert next(pieces) == "a"
    timer = threading.Timer(0.5, reader_gone.set)  # close() waits for the model, so another thread must let it go
    timer.start()
    pieces.close()
    timer.join()
    hook.remove()
    assert len(calls) < 20


def test_a_fault_in_the_model_arrives_where_the_stream_is_read():
    model = chatty()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NumericsError, match=r"prompt 0 .*NaN.* new token 1"):
        list(stream(model, TOKENIZER, [5], GenerateOptions(max_new_tokens=4)))
    with pytest.raises(NumericsError, match="prompt 0"):
        generate(model, TOKENIZER, [[5], [6]], GenerateOptions(max_new_tokens=4))


# -- drawing --------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_prompt_seed_and_number_only():
    model = chatty()
    options = GenerateOptions(max_new_tokens=16, temperature=1.0, seed=3)
    together = generate(model, TOKENIZER, PROMPTS, options, batch=6)
    torch.manual_seed(99)
    random.seed(99)
    for batch in (1, 4):
        assert generate(model, TOKENIZER, PROMPTS, options, batch=batch) == together
    assert generate(model, TOKENIZER, PROMPTS[2:4], options, numbers=[2, 3]) == together[2:4]
    assert together[1].ids != together[5].ids, "equal prompts with different numbers are drawn apart"
    assert generate(model, TOKENIZER, PROMPTS, GenerateOptions(max_new_tokens=16, temperature=1.0, seed=4)) != together


def test_draws_follow_the_models_distribution():
    """First tokens of 4,000 draws against the softmax: chi-square over the common tokens."""
    model = chatty()
    temperature, count = 0.9, 4000
    with torch.no_grad():
        expected = (model(torch.tensor([[5]])).logits[0, -1] / temperature).softmax(-1).double()
    answers = generate(model, TOKENIZER, [[5]] * count, GenerateOptions(max_new_tokens=1, temperature=temperature), batch=500)
    observed = torch.bincount(torch.tensor([answer.ids[0] for answer in answers]), minlength=264).double()
    common = expected * count > 20
    assert common.sum() > 20
    statistic = ((observed - expected * count) ** 2 / (expected * count))[common].sum().item()
    degrees = int(common.sum())
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize(
    ("changes", "warper"),
    [
        ({"top_k": 7}, ("TopKLogitsWarper", 7)),
        ({"top_p": 0.6}, ("TopPLogitsWarper", 0.6)),
        ({"min_p": 0.2}, ("MinPLogitsWarper", 0.2)),
        ({"top_p": 0.01}, ("TopPLogitsWarper", 0.01)),
    ],
)
def test_truncated_distributions_are_those_of_transformers(changes, warper):
    import transformers.generation as generation

    scores = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    expected = getattr(generation, warper[0])(warper[1])(None, scores.clone()).isfinite()
    order, keep, probabilities = nucleus(scores, GenerateOptions(temperature=1.0, **changes))
    assert torch.equal(torch.zeros_like(expected).scatter(1, order, keep), expected)
    torch.testing.assert_close(torch.zeros_like(probabilities).scatter(1, order, probabilities), scores.double().softmax(-1))


def test_top_p_is_taken_of_what_top_k_leaves():
    from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    expected = TopPLogitsWarper(0.5)(None, TopKLogitsWarper(9)(None, scores.clone())).isfinite()
    order, keep, _ = nucleus(scores, GenerateOptions(temperature=1.0, top_k=9, top_p=0.5))
    assert torch.equal(torch.zeros_like(expected).scatter(1, order, keep), expected)
    assert 1 < expected.sum(-1).max() < 9


def test_top_k_of_one_is_greedy():
    model = chatty()
    greedy = generate(model, TOKENIZER, PROMPTS, GenerateOptions(max_new_tokens=12))
    assert generate(model, TOKENIZER, PROMPTS, GenerateOptions(max_new_tokens=12, temperature=2.0, top_k=1)) == greedy


def test_repetition_penalty_is_that_of_transformers_and_padding_is_no_repetition():
    """With pad = EOS a penalty that saw padding would keep padded rows from ending."""
    model = chatty()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    answers = generate(model, tokenizer, PROMPTS, GenerateOptions(max_new_tokens=16, repetition_penalty=1.4))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, repetition_penalty=1.4, pad_token_id=258)
        assert answer.ids == expected[0, len(prompt) :].tolist()


# -- what is left as it was -----------------------------------------------------------------------------------------


def test_training_state_and_random_state_are_untouched():
    model = chatty(attention_dropout=0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()  # a part that the user keeps in eval mode
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state, python = torch.random.get_rng_state(), random.getstate()
    for options in (GenerateOptions(max_new_tokens=5), GenerateOptions(max_new_tokens=5, temperature=1.0)):
        generate(model, TOKENIZER, PROMPTS[:2], options)
        list(stream(model, TOKENIZER, PROMPTS[0], options))
    assert torch.equal(torch.random.get_rng_state(), state) and random.getstate() == python
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False and torch.is_grad_enabled()
    ids = torch.arange(30)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_a_training_step_after_generation_is_bit_for_bit_the_same():
    losses = []
    for disturb in (False, True):
        torch.manual_seed(11)
        model = chatty(attention_dropout=0.3).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ids = torch.arange(40).view(2, 20)
        for _ in range(3):
            if disturb:
                generate(model, TOKENIZER, PROMPTS[:3], GenerateOptions(max_new_tokens=4, temperature=0.8))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item().hex())
    assert losses[:3] == losses[3:]


def test_a_consumer_of_a_stream_keeps_its_gradients():
    """A generator that holds no_grad across its yields would switch gradients off for whoever reads it."""
    for _ in stream(chatty(), TOKENIZER, [5], GenerateOptions(max_new_tokens=3)):
        assert torch.is_grad_enabled()


# -- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_that_leave_no_room_are_refused():
    model = tiny_model()
    assert context_window(model) == 512
    with pytest.raises(ModelError, match=r"prompt 1 has 512 tokens.*512"):
        generate(model, TOKENIZER, [[1], [1] * 512])
    with pytest.raises(ModelError, match="prompt 0 has no tokens"):
        generate(model, TOKENIZER, [[]])
    with pytest.raises(ConfigError, match="top_p=0"):
        GenerateOptions(top_p=0.0)


def test_rendered_prompts_are_the_beginning_of_the_rendered_conversation():
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    whole = TOKENIZER.apply_chat_template([{"role": "system", "content": "Be brief."}, *messages], tokenize=True, return_dict=False)
    prompt = render_prompt(TOKENIZER, "2+2?", "Be brief.")
    assert prompt == whole[: len(prompt)]
    assert prompt.count(TOKENIZER.bos_token_id) == 1
    assert TOKENIZER.decode(whole[len(prompt) :]) == "4</s>"
    assert render_prompt(TOKENIZER, [{"role": "system", "content": "S"}, *messages[:1]], "ignored") == render_prompt(TOKENIZER, "2+2?", "S")


def test_prompts_without_chat_template_are_plain_text():
    tokenizer = tiny_tokenizer(chat_template=None)
    assert render_prompt(tokenizer, "a") == tokenizer("a")["input_ids"]
    assert tokenizer.decode(render_prompt(tokenizer, "a", "S")) == "S\n\na"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert tokenizer.decode(render_prompt(tokenizer, turns)) == "ab</s>c"


def test_a_template_that_refuses_is_the_users_message():
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ModelError, match=r"roles must alternate"):
        render_prompt(tokenizer, "a")
