"""Loss, perplexity and token accuracy of a model on batches: sums over trained tokens divided once, so that batch
size, ranks and order change nothing.

Shapes: input_ids, labels [batch, seq]. Label -100 is not counted; the label of position
t is the token at t + 1.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, field
from typing import Any

import torch

from deltune import dist
from deltune.errors import DataError
from deltune.models.generation import inference, undisturbed_random
from deltune.models.head import Head, scores, trained_rows

# (model, batch) -> loss summed over the batch's trained tokens, or that and {"name": mean over these tokens}
EvalStep = Callable[[torch.nn.Module, Any], "torch.Tensor | tuple[torch.Tensor, dict[str, float]]"]


@dataclass
class Sums:
    """What is added up over examples."""

    loss: float = 0.0  # nats
    correct: float = 0.0  # trained tokens that were the most probable ones
    tokens: float = 0.0  # trained tokens
    examples: float = 0.0

    def add(self, other: Sums) -> None:
        self.loss, self.correct = self.loss + other.loss, self.correct + other.correct
        self.tokens, self.examples = self.tokens + other.tokens, self.examples + other.examples

    def metrics(self) -> dict[str, float]:
        loss = self.loss / self.tokens
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "token_accuracy": self.correct / self.tokens,
            "num_tokens": int(self.tokens),
            "num_examples": int(self.examples),
        }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where float64 ends."""
    return math.exp(loss) if loss < 709.0 or math.isnan(loss) else math.inf


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    forward: EvalStep | None = None,
    head: Head | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """loss (nats per trained token), perplexity, token_accuracy, num_tokens, num_examples over all batches and ranks.

    Training mode and random state are as before afterwards. `forward` replaces the model's own loss; then there is
    no token_accuracy, and its named numbers are averaged by trained tokens. `head`, the description of the model's head
    (`models.head.describe`), spares the logits. Raises DataError without trained tokens.
    """
    if forward is not None:
        return _evaluate_own(model, batches, forward, autocast or contextlib.nullcontext, device)
    total = Sums()
    for sums in _by_source(model, batches, head, autocast, device).values():
        total.add(sums)
    total = Sums(*dist.sum_over_ranks(list(astuple(total)), device))
    _require_tokens(total.tokens)
    return total.metrics()


def evaluate_by_source(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    head: Head | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(metrics of everything, metrics of each source file that has trained tokens, by name)."""
    sources: dict[str, Sums] = {}
    for gathered in dist.gather_objects(_by_source(model, batches, head, autocast, device)):
        for source, sums in gathered.items():
            sources.setdefault(source, Sums()).add(sums)
    total = Sums()
    for sums in sources.values():
        total.add(sums)
    _require_tokens(total.tokens)
    return total.metrics(), {source: sums.metrics() for source, sums in sorted(sources.items()) if sums.tokens}


def source_of(row: str) -> str:
    """The file of a row's name, `file:line` or `file[index]`."""
    return re.sub(r"(:\d+|\[\d+\])$", "", row)


def _require_tokens(count: float) -> None:
    if count == 0:
        raise DataError(
            "the evaluation data has no trained token, so there is nothing to measure. "
            "What fits: rows with answers (deltune preview shows what is trained)."
        )


def _by_source(model: torch.nn.Module, batches: Iterable[Any], head: Head | None, autocast: Any, device: Any) -> dict[str, Sums]:
    """This rank's sums."""
    sources: dict[str, Sums] = {}
    with inference(model), undisturbed_random(model):
        for batch in batches:
            batch = batch.to(device)
            with (autocast or contextlib.nullcontext)():
                loss, correct, row_of = token_scores(model, batch, head)
            sums = torch.zeros(len(batch.rows), 3, dtype=torch.float64)
            sums.index_add_(0, row_of, torch.stack([loss, correct.double(), torch.ones_like(loss)], dim=-1))
            for row, values in zip(batch.rows, sums.tolist(), strict=True):
                sources.setdefault(source_of(row), Sums()).add(Sums(*values, examples=1))
    return sources


def token_scores(model: torch.nn.Module, batch: Any, head: Head | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss in float64, whether it was the most probable one, index of the batch's row) of each trained token, on the CPU."""
    places, targets = trained_rows(batch.labels)
    loss, correct = scores(model, head, batch.inputs(), places, targets)
    return loss.to("cpu", torch.float64), correct.cpu(), batch.row_of_tokens().flatten()[places].cpu()


@dataclass
class _OwnSums:
    loss: float = 0.0
    tokens: float = 0.0
    examples: float = 0.0
    named: dict[str, float] = field(default_factory=dict)

    def add(self, other: _OwnSums) -> None:
        self.loss, self.tokens, self.examples = (
            self.loss + other.loss,
            self.tokens + other.tokens,
            self.examples + other.examples,
        )
        for name, value in other.named.items():
            self.named[name] = self.named.get(name, 0.0) + value


def _evaluate_own(
    model: torch.nn.Module, batches: Iterable[Any], forward: EvalStep, autocast: Any, device: Any
) -> dict[str, float]:
    sums = _OwnSums()
    with inference(model), undisturbed_random(model):
        for batch in batches:
            batch = batch.to(device)
            with autocast():
                result = forward(model, batch)
            loss, named = result if isinstance(result, tuple) else (result, {})
            tokens = batch.num_trained_tokens
            sums.add(
                _OwnSums(float(loss), tokens, len(batch.rows), {name: float(v) * tokens for name, v in named.items()})
            )
    total = _OwnSums()
    for gathered in dist.gather_objects(sums):
        total.add(gathered)
    _require_tokens(total.tokens)
    loss = total.loss / total.tokens
    named = {name: value / total.tokens for name, value in total.named.items()}
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        **named,
        "num_tokens": int(total.tokens),
        "num_examples": int(total.examples),
    }
