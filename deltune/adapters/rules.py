"""Rules over an adapter's pairs (A, B): rates that differ, gradients that are rewritten. A pair is found by its layer.

`lr_ratios` also holds what methods say of their own parameters. Which rules fit which config stands in `legal.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from deltune.adapters.delta import Delta
from deltune.adapters.magnitude import Magnitude
from deltune.adapters.wrapper import TrainedCopy, wrappers
from deltune.errors import AdapterError

DAMPING = 1e-8  # of LoRA-FA's inverse, as published


def running(model: nn.Module) -> Iterator[Delta]:
    """Every delta of an active adapter."""
    for _, holder in wrappers(model):
        if not isinstance(holder, TrainedCopy):
            for name in holder.running:
                yield holder.adapters[name]


def pair_of(delta: Delta) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, s) of a delta that is s·B·A, also inside a magnitude; the tensors themselves, trained or frozen."""
    inner = delta.inner if isinstance(delta, Magnitude) else delta
    product = None if inner.factors is None else inner.product()
    if inner.factors is None or product is None:
        return None
    a, b = (inner.get_parameter(name) if name in inner._parameters else inner.get_buffer(name) for name in inner.factors)
    return a, b, product[2]


def lr_ratios(model: nn.Module, rule: str = "none", ratio: float = 16.0) -> dict[str, float]:
    """Trained parameters whose learning rate is a multiple of the rest's: name in the model -> multiple.

    rule=lora_plus (arXiv:2402.12354): every B's is `ratio`. On an embedding too, where PEFT has a rate apart for both.
    """
    by_id: dict[int, float] = {}
    for delta in running(model):
        own = dict(delta.named_parameters())
        for name, multiple in delta.lr_ratios().items():
            by_id[id(own[name])] = multiple
        pair = pair_of(delta) if rule == "lora_plus" else None
        if pair is not None:
            by_id[id(pair[1])] = by_id.get(id(pair[1]), 1.0) * ratio
    found = {name: by_id[id(p)] for name, p in model.named_parameters() if id(p) in by_id and p.requires_grad}
    if rule == "lora_plus" and not found:
        raise AdapterError("optim.rule=lora_plus has no effect: no active adapter trains the B of a pair (A, B)")
    return found


def gradient_rules(model: nn.Module, rule: str = "none") -> list[Callable[[], None]]:
    """What rewrites gradients, once per optimizer step, after the whole step's are in place and before they are clipped."""
    if rule != "lora_fa":
        return []
    pairs = [pair for pair in map(pair_of, running(model)) if pair is not None and pair[1].requires_grad and not pair[0].requires_grad]
    if not pairs:
        raise AdapterError("optim.rule=lora_fa has no effect: no active adapter trains the B of a pair (A, B) while A is frozen")
    return [LoraFA(pairs)]


class LoraFA:
    """gB ← s⁻² gB (AAᵀ + 1e-8·I)⁻¹ (arXiv:2308.03303): of all steps of B, the one whose s·dB·A is nearest to W's gradient."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor, float]]):
        self.pairs = pairs
        self._inverses: list[tuple[tuple[int, int], Tensor] | None] = [None] * len(pairs)

    @torch.no_grad()
    def __call__(self) -> None:
        for place, (A, B, scale) in enumerate(self.pairs):
            if B.grad is not None:
                inverse = self._inverse(place, A)
                B.grad.copy_(B.grad.to(inverse.dtype) @ inverse / scale**2)

    def _inverse(self, place: int, A: Tensor) -> Tensor:
        """(AAᵀ + 1e-8·I)⁻¹ [r, r], for each expert of a stack; worked out again when A has moved: by a loaded checkpoint, or a schedule."""
        state, known = (A._version, A.data_ptr()), self._inverses[place]
        if known is not None and known[0] == state:
            return known[1]
        wide = torch.float32 if A.device.type == "mps" else torch.float64
        gram = A.to(wide) @ A.to(wide).mT
        inverse = torch.linalg.inv(gram + DAMPING * torch.eye(gram.shape[-1], dtype=wide, device=A.device))
        inverse = inverse.to(torch.promote_types(A.dtype, torch.float32))
        self._inverses[place] = (state, inverse)
        return inverse
