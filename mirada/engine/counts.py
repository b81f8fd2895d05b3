"""What the entries of ``VLM.stats()`` are: figures of the moment, or counts since the start."""

from __future__ import annotations

from collections.abc import Mapping

MOMENTS = ("running", "waiting", "preparing", "workers", "matrices_kept_exact", "asleep")
"""These go up and down, as does everything in bytes; the rest only counts up."""


def is_moment(name: str) -> bool:
    """Whether it says what is now."""
    return name in MOMENTS or name.endswith("_bytes")


def add(earlier: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """What an engine counted before it slept, and what it has counted since, together."""
    return {name: value if is_moment(name) else value + earlier.get(name, 0) for name, value in now.items()}
