"""Answers from a model: greedy or drawn, in batches or streamed, the same tokens either way. What a prompt is answered
depends on the prompt, the options and its number, never on its neighbours or on random numbers drawn elsewhere.

Shapes: ids [batch, seq], padded on the left; scores [batch, vocab]. The loop over tokens is transformers'
`model.generate`; which token comes next is decided in choosing.py, and when an answer ends (`Ending`) here. A beam search is transformers'
own: it has no tokens that are certain before its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from deltune.config.fields import changed
from deltune.errors import ConfigError, ModelError
from deltune.models.choosing import Chooser, Only, check_numbers, trie_of
from deltune.models.decoding import DRAWING, DecodingConfig, by_place, transformers_fields
from deltune.models.text import AnswerText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class GenerateOptions:
    """How answers are drawn. The model folder's generation_config.json has no say in it, except for its EOS ids."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 takes the most probable token each time
    top_p: float = 1.0  # nucleus sampling (arXiv:1904.09751)
    top_k: int = 0  # 0 draws from all
    min_p: float = 0.0  # least probability, as a fraction of the most probable token's (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # arXiv:1909.05858, over prompt and answer
    seed: int = 42
    stop: tuple[str, ...] = ()  # texts that end an answer and are not part of it
    choices: tuple[str, ...] = ()  # an answer is one of these texts, if there are any
    decoding: DecodingConfig = field(default_factory=DecodingConfig)

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": self.max_new_tokens > 0,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for name, holds in limits.items():
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)} is out of range")
        problems = self.decoding.problems()
        if self.temperature == 0:
            problems += [f"{name} has no effect while temperature is 0" for name in DRAWING if changed(self.decoding, name)]
        if problems:
            raise ConfigError(f"decoding: {'; '.join(problems)}")


@dataclass(frozen=True)
class Generated:
    """One answer. `ids` are all new tokens, with the EOS or stop string that ended them; `text` is without these."""

    text: str
    ids: list[int]
    num_prompt_tokens: int
    stopped_by: str  # eos, stop (a stop string), length (max_new_tokens) or context (the model's window is full)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int] | str],
    options: GenerateOptions | None = None,
    *,
    batch: int = 8,
    numbers: Sequence[int | str] | None = None,
) -> list[Generated]:
    """One answer per prompt, in the order given; prompts of like length are answered together, `batch` at a time.

    A prompt is token ids, or text that `render_prompt` frames as a user's message. `numbers` tells prompts apart for
    the draws (default: their place). Training mode, RNG state and the model's settings are as before afterwards.
    Raises ModelError for an empty prompt or one that fills the context window, NumericsError if scores are NaN.
    """
    options = options or GenerateOptions()
    all_ids = [render_prompt(tokenizer, p) if isinstance(p, str) else [int(i) for i in p] for p in prompts]
    numbers = range(len(all_ids)) if numbers is None else numbers
    for number, ids in zip(numbers, all_ids, strict=True):
        _check_prompt(model, ids, number)
    answers: list[Generated | None] = [None] * len(all_ids)
    with undisturbed_random(model):
        beams = options.decoding.num_beams > 1
        if beams and options.temperature:
            batch = 1  # its draws are torch's, one stream for all that a batch holds
        lengths = [len(ids) for ids in all_ids]
        for chosen in _batches(lengths, batch, context_window(model), options.max_new_tokens, alike=by_place(options.decoding)):
            run = _search if beams else _run
            found = run(model, tokenizer, [all_ids[i] for i in chosen], [numbers[i] for i in chosen], options)
            for i, answer in zip(chosen, found if beams else found.answers(), strict=True):
                answers[i] = answer
    return answers


def _batches(lengths: list[int], batch: int, window: int | None, max_new_tokens: int, *, alike: bool) -> Iterator[list[int]]:
    """Places of prompts of like length, longest first, since they need the most memory.

    A prompt whose answer the context window cuts short shares a batch with its equals only: in a mixed one it would
    go on beside longer answers, past the last position that a model with learned positions has. `alike`: all do so.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    while order:
        chosen = order[:batch]
        longest = lengths[chosen[0]]
        if alike or (window is not None and longest + max_new_tokens > window):
            chosen = [i for i in chosen if lengths[i] == longest]
        yield chosen
        order = order[len(chosen) :]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    options: GenerateOptions | None = None,
    *,
    number: int | str = 0,
) -> Iterator[str]:
    """The text that `generate` gives for this prompt, piece by piece as it becomes certain.

    Closing the iterator, or an exception where it is consumed, ends the generation at the next token.
    """
    options = options or GenerateOptions()
    ids = [int(i) for i in ids]
    if options.decoding.num_beams > 1:  # certain when the search is over
        yield generate(model, tokenizer, [ids], options, numbers=[number])[0].text
        return
    _check_prompt(model, ids, number)
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    ending_wanted: list[bool] = []
    kind = next(model.parameters()).device.type
    precision = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}

    def each_token(ending: Ending) -> bool:
        pieces.put(ending.texts[0].take())
        return bool(ending_wanted)

    def run() -> Ending:
        with torch.autocast(kind, **precision):  # a thread starts without its parent's autocast
            return _run(model, tokenizer, [ids], [number], options, each_token)

    # transformers calls back for each token, so the loop has a thread of its own and this one waits for text
    with ThreadPoolExecutor(1) as worker:
        future = worker.submit(run)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                if piece:
                    yield piece
            rest = future.result().texts[0].take_rest()
            if rest:
                yield rest
        finally:
            ending_wanted.append(True)


@contextlib.contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's mode is as before afterwards.

    Not torch.inference_mode: what a module first computes and keeps in there could not take part in training later.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def undisturbed_random(model: torch.nn.Module) -> Iterator[None]:
    """torch's random state is as before afterwards, so that evaluating in the midst of training changes no step."""
    with torch.random.fork_rng(devices={p.device for p in model.parameters() if p.device.type == "cuda"}):
        yield


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]] | str, system: str | None = None
) -> list[int]:
    """Token ids of a conversation up to where the answer begins, as training data is written by default.

    A str is one user message. With a chat template it is rendered by it, generation prompt included. Without one it
    is plain text: the tokenizer's own BOS, system text and a blank line, then the turns, an answer with its EOS.
    Raises ModelError if the template refuses the conversation.
    """
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    if system is not None and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    if tokenizer.chat_template is None:
        return _plain_prompt(tokenizer, messages)
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ModelError(f"the chat template refuses this conversation ({roles}): {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written BOS itself


def _plain_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Each turn is tokenised by itself, as in training: so a prompt has the same tokens whatever follows it."""
    ids, text = [], ""
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        ids.append(tokenizer.bos_token_id)
    for message in messages:
        text += message["content"]
        if message["role"] == "system":
            text += "\n\n"
            continue
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] if message["role"] == "assistant" else []
        text = ""
    return ids


def context_window(model: PreTrainedModel) -> int | None:
    """Tokens of prompt and answer together that the model has room for; None if its config names no bound.

    A module of the model may take positions for itself, as a learned prompt does, and says so in `num_positions_taken`.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "max_position_embeddings"):
        return None
    taken = sum(module.num_positions_taken for module in model.modules() if hasattr(module, "num_positions_taken"))
    return config.max_position_embeddings - taken


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that ends an answer: the tokenizer's EOS, those of generation_config.json, and the token with which the
    chat template ends the assistant's turn, which in many base models is neither. Raises ModelError for what is no id.
    """
    found = model.generation_config.eos_token_id
    ids = set(found if isinstance(found, (list, tuple)) else [] if found is None else [found])
    if not all(isinstance(i, int) for i in ids):
        raise ModelError(
            f"generation_config.json: eos_token_id must be a token id or a list of them; found {found!r:.80}."
        )
    return ids | {i for i in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if i is not None}


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes right after an assistant's words, if it does."""
    import jinja2

    if tokenizer.chat_template is None:
        return None
    words = "AnswerEndsHere"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": words}], tokenize=False
        )
    except jinja2.TemplateError:
        return None  # a template for other conversations than this one
    _, said, after = text.rpartition(words)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if said else []
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return ids[0] if ids and ids[0] in special else None


def _check_prompt(model: PreTrainedModel, ids: Sequence[int], number: int) -> None:
    window = context_window(model)
    if not ids:
        raise ModelError(f"prompt {number} has no tokens, so there is nothing to continue.")
    if window is not None and len(ids) >= window:
        raise ModelError(
            f"prompt {number} has {len(ids)} tokens and fills the model's context window of {window}: no room for "
            "an answer."
        )


def _run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], numbers: Sequence[int | str],
    options: GenerateOptions, each_token: Any = None,
) -> Ending:  # fmt: skip
    """One batch through transformers' loop, each token chosen here."""
    ending = Ending(model, tokenizer, prompts, options, each_token)
    processors: list[Any] = [Chooser(prompts, numbers, options)]
    if options.choices:
        processors.insert(0, _only(tokenizer, prompts, options, ending.eos))
    _transformers(model, tokenizer, prompts, processors, ending.eos, options, [ending], max_new_tokens=options.max_new_tokens, num_beams=1, do_sample=False)
    ending.finish()
    return ending


def _search(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], numbers: Sequence[int | str], options: GenerateOptions,
) -> list[Generated]:  # fmt: skip
    """One batch through transformers' beam search: of each prompt the best answer. A stop string cuts it afterwards."""
    ending = Ending(model, tokenizer, prompts, options, None)
    ends = ending.eos | ending.stop_ids
    processors: list[Any] = [lambda ids, scores: check_numbers(scores, numbers, ids.shape[1] - max(ending.lengths)) or scores]
    if options.choices:
        processors.append(_only(tokenizer, prompts, options, ends))
    drawn: dict[str, Any] = {"do_sample": options.temperature > 0, "repetition_penalty": options.repetition_penalty}
    if options.temperature:
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{options.seed}:{numbers[0]}".encode()).digest()[:7], "big"))
        drawn |= {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p, "min_p": options.min_p or None}
        drawn |= {name: getattr(options.decoding, name) for name in DRAWING if changed(options.decoding, name)}
    found = _transformers(model, tokenizer, prompts, processors, ends, options, [], max_new_tokens=min(ending.room), **drawn)
    width = max(ending.lengths)
    for row, ids in enumerate(found[:, width:].tolist()):
        for token in ids:
            ending.reasons[row] = ending.take(row, token)
            if ending.reasons[row] is not None:
                break
        else:
            ending.reasons[row] = "length" if len(ids) == options.max_new_tokens else "context"
    ending.finish()
    return ending.answers()


def _only(tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], options: GenerateOptions, eos: set[int]) -> Only:
    return Only(trie_of(tokenizer, options.choices, eos), max(map(len, prompts)), min(eos))


def _transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], processors: list[Any], eos: set[int],
    options: GenerateOptions, criteria: list[Any], **fields: Any,
) -> torch.Tensor:  # fmt: skip
    """transformers' generate on prompts padded on the left, by settings of its own: ids [batch, seq]."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked: its value changes nothing
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    fields = transformers_fields(options.decoding, tokenizer) | fields
    settings = GenerationConfig(**{"use_cache": True, "pad_token_id": pad, "eos_token_id": sorted(eos) or None, "bos_token_id": tokenizer.bos_token_id} | fields)
    own, model.generation_config = model.generation_config, settings  # else generate() fills gaps from the folder's
    try:
        with inference(model):
            return model.generate(ids, attention_mask=mask, generation_config=settings, logits_processor=processors, stopping_criteria=criteria)
    finally:
        model.generation_config = own


class Ending:
    """transformers' stopping criterion: records each row's tokens and says which rows are done, and why."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[list[int]],
        options: GenerateOptions,
        each_token: Any,
    ):
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.eos = eos_ids(model, tokenizer) | set(options.decoding.stop_ids)
        self.stop_ids = {special[text] for text in options.stop if text in special}  # special tokens have no text
        self.texts = [AnswerText(tokenizer, options.stop) for _ in prompts]
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.reasons: list[str | None] = [None] * len(prompts)
        self.lengths = list(map(len, prompts))
        window = context_window(model)
        self.room = [
            options.max_new_tokens if window is None else min(options.max_new_tokens, window - n) for n in self.lengths
        ]
        self.limit = options.max_new_tokens
        self.each_token = each_token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.reasons[row] is None:
                self.reasons[row] = self.take(row, token)
        done = [reason is not None for reason in self.reasons]
        if self.each_token is not None and self.each_token(self):
            done = [True] * len(done)
        return torch.tensor(done, device=input_ids.device)

    def take(self, row: int, token: int) -> str | None:
        """Record a token; why the answer ends with it, if it does."""
        self.ids[row].append(token)
        if token in self.eos:
            return "eos"
        if token in self.stop_ids:
            return "stop"
        self.texts[row].push(token)
        if self.texts[row].stopped:
            return "stop"
        if len(self.ids[row]) == self.room[row]:
            return "length" if self.room[row] == self.limit else "context"
        return None

    def finish(self) -> None:
        for row, text in enumerate(self.texts):
            text.finish()
            if text.stopped:
                self.reasons[row] = "stop"

    def answers(self) -> list[Generated]:
        parts = zip(self.texts, self.ids, self.lengths, self.reasons, strict=True)
        return [Generated(text.text, ids, length, reason) for text, ids, length, reason in parts]
