"""deltune eval [run=RUN | model=MODEL adapter=FOLDER] data=FILE [exact_match=true] [metrics=[f1,rouge]] [out=FOLDER]
deltune eval [run=RUN | model=MODEL adapter=FOLDER] task=mmlu task_data=FILE [protocol=...] [shots=5] [out=FOLDER] [against=OTHER]

Loss, perplexity and token accuracy on evaluation data, of every source and of all together; with exact_match=true or
metrics the model also answers each prompt, and its answers are measured against the references. `out` gets
metrics.json, which holds all that it takes to measure again, and predictions.jsonl. An `out` that ends in .json names the first file itself.

With `task` in place of data, accuracy on tasks with right answers: see commands/tasks.py.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltune.settings import EvalSettings

LONGEST_ANSWER = 64  # tokens, where max_new_tokens says nothing


def main(words: list[str], file: Path | None = None) -> int:
    from deltune import dist, log
    from deltune.commands import tasks, text_scores
    from deltune.settings import EvalSettings, load

    settings = load(EvalSettings, words, file)
    log.set_up()
    if settings.task:
        return tasks.main(settings)
    result, answers = measure(settings)
    if dist.is_main():
        print(table(result))
        if settings.metrics:
            print("\n" + text_scores.table(result))
        if settings.out is not None:
            print("\n" + write(settings, result, answers))
    return 0


def measure(settings: EvalSettings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(result, answers). The result holds `all` and `sources`, each with its metrics, and what produced them."""
    from deltune.commands import text_scores
    from deltune.commands.batching import settled
    from deltune.commands.open_model import opened_fast, provenance
    from deltune.data.loader import eval_batches
    from deltune.evaluation.exact import exact_match
    from deltune.evaluation.lm import evaluate_by_source
    from deltune.models.generation import GenerateOptions
    from deltune.models.head import described

    began = time.perf_counter()
    with opened_fast(settings) as place:
        dataset = evaluation_data(settings, place.tokenizer)
        packed = settled(settings.data, place.model).packed
        batches = eval_batches(
            dataset, micro_batch=settings.micro_batch, packed=packed, rank=place.engine.rank, world_size=place.engine.world_size,
            pad_id=place.tokenizer.pad_token_id,
        )  # fmt: skip
        metrics, sources = evaluate_by_source(
            place.model, batches, head=described(place.model), autocast=place.engine.autocast, device=place.engine.device
        )
        answers: list[dict[str, Any]] = []
        if settings.generates:
            longest = settings.max_new_tokens or LONGEST_ANSWER
            options = GenerateOptions(max_new_tokens=longest)
            with place.engine.autocast():
                score, answers = exact_match(place.model, place.tokenizer, dataset, options, batch=settings.micro_batch)
            if settings.exact_match or "exact_match" in settings.metrics:
                metrics["exact_match"] = score
                add_source_scores(sources, answers)
            text_scores.add(settings.metrics, metrics, sources, answers)
            warn_of_length(score, longest)
    found = {
        "all": metrics,
        "sources": sources,
        "data_fingerprint": dataset.fingerprint,
        "seconds": time.perf_counter() - began,
    }
    return found | provenance(settings), answers


def evaluation_data(settings: EvalSettings, tokenizer: Any) -> Any:
    """The evaluation rows; those of the training data are only read where eval_size holds some of them out."""
    from deltune.data.prepare import prepare
    from deltune.data.sources import BUNDLED, resolve

    data = settings.data
    if not data.eval:
        return prepare(data, tokenizer).evaluation
    resolve(data.eval, "data.eval")  # a file that is missing is named as one of data.eval
    bundled = str(BUNDLED / "eval.jsonl")
    files = [bundled if source == "bundled" else source for source in data.eval]
    alone = replace(data, train=files, eval=[], read_nums=data.eval_read_nums, eval_read_nums=None, streaming=False)
    return prepare(alone, tokenizer).train


def add_source_scores(sources: dict[str, dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    """Exact match of each source, beside its other metrics."""
    from deltune.evaluation.lm import source_of
    from deltune.evaluation.statistics import wilson_interval

    for name, metrics in sources.items():
        matches = [answer["match"] for answer in answers if source_of(answer["row"]) == name]
        low, high = wilson_interval(sum(matches), len(matches))
        metrics["exact_match"] = {
            "exact_match": sum(matches) / len(matches),
            "n": len(matches),
            "low": low,
            "high": high,
        }


def warn_of_length(score: dict[str, float], limit: int) -> None:
    from deltune.log import logger

    if score["num_too_long"]:
        logger.warning(
            "%d of %d references have more than max_new_tokens=%d tokens and cannot be matched",
            score["num_too_long"],
            score["n"],
            limit,
        )


def table(result: dict[str, Any]) -> str:
    """A line for each source, if there are several, and one for all."""
    rows = list(result["sources"].items()) if len(result["sources"]) > 1 else []
    exact = "exact_match" in result["all"]
    head = [
        "",
        "examples",
        "trained tokens",
        "loss",
        "perplexity",
        "token accuracy",
        *(["exact match", "95 % interval"] if exact else []),
    ]
    lines = [head]
    for name, metrics in [*rows, ("all", result["all"])]:
        cells = [
            name, f"{metrics['num_examples']:,}", f"{metrics['num_tokens']:,}", f"{metrics['loss']:.4f}",
            f"{metrics['perplexity']:.4g}", f"{metrics['token_accuracy']:.2%}",
        ]  # fmt: skip
        if exact:
            score = metrics["exact_match"]
            cells += [f"{score['exact_match']:.2%}", f"{score['low']:.2%} to {score['high']:.2%}"]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write(settings: EvalSettings, result: dict[str, Any], answers: list[dict[str, Any]]) -> str:
    """The files of `out`; says what was written."""
    from deltune.errors import ConfigError
    from deltune.weights import replacing

    out = Path(settings.out)
    metrics_file, answers_file = (
        (out, out.with_suffix(".predictions.jsonl"))
        if out.suffix == ".json"
        else (out / "metrics.json", out / "predictions.jsonl")
    )
    texts = {metrics_file: json.dumps(result, indent=1, ensure_ascii=False) + "\n"}
    if settings.generates:
        texts[answers_file] = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    try:
        metrics_file.parent.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            data = text.encode("utf-8")
            with replacing(file, len(data)) as temporary:
                temporary.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"out={settings.out}: cannot be written: {error.strerror}") from None
    return "\n".join(f"wrote {file}" for file in texts)
