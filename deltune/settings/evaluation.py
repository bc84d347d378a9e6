"""What `eval` is told."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import option, section
from deltune.data.config import DataConfig
from deltune.settings.rules import changed
from deltune.settings.trained import Trained

TEXT_METRICS = ("exact_match", "normalised_match", "f1", "bleu", "rouge")  # the table in deltune.evaluation.text_metrics


@dataclass(frozen=True)
class EvalSettings(Trained):
    """Loss, perplexity, token accuracy and exact match of a model on evaluation data."""

    data: DataConfig = section(DataConfig, "Evaluation data: `eval`, or `eval_size` of the training rows.", primary="eval")
    micro_batch: int = option(8, "Examples in one forward pass.", gt=0)
    exact_match: bool = option(False, "Also generate an answer to each prompt and compare.")
    metrics: list[str] = option([], "Also generate an answer to each prompt and measure it against the reference; normalised_match and f1 as SQuAD, bleu and rouge by sacrebleu and rouge-score.", choices=TEXT_METRICS)
    max_new_tokens: int = option(64, "Longest generated answer.", gt=0, unit="tokens")
    out: str | None = option(None, "JSON file for the metrics; with exact_match or metrics also the answers.")

    @property
    def generates(self) -> bool:
        return self.exact_match or bool(self.metrics)

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.data.eval and not self.data.eval_size:
            found.append("data.eval must name evaluation data: data=FILE")
        if self.data.eval and self.data.eval_size:
            found.append("data.eval_size has no effect, since data.eval is given")
        if not self.generates and changed(self, "max_new_tokens"):
            found.append("max_new_tokens has no effect without exact_match or metrics: nothing is generated")
        return found
