"""deltune launch -n N [--] train|eval [FILE.yaml] [key=value ...]

Starts N processes of one run on this machine with torch's launcher. The config is checked once before any of them
starts; the first process that fails ends the others, and its exit code is the launcher's. Choose an engine for several
processes in the config: engine=ddp. On several machines start torch.distributed.run on each, with
`-m deltune.cli train ...` behind its own options.
"""

from __future__ import annotations

import logging
import os
import sys

from deltune.errors import ConfigError, DeltuneError

VERBS = {"train": "Run", "eval": "EvalSettings"}  # and the class of their settings


def main(argv: list[str]) -> int:
    """Run the processes; returns 0 if all of them ended well, else the exit code of the first that did not."""
    if any(word in ("-h", "--help") for word in argv[:3]):
        print((__doc__ or "").strip())
        return 0
    num_processes, words = read_arguments(argv)
    check(words, num_processes)
    return launch(num_processes, words)


def read_arguments(argv: list[str]) -> tuple[int, list[str]]:
    """The number of processes and the words of the command to start in each."""
    rest = list(argv)
    usage = "usage: deltune launch -n 2 train my.yaml engine=ddp"
    if len(rest) < 2 or rest[0] != "-n":
        raise ConfigError(f"launch: -n and the number of processes come first; {usage}")
    if not rest[1].isdecimal() or int(rest[1]) < 1:
        raise ConfigError(f"launch: -n {rest[1]}: must be a whole number, at least 1; {usage}")
    words = rest[2:]
    if words[:1] == ["--"]:
        words = words[1:]
    if not words:
        raise ConfigError(f"launch: the command to start is missing; {usage}")
    if words[0] not in VERBS:
        raise ConfigError(f"launch: {words[0]} runs in one process; {', '.join(VERBS)} can be launched")
    return int(rest[1]), words


def check(words: list[str], num_processes: int) -> None:
    """A fault in the config is told once, not by every process."""
    from deltune import settings

    if any(word in ("-m", "--multirun") for word in words):
        raise ConfigError("launch: a sweep cannot be launched; start its runs one by one")
    run = settings.load(getattr(settings, VERBS[words[0]]), *settings.split_file(words[1:]))
    if run.engine.name == "single" and num_processes > 1:
        raise ConfigError(f"launch: engine=single is for one process, and -n is {num_processes}; choose engine=ddp")


def launch(num_processes: int, words: list[str]) -> int:
    """Start the processes under torch's elastic agent, without restarts, and wait."""
    # without this every process would take all cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say ourselves who failed
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="deltune", max_restarts=0, monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "deltune.cli", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # a process ended by a signal has a negative code; shells know it as 128 + signal
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code not in (DeltuneError.exit_code, 128 + 2, 128 + 15):
            print(f"deltune: process {rank} of {num_processes} ended with exit code {code}, and the others were ended", file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
