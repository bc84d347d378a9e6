"""The log-probability of texts after prompts: what several rows begin with is computed once, and nothing is approximated.

All rows form a tree of token sequences. A stretch that several of them share (exemplars, a passage, a question before
its choices) is a node of its own, run once; what comes after it goes on from its keys and values. Nodes whose beginnings
are equally long are run together, padded on the right only, so that no token ever sees padding: the numbers are those of
each row by itself, for every model that keeps keys and values, and every batch.

Shapes: ids [rows, longest]; keys and values [rows, heads, positions, head].
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from deltune.models.generation import inference, undisturbed_random
from deltune.models.head import Head, scores

if TYPE_CHECKING:
    from transformers import DynamicCache

# Tokens that a forward pass of its own must save, of those that are computed several times or of padding: a pass costs so
# much by itself, on a device that is waited for much more.
WORTH, WORTH_ON_DEVICE = 64, 1024
NUM_PROBED = 24  # tokens


@dataclass(frozen=True)
class Request:
    """Texts that may follow a prompt. Neither the prompt nor any of them is empty."""

    prompt: Sequence[int]
    options: Sequence[Sequence[int]]


@dataclass
class Work:
    """What was computed, in tokens without padding; `asked` is what each option by itself would have taken."""

    asked: int = 0
    computed: int = 0


@dataclass
class Node:
    """Tokens [start, stop) of the rows that share them. `wanted` are (position, token that follows it, slot of the sum)."""

    ids: np.ndarray  # a row that goes through it, whole
    start: int
    stop: int
    parent: Node | None
    wanted: list[tuple[int, int, int]]
    children: list[Node] = field(default_factory=list)
    cache: Any = None  # keys and values up to `stop`, of one row, while children wait for them

    @property
    def length(self) -> int:
        return self.stop - self.start


def score(
    model: nn.Module, requests: Sequence[Request], *, head: Head | None = None, batch: int = 8, share: bool | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext, work: Work | None = None,
    greedy: list[list[bool]] | None = None,
) -> list[list[float]]:  # fmt: skip
    """Σ log p(token) of each option after its prompt, in nats.

    `batch` bounds memory: a forward pass holds no more than so many rows of the longest prompt would. `share` is found out
    if it is None (`shares`). `work` is added to; `greedy` gets whether each option's tokens are the most probable ones
    throughout. Modes and random state are as before afterwards.
    """
    rows, slots = _rows(requests)
    sums = np.zeros(sum(len(request.options) for request in requests))
    missed = np.zeros(len(sums), dtype=np.int64)
    if work is not None:
        work.asked += sum(len(request.prompt) + len(option) - 1 for request in requests for option in request.options)
    with inference(model), undisturbed_random(model), autocast():
        if share is None:
            share = shares(model)
        tree = _tree(rows, slots, worth(model) if share else None)
        budget = batch * max((len(row) for row in rows), default=0)
        _Runner(model, head, budget, sums, missed, work or Work()).run(tree)
    if greedy is not None:
        found = iter((missed == 0).tolist())
        greedy += [list(itertools.islice(found, len(request.options))) for request in requests]
    values = iter(sums.tolist())
    return [list(itertools.islice(values, len(request.options))) for request in requests]


def worth(model: nn.Module) -> int:
    return WORTH if next(model.parameters()).device.type == "cpu" else WORTH_ON_DEVICE


def _rows(requests: Sequence[Request]) -> tuple[list[np.ndarray], list[list[tuple[int, int, int]]]]:
    """(rows in lexicographic order, what is wanted of each): prompt and option but for its last token. Letters of one
    question are one row."""
    found: dict[bytes, list[tuple[int, int, int]]] = {}
    slot = 0
    for request in requests:
        for option in request.options:
            if not len(request.prompt) or not len(option):
                raise ValueError("a prompt and each of its options must have a token")
            whole = np.array([*request.prompt, *option], dtype=np.int64)
            first = len(request.prompt)
            wanted = [(position - 1, int(whole[position]), slot) for position in range(first, len(whole))]
            # big-endian bytes sort as the numbers do, element by element
            found.setdefault(whole[:-1].astype(">i8").tobytes(), []).extend(wanted)
            slot += 1
    ordered = sorted(found)
    return [np.frombuffer(key, dtype=">i8").astype(np.int64) for key in ordered], [found[key] for key in ordered]


# -- the tree ---------------------------------------------------------------------------------------------------


def _tree(rows: list[np.ndarray], wanted: list[list[tuple[int, int, int]]], worth: int | None) -> list[Node]:
    """The top nodes of sorted, distinct rows; without `worth` each row is one node."""
    if worth is None:
        return [Node(row, 0, len(row), None, list(wants)) for row, wants in zip(rows, wanted, strict=True)]
    common = [_common(one, next_one) for one, next_one in itertools.pairwise(rows)]

    def grow(low: int, high: int, parent: Node | None, at: int) -> list[Node]:
        """Nodes of rows [low, high), which go on from `parent` and share `at` tokens."""
        start = 0 if parent is None else parent.stop
        nodes: list[Node] = []
        borders = [low, *(i + 1 for i in range(low, high - 1) if common[i] <= at), high]
        for first, last in itertools.pairwise(borders):
            alone = last - first == 1
            stop = len(rows[first]) if alone else min(common[first : last - 1])
            if not alone and (last - first - 1) * (stop - start) < worth:
                nodes += grow(first, last, parent, stop)
                continue
            here = [want for i in range(first, last) for want in wanted[i] if start <= want[0] < stop]
            node = Node(rows[first], start, stop, parent, here)
            if not alone:
                ends = len(rows[first]) == stop  # a row that the others only continue
                node.children = grow(first + ends, last, node, stop)
            nodes.append(node)
        return nodes

    return grow(0, len(rows), None, 0) if rows else []


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that both begin with."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


# -- the forward passes -----------------------------------------------------------------------------------------


class _Runner:
    def __init__(self, model: nn.Module, head: Head | None, budget: int, sums: np.ndarray, missed: np.ndarray, work: Work):
        self.model, self.head, self.budget, self.sums, self.missed, self.work = model, head, budget, sums, missed, work
        self.device, self.worth = next(model.parameters()).device, worth(model)
        self.windows = any(layer.is_sliding for layer in new_cache(model).layers)

    def run(self, nodes: Sequence[Node]) -> None:
        """These nodes and all below them; what hangs on a batch is done before the next one, so that few caches are alive."""
        for chosen in self.batches(nodes):
            self.forward(chosen)
            self.run([child for node in chosen for child in node.children])
            for node in chosen:
                node.cache = None

    def batches(self, nodes: Sequence[Node]) -> Iterator[list[Node]]:
        """Nodes with equally long beginnings and of like length, the longest first, since they need the most memory. Padding
        adds up to less than a forward pass costs."""
        chosen: list[Node] = []
        padding = 0
        for node in sorted(nodes, key=lambda node: (node.start, node.stop), reverse=True):
            padding += chosen[0].stop - node.stop if chosen else 0
            if chosen and (padding > self.worth or not self.fits(node, chosen)):
                yield chosen
                chosen, padding = [], 0
            chosen.append(node)
        if chosen:
            yield chosen

    def fits(self, node: Node, chosen: list[Node]) -> bool:
        first = chosen[0]
        if node.start != first.start or (len(chosen) + 1) * first.stop > self.budget:
            return False
        # what is kept of a padded row within a window is not what the row alone would have kept
        return not self.windows or node.stop == first.stop or not any(one.children for one in (*chosen, node))

    def forward(self, nodes: list[Node]) -> None:
        start, longest = nodes[0].start, max(node.length for node in nodes)
        ids = torch.zeros(len(nodes), longest, dtype=torch.long)
        for row, node in enumerate(nodes):
            ids[row, : node.length] = torch.from_numpy(node.ids[node.start : node.stop])
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        cache = None
        if start or any(node.children for node in nodes):
            cache = joined([node.parent.cache for node in nodes if node.parent]) if start else new_cache(self.model)
            inputs |= {"past_key_values": cache, "use_cache": True}
        wanted = [(row * longest + position - start, token, slot) for row, node in enumerate(nodes) for position, token, slot in node.wanted]
        places, targets = (torch.tensor([want[i] for want in wanted], dtype=torch.long, device=self.device) for i in (0, 1))
        losses, hits = scores(self.model, self.head, inputs, places, targets)
        slots = [slot for _, _, slot in wanted]
        np.subtract.at(self.sums, slots, losses.double().cpu().numpy())
        np.add.at(self.missed, slots, (~hits).cpu().numpy())
        for row, node in enumerate(nodes):
            if node.children:
                node.cache = row_of(cache, row, longest - node.length)
        self.work.computed += sum(node.length for node in nodes)


# -- keys and values --------------------------------------------------------------------------------------------


def new_cache(model: nn.Module) -> DynamicCache:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def row_of(cache: DynamicCache, row: int, padding: int) -> DynamicCache:
    """The cache of one row without the `padding` at its end. A view: what it was cut from is not written to again."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor[row : row + 1, :, : tensor.shape[2] - padding]

    return _with_layers(cache, [_with_states(layer, cut(layer.keys), cut(layer.values)) if _is_filled(layer) else layer for layer in cache.layers])


def joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The caches of equally long rows as one, which may grow without touching them."""
    first, same = caches[0], all(cache is caches[0] for cache in caches)

    def stacked(index: int, name: str) -> Tensor:
        tensor = getattr(first.layers[index], name)
        if same:
            return tensor.expand(len(caches), -1, -1, -1)
        return torch.cat([getattr(cache.layers[index], name) for cache in caches])

    layers = [
        _with_states(layer, stacked(i, "keys"), stacked(i, "values")) if _is_filled(layer) else copy.copy(layer)
        for i, layer in enumerate(first.layers)
    ]
    return _with_layers(first, layers)


def _is_filled(layer: Any) -> bool:
    return layer.is_initialized and layer.keys is not None


def _with_states(layer: Any, keys: Tensor, values: Tensor) -> Any:
    other = copy.copy(layer)
    other.keys, other.values = keys, values
    return other


def _with_layers(cache: DynamicCache, layers: list[Any]) -> DynamicCache:
    other = copy.copy(cache)
    other.layers = layers
    return other


# -- whether a model can ----------------------------------------------------------------------------------------


def shares(model: nn.Module) -> bool:
    """Whether rows of this model can go on from another forward pass's keys and values: told by the kind of its cache,
    and held to numbers on a few tokens."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in new_cache(model).layers):
        return False
    with inference(model), undisturbed_random(model):
        device = next(model.parameters()).device
        vocab = model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(2 * NUM_PROBED, device=device).reshape(2, -1) * 7 + 1) % vocab
        ids[1, : NUM_PROBED // 2] = ids[0, : NUM_PROBED // 2]
        whole = model(input_ids=ids, use_cache=False).logits
        cache = new_cache(model)
        model(input_ids=ids[:1, : NUM_PROBED // 2], past_key_values=cache, use_cache=True)
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            return False
        rest = model(input_ids=ids[:, NUM_PROBED // 2 :], past_key_values=joined([row_of(cache, 0, 0)] * 2), use_cache=True).logits
    # a mask or a position that is off shows in the first digits, other orders of summation only in the last ones
    kinds = [model.dtype, whole.dtype, *([torch.get_autocast_dtype(device.type)] if torch.is_autocast_enabled(device.type) else [])]
    limit = max(torch.finfo(kind).eps for kind in kinds) ** 0.5 * float(whole.abs().max())
    return bool((whole[:, NUM_PROBED // 2 :].float() - rest.float()).abs().max() <= limit)
