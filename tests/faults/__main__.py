"""`python -m tests.faults [--only NAME ...] [--scale 1.0]`: try all faults, print the table, write it into docs/reliability.md.

The page is written by a whole run only: all faults at full scale or above.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from tests.faults import command, contention, damage, disk, kills, numbers, power, stops, surroundings
from tests.faults.lab import ROOT, Lab, Row

FAULTS = {
    "kills": kills.run,
    "power": power.run,
    "damage": damage.run,
    "disk": disk.run,
    "stops": stops.run,
    "contention": contention.run,
    "numbers": numbers.run,
    "surroundings": surroundings.run,
    "command": command.run,
}
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def line(row: Row) -> str:
    numbers = f"{row.trials} | {row.identical} | {row.refused} | {len(row.failures)} | {row.bound}"
    return f"| {row.fault} | {numbers} | {row.note} |"


def table(rows: list[Row], seconds: float) -> str:
    import safetensors
    import torch

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, safetensors {safetensors.__version__}"
    head = [
        f"{date.today().isoformat()}, {platform.system()}, {versions}; {seconds / 60:.0f} minutes, one trial at a time.",
        "",
        "| fault | trials | identical | refused | failures | 95 % bound | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    return "\n".join(head + [line(row) for row in rows])


def write_page(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
    PAGE.write_text(f"{page[:start]}\n{text}\n{page[stop:]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Try all faults.")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full number of trials")
    options = parser.parse_args()
    rows: list[Row] = []
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="deltune-faults-"))
    lab = Lab(folder)
    for name in options.only:
        for row in FAULTS[name](lab, options.scale):
            rows.append(row)
            print(line(row), flush=True)
            for failure in row.failures:
                print(f"    {failure}", flush=True)
    text = table(rows, time.monotonic() - began)
    print(f"\n{text}")
    if any(row.failures for row in rows):
        print(f"what the failures left: {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    if options.scale >= 1.0 and set(options.only) == set(FAULTS):
        write_page(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
