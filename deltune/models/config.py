"""The `model` section: which weights to start from and which of them may move. Light to import."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import option

ATTENTION = ("auto", "segment", "sdpa", "eager", "flash_attention_2", "flex_attention")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """A Hugging Face causal language model: a folder, a hub id, or `bundled` for the tiny model inside the package."""

    path: str = option("bundled", "Folder or hub id of a causal language model, or `bundled`.")
    revision: str | None = option(None, "Commit, tag or branch of a hub id.")
    tokenizer: str | None = option(None, "Folder or hub id of the tokenizer; null takes the model's own.")
    chat_template: str | None = option(None, "File with a Jinja chat template that replaces the tokenizer's.")
    start: str = option("pretrained", "Load the weights, or draw them anew from the folder's config.json.", choices=("pretrained", "random"))
    dtype: str = option("auto", "Storage type of the base weights; auto keeps the folder's own (float32 for random starts).", choices=DTYPES)
    attention: str = option("auto", "Attention implementation; auto is segment (this program's own) where the model can run it, else transformers' choice.", choices=ATTENTION)
    enable: list[str] = option([], "Without an adapter: train only parameters whose name matches one of these patterns (* and ? match any text).")
    disable: list[str] = option([], "Without an adapter: freeze parameters whose name matches one of these patterns; wins over enable.")
    gradient_checkpointing: bool | str = option(
        "auto", "Blocks whose activations are computed again in the backward pass rather than kept: none, half of them "
        "(selective) or all (full, also written true); auto takes the first that fits the memory, by a measured micro-batch.",
        choices=("auto", "none", "selective", "full", True, False),
    )  # fmt: skip

    @property
    def recompute(self) -> str:
        """`gradient_checkpointing` by its name."""
        return {True: "full", False: "none"}.get(self.gradient_checkpointing, str(self.gradient_checkpointing))
