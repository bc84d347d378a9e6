"""The peers' own environment: made by the suite on first use, with pip alone; what does not install is absent, and said.

torch comes first and by the pin of constraints.txt, since an unpinned torch pulls gigabytes of CUDA libraries.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / ".peers"
PYTHON = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
STAMP = FOLDER / ".installed"
COMPILED = {"TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "compiled")}  # a peer is compiled once, as it is installed once

# what must import for a kind of candidate to be there
IMPORTS = {
    "peft": "import peft, transformers", "trainer": "import peft; from transformers import Trainer",
    "nf4": "import peft, transformers, bitsandbytes", "trl": "from trl import SFTConfig, SFTTrainer", "litgpt": "import litgpt.lora",
    "liger": "import peft, liger_kernel.transformers", "unsloth": "import unsloth",
}  # fmt: skip


def install(cuda: bool = False) -> None:
    """Make the environment unless it is there as the pins say. Raises CalledProcessError if even torch cannot be had."""
    wanted = "".join(file.read_text() for file in sorted(HERE.glob("peers*.txt"))) + torch_pin() + f"\ncuda={cuda}"
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    print(f"installing the peers in {FOLDER.relative_to(HERE.parent)} (once) ...", flush=True)
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    pip(torch_pin())
    complaints = [pip("-r", str(HERE / "peers.txt"), torch_pin(), check=False),
                  pip("--no-deps", "-r", str(HERE / "peers_alone.txt"), check=False)]  # fmt: skip
    if cuda:
        complaints += [pip(name, torch_pin(), check=False) for name in lines(HERE / "peers_cuda.txt")]
    for complaint in filter(None, complaints):
        print(f"a peer cannot be installed: {complaint}", flush=True)
    STAMP.write_text(wanted)


def torch_pin() -> str:
    return next(line for line in lines(HERE.parent / "constraints.txt") if line.startswith("torch=="))


def lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]


def pip(*words: str, check: bool = True) -> str:
    """Install; the last line of pip's complaint, or nothing."""
    done = subprocess.run(
        [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check", *words], check=check, capture_output=True, text=True
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (errors[-1] if errors else done.stderr.strip()[-300:]) if done.returncode else ""


@functools.cache
def absent(kind: str) -> str | None:
    """Why a kind of peer cannot take part, or None."""
    if not PYTHON.exists():
        return "the peers' environment could not be made"
    done = subprocess.run([str(PYTHON), "-c", IMPORTS[kind]], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["does not import"])[-1][:200]


def versions() -> dict[str, str]:
    """Of the peers that are there."""
    names = ["torch", "transformers", "peft", "accelerate", "trl", "litgpt", "bitsandbytes", "liger_kernel", "unsloth"]
    code = (
        "import importlib.metadata as m, json\n"
        f"have = {{d.name.lower().replace('-', '_'): d.version for d in m.distributions() if d.name}}\n"
        f"print(json.dumps({{n: have[n] for n in {names!r} if n in have}}))"
    )
    if not PYTHON.exists():
        return {}
    import json

    return json.loads(subprocess.run([str(PYTHON), "-c", code], check=True, capture_output=True, text=True).stdout)
