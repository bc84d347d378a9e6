"""Any change that is a matrix as plain LoRA: its factors where it has some, else a truncated SVD, with the error measured.

Legend: ΔW [out, in] is a delta's change of one layer, B [out, r] and A [r, in] the factors that stand for it. Errors are
‖ΔW - BA‖ / ‖ΔW‖ by the Frobenius norm, of the factors as they are stored. A stack of experts has one more dimension in
front.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from deltune import weights
from deltune.adapters.adapted import Adapted
from deltune.adapters.attach import (
    active,
    adapters,
    bias_of,
    generator_for,
    install,
    prepare,
    switch,
    unmerge,
    weight_of,
)
from deltune.adapters.config import name_of
from deltune.adapters.delta import Delta
from deltune.adapters.init.svd import largest
from deltune.adapters.methods.lora import Lora, LoraConfig
from deltune.adapters.stored import storage_dtype
from deltune.adapters.targets import ends_with
from deltune.adapters.wrapper import TrainedCopy, walk, wrappers
from deltune.errors import AdapterError

NOTHING = 1e-6  # singular values below this part of the norm, all together, are rounding

Factors = tuple[Tensor, Tensor]  # (B, A) with ΔW = BA


@dataclass(frozen=True)
class Converted:
    """The plain LoRA that was made."""

    name: str
    ranks: Mapping[str, int]  # by layer
    errors: Mapping[str, float]  # by layer, relative
    error: float  # over all layers together, relative


@torch.no_grad()
def to_lora(
    model: nn.Module, name: str = "default", rank: int | None = None, new_name: str = "lora", *, svd: str = "fast", trainable: bool = False
) -> Converted:
    """Attach a plain LoRA that stands for another adapter; which adapters are active stays as it is.

    `rank`: of each layer, less where the change has less; None keeps all of the change. It is exact, up to rounding,
    where the change has that rank or a lower one. `svd`: fast, where a rank is given, or full, for the best factors of
    that rank to the last digit. Modules trained in full beside the adapter are copied. Raises AdapterError if the
    change of some layer is not a matrix.
    """
    check_rank(rank)
    parts = matrices(model, [name])

    def factors(place: str, layer: Adapted) -> tuple[Factors, Callable[[], Tensor]]:
        product, whole = change_of(layer, name)
        if product is not None:
            return (product if rank is None else cut_product(*product, rank)), whole
        return cut(whole(), rank, svd, generator_for(place, 0)), whole

    return attach_lora(model, parts, [name], factors, new_name, trainable=trainable)


def check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise AdapterError(f"rank is {rank}; it must be at least 1")


def matrices(model: nn.Module, names: Sequence[str]) -> dict[str, Adapted]:
    """The layers that these adapters change; AdapterError if a change is not a matrix that LoRA can stand for."""
    there = adapters(model)
    for name in names:
        if name not in there:
            raise AdapterError(f"the model has no adapter {name!r}; it has {', '.join(there) or 'none'}")
    found: dict[str, Adapted] = {}
    for place, wrapper in wrappers(model):
        for name in [name for name in names if name in wrapper.adapters and not isinstance(wrapper, TrainedCopy)]:
            delta = wrapper.adapters[name]
            if delta.beside_method:
                continue
            method = f"{place}: adapter {name} ({name_of(delta.config)})"
            why = delta.no_matrix(delta.config)
            if why:
                raise AdapterError(f"{method} cannot be a LoRA, for {why}")
            if delta.site.kind not in (*Lora.kinds, "experts"):
                raise AdapterError(f"{method} changes a layer of kind {delta.site.kind}, which LoRA does not")
            if changes_bias(wrapper, delta):
                raise AdapterError(f"{method} changes the bias too, which LoRA does not")
            found[place] = wrapper
    return found


def changes_bias(layer: Adapted, delta: Delta) -> bool:
    """Whether a delta adds anything to its layer's bias, be it that there is none yet."""
    if delta.adds_bias or not delta.site.has_bias:
        return delta.adds_bias
    change = delta.bias_delta(weight_of(layer), bias_of(layer))
    return change is not None and bool(change.any())


def change_of(layer: Adapted, name: str) -> tuple[Factors | None, Callable[[], Tensor]]:
    """(factors with the scale in A, a call that gives ΔW [out, in]), in float32 or wider. Factors None: it has none."""
    delta: Delta = layer.adapters[name]
    product = delta.product()
    if product is None:
        return None, lambda: weights.float_view(delta.delta(weight_of(layer)))
    left, right, scale = product
    B, A = weights.float_view(left), weights.float_view(right) * scale
    return (B, A), lambda: B @ A


def cut_product(B: Tensor, A: Tensor, rank: int) -> Factors:
    """The best factors of a rank for a product, without an out×in matrix; the product's own where its rank is no higher."""
    if B.shape[-1] <= rank:
        return B, A
    left, small_left = torch.linalg.qr(B)
    right, small_right = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(small_left @ small_right.mT)
    return _split(left @ U[..., :rank], S[..., :rank], right @ Vh[..., :rank, :].mT)


def cut(change: Tensor, rank: int | None, how: str, generator: torch.Generator) -> Factors:
    """Factors of a rank for a matrix; None for the lowest rank that loses nothing but rounding."""
    if rank is not None and change.ndim == 3:
        pairs = [cut(own, rank, how, generator) for own in change]
        return torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])
    if rank is not None:
        return _split(*largest(change, min(rank, *change.shape), generator, how))
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    tails = S.square().flip(-1).cumsum(-1).flip(-1).sqrt()  # what would be lost from each value on
    needed = max(1, int((tails > NOTHING * tails[..., :1]).sum(-1).max()))  # of experts, what the one that needs most does
    return _split(U[..., :needed], S[..., :needed], Vh[..., :needed, :].mT)


def _split(U: Tensor, S: Tensor, V: Tensor) -> Factors:
    """B = U√S, A = √S·Vᵀ: equally large, so that training can go on from them."""
    root = S.clamp_min(0).sqrt().unsqueeze(-2)
    return U * root, (V * root).mT.contiguous()


@torch.no_grad()
def attach_lora(
    model: nn.Module, layers: Mapping[str, Adapted], sources: Sequence[str],
    factors: Callable[[str, Adapted], tuple[Factors, Callable[[], Tensor]]], new_name: str, *, trainable: bool,
) -> Converted:  # fmt: skip
    """Attach a plain LoRA with the factors that a call gives for each layer, beside what they stand for, which is only
    there to measure the error. The modules that the sources train in full are copied."""
    if new_name in adapters(model):
        raise AdapterError(f"the model has an adapter {new_name!r} already; detach it, or give this one another name")
    copies = _copies(model, sources)
    rows, tables = _rows(model, sources)
    unmerge(model)
    made: dict[str, Factors] = {}
    lost: dict[str, tuple[float, float]] = {}  # ‖ΔW - BA‖², ‖ΔW‖²
    dtype = _storage(model, sources)
    for place, layer in layers.items():
        (B, A), whole = factors(place, layer)
        stored = storage_dtype(dtype, layer.base_layer.weight.dtype)
        made[place] = B.to(stored), A.to(stored)
        lost[place] = _squares(whole(), *made[place])
    ranks = {place: B.shape[-1] for place, (B, _) in made.items()}
    before = active(model)
    switch(model, [])
    try:
        prepared = prepare(model, replace(config_for(model, ranks, list(copies), dtype), trainable_token_indices=rows), new_name)
        for place, (B, A) in made.items():
            prepared.deltas[place].lora_B.copy_(B)
            prepared.deltas[place].lora_A.copy_(A)
        for place, copied in prepared.copies.items():
            copied.load_state_dict(copies[place].state_dict())
        for place, delta in prepared.deltas.items():
            if delta.beside_method:
                delta.shared.rows.copy_(tables[place])
        install(model, prepared, trainable=trainable)
    finally:
        switch(model, before)
    errors = {place: _relative(*pair) for place, pair in lost.items()}
    together = _relative(*(math.fsum(pair[i] for pair in lost.values()) for i in (0, 1)))
    return Converted(new_name, ranks, errors, together)


def config_for(model: nn.Module, ranks: Mapping[str, int], copies: Sequence[str], dtype: str) -> LoraConfig:
    """A plain LoRA with scale 1 and a rank for each layer."""
    most = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(place)}": rank for place, rank in ranks.items() if rank != most}
    names = {name for name, _ in walk(model) if any(ends_with(name, place) for place in ranks)}
    targets = list(ranks) if names == set(ranks) else "|".join(map(re.escape, ranks))  # a name may be the end of another
    return LoraConfig(
        targets=targets, modules_to_save=list(copies), dtype=dtype, rank=most, alpha=float(most),
        rank_pattern=others, alpha_pattern={place: float(rank) for place, rank in others.items()},
    )  # fmt: skip


def _storage(model: nn.Module, sources: Sequence[str]) -> str:
    there = adapters(model)
    kinds = {there[name].dtype for name in sources}
    return kinds.pop() if len(kinds) == 1 else "auto"


def _copies(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for place, wrapper in wrappers(model):
        if isinstance(wrapper, TrainedCopy):
            held = [name for name in names if name in wrapper.adapters]
            if len(held) > 1:
                raise AdapterError(f"{place} is trained in full by adapters {' and '.join(held)}, and two copies cannot be combined into one")
            if held:
                found[place] = wrapper.adapters[held[0]]
    return found


def _rows(model: nn.Module, names: Sequence[str]) -> tuple[list[int] | dict[str, list[int]], dict[str, Tensor]]:
    """Which tokens' rows the adapters train beside their methods, as their config has it, and the rows by table."""
    there = adapters(model)
    held = [name for name in names if there[name].trainable_token_indices]
    if len(held) > 1:
        raise AdapterError(f"adapters {' and '.join(held)} each train rows of single tokens, and these cannot be combined into one")
    if not held:
        return [], {}
    parts = {place: wrapper.adapters[held[0]] for place, wrapper in wrappers(model) if held[0] in wrapper.adapters}
    return there[held[0]].trainable_token_indices, {place: p.shared.rows for place, p in parts.items() if isinstance(p, Delta) and p.beside_method}


def _squares(change: Tensor, B: Tensor, A: Tensor) -> tuple[float, float]:
    B, A = B.to(change.dtype), A.to(change.dtype)
    lost = whole = 0.0
    for rows in weights.row_blocks(change):
        lost += float((change[rows] - B[rows] @ (A if A.ndim == 2 else A[rows])).double().square().sum())
        whole += float(change[rows].double().square().sum())
    return lost, whole


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0
