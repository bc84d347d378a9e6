"""An adapter and its base over time: fold the change into the base and begin anew, or have the base follow the change.

Everything happens once per optimizer step, never per micro-batch, and is a function of the state and the step's number
alone, so a resumed run does what an uninterrupted one does. The base moves without a gradient: what is detached or
disabled afterwards leaves the moved base, and only base and adapter together are the trained function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from deltune import weights
from deltune.adapters.adapted import Adapted
from deltune.adapters.attach import (
    Prepared,
    adapters,
    begin,
    generator_for,
    ready,
    shared_parameters,
    weight_of,
)
from deltune.adapters.config import OverTime
from deltune.adapters.delta import Delta
from deltune.adapters.layers import out_in
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError

ROUNDING = 1e-9  # 0.07 of 100 steps is 7.000000000000001 in binary, and means 7


def over_time(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, name: str = "default", seed: int = 0) -> MovingBase | None:
    """What an attached adapter's config says of time, for any training loop; None if it says nothing.

    The loop calls `before_update(step)` right before and `after_step(step)` right after each optimizer step, counted
    from 1. Without an optimizer there are no moments to reset. Raises AdapterError where the base cannot be moved.
    """
    there = adapters(model)
    if name not in there:
        raise AdapterError(f"the model has no adapter {name!r}; it has {', '.join(there) or 'none'}")
    config = there[name].schedule
    return SCHEDULES[config.name](model, optimizer, name, config, seed) if config.moves_base else None


def rates(config: OverTime, make: Callable[[int], Callable[[int], float]], num_steps: int) -> Callable[[int], float]:
    """The learning rate's factor at a step from 1 to `num_steps`, where merges begin it anew.

    `make(n)` gives the schedule of n steps. With `restart` each stage runs one of `every` steps, the last one cut short;
    else the one schedule of the whole run is multiplied by a linear warm-up after each merge.
    """
    every = config.every
    if not config.merges or every >= num_steps:
        return make(num_steps)
    if config.restart:
        stage = make(every)
        return lambda step: stage((step - 1) % every + 1)
    whole = make(num_steps)
    rewarm = math.ceil(config.rewarm * every - ROUNDING) if config.rewarm < 1 else int(config.rewarm)

    def factor(step: int) -> float:
        since = (step - 1) % every + 1  # steps since the last merge
        return whole(step) * (since / rewarm if step > every and since < rewarm else 1.0)

    return factor


class MovingBase:
    """What schedules share that write to the base: which tensors move, and where that cannot be."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, name: str, config: OverTime, seed: int):
        self.model, self.optimizer, self.name, self.config, self.seed = model, optimizer, name, config, seed
        self.layers: dict[str, Adapted] = {
            place: wrapper for place, wrapper in wrappers(model) if isinstance(wrapper, Adapted) and name in wrapper.adapters and not wrapper.adapters[name].beside_method
        }
        self.deltas: dict[str, Delta] = {place: layer.adapters[name] for place, layer in self.layers.items()}
        self._check()

    def _check(self) -> None:
        others = [other for other in adapters(self.model) if other != self.name]
        if others:
            raise AdapterError(f"{self.config.name} moves the base under adapter {', '.join(others)} too, which was made on the base as it is; detach it first")
        shared = shared_parameters(self.model)
        for place, layer in self.layers.items():
            if layer.merged:
                raise AdapterError(f"{place}: adapter {self.name} is merged in place; unmerge the model before it is trained with {self.config.name}")
            layer.check_mergeable([self.name])
            for leaf in self.moved_leaves(place):
                tensor = getattr(layer.base_layer, leaf)
                if id(tensor) in shared:
                    raise AdapterError(
                        f"{place}: its {leaf} is tied to another layer, which {self.config.name} would change as well. Put {place} into exclude, or name targets without it"
                    )
                if weights.is_quantised(tensor) or not tensor.is_floating_point():
                    raise AdapterError(f"{place}: its {leaf} is stored quantised; folding a change into it would round it anew each time. {self.config.name} needs a base in a floating type: quant=none")

    def moved_leaves(self, place: str) -> list[str]:
        delta = self.deltas[place]
        return ["weight", "bias"] if delta.site.has_bias and type(delta).bias_delta is not Delta.bias_delta else ["weight"]

    def before_update(self, step: int) -> None:
        """The gradient of this step is whole, and the optimizer's step comes next."""

    def after_step(self, step: int) -> None:
        """Step `step` (1 is the first) is done."""
        raise NotImplementedError

    def tensors(self) -> Mapping[str, Tensor]:
        """What moves beside trained parameters and stored buffers, by its name in the model: the base's own tensors, and
        buffers of the adapter that its files leave out because a start gives them again (a reset draws others)."""
        moved = {id(getattr(layer.base_layer, leaf)) for place, layer in self.layers.items() for leaf in self.moved_leaves(place)}
        found = {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) in moved}
        stored = self.model.state_dict(keep_vars=True)
        own = {id(buffer) for delta in self.deltas.values() for buffer in delta.buffers()}
        return found | {name: b for name, b in self.model.named_buffers() if id(b) in own and name not in stored}

    def loaded(self) -> None:
        """The base has another value: whatever deltas have measured of it is measured again."""
        for place, delta in self.deltas.items():
            ready(self.layers[place], delta)

    def parameters(self) -> list[nn.Parameter]:
        """What the adapter trains in its layers, each once. Modules trained in full beside it are not among them."""
        return list({id(p): p for delta in self.deltas.values() for p in delta.parameters() if p.requires_grad}.values())


class MergeAndReset(MovingBase):
    """Every `every` steps W ← W + ΔW, the delta starts anew and the optimizer forgets: ReLoRA, PeriodicLoRA.

    With momentum m, which is our reading of PeriodicLoRA's: W ← W + (1 - m)·ΔW and B ← m·B, so the function stays too.
    """

    def _check(self) -> None:
        super()._check()
        if not self.config.momentum:
            return
        for place, delta in self.deltas.items():
            if not scales_with_b(delta, self.layers[place]):
                raise AdapterError(f"{place}: schedule.momentum needs a change in proportion to its factor B, and {delta.config.delta} with these settings is not. What fits: momentum 0")

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step < 1 or step % self.config.every:
            return
        kept = self.config.momentum
        for layer in self.layers.values():
            layer.fold([self.name], 1 - kept)
        if kept:
            for delta in self.deltas.values():
                delta.get_parameter(delta.factors[1]).mul_(kept)
        else:
            banks = list({id(bank): bank for delta in self.deltas.values() for bank in delta.banks_held()}.values())
            begin(Prepared(self.name, dict(self.layers), self.deltas, banks, {}), f"{self.seed}/{step}")
        self.loaded()
        if self.optimizer is not None:
            forget(self.optimizer, self.parameters(), self.config, generator_for("moments", f"{self.seed}/{step}"))


def scales_with_b(delta: Delta, layer: Adapted) -> bool:
    """Whether ΔW is in proportion to the factor B of a delta, tried with a B of our own."""
    if delta.factors is None or delta.adds_bias or delta.factors[1] not in dict(delta.named_parameters()):
        return False
    B = delta.get_parameter(delta.factors[1])
    if B.is_meta:
        return True
    before = B.detach().clone()
    with torch.no_grad():
        W = weight_of(layer)
        B.copy_(torch.linspace(-1, 1, B.numel()).reshape(B.shape))
        whole = delta.delta(W).clone()
        B.mul_(0.25)
        quarter = delta.delta(W).clone()
        B.copy_(before)
    return torch.allclose(quarter, whole / 4, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], config: OverTime, generator: torch.Generator) -> None:
    """Set what the optimizer remembers of these parameters to zero, or a share of it: the same entries of all moments of
    a parameter, so that no mean is left over an emptied square (ReLoRA's code draws them apart)."""
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        if not state:
            continue
        if config.moments == "forget":
            optimizer.state.pop(parameter)
            continue
        moments = {key: t for key, t in sorted(state.items()) if isinstance(t, Tensor) and t.ndim and t.is_floating_point()}
        if config.moments == "zero":
            for tensor in moments.values():
                tensor.zero_()
            continue
        whole = [tensor for tensor in moments.values() if tensor.shape == parameter.shape]
        if not whole:
            continue
        if config.moments == "random":
            order = torch.randperm(parameter.numel(), generator=generator, device="cpu")
        else:  # by the mean, which sorts before the square
            order = whole[0].abs().flatten().argsort(stable=True).cpu()
        gone = order[: int(config.prune * parameter.numel() + ROUNDING)].to(parameter.device)
        for tensor in whole:
            keep = torch.ones(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
            keep[gone] = 0
            tensor.mul_(keep.view_as(tensor))


class Following(MovingBase):
    """Delta-LoRA: after `begin` steps W ← W + λ·(ΔW_{t+1} - ΔW_t) with each step.

    A base in a short type would round such small steps away, so there each weight carries what rounding has left.
    """

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        self.before: dict[int, Tensor] | None = None  # the adapter's parameters before the update
        self.carried: dict[int, Tensor] = {}  # by the base tensor's id: what it lacks of its exact value
        for place, layer in self.layers.items():
            for leaf in self.moved_leaves(place):
                tensor = getattr(layer.base_layer, leaf)
                if torch.finfo(tensor.dtype).bits < 32:
                    self.carried[id(tensor)] = torch.zeros_like(tensor)

    def before_update(self, step: int) -> None:
        if step > self.config.begin:
            self.before = {id(parameter): parameter.detach().clone() for parameter in self.parameters()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.before is None:  # not yet, or the step updated nothing
            return
        for place, layer in self.layers.items():
            self._follow(layer, self.deltas[place], "bias" in self.moved_leaves(place))
        self.before = None
        self.loaded()

    def _follow(self, layer: Adapted, delta: Delta, with_bias: bool) -> None:
        base = layer.base_layer
        W = weights.float_view(out_in(base, base.weight))
        bias = weights.float_view(base.bias) if with_bias else None
        new, new_bias = _change(delta, W, bias)
        self._exchange(delta)
        old, old_bias = _change(delta, W, bias)
        self._exchange(delta)
        self._add(base.weight, out_in(base, new - old))
        if new_bias is not None:
            self._add(base.bias, new_bias - old_bias)

    def _exchange(self, delta: Delta) -> None:
        """Swap the delta's parameters with those before the update."""
        for parameter in delta.parameters():
            if id(parameter) in self.before:
                parameter.data, self.before[id(parameter)] = self.before[id(parameter)], parameter.data

    def _add(self, tensor: Tensor, change: Tensor) -> None:
        weights.add_to_weight(tensor, change * self.config.ratio, self.carried.get(id(tensor)))

    def tensors(self) -> Mapping[str, Tensor]:
        moved = super().tensors()
        return dict(moved) | {f"{name}|carried": self.carried[id(t)] for name, t in moved.items() if id(t) in self.carried}


def _change(delta: Delta, W: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(ΔW [out, in], the bias's change) in float32 or wider."""
    return weights.float_view(delta.delta(W)), None if bias is None else delta.bias_delta(W, bias)


SCHEDULES: dict[str, type[MovingBase]] = {"relora": MergeAndReset, "plora": MergeAndReset, "delta_lora": Following}
