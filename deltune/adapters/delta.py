"""Delta: what an adaptation method owes. A method states its formula and its start; all that methods share lives elsewhere.

Legend: W is a layer's weight as [out, in], whatever way the layer stores it; x is [..., in], or for an embedding the
ids [...]; s is the method's scale. A Parameter of a Delta is trained and a buffer is not: nothing else decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deltune.adapters import dense
from deltune.adapters.bank import Bank
from deltune.adapters.config import AdapterConfig
from deltune.adapters.layers import Site
from deltune.adapters.stored import Stored, storage_of


class Base(Protocol):
    """The layer below a delta: the frozen layer with the active deltas attached before this one."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def weight(self) -> Tensor:
        """W [out, in] in float32 or wider, no gradient. Read it after the base was called, not before."""

    def stored(self) -> Tensor:
        """W [out, in] in the type that it is stored in, not copied; with deltas between as `weight()`. No gradient. Read it
        after the base was called, not before."""

    def row_squares(self) -> Tensor | None:
        """‖W‖² of each row [out] where it is known, see `Adapted.row_squares`; with deltas between None."""

    def bias(self) -> Tensor | None:
        """The layer's own bias [out], no gradient. Read it after the base was called, not before."""

    @property
    def bare(self) -> bool:
        """Whether it is the frozen layer alone, and a call of it nothing but W x + b."""

    def drop(self, x: Tensor) -> Tensor:
        """x with the adapter's input dropout: x itself in eval mode, without dropout, and for an embedding."""

    def called_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The frozen layer's output with W [out, in] and b [out] in its own tensors' place, rounded to their types."""


def always(config: Any) -> bool:
    return True


@dataclass(frozen=True)
class PeftFormat:
    """How PEFT writes a method. Fields of every method (targets, modules_to_save …) are not its concern."""

    type: str  # PEFT's peft_type
    write: Callable[[Any], dict[str, Any]]  # our config -> PEFT's fields
    read: Callable[[Mapping[str, Any]], dict[str, Any]]  # PEFT's fields -> our config's; AdapterError if they cannot be ours
    fields: frozenset[str]  # those that `read` understands
    harmless: Mapping[str, Any] = field(default_factory=dict)  # fields without effect while they have this value
    fits: Callable[[Any], bool] = always  # whether PEFT's fields can say this config; else the file is of our own type
    lacks: frozenset[str] = frozenset()  # of the fields of every method, those that PEFT's config of this one does not have
    told: Callable[[Mapping[str, Any]], bool] | None = None  # of several with one peft_type: whether fields are this one's
    idle: tuple[str, ...] = ()  # leaves of PEFT's files that are zeros and say nothing
    # a layer's tensors in a file of PEFT's, by leaf -> those that ours would hold: (fields, delta, tensors, a call that gives W)
    complete: Callable[[Mapping[str, Any], Delta, Mapping[str, Tensor], Callable[[], Tensor]], Mapping[str, Tensor]] | None = None


class Delta(Stored):
    """The change that a method makes to one layer.

    Subclasses write `build`, `reset` and `delta` (or `product`), and override the rest where it differs. The order of
    calls is: __init__ (which calls build), then reset and start, or a file's tensors; then ready; then forward.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")  # layers that it can adapt, see `layers.py`
    mergeable: ClassVar[bool] = True  # a matrix ΔW exists
    why_not_mergeable: ClassVar[str] = "its change of this layer is not a matrix"
    additive: ClassVar[bool] = True  # the output is base(x) + out(x): `forward` is not overridden
    stops_gradient: ClassVar[str] = ""  # which part of the formula has no gradient by intention, if any
    widens: ClassVar[str] = ""  # why something as large as x or y is made in float32 where these are shorter, if it is
    reads_base: ClassVar[bool] = False  # out(x, W) needs W in every forward, as it is stored; else it is handed None
    looks_at_stored: ClassVar[bool] = False  # `start` takes W in the type that it is stored in, and is not handed a copy
    in_product_form: ClassVar[bool] = False  # what is added to W x is s·(x Aᵀ)Bᵀ of `running_product`, at no more cost: see fused.py
    factors: ClassVar[tuple[str, str] | None] = None  # names of (A, B) with ΔW = s·B·A, for starts and paired rules
    averages_loss: ClassVar[bool] = False  # `loss` counts by its mean over the adapter's layers, not by their sum
    takes_dropout: ClassVar[bool] = True  # there is an input to drop from; else the config may not ask for it
    follows_ties: ClassVar[bool] = False  # it goes on every layer that holds the same weight, see `Site.tied_to`
    needs: ClassVar[tuple[str, ...]] = ()  # statistics that the start wants
    bias_column: ClassVar[bool] = False  # `start` is handed [W, b] where the layer has a bias
    peft: ClassVar[PeftFormat | None] = None  # None: PEFT does not know the method
    repeats: ClassVar[Mapping[str, str]] = {}  # tensors of a bank that PEFT writes in every layer too: leaf there -> the bank's
    beside_method: ClassVar[bool] = False  # a part of an adapter whose method is another one, with a config of its own: see tokens.py
    named_alone: ClassVar[bool] = False  # the names of its tensors in the file are whole, without the layer's

    def __init__(self, config: AdapterConfig, site: Site, banks: Mapping[str, Bank] | None = None):
        super().__init__()
        self.config = config
        self.site = site
        for name, bank in (banks or {}).items():
            setattr(self, name, bank)  # a submodule that all deltas of its scope hold
        self.build()

    @property
    def storage(self) -> dict[str, Any]:
        """Device and type of the method's own tensors, to be passed to torch's constructors."""
        return storage_of(self.config, self.site)

    @classmethod
    def check(cls, config: AdapterConfig, names: Sequence[str]) -> None:
        """Raise AdapterError if the config says something that is without effect on the layers of these names."""

    @classmethod
    def no_matrix(cls, config: AdapterConfig) -> str:
        """Why the change that this config makes is not a matrix; empty where it is one. Override where that is a setting."""
        return "" if cls.mergeable else cls.why_not_mergeable

    @classmethod
    def merges_roughly(cls, config: AdapterConfig) -> bool:
        """Whether this config asks for a merge by `delta` though its change is not that matrix."""
        return False

    @classmethod
    def trained_factors(cls, config: Any) -> tuple[str, ...]:
        """Those of `factors` that this config trains, for the rules that need them."""
        return cls.factors or ()

    @classmethod
    def banks(cls, config: AdapterConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        """Tensors shared with other layers: attribute of the delta -> (scope, class of the bank). Scopes: see bank.py."""
        return {}

    def build(self) -> None:
        """Declare Parameters and buffers from `self.config` and `self.site`. Allocates, does not fill.

        Raises AdapterError, naming the layer and what would fit, if the config does not suit the layer's shape.
        """
        raise NotImplementedError

    def reset(self, generator: torch.Generator) -> None:
        """The start that needs no data. It leaves the function unchanged, or the method says by how much it does not.

        Draw from `generator` only, on the CPU in float32 (see `draw.py`), so that every device and type starts alike.
        """
        raise NotImplementedError

    @property
    def starts_from_base(self) -> bool:
        """Whether `start` looks at W. It is then saved with the adapter, so that nothing depends on repeating it."""
        return type(self).start is not Delta.start

    def start(self, W: Tensor, generator: torch.Generator) -> None:
        """The part of the start that looks at W [out, in], float32 or wider; called after reset, and not after a load."""

    @property
    def starts_from_original(self) -> bool:
        """Whether `start`, on a quantised base, is to look at W as it was before it was rounded. Not where `ready` measures W
        and does not save it: a load must find the same, and the rounded weight is what is always there."""
        return self.starts_from_base and not self.measures_base

    @property
    def needs_original(self) -> str:
        """Why the start means nothing on a weight that is rounded already; empty where it does."""
        return ""

    def taken_out(self) -> tuple[Tensor, Tensor, float] | None:
        """(B₀, A₀, s) if ΔW = Δ' - s·B₀·A₀ with Δ' = s·B₀·A₀ at the start: what the start takes out of W, for a quantised
        layer to be rounded without it, see quantised.py. None if there is nothing of the kind."""
        return None

    def settle(self, W: Tensor) -> None:
        """After `start` on a quantised base: its weight [out, in] as it stands, for what has to fit that one."""

    @property
    def measures_base(self) -> bool:
        """Whether `ready` does anything, so that W need not be read where it does not."""
        return type(self).ready is not Delta.ready

    def ready(self, W: Tensor) -> None:
        """The last step of a start or a load, once W is final; for methods that measure W and do not save it."""

    def start_bias(self, b: Tensor) -> None:
        """As `start`, for the layer's own bias [out]; called after it where there is one."""

    def ready_bias(self, b: Tensor) -> None:
        """As `ready`, for the layer's own bias [out]; called after it where there is one."""

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        """(B, A, s) if ΔW is s·B·A with B [out, r] and A [r, in]; merging then needs no out×in temporary."""
        return None

    def running_product(self, W: Tensor) -> tuple[Tensor, Tensor, float]:
        """As `product`, for a forward pass with `in_product_form`. W is as it is stored. Override where the factors are made
        of W, or where ΔW = 0 at the start needs others for that to be exact in every type."""
        product = self.product()
        assert product is not None, f"{type(self).__name__} says that it is in product form"
        return product

    def delta(self, W: Tensor | None) -> Tensor:
        """ΔW [out, in], with gradient. W is given if the method reads it, is not additive, or is being merged;
        in a forward pass in the type that it is stored in, else in float32 or wider."""
        product = self.product()
        if product is None:
            raise NotImplementedError
        left, right, scale = product
        return (left * scale) @ right

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        """ΔW x [..., out], computed in x's type. Override where it is cheaper than through ΔW."""
        if self.site.kind == "embedding":
            return F.embedding(x, self.delta(W).T, self.site.padding_idx)
        return F.linear(x, self.delta(W).to(x.dtype))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """The adapted layer's output. Override (with `additive = False`) to act on the layer's input or to multiply its
        output; input dropout is then `base.drop(x)`, on what the adapter sees of x."""
        if self.goes_in_one(x) and base.bare:
            return self.in_one(x, base)
        y = base(x)
        W = base.stored() if self.reads_base else None
        return y + self.out(base.drop(x), W).to(y.dtype)

    def in_one(self, x: Tensor, base: Base) -> Tensor:
        """(W + ΔW) x + b, asked for where `goes_in_one`."""
        W, b = base.stored(), base.bias()
        return dense.plus(x, W, None if b is None else b.to(x.dtype), self.formed(x.dtype, W))

    def formed(self, dtype: torch.dtype, W: Tensor) -> Tensor:
        """ΔW [out, in] in this type, for a forward pass. W is as it is stored. A product of factors is one of that type;
        override where others of a short type need not be formed in float32 either."""
        product = self.product() if dense.is_short(dtype) else None
        return self.delta(W).to(dtype) if product is None else dense.product(product[0] * product[2], product[1], dtype)

    def forms_delta(self, x: Tensor) -> bool:
        """Whether `out` is a product with ΔW, which is formed for it, or for this many tokens would better be. Override
        where `out` is, and does so."""
        return type(self).out is Delta.out

    def pays_to_form(self, x: Tensor, *, apart: int, forming: int) -> bool:
        """Whether ΔW is cheaper formed and joined to W than its factors are on x, by the multiplications of a step.

        `apart`: those that a token takes in the factors, forward and back. `forming`: those that ΔW takes, forward and
        back. Joined, a token takes in·out besides, for the gradient of ΔW, and in a short type as much again for ΔW x.
        """
        tokens = x.numel() // max(1, x.shape[-1])
        joining = (2 if dense.is_short(x.dtype) else 1) * self.site.n_in * self.site.n_out
        return tokens * joining + forming < tokens * apart

    def goes_in_one(self, x: Tensor) -> bool:
        """Whether the layer is computed as (W + ΔW) x, in one node and with fewer products, for ΔW is formed anyway: see dense.py."""
        whole = x.dtype == self.site.dtype and not in_autocast(x.device)
        return whole and self.forms_delta(x) and self.site.kind == "linear" and not (self.config.dropout and self.training)

    @property
    def adds_bias(self) -> bool:
        """Whether merging needs the layer to have a bias of its own."""
        return False

    def bias_delta(self, W: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """The change of the layer's bias [out] that belongs to ΔW when merging; None if there is none."""
        return None

    def loss(self) -> Tensor | None:
        """A scalar added to the training loss; None if there is none."""
        return None

    def lr_ratios(self) -> Mapping[str, float]:
        """Own parameters whose learning rate is a multiple of the rest's, by name. Part of the method, not a setting."""
        return {}

    def ranked(self) -> Mapping[str, int]:
        """What an allocator may mask: parameter name to the dimension that counts ranks."""
        return {}

    def leaves(self) -> dict[str, str]:
        """Names of the saved parameters and buffers, each to its name in the file. Banks are saved once, by themselves."""
        own = [name for name in self.state_dict() if name.partition(".")[0] not in self.bank_names()]
        return {name: name for name in own}

    def bank_names(self) -> list[str]:
        return [name for name, module in self.named_children() if isinstance(module, Bank)]

    def banks_held(self) -> list[Bank]:
        return [module for module in self.modules() if isinstance(module, Bank)]


def in_autocast(device: torch.device) -> bool:
    """Whether products are taken in a shorter type here. The meta device stands for any other, and has no autocast of its own."""
    kinds = ("cpu", "cuda") if device.type == "meta" else (device.type,)
    return any(torch.is_autocast_enabled(kind) for kind in kinds)
