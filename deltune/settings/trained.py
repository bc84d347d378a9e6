"""What every verb that uses a trained model is told."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import changed, choice, option, section
from deltune.engines.config import Single
from deltune.models.config import QUANTS, VOCABULARY, ModelConfig, QuantConfig
from deltune.settings.rules import compute_rule, revision_rule


@dataclass(frozen=True)
class Trained:
    """The base model, and what a run made of it."""

    run: str | None = option(None, "A run's folder: model, adapter and the way prompts are written come from it.")
    model: ModelConfig = section(ModelConfig, "Base model.", primary="path")
    quant: QuantConfig = choice(QUANTS)
    adapter: str | None = option(None, "Folder of an adapter, or of the run that made it; null uses the model as it is.")
    engine: Single = section(Single, "Device and precision.")

    def problems(self) -> list[str]:
        found = [*revision_rule(self.model), *compute_rule(self.quant, self.engine)]
        for key in ("enable", "disable", "gradient_checkpointing"):
            if getattr(self.model, key) not in ([], "auto"):
                found.append(f"model.{key} has no effect: nothing is trained here")
        for key in VOCABULARY:
            if changed(self.model, key):
                found.append(f"model.{key} has no effect: tokens are added where a model is trained, and its adapter or folder has them")
        if self.model.pad_token == "add":
            found.append("model.pad_token cannot be add: nothing is trained here")
        if self.engine.compile:
            found.append("engine.compile has no effect: nothing is trained here")
        return found
