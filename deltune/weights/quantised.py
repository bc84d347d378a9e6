"""Quantised weights: codes and scales that are a tensor to everything else. Their values exist only while they are used.

A `QuantisedTensor` has the shape, type and device of the weight that it stands for. Whatever reads it gets values:
`F.linear`, `@` and `torch.addmm` work on it, and keep the codes for the backward pass, never the values; `weight[rows]`
gives the values of those rows alone; any other operation takes all its values for the moment. `.T`, `.detach()`,
`.clone()`, `.to(device or type)` and `nn.Parameter` stay quantised. Nothing writes to it: `quantised_like` makes a new one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from deltune.errors import DeltuneError
from deltune.weights import bnb
from deltune.weights import codes as coding
from deltune.weights.scratch import scratch

KINDS = ("nf4", "fp4", "int8")
aten = torch.ops.aten


class QuantisedTensor(Tensor):
    """A weight [out, in] as codes and scales. Made by `quantise` and `quantised_like`.

    `dtype` is the type in which its values are given. `codes`: uint8 [⌈out · in / 2⌉], two a byte, or int8 [out, in];
    `scales`: float32, one a block (int8: one a row), or with double quantisation uint8 codes, with `scales_of_scales`
    float32, one for 256 of them, and their `mean` float32 []. `transposed`: the weight is that of `stored_shape`, turned.
    `left` [out, r] and `right` [r, in], float32: a product that is part of the weight and was never rounded to codes.
    """

    kind: str
    block_size: int
    stored_shape: tuple[int, int]
    transposed: bool
    codes: Tensor
    scales: Tensor
    scales_of_scales: Tensor | None
    mean: Tensor | None
    left: Tensor | None
    right: Tensor | None

    @staticmethod
    def __new__(cls, parts: dict[str, Tensor], kind: str, block_size: int, stored_shape: tuple[int, int], dtype: torch.dtype, transposed: bool = False):
        shape = stored_shape[::-1] if transposed else stored_shape
        tensor = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=parts["codes"].device)
        tensor.kind, tensor.block_size, tensor.stored_shape, tensor.transposed = kind, block_size, tuple(stored_shape), transposed
        for name in PARTS:
            setattr(tensor, name, parts.get(name))
        return tensor

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        form = {"kind": self.kind, "block_size": self.block_size, "stored_shape": self.stored_shape, "dtype": self.dtype, "transposed": self.transposed}
        return [name for name in PARTS if getattr(self, name) is not None], form

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], form: dict[str, Any], *_: Any) -> QuantisedTensor:
        return cls(parts, **form)

    @property
    def nested(self) -> bool:
        """Whether the scales are quantised too."""
        return self.mean is not None

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name."""
        return {name: getattr(self, name) for name in self.__tensor_flatten__()[0]}

    def _with(self, change: Callable[[Tensor], Tensor] | None = None, **form: Any) -> QuantisedTensor:
        parts = self.parts()
        return type(self)({name: change(part) for name, part in parts.items()} if change else parts, **(self.__tensor_flatten__()[1] | form))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantisedTensor({self.kind}, {list(self.shape)}, {self.dtype}, {self.device})"

    def __getitem__(self, index: Any) -> Tensor:
        """Plain values; of whole rows, only theirs are formed."""
        if isinstance(index, slice) and not self.transposed and index.step in (None, 1):
            start, stop, _ = index.indices(self.shape[0])
            return _rows(self, start, max(start, stop))
        return dequantised(self)[index]

    def __setitem__(self, index: Any, values: Any) -> None:
        raise _not_written(self, "[...] = ")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in STAYS:
            return STAYS[func](*args, **kwargs)
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                if isinstance(written, QuantisedTensor):
                    raise _not_written(written, func.overloadpacket.__name__)
        if func in PRODUCTS and sum(isinstance(a, QuantisedTensor) for a in args) == 1:
            return _product(func, args, kwargs)
        args, kwargs = tree_map(lambda a: dequantised(a) if isinstance(a, QuantisedTensor) else a, (args, kwargs))
        return func(*args, **kwargs)


def _product(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """A product with one quantised tensor, formed in that one's type and given in the other's."""
    dtype = next(a.dtype for a in args if isinstance(a, QuantisedTensor))
    given = next(a.dtype for a in args if isinstance(a, Tensor) and not isinstance(a, QuantisedTensor))
    values = (_values(a, dtype, for_now=True) if isinstance(a, QuantisedTensor) else a.to(dtype) if isinstance(a, Tensor) else a for a in args)
    return func(*values, **kwargs).to(given)


PARTS = ("codes", "scales", "scales_of_scales", "mean", "left", "right")
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.linear.default, aten.matmul.default)


def _converted(tensor: QuantisedTensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None, non_blocking: bool = False, **layout: Any) -> Tensor:
    """What `.to`, autocast and `Module.to` call: codes stay, on another device or to be given in another type."""
    dtype = dtype or tensor.dtype
    if not dtype.is_floating_point:
        return dequantised(tensor).to(dtype)
    return tensor._with(lambda part: part.to(device or part.device, non_blocking=non_blocking), dtype=dtype)


STAYS: dict[Any, Callable[..., Tensor]] = {
    aten.detach.default: lambda tensor: tensor._with(),
    aten.alias.default: lambda tensor: tensor._with(),
    aten.clone.default: lambda tensor, memory_format=None: tensor._with(Tensor.clone),
    aten.t.default: lambda tensor: tensor._with(transposed=not tensor.transposed),
    aten.transpose.int: lambda tensor, a, b: tensor._with(transposed=tensor.transposed ^ (a % 2 != b % 2)),
    aten.permute.default: lambda tensor, dims: tensor._with(transposed=tensor.transposed ^ (dims[0] % 2 == 1)),
    aten._to_copy.default: _converted,
}


def check_writable(tensor: Tensor) -> None:
    """DeltuneError for a quantised weight. To ask is up to whoever writes row by row: `weight[rows]` of one is a copy."""
    if isinstance(tensor, QuantisedTensor):
        raise _not_written(tensor, "rows of it")


def _not_written(tensor: QuantisedTensor, what: str) -> DeltuneError:
    return DeltuneError(
        f"a weight of shape {list(tensor.shape)} is stored quantised ({tensor.kind}) and cannot be written to in place ({what}). What fits: "
        "weights.dequantised(weight), a plain copy; or weights.quantised_like(weight, values), new values rounded to its codes."
    )


@torch.no_grad()
def quantise(weight: Tensor, kind: str, *, block_size: int = 64, double: bool = True, dtype: torch.dtype | None = None) -> QuantisedTensor:
    """A weight [out, in] in `nf4`, `fp4` or `int8`, on its device, to be computed with in `dtype` (default its own type).

    `block_size` values share a scale, and `double` quantises the scales themselves; both are for 4 bits only: int8 has a
    scale a row. Raises DeltuneError for values that are not finite, another shape, or a block size that is none.
    """
    if weight.ndim != 2:
        raise DeltuneError(f"a weight of shape {list(weight.shape)} cannot be quantised: only matrices can")
    if kind not in KINDS:
        raise DeltuneError(f"{kind!r} is no quantisation. What fits: {', '.join(KINDS)}.")
    weight = weight.detach()
    parts: dict[str, Tensor] = {}
    if kind == "int8":
        parts["codes"], parts["scales"] = coding.quantise_int8(weight)
    else:
        if block_size not in coding.BLOCK_SIZES:
            raise DeltuneError(f"{block_size} is no block size. What fits: {', '.join(map(str, coding.BLOCK_SIZES))}.")
        bnb.ready(weight.device)
        parts["codes"], parts["scales"] = coding.quantise_4bit(weight, kind, block_size)
        if double:
            parts["scales"], parts["scales_of_scales"], parts["mean"] = coding.quantise_scales(parts["scales"])
    return QuantisedTensor(parts, kind, block_size, tuple(weight.shape), dtype or weight.dtype)


def is_quantised(tensor: Any) -> bool:
    return isinstance(tensor, QuantisedTensor)


@torch.no_grad()
def dequantised(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The values, plain and of the tensor's shape, in `dtype` (default its own): a new tensor, or a plain one itself where
    that is of this type. They are rounded once, from float32."""
    dtype = dtype or tensor.dtype
    if not isinstance(tensor, QuantisedTensor):
        return tensor.detach().to(dtype)
    return _values(tensor, dtype)


def quantised_like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values` of the tensor's shape, stored as it is: quantised in the same way, or plain in its type."""
    if tensor.shape != values.shape:
        raise DeltuneError(f"values of shape {list(values.shape)} for a weight of {list(tensor.shape)}")
    if not isinstance(tensor, QuantisedTensor):
        return values.detach().to(tensor)
    values = values.T if tensor.transposed else values
    new = quantise(values.to(tensor.device), tensor.kind, block_size=tensor.block_size, double=tensor.nested, dtype=tensor.dtype)
    return new._with(transposed=tensor.transposed)


@torch.no_grad()
def quantised_beside(tensor: Tensor, values: Tensor, left: Tensor, right: Tensor) -> QuantisedTensor:
    """`values` [out, in] as left [out, r] @ right [r, in], kept beside in float32, and the rest, which alone is quantised, in
    the tensor's way. The sum of both is what the new tensor's values are."""
    if not isinstance(tensor, QuantisedTensor) or tensor.transposed:
        raise DeltuneError("only a weight that is stored quantised, as it is stored, can have a product beside it")
    left, right = (side.detach().to(tensor.device, torch.float32).contiguous() for side in (left, right))
    rest = quantised_like(tensor, torch.addmm(values.to(tensor.device, torch.float32), left, right, alpha=-1))
    return QuantisedTensor(rest.parts() | {"left": left, "right": right}, **rest.__tensor_flatten__()[1])


def held_beside(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """The (left, right) of `quantised_beside`; None where there are none."""
    return (tensor.left, tensor.right) if isinstance(tensor, QuantisedTensor) and tensor.left is not None else None


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor's values take: of a quantised one its codes and scales."""
    parts = tensor.parts().values() if isinstance(tensor, QuantisedTensor) else (tensor,)
    return sum(part.numel() * part.element_size() for part in parts)


def _values(tensor: QuantisedTensor, dtype: torch.dtype, *, for_now: bool = False) -> Tensor:
    """The values in `dtype`; those `for_now` may lie in memory that the next of its kind uses again."""
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=dtype, device="meta")
    form = (tensor.codes, tensor.scales, tensor.scales_of_scales, tensor.mean, tensor.kind, tensor.block_size, tensor.stored_shape, dtype)
    # while a compiler looks on, parts only stand for tensors: to it the values are one operation, of which it sees no more
    out = _from_codes(*form, for_now=for_now) if type(tensor.codes) is Tensor else torch.ops.deltune.values_from_codes(*form)
    if tensor.left is not None:
        out.addmm_(tensor.left.to(dtype), tensor.right.to(dtype))
    return out.T if tensor.transposed else out


def _from_codes(
    codes: Tensor, scales: Tensor, scales_of_scales: Tensor | None, mean: Tensor | None, kind: str, block_size: int, shape: Sequence[int], dtype: torch.dtype,
    *, for_now: bool = False,
) -> Tensor:  # fmt: skip
    again = for_now and codes.device.type == "cpu"  # a device's own allocator keeps memory by itself
    out = scratch("values of a quantised weight", codes, dtype, *shape) if again else torch.empty(shape, dtype=dtype, device=codes.device)
    if kind == "int8":
        return coding.dequantise_int8(codes, scales, out)
    scales = scales if mean is None else coding.dequantise_scales(scales, scales_of_scales, mean)
    if not bnb.dequantise_4bit(codes, scales, kind, block_size, out):
        coding.dequantise_4bit(codes, scales, kind, block_size, out.view(-1))
    return out


@torch.library.custom_op("deltune::values_from_codes", mutates_args=())
def _operation(
    codes: Tensor, scales: Tensor, scales_of_scales: Tensor | None, mean: Tensor | None, kind: str, block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:  # fmt: skip
    return _from_codes(codes, scales, scales_of_scales, mean, kind, block_size, shape, dtype)


@_operation.register_fake
def _(codes: Tensor, *form: Any) -> Tensor:
    return codes.new_empty(form[-2], dtype=form[-1])


def _scales(tensor: QuantisedTensor, first: int = 0, last: int | None = None) -> Tensor:
    """The scales [blocks] in float32, or those of blocks `first` to `last`."""
    if not tensor.nested:
        return tensor.scales[first:last]
    start = first // coding.SCALES_BLOCK
    last = tensor.scales.numel() if last is None else last
    scales = coding.dequantise_scales(
        tensor.scales[start * coding.SCALES_BLOCK : last], tensor.scales_of_scales[start : math.ceil(last / coding.SCALES_BLOCK)], tensor.mean
    )
    return scales[first - start * coding.SCALES_BLOCK :]


@torch.no_grad()
def _rows(tensor: QuantisedTensor, start: int, stop: int) -> Tensor:
    rows = _coded_rows(tensor, start, stop)
    return rows if tensor.left is None else rows.addmm_(tensor.left[start:stop].to(rows.dtype), tensor.right.to(rows.dtype))


def _coded_rows(tensor: QuantisedTensor, start: int, stop: int) -> Tensor:
    """Values of the codes of rows `start` to `stop`; blocks run on over the ends of rows, so the first and last may be of others."""
    out = torch.empty(stop - start, tensor.stored_shape[1], dtype=tensor.dtype, device=tensor.device)
    if tensor.kind == "int8":
        return coding.dequantise_int8(tensor.codes[start:stop], tensor.scales[start:stop], out)
    width, size = tensor.stored_shape[1], tensor.block_size
    first, last = start * width // size, -(-stop * width // size)
    before = start * width - first * size  # values of the first block that belong to the row above
    codes = tensor.codes[first * size // 2 : min(last * size // 2, tensor.codes.numel())]
    scales = _scales(tensor, first, last)
    if before == 0:
        coding.dequantise_4bit(codes, scales, tensor.kind, size, out.view(-1))
        return out
    whole = torch.empty(before + out.numel(), dtype=tensor.dtype, device=tensor.device)
    return coding.dequantise_4bit(codes, scales, tensor.kind, size, whole)[before:].view(out.shape)
