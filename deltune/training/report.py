"""report.html, a run on one page: everything inside the file, no script, nothing fetched, and all of users' text escaped.

Text reaches the page through `Markup.format` alone, which escapes whatever is not markup of this program's own; a
content policy in the page forbids scripts and fetches even so. It reads the run folder's files and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from deltune.training import display, records, storage
from deltune.training.card import base_model, loading_code, method_name
from deltune.training.curves import smooth, spans_decades
from deltune.training.report_style import STYLE
from deltune.training.svg import Series, line_chart, tick_label

FILE = "report.html"
ENDINGS = {"completed": "completed", "early_stop": "stopped early", "already_complete": "completed"}

PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
""")


def write_report(folder: Path) -> Path:
    """Write report.html from the other files of the run folder. CheckpointError where one of them is damaged."""
    run = records.read(folder)
    sections = [_header(run), _headline(run), _curves(run), _samples(run), _parameters(run), _data(run), _events(run)]
    sections += [_environment(run), _loading(run), _config(run)]
    page = PAGE.format(title=display.value(run.name), style=STYLE, body=Markup("\n").join(filter(None, sections)))
    path = folder / FILE
    storage.write_text(path, str(page))
    return path


# -- sections, in the order of the page -------------------------------------------------------------------------


def _header(run: records.Records) -> Markup:
    state = ENDINGS.get(run.outcome.get("stopped_by", ""), "not finished")
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.start["time"])) if "time" in run.start else ""
    steps = f"step {run.last_step:,} of {run.start['num_steps']:,}" if "num_steps" in run.start else f"step {run.last_step:,}"
    facts = [what_was_trained(run), steps, began]
    return Markup('<header><h1>{} <span class="state {}">{}</span></h1><p>{}</p></header>').format(
        display.value(run.name), state.split()[0], state, " · ".join(display.value(fact) for fact in facts if fact)
    )


def _headline(run: records.Records) -> Markup:
    """Cards with each metric before and after, then how much work it was."""
    before, after = run.metrics_before, run.metrics_after
    cards = [_metric_card(name, before, after) for name in dict.fromkeys([*after, *before])]
    facts = [Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(*fact) for fact in work_facts(run)]
    return Markup('<section class="headline"><div class="cards">{}</div><dl class="facts">{}</dl></section>').format(
        Markup("").join(cards), Markup("").join(facts)
    )


def _metric_card(name: str, before: dict[str, float], after: dict[str, float]) -> Markup:
    latest = after if name in after else before
    was = Markup('<span class="was">before {}</span>').format(display.metric(name, before[name])) if name in before and name in after else ""
    return Markup('<div class="card"><h3>{}</h3><p class="value">{}</p>{}</div>').format(
        display.value(display.metric_name(name)), display.metric(name, latest[name]), was
    )


def _curves(run: records.Records) -> Markup | None:
    if not run.steps:
        return None
    steps, loss = run.curve("loss")
    series = [
        Series("loss", steps, loss, 1, "faint"),
        Series("smoothed", steps, smooth(loss), 1),
    ]
    eval_steps, eval_loss = run.eval_curve("loss")
    if eval_loss:
        series.append(Series("evaluation", eval_steps, eval_loss, 2, "points"))
    log = spans_decades(loss + eval_loss)
    pictures = {size: line_chart(series, title="Loss", width=width, height=height, log=log, written=display.number)
                for size, width, height in (("wide", 960, 300), ("narrow", 460, 260))}  # fmt: skip
    drawing = Markup("").join(Markup('<div class="{}">{}</div>').format(*item) for item in pictures.items())
    charts = [_figure("Loss" + (", logarithmic" if log else ""), drawing, series, "whole")]
    for title, key, unit, noisy in (
        ("Learning rate", "lr", 1.0, False),
        ("Gradient norm", "grad_norm", 1.0, True),
        ("Tokens per second", "tokens_per_second", 1.0, True),
        ("Peak memory in GB", "peak_memory_bytes", 1e9, False),
        ("Model-FLOPs utilisation in percent", "mfu", 0.01, True),
    ):
        steps, values = run.curve(key)
        if not any(values):
            continue
        values = [value / unit for value in values]
        lines = [Series(title.lower().split(" in ")[0], steps, values, 3, "faint" if noisy else "line")]
        if noisy:
            lines.append(Series("smoothed", steps, smooth(values), 3))
        charts.append(_figure(title, line_chart(lines, title=title, from_zero=True, written=_four_digits), [], ""))
    charts += [_metric_figure(run, name) for name in _other_eval_metrics(run)]
    return Markup('<section><h2>Curves</h2><div class="charts">{}</div></section>').format(Markup("").join(charts))


def _other_eval_metrics(run: records.Records) -> list[str]:
    """Metrics with a curve of their own: evaluated twice at least, and not the loss."""
    names = dict.fromkeys(name for line in run.evals for name in line["metrics"])
    return [name for name in names if name != "loss" and len(run.eval_curve(name)[0]) > 1]


def _metric_figure(run: records.Records, name: str) -> Markup:
    steps, values = run.eval_curve(name)
    title = f"Evaluation: {display.metric_name(name)}"
    series = [Series(display.metric_name(name), steps, values, 2, "points")]
    chart = line_chart(series, title=title, log=spans_decades(values), written=lambda v: display.metric(name, v))
    return _figure(title, chart, [], "")


def _figure(title: str, chart: Markup, series: Sequence[Series], size: str) -> Markup:
    legend = Markup("").join(Markup('<span class="key {} c{}">{}</span>').format(s.style, s.color, s.name) for s in series)
    return Markup('<figure class="{}"><figcaption>{}{}</figcaption>{}</figure>').format(size, display.value(title), legend, chart)


def _samples(run: records.Records) -> Markup | None:
    if not run.samples:
        return None
    return Markup('<section><h2>Samples</h2>{}</section>').format(Markup("").join(_sample(s) for s in run.samples))


def _sample(sample: dict[str, Any]) -> Markup:
    answers = [("Before", sample.get("before", "")), ("After", sample.get("after", "")), ("Reference", sample.get("reference", ""))]
    reference = sample.get("reference", "").strip()
    cells = Markup("").join(
        Markup('<div{}><h4>{}</h4><pre dir="auto">{}</pre></div>').format(
            Markup(' class="right"') if reference and title != "Reference" and text.strip() == reference else "",
            title,
            display.plain(text),
        )
        for title, text in answers
        if text
    )
    return Markup('<article><h4>Prompt</h4><pre dir="auto">{}</pre><div class="answers">{}</div></article>').format(
        display.plain(sample.get("prompt", "")), cells
    )


def _parameters(run: records.Records) -> Markup | None:
    rows = run.start.get("parameter_table", [])
    if not rows:
        return None
    total = {"trainable": run.start["num_trainable"], "total": run.start["num_parameters"]}
    names = list(rows[0])
    foot = [total.get(name, "all" if i == 0 else "") for i, name in enumerate(names)]
    table = _table(names, [[row.get(name, "") for name in names] for row in rows], foot)
    return Markup("<section><h2>Parameters</h2>{}</section>").format(table)


def _data(run: records.Records) -> Markup | None:
    tables = [_table(rows[0], rows[1:]) for rows in (run.data_table(), run.source_table()) if rows]
    notes = [Markup("<p>{}</p>").format(display.value(note)) for note in run.data_notes()]
    return Markup("<section><h2>Data</h2>{}</section>").format(Markup("").join(tables + notes)) if tables else None


def _events(run: records.Records) -> Markup | None:
    if not run.events:
        return None
    rows = [[line["step"], line["message"]] for line in run.events]
    return Markup("<section><h2>Events</h2>{}</section>").format(_table(["step", "what happened"], rows))


def _environment(run: records.Records) -> Markup | None:
    rest = {name: value for name, value in run.description.items() if name != "data"}
    facts = [*display.flat_facts(rest), *(("loss chain", run.outcome[key]) for key in ("loss_chain",) if key in run.outcome)]
    return Markup("<section><h2>Model and environment</h2>{}</section>").format(_definitions(facts)) if facts else None


def _loading(run: records.Records) -> Markup | None:
    code = loading_code(run)
    parts = [Markup("<h3>{}</h3><pre><code>{}</code></pre>").format(title, display.plain(text)) for title, text in code]
    return Markup("<section><h2>Use it</h2>{}</section>").format(Markup("").join(parts)) if parts else None


def _config(run: records.Records) -> Markup | None:
    if not run.config_text:
        return None
    return Markup(
        "<section><details><summary>Resolved config</summary>"
        "<p>Run it again with <code>deltune train {}</code></p><pre><code>{}</code></pre></details></section>"
    ).format(display.value(run.folder / "config.yaml"), display.plain(run.config_text))


# -- facts ------------------------------------------------------------------------------------------------------


def what_was_trained(run: records.Records) -> str:
    """`lora on bundled`, as far as the records know."""
    base = base_model(run)
    if not (base and run.config):
        return base
    return f"{method_name(run) or 'all weights'} on {base}"


def work_facts(run: records.Records) -> list[tuple[str, str]]:
    """(label, text) of the work done; sums are over the logged steps unless the run has told its own."""
    totals = run.totals()
    seconds = run.outcome.get("seconds") or totals.seconds
    facts = [("time", display.duration(seconds) if seconds else "")]
    if "num_parameters" in run.start:
        share = 100 * run.start["num_trainable"] / max(1, run.start["num_parameters"])
        facts.append(("trained parameters", f"{display.count(run.start['num_trainable'])} ({share:.2g} %)"))
    facts += [
        ("tokens", display.count(run.outcome.get("num_tokens", totals.num_tokens)) if run.steps else ""),
        ("tokens per second", display.si(totals.tokens_per_second) if totals.seconds else ""),
        ("waiting for data", f"{100 * totals.data_share:.2g} % of the steps' time" if totals.data_share is not None else ""),
        ("peak memory", display.memory(totals.peak_memory_bytes) if totals.peak_memory_bytes else ""),
        ("compute", display.si(totals.flops, "FLOP") if totals.flops else ""),
        ("utilisation", f"{100 * totals.mfu:.1f} %" if totals.mfu is not None else ""),
        ("checkpoints saved", str(len(run.saves)) if run.saves else ""),
        ("best step", f"{run.outcome['best_step']:,}" if run.outcome.get("best_step") is not None else ""),
    ]
    return [(label, text) for label, text in facts if text]


# -- markup -----------------------------------------------------------------------------------------------------


def _four_digits(value: float) -> str:
    return display.number(value) if abs(value) < 1e4 else tick_label(round(value))


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]], foot: Sequence[Any] = ()) -> Markup:
    def line(cells: Sequence[Any], tag: str) -> Markup:
        return Markup("<tr>{}</tr>").format(Markup("").join(_cell(cell, tag) for cell in cells))

    body = Markup("").join(line(row, "td") for row in rows)
    numeric = [isinstance(cell, (int, float)) for cell in rows[0]]
    head = Markup("").join(
        Markup("<th{}>{}</th>").format(Markup(' class="number"') if is_number else "", display.value(name).replace("_", " "))
        for name, is_number in zip(names, numeric, strict=True)
    )
    end = Markup("<tfoot>{}</tfoot>").format(line(foot, "td")) if foot else ""
    return Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody>{}</table></div>').format(head, body, end)


def _cell(value: Any, tag: str) -> Markup:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), Markup(' class="number"') if number else "", display.value(value))


def _definitions(facts: Sequence[tuple[str, Any]]) -> Markup:
    return Markup('<dl class="list">{}</dl>').format(
        Markup("").join(Markup("<dt>{}</dt><dd>{}</dd>").format(display.value(name), display.value(value)) for name, value in facts)
    )
