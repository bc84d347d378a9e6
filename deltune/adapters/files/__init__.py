"""Adapter files in PEFT's format: `save_adapter` and `load_adapter`."""

from deltune.adapters.files.load import load_adapter
from deltune.adapters.files.save import save_adapter

__all__ = ["load_adapter", "save_adapter"]
