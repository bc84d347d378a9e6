"""`deltune plan`: what a training run would be and need, by the same words as `deltune train`. Touches no weights.

Parameters, examples and steps are exact, unless data is too large to be tokenised at once; memory, time and disk are
estimates, and say from what.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from deltune import log

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from deltune.commands.estimate import Memory, Time
    from deltune.commands.survey import MicroBatches, Survey
    from deltune.commands.trial import Trial
    from deltune.settings import Run

NUM_REMEDIES = 3
MUCH_PADDING, MANY_CUT = 0.4, 0.05  # shares worth a word
HEAP_REMEDY = "MALLOC_MMAP_THRESHOLD_=1000000 in the environment"


@dataclass(frozen=True)
class Plan:
    """Everything that the page is written from."""

    run: Run
    recompute: str  # a name of recompute.KINDS, or auto where what it comes to cannot be told
    model: PreTrainedModel
    found: Survey
    shapes: MicroBatches
    why_padded: str  # where batches would be packed but for this
    num_steps: int
    device: torch.device
    memory: Memory | None  # None where the model's forward pass depends on its numbers: `unknown` says why
    free: float
    time: Time | None
    unknown: str
    trial: Trial | None  # None where none was asked for, or `not_tried` says why
    not_tried: str
    disk: dict[str, float]


def main(words: list[str], file: Path | None) -> int:
    """The verb."""
    from deltune.commands import foretold
    from deltune.settings import load_run

    run = load_run(words, file)
    log.set_up()
    plan = make(run, trial=True)
    print("\n".join(page(plan)))
    foretold.write(run, plan)
    return 0


def make(run: Run, *, trial: bool = False, clock: str = "perf_counter") -> Plan:
    """Work out a run; with `trial` time and memory are tried as well, in some seconds (by a clock of the module time). Raises what training would raise before its first step, as far as no weights are needed for it."""
    import torch

    from deltune.adapters.rules import gradient_rules, lr_ratios
    from deltune.commands import batching, estimate
    from deltune.commands.survey import survey
    from deltune.engines.engine import pick_device
    from deltune.models.dry_run import CostUnknown
    from deltune.models.load import check_pair, load_tokenizer
    from deltune.optim.groups import parameter_groups
    from deltune.optim.schedules import schedule

    device = pick_device(run.engine.device)
    if run.engine.threads is not None:
        torch.set_num_threads(run.engine.threads)  # what is timed here then holds there
    model = estimate.shapes_of(run)
    tokenizer = load_tokenizer(run.model)
    check_pair(model.config, tokenizer)
    parameter_groups(model.named_parameters(), run.optim, lr_ratios(model, run.optim.rule, run.optim.rule_ratio))
    gradient_rules(model, run.optim.rule)
    found = survey(run.data, tokenizer)
    settled = batching.settled(run.data, model, tokens=run.train.micro_batch_tokens, fast=run.fast)
    shapes = estimate.shapes_for(run, found, settled.name)
    num_steps = steps_of(run, found, shapes)
    schedule(run.schedule, num_steps)
    memory, time, unknown, settled_run = None, None, "", run
    try:
        settled_run = estimate.settle_recompute(run, model, shapes, device)
        memory = estimate.memory_of(settled_run, model, shapes, device)
        time = estimate.time_of(settled_run, model, found, shapes, num_steps, device)
    except CostUnknown as error:
        unknown = str(error)
    free, disk = estimate.free_memory(device), estimate.disk_of(run, model, num_steps)
    tried, not_tried = None, ""
    if trial and memory is not None and time is not None:
        from deltune.commands.trial import CannotTry, measure

        try:
            tried = measure(run, model, found, recompute=settled_run.model.recompute, num_steps=num_steps, seconds=time.step, need=memory.most, free=free, clock=clock)
            time = replace(time, step=tried.step)
        except CannotTry as error:
            not_tried = str(error)
    return Plan(
        run, settled_run.model.recompute, model, found, shapes, settled.why_padded, num_steps, device, memory, free, time,
        unknown, tried, not_tried, disk,
    )  # fmt: skip


def steps_of(run: Run, found: Survey, shapes: MicroBatches) -> int:
    """Optimizer steps of one process."""
    train, epochs = run.train, run.train.epochs or 1.0
    if train.steps is not None:
        return train.steps
    if train.micro_batch_tokens is not None and found.data is not None:
        from deltune.commands.batching import loader

        return loader(run, found.data, "packed", 0).num_steps(epochs)
    num_examples = max(1, round(epochs * found.examples_per_epoch))
    per_step = train.micro_batch if train.micro_batch_tokens is None else shapes.examples
    return math.ceil(num_examples / (per_step * train.accumulate))


# -- the page ---------------------------------------------------------------------------------------------------


def page(plan: Plan) -> Iterator[str]:
    """The plan, line by line."""
    yield "# the whole config, every default included"
    yield plan.run.to_yaml().rstrip()
    for title, lines in (
        ("Parameters", parameters(plan)), ("Data", data(plan)), ("Steps", steps(plan)), ("Computed", computed(plan)), (f"Memory ({plan.device})", memory(plan)),
        ("Time", time(plan)), ("Disk", disk(plan)), ("Look at", list(warnings(plan))),
    ):  # fmt: skip
        if lines:
            yield from ("", title, *(f"  {line}" for line in lines))


def parameters(plan: Plan) -> list[str]:
    from deltune.models import kbit
    from deltune.models.select import parameter_table
    from deltune.training.display import aligned, count

    rows = parameter_table(plan.model)
    total = {"module": "all", **{key: sum(row[key] for row in rows) for key in ("tensors", "trainable", "total")}}
    cells = [[row["module"], f"{row['tensors']:,}", f"{row['trainable']:,}", f"{row['total']:,}"] for row in (*rows, total)]
    share = 100 * total["trainable"] / total["total"]
    return [
        *aligned([["module", "tensors", "trainable", "total"], *cells]),
        f"{count(total['trainable'])} of {count(total['total'])} are trained ({share:.2g} %)",
        _arithmetic(plan),
        *kbit.told(plan.model),
    ]


def _arithmetic(plan: Plan) -> str:
    from deltune.commands.arithmetic import meant

    stored, asked = str(plan.model.dtype).removeprefix("torch."), plan.run.engine.precision
    name = meant(plan.run, plan.model, plan.device).name
    return f"weights are stored in {stored} and multiplied {'in that type' if name == 'fp32' else f'under autocast in {name}'} (engine.precision={asked})"


def data(plan: Plan) -> list[str]:
    found = plan.found
    about = "about " if found.sampled else ""
    lines = [f"{source.name}: {source.format}, template {source.template}" for report in found.reports for source in report.sources]
    lines.append(f"{about}{found.num_rows:,} rows give {about}{found.examples_per_epoch:,} examples an epoch")
    if found.num_evaluation:
        lines.append(f"{about}{found.num_evaluation:,} examples for evaluation, {found.evaluation_length:.0f} tokens on average")
    lines.append(f"an example has {found.mean_length:.0f} tokens, {found.mean_trained:.0f} of them trained; the longest has {found.lengths.max():,}")
    if found.sampled:
        from deltune.commands.survey import SAMPLE_ROWS

        lines.append(f"(told from the first {SAMPLE_ROWS:,} rows of each source; the longest may be longer)")
    return lines


def steps(plan: Plan) -> list[str]:
    train, shapes = plan.run.train, plan.shapes
    about = "about " if plan.found.sampled and train.steps is None else ""
    per_batch = train.micro_batch if train.micro_batch_tokens is None else shapes.examples
    epochs = plan.num_steps * per_batch * train.accumulate / plan.found.examples_per_epoch
    if train.micro_batch_tokens is None:
        size = f"{per_batch * train.accumulate:,} examples ({train.micro_batch} x {train.accumulate})"
    else:
        size = f"about {per_batch * train.accumulate:,.0f} examples ({train.micro_batch_tokens:,} tokens x {train.accumulate})"
    lines = [f"{about}{plan.num_steps:,} steps of {size}, {epochs:.3g} epochs"]
    if shapes.batching == "packed":
        unfilled = f", {shapes.unfilled:.1%} of the room left over" if shapes.capacity else ""
        lines.append(f"a micro-batch is packed: {shapes.examples:.3g} examples in a row of {shapes.seq:,.0f} tokens{unfilled}, none of them padding; at most {shapes.longest:,}")
    else:
        lines.append(f"a micro-batch is {shapes.size} x {shapes.seq:.0f} tokens, {shapes.padding:.0%} of them padding; at most {shapes.size} x {shapes.longest:,}")
    if plan.why_padded:
        lines.append(f"not packed: {plan.why_padded}")
    if plan.run.engine.name == "ddp":
        fewer = "" if train.steps is not None else ", and there are as many times fewer steps"
        lines.append(f"for one process; with deltune launch -n N a step has N times as many examples{fewer}")
    return lines


def computed(plan: Plan) -> list[str]:
    """What the settings that choose by themselves come to, what is computed together, and why the rest is not."""
    from deltune.commands import fast
    from deltune.models import head
    from deltune.optim.build import described

    asked = plan.run.model.gradient_checkpointing
    lines = [
        f"attention: {plan.model.config._attn_implementation} (model.attention={plan.run.model.attention})",
        f"batches: {plan.shapes.batching} (data.batching={plan.run.data.batching})",
        f"activations recomputed: {plan.recompute} (model.gradient_checkpointing={str(asked).lower()}; training tries a micro-batch)"
        if asked == "auto" else f"activations recomputed: {plan.recompute}",
    ]  # fmt: skip
    if moments := described(plan.run.optim, plan.device):
        lines.append(f"optimizer: {moments}")
    if plan.run.fast == "off":
        return [*lines, "everything else in its plain form: fast=off"]
    lines.append(f"loss: {head.describe(plan.model)}")
    if plan.run.engine.compile:
        return [*lines, "blocks: compiled, in their plain forms"]
    return [*lines, *fast.put(plan.model, adapted=plan.run.adapter is not None)]


def memory(plan: Plan) -> list[str]:
    from deltune.training.display import aligned
    from deltune.training.display import memory as written

    found = plan.memory
    if found is None:
        return [plan.unknown, f"free here: {written(plan.free)}"]
    rows = [[name, written(size)] for name, size in found.parts.items() if size]
    rows.append(["together, at the worst moment", written(found.least)])
    lines = aligned(rows)
    if found.heap:
        lines.append(f"the C library's heap can keep up to {written(found.heap)} more, so about {written(found.most)}")
    if plan.trial is not None and plan.trial.peak is not None:
        lines.append(f"largest resident size while it trains: {written(plan.trial.peak)} ({plan.trial.told()})")
    lines.append(f"free here: {written(plan.free)}")
    return lines


def time(plan: Plan) -> list[str]:
    from deltune.training.display import duration

    found = plan.time
    if found is None:
        return []
    lines = [f"about {duration(found.total(plan.num_steps))}: {plan.num_steps:,} steps of {duration(found.step)}"]
    if found.num_evaluations:
        lines[0] += f", {found.num_evaluations} evaluations of {duration(found.evaluation)}"
    if plan.run.eval.exact_match and found.num_evaluations:
        lines.append("not counted: generating the answers that eval.exact_match compares")
    if plan.trial is not None:
        return [*lines, f"a step: {plan.trial.told()}"]
    if plan.not_tried:
        lines.append(f"not tried: {plan.not_tried}")
    lines.append(f"an estimate, right within a factor of two or three; the device: {found.speed.origin}")
    return lines


def disk(plan: Plan) -> list[str]:
    from deltune.commands.estimate import free_disk
    from deltune.training.display import memory as written

    parts = ", ".join(f"{name} {written(size)}" for name, size in plan.disk.items())
    return [f"{parts}, in {plan.run.folder}", f"free there: {written(free_disk(plan.run.folder))}"]


# -- what to look at --------------------------------------------------------------------------------------------


def warnings(plan: Plan) -> Iterator[str]:
    """What is likely to go wrong, each with words that mend it."""
    from deltune.commands.estimate import free_disk
    from deltune.training.display import memory as written

    if plan.memory is not None and plan.memory.most > plan.free:
        yield from _too_large(plan, plan.memory)
    if sum(plan.disk.values()) > free_disk(plan.run.folder):
        yield f"the disk has less free than the {written(sum(plan.disk.values()))} that the run leaves: checkpoint.save_total_limit, or output=another folder"
    cut = sum(report.truncated for report in plan.found.reports) / max(1, sum(report.used for report in plan.found.reports))
    if cut > MANY_CUT:
        limits = ("max_length", "max_source_length", "max_target_length")
        stated = ", ".join(f"data.{name}={value}" for name in limits if (value := getattr(plan.run.data, name)) is not None)
        yield f"{cut:.0%} of the rows are cut to {stated}: {'larger ones keep' if ',' in stated else 'a larger one keeps'} them whole"
    lost = sum(report.rejected + report.overlong for report in plan.found.reports)
    if lost:
        yield f"{lost:,} of the rows looked at cannot be used: deltune preview names the first"
    if plan.shapes.padding > MUCH_PADDING and plan.shapes.batching == "padded":
        mended = "data.batching=auto joins examples without padding"
        if plan.why_padded:
            mended = "" if plan.run.data.streaming else "data.batching=grouped puts examples of like length together"
        if mended:
            yield f"{plan.shapes.padding:.0%} of the work is padding: {mended}"


def _too_large(plan: Plan, needed: Memory) -> Iterator[str]:
    from deltune.commands.estimate import fitting
    from deltune.training.display import memory as written

    surely = "needs" if needed.least > plan.free else "may need"
    yield f"the run {surely} {written(needed.most)} of memory, and {written(plan.free)} are free. What fits:"
    remedies = [f"  {words}  ({written(found.most)})" for words, found in islice(fitting(replace(plan.run, model=replace(plan.run.model, gradient_checkpointing=plan.recompute)), plan.found, plan.shapes.batching, plan.device, plan.free), NUM_REMEDIES)]
    if needed.least <= plan.free:
        remedies.insert(0, f"  {HEAP_REMEDY}  ({written(needed.least)}, some time)")
    yield from remedies[:NUM_REMEDIES] or ["  nothing that leaves model and data as they are; a smaller model, or a larger device"]


