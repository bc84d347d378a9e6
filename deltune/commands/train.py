"""`deltune train`: the parts put together, read top to bottom; `train(config)` is the same from Python.

Order matters in three places. The folder is locked before anything is read from it. Everything random starts from
run.seed right before the first step, so that evaluations beforehand change nothing. A checkpoint is loaded last.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune import dist, log
from deltune.commands.run_folder import completed, owned
from deltune.errors import CheckpointError, EngineError
from deltune.log import logger

if TYPE_CHECKING:
    from deltune.settings import Run
    from deltune.training.callbacks import Callback, Outcome, RunInfo, Sample, StepRecord
    from deltune.training.config import EvalConfig
    from deltune.training.loop import Loop
    from deltune.training.loss import ForwardStep
    from deltune.training.state import Saver


def main(words: list[str], file: Path | None) -> int:
    """The verb."""
    from deltune.settings import load_run

    run = load_run(words, file)
    log.set_up()
    outcome = train(run)
    if dist.is_main():
        print_next_steps(run, outcome)
    return 0


def train(
    config: Run | Mapping[str, Any] | str | Path | Sequence[str],
    *,
    callbacks: Sequence[Callback] = (),
    forward_step: ForwardStep | None = None,
    eval_step: ForwardStep | None = None,
    task_print: Callable[[StepRecord], str] | None = None,
) -> Outcome:
    """Train as a config says and return how it went, with the model in `outcome.model`.

    `config` is a Run, a mapping (nested or with dotted keys), a YAML file or a list of command-line words.
    `forward_step(model, batch)` returns the loss summed over the batch's trained tokens, or that and a dict of
    scalars to log; `eval_step` is the same for evaluation; `task_print(record)` returns text for the log of a step.
    Raises a DeltuneError for whatever a user can mend, Interrupted after a signal, NumericsError when numbers break.
    """
    from deltune.engines.build import build
    from deltune.settings import run_from

    run = run_from(config)
    engine = build(run.engine)
    try:
        with owned(run), peers_watched():
            done = completed(run)
            if done is not None:
                return done
            session = Session(run, engine, forward_step, eval_step, task_print)
            return session.go(callbacks)
    finally:
        engine.close()


@contextmanager
def peers_watched() -> Iterator[None]:
    """A collective that breaks because a peer died becomes one message."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")
        if dist.world_size() > 1 and any(sign in text for sign in lost):
            raise EngineError(
                "another process of this run has died, so this one stops too. The last checkpoint stands: look at the first "
                "error above, then start the same command again."
            ) from None
        raise


# -- one run ----------------------------------------------------------------------------------------------------


class Session:
    """Everything of one run between the lock and the report."""

    def __init__(
        self, run: Run, engine: Any, forward_step: ForwardStep | None, eval_step: ForwardStep | None,
        task_print: Callable[[StepRecord], str] | None,
    ):
        self.run, self.engine = run, engine
        self.forward_step, self.eval_step, self.task_print = forward_step, eval_step, task_print
        self.last_eval: tuple[int, dict[str, float]] | None = None
        self.foretold: dict[str, dict[str, float]] = {}  # and found, for each quantity that plan told of

    def go(self, callbacks: Sequence[Callback]) -> Outcome:
        began = time.perf_counter()
        self.callbacks = [*self.own_callbacks(), *callbacks]
        try:
            self.load_data()
            self.load_model()
            loop = self.build_loop()
            self.start(loop)
            stopped_by = loop.run()
            self.compare(loop)
            outcome = self.finish(loop, stopped_by, time.perf_counter() - began)
            for callback in self.callbacks:
                callback.on_end(outcome)
        finally:
            for callback in self.callbacks:
                callback.close()
        if dist.is_main():
            self.write_ending(loop, outcome)
        dist.barrier()
        return outcome

    def own_callbacks(self) -> list[Callback]:
        """Records, sinks and console: made first, so that a sink whose package is missing stops the run at once."""
        from deltune.training.console import Console
        from deltune.training.metrics import MetricsFile
        from deltune.training.sinks import build_sinks

        log = self.run.log
        own = [MetricsFile(self.run.folder / "metrics.jsonl"), *build_sinks(log), Console(log)]
        return own if self.task_print is None else [*own, task_printer(self.task_print)]

    def load_data(self) -> None:
        """Tasks, tokenizer and tokens; rank 0 first, so that the others find its cache."""
        from deltune.commands import new_tokens
        from deltune.commands.tasks import Exams
        from deltune.data.prepare import prepare
        from deltune.models.load import load_tokenizer

        self.exams = Exams(self.run)
        self.tokenizer = load_tokenizer(self.run.model)
        dist.on_main(lambda: new_tokens.record(self.run))
        if dist.is_main():
            self.data = prepare(self.run.data, self.tokenizer, folder=self.run.folder)
        dist.barrier()
        if not dist.is_main():
            self.data = prepare(self.run.data, self.tokenizer, folder=None)

    def load_model(self, depth: int | None = None) -> None:
        """Weights in place, and it is settled which of them move, and how batches are made for them. With `depth` random
        weights of so many blocks."""
        from deltune.commands import arithmetic, fast, new_tokens
        from deltune.commands.batching import of_run
        from deltune.models.head import described
        from deltune.models.kbit import told
        from deltune.models.load import check_pair, load
        from deltune.models.select import parameter_table

        run = self.run
        self.fast = run.fast == "auto"
        model = load(run.model, device="cpu", seed=run.seed, fast=self.fast, depth=depth, quant=run.quant)
        check_pair(model.config, self.tokenizer)
        self.engine.compute_in(arithmetic.of_run(run, model, self.engine.device))
        new_tokens.set_moving(run, model)
        self.model = self.engine.place(model)
        if run.engine.compile:
            from deltune.models.compiled import compile_blocks

            logger.info("%s", compile_blocks(self.model, self.engine.device))
        elif self.fast:
            for line in fast.put(self.model, adapted=run.adapter is not None):
                logger.info("%s", line)
        self.parameter_table = parameter_table(self.model)
        for line in told(self.model):
            logger.info("%s", line)
        self.head = described(self.model) if self.fast else None
        self.batching = of_run(run, self.model, own_step="forward_step" if self.forward_step else "")
        self.eval_batching = of_run(run, self.model, own_step="eval_step" if self.eval_step else "")

    def build_loop(self) -> Loop:
        from functools import partial

        from deltune.adapters.attach import extra_loss
        from deltune.adapters.rules import gradient_rules, lr_ratios
        from deltune.optim.build import build_optimizer
        from deltune.optim.groups import parameter_groups
        from deltune.optim.schedules import schedule
        from deltune.training.loop import Loop
        from deltune.training.loss import LossStep

        run, engine = self.run, self.engine
        loader = self.loader()
        num_steps = run.train.steps or loader.num_steps(run.train.epochs or 1.0)
        ratios = lr_ratios(self.model, run.optim.rule, run.optim.rule_ratio)
        optimizer = build_optimizer(parameter_groups(self.model.named_parameters(), run.optim, ratios), run.optim)
        self.schedules, rates = self.over_time(optimizer, lambda steps: schedule(run.schedule, steps), num_steps)
        return Loop(
            self.model, loader=loader, optimizer=optimizer, schedule=rates, engine=engine,
            info=self.describe(num_steps), train=run.train, eval=self.eval_config(), checkpoint=run.checkpoint,
            max_grad_norm=run.optim.max_grad_norm, saver=self.saver(),
            evaluate=self.evaluate if self.evaluates else None, callbacks=self.callbacks,
            forward_step=self.forward_step or LossStep(self.head), log_every=run.log.every, schedules=self.schedules,
            extra_loss=partial(extra_loss, self.model), gradient_rules=gradient_rules(self.model, run.optim.rule),
        )

    def loader(self) -> Any:
        from deltune.commands import batching

        engine = self.engine
        return batching.loader(self.run, self.data.train, self.batching.name, self.tokenizer.pad_token_id, rank=engine.rank, world_size=engine.world_size)

    def saver(self) -> Saver | None:
        from deltune.training.checkpoints import CheckpointStore
        from deltune.training.state import Saver

        return Saver(CheckpointStore(self.run.folder / "checkpoints", self.run.checkpoint.save_total_limit), self.schedules)

    def over_time(self, optimizer: Any, make: Callable[[int], Any], num_steps: int) -> tuple[list[Any], Callable[[int], float]]:
        """What the adapter does over time, and the learning rate's factor at each step."""
        run = self.run
        if run.adapter is None or not run.adapter.schedule:
            return [], make(num_steps)
        from deltune.adapters.schedules import over_time, rates

        return [over_time(self.model, optimizer, seed=run.seed)], rates(run.adapter.schedule, make, num_steps)

    def describe(self, num_steps: int) -> RunInfo:
        from deltune.commands.describe_run import description
        from deltune.models.cost import arithmetic as multiplied_in
        from deltune.models.cost import device_peak_flops, flops_per_token
        from deltune.training.callbacks import RunInfo

        run = self.run
        counts = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        peak = run.log.peak_tflops * 1e12 if run.log.peak_tflops else device_peak_flops(self.engine.device, multiplied_in(self.engine.precision, self.model.dtype))
        report = self.data.report
        length = report.tokens / report.examples if report.examples else run.data.max_length / 2
        return RunInfo(
            folder=run.folder, name=run.folder.name, num_steps=num_steps, start_step=0,
            num_trainable=sum(n for n, moves in counts if moves), num_parameters=sum(n for n, _ in counts),
            config=run.to_dict(), parameter_table=self.parameter_table,
            flops_per_token=flops_per_token(self.model, length), peak_flops=peak,
            description=description(run, self.engine, self.data, self.model, self.batching),
        )

    # -- before the first step ------------------------------------------------------------------------------------

    def start(self, loop: Loop) -> None:
        """Numbers before training, the newest checkpoint, the records up to it, and everyone told."""
        from deltune.training import randomness

        run = self.run
        before_file = run.folder / "before.json"
        # rank 0 answers for all: it may write the file before another rank has looked
        fresh = dist.on_main(lambda: not before_file.exists())
        if fresh:
            self.before = self.measure_before()
        randomness.seed_all(run.seed + dist.rank())
        complaints = loop.resume()
        if run.quant.name != "none":
            from deltune.adapters.quantised import follow_starts

            follow_starts(self.model)
        if not fresh:
            self.before = json.loads(before_file.read_text(encoding="utf-8"))
        if run.resume == "must" and loop.progress.step == 0:
            raise CheckpointError(f"{run.folder}: resume=must, but no checkpoint is whole: " + "; ".join(complaints))
        self.settle_recompute(loop)
        described = loop.info.description | {"recompute": {"kind": loop.progress.recompute, "reason": self.recompute_reason}}
        loop.info = dataclasses.replace(loop.info, start_step=loop.progress.step, description=described)
        self.engine.restart_peak_memory()  # of what was before the first step nothing counts
        for callback in self.callbacks:
            callback.on_start(loop.info)
        for complaint in complaints:
            loop.event(f"passed over a damaged checkpoint: {complaint}")
        if loop.progress.step:
            loop.event(f"resumed after step {loop.progress.step}")
        if self.before["metrics"] and not self.before_is_told():
            self.tell_before()

    def settle_recompute(self, loop: Loop) -> None:
        """Which blocks recompute their activations: as the checkpoint has it, else as asked for, or by a trial."""
        from deltune.commands import recompute
        from deltune.models.recompute import apply
        from deltune.optim.build import state_bytes

        if loop.progress.recompute:
            self.recompute_reason = "as in the checkpoint"
            apply(self.model, loop.progress.recompute)
        else:
            run, device = self.run, self.engine.device
            batch, small = recompute.trial_batches(run, self.data.train, self.batching.packed, self.tokenizer.pad_token_id)
            chosen = recompute.settle(
                run, self.model, self.engine, forward_step=loop.forward_step, own_step=self.forward_step is not None, batch=batch,
                small=small, state_bytes=state_bytes(loop.parameters, run.optim), free=recompute.free_for_one(device),
            )  # fmt: skip
            loop.progress.recompute, self.recompute_reason = chosen.kind, chosen.reason
        logger.info("activations recomputed: %s (%s)", loop.progress.recompute, self.recompute_reason)

    def measure_before(self) -> dict[str, Any]:
        from deltune.training.storage import write_json

        metrics: dict[str, float] = {}
        samples: list[dict[str, str]] = []
        if self.evaluates and self.run.eval.at_start:
            metrics = self.evaluate()
            samples = self.samples()
        before = {"metrics": metrics, "samples": samples}
        dist.on_main(lambda: write_json(self.run.folder / "before.json", before))
        return before

    def before_is_told(self) -> bool:
        """Whether metrics.jsonl has the evaluation before the first step; every rank answers as rank 0."""
        from deltune.training.metrics import read

        lines = dist.on_main(lambda: read(self.run.folder / "metrics.jsonl"))
        return any(line["kind"] == "eval" and line["step"] == 0 for line in lines)

    def tell_before(self) -> None:
        from deltune.training.callbacks import EvalRecord

        for callback in self.callbacks:
            callback.on_eval(EvalRecord(0, self.before["metrics"], is_best=False, seconds=0.0))

    # -- evaluation -------------------------------------------------------------------------------------------------

    @property
    def evaluates(self) -> bool:
        return self.data.evaluation is not None or bool(self.run.eval.tasks)

    def eval_config(self) -> EvalConfig:
        """What the loop decides by: of a run with tasks alone, the first one's accuracy."""
        settings = self.run.eval
        if settings.metric != "auto" or self.data.evaluation is not None or not settings.tasks:
            return settings
        return dataclasses.replace(settings, metric=f"{self.exams.exams[0].name}_accuracy")

    def evaluate(self) -> dict[str, float]:
        """Metrics on the whole evaluation set and on tasks, over all ranks."""
        run, engine = self.run, self.engine
        metrics = {} if self.data.evaluation is None else self.evaluate_data()
        batch = run.eval.micro_batch or run.train.micro_batch
        return metrics | self.exams.measure(self.model, self.tokenizer, head=self.head, batch=batch, autocast=engine.autocast)

    def evaluate_data(self) -> dict[str, float]:
        from deltune.data.loader import eval_batches
        from deltune.evaluation.lm import evaluate

        run, engine = self.run, self.engine
        batches = eval_batches(
            self.data.evaluation, micro_batch=run.eval.micro_batch or run.train.micro_batch,
            micro_batch_tokens=None if run.eval.micro_batch else run.train.micro_batch_tokens, packed=self.eval_batching.packed,
            rank=engine.rank, world_size=engine.world_size, pad_id=self.tokenizer.pad_token_id,
        )
        measured = evaluate(self.model, batches, forward=self.eval_step, head=self.head, autocast=engine.autocast, device=engine.device)
        metrics = {name: value for name, value in measured.items() if not name.startswith("num_")}
        if run.eval.exact_match:
            score, self.answers = self.generate(limit=None)
            metrics["exact_match"] = score["exact_match"]
        return metrics

    def generate(self, limit: int | None) -> tuple[dict[str, float], list[dict[str, Any]]]:
        from deltune.evaluation.exact import exact_match
        from deltune.models.generation import GenerateOptions

        settings = self.run.eval
        options = GenerateOptions(max_new_tokens=settings.max_new_tokens)
        batch = settings.micro_batch or self.run.train.micro_batch
        with self.engine.autocast():
            return exact_match(self.model, self.tokenizer, self.data.evaluation, options, limit=limit, batch=batch)

    def samples(self) -> list[dict[str, str]]:
        """The first few evaluation prompts with their answers by the weights as they are."""
        count = self.run.eval.samples
        if count == 0 or self.data.evaluation is None:
            return []
        answers = self.answers if self.run.eval.exact_match else self.generate(limit=count)[1]
        return [{k: answer[k] for k in ("prompt", "reference", "prediction")} for answer in answers[:count]]

    def compare(self, loop: Loop) -> None:
        """With what plan foretold of this run, if it did."""
        from deltune.commands import foretold

        self.foretold = foretold.compared(self.run, loop)
        if self.foretold:
            loop.event(foretold.text(self.foretold))

    # -- after the last step ----------------------------------------------------------------------------------------

    def finish(self, loop: Loop, stopped_by: str, seconds: float) -> Outcome:
        """The best weights back in place, measured and exported."""
        from deltune.training.callbacks import Outcome, Sample
        from deltune.training.state import load_moving_tensors

        progress, store = loop.progress, loop.saver.store
        best = progress.best_step
        if best is not None and best != progress.step and self.run.checkpoint.load_best:
            load_moving_tensors(self.model, store.load(best).tensors["trainable"], self.schedules)
        after: dict[str, float] = {}
        samples: list[Sample] = []
        if self.evaluates:
            after = self.evaluate()
            old = self.before["samples"]
            samples = [
                Sample(s["prompt"], s["reference"], old[i]["prediction"] if i < len(old) else "", s["prediction"])
                for i, s in enumerate(self.samples())
            ]
        if self.run.adapter is not None and self.run.result == "model":
            from deltune.adapters.attach import merge

            merge(self.model)  # the base has moved, so the adapter alone is not what was trained
        exported = Path(dist.on_main(self.export))
        return Outcome(
            folder=self.run.folder, step=progress.step, stopped_by=stopped_by, metrics_before=self.before["metrics"],
            metrics_after=after, best_step=best, best_metric=progress.best_metric, adapter=exported, samples=samples,
            seconds=seconds, model=self.model, tokenizer=self.tokenizer,
        )

    def export(self) -> str:
        """The adapter as PEFT's files, or the whole model as a Hugging Face folder."""
        if self.run.result == "adapter":
            from deltune.adapters.files import save_adapter
            from deltune.commands.new_tokens import save_tokenizer

            save_adapter(self.model, self.run.folder / "adapter", base=self.run.model.path)
            save_tokenizer(self.run, self.tokenizer, self.run.folder / "adapter")
            return str(self.run.folder / "adapter")
        from deltune.models.load import save_model

        save_model(self.model, self.tokenizer, self.run.folder / "model")
        return str(self.run.folder / "model")

    def write_ending(self, loop: Loop, outcome: Outcome) -> None:
        """Samples, report, card; the mark of completion last."""
        from deltune.training.storage import write_json

        folder = self.run.folder
        write_json(folder / "samples.json", [vars(s) for s in outcome.samples])
        facts = {
            "step": outcome.step, "stopped_by": outcome.stopped_by, "best_step": outcome.best_step,
            "best_metric": outcome.best_metric, "metrics_before": outcome.metrics_before,
            "metrics_after": outcome.metrics_after, "seconds": outcome.seconds, "loss_chain": loop.progress.loss_chain,
            "foretold": self.foretold, "num_steps_asked": [self.run.train.steps, self.run.train.epochs],
        }
        write_json(folder / "completed.json", facts)
        if self.run.log.report:
            write_report_files(folder)


def write_report_files(folder: Path) -> None:
    """The loss curve, the model card and the report, from what the folder holds."""
    from deltune.training.card import write_card
    from deltune.training.plots import loss_png
    from deltune.training.report import write_report

    loss_png(folder)
    write_card(folder)
    write_report(folder)


def task_printer(task_print: Callable[[StepRecord], str]) -> Callback:
    """A callback that logs a user's own text for each step."""
    from deltune.training.callbacks import Callback

    class TaskPrint(Callback):
        def on_step(self, record: StepRecord) -> None:
            text = task_print(record)
            if text:
                logger.info("step %d  %s", record.step, text)

    return TaskPrint()


def print_next_steps(run: Run, outcome: Outcome) -> None:
    """The commands that a user most likely wants now."""
    folder = outcome.folder
    print(f"\n{run.result.capitalize()}: {outcome.adapter}")
    if run.log.report:
        print(f"Report: {folder / 'report.html'}")
    what = f"run={folder}"
    merges = run.result == "adapter" and not run.adapter.delta_class().no_matrix(run.adapter)
    print(
        "\nTry next:\n"
        f"  deltune chat {what}\n"
        f"  deltune eval {what}\n"
        f"  deltune {'merge ' + what + ' out=' + str(folder / 'merged') if merges else 'generate ' + what + ' prompt=...'}"
    )
