"""The table of engines."""

from __future__ import annotations

from deltune import dist
from deltune.engines.config import EngineConfig
from deltune.engines.engine import Engine
from deltune.errors import EngineError


def build(config: EngineConfig) -> Engine:
    """The engine of a config. EngineError if device, precision or processes are not to be had here."""
    if config.name == "ddp":
        from deltune.engines.ddp import DDPEngine

        return DDPEngine(config)
    if dist.world_size() > 1:
        raise EngineError(f"{dist.world_size()} processes were launched with engine=single, which is for one. What fits: engine=ddp.")
    return Engine(config)
