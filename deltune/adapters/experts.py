"""Adapters on expert weights that a mixture keeps as one parameter: each expert is a layer of its own, with its own delta.

Legend: a stack is a parameter with all experts' weights, stored as [experts, out, in] or transposed, [experts, in, out];
W [experts, out, in] is its view as the deltas think of it. The module that owns the stack stays what and where it is:
while it runs, its attribute is a stand-in that acts as W + ΔW in whatever the module does with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune import weights
from deltune.adapters.adapted import Adapted
from deltune.adapters.config import AdapterConfig, name_of
from deltune.adapters.delta import Delta
from deltune.adapters.init import starts
from deltune.adapters.layers import Site, Stack, out_in
from deltune.adapters.methods.lora import Lora, LoraConfig
from deltune.errors import AdapterError

WIDTH = 8  # a multiple that kernels for grouped products want the rank to be


# ---------------------------------------------------------------- deltas


def expert_delta(config: AdapterConfig, site: Site, make: type[Delta]) -> Delta:
    """The deltas of a stack of experts. AdapterError where the method cannot be on one."""

    def refuse(why: str) -> None:
        raise AdapterError(f"{site.name}: {name_of(config)} cannot be on experts that are one parameter, for {why}. Put {site.name.rpartition('.')[0].rpartition('.')[2]} into exclude, or name targets without it")

    if config.delta_class().no_matrix(config):
        refuse(config.delta_class().no_matrix(config))
    if config.delta_class().banks(config):
        refuse("its layers share tensors, and experts have none to share")
    if config.dropout:
        refuse("their inputs cannot be reached by dropout, which has to be 0 then")
    if make is Lora and isinstance(config, LoraConfig):
        return ExpertLora(config, site)
    made = Experts(config, site, make)
    inner = made.each[0]
    if inner.adds_bias or (site.has_bias and type(inner).bias_delta is not Delta.bias_delta):
        refuse("it changes the layer's bias too, which here is a parameter of its own, or none")
    return made


class Experts(Delta):
    """One delta of any method for each expert."""

    def __init__(self, config: AdapterConfig, site: Site, make: Callable[[AdapterConfig, Site], Delta]):
        self.make = make
        super().__init__(config, site)

    def build(self) -> None:
        site = replace(self.site, kind="linear", has_bias=False, experts=0)
        self.each = nn.ModuleList(self.make(self.config, site) for _ in range(self.site.experts))
        first = self.each[0]
        self.averages_loss, self.stops_gradient = first.averages_loss, first.stops_gradient

    def reset(self, generator: torch.Generator) -> None:
        for delta in self.each:
            delta.reset(generator)

    @property
    def starts_from_base(self) -> bool:
        return self.each[0].starts_from_base

    def start(self, W: Tensor, generator: torch.Generator) -> None:
        for delta, own in zip(self.each, W, strict=True):
            delta.start(own, generator)

    def ready(self, W: Tensor) -> None:
        for delta, own in zip(self.each, W, strict=True):
            delta.ready(own)

    def delta(self, W: Tensor) -> Tensor:
        return torch.stack([delta.delta(own) for delta, own in zip(self.each, W, strict=True)])

    def of(self, expert: int, W: Tensor) -> Tensor:
        """ΔW [out, in] of one expert."""
        return self.each[expert].delta(W)

    def loss(self) -> Tensor | None:
        losses = [loss for loss in (delta.loss() for delta in self.each) if loss is not None]
        if not losses:
            return None
        total = torch.stack(losses)
        return total.mean() if self.averages_loss else total.sum()

    def lr_ratios(self) -> Mapping[str, float]:
        return {f"each.{i}.{name}": ratio for i, delta in enumerate(self.each) for name, ratio in delta.lr_ratios().items()}

    def ranked(self) -> Mapping[str, int]:
        return {f"each.{i}.{name}": axis for i, delta in enumerate(self.each) for name, axis in delta.ranked().items()}

    def leaves(self) -> dict[str, str]:
        # what each holds, as it holds it: no other program reads these files, and a method's own form may need more than its tensors
        return {name: name.removeprefix("each.") for name in self.state_dict()}


class ExpertLora(Lora):
    """LoRA with the factors of all experts in two tensors: A [experts, rank, in], B [experts, out, rank].

    The file is PEFT's for `target_parameters`: A as [experts·rank, in], B as [out, rank·experts] with the expert running
    fastest. Of several parameters of one module PEFT wraps the earlier ones deeper, which is part of the names. A stack
    that is stored transposed, and whose module does not say so, PEFT takes for the transpose of what it is.
    """

    named_alone = True

    def build(self) -> None:
        super().build()  # for its checks, and for what is trained
        for name in ("lora_A", "lora_B", *(("start_A", "start_B") if self.is_taken_out else ())):
            single = getattr(self, name)
            many = torch.empty(self.site.experts, *single.shape, **self.storage)
            setattr(self, name, nn.Parameter(many) if isinstance(single, nn.Parameter) else many)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        sizes = (self.rank, self.site.n_in, self.site.n_out)
        self._begin_with(*_stacked(starts.from_nothing(*sizes, generator, self.config) for _ in range(self.site.experts)))

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        begin = starts.FROM_BASE[self.config.init]
        self._begin_with(*_stacked(begin(own, self.rank, self.scale, generator, self.config) for own in W))

    def product(self) -> tuple[Tensor, Tensor, float]:
        if not self.is_taken_out:
            return self.lora_B, self.lora_A, self.scale
        return torch.cat([self.lora_B, -self.start_B], 2), torch.cat([self.lora_A, self.start_A], 1), self.scale

    def of(self, expert: int, W: Tensor) -> Tensor:
        left, right, scale = self.product()
        return (left[expert] * scale) @ right[expert]

    def ranked(self) -> dict[str, int]:
        return {"lora_A": 1, "lora_B": 2}

    def leaves(self) -> dict[str, str]:
        owner = self.site.name.rpartition(".")[0]
        head = f"base_model.model.{owner}." + "base_layer." * self.site.depth
        return {"lora_A": f"{head}lora_A.weight", "lora_B": f"{head}lora_B.weight"}

    def to_file(self) -> dict[str, Tensor]:
        B, A, _ = self.product()
        if self.site.mistaken:
            A, B = B.transpose(1, 2), A.transpose(1, 2)
        a, b = self.leaves().values()
        return {a: A.detach().flatten(0, 1), b: B.detach().permute(1, 2, 0).flatten(1, 2)}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        a, b = self.leaves().values()
        A = tensors[a].unflatten(0, (self.site.experts, -1))
        B = tensors[b].unflatten(1, (-1, self.site.experts)).permute(2, 0, 1)
        if self.site.mistaken:
            A, B = B.transpose(1, 2), A.transpose(1, 2)
        self.lora_A.copy_(A[:, : self.rank])
        self.lora_B.copy_(B[:, :, : self.rank])
        if self.is_taken_out:
            self.start_A.copy_(A[:, self.rank :])
            self.start_B.copy_(-B[:, :, self.rank :])


def _stacked(pairs: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    many_A, many_B = zip(*pairs, strict=True)
    return torch.stack(many_A), torch.stack(many_B)


# ---------------------------------------------------------------- in the model


class AdaptedStack(Adapted):
    """The deltas of one stack. It stands within the module that owns the stack, and puts the stand-in there through hooks."""

    def __init__(self, name: str, stack: Stack):
        super().__init__(name, stack)
        stack.owner.add_module(stack.holder, self)
        # bound methods, not closures: a copy of the model must hook its own copy
        self._handles = [
            stack.owner.register_forward_pre_hook(self._put),
            stack.owner.register_forward_hook(self._take, always_call=True),
        ]

    def take_off(self) -> None:
        """Leave the owner as it was before."""
        for handle in self._handles:
            handle.remove()
        delattr(self.base_layer.owner, self.base_layer.holder)

    def _put(self, owner: nn.Module, arguments: Any) -> None:
        running = self.to_run()
        if running:
            owner.__dict__[self.base_layer.leaf] = self.stand_in(running)  # seen before the parameter of that name

    def _take(self, owner: nn.Module, arguments: Any, result: Any) -> None:
        owner.__dict__.pop(self.base_layer.leaf, None)

    def forward(self, *arguments: Any) -> Any:
        raise AdapterError(f"{self.site.name} is a parameter, and cannot be called")

    def stand_in(self, running: Sequence[str]) -> StandIn:
        """What acts as the stack with these adapters."""
        stored, deltas = self.base_layer.weight, [self.adapters[name] for name in running]
        products = [delta.product() for delta in deltas]
        if any(product is None for product in products):
            return OneByOne(self, deltas)
        left = torch.cat([(B * scale).to(stored.dtype) for B, _, scale in products], 2)
        right = torch.cat([A.to(stored.dtype) for _, A, _ in products], 1)
        return PlusProduct(stored, right.mT, left.mT) if self.site.transposed else PlusProduct(stored, left, right)

    def originals(self) -> dict[str, Tensor]:
        return self._originals or {"weight": self.base_layer.weight}

    def merge(self, names: Sequence[str]) -> None:
        self.check_mergeable(names)
        stored = self.base_layer.weight
        self._originals = {"weight": stored}
        self.base_layer.weight = nn.Parameter(stored.detach().clone(), requires_grad=stored.requires_grad)
        self.fold(names)
        self.merged = list(names)

    @torch.no_grad()
    def fold(self, names: Sequence[str], share: float = 1.0) -> None:
        W = out_in(self.base_layer, self.base_layer.weight)
        for name in names:
            delta: Experts | ExpertLora = self.adapters[name]
            for expert, own in enumerate(W):
                weights.add_to_weight(own, delta.of(expert, weights.float_view(own)) * share)


class StandIn:
    """Acts as a tensor in torch's functions. What it knows no better way for, it does with the whole sum."""

    stored: Tensor  # the part that is the base's own

    def dense(self) -> Tensor:
        """The whole sum, in the base's type."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def ndim(self) -> int:
        return self.stored.ndim

    def dim(self) -> int:
        return self.stored.ndim

    def size(self, *dimension: int) -> Any:
        return self.stored.size(*dimension)

    def numel(self) -> int:
        return self.stored.numel()

    def data_ptr(self) -> int:
        return self.stored.data_ptr()  # asked for its alignment

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: Any) -> Any:
        return self.dense()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        own_way = PRODUCTS.get(func)
        if own_way is not None:
            found = own_way(*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*(_dense(arg) for arg in args), **{name: _dense(value) for name, value in kwargs.items()})


def _dense(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(item) for item in value)
    return value.dense() if isinstance(value, StandIn) else value


class OneByOne(StandIn):
    """A stack whose deltas are matrices without factors: an expert's sum is made when that expert is asked for."""

    def __init__(self, layer: AdaptedStack, deltas: Sequence[Experts | ExpertLora]):
        self.stored, self.layer, self.deltas = layer.base_layer.weight, layer, deltas

    def one(self, expert: int) -> Tensor:
        """As it is stored, [out, in] or [in, out]."""
        stored = self.stored[expert]
        transposed = self.layer.site.transposed
        W = weights.float_view(stored.T if transposed else stored)
        for delta in self.deltas:
            W = W + delta.of(expert, W)
        return (W.T if transposed else W).to(self.stored.dtype)

    def dense(self) -> Tensor:
        return torch.stack([self.one(expert) for expert in range(len(self))])

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool):
            return self.one(int(index))
        return self.dense()[index]


class PlusProduct(StandIn):
    """stored + left·right, with any leading dimensions: products with it are made in two thin steps beside the base's."""

    def __init__(self, stored: Tensor, left: Tensor, right: Tensor):
        self.stored, self.left, self.right = stored, left, right

    def dense(self) -> Tensor:
        return self.stored + self.left @ self.right

    def __getitem__(self, index: Any) -> PlusProduct | Tensor:
        leading = isinstance(index, (int, slice)) or (isinstance(index, Tensor) and index.ndim <= 1)
        if not leading or self.ndim < 3:
            return self.dense()[index]
        return PlusProduct(self.stored[index], self.left[index], self.right[index])

    def transpose(self, first: int, second: int) -> PlusProduct | Tensor:
        if {first % self.ndim, second % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            return self.dense().transpose(first, second)
        return self.mT

    @property
    def mT(self) -> PlusProduct:
        return PlusProduct(self.stored.mT, self.right.mT, self.left.mT)

    @property
    def T(self) -> PlusProduct | Tensor:
        return self.mT if self.ndim == 2 else self.dense().T

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return _matmul(other, self)

    def __matmul__(self, other: Tensor) -> Tensor:
        return _matmul(self, other)


# ---------------------------------------------------------------- products with a PlusProduct


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, PlusProduct) or isinstance(x, StandIn):
        return NotImplemented
    return F.linear(x, weight.stored, bias) + F.linear(F.linear(x, weight.right), weight.left)


def _matmul(first: Any, second: Any) -> Any:
    if isinstance(second, PlusProduct) and not isinstance(first, StandIn):
        return first @ second.stored + (first @ second.left) @ second.right
    if isinstance(first, PlusProduct) and not isinstance(second, StandIn):
        return first.stored @ second + first.left @ (first.right @ second)
    return NotImplemented


def _grouped(x: Any, weight: Any, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if not isinstance(weight, PlusProduct) or isinstance(x, StandIn) or bias is not None or out_dtype is not None:
        return NotImplemented
    product = functools.partial(F.grouped_mm, offs=offs)
    # kernels want rows of a multiple of 16 bytes, and columns of zeros change nothing
    more = -weight.left.shape[-1] % WIDTH
    left, right = F.pad(weight.left, (0, more)), F.pad(weight.right, (0, 0, 0, more))
    return product(x, weight.stored) + product(product(x, left), right)


# torch's functions that an expert's weight goes through, each to the way that keeps the sum apart
PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    torch.bmm: _matmul,
    Tensor.bmm: _matmul,
    torch._grouped_mm: _grouped,  # what torch.nn.functional.grouped_mm hands on
}
