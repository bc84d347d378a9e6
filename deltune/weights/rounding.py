"""How a weight is rounded to codes, told without the weight: for what is worked out from values that such codes would lose."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from deltune.weights.quantised import QuantisedTensor, dequantised, quantise


class Rounding(NamedTuple):
    kind: str = "nf4"
    block_size: int = 64
    double: bool = False

    def round_trip(self, values: Tensor) -> Tensor:
        """Values [out, in] as they come back, in their own type."""
        return dequantised(quantise(values, self.kind, block_size=self.block_size, double=self.double))


def rounding_of(tensor: Tensor) -> Rounding | None:
    """That of a quantised weight; None of a plain one."""
    return Rounding(tensor.kind, tensor.block_size, tensor.nested) if isinstance(tensor, QuantisedTensor) else None
