"""Finds a model's folder and looks it over before anything in it is loaded: what could run code, or is not a whole
safetensors model, is refused here with its remedy. Nothing here imports torch or transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from deltune.errors import ModelError

BUNDLED = Path(__file__).parent / "bundled"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LIGHT_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
# read for CODE_KEYS; tokenizer.json and its kin are left out, where any word may be a vocabulary entry
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find(path: str, revision: str | None = None, *, key: str = "model.path", weights: bool = True) -> Path:
    """The local folder of `bundled`, a folder or a hub id, scanned; a hub id is downloaded or taken from the cache.

    `weights` false fetches and asks for the light files only. Raises ModelError naming `key`.
    """
    if path == "bundled":
        if not (BUNDLED / "config.json").is_file():
            raise ModelError(
                f"{key}=bundled: this installation holds no bundled model at {BUNDLED}. "
                "What fits: reinstall the package, or name another model."
            )
        folder = BUNDLED
    else:
        folder = Path(path).expanduser()
        if folder.is_file():
            raise ModelError(
                f"{key}={path}: this is a file. What fits: the folder that holds config.json and the weights."
            )
        if not folder.is_dir():
            folder = _from_hub(path, revision, key, weights)
    folder = folder.resolve()
    scan(folder, f"{key}={path}")
    return folder


def _from_hub(path: str, revision: str | None, key: str, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = LIGHT_FILES + (["*.safetensors"] if weights else [])
    try:
        # subfolders hold other formats of the same weights; Python files are never fetched
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except HFValidationError:
        raise ModelError(
            f"{key}={path}: there is no such folder, and it is not a hub id (owner/name) either. "
            "What fits: an existing folder, a hub id, or `bundled`."
        ) from None
    except OSError as error:
        place = path if revision is None else f"{path} at revision {revision}"
        if constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, so the hub was not asked"
        else:
            reason = f"the hub did not give it ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
        raise ModelError(
            f"{key}={path}: not a folder here, not in the cache ({place} in {constants.HF_HUB_CACHE}), and {reason}. "
            f"What fits: a model folder, `bundled`, or once with network: hf download {path}"
        ) from None


def scan(folder: Path, where: str) -> None:
    """Refuse a folder that asks for code of its own, holds Python files, or has links that leave it."""
    root = folder.resolve()
    for name in SETTINGS_FILES:
        if (root / name).is_file():
            found = _code_key(read_json(root / name, where))
            if found is not None:
                raise ModelError(
                    f"{where}: {name} sets {found}, which asks for code from the model folder. Deltune never runs "
                    "a model's own code. "
                    "What fits: a model whose type transformers knows, with that key and the *.py files removed "
                    "from a copy of the folder."
                )
    allowed = [root]
    if root.parent.name == "snapshots":  # the hub's cache: files are links into its blobs
        allowed.append(root.parent.parent / "blobs")
    for parent, folders, files in os.walk(root):
        for name in sorted(folders + files):
            entry = Path(parent) / name
            if entry.is_symlink() and not any(entry.resolve().is_relative_to(place) for place in allowed):
                raise ModelError(
                    f"{where}: {entry.relative_to(root)} is a link that leaves the folder, to {entry.resolve()}. "
                    "What fits: a copy of the file in its place."
                )
            if name.endswith(".py"):
                raise ModelError(
                    f"{where}: the folder holds Python code, {entry.relative_to(root)}. Deltune never runs a "
                    "model's own code. What fits: a copy of the folder without *.py files, if transformers knows "
                    "the model's type."
                )


def _code_key(value: Any) -> str | None:
    """The first key, at any depth, that asks for custom code."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in CODE_KEYS and inner:
                return key
            found = _code_key(inner)
            if found is not None:
                return found
    if isinstance(value, list):
        return next((found for found in map(_code_key, value) if found is not None), None)
    return None


def read_json(file: Path, where: str) -> dict[str, Any]:
    """A JSON object; ModelError with line and column if it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ModelError(f"{where}: {file.name} is not UTF-8 text (byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{where}: {file.name} line {error.lineno}, column {error.colno}: not JSON ({error.msg})."
        ) from None
    except RecursionError:
        raise ModelError(f"{where}: {file.name} is nested too deep to be read.") from None
    if not isinstance(value, dict):
        raise ModelError(f"{where}: {file.name} holds a {type(value).__name__}; expected a JSON object.")
    return value


def missing_config(folder: Path, where: str) -> ModelError:
    """Why a folder without config.json is no model, from what else lies in it."""
    names = sorted(entry.name for entry in folder.iterdir())
    if "adapter_config.json" in names:
        try:
            base = read_json(folder / "adapter_config.json", where).get("base_model_name_or_path")
        except ModelError:
            base = None
        return ModelError(
            f"{where}: this folder is an adapter, not a model. "
            f"What fits: model.path={base or '<its base model>'} adapter={folder}"
        )
    for inner in ("model", "adapter"):
        if (folder / inner).is_dir() and (folder / "config.yaml").is_file():
            return ModelError(f"{where}: this is the folder of a run. What fits: its {inner} in {folder / inner}")
    if any(name.endswith(".gguf") for name in names):
        return ModelError(
            f"{where}: the folder holds GGUF weights and no config.json. What fits: the model's safetensors folder."
        )
    shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
    return ModelError(
        f"{where}: no config.json in it; found {shown or 'nothing'}. "
        "What fits: a Hugging Face model folder (config.json, *.safetensors, tokenizer files)."
    )


def weight_files(folder: Path, where: str) -> list[Path]:
    """The safetensors files of the model, each with a whole header and the length that its header says."""
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        shards = read_json(folder / INDEX, where).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{where}: {INDEX} has no weight_map.")
        names = sorted({str(name) for name in shards.values()})
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ModelError(f"{where}: {INDEX} names a file outside the folder, {outside[0]}.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{where}: {INDEX} names {len(names)} files, of which {len(missing)} are missing: "
                f"{', '.join(missing[:5])}. What fits: the whole download."
            )
        files = [folder / name for name in names]
    else:
        raise _no_safetensors(folder, where)
    for file in files:
        _check_header(file, where)
    return files


def _check_header(file: Path, where: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise ModelError(
            f"{where}: {file.name} ({file.stat().st_size} bytes) is not a whole safetensors file: {error}. What "
            "fits: download or copy it again."
        ) from None


def conversion(source: Path, target: Path) -> str:
    """The Python that rewrites pickled weights as safetensors; torch opens them with weights_only."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer; "
        f"AutoModelForCausalLM.from_pretrained({str(source)!r}, use_safetensors=False, "
        f"dtype='auto').save_pretrained({str(target)!r}); "
        f"AutoTokenizer.from_pretrained({str(source)!r}).save_pretrained({str(target)!r})"
    )


def _no_safetensors(folder: Path, where: str) -> ModelError:
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        target = folder.with_name(folder.name + "-safetensors")
        return ModelError(
            f"{where}: the weights are pickles ({', '.join(pickles[:5])}), which can run code when opened; Deltune "
            "reads safetensors only. "
            f'If you trust their source, convert them once:\n  python -c "{conversion(folder, target)}"\nand use model.path={target}'
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f"found {', '.join(others[:5])}" if others else "there are no *.safetensors files"
    return ModelError(
        f"{where}: no weights: {found}; expected {SINGLE}, or {INDEX} with its files. To draw weights at random "
        "from config.json: model.start=random"
    )
