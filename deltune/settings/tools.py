"""What `merge`, `convert`, `preview` and `init` are told."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import changed, option, section
from deltune.data.config import DataConfig
from deltune.models.config import ModelConfig
from deltune.settings.trained import Trained
from deltune.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class MergeSettings(Trained):
    """An adapter folded into its base model, written as a Hugging Face model folder."""

    out: str = option(help="Folder for the merged model; must not exist or be empty.")
    dtype: str = option("auto", "Storage type of the merged weights; auto keeps the base model's, and is bfloat16 where that is quantised.", choices=("auto", "float32", "bfloat16", "float16"))
    requantise: str = option("none", "Store the merged linear layers in 4 or 8 bits again, as bitsandbytes writes them, which rounds them anew: what that changes is measured and printed. 4-bit scales are as in `quant` where that is of the same kind.", choices=("none", "nf4", "fp4", "int8"))
    text: str | None = option(None, "Text file on whose first tokens the merged model is compared with base and adapter; null: a text of the program's own.")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.adapter is None:
            found.append("adapter must name the adapter's folder: adapter=FOLDER or run=RUN")
        return found


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Trained):
    """An adapter of any method whose change is a matrix, written as plain LoRA."""

    out: str = option(help="Folder for the LoRA; must not exist or be empty.")
    rank: int | None = option(None, "Rank of each layer, less where its change has less; null keeps all of the change.", gt=0)
    svd: str = option("fast", "With a rank, how the best factors are found: fast is randomised, full is exact and slow.", choices=("fast", "full"))

    def problems(self) -> list[str]:
        found = super().problems()
        if self.adapter is None:
            found.append("adapter must name the adapter's folder: adapter=FOLDER or run=RUN")
        if self.rank is None and changed(self, "svd"):
            found.append("svd has no effect without rank, for then the whole change is kept")
        return found


@dataclass(frozen=True)
class PreviewSettings:
    """The tokenised examples as the trainer will see them."""

    model: ModelConfig = section(ModelConfig, "Model whose tokenizer is used.", primary="path")
    data: DataConfig = section(DataConfig, "Data to look at.", primary="train")
    train: TrainConfig = section(TrainConfig, "Micro-batches, for step.")
    step: int | None = option(None, "Show the batches of this optimizer step of one process, the first being 1, instead of single examples.", gt=0)
    rows: int = option(3, "Examples shown.", gt=0)
    start: int = option(0, "First example shown.", ge=0)
    part: str = option("train", "Training or evaluation rows.", choices=("train", "eval"))
    color: str = option("auto", "Colour; auto looks whether the output is a terminal.", choices=("auto", "always", "never"))

    def problems(self) -> list[str]:
        keys = [key for key in ("rows", "start", "part") if self.step is not None and changed(self, key)]
        return [f"{key} has no effect with step, which shows whole batches of the training data" for key in keys]


@dataclass(frozen=True)
class InitSettings:
    """A starter config from a look at a model and a data file."""

    model: str | None = option(None, "Model folder, hub id or `bundled`; null asks.")
    data: str | None = option(None, "Data file; null asks.")
    out: str = option("deltune.yaml", "The file to write.")
    overwrite: bool = option(False, "Replace the file if it is there.")
