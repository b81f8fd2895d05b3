"""Checks of what comes before the model: pixels, sizes, sampling, slow-fast, chat renderings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

CHECKS: dict[str, Callable[[Path], dict[str, Callable[[], None]]]] = {}
