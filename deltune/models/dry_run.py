"""A training step without numbers: run on the meta device, where tensors have shapes and no content, and kept account of.

What a step holds and computes follows from shapes alone, so the account needs no formula for any architecture, adapter,
precision or recomputation. Not in it: what kernels use inside themselves, and what an allocator loses between blocks.

Shapes: batch = examples, seq = tokens of the longest of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate as running_sum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry

from deltune.errors import ModelError
from deltune.models.head import Head, describe, summed_loss
from deltune.models.recompute import apply as apply_recompute
from deltune.weights import is_quantised, stored_bytes

SMALL = 1 << 25  # bytes of the largest block that glibc keeps in its heap (DEFAULT_MMAP_THRESHOLD_MAX)
PARTS = ("gradients", "weight_copies", "activations", "logits")


class CostUnknown(ModelError):
    """A model whose forward pass depends on numbers, which the meta device does not have."""


@dataclass(frozen=True)
class Kernel:
    """One operation: what it multiplies (a multiply-add is two FLOPs), in which type, and what it reads and writes."""

    flops: int
    dtype: torch.dtype
    num_bytes: int


@dataclass(frozen=True)
class StepAccount:
    """One micro-batch, forward and backward. Bytes at the moment when most are held, beside weights and optimizer state."""

    parts: dict[str, int]  # part of PARTS -> bytes
    small_bytes: int  # of them in blocks that a C library takes from its heap rather than from the system
    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def flops(self) -> int:
        """As torch's own FLOP counter counts them: whole attention squares, and recomputation too."""
        return sum(kernel.flops for kernel in (*self.forward, *self.backward))


def dry_run(
    model: nn.Module, *, batch: int, seq: int, trained: int | None = None, padded: bool = True, device: str = "cpu",
    autocast: torch.dtype | None = None, recompute: str = "none", accumulate: bool = False, fast: bool = True,
    lengths: tuple[int, ...] | None = None,
) -> StepAccount:
    """The account of one micro-batch [batch, seq] through a Hugging Face causal language model on the meta device.

    `trained` tokens reach the output head (None: all). `padded` says that examples differ in length, so that attention
    has a mask. `device` (its type) decides which attention kernel runs. `recompute` is a name of recompute.KINDS, and
    `accumulate` says that gradients of an earlier micro-batch are there already; `fast` that the loss is computed without
    logits where it can be. `lengths` of documents make it a packed row of `seq` tokens, without a mask. Raises
    CostUnknown, and ModelError where a model cannot recompute.
    """

    def kernels() -> _KernelShapes:
        return _KernelShapes(device, autocast, padded)

    head = describe(model) if fast else None
    account = _Account(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter) if accumulate else None
    was_training, use_cache = model.training, model.config.use_cache
    model.train()
    if recompute != "none":
        apply_recompute(model, recompute, lambda: (nullcontext(), kernels()))
    try:
        with torch.device("meta"), account:
            account.hold(parameter.grad for parameter in parameters if parameter.grad is not None)
            # autocast itself does nothing on the meta device, but nodes of our own ask for its type
            with kernels(), torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = _summed_loss(model, head, batch, seq, batch * (seq - 1) if trained is None else trained, device, kernels, lengths)
            account.forward_is_done()
            torch.autograd.backward([loss])
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CostUnknown(f"{type(model).__name__}: its cost cannot be told without its weights: {reason}") from None
    finally:
        if recompute != "none":
            apply_recompute(model, "none")
        model.train(was_training)
        model.config.use_cache = use_cache
        for parameter in parameters:
            parameter.grad = None
    forward = account.num_forward
    return StepAccount(dict(account.at_peak), account.small_at_peak, tuple(account.kernels[:forward]), tuple(account.kernels[forward:]))


def _summed_loss(
    model: nn.Module, head: Head | None, batch: int, seq: int, trained: int, device: str, kernels: Callable[[], Any],
    lengths: tuple[int, ...] | None,
) -> Tensor:  # fmt: skip
    """The loss by the function that training computes it with, of so many trained tokens, wherever they are."""
    ids, mask = torch.zeros(batch, seq, dtype=torch.long), torch.ones(batch, seq, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if lengths is not None:
        borders = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        borders.starts = tuple(running_sum(lengths, initial=0))  # what the attention function reads off the numbers, which are not here
        inputs |= {
            "attention_mask": None, "position_ids": torch.zeros_like(ids), "cu_seq_lens_q": borders, "cu_seq_lens_k": borders,
            "max_length_q": max(lengths), "max_length_k": max(lengths),
        }  # fmt: skip
    rows, targets = torch.arange(trained), torch.zeros(trained, dtype=torch.long)
    return summed_loss(model, head, inputs, rows, targets, device=device, contexts=lambda: (nullcontext(), kernels()))


def peak_bytes_of(model: nn.Module, action: Callable[[], None]) -> int:
    """Bytes of the tensors that an action with numbers holds at its worst moment, beside the model's own."""
    account = _Account(model)
    with account:
        action()
    return sum(account.at_peak.values())


class _Account(TorchDispatchMode):
    """Follows every storage from its birth to its end, and every operation."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.weights = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self.trained_shapes = {p.shape for p in model.parameters() if p.requires_grad}
        self.vocab = model.config.get_text_config().vocab_size
        self.kernels: list[Kernel] = []
        self.num_forward: int | None = None
        self.alive: dict[int, weakref.ref] = {}
        self.held = dict.fromkeys(PARTS, 0)
        self.at_peak = dict(self.held)
        self.small = self.small_at_peak = 0

    def forward_is_done(self) -> None:
        self.num_forward = len(self.kernels)

    def hold(self, gradients: Iterable[Tensor]) -> None:
        for gradient in gradients:
            self._born(gradient, "gradients")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        sources = {_storage(t) for t in read}
        for tensor in made:
            if _storage(tensor) not in sources:
                self._born(tensor, self._part(tensor, sources))
        if func._schema.is_mutable or any(_storage(t) not in sources for t in made):  # else it is only a view
            self._held_for_now(sum(t.numel() * t.element_size() for t in read if is_quantised(t)))
            self._ran(func, args, kwargs, out, read, made)
        return out

    def _ran(self, func: Any, args: tuple, kwargs: dict, out: Any, read: list[Tensor], made: list[Tensor]) -> None:
        formula = FLOPS.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        dtype = made[0].dtype if made else torch.float32
        codes = [t for t in read if is_quantised(t)]  # read, and their values written, before these are read like any others
        moved = sum(t.numel() * t.element_size() for t in (*read, *made, *codes)) + sum(map(stored_bytes, codes))
        self.kernels.append(Kernel(int(flops), dtype, moved))

    def _held_for_now(self, size: int) -> None:
        """Note memory that is there during one operation: the values of a quantised weight."""
        if size and sum(self.held.values()) + size > sum(self.at_peak.values()):
            self.at_peak = self.held | {"weight_copies": self.held["weight_copies"] + size}
            self.small_at_peak = self.small

    def _part(self, tensor: Tensor, sources: set[int]) -> str:
        if tensor.ndim > 1 and tensor.shape[-1] == self.vocab:
            return "logits"
        if self.num_forward is not None and tensor.shape in self.trained_shapes:
            return "gradients"
        return "weight_copies" if sources and sources <= self.weights else "activations"

    def _born(self, tensor: Tensor, part: str) -> None:
        storage = (tensor.codes if is_quantised(tensor) else tensor).untyped_storage()
        key, size = _storage(tensor), storage.nbytes()
        if key in self.alive or key in self.weights:
            return

        def end(_: Any) -> None:
            del self.alive[key]
            self.held[part] -= size
            self.small -= size if size <= SMALL else 0

        self.alive[key] = weakref.ref(storage, end)
        self.held[part] += size
        self.small += size if size <= SMALL else 0
        if sum(self.held.values()) > sum(self.at_peak.values()):
            self.at_peak, self.small_at_peak = dict(self.held), self.small


def _storage(tensor: Tensor) -> int:
    return (tensor.codes if is_quantised(tensor) else tensor).untyped_storage()._cdata


def _grouped_flops(rows: Tensor, experts: Tensor, *_: Any, **__: Any) -> int:
    """One matrix product per expert, over rows sorted by expert: each row meets one expert's matrix. Numel is taken,
    since torch's counter would hand on shapes only."""
    return 2 * rows.numel() * experts.shape[-1]


def _attention_flops(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their weighted sum. query [batch, heads, seq, head]."""
    return 4 * query.numel() * key.shape[-2]


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    """Scores anew, and four products of the same size."""
    return 10 * query.numel() * key.shape[-2]


# what torch's own counter does not know
FLOPS = {
    torch.ops.aten._grouped_mm: _grouped_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class _KernelShapes(TorchFunctionMode):
    """What the meta device would do otherwise than a real one: autocast, attention in one kernel, questions about numbers."""

    # what torch.autocast computes in half precision, of the functions that decoders call
    HALF = ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "conv1d", "scaled_dot_product_attention")

    def __init__(self, device: str, autocast: torch.dtype | None, padded: bool):
        super().__init__()
        self.device, self.autocast, self.padded = device, autocast, padded
        self.copies: dict[Tensor, Tensor] = {}  # of trained weights: autocast makes them once and keeps them until it ends

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.autocast is not None and getattr(func, "__name__", "") in self.HALF:
            args, kwargs = tree_map(self._half, (args, kwargs))
        if func is F.scaled_dot_product_attention and not (self.device == "cpu" and kwargs.get("dropout_p")):
            return _fused_attention(self.device, *args, **kwargs)
        if func is Tensor.__bool__:  # models ask whether the mask is all ones, and can then leave it out
            return not self.padded
        return func(*args, **kwargs)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.copies.clear()

    def _half(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.autocast)
        if value not in self.copies:
            self.copies[value] = value.to(self.autocast)
        return self.copies[value]


def _fused_attention(
    device: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **_: Any
) -> Tensor:
    """The kernel that torch chooses. All keep inputs, output and a number a row, never the square of scores; a mask is
    first made a bias in the type of the query, and kept."""
    bias = None if attn_mask is None else torch.empty_like(attn_mask, dtype=query.dtype)
    if device == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=is_causal, attn_mask=bias)[0]
    if bias is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=is_causal)[0]
    if key.shape[1] != query.shape[1]:  # this kernel wants as many key heads as query heads
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, is_causal=is_causal)[0]
