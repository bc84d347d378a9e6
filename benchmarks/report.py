"""A result as JSON, a markdown table and plots. Every target's row says what was measured, what was asked, and whether it is met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import slope

SLOPE_TARGET = 0.20  # MB of transient memory per token, without checkpointing


def case_text(name: str, record: dict[str, Any]) -> str:
    """A case for the console."""
    lines = [f"== {name}: {record['title']} ({record.get('seconds', 0):.0f} s, {record.get('cpu_seconds', 0):.0f} s of CPU)"]
    if "not_there" in record:
        return f"{lines[0]}\n   {record['not_there']}"
    for label, row in record["candidates"].items():
        memory = f"  transient {row['transient_mb']:7.0f} MB" if row["transient_mb"] is not None else ""
        mfu = f"  MFU {row['mfu']:.2f}" if row["mfu"] else ""
        lines.append(f"   {label:24} {row['seconds_per_step']:8.3f} s/step  {row['useful_tokens_per_second']:8.0f} useful tokens/s{mfu}{memory}  first {row['first_step_seconds']:.2f} s")
    lines += [f"   {target_text(row)}" for row in record["targets"]]
    lines += [f"   absent: {label}: {reason}" for label, reason in record["absent"].items()]
    lines += [f"   FAILED, the losses or results differ: {reason}" for reason in record["failed"]]
    return "\n".join(lines)


def target_text(row: dict[str, Any]) -> str:
    sign = ">=" if row["at_least"] else "<="
    found = "not measured" if row["measured"] is None else f"{row['measured']:.4g}"
    return f"{row['ours']} {row['what']} vs {row['peer']}: {found} ({sign} {row['target']}: {met_text(row)})"


def met_text(row: dict[str, Any]) -> str:
    return {True: "met", False: "missed", None: "not measured"}[row["met"]]


def slopes(cases: dict[str, Any]) -> dict[str, float]:
    """MB per token of each candidate of the memory cases at several lengths; empty with fewer than two of them."""
    points: dict[str, list[tuple[int, float]]] = {}
    for name, record in cases.items():
        if name.startswith("C6-"):
            for label, row in record["candidates"].items():
                if row["transient_mb"] is not None:
                    points.setdefault(label, []).append((record["setting"]["micro_batch"] * record["setting"]["length"], row["transient_mb"]))
    return {label: slope(found) for label, found in points.items() if len({x for x, _ in found}) > 1}


def rows_of(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(case, row of the table of targets), a case that failed its equality with its rows unmeasured."""
    rows = []
    for name, record in result["cases"].items():
        for row in record["targets"]:
            rows.append((name, row | {"measured": None, "met": None} if record["failed"] else row))
    mine = slopes(result["cases"]).get("ours")
    if mine is not None:
        rows.append(("C6", {"what": "transient MB per token", "ours": "ours", "peer": "itself", "measured": mine, "target": SLOPE_TARGET, "at_least": False, "met": mine <= SLOPE_TARGET}))
    return rows


def summary(result: dict[str, Any]) -> str:
    rows = rows_of(result)
    failed = [name for name, record in result["cases"].items() if record["failed"]]

    def total(what: str) -> float:
        return sum(record.get(what, 0) for record in result["cases"].values())

    met, missed = (sum(row["met"] is value for _, row in rows) for value in (True, False))
    text = f"{met} of {len(rows)} targets met, {missed} missed, {len(rows) - met - missed} not measured; {total('seconds'):.0f} s, {total('cpu_seconds'):.0f} s of CPU"
    return text + (f"; FAILED equality: {', '.join(failed)}" if failed else "; all losses agree")


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in (machine["versions"] | {f"peers' {k}": v for k, v in result["peers"].items()}).items())
    lines = [
        f"# Benchmark ({result['suite']}{', toy sizes: proves that it runs, measures nothing' if result['toy'] else ''})", "", summary(result) + ".", "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {', '.join(machine['features']) or 'no features read'}, {machine['system']}, "
        f"Python {machine['python']}; {versions}; "
        f"matrix products at {', '.join(f'{v:.0f} GFLOP/s ({k})' for k, v in result['gemm_gflops'].items()) or 'not measured'}. One thread a candidate; times are CPU seconds"
        f"{' or seconds of CUDA events' if result['suite'] == 'gpu' else ''}, medians over rounds shuffled; tokens without padding.", "",
        "| case | what | ours | against | measured | target | |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in rows_of(result):
        sign = ">=" if row["at_least"] else "<="
        found = "" if row["measured"] is None else f"{row['measured']:.3g}"
        lines.append(f"| {name} | {row['what']} | {row['ours']} | {row['peer']} | {found} | {sign} {row['target']} | {met_text(row)} |")
    for name, record in result["cases"].items():
        lines += ["", f"## {name}: {record['title']}", "", told(record), ""]
        if "not_there" in record:
            lines.append(record["not_there"])
            continue
        if record["candidates"]:
            setting = record["setting"]
            lines += [f"{setting['dtype']}, {setting['micro_batch']} x {setting['length']}, rank {setting['rank']}, up to {setting['rounds']} round(s) of {setting['steps']} step(s).", "",
                      "| candidate | s/step | useful tokens/s | MFU | transient MB | peak GB | first step s | before it s | loss differs by | rounds |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for label, row in record["candidates"].items():
            apart = record.get("loss_distance", {}).get(label)
            cells = [f"{row['seconds_per_step']:.3f}", f"{row['useful_tokens_per_second']:.0f}", _cell(row["mfu"], ".2f"), _cell(row["transient_mb"], ".0f"), _cell(row.get("peak_gb"), ".1f"),
                     f"{row['first_step_seconds']:.2f}", _cell(row["before_first_step_seconds"], ".1f"), _cell(apart, ".1e"), str(row["rounds"])]  # fmt: skip
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines += [f"\nAbsent: {label}: {reason}" for label, reason in record["absent"].items()]
        lines += [f"\n**Failed**: {reason}" for reason in record["failed"]]
    found = slopes(result["cases"])
    if found:
        lines += ["", "Transient MB per token: " + ", ".join(f"{label} {value:.3f}" for label, value in found.items()) + "."]
    if result["not_there"]:
        lines += ["", "Not there: " + "; ".join(f"{name} ({why})" for name, why in result["not_there"].items()) + "."]
    return "\n".join(lines) + "\n"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def told(record: dict[str, Any]) -> str:
    """When and beside what a case was measured."""
    before, after = ((" ".join(map(str, one))) for one in record["load"])
    return f"Commit {record['commit']}; {record.get('seconds', 0):.0f} s, {record.get('cpu_seconds', 0):.0f} s of CPU; load averages {before} before, {after} after."


def name_of(gpu: bool, toy: bool) -> str:
    """A toy or a card's run has names of its own."""
    return "suite" + ("_gpu" if gpu else "") + ("_toy" if toy else "")


def kept(folder: Path, gpu: bool, toy: bool) -> dict[str, Any]:
    """The cases of an earlier result."""
    file = folder / f"{name_of(gpu, toy)}.json"
    return json.loads(file.read_text(encoding="utf-8"))["cases"] if file.exists() else {}


def write(result: dict[str, Any], folder: Path) -> None:
    """suite.json, suite.md and the plots."""
    name = name_of(result["suite"] == "gpu", result["toy"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(result), encoding="utf-8")
    plots(result, folder, name)


def plots(result: dict[str, Any], folder: Path, name: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [(f"{case}  {row['peer']}", row) for case, row in rows_of(result) if row["what"].startswith("speed") and row["measured"] is not None]
    if bars:
        figure, axes = plt.subplots(figsize=(8, 0.35 * len(bars) + 1.0))
        axes.barh([label for label, _ in bars], [row["measured"] for _, row in bars], color=[MET if row["met"] else MISSED for _, row in bars])
        for at, (_, row) in enumerate(bars):
            axes.plot([row["target"]] * 2, [at - 0.4, at + 0.4], color="black")
        axes.set_xscale("log")  # a merge is ten times as fast, a start a hundred
        ticks = [x for x in (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if x <= 1.5 * max(row["measured"] for _, row in bars)]
        axes.set_xticks(ticks, [str(x) for x in ticks])
        axes.minorticks_off()
        axes.set_xlim(left=min(0.9, *(0.9 * row["measured"] for _, row in bars)))
        axes.axvline(1.0, color="grey", linewidth=0.8)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlabel("speed, ours over the peer's (black: target; green: met)")
        _save(figure, folder / f"{name}_speed.png")
    memory = {k: r for k, r in result["cases"].items() if k.startswith("C6-")}
    _curve(memory, "length", "transient_mb", "transient memory (MB)", folder / f"{name}_length.png")
    ranks = {k: r for k, r in result["cases"].items() if k.startswith("rank-") or k == "C1"}
    _curve(ranks, "rank", "useful_tokens_per_second", "useful tokens/s", folder / f"{name}_rank.png", only=("ours", "peft"))
    bars = result["cases"].get("C6", {}).get("candidates", {})
    if bars:
        figure, axes = plt.subplots(figsize=(8, 3.5))
        drawn = axes.barh(list(bars), [row["transient_mb"] for row in bars.values()], color=[OWN if label.startswith("ours") else PEERS for label in bars])
        axes.bar_label(drawn, fmt="%.0f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlabel("transient memory of a step (MB)")
        _save(figure, folder / f"{name}_memory.png")


MET, MISSED, OWN, PEERS = "#3a7", "#c63", "#3a7", "#999"


def _curve(cases: dict[str, Any], across: str, quantity: str, label: str, file: Path, only: tuple[str, ...] = ()) -> None:
    """A line a candidate over a setting that differs between the cases; nothing where no candidate was in two of them."""
    from matplotlib import pyplot as plt

    lines: dict[str, list[tuple[int, float]]] = {}
    for record in cases.values():
        for name, row in record["candidates"].items():
            if row[quantity] is not None and name in (only or record["candidates"]):
                lines.setdefault(name, []).append((record["setting"][across], row[quantity]))
    if not any(len(found) > 1 for found in lines.values()):
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, found in lines.items():
        axes.plot(*zip(*sorted(found), strict=True), marker="o", label=name, linestyle="-" if "checkpointing" not in name else "--", color=OWN if name.startswith("ours") else PEERS)
    if across == "rank":
        axes.set_xscale("log", base=2)
    ticks = sorted({at for found in lines.values() for at, _ in found})
    axes.set_xticks(ticks, [str(at) for at in ticks])
    axes.minorticks_off()
    axes.set_xlabel(across)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
