"""What the verbs that sum up finished work are told: `score` and `ratings`."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import option
from deltune.settings.evaluation import TEXT_METRICS


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Answers that are there already, scored, and compared item by item with others to the same questions."""

    predictions: str = option(help="JSON lines, or a folder that `eval` wrote: prediction with reference or references; or correct; or ranked with gold.")
    metrics: list[str] = option([], "Metrics of texts; without any exact_match, normalised_match and f1.", choices=TEXT_METRICS)
    language: str = option("auto", "How bleu and rouge split texts; auto is zh where most letters of the references are Chinese.", choices=("auto", "en", "zh"))
    against: str | None = option(None, "Other answers to the same items: differences, each with its interval and a paired test.")
    out: str | None = option(None, "JSON file for the scores.")


@dataclass(frozen=True, kw_only=True)
class RatingsSettings:
    """Reviews of pairs of answers by a judge, summed up: percentages of a baseline, wins, Elo, Bradley-Terry, place bias."""

    files: list[str] = option(help="Files of reviews, folders of them, or globs: JSON lines with question_id (or message_id), answer1_id, answer2_id and score, or the judge's text.")
    baseline: str | None = option(None, "System whose score is 100 %; null takes the one that is in every file, if there is one.")
    names: dict[str, str] = option({}, "System -> an answer id of it, or a file of its answers, where the names of files do not tell: names={gpt-3.5: answer_gpt35.jsonl}.")
    questions: str | None = option(None, "Questions as JSON lines with question_id and category: numbers of each category as well.")
    orders: int = option(1000, "Random orders of play that Elo ratings are averaged over; 0 leaves them out.", ge=0)
    resamples: int = option(2000, "Bootstrap resamples of the questions.", ge=100)
    seed: int = option(0, "Seed of resamples and orders.", ge=0)
    out: str | None = option(None, "Folder for ratings.json and ratings.png.")

    def problems(self) -> list[str]:
        return [] if self.files else ["files must name at least one file of reviews"]
