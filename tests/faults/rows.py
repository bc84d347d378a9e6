"""A data set of random rows: what the loader asks of one, and no file."""

from __future__ import annotations

import numpy as np

from deltune.data.dataset import Example


class RandomRows:
    """Rows of 4 to 23 tokens below 256; the first third of each is not trained."""

    def __init__(self, count: int = 37, seed: int = 0):
        random = np.random.default_rng(seed)
        self.fingerprint = f"random rows {count} {seed}"
        self.rows = []
        for number in range(1, count + 1):
            ids = random.integers(0, 256, size=random.integers(4, 24)).astype(np.int32)
            labels = np.where(np.arange(len(ids)) < len(ids) // 3, -100, ids).astype(np.int32)
            self.rows.append(Example(ids, labels, f"rows.jsonl:{number}"))
        self.lengths = np.array([len(row.ids) for row in self.rows], np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[index]
