"""Files of tensors. They are safetensors and whole: a pickle is never opened, for it can run code, and what is written
appears under its name in one step."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from deltune.errors import DeltuneError

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises DeltuneError for a pickle, a missing file, or a file that is not whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.suffix in PICKLE_ENDINGS:
        raise DeltuneError(
            f"{path}: this is a pickle, which can run code when it is opened. Convert it to safetensors, in a place that "
            "you would trust with it: python -c \"import torch, safetensors.torch as s; "
            f"t = torch.load('{path.name}', map_location='cpu', weights_only=True); "
            f"s.save_file({{k: v.contiguous() for k, v in t.items()}}, '{path.with_suffix('.safetensors').name}')\""
        )
    if not path.is_file():
        raise DeltuneError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DeltuneError(f"{path}: not a whole safetensors file ({error})") from None


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in one step, see `replacing`.

    Tensors may be on any device, strided, or share memory: each is written in full. Raises DeltuneError on a full disk.
    """
    from safetensors.torch import save_file

    whole = _apart(tensors)
    with replacing(path, sum(tensor.nbytes for tensor in whole.values())) as temporary:
        save_file(whole, temporary, metadata={"format": "pt", **(metadata or {})})


@contextmanager
def replacing(path: str | Path, num_bytes: int) -> Iterator[Path]:
    """Give a temporary path to write to, and put that file in `path`'s place at the end.

    At any moment, a power cut included, `path` is the old file or the new one, never a part of one. Raises
    DeltuneError on a full disk, with `num_bytes` as what was needed.
    """
    from safetensors import SafetensorError

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if not says_disk_full(error):
            raise
        raise disk_full(path, num_bytes) from None
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def disk_full(path: Path, num_bytes: int) -> DeltuneError:
    """The error to raise where no space is left for `num_bytes` at `path`."""
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    return DeltuneError(
        f"{path}: no space left to write {num_bytes:,} bytes ({free:,} bytes free). Nothing was replaced; free some "
        "space, or write to another disk."
    )


def says_disk_full(error: Exception) -> bool:
    # safetensors passes the system's error on as text only
    if isinstance(error, OSError):
        return error.errno in DISK_FULL
    return any(f"os error {number})" in str(error) for number in DISK_FULL)


def sync(path: str | Path) -> None:
    """Have a file's bytes, or a folder's names, outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share memory."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensor = tensor.clone()
        seen.add(storage)
        result[name] = tensor
    return result


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise DeltuneError unless the tensor is floating, of this shape, and finite everywhere."""
    if not tensor.is_floating_point():
        raise DeltuneError(f"{name}: {tensor.dtype} found, a floating type expected")
    if tuple(tensor.shape) != tuple(shape):
        raise DeltuneError(f"{name}: shape {list(tensor.shape)} found, {list(shape)} expected")
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise DeltuneError(f"{name}: {bad} of {tensor.numel()} values are not finite")
