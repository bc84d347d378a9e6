"""The picture of a run, loss.png: loss over steps with evaluations, and the learning rate below it."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

from deltune import weights
from deltune.training import records
from deltune.training.curves import smooth, spans_decades
from deltune.training.display import one_line

FILE = "loss.png"
INK, MUTED, GRID = "#1c2430", "#66707f", "#e6e9ee"
BLUE, ORANGE = "#2563eb", "#d9480f"


def loss_png(folder: Path) -> Path:
    """Draw metrics.jsonl of a run folder as a picture of 900 x 500 pixels; no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run = records.read(folder)
    figure = Figure(figsize=(9, 5), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    figure.subplots_adjust(left=0.085, right=0.965, top=0.87, bottom=0.105, hspace=0.14)
    _draw_loss(loss_axes, run)
    _draw_lr(lr_axes, run)
    figure.text(0.085, 0.935, textwrap.shorten(one_line(run.name), 70, placeholder=" …"), fontsize=14, fontweight="bold", color=INK, parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": "Deltune"})
    path = folder / FILE
    with weights.replacing(path, len(picture.getvalue())) as temporary:
        temporary.write_bytes(picture.getvalue())
    return path


def _draw_loss(axes: Any, run: records.Records) -> None:
    steps, loss = run.curve("loss")
    axes.plot(steps, loss, color=BLUE, alpha=0.28, linewidth=0.9)
    axes.plot(steps, smooth(loss), color=BLUE, linewidth=2, label="training loss, smoothed")
    eval_steps, eval_loss = run.eval_curve("loss")
    if eval_loss:
        axes.plot(eval_steps, eval_loss, color=ORANGE, marker="o", markersize=5, linewidth=1.2, label="evaluation loss")
    if spans_decades(loss + eval_loss):
        axes.set_yscale("log")
    axes.set_ylabel("loss", color=MUTED)
    if loss or eval_loss:
        axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper right")
    _style(axes)


def _draw_lr(axes: Any, run: records.Records) -> None:
    axes.plot(*run.curve("lr"), color=MUTED, linewidth=1.4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("rate", color=MUTED)
    axes.set_xlabel("step", color=MUTED)
    axes.locator_params(axis="y", nbins=2)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.yaxis.get_offset_text().set(color=MUTED, fontsize=9)
    _style(axes)


def _style(axes: Any) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, which="both", labelsize=10, length=0)
    axes.margins(x=0.015)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
