"""Trainable tokens: a few rows of the embedding are trained, and of the output head where it holds the same weight.

Legend: the embedding stores a table [vocab, dim], which is Wᵀ; a linear layer stores W with a row for each output. n
rows are trained, `rows` [n, dim] as they are, so the file holds what the tokens have become and not a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters.bank import Bank
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.layers import Site
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"trainable_tokens": "TrainableTokensConfig"}

METHODS = {
    "trainable_tokens": {
        "choices": {"delta": "trainable_tokens"},
        "paper": "PEFT, TrainableTokens (no paper)",
        "example": {"token_indices": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]},
        "formula": "W[i, :] = vᵢ for the given tokens i, in the embedding and in a head tied to it",
        "small": {"token_indices": [1, 5, 3, 10]},
        "note": "Several at once add up their changes of a row; PEFT refuses rows that two adapters train.",
    },
}

LEAF = "trainable_tokens_delta"  # PEFT's name, although the rows are whole


@dataclass(frozen=True)
class TrainableTokensConfig(AdapterConfig):
    """Training a few tokens' embeddings."""

    delta: str = option("trainable_tokens", "Parametrisation of the change.", choices=("trainable_tokens",))
    targets: list[str] | str = option("input-embedding", "Modules to adapt: `input-embedding` (a head that holds the same weight follows it), module name endings, full names, or one regular expression over the full name.")
    token_indices: list[int] = option([], "Ids of the tokens whose rows are trained.")
    magnitude: bool = option(False, "Not for a method that changes single rows.", choices=(False,))

    @staticmethod
    def delta_class() -> type[Delta]:
        return TrainableTokens


def _from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"token_indices": fields.get("token_indices") or []}


class Rows(Bank):
    """The trained rows of one weight, whichever layers hold it."""

    def build(self) -> None:
        lead = next(site for site in self.sites if site.tied_to is None)
        size, width = _table(lead)
        indices = self.config.token_indices
        if not indices:
            raise AdapterError("token_indices is empty; give the ids of the tokens to train")
        wrong = [index for index in indices if not 0 <= index < size]
        if wrong:
            raise AdapterError(f"token_indices: {lead.name} has rows 0 to {size - 1}, and none for {', '.join(map(str, wrong[:5]))}")
        if len(set(indices)) < len(indices):
            twice = next(index for index in indices if indices.count(index) > 1)
            raise AdapterError(f"token_indices: {twice} is given twice")
        self.rows = nn.Parameter(torch.empty(len(indices), width, **self.storage))

    def reset(self, generator: torch.Generator) -> None:
        """There is nothing to draw: the rows start as the base's."""

    @torch.no_grad()
    def start(self, weights: Mapping[str, Callable[[], Tensor]], generator: torch.Generator) -> None:
        lead = next(site for site in self.sites if site.tied_to is None)
        self.rows.copy_(_rows(weights[lead.name](), lead, self.config.token_indices))

    def leaves(self) -> dict[str, str]:
        return {"rows": f"model.{self.key}.{LEAF}"}


def _table(site: Site) -> tuple[int, int]:
    """Number and width of a weight's rows."""
    return (site.n_in, site.n_out) if site.kind == "embedding" else (site.n_out, site.n_in)


def _rows(W: Tensor, site: Site, indices: list[int]) -> Tensor:
    return W.T[indices] if site.kind == "embedding" else W[indices]


class TrainableTokens(Delta):
    """The change is the rows' difference from the base's, so that several adapters add up. Unchanged at its start."""

    kinds = ("embedding", "linear")
    takes_dropout = False
    widens = "ids have no type, and the gradients of a token that comes often add up in the stored one"
    follows_ties = True
    peft = PeftFormat(
        type="TRAINABLE_TOKENS",
        write=lambda config: {"token_indices": list(config.token_indices), "init_weights": True},
        read=_from_peft,
        fields=frozenset({"token_indices", "init_weights"}),  # the second: how they started, not what they are
        lacks=frozenset({"exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias"}),
        fits=lambda config: not config.modules_to_save,
    )

    @classmethod
    def banks(cls, config: AdapterConfig) -> dict[str, tuple[str, type[Bank]]]:
        return {"shared": ("tied", Rows)}

    def build(self) -> None:
        # an embedding does not train its padding token's row
        tokens = self.config.token_indices
        self.padding = tokens.index(self.site.padding_idx) if self.site.padding_idx in tokens else None
        # the base's rows, as they are; read at every start and load
        self.register_buffer("base_rows", torch.empty_like(self.shared.rows), persistent=False)
        # an embedding's id -> which of the rows; n, past the last, for those that stay
        places = torch.empty(self.site.n_in if self.site.kind == "embedding" else 0, dtype=torch.int32, device=self.site.device)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("indices", torch.empty(len(tokens), dtype=torch.int64, device=self.site.device), persistent=False)

    def reset(self, generator: torch.Generator) -> None:
        """The rows start with their bank."""

    @torch.no_grad()
    def ready(self, W: Tensor) -> None:
        self.base_rows.copy_(_rows(W, self.site, self.config.token_indices))
        self.indices.copy_(torch.tensor(self.config.token_indices))
        if self.site.kind == "embedding":
            self.places.fill_(len(self.indices))
            self.places[self.indices] = torch.arange(len(self.indices), dtype=torch.int32, device=self.places.device)

    def changes(self) -> Tensor:
        """What the rows have become less what they were [n, dim]."""
        return self.shared.rows - self.base_rows

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        if len(self.indices) > self.changes().shape[1]:
            return None  # of more rows than the table is wide a product costs more than the change itself
        chosen = self.base_rows.new_zeros(len(self.indices), _table(self.site)[0])  # [n, vocab]
        chosen.scatter_(1, self.indices.unsqueeze(1), 1)
        return (self.changes().T, chosen, 1.0) if self.site.kind == "embedding" else (chosen.T, self.changes(), 1.0)

    def delta(self, W: Tensor | None) -> Tensor:
        changes = self.changes()
        whole = changes.new_zeros(_table(self.site)).index_copy(0, self.indices, changes)
        return whole.T if self.site.kind == "embedding" else whole

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        changes = self.changes()
        if self.site.kind == "embedding":
            rows = F.pad(changes, (0, 0, 0, 1))  # past the last a row of zeros, for tokens that stay as they are
            return F.embedding(self.places[x], rows, self.padding)
        some = F.linear(x, changes.to(x.dtype))  # [..., n]
        return some.new_zeros(*some.shape[:-1], self.site.n_out).index_copy(-1, self.indices, some)

    def to_file(self) -> dict[str, Tensor]:
        # PEFT writes the rows once more for each layer that is tied, and misses them where they are not
        return {} if self.site.tied_to is None else {LEAF: self.shared.rows.detach()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        if LEAF in tensors and not torch.equal(tensors[LEAF].to(self.shared.rows), self.shared.rows):
            raise AdapterError(f"{self.site.name}: its rows differ from those of {self.site.tied_to}, and this model has one weight for both")
