"""What each verb is told, and how words become it."""

from deltune.settings.evaluation import EvalSettings
from deltune.settings.generation import ChatSettings, GenerateSettings, Generation
from deltune.settings.run import Run
from deltune.settings.scores import RatingsSettings, ScoreSettings
from deltune.settings.tools import ConvertSettings, InitSettings, MergeSettings, PreviewSettings
from deltune.settings.trained import Trained
from deltune.settings.vocab import VocabMergeSettings, VocabStatsSettings
from deltune.settings.words import load, load_run, run_from, split_file

__all__ = [
    "ChatSettings", "ConvertSettings", "EvalSettings", "GenerateSettings", "Generation", "InitSettings", "MergeSettings",
    "PreviewSettings", "RatingsSettings", "Run", "ScoreSettings", "Trained", "VocabMergeSettings",
    "VocabStatsSettings", "load", "load_run", "run_from", "split_file",
]  # fmt: skip
