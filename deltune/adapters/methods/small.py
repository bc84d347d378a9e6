"""Methods that train a vector a layer, and no matrix: biases, scales and shifts, and the tensors of norms.

Legend: W is [out, in], b is the layer's own bias [out]; a norm's W is its scales [out, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltune.adapters import draw
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Base, Delta, PeftFormat
from deltune.adapters.magnitude import Stretched
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"bitfit": "BitFitConfig", "beft": "BeftConfig", "ln_tuning": "LnTuningConfig", "ssf": "SsfConfig"}

METHODS = {
    "bitfit": {
        "choices": {"delta": "bitfit"},
        "paper": "arXiv:2106.10199",
        "example": {"targets": "all-layers", "add": True},
        "formula": "b' = b + Δb",
        "note": "Every bias that the model has, of linear layers and norms. Of Llama's layers none has one; add=true gives one to each target, and the adapter then cannot be merged.",
    },
    "beft": {
        "choices": {"delta": "beft"},
        "paper": "arXiv:2509.15974",
        "formula": "y' = y + b, for layers with and without a bias of their own",
        "note": "PEFT's default targets are the value projections (`targets=[v_proj]`). It can be merged only into layers that have a bias.",
    },
    "ln_tuning": {
        "choices": {"delta": "ln_tuning"},
        "paper": "arXiv:2312.11420",
        "formula": "the norm's own weight and bias, trained",
        "note": "Several at once add up their changes; PEFT runs one at a time.",
    },
    "ssf": {
        "choices": {"delta": "ssf"},
        "paper": "arXiv:2210.08823",
        "formula": "y' = γ ⊙ y + β after each linear layer and norm",
        "note": "Starts at γ = 1, β = 0, which changes nothing; init=normal is the authors' start, N(1, 0.02) and N(0, 0.02). With shift=false it can also be merged into layers without a bias.",
    },
}


@dataclass(frozen=True)
class VectorConfig(AdapterConfig):
    """What methods without a matrix of their own have."""

    magnitude: bool = option(False, "Not for a method that changes no matrix.", choices=(False,))


@dataclass(frozen=True)
class BitFitConfig(VectorConfig):
    """Training the biases alone (arXiv:2106.10199)."""

    delta: str = option("bitfit", "Parametrisation of the change.", choices=("bitfit",))
    targets: list[str] | str = option("all-biases", "Modules to adapt: `all-biases` (every linear layer and norm that has a bias, but the output head), `all-norms`, `all-layers` (linear layers and norms), `all-linear`, module name endings, full names, or one regular expression over the full name.")
    add: bool = option(False, "Whether a target without a bias gets one.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return BitFit


@dataclass(frozen=True)
class BeftConfig(VectorConfig):
    """A bias more on each target (arXiv:2509.15974)."""

    delta: str = option("beft", "Parametrisation of the change.", choices=("beft",))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Beft


@dataclass(frozen=True)
class LnTuningConfig(VectorConfig):
    """Training the norms alone (arXiv:2312.11420)."""

    delta: str = option("ln_tuning", "Parametrisation of the change.", choices=("ln_tuning",))
    targets: list[str] | str = option("all-norms", "Modules to adapt: `all-norms` (every LayerNorm, RMSNorm and the like), module name endings, full names, or one regular expression over the full name.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return LnTuning


@dataclass(frozen=True)
class SsfConfig(VectorConfig):
    """Scales and shifts of what layers put out (arXiv:2210.08823)."""

    delta: str = option("ssf", "Parametrisation of the change.", choices=("ssf",))
    targets: list[str] | str = option("all-layers", "Modules to adapt: `all-layers` (every linear layer and norm but the output head), `all-linear`, `all-norms`, module name endings, full names, or one regular expression over the full name.")
    init: str = option("identity", "Start: identity: γ = 1 and β = 0, which changes nothing; normal: around these with deviation 0.02, as the authors have it.", choices=("identity", "normal"))
    shift: bool = option(True, "Whether β is trained beside γ.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return Ssf


# Of the fields that PEFT's configs share, those that these methods' do not have
LACKS = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern", "bias"})


class AddedBias(Delta):
    """y' = y + Δb. Unchanged at its start."""

    takes_dropout = False

    def build(self) -> None:
        self.bias = nn.Parameter(torch.empty(self.site.n_out, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.bias.zero_()

    @property
    def adds_bias(self) -> bool:
        return True

    def product(self) -> tuple[Tensor, Tensor, float]:
        """Nothing of W changes: factors of rank 0."""
        return self.bias.new_empty(self.site.n_out, 0), self.bias.new_empty(0, self.site.n_in), 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        return self.bias

    def bias_delta(self, W: Tensor | None, bias: Tensor | None) -> Tensor:
        return self.bias


class BitFit(AddedBias):
    kinds = ("linear", "conv1d", "norm")

    def build(self) -> None:
        if not self.site.has_bias and not self.config.add:
            raise AdapterError(
                f"{self.site.name} has no bias to train. add=true gives it one; without it, name targets that have a bias, or `all-biases`"
            )
        super().build()


class Beft(AddedBias):
    peft = PeftFormat(
        type="BEFT",
        write=lambda config: {"init_weights": True},
        read=lambda fields: {},
        fields=frozenset({"init_weights"}),  # how the bias started, not what it is
        lacks=LACKS,
    )

    def to_file(self) -> dict[str, Tensor]:
        return {"beft_bias": self.bias.detach().unsqueeze(0)}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.bias.copy_(tensors["beft_bias"].squeeze(0))

    def leaves(self) -> dict[str, str]:
        return {"bias": "beft_bias"}


class LnTuning(Delta):
    """The norm's own tensors, trained. They are kept whole, as PEFT's files have them; the change is their difference
    from the base's, so that several adapters add up."""

    kinds = ("norm",)
    takes_dropout = False
    additive = False
    peft = PeftFormat(
        type="LN_TUNING", write=lambda config: {}, read=lambda fields: {}, fields=frozenset(),
        lacks=LACKS - {"exclude_modules"},
    )

    def build(self) -> None:
        for name in ("weight", "bias") if self.site.has_bias else ("weight",):
            setattr(self, name, nn.Parameter(torch.empty(self.site.n_out, **self.storage)))
            # the base's, as it is; read at every start and load
            self.register_buffer(f"base_{name}", torch.empty(self.site.n_out, **self.storage), persistent=False)

    def reset(self, generator: torch.Generator) -> None:
        """There is nothing to draw: it starts from the base's tensors."""

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        self.weight.copy_(W.squeeze(1))

    @torch.no_grad()
    def start_bias(self, b: Tensor) -> None:
        self.bias.copy_(b)

    @torch.no_grad()
    def ready(self, W: Tensor) -> None:
        self.base_weight.copy_(W.squeeze(1))

    @torch.no_grad()
    def ready_bias(self, b: Tensor) -> None:
        self.base_bias.copy_(b)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        W, b = base.weight(), base.bias()
        return base.called_with(x, W + self.delta(W), None if b is None else b + self.bias_delta(W, b))

    def delta(self, W: Tensor | None) -> Tensor:
        return (self.weight - self.base_weight).unsqueeze(1)

    def bias_delta(self, W: Tensor | None, bias: Tensor | None) -> Tensor | None:
        return self.bias - self.base_bias if self.site.has_bias else None

    def leaves(self) -> dict[str, str]:
        return {name: f"ln_tuning_layers.{name}" for name in self.state_dict()}


class Ssf(Delta):
    """y' = γ ⊙ y + β: W' = diag(γ) W and b' = γ ⊙ b + β."""

    kinds = ("linear", "conv1d", "norm")
    takes_dropout = False
    additive = False

    def build(self) -> None:
        self.scale = nn.Parameter(torch.empty(self.site.n_out, **self.storage))
        if self.config.shift:
            self.shift = nn.Parameter(torch.empty(self.site.n_out, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        std = 0.02 if self.config.init == "normal" else 0.0
        self.scale.copy_(1 + draw.normal(self.scale.shape, std, generator))
        if self.config.shift:
            self.shift.copy_(draw.normal(self.shift.shape, std, generator))

    @property
    def adds_bias(self) -> bool:
        return self.config.shift

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = Stretched.apply(base(x), self.scale - 1, None)
        return y.add_(self.shift.to(y.dtype)) if self.config.shift else y

    def delta(self, W: Tensor) -> Tensor:
        return (self.scale - 1).unsqueeze(1) * W

    def bias_delta(self, W: Tensor | None, bias: Tensor | None) -> Tensor | None:
        scaled = None if bias is None else (self.scale - 1) * bias
        if not self.config.shift:
            return scaled
        return self.shift if scaled is None else scaled + self.shift
