"""Deltune by its real path: `deltune.train(config, callbacks=[...])` with default settings; the callback paces the steps."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.work import LR, adapter_folder, read_shape

ADAPTERS = ("lora", "dora", "half")  # half: LoRA in the upper half of the layers


def settings(spec: dict[str, Any], output: str) -> dict[str, Any]:
    """The run's config; what is not the case's own choice is the program's default."""
    adapter: dict[str, Any] = {"method": "dora" if spec["adapter"] == "dora" else "lora", "rank": spec["rank"], "alpha": 2 * spec["rank"]}
    if spec["adapter"] == "half":
        layers = read_shape(Path(spec["folder"])).layers
        upper = "|".join(str(i) for i in range(layers // 2, layers))
        adapter["targets"] = rf"model\.layers\.({upper})\..*_proj"
    config: dict[str, Any] = {
        "name": "bench", "output": output, "seed": 0, "adapter": adapter,
        "model": {"path": spec["folder"], "dtype": spec["dtype"], "start": "random" if spec.get("drawn") else "pretrained"},
        "data": {
            "train": [str(Path(spec["rows"]) / "train.jsonl")], "format": "prompt_completion", "template": "plain",
            "shuffle": False, "max_length": spec["length"], "cache": None,
        },
        "optim": {"name": "adamw", "lr": LR, "weight_decay": 0.0, "max_grad_norm": 1.0},
        "schedule": {"name": "constant", "warmup": 0},
        "engine": {"device": spec.get("device", "cpu"), "threads": 1},
        "train": {"steps": 10_000, "micro_batch": spec["micro_batch"]},
        "log": {"progress": "off", "sinks": [], "report": False},
    }
    if spec["dtype"] == "float32":
        config["engine"]["precision"] = "fp32"
    for section, values in spec.get("config", {}).items():
        config[section] = {**config.get(section, {}), **values} if isinstance(values, dict) else values
    return config


def preload() -> None:
    """Import what a run has imported before its first step, and no more."""
    import torch  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import deltune
    from deltune.adapters import attach, fused, nodes  # noqa: F401
    from deltune.commands import (  # noqa: F401
        batching,
        describe_run,
        estimate,
        fast,
        new_tokens,
        open_model,
        recompute,
        survey,
    )
    from deltune.data import loader, prepare  # noqa: F401
    from deltune.engines import build, resident  # noqa: F401
    from deltune.models import dry_run, lean, load  # noqa: F401
    from deltune.settings import run_from
    from deltune.training import checkpoints, console, loop  # noqa: F401

    deltune.train  # noqa: B018, the name loads what it needs
    run_from({"adapter": {"method": "lora"}})  # every method's settings


def train(pacer: Any, spec: dict[str, Any], began: float) -> None:
    after_torch = time.process_time()
    import deltune
    from deltune.training.callbacks import Callback

    deltune.train  # noqa: B018, the name loads what it needs
    imported = time.process_time() - after_torch

    class Paced(Callback):
        def on_start(self, info):
            facts = {"flops_per_token": info.flops_per_token}
            pacer.ready(import_beyond_torch=imported, before_first_step=time.process_time() - began, **facts)

        def on_step(self, record):
            pacer.ended(record.loss, record.num_tokens)

    deltune.train(settings(spec, tempfile.mkdtemp()), callbacks=[Paced()])


def write_adapters(folder: str, rank: int, wanted: list[str]) -> None:
    """The starts that ours will draw, as PEFT's files for the peers, in float32."""
    from deltune.adapters.attach import attach
    from deltune.adapters.files import save_adapter
    from deltune.models.load import load
    from deltune.settings import run_from

    for kind in wanted:
        spec = {"folder": folder, "rank": rank, "adapter": kind, "dtype": "float32", "length": 16, "micro_batch": 1, "rows": folder}
        run = run_from(settings(spec, folder))
        model = attach(load(run.model, seed=run.seed), run.adapter, seed=run.seed)
        save_adapter(model, adapter_folder(Path(folder), kind, rank))


if __name__ == "__main__":
    write_adapters(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
