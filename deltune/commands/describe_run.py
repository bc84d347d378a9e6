"""What a run's record says of its surroundings: versions, device, model and data. Facts only, all plain values."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def description(run: Any, engine: Any, data: Any, model: Any, batching: Any) -> dict[str, Any]:
    """The `description` of RunInfo; docs/runs.md lists its keys."""
    from deltune.models.kbit import told
    from deltune.models.load import model_identity

    quantised = list(told(model))
    return {
        "versions": versions(),
        "device": device(engine),
        "model": {
            **model_identity(run.model),
            "architecture": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "data": data.report.to_dict(),
        "batching": str(batching),
        **({"quantised": quantised} if quantised else {}),
        **({} if run.adapter is None or run.result == "model" else {"adapter": adapter(run, model)}),
    }


def adapter(run: Any, model: Any) -> dict[str, Any]:
    """The method by its name, the library that reads its file, whether it can be merged, and where tokens were added the
    rows that its base has with them."""
    from deltune.adapters.attach import adapters
    from deltune.adapters.config import name_of
    from deltune.adapters.files.peft import OWN, form_for

    config = adapters(model)["default"]  # with the rows of new tokens
    library = "deltune" if form_for(config).type.startswith(OWN) else "peft"
    rows = {"rows": model.config.get_text_config().vocab_size} if run.model.has_new_rows else {}
    return {"method": name_of(run.adapter), "library": library, "merges": not config.delta_class().no_matrix(config)} | rows


def versions() -> dict[str, str]:
    from deltune import __version__

    found = {"deltune": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def device(engine: Any) -> dict[str, Any]:
    import torch

    if engine.device.type == "cuda":
        name = torch.cuda.get_device_name(engine.device)
    else:
        name = f"{engine.device.type} ({platform.machine()}, {os.cpu_count()} cores)"
    return {
        "name": name,
        "processes": engine.world_size,
        "threads": torch.get_num_threads(),
        "precision": engine.precision,
        "system": platform.system(),
    }
