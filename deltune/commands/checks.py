"""What `deltune doctor` tries, section by section. A check never raises for what it looks for: that is its finding.

States: ok; absent (optional, or not on this machine); note (works, but look at it); broken (a run needs it).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIN_PYTHON = (3, 11)
LITTLE_DISK, LITTLE_MEMORY = 2e9, 1e9  # bytes
PROCESS_SECONDS, HUB_SECONDS = 60, 3


@dataclass(frozen=True)
class Check:
    name: str
    state: str
    found: str
    remedy: str = ""


def sections(*, quick: bool = False) -> dict[str, list[Check]]:
    """All checks by section. `quick` leaves out processes and network."""
    found = {"Software": list(software())}
    if any(check.state == "broken" and check.name in ("torch", "transformers") for check in found["Software"]):
        return found  # nothing else can be tried
    found["Devices"] = list(devices())
    found["Types (matrix product, forward and backward)"] = list(types())
    found["Attention"] = list(attention())
    found["Engines"] = list(engines(quick))
    found["Places"] = list(places())
    found["Models and hub"] = list(models(quick))
    return found


# -- software ---------------------------------------------------------------------------------------------------


def software() -> Iterator[Check]:
    """Python and every package that ours asks for, by its own metadata."""
    python = ".".join(map(str, sys.version_info[:3]))
    needed = ".".join(map(str, MIN_PYTHON))
    if sys.version_info[:2] >= MIN_PYTHON:
        yield Check("python", "ok", python)
    else:
        yield Check("python", "broken", python, f"install Python {needed} or newer")
    for requirement in importlib.metadata.requires("deltune") or []:
        found = package(requirement)
        if found is not None:
            yield found


def package(requirement: str) -> Check | None:
    """One required or optional package; None for those that only developers need."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    extra = next((name for name in ("hub", "wandb", "mlflow", "trackio") if wanted.marker and wanted.marker.evaluate({"extra": name})), None)
    if wanted.marker is not None and extra is None:
        return None
    install = f"pip install '{wanted.name}{wanted.specifier}'" if extra is None else f"pip install 'deltune[{extra}]'"
    missing = "broken" if extra is None else "absent"
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(wanted.name, missing, "not installed" + (f", optional ({extra})" if extra else ""), install)
    if not wanted.specifier.contains(version, prereleases=True):
        return Check(wanted.name, "broken" if extra is None else "note", f"{version}; {wanted.specifier} is needed", install)
    fault = _fault_of_import(wanted.name) if wanted.name in ("torch", "transformers") else ""
    if fault:
        return Check(wanted.name, "broken", f"{version} cannot be imported: {fault}", "install it anew; the message says what it lacks")
    return Check(wanted.name, "ok", version)


def _fault_of_import(name: str) -> str:
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:  # a missing shared library is an OSError
        return _line(error)
    return ""


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200] + (" …" if len(text) > 200 else "")


# -- devices ----------------------------------------------------------------------------------------------------


def devices() -> Iterator[Check]:
    import psutil
    import torch

    from deltune.training.display import memory

    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    cores, threads = _usable_cores(), torch.get_num_threads()
    found = f"{platform.machine()}, cores to use: {cores:g}, threads of torch: {threads}; {memory(total)} of memory, {memory(free)} free"
    if threads > cores + 0.5:
        yield Check("cpu", "note", found, f"more threads than cores slow each other down: engine.threads={max(1, int(cores))}")
    elif free < LITTLE_MEMORY:
        yield Check("cpu", "note", found, "little memory is free: end other programs")
    else:
        yield Check("cpu", "ok", found)
    yield from _cuda()
    if torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple GPU")


def _cuda() -> Iterator[Check]:
    import torch

    from deltune.training.display import memory

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        found = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}, {memory(total)}, {memory(free)} free"
        yield Check(f"cuda:{index}", "ok", found)
    if torch.cuda.device_count() or shutil.which("nvidia-smi") is None:
        return
    if torch.version.cuda is None:
        yield Check("cuda", "note", "nvidia-smi is here, but this torch is built for CPUs", "install torch's CUDA build, see pytorch.org")
    else:
        yield Check("cuda", "note", f"nvidia-smi is here, but torch (CUDA {torch.version.cuda}) sees no GPU", "a newer driver, or CUDA_VISIBLE_DEVICES unset")


def _usable_cores() -> float:
    """Cores that this process may use: by its affinity, and by the quota of its container."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, _, period = quota.read_text().strip().partition(" ")
        if allowed != "max":
            cores = min(cores, int(allowed) / int(period))
    return cores


def _all_devices() -> list[torch.device]:
    import torch

    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found.append(torch.device("cuda"))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def _tried(name: str, action: Callable[[], str], remedy: str, *, state: str = "absent") -> Check:
    """The finding of an action, or why it cannot be. Torch says what a device cannot do by these kinds of error."""
    try:
        return Check(name, "ok", action())
    except (RuntimeError, NotImplementedError, ImportError, OSError, ValueError) as error:
        return Check(name, state, _line(error), remedy)


def types() -> Iterator[Check]:
    """Each engine.precision on each device, with the rate of a product."""
    from deltune.models.cost import PRECISIONS

    for device in _all_devices():
        single = 0.0
        for precision, dtype in PRECISIONS.items():
            try:
                rate = _product(device, dtype)
            except (RuntimeError, NotImplementedError) as error:
                state = "broken" if precision == "fp32" else "absent"
                yield Check(f"{precision} on {device.type}", state, _line(error), "another engine.precision")
                continue
            single = single or rate
            found = f"{rate / 1e9:,.3g} GFLOP/s"
            if rate > 0.8 * single:
                yield Check(f"{precision} on {device.type}", "ok", found)
            else:
                remedy = "this processor has no instructions for it: engine.precision=fp32 is faster"
                yield Check(f"{precision} on {device.type}", "note", f"{found}, slower than fp32", remedy)


def _product(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s after a layer has gone forward and backward in this type."""
    import torch

    from deltune.models.cost import measured_matmul_flops

    x = torch.ones(8, 8, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32):
        loss = torch.nn.functional.linear(x, x).float().sum()
    loss.backward()
    return measured_matmul_flops(device, dtype, size=256 if device.type == "cpu" else 4096, seconds=0.02)


def attention() -> Iterator[Check]:
    """Each model.attention by a step of a tiny model."""
    import torch

    fastest = _all_devices()[-1]
    for name in ("segment", "sdpa", "eager", "flash_attention_2", "flex_attention"):
        dtype = torch.bfloat16 if name == "flash_attention_2" else torch.float32
        if name in ("flash_attention_2", "flex_attention") and fastest.type != "cuda":
            yield Check(name, "absent", "trains on CUDA devices only")
            continue
        remedy = "pip install flash-attn, or model.attention=sdpa" if name == "flash_attention_2" else "model.attention=sdpa"
        yield _tried(name, lambda name=name, dtype=dtype: _step(name, fastest, dtype), remedy, state="broken" if name in ("segment", "sdpa") else "absent")


def _step(name: str, device: torch.device, dtype: torch.dtype) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from deltune.models.attention import register
    from deltune.models.load import quiet_transformers

    register()
    shape = LlamaConfig(vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with quiet_transformers():
        model = LlamaForCausalLM._from_config(shape, dtype=dtype, attn_implementation=name).to(device)
    ids = torch.ones(2, 16, dtype=torch.long, device=device)
    mask = ids.clone()
    mask[0, 8:] = 0
    model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().sum().backward()
    return f"on {device.type}"


# -- engines ----------------------------------------------------------------------------------------------------

PEER = """
import torch, torch.distributed as group
group.init_process_group("gloo")
x = torch.ones(3) * (group.get_rank() + 1)
group.all_reduce(x)
assert x.tolist() == [3.0, 3.0, 3.0], x
group.destroy_process_group()
"""


def engines(quick: bool) -> Iterator[Check]:
    import torch
    import torch.distributed as group

    yield Check("single", "ok", "one process")
    if not group.is_available():
        yield Check("ddp", "absent", "this torch is built without torch.distributed", "another build of torch")
        return
    if quick:
        yield Check("ddp with gloo", "ok" if group.is_gloo_available() else "absent", "available, not tried (quick=true)")
    else:
        yield _tried("ddp with gloo", two_processes, "the name of this machine must lead to it (/etc/hosts), or set GLOO_SOCKET_IFNAME=lo", state="note")
    count = torch.cuda.device_count()
    if count and group.is_nccl_available():
        yield Check("ddp with nccl", "ok", f"{count} device{'s' if count > 1 else ''}")
    else:
        yield Check("ddp with nccl", "absent", "needs CUDA devices")


def two_processes() -> str:
    """Two processes that sum a tensor. Raises OSError with what the first that failed said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    surroundings = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    peers = [
        subprocess.Popen([sys.executable, "-c", PEER], env=surroundings | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [peer.communicate(timeout=PROCESS_SECONDS)[1] for peer in peers]
    except subprocess.TimeoutExpired:
        raise OSError(f"two processes did not find each other in {PROCESS_SECONDS} s") from None
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
    for peer, text in zip(peers, said, strict=True):
        if peer.returncode:
            raise OSError((text.strip().splitlines() or [f"exit code {peer.returncode}"])[-1])
    return "two processes summed a tensor"


# -- places, models, hub ----------------------------------------------------------------------------------------


def places() -> Iterator[Check]:
    """Folders that runs write to."""
    from deltune.data.cache import cache_folder
    from deltune.settings import Run

    tokens = cache_folder("auto")
    yield _place("runs", Path(Run().output), "output=another folder", needed=True)
    if tokens is not None:
        yield _place("token cache", tokens, "data.cache=another folder, or DELTUNE_CACHE")


def _place(name: str, folder: Path, remedy: str, *, needed: bool = False) -> Check:
    from deltune.commands.estimate import free_disk
    from deltune.training.display import memory

    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            _lock(file.fileno())
    except OSError as error:
        return Check(name, "broken" if needed else "note", f"{folder}: cannot write or lock files in {place} ({error.strerror})", remedy)
    free = free_disk(folder)
    found = f"{folder}: {memory(free)} free"
    return Check(name, "note", found, remedy) if free < LITTLE_DISK else Check(name, "ok", found)


def _lock(descriptor: int) -> None:
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def models(quick: bool) -> Iterator[Check]:
    from huggingface_hub import constants

    from deltune.errors import ModelError
    from deltune.models.config import ModelConfig
    from deltune.models.folder import BUNDLED, weight_files
    from deltune.models.load import load_tokenizer

    try:
        size = sum(file.stat().st_size for file in weight_files(BUNDLED, "bundled"))
        yield Check("bundled model", "ok", f"{size / 1e6:.1f} MB, {len(load_tokenizer(ModelConfig()))} tokens")
    except ModelError as error:
        yield Check("bundled model", "note", _line(error), "install the package anew")
    cache = Path(constants.HF_HUB_CACHE)
    held = len(list(cache.glob("models--*")))
    yield Check("models in the cache", "ok" if held else "absent", f"{held} in {cache}")
    if constants.HF_HUB_OFFLINE:
        yield Check("hub", "absent", "HF_HUB_OFFLINE is set: only folders and the cache are used")
    elif quick:
        yield Check("hub", "absent", "not asked (quick=true)")
    else:
        yield _tried("hub", lambda: _asked(constants.ENDPOINT), "model folders, `bundled` and the cache work without it")


def _asked(address: str) -> str:
    """Any answer will do. Raises OSError (which urllib's errors are) if there is none."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        return f"{address} answers ({error.code})"
    return f"{address} answers"


