"""A model of ours as lm-evaluation-harness wants one, so that its tasks run on it: the harness's tokens and windows, our
scoring and generation. Needs the extra `lm-eval`; the harness is imported only here, when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltune.errors import ConfigError, DataError, ModelError, NumericsError
from deltune.evaluation.tasks.score import Request, score
from deltune.log import logger
from deltune.models.generation import GenerateOptions, context_window, generate
from deltune.models.head import describe

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MISSING = 'lm-eval is not installed. What fits: pip install "deltune[lm-eval]"'
DEFAULT_WINDOW = 2048  # tokens, of a model whose config names no bound; the harness's own default
DEFAULT_NEW_TOKENS = 256  # the harness's own default
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # all names that tasks use, best first
DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch: int = 8) -> TemplateLM:
    """The model as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=…)`. In one process.

    Likelihoods and perplexities are scored with shared beginnings computed once; `batch` bounds memory. ConfigError
    where lm-eval is not installed, ModelError for a tokenizer without BOS and EOS.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:
        raise ConfigError(MISSING) from None
    head, window = describe(model), context_window(model) or DEFAULT_WINDOW
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if prefix is None:
        raise ModelError("the tokenizer has neither BOS nor EOS, and a text's first token needs one before it to be scored.")
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    class Harness(TemplateLM):
        """What the harness calls; the splitting of context and continuation is its own."""

        backend = "causal"
        eot_token_id = tokenizer.eos_token_id
        prefix_token_id = prefix

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer, self._device = tokenizer, next(model.parameters()).device

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            ids = tokenizer(string, add_special_tokens=False)["input_ids"]
            begins = bool(tokenizer.bos_token) and string.startswith(tokenizer.bos_token)
            adds = adds_bos and not begins if add_special_tokens is None else adds_bos and add_special_tokens
            return [tokenizer.bos_token_id, *ids] if adds else ids

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            """(log-probability in nats, whether greedy decoding would give it) of each (key, context, continuation)."""
            wanted = []
            for key, context, continuation in requests:
                if not continuation:
                    raise DataError(f"the continuation {key[1]!r:.80} of {key[0][-40:]!r} has no token of its own.")
                if len(continuation) > window:
                    raise DataError(f"a continuation has {len(continuation)} tokens, and the model's window {window}: {key[1]!r:.80}.")
                wanted.append(Request(*windowed(context, continuation, window)))
            greedy: list[list[bool]] = []
            sums = score(model, wanted, head=head, batch=batch, greedy=greedy)
            found = [(total, most) for (total,), (most,) in zip(sums, greedy, strict=True)]
            for (key, _, _), one in zip(requests, found, strict=True):
                if one[0] != one[0]:
                    raise NumericsError(f"the model's scores after {str(key)[-60:]!r} are not numbers (NaN)")
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, one)
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """log-probability of each whole text, each token predicted once."""
            from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

            windows, owners = [], []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                parts = list(map(make_disjoint_window, get_rolling_token_windows(ids, prefix, window, 1)))
                windows += [(None, context, continuation) for context, continuation in parts]
                owners += [number] * len(parts)
            totals = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[owner] += value
            for request, value in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """A text for each (context, settings); those with the same settings are answered together."""
            answers: list[str] = [""] * len(requests)
            groups: dict[str, tuple[GenerateOptions, list[int]]] = {}
            for place, request in enumerate(requests):
                chosen = generate_options(request.args[1])
                groups.setdefault(repr(chosen), (chosen, []))[1].append(place)
            for chosen, places in groups.values():
                room = window - chosen.max_new_tokens
                if room < 1:
                    raise ConfigError(
                        f"{chosen.max_new_tokens} new tokens leave no room for a question in the model's window of {window}. "
                        "What fits: gen_kwargs with a smaller max_gen_toks."
                    )
                prompts = [self.tok_encode(requests[place].args[0]) or [prefix] for place in places]
                cut = sum(len(ids) > room for ids in prompts)
                if cut:
                    logger.warning("%d of %d prompts lose their beginning: the model's window has %d tokens", cut, len(prompts), window)
                made = generate(model, tokenizer, [ids[-room:] for ids in prompts], chosen, batch=batch, numbers=places)
                for place, answer in zip(places, made, strict=True):
                    answers[place] = answer.text
                    self.cache_hook.add_partial("generate_until", requests[place].args, answer.text)
            return answers

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip

        @property
        def tokenizer_name(self) -> str:
            return tokenizer.name_or_path.replace("/", "__")

    return Harness()


def windowed(context: Sequence[int], continuation: Sequence[int], window: int) -> tuple[list[int], list[list[int]]]:
    """(prompt, [option]) that fit the window, their beginning cut off; the continuation's last token is never fed."""
    whole = [*context, *continuation][-(window + 1) :]
    first = max(len(whole) - len(continuation), 1)
    return whole[:first], [whole[first:]]


def generate_options(given: Mapping[str, Any]) -> GenerateOptions:
    """The harness's settings of a generation as ours. ConfigError for one that would have no effect here."""
    settings = dict(given)
    until = settings.pop("until", None) or []
    lengths = [settings.pop(name) for name in LENGTHS if name in settings]
    draws = settings.pop("do_sample", None)
    values = {name: settings.pop(name) for name in DRAWN if settings.get(name) is not None}
    unknown = [name for name, value in settings.items() if value is not None and name not in DRAWN]
    if unknown:
        raise ConfigError(f"gen_kwargs: {', '.join(unknown)} would have no effect. What fits: until, do_sample, {', '.join((*LENGTHS, *DRAWN))}.")
    if draws is False or (draws is None and "temperature" not in values):
        values["temperature"] = 0.0
    elif draws:
        values.setdefault("temperature", 1.0)
    return GenerateOptions(
        max_new_tokens=int(lengths[0]) if lengths else DEFAULT_NEW_TOKENS,
        stop=tuple([until] if isinstance(until, str) else until),
        **{name: int(value) if name == "top_k" else float(value) for name, value in values.items()},
    )
