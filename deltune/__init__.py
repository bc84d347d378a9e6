"""Deltune: fine-tune language models by every method there is, without losing a run.

The public names are loaded when first touched, so `import deltune` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors; at run time the names come from __getattr__
    from deltune.adapters.attach import attach, detach, disabled, merge, switch  # noqa: F401
    from deltune.adapters.files import load_adapter, save_adapter  # noqa: F401
    from deltune.adapters.methods.lora import LoraConfig  # noqa: F401
    from deltune.adapters.named import method  # noqa: F401
    from deltune.commands.train import train  # noqa: F401
    from deltune.errors import DeltuneError  # noqa: F401
    from deltune.settings import Run  # noqa: F401
    from deltune.training.callbacks import Callback, Outcome  # noqa: F401

# public name -> module that holds it
_PUBLIC = {
    "Callback": "deltune.training.callbacks",
    "DeltuneError": "deltune.errors",
    "LoraConfig": "deltune.adapters.methods.lora",
    "Outcome": "deltune.training.callbacks",
    "Run": "deltune.settings",
    "attach": "deltune.adapters.attach",
    "detach": "deltune.adapters.attach",
    "disabled": "deltune.adapters.attach",
    "load_adapter": "deltune.adapters.files",
    "merge": "deltune.adapters.attach",
    "method": "deltune.adapters.named",
    "save_adapter": "deltune.adapters.files",
    "switch": "deltune.adapters.attach",
    "train": "deltune.commands.train",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'deltune' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
