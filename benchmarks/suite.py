"""The benchmark that cannot flatter: ours and the peers alternate in one run, and no time counts before their losses agree.

    python -m benchmarks.suite                        every CPU case, one thread, within 25 minutes (make bench)
    python -m benchmarks.suite --cases C1,C3 --rounds 5   the others of an earlier result stay in it
    python -m benchmarks.suite --gpu [--toy]          the cases of one CUDA card (make bench-gpu); --toy: at toy size on the CPU

Each candidate is a process of its own (nursery.py). They all do a first step, then turns in an order shuffled every round;
who has nothing left to tell sits out. Exit code 1 if losses differ somewhere; a target that is missed is a row of
the table, not a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine, parts, peers, report
from benchmarks.cases import CPU, GPU, NOT_THERE, PARTS, Case
from benchmarks.measure import Candidate, Timed, distance, ratio, still_open, unequal, verdict
from benchmarks.nursery import Nursery
from benchmarks.pipe import CALM, Fault, Process, last_line
from benchmarks.work import adapter_folder, even_rows, lognormal_rows, make_model, real_rows, write_rows

OUT = Path(__file__).parent / "results"
CARD_PEAK = 989e12  # FLOP/s of an H200 in dense bfloat16, by its data sheet
FIRST_PATIENCE = 600.0  # seconds; a compiled model's first step takes minutes
DRAWN_PATIENCE = 2400.0  # one core draws and quantises 1.1 B values in 14 s, 70 B in 15 minutes


class Suite:
    """One run: models made once, cases one after the other."""

    def __init__(self, *, toy: bool, cuda: bool, rounds: int | None):
        self.toy, self.cuda, self.rounds = toy, cuda, rounds
        self.scratch = tempfile.TemporaryDirectory(prefix="bench-")
        self.models: dict[tuple, Path] = {}
        self.peaks: dict[tuple[str, str], float] = {}
        self.nurseries: dict[str, Nursery] = {}

    def close(self) -> None:
        for nursery in self.nurseries.values():
            nursery.close()
        self.scratch.cleanup()

    def nursery(self, kind: str) -> Nursery:
        """Ours or the peers'. On a card nothing is imported beforehand: what touches CUDA must not be forked."""
        whose = "ours" if kind == "ours" else "peft_loop"
        if whose not in self.nurseries:
            python = sys.executable if kind == "ours" else str(peers.PYTHON)
            with open(Path(self.scratch.name) / f"{whose}.log", "a") as log:
                self.nurseries[whose] = Nursery(python, None if self.cuda and not self.toy else f"benchmarks.candidates.{whose}", log, CALM | peers.COMPILED)
        return self.nurseries[whose]

    def told(self, *words: str, theirs: bool = False) -> dict[str, Any]:
        """What `python -m words...` says in its last line of output. Raises Fault where it fails."""
        log = Path(self.scratch.name) / "parts.log"
        with open(log, "a") as errors:
            child = self.nursery("peft" if theirs else "ours").fork(words, errors)
        with child.stdin, child.stdout:
            output = child.stdout.read()
        if child.wait():
            raise Fault(last_line(log))
        return json.loads(output.strip().splitlines()[-1]) if output.strip() else {}

    def cpu_seconds(self) -> float:
        """Of this process and of all that have ended."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used) + sum(n.cpu_of_ended + n.cpu_of_imports for n in self.nurseries.values())

    def run(self, name: str, case: Case) -> dict[str, Any]:
        """A case's record: table of candidates, rows of targets, what is absent, why it failed if it did."""
        case = case.toy() if self.toy else case
        case = replace(case, rounds=self.rounds) if self.rounds else case
        record: dict[str, Any] = {"title": case.title, "failed": [], "absent": {}, "candidates": {}, "targets": []}
        record["setting"] = {"dtype": case.dtype, "micro_batch": case.micro_batch, "length": case.length, "rows": case.rows, "rank": case.rank, "rounds": case.rounds, "steps": case.steps}
        try:
            rows_folder = self.rows(name, case)
        except FileNotFoundError:
            return {**record, "not_there": f"no {case.rows} rows on this machine: only lognormal lengths were measured"}
        model = self.model(case)
        present = {}
        for label, candidate in case.candidates.items():
            needs = "liger" if candidate.spec.get("liger") else candidate.spec.get("quant", candidate.kind)
            reason = None if candidate.kind == "ours" else peers.absent(needs)
            if reason:
                record["absent"][label] = reason
            else:
                present[label] = candidate
        groups = [list(present)]
        if case.pairwise:
            mine = [label for label in present if label == "ours"]
            groups = [[*mine, label] for label in present if label not in mine] or [mine]
        timed: dict[str, Timed] = {}
        targets: dict[int, float | None] = {}
        for group in groups:
            measured = self.measure(case, {label: present[label] for label in group}, model, rows_folder, record)
            for number, target in enumerate(case.targets):
                if target.what != "mfu":
                    found = ratio(target, measured)
                    targets[number] = found if found is not None else targets.get(number)
            timed |= measured
        self.judge(case, present, timed, targets, lambda: self.reference(case, present, model, rows_folder, record), record)
        return record

    # -- what they work on --------------------------------------------------------------------------------------

    def model(self, case: Case) -> Path:
        """The folder of the case's model with the starts of every adapter that its candidates name."""
        key = (case.shape, case.drawn)
        if key not in self.models:
            folder = Path(self.scratch.name) / f"model{len(self.models)}"
            folder.mkdir()
            make_model(folder, case.shape, "bfloat16", case.device, drawn=case.drawn)
            self.models[key] = folder
        folder = self.models[key]
        wanted = {c.spec.get("adapter", "lora") for c in case.candidates.values() if not case.drawn}
        missing = sorted(kind for kind in wanted if not adapter_folder(folder, kind, case.rank).exists())
        if missing:
            self.told("benchmarks.candidates.ours", str(folder), str(case.rank), *missing)
        return folder

    def rows(self, name: str, case: Case) -> Path:
        folder = Path(self.scratch.name) / f"rows-{name}"
        count = case.micro_batch * (1 + case.rounds * case.steps)
        if case.rows == "even":
            rows = even_rows(count, case.length, case.shape.vocab)
        elif case.rows == "lognormal":
            rows = lognormal_rows(count, case.shape.vocab, case.length)
        else:
            rows = real_rows(case.rows, count, case.shape.vocab, case.length)
        folder.mkdir(exist_ok=True)
        write_rows(folder, rows)
        return folder

    def words(self, candidate: Candidate, case: Case, model: Path, rows: Path) -> list[str]:
        """What follows `python -m` for a candidate."""
        spec = {"folder": str(model), "rows": str(rows), "dtype": case.dtype, "micro_batch": case.micro_batch, "length": case.length,
                "rank": case.rank, "adapter": "lora", "device": case.device, "memory": case.memory, "drawn": case.drawn}  # fmt: skip
        for key, value in candidate.spec.items():
            spec[key.removesuffix("_override")] = value
        return ["benchmarks.candidates.run", candidate.kind, json.dumps(spec)]

    def start(self, label: str, candidate: Candidate, case: Case, model: Path, rows: Path) -> Process:
        log = Path(self.scratch.name) / f"{label.replace(' ', '-').replace(',', '')}.log"
        return Process(self.words(candidate, case, model, rows), log, nursery=self.nursery(candidate.kind), patience=DRAWN_PATIENCE if case.drawn else FIRST_PATIENCE)

    # -- turns --------------------------------------------------------------------------------------------------

    def measure(self, case: Case, candidates: dict[str, Candidate], model: Path, rows: Path, record: dict[str, Any]) -> dict[str, Timed]:
        """A first step, then rounds; the losses of the equality steps are those of the first of all. A candidate that breaks is absent with its own message; ours makes the case fail."""
        timed: dict[str, Timed] = {}
        processes: dict[str, Process] = {}

        def broke(label: str, fault: Fault) -> None:
            timed.pop(label, None)
            processes.pop(label).end()
            record["absent"][label] = str(fault)
            if candidates[label].kind == "ours":
                record["failed"].append(f"{label}: {fault}")

        try:
            for label, candidate in candidates.items():  # all at once: they load while the first is heard
                processes[label] = self.start(label, candidate, case, model, rows)
            for label in candidates:
                try:
                    timed[label] = Timed(before_first_step=processes[label].hear().get("before_first_step"))
                    answer = processes[label].steps(1)
                    timed[label].losses += answer["losses"]
                    timed[label].first_seconds = answer["cpu"]
                except Fault as fault:
                    broke(label, fault)
            chance = random.Random(0)
            for _ in range(case.rounds):
                going = [label for label in processes if label in still_open(case.targets, timed)]
                for label in chance.sample(going, len(going)):
                    try:
                        answer = processes[label].steps(case.steps)
                    except Fault as fault:
                        broke(label, fault)
                        continue
                    one = timed[label]
                    one.losses = (one.losses + answer["losses"])[: case.equality_steps]
                    one.seconds.append(answer["cpu"])
                    one.wall.append(answer["wall"])
                    one.tokens.append(answer["tokens"] or case.micro_batch * case.length * case.steps)
                    if answer["transient"] is not None:
                        one.transient.append(answer["transient"])
                        one.peak.append(answer["peak"])
        finally:
            for process in processes.values():
                process.end()
        return timed

    def reference(self, case: Case, present: dict[str, Candidate], model: Path, rows: Path, record: dict[str, Any]) -> list[float] | None:
        """The losses in float32 over the equality steps of the peer that others are held to."""
        peer = next((c.equal_to for c in present.values() if c.equal_to in present), None)
        if case.device != "cpu" or peer is None or case.dtype == "float32":
            return None
        process = self.start("reference", present[peer], replace(case, dtype="float32", memory=False), model, rows)
        try:
            process.hear()
            losses = process.steps(case.equality_steps)["losses"]
            record["reference_losses"] = losses
            return losses
        except Fault as fault:
            record["absent"]["float32 reference"] = str(fault)
            return None
        finally:
            process.end()

    def first_step(self) -> dict[str, list[float]]:
        """CPU seconds from a bare interpreter of ours before the first step, of it, and of three more; of PEFT's the first two."""
        case = CPU["C1"].toy() if self.toy else CPU["C1"]
        rows, model, found = self.rows("C14", replace(case, rounds=3)), self.model(case), {}
        for label, steps in (("ours", 4), ("peft", 1)):
            python = sys.executable if label == "ours" else str(peers.PYTHON)
            words = [python, "-m", *self.words(case.candidates[label], case, model, rows)]
            process = Process(words, Path(self.scratch.name) / "first.log")
            try:
                before = process.hear()["before_first_step"]
                found[label] = [before, *(process.steps(1)["cpu"] for _ in range(steps))]
            finally:
                process.end()
        return found

    # -- what comes of it ---------------------------------------------------------------------------------------

    def peak(self, case: Case) -> float:
        key = (case.dtype, case.device)
        if key not in self.peaks:
            self.peaks[key] = machine.gemm_flops(case.dtype, case.device)
        return self.peaks[key]

    def judge(self, case: Case, present: dict, timed: dict[str, Timed], targets: dict, reference: Callable[[], list[float] | None], record: dict) -> None:
        """`reference` is asked where the losses are further apart than any two may be: it may allow for more."""
        losses = {label: one.losses for label, one in timed.items()}
        complaints = unequal(present, losses, case.dtype)
        record["failed"] += complaints and unequal(present, losses, case.dtype, reference())
        for label, candidate in present.items():
            if label in losses and candidate.equal_to in losses and candidate.equal_to != label and losses[label]:
                record.setdefault("loss_distance", {})[label] = distance(losses[label], losses[candidate.equal_to])
        flops = case.shape.flops_per_token(case.length if case.rows == "even" else 118, case.rank)
        for label, one in timed.items():
            whole = present[label].spec.get("adapter") != "half"  # half the layers are less work than the formula says
            record["candidates"][label] = one.row(flops if whole else 0.0, self.peak(case), case.steps)
        for number, target in enumerate(case.targets):
            value = targets.get(number)
            if target.what == "mfu" and target.ours in timed:
                value = record["candidates"][target.ours]["mfu"] * self.peak(case) / CARD_PEAK
            record["targets"].append(verdict(target, value))


def run_part(name: str, rounds: int | None, suite: Suite) -> dict[str, Any]:
    """A part as a record like a case's."""
    record: dict[str, Any] = {"title": PARTS[name], "failed": [], "absent": {}, "candidates": {}, "targets": []}
    try:
        if name == "C9":
            record["targets"], record["detail"] = parts.methods_rows(suite.told, rounds or 2, suite.toy)
        elif name == "C10":
            record["targets"], record["detail"] = parts.pissa_rows(suite.told, suite.toy)
        elif name == "C11":
            record["targets"], record["detail"] = parts.merge_rows(suite.told, suite.toy)
        elif name == "C12":
            record["targets"], record["detail"] = parts.values_rows(suite.told, suite.toy)
        else:
            record["targets"], record["detail"] = parts.startup_rows(suite.first_step())
    except ValueError as fault:  # two results that should be equal are not
        record["failed"].append(str(fault))
    except Fault as fault:
        record["absent"]["all"] = str(fault)
    return record


def chosen(words: str | None, known: list[str]) -> list[str]:
    """The cases that are named; C5 and C6 stand for all of theirs. Raises SystemExit at a name that means nothing."""
    if not words:
        return known
    picked = []
    for word in words.split(","):
        found = [name for name in known if name == word or name.startswith(word + "-")]
        if not found and word not in NOT_THERE:
            raise SystemExit(f"--cases: no case {word!r}; there are {', '.join(known)}")
        picked += found
    return picked


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", help="names with commas; without it every one")
    parser.add_argument("--rounds", type=int, help="of every case, in place of its own number")
    parser.add_argument("--gpu", action="store_true", help="the cases of one CUDA card")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU: shows that all works, measures nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(words)
    cases = GPU if options.gpu else CPU
    known = list(cases) if options.gpu else sorted([*cases, *PARTS], key=_order)
    names = chosen(options.cases, known)
    if options.gpu and not options.toy:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("--gpu needs a CUDA card; --toy tries the same cases at toy size on the CPU")
    os.environ.update(CALM)
    peers.install(cuda=options.gpu and not options.toy)
    result: dict[str, Any] = {
        "suite": "gpu" if options.gpu else "cpu", "toy": options.toy, "machine": machine.describe(options.gpu), "peers": peers.versions(),
        "cases": report.kept(options.out, options.gpu, options.toy) if options.cases else {}, "gemm_gflops": {}, "not_there": {k: v for k, v in NOT_THERE.items() if k.startswith("G") == options.gpu},
    }  # fmt: skip
    suite = Suite(toy=options.toy, cuda=options.gpu, rounds=options.rounds)
    try:
        for name in names:
            print(f"{name}: {PARTS[name] if name in PARTS else cases[name].title} ...", flush=True)
            load, began, cpu = machine.load(), time.perf_counter(), suite.cpu_seconds()
            record = run_part(name, options.rounds, suite) if name in PARTS else suite.run(name, cases[name])
            record |= {
                "seconds": time.perf_counter() - began, "cpu_seconds": suite.cpu_seconds() - cpu,
                "commit": result["machine"]["commit"], "load": [load, machine.load()],
            }  # fmt: skip
            result["cases"] = {k: v for k, v in sorted((result["cases"] | {name: record}).items(), key=lambda item: _order(item[0]))}
            print(report.case_text(name, record), flush=True)
            result["gemm_gflops"] |= {" ".join(k): v / 1e9 for k, v in suite.peaks.items()}
            report.write(result, options.out)  # as they come: a run that is cut short leaves what it has
    finally:
        suite.close()
    print(report.summary(result))
    return 1 if any(record["failed"] for record in result["cases"].values()) else 0


def _order(name: str) -> tuple[int, str]:
    number = name[1:].split("-")[0]
    return (int(number) if number.isdigit() else 99, name)


if __name__ == "__main__":
    sys.exit(main())
