"""What an engine gives back while nobody needs it, and how that comes again (after vLLM's sleep mode, vllm/v1/worker).

Level 1 keeps the weights: on a CPU where they are, on a GPU in the host's memory. Level 2 drops them too: they are read again
from the checkpoint. Keys and values, all caches, CUDA graphs and media workers go at both.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from mirada.engine import memory
from mirada.errors import EngineAsleep, SettingsError

LEVELS = (1, 2)


def check_level(level: int) -> None:
    """Raises SettingsError."""
    if isinstance(level, bool) or level not in LEVELS:
        raise SettingsError(f"sleep level {level!r} is unknown", "give 1 (keep the weights) or 2 (drop them too)")


def asleep() -> EngineAsleep:
    """What a request is told that comes meanwhile."""
    return EngineAsleep("the engine sleeps and takes no requests", "wake it first: VLM.wake(), or POST /wake_up of a server")


class Away:
    """Stands where a model was whose weights are gone; its ``config`` stays."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise asleep()


class Offloaded:
    """Weights of ``model`` that lay on GPUs, in the host's memory until ``back``. Raises OutOfMemory before any is moved."""

    def __init__(self, model: Any) -> None:
        tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "cpu"]
        size, host = sum(tensor.nbytes for tensor in tensors), torch.device("cpu")
        if tensors:
            memory.require(size, memory.available(host), "keeping the weights in the host's memory", "sleep at level 2")
        self._homes = [(tensor, tensor.device) for tensor in tensors]
        for tensor in tensors:
            tensor.data = tensor.data.to(host)

    def back(self) -> None:
        """Move them to where they were. What did not fit may be tried again."""
        for tensor, home in self._homes:
            tensor.data = tensor.data.to(home)


def give_back() -> None:
    """What was let go goes to the system: models and engines are cycles, and allocators keep what is freed."""
    gc.collect()
    memory.trim()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
