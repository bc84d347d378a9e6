"""One rank of a small run over synthetic rows, for tests that start several: writes its records as JSON.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python -m tests.ranks OUT '{"steps": 5, ...}'
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from deltune.engines.build import build
from deltune.engines.config import DDP, Single
from deltune.training.callbacks import Callback
from tests.synthetic import Rows, make_loop
from tests.tiny import tiny_model


class Curve(Callback):
    def __init__(self):
        self.records = []

    def on_step(self, record):
        self.records.append([record.step, record.loss, record.grad_norm, record.num_trained_tokens])


def main(out: str, settings: dict) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    engine = build(DDP(device="cpu", bucket_mb=0.02, timeout_seconds=60) if world > 1 else Single(device="cpu"))
    rows, die_at = Rows(settings.pop("rows", 37)), settings.pop("die_at", None)
    curve = Curve()
    folder = settings.pop("folder", None)
    model = engine.place(tiny_model(seed=engine.rank))  # rank 1 starts elsewhere and must be set right
    loop = make_loop(model, engine=engine, rows=rows, callbacks=[curve], folder=Path(folder) if folder else None, **settings)
    loop.resume()
    if die_at is not None and engine.rank == 1:
        inner = loop.forward_step

        def forward(model, batch):
            if loop.progress.step + 1 == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(model, batch)

        loop.forward_step = forward
    loop.run()
    written = sorted(p.name for p in Path(folder, "checkpoints").iterdir()) if folder else []
    total = sum(p.double().sum().item() for p in model.parameters())
    Path(f"{out}.{engine.rank}").write_text(json.dumps({"records": curve.records, "weights": total, "written": written}))
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
