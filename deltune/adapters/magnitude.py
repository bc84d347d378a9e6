"""Magnitude: strength and direction learned apart (DoRA, arXiv:2402.09353), around any delta that adds a matrix.

W' = diag(m / sg‖W + ΔW‖) (W + ΔW), with the norm of each row, m trained, and no gradient through the norm (section 4.3
of the paper). At its start m is that norm, so the function is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltune import weights
from deltune.adapters.bank import Bank
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Base, Delta
from deltune.adapters.layers import Site

LEAF = "lora_magnitude_vector"  # PEFT's name for m


class Stretched(torch.autograd.Function):
    """h + d ⊙ (h - bias) for h [..., out], d = gain - 1 [out]: one pass over h forward, and h is all that it keeps.

    The difference from 1 is what is rounded to h's type, so a gain that is next to 1 counts in a short type too.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(h, d, bias)
        short = d.to(h.dtype)
        y = torch.addcmul(h, h, short)
        return y if bias is None else y.sub_(bias.to(h.dtype) * short)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        h, d, bias = ctx.saved_tensors
        # sums are formed in float32 and rounded once; asking for a float32 result is several times slower on a CPU
        spare = g * h
        grad_d = spare.reshape(-1, len(d)).sum(0).to(d.dtype)
        if bias is not None:
            grad_d = grad_d - bias.to(d.dtype) * g.reshape(-1, len(d)).sum(0).to(d.dtype)
        return torch.addcmul(g, g, d.to(g.dtype), out=spare), grad_d, None


class Magnitude(Delta):
    additive = False
    stops_gradient = "the norm"
    looks_at_stored = True

    def __init__(self, config: AdapterConfig, site: Site, banks: Mapping[str, Bank] | None = None):
        self._banks = banks
        super().__init__(config, site)

    def build(self) -> None:
        make = self.config.delta_class()
        self.inner = make(self.config, self.site, self.__dict__.pop("_banks"))
        # what the inner delta declares holds for the whole
        self.kinds, self.factors, self.needs, self.peft = make.kinds, make.factors, make.needs, make.peft
        self.averages_loss = make.averages_loss
        self.magnitude = nn.Parameter(torch.empty(self.site.n_out, **self.storage))

    def reset(self, generator: torch.Generator) -> None:
        self.inner.reset(generator)

    @property
    def starts_from_base(self) -> bool:
        return True

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        if self.inner.starts_from_base:
            self.inner.start(weights.float_view(W), generator)
        if self.inner.measures_base:
            self.inner.ready(weights.float_view(W))
        self.settle(W)

    @torch.no_grad()
    def settle(self, W: Tensor) -> None:
        self.magnitude.copy_(self.norms(W))

    @property
    def starts_from_original(self) -> bool:
        return self.inner.starts_from_original

    @property
    def needs_original(self) -> str:
        return self.inner.needs_original

    def taken_out(self) -> tuple[Tensor, Tensor, float] | None:
        return self.inner.taken_out()

    @property
    def measures_base(self) -> bool:
        return self.inner.measures_base

    def ready(self, W: Tensor) -> None:
        self.inner.ready(W)

    @torch.no_grad()
    def norms(self, W: Tensor, squares: Tensor | None = None, *, as_stored: bool = False) -> Tensor:
        """‖W + ΔW‖ of each row [out], W in any floating type; `squares` is ‖W‖² of each row where it is known.

        With ΔW = s·BA it is ‖W‖² + 2s·rowsum((W Aᵀ) ⊙ B) + s²·rowsum((B A Aᵀ) ⊙ B), so nothing of size out×in is made.
        `as_stored` takes the product W Aᵀ in W's own type, where the device is fast at that: a layer's answer is no finer.
        """
        product = self.inner.running_product(W) if self.inner.in_product_form else self.inner.product()
        if product is None:
            change = self.inner.delta(weights.float_view(W) if self.inner.reads_base else None)
            return torch.cat([torch.linalg.vector_norm(W[rows] + change[rows], dim=1) for rows in weights.row_blocks(W)])
        left, right, scale = product
        squares = weights.row_squares(W) if squares is None else squares
        left, right = left.to(torch.promote_types(left.dtype, squares.dtype)), right.to(torch.promote_types(right.dtype, squares.dtype))
        # a start with B = 0 need not read W again; on a GPU looking would cost more than it saves
        zero = left.device.type == "cpu" and not left.any()
        # a quantised weight's values are formed block by block
        short = as_stored and W.dtype == torch.bfloat16 and weights.multiplies_bfloat16(W.device) and not weights.is_quantised(W)
        if zero:
            return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        own = ((left @ (right @ right.T)) * left).sum(1)
        cross = ((W @ right.T.to(W.dtype)) * left).sum(1) if short else weights.row_products(W, left, right)
        whole = squares + 2 * scale * cross + scale**2 * own
        return whole.clamp_min(torch.finfo(whole.dtype).tiny).sqrt()  # a row of zeros has a direction of zeros

    def stretch(self, base: Base) -> Tensor:
        """What each output is to be longer by [out], with gradient by m."""
        # in the norm's type: m / m is 1 exactly at the start, also where m is stored in a short type
        return self.magnitude / self.norms(base.stored(), base.row_squares(), as_stored=True).to(self.magnitude.dtype) - 1

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        stretch, bias = self.stretch(base), base.bias()
        out = self.inner.out(base.drop(x), base.stored() if self.inner.reads_base else None).to(y.dtype)
        return Stretched.apply(y + out, stretch, bias)

    def delta(self, W: Tensor) -> Tensor:
        whole = W + self.inner.delta(W)
        return (self.magnitude / self.norms(W)).unsqueeze(1) * whole - W

    def loss(self) -> Tensor | None:
        return self.inner.loss()

    def lr_ratios(self) -> Mapping[str, float]:
        return {f"inner.{name}": ratio for name, ratio in self.inner.lr_ratios().items()}

    def ranked(self) -> Mapping[str, int]:
        return {f"inner.{name}": dimension for name, dimension in self.inner.ranked().items()}

    def to_file(self) -> dict[str, Tensor]:
        return {**self.inner.to_file(), LEAF: self.magnitude.data}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.inner.from_file(tensors)
        self.magnitude.copy_(tensors[LEAF])

    def leaves(self) -> dict[str, str]:
        return {**{f"inner.{name}": leaf for name, leaf in self.inner.leaves().items()}, "magnitude": LEAF}

    def bank_names(self) -> list[str]:
        return [f"inner.{name}" for name in self.inner.bank_names()]
