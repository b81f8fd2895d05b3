"""How much memory is free, said in bytes, and refusing what will not fit before anything is allocated."""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mirada.adapt.packed import PackedLinear, PackedRows
from mirada.engine.sequence import Sequence
from mirada.engine.settings import EngineSettings
from mirada.errors import OutOfMemory
from mirada.layers.cache import Cache
from mirada.layers.paged import Pages

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
SPARE = 0.1
"""Share of a machine's free memory that keys and values never take: for other programs, and for what is only estimated."""
CACHES = 0.25
"""Share of it that what the caches may still come to hold is kept free for, and to which their bounds are lowered."""
_BOUNDS = ("prefix_cache_bytes", "encoder_cache_bytes", "pixel_cache_bytes", "prepared_bytes")
_log = logging.getLogger(__name__)


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``: on a CPU the least that the machine and its control groups leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has reserved and does not use will be handed out again.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min([_machine(PROC), *_groups(PROC, CGROUP)])


def trim() -> None:
    """Give back to the system what the C library's allocator holds and nobody uses. Requests of all lengths on many threads
    leave holes in its heaps, which it keeps: resident memory would creep up for as long as traffic is mixed (glibc; no other
    allocator needs or has this)."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


def require(needed: int, free: int, what: str, fix: str) -> None:
    """Raise OutOfMemory (bytes) unless ``needed`` fits into ``free``."""
    if needed > free:
        raise OutOfMemory(
            f"{what} needs about {say(needed)} of memory, and {say(max(free, 0))} is available",
            fix,
            needed=needed,
            available=max(free, 0),
            unit="bytes",
        )


def fitted(settings: EngineSettings, device: torch.device) -> EngineSettings:
    """``settings`` with the bounds of caches lowered, all by one factor, where together they are more than ``CACHES`` of what
    ``device`` has free now (a CPU; on a GPU what is kept lies in the pool of pages). Said in the log."""
    asked = sum(getattr(settings, name) for name in _BOUNDS)
    most = int(max(available(device), 0) * CACHES) if device.type == "cpu" else asked
    if asked <= most:
        return settings
    made = {name: int(getattr(settings, name) * (most / asked)) for name in _BOUNDS}
    made["prepared_bytes"] = max(1, made["prepared_bytes"])
    _log.info(
        "caches may take %s together instead of %s, as %s is free: %s", say(most), say(asked), say(available(device)), made
    )
    return replace(settings, **made)


class Budget:
    """Bytes that the keys and values of all sequences may take, beside what a step needs in passing.

    On a CPU weights that are mapped from files count as taken (the system says that their pages are free), ``SPARE`` stays
    free, and so does what ``bounded`` caches do not hold yet, as far as ``CACHES``.
    """

    def __init__(self, model: Any, cache: Cache, settings: EngineSettings) -> None:
        self.config, self.cache, self.settings = model.config, cache, settings
        weight = next(model.parameters())
        self._main, self._size = weight.device, weight.dtype.itemsize
        self._mapped: int = getattr(model, "mapped_bytes", 0)
        self._widened = 0 if self._main.type == "cpu" else widest(model) * self._size
        self._bounded: list[tuple[weakref.ref[Any], int]] = []

    def bounded(self, cache: Any, most: int) -> None:
        """Keep room for ``cache`` (something with ``bytes_held``), which may come to hold ``most`` bytes, while it lives."""
        self._bounded.append((weakref.ref(cache), most))

    def untouched(self) -> int:
        """Bytes that caches may take beyond what they hold."""
        found = ((kept(), most) for kept, most in self._bounded)
        return sum(max(0, most - cache.bytes_held) for cache, most in found if cache is not None)

    def _left(self, device: torch.device, passing: int) -> int:
        left = available(device) - passing
        if device.type != "cpu":
            return left
        left -= self._mapped
        return left - int(left * SPARE) - min(self.untouched(), int(left * CACHES)) if left > 0 else left

    def total(self, sequences: Iterable[Sequence]) -> int:
        """Bytes of cache that ``sequences`` may hold together now. What they hold already lies on the devices of the layers,
        and the device that is tightest decides."""
        free, most = self.free(sequences), self.settings.cache_bytes
        return free if most is None else min(free, most)

    def free(self, sequences: Iterable[Sequence]) -> int:
        """The same as far as the devices alone decide."""
        layers = Counter(self.cache.devices)
        layers.setdefault(self._main, 0)
        num_layers, held, passing = self.cache.num_layers, self.cache.bytes_held, self.passing(sequences)
        found = []
        for device, own in layers.items():
            left = self._left(device, passing if device == self._main else 0)
            if own and isinstance(self.cache, Pages) and self.cache.made:
                found.append(min(left, 0) + (self.cache.budget or 0))
            elif own:
                found.append(left * num_layers // own + held)
            elif left < 0:
                found.append(left)
        return min(found)

    def alone(self, sequence: Sequence) -> int:
        """Bytes of cache that ``sequence`` takes at most, on its way to its longest."""
        return self.cache.peak_bytes(len(sequence.prompt.tokens) + sequence.limit)

    def passing(self, sequences: Iterable[Sequence]) -> int:
        """Bytes that the widest step of ``sequences`` needs besides the cache (an estimate)."""
        tokens = rows = patches = pixels = largest = 0
        for sequence in sequences:
            tokens += sequence.left
            rows += 1
            for item in sequence.media:
                patches += len(item.pixels)
                pixels = max(pixels, item.pixels[0].size)
                largest = max(largest, *(h * w for _, h, w in item.grids))
        tokens = min(tokens, max(rows, self.settings.step_tokens))
        patches = min(patches, max(largest, self.settings.step_patches))
        vision, text = self.config.vision, self.config.text
        # Per token: residual, normed, q, k, v, mixed and the two halves of the gated MLP with their product.
        wide = 4 * text.hidden_size + 3 * text.num_attention_heads * text.head_dim + 3 * text.intermediate_size
        tall = 8 * vision.hidden_size + 2 * vision.intermediate_size
        made = tokens * wide * self._size + rows * 3 * 4 * text.vocab_size + patches * (8 * pixels + tall * self._size)
        return made + self._widened


def widest(model: Any) -> int:
    """Weights of the largest matrix that is held as integers: off a CPU many tokens are multiplied by it widened."""
    return max((m.rows * m.columns for p in model.modules() if isinstance(p, PackedLinear) for m in _packed(p)), default=0)


def _packed(linear: PackedLinear) -> list[PackedRows]:
    return [part for part in linear.parts if isinstance(part, PackedRows)]


def say(size: int) -> str:
    """Bytes as people write them: ``3.2 GB``."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} bytes"


def _machine(proc: Path) -> int:
    text = _read(proc / "meminfo")
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    # No /proc (macOS): all there is, an upper bound.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups(proc: Path, root: Path) -> list[int]:
    """What each control group that holds this process leaves (version 2, then version 1); none without a limit."""
    left = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            left += _walk(root, path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            left += _walk(root / "memory", path, names)
    return left


def _walk(root: Path, path: str, names: tuple[str, str, str]) -> list[int]:
    """Inside a container the path may be the host's and not exist here; the root itself is then this process's group."""
    limit_name, used_name, cached_name = names
    group = root / path.strip("/")
    left = []
    for folder in (group, *group.parents):
        limit, used = _read(folder / limit_name).strip(), _read(folder / used_name).strip()
        if limit.isdigit() and used.isdigit():
            stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines())
            left.append(int(limit) - int(used) + int(stat.get(cached_name, 0)))
        if folder == root:
            break
    return left


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
