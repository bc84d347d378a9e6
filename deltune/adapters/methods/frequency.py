"""Changes that are sparse in another basis: FourierFT in frequencies, WaveFT in wavelets.

Legend: W is [out, in]; n coefficients c [n] are trained, at places of an [out, in] matrix E that a seed draws, the same
for all layers of one size; x is [..., in]. Neither multiplies x with a dense ΔW: FourierFT transforms x itself, and a
wavelet's coefficient touches a patch of W as wide as its filter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import draw
from deltune.adapters.bank import Bank
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Base, Delta, PeftFormat
from deltune.adapters.entries import Entries, permuted
from deltune.adapters.layers import Site
from deltune.adapters.ranked import pattern_matches, value_for
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"fourierft": "FourierConfig", "waveft": "WaveConfig"}

METHODS = {
    "fourierft": {
        "choices": {"delta": "fourierft"},
        "paper": "arXiv:2405.03003",
        "formula": "ΔW = s·Re(ifft2(E)), E zero but for c at n random frequencies",
        "start": 1.25,
        "small": {"n_frequency": 20, "scaling": 10.0},
        "note": "Starts as its authors have it, c normal, so it is no identity; init=zero is one. Authors: scaling 300 for Llama. A step is bound by two Fourier transforms in float32, each of half of W's entries, which count for less the more tokens it has.",
    },
    "waveft": {
        "choices": {"delta": "waveft"},
        "paper": "arXiv:2505.12532",
        "formula": "ΔW = s·IDWT2(E), E zero but for c at n random places",
        "small": {"n_frequency": 30, "scaling": 2.0},
        "note": "Daubechies' wavelets db1 to db10; PEFT also lists symlets and coiflets, which are refused by name.",
    },
}

WAVELETS = ("db1", "db2", "db3", "db4", "db5", "db6", "db7", "db8", "db9", "db10")


@dataclass(frozen=True)
class FrequencyConfig(AdapterConfig):
    """What both have."""

    random_loc_seed: int = option(777, "Seed of the places; layers of one size have the same.")
    n_frequency_pattern: dict[str, int] = option({}, "Regular expression over the end of a module name to its own n_frequency; the first that matches counts.")


@dataclass(frozen=True)
class FourierConfig(FrequencyConfig):
    """Fine-tuning with a few Fourier coefficients (arXiv:2405.03003)."""

    delta: str = option("fourierft", "Parametrisation of the change.", choices=("fourierft",))
    n_frequency: int = option(1000, "Number of trained coefficients of each layer.", gt=0)
    scaling: float = option(150.0, "Strength of the change.")
    init: str = option("normal", "Start of the coefficients: normal: with deviation 1, which changes the function; zero: unchanged.", choices=("normal", "zero"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Fourier


@dataclass(frozen=True)
class WaveConfig(FrequencyConfig):
    """Fine-tuning with a few wavelet coefficients (arXiv:2505.12532)."""

    delta: str = option("waveft", "Parametrisation of the change.", choices=("waveft",))
    n_frequency: int = option(2592, "Number of trained coefficients of each layer.", gt=0)
    scaling: float = option(25.0, "Strength of the change.")
    wavelet: str = option("db1", "Daubechies' wavelet of 1 to 10 vanishing moments; db1 is Haar's.", choices=WAVELETS)
    idwt: bool = option(True, "Whether the coefficients are those of a wavelet transform; else they are entries of the change itself.")
    proportional: bool = option(False, "Share the coefficients of all layers out by their sizes; n_frequency is then the mean.")
    init: str = option("zero", "Start of the coefficients: zero: unchanged; normal: with deviation 0.01.", choices=("zero", "normal"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Wave

    def problems(self) -> list[str]:
        found = []
        if not self.idwt and self.wavelet != "db1":
            found.append("wavelet has no effect: idwt is false")
        if self.proportional and self.n_frequency_pattern:
            found.append("n_frequency_pattern has no effect: proportional shares the coefficients out")
        return found + super().problems()


class Frequency(Delta):
    """`coefficients` [n] at places that need not be saved: the seed and the layer's size tell them."""

    start_std: float  # of a normal start
    leaf: str

    @classmethod
    def check(cls, config: FrequencyConfig, names: Sequence[str]) -> None:
        for key in config.n_frequency_pattern:
            if not any(pattern_matches(key, name) for name in names):
                raise AdapterError(f"n_frequency_pattern: {key!r} matches none of the adapted modules, e.g. {names[0]}")

    def build(self) -> None:
        count, total = self.count(), self.site.n_out * self.site.n_in
        if not 1 <= count <= total:
            raise AdapterError(f"{self.site.name}: n_frequency is {count}, and this layer of {self.site.n_out}×{self.site.n_in} has 1 to {total}")
        self.coefficients = nn.Parameter(torch.empty(count, **self.storage))

    def count(self) -> int:
        return value_for(self.site.name, self.config.n_frequency_pattern, self.config.n_frequency)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.coefficients.copy_(draw.normal(self.coefficients.shape, self.start_std if self.config.init == "normal" else 0.0, generator))

    def leaves(self) -> dict[str, str]:
        return {"coefficients": self.leaf}


@dataclass(frozen=True)
class Parts:
    """What each coefficient adds to a matrix: its entry `targets[i]` has `weights[i]` of coefficient `sources[i]`."""

    entries: Entries
    sources: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, flat: Tensor, sources: Tensor, weights: Tensor, n_out: int, n_in: int, device: torch.device) -> Parts:
        """From flat places in an [out, in] matrix, where several parts can fall on one."""
        found, targets = flat.unique(return_inverse=True)
        return cls(Entries.at(found, n_out, n_in, device), sources.to(device), targets.to(device), weights.to(device))

    def values(self, coefficients: Tensor) -> Tensor:
        """The entries' values for these coefficients."""
        parts = coefficients.index_select(0, self.sources) * self.weights.to(coefficients.dtype)
        return parts.new_zeros(self.entries.places.shape[1]).index_add(0, self.targets, parts)


# ---------------------------------------------------------------- FourierFT


@functools.lru_cache(maxsize=64)
def folded(n_out: int, n_in: int, count: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where frequencies (p, q) stand in a matrix [in/2 + 1, out] by (q, −p): the cosine of (p, q) is that of (−p, −q), so q
    need not go beyond in/2. And how much of each: a transform of real rows counts what is between its ends twice."""
    with torch.inference_mode(False):
        places = permuted(n_out * n_in, count, seed)
        p, q = places // n_in, places % n_in
        beyond = 2 * q > n_in
        p, q = torch.where(beyond, p, -p % n_out), torch.where(beyond, n_in - q, q)
        shares = torch.where((q == 0) | (2 * q == n_in), 1.0, 0.5)
        return (q * n_out + p).to(device), shares.to(device)


class Cosines(torch.autograd.Function):
    """ΔW[a, b] = Σ_k c_k cos 2π(p_k a / out + q_k b / in) for c [n] at frequencies as `folded` gives them.

    ΔW is the same at (a, b) and (−a, −b), so the rows up to out/2 tell all of it. They are two transforms of real rows, over
    p and then over q, each of half a spectrum. The gradient goes the same way back.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, at: tuple[Tensor, Tensor], n_out: int, n_in: int, dtype: torch.dtype) -> Tensor:
        ctx.at, ctx.dtype = at, coefficients.dtype
        wide = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))  # there are no transforms in shorter types
        places, shares = at
        E = wide.new_zeros((n_in // 2 + 1) * n_out).index_add_(0, places, wide * shares.to(wide.dtype))
        rows = torch.fft.irfft(torch.fft.rfft(E.view(-1, n_out)).T, n=n_in, norm="forward")  # [out/2 + 1, in]
        change = wide.new_empty(n_out, n_in, dtype=dtype)
        upper, lower = change[: len(rows)], change[len(rows) :]
        upper.copy_(rows)
        mirrored = upper[1 : len(lower) + 1]
        lower[:, :1] = mirrored[:, :1].flip(0)
        lower[:, 1:] = mirrored[:, 1:].flip(0, 1)
        return change

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        n_out = len(gradient)
        upper, lower = gradient[: n_out // 2 + 1], gradient[n_out // 2 + 1 :]
        # twice what is on rows that mirror themselves, for the transform counts all others twice
        rows = upper.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        mirrored = rows[1 : len(lower) + 1]
        mirrored[:, :1] += lower[:, :1].flip(0)
        mirrored[:, 1:] += lower[:, 1:].flip(0, 1)
        rows[0] *= 2
        rows[len(lower) + 1 :] *= 2
        spectrum = torch.fft.irfft(torch.fft.rfft(rows).T, n=n_out, norm="forward")  # [in/2 + 1, out]
        return (spectrum.view(-1)[ctx.at[0]] / 2).to(ctx.dtype), None, None, None, None


class Fourier(Frequency):
    """ΔW[a, b] = s / (out·in) Σ_k c_k cos 2π(p_k a / out + q_k b / in)."""

    start_std = 1.0
    leaf = "fourierft_spectrum"
    peft = PeftFormat(
        type="FOURIERFT",
        write=lambda config: {
            "n_frequency": config.n_frequency,
            "scaling": config.scaling,
            "random_loc_seed": config.random_loc_seed,
            "n_frequency_pattern": dict(config.n_frequency_pattern),
            "init_weights": config.init == "zero",
            "fan_in_fan_out": False,
        },
        read=lambda fields: {
            "n_frequency": fields.get("n_frequency", 1000),
            "scaling": float(fields.get("scaling", 150.0)),
            "random_loc_seed": fields.get("random_loc_seed", 777),
            "n_frequency_pattern": fields.get("n_frequency_pattern") or {},
            "init": "zero" if fields.get("init_weights") else "normal",
        },
        fields=frozenset({"n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern", "init_weights", "fan_in_fan_out"}),
        fits=lambda config: not config.dropout,
    )

    def delta(self, W: Tensor | None) -> Tensor:
        wide = torch.promote_types(self.coefficients.dtype, torch.float32)
        return self.formed(wide, W)

    def formed(self, dtype: torch.dtype, W: Tensor | None) -> Tensor:
        n_out, n_in = self.site.n_out, self.site.n_in
        at = folded(n_out, n_in, len(self.coefficients), self.config.random_loc_seed, self.coefficients.device)
        return Cosines.apply(self.coefficients * (self.config.scaling / (n_out * n_in)), at, n_out, n_in, dtype)

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        return F.linear(x, self.formed(x.dtype, W))

    def forms_delta(self, x: Tensor) -> bool:
        return True


# ---------------------------------------------------------------- WaveFT


@functools.cache
def daubechies(moments: int) -> tuple[float, ...]:
    """The low-pass filter of a number of vanishing moments, of length twice that, with sum √2 and all zeros within the
    unit circle (Daubechies, Ten Lectures on Wavelets, section 6.1): (1 + z)^N times half the roots of Σ C(N−1+k, k) y^k."""
    series = [math.comb(moments - 1 + k, k) for k in range(moments)]
    roots: list[complex] = []
    if moments > 1:
        companion = torch.zeros(moments - 1, moments - 1, dtype=torch.float64, device="cpu")
        companion[1:, :-1] = torch.eye(moments - 2, dtype=torch.float64, device="cpu")
        companion[:, -1] = torch.tensor([-value / series[-1] for value in series[:-1]], dtype=torch.float64, device="cpu")
        for y in torch.linalg.eigvals(companion).tolist():
            # y = (2 − z − 1/z) / 4; z and 1/z go together
            middle = 1 - 2 * y
            far = (middle * middle - 1) ** 0.5
            roots.append(min(middle + far, middle - far, key=abs))
    taps = [1 + 0j]
    for root in [*roots, *[-1.0] * moments]:
        taps = [a - root * b for a, b in zip([*taps, 0], [0, *taps], strict=True)]
    total = sum(tap.real for tap in taps)
    return tuple(tap.real / total * math.sqrt(2) for tap in taps)


@functools.lru_cache(maxsize=64)
def patches(n_out: int, n_in: int, count: int, seed: int, wavelet: str | None, device: torch.device) -> Parts:
    """One step of the inverse transform, cut to [out, in].

    E stands in the middle of a matrix of four blocks, each of about half the rows and columns (low and high of each),
    that is larger than W by what a transform loses at the borders.
    """
    with torch.inference_mode(False):
        flat = permuted(n_out * n_in, count, seed)
        sources, weights = torch.arange(count, device="cpu"), torch.ones(count, dtype=torch.float64, device="cpu")
        if wavelet is not None:
            low = torch.tensor(daubechies(int(wavelet.removeprefix("db"))), dtype=torch.float64, device="cpu")
            length = len(low)
            signs = torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu").repeat(length // 2)
            filters = torch.stack([low, signs * low.flip(0)])
            row_high, row = _in_blocks(flat // n_in, n_out, length)
            column_high, column = _in_blocks(flat % n_in, n_in, length)
            steps = torch.arange(length, device="cpu") - (length - 2)
            rows, columns = 2 * row.unsqueeze(1) + steps, 2 * column.unsqueeze(1) + steps  # [n, length]
            # Block (high, low) holds what is low along rows and high along columns, as image transforms are laid out
            patch = filters[column_high].unsqueeze(2) * filters[row_high].unsqueeze(1)  # [n, length, length]
            rows, columns = rows.unsqueeze(2).expand_as(patch), columns.unsqueeze(1).expand_as(patch)
            inside = (rows >= 0) & (rows < n_out) & (columns >= 0) & (columns < n_in)
            sources = sources.view(-1, 1, 1).expand_as(patch)[inside]
            weights, flat = patch[inside], (rows * n_in + columns)[inside]
        return Parts.of(flat, sources, weights, n_out, n_in, device)


def _in_blocks(places: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
    """Along one side of E: whether a place is in the block of the high band (0 or 1), and its place there."""
    half = (size + length - 1) // 2
    within = places + (2 * half - size) // 2
    return within // half, within % half


class Shares(Bank):
    """No tensors: only what all layers' sizes are, to share coefficients out by."""

    def build(self) -> None:
        total = sum(site.n_out * site.n_in for site in self.sites)
        budget = self.config.n_frequency * len(self.sites)
        self.counts = {site.name: max(1, round(site.n_out * site.n_in / total * budget)) for site in self.sites}

    def reset(self, generator: torch.Generator) -> None:
        """There is nothing to fill."""


def _wave_to_peft(config: WaveConfig) -> dict[str, Any]:
    return {
        "n_frequency": config.n_frequency,
        "scaling": config.scaling,
        "wavelet_family": config.wavelet,
        "use_idwt": config.idwt,
        "random_loc_seed": config.random_loc_seed,
        "n_frequency_pattern": dict(config.n_frequency_pattern),
        "proportional_parameters": config.proportional,
        "init_weights": config.init == "zero",
        "fan_in_fan_out": False,
    }


def _wave_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    idwt, proportional = fields.get("use_idwt", True), bool(fields.get("proportional_parameters"))
    wavelet = fields.get("wavelet_family", "db1") if idwt else "db1"
    if wavelet not in WAVELETS:
        raise AdapterError(f"wavelet_family is {wavelet!r}; supported are {', '.join(WAVELETS)}")
    return {
        "n_frequency": fields.get("n_frequency", 2592),
        "scaling": float(fields.get("scaling", 25.0)),
        "wavelet": wavelet,
        "idwt": idwt,
        "random_loc_seed": fields.get("random_loc_seed", 777),
        "n_frequency_pattern": {} if proportional else fields.get("n_frequency_pattern") or {},
        "proportional": proportional,
        "init": "zero" if fields.get("init_weights", True) else "normal",
    }


class Wave(Frequency):
    """ΔW is the sum of a patch for each coefficient: c times the outer product of two filters. Unchanged at its start."""

    start_std = 0.01
    leaf = "waveft_spectrum"
    peft = PeftFormat(
        type="WAVEFT",
        write=_wave_to_peft,
        read=_wave_from_peft,
        fields=frozenset({
            "n_frequency", "scaling", "wavelet_family", "use_idwt", "random_loc_seed", "n_frequency_pattern",
            "proportional_parameters", "init_weights", "fan_in_fan_out",
        }),
        fits=lambda config: not config.dropout,
    )

    @classmethod
    def banks(cls, config: WaveConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"shares": ("model", Shares)} if config.proportional else {}

    def count(self) -> int:
        return self.shares.counts[self.site.name] if self.config.proportional else super().count()

    def values(self) -> tuple[Entries, Tensor]:
        site: Site = self.site
        wavelet = self.config.wavelet if self.config.idwt else None
        held = patches(site.n_out, site.n_in, len(self.coefficients), self.config.random_loc_seed, wavelet, self.coefficients.device)
        return held.entries, held.values(self.coefficients * self.config.scaling)

    def delta(self, W: Tensor | None) -> Tensor:
        entries, values = self.values()
        return entries.dense(values)

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        entries, values = self.values()
        return entries(x, values)

    def forms_delta(self, x: Tensor) -> bool:
        return self.values()[0].pays_with_weight(x)

    def in_one(self, x: Tensor, base: Base) -> Tensor:
        entries, values = self.values()
        return entries.plus(x, base.stored(), base.bias(), values)
