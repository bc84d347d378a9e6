"""The `model` section: which weights to start from and which of them may move. Light to import."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import Choice, option

ATTENTION = ("auto", "segment", "sdpa", "eager", "flash_attention_2", "flex_attention")
DTYPES = ("auto", "float32", "bfloat16", "float16")
NEW_ROWS = ("subwords", "mean", "normal", "uniform", "xavier", "kaiming")
VOCABULARY = ("add_tokens", "add_special_tokens", "new_rows", "vocab_multiple", "grow")  # keys that only training reads
PADS = ("auto", "add", "eos", "unk")


@dataclass(frozen=True)
class ModelConfig:
    """A Hugging Face causal language model: a folder, a hub id, or `bundled` for the tiny model inside the package."""

    path: str = option("bundled", "Folder or hub id of a causal language model, or `bundled`.")
    revision: str | None = option(None, "Commit, tag or branch of a hub id.")
    tokenizer: str | None = option(None, "Folder or hub id of the tokenizer; null takes the model's own.")
    chat_template: str | None = option(None, "File with a Jinja chat template that replaces the tokenizer's.")
    add_tokens: list[str] | str = option([], "Texts that become a token each, or a file with one a line; the model gets rows for them, which are trained and saved with an adapter.")
    add_special_tokens: list[str] | str = option([], "The same for special tokens, which decoded answers leave out, such as marks of a conversation's turns.")
    new_rows: str = option("subwords", "Start of new tokens' rows. subwords: mean of the rows of the pieces that the text was before; mean: of all rows; normal, uniform: drawn with mean and deviation of all rows; xavier, kaiming: drawn by the table's shape alone.", choices=NEW_ROWS)
    vocab_multiple: int = option(1, "Round the number of the model's rows up to a multiple of this, e.g. 64.", gt=0)
    grow: bool = option(False, "Give the model rows for tokens that `tokenizer` has beyond the model's own, such as a merged vocabulary's.")
    pad_token: str = option("auto", "Which token pads. auto: the tokenizer's own, else unk, else eos; add: a new token [PAD]; padding is masked by length and never trained, so none changes a number.", choices=PADS)
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
    def has_new_rows(self) -> bool:
        """Whether the model may get more rows than its folder has."""
        return bool(self.add_tokens or self.add_special_tokens or self.grow or self.vocab_multiple > 1 or self.pad_token == "add")

    @property
    def recompute(self) -> str:
        """`gradient_checkpointing` by its name."""
        return {True: "full", False: "none"}.get(self.gradient_checkpointing, str(self.gradient_checkpointing))


@dataclass(frozen=True)
class QuantConfig:
    """Weights as they are."""

    name: str = option("none", "How the linear layers of a frozen base are stored.", choices=("none",))


@dataclass(frozen=True)
class EightBit(QuantConfig):
    """A byte a value, one scale a row (LLM.int8(), arXiv:2208.07339)."""

    name: str = option("int8", "How the linear layers of a frozen base are stored.", choices=("int8",))
    compute_dtype: str = option("auto", "Type in which quantised layers compute; auto is that of the rest of the model, see engine.precision.", choices=DTYPES)
    skip: list[str] = option([], "Linear layers that are not quantised beside the head, which never is: patterns of their names (* and ? match any text).")


@dataclass(frozen=True)
class FourBit(EightBit):
    """Four bits a value: sixteen levels times a scale for each block (QLoRA, arXiv:2305.14314)."""

    name: str = option("nf4", "How the linear layers of a frozen base are stored. nf4: levels at quantiles of a normal distribution; fp4: a sign, two bits of exponent, one of mantissa.", choices=("nf4", "fp4"))
    double: bool = option(True, "Quantise the scales too: 0.52 bytes a value rather than 0.56.")
    block_size: int = option(64, "Values that share a scale.", choices=(32, 64, 128, 256, 512, 1024, 2048, 4096))


QUANTS = Choice(
    "name",
    {"none": QuantConfig, "nf4": FourBit, "fp4": FourBit, "int8": EightBit},
    default="none",
    help="Quantised base: linear layers stored in 4 or 8 bits while they are loaded. They stay frozen, so it takes an adapter.",
)
