"""Several adapters as one plain LoRA: sums, and the rules that settle where adapters disagree.

Legend: Δᵢ [out, in] is adapter i's change of a layer and wᵢ its weight. All rules but `cat` act on the products Δᵢ. PEFT's
`linear`, `ties`, `dare_…` and `magnitude_prune` act on A and on B apart, so that A of one adapter meets B of another;
`of="factors"` does that too. What PEFT calls `…_svd` is what is done here by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deltune import weights as stored
from deltune.adapters.adapted import Adapted
from deltune.adapters.attach import adapters, generator_for
from deltune.adapters.config import RankedConfig, name_of
from deltune.adapters.convert import (
    Converted,
    Factors,
    attach_lora,
    change_of,
    check_rank,
    cut,
    cut_product,
    matrices,
)
from deltune.errors import AdapterError

SIGNS = ("total", "frequency")
ROUNDING = 1e-9  # 0.07 of 100 values is 7.000000000000001 in binary, and means 7


# ---------------------------------------------------------------- the rules


def keep_largest(change: Tensor, density: float) -> Tensor:
    """All but the largest entries set to zero; `density` is the share that stays."""
    kept = torch.zeros(change.numel(), dtype=torch.bool, device=change.device)
    kept[change.abs().flatten().topk(int(density * change.numel() + ROUNDING)).indices] = True
    return change * kept.view_as(change)


def keep_some(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry stays with probability `density`, and is then divided by it (DARE, arXiv:2311.03099)."""
    drawn = torch.rand(change.shape, generator=generator, dtype=torch.float32, device="cpu").to(change.device)
    return torch.where(drawn < density, change / density, torch.zeros_like(change))


def add(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ Δᵢ."""
    total = changes[0] * weights[0]
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        total = total + change * weight
    return total


def elect(changes: Sequence[Tensor], weights: Sequence[float], sign: str) -> Tensor:
    """For each entry the sign that most of the changes have, by their sum or by count, then the mean of the wᵢ Δᵢ that
    have it (TIES, arXiv:2306.01708, equation 5). The election is by the Δᵢ without weights, a tie is positive."""
    votes = add(changes if sign == "total" else [change.sign() for change in changes], [1.0] * len(changes))
    elected = torch.where(votes >= 0, 1.0, -1.0).to(votes)
    agreeing = [change.sign() == elected for change in changes]
    total = add([change * agrees for change, agrees in zip(changes, agreeing, strict=True)], weights)
    return total / sum(agrees.to(total.dtype) for agrees in agreeing).clamp_min(1)


Rule = Callable[[Sequence[Tensor], Sequence[float], float, str, Sequence[torch.Generator]], Tensor]

# a rule for entries: changes, weights, density, sign and one generator for each change
RULES: dict[str, Rule] = {
    "svd": lambda d, w, density, sign, g: add(d, w),
    "magnitude_prune": lambda d, w, density, sign, g: add([keep_largest(one, density) for one in d], w),
    "ties": lambda d, w, density, sign, g: elect([keep_largest(one, density) for one in d], w, sign),
    "dare_linear": lambda d, w, density, sign, g: add([keep_some(one, density, own) for one, own in zip(d, g, strict=True)], w),
    "dare_ties": lambda d, w, density, sign, g: elect([keep_some(one, density, own) for one, own in zip(d, g, strict=True)], w, sign),
}
SUMS = ("sum", "linear", "cat")
HOW = (*SUMS, *RULES)


# ---------------------------------------------------------------- adapters of a model


@torch.no_grad()
def combine(
    model: nn.Module, names: Sequence[str], weights: Sequence[float] | None = None, how: str = "linear", name: str = "combined", *,
    rank: int | None = None, density: float | None = None, sign: str = "total", seed: int = 0, of: str = "products", svd: str = "fast",
    trainable: bool = False,
) -> Converted:  # fmt: skip
    """Attach one plain LoRA made of several adapters; which adapters are active stays as it is.

    `how`: sum, or linear with weights: Σ wᵢ Δᵢ, exact at the sum of the ranks, or cut to `rank`. cat: the same by
    stacked factors and never cut, for adapters that have factors. svd: the sum cut to `rank`. ties, dare_linear,
    dare_ties, magnitude_prune: of what `density` leaves of each change, cut to `rank`, by default the highest rank among
    the adapters. A layer that only some of them adapt counts those. `seed` draws for dare. Raises AdapterError if a
    setting has no effect or does not fit, or a change is not a matrix.
    """
    weights = [1.0] * len(names) if weights is None else list(weights)
    _check(model, names, weights, how, density, sign, of, rank)
    check_rank(rank)
    layers = matrices(model, names)
    if rank is None and how in RULES and of == "products":
        rank = _highest_rank(model, names, how)

    def factors(place: str, layer: Adapted) -> tuple[Factors, Callable[[], Tensor]]:
        held = [(n, w) for n, w in zip(names, weights, strict=True) if n in layer.adapters]
        changes, own = [change_of(layer, n) for n, _ in held], [w for _, w in held]
        products = [product for product, _ in changes]
        if of == "factors":
            return _by_factors(place, layer, held, how, density or 1.0, sign, seed)
        generators = [generator_for(f"{place}/{n}", seed) for n, _ in held]
        if how in (*SUMS, "svd") and all(product is not None for product in products):
            B = torch.cat([B for B, _ in products], -1)
            A = torch.cat([A * weight for (_, A), weight in zip(products, own, strict=True)], -2)
            return ((B, A) if rank is None else cut_product(B, A, rank)), lambda: B @ A
        rule = RULES["svd" if how in SUMS else how]
        total = rule([whole() for _, whole in changes], own, 1.0 if density is None else density, sign, generators)
        return cut(total, rank, svd, generator_for(place, seed)), lambda: total

    return attach_lora(model, layers, names, factors, name, trainable=trainable)


def _by_factors(
    place: str, layer: Adapted, held: Sequence[tuple[str, float]], how: str, density: float, sign: str, seed: int
) -> tuple[Factors, Callable[[], Tensor]]:
    """The rule on the A and on the B apart, each with the root of weight and scale, the sign on A."""
    products = [layer.adapters[n].product() for n, _ in held]
    scaled = [weight * scale for (_, weight), (_, _, scale) in zip(held, products, strict=True)]
    roots = [math.sqrt(abs(value)) for value in scaled]
    signed = [math.copysign(root, value) for root, value in zip(roots, scaled, strict=True)]
    rule = RULES["svd" if how in SUMS else how]
    made = []
    for side, own in (("B", roots), ("A", signed)):
        generators = [generator_for(f"{place}/{n}/{side}", seed) for n, _ in held]
        tensors = [stored.float_view(product[0 if side == "B" else 1]) for product in products]
        made.append(rule(tensors, own, density, sign, generators))
    B, A = made
    return (B, A), lambda: B @ A


def _check(
    model: nn.Module, names: Sequence[str], weights: Sequence[float], how: str, density: float | None, sign: str, of: str, rank: int | None
) -> None:
    if how not in HOW:
        raise AdapterError(f"how is {how!r}; it can be {', '.join(HOW)}")
    if sign not in SIGNS or of not in ("products", "factors"):
        raise AdapterError(f"sign is {sign!r} and of is {of!r}; they can be {' or '.join(SIGNS)}, and products or factors")
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise AdapterError(f"names is {names!r}; a list of different adapters is needed")
    if len(weights) != len(names) or not all(math.isfinite(weight) for weight in weights):
        raise AdapterError(f"weights is {weights!r}; a number for each of {', '.join(names)} is needed")
    if how == "sum" and any(weight != 1 for weight in weights):
        raise AdapterError("weights have no effect with how=sum; linear takes them")
    if how == "cat" and rank is not None:
        raise AdapterError("rank has no effect with how=cat, which keeps all ranks; svd takes one")
    thins = how in RULES and how != "svd"
    if thins and (density is None or not 0 < density <= 1):
        raise AdapterError(f"density is {density!r}; how={how} needs the share of each change that stays, above 0 and at most 1")
    if density is not None and not thins:
        raise AdapterError(f"density has no effect with how={how}")
    if sign != "total" and how not in ("ties", "dare_ties"):
        raise AdapterError(f"sign has no effect with how={how}")
    known = adapters(model)
    for name in [name for name in names if name in known]:
        _check_factors(model, name, names, how, of, rank)


def _check_factors(model: nn.Module, name: str, names: Sequence[str], how: str, of: str, rank: int | None) -> None:
    """Where factors are used as such, each adapter needs some, and with of=factors of one shape."""
    if how != "cat" and of != "factors":
        return
    for place, layer in matrices(model, [name]).items():
        if layer.adapters[name].product() is None:
            raise AdapterError(f"{place}: adapter {name} ({name_of(layer.adapters[name].config)}) has no factors B and A; how=linear or svd with of=products fits")
        if of == "factors":
            ranks = {layer.adapters[n].product()[0].shape[-1] for n in names if n in layer.adapters and layer.adapters[n].product() is not None}
            if how in ("cat", "svd") or rank is not None:
                raise AdapterError(f"of=factors has no effect with how={how}{'' if rank is None else ' and a rank'}; leave it out")
            if len(ranks) > 1:
                raise AdapterError(f"{place}: of=factors needs one rank, and these adapters have {', '.join(map(str, sorted(ranks)))}")


def _highest_rank(model: nn.Module, names: Sequence[str], how: str) -> int:
    configs = [adapters(model)[name] for name in names]
    if not all(isinstance(config, RankedConfig) for config in configs):
        raise AdapterError(f"rank must be given with how={how}: not all of {', '.join(names)} have one")
    return max(rank for config in configs for rank in (config.rank, *config.rank_pattern.values()))
