"""Rows of random bytes and a loop over them, for tests of training that need no files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from deltune.data.loader import Loader
from deltune.data.pack import Batch, pad
from deltune.engines.config import Single
from deltune.engines.engine import Engine
from deltune.optim.build import build_optimizer
from deltune.optim.config import OPTIMIZERS
from deltune.optim.groups import parameter_groups
from deltune.training.callbacks import RunInfo
from deltune.training.checkpoints import CheckpointStore
from deltune.training.config import CheckpointConfig, EvalConfig, TrainConfig
from deltune.training.loop import Loop
from deltune.training.loss import causal_lm_step
from deltune.training.state import Saver

PAD = 258


class Rows:
    """A data set of `count` rows of unequal length; the first third of each is not trained."""

    fingerprint = "synthetic"

    def __init__(self, count: int = 37, seed: int = 0):
        from deltune.data.dataset import Example

        random = np.random.default_rng(seed)
        self.examples = []
        for _ in range(count):
            ids = random.integers(0, 256, size=random.integers(4, 24)).astype(np.int32)
            labels = ids.copy()
            labels[: len(ids) // 3] = -100
            self.examples.append((ids.tolist(), labels.tolist()))
        self._items = [
            Example(np.array(ids, np.int32), np.array(labels, np.int32), f"rows.jsonl:{i + 1}")
            for i, (ids, labels) in enumerate(self.examples)
        ]
        self.lengths = np.array([len(ids) for ids, _ in self.examples], np.int32)
        self.num_trained = np.array([sum(x != -100 for x in labels) for _, labels in self.examples], np.int32)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int):
        return self._items[index]

    def batch(self, indices):
        return pad([self[i] for i in indices], PAD)


def batch_of(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> Batch:
    """A padded batch of these tensors, each [batch, seq]."""
    trained = int((labels[:, 1:] != -100).sum()) if labels.device.type != "meta" else 0
    num_tokens = int(mask.sum()) if mask.device.type != "meta" else mask.numel()
    return Batch(ids, labels, mask, [f"rows.jsonl:{i + 1}" for i in range(len(ids))], num_tokens, trained)


def make_loop(
    model: torch.nn.Module, *, steps: int, micro_batch: int = 4, accumulate: int = 1, folder: Path | None = None,
    every: int | None = None, nonfinite: str = "stop", max_nonfinite: int = 10, precision: str = "fp32",
    schedule=lambda step: 1.0, callbacks=(), eval: EvalConfig | None = None, evaluate=None, max_grad_norm=1.0,
    forward_step=causal_lm_step, rows: Rows | None = None, engine: Engine | None = None, shuffle: bool = False,
    lr: float = 1e-3, limit: int = 3, batching: str = "padded", micro_batch_tokens: int | None = None,
    optim: str = "adamw",
) -> Loop:
    """A Loop over synthetic rows, at a constant rate."""
    rows = rows or Rows()
    engine = engine or Engine(Single(device="cpu", precision=precision))
    config = OPTIMIZERS.resolve(optim)(name=optim, lr=lr)
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), config), config)
    loader = Loader(
        rows, micro_batch=micro_batch, accumulate=accumulate, rank=engine.rank, world_size=engine.world_size,
        seed=0, shuffle=shuffle, pad_id=PAD, num_examples=None, batching=batching, micro_batch_tokens=micro_batch_tokens,
    )
    saver = None if folder is None else Saver(CheckpointStore(folder / "checkpoints", limit))
    count = sum(p.numel() for p in model.parameters())
    return Loop(
        model, loader=loader, optimizer=optimizer, schedule=schedule, engine=engine,
        info=RunInfo(folder or Path("."), "test", steps, 0, count, count, {}),
        train=TrainConfig(steps=steps, micro_batch=micro_batch, accumulate=accumulate, nonfinite=nonfinite, max_nonfinite=max_nonfinite),
        eval=eval or EvalConfig(), checkpoint=CheckpointConfig(every=every, save_total_limit=limit),
        max_grad_norm=max_grad_norm, saver=saver, evaluate=evaluate, callbacks=callbacks, forward_step=forward_step,
    )
