"""The `engine` section: device, precision and how processes work together. Light to import."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import Choice, option


@dataclass(frozen=True)
class EngineConfig:
    """What every engine has."""

    name: str = option("single", "Engine.")
    device: str = option("auto", "Device; auto takes CUDA, then Apple's MPS, then the CPU.", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "Arithmetic of the forward pass: fp32 computes in the weights' own type, bf16 and fp16 under autocast. auto, for float32 weights where the device multiplies bfloat16 fast: bf16, and below an adapter the frozen weights are stored so; for bfloat16 weights where it does not: stored in float32; else fp32. model.dtype keeps a type.", choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = option(False, "Have torch.compile turn the model's repeated blocks into machine code at the first step of training, which takes a minute or more. Adapters then run in their plain forms.")
    threads: int | None = option(None, "CPU threads of one process; null leaves torch's choice.", gt=0)
    deterministic: bool = option(True, "Ask torch for deterministic kernels where it has them.")


@dataclass(frozen=True)
class Single(EngineConfig):
    """One process."""

    name: str = option("single", "Engine.", choices=("single",))


@dataclass(frozen=True)
class DDP(EngineConfig):
    """One process a device, gradients summed over all (`deltune launch -n N train engine=ddp`)."""

    name: str = option("ddp", "Engine.", choices=("ddp",))
    backend: str = option("auto", "Communication; auto is nccl on CUDA, gloo elsewhere.", choices=("auto", "gloo", "nccl"))
    timeout_seconds: float = option(1800.0, "A rank that waits longer for its peers gives up.", gt=0, unit="s")
    bucket_mb: float = option(25.0, "Gradients are summed in pieces of this size.", gt=0, unit="MB")


ENGINES = Choice("name", {"single": Single, "ddp": DDP}, default="single", help="Device, precision, processes.")
