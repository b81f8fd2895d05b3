"""What may be set about an engine; bytes are bytes, and ``None`` means off or derived, as each line says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mirada.errors import SettingsError

MB = 1 << 20
CPU_SECONDS = 0.25
"""``step_seconds`` on a CPU, where nothing is said."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Bounds of one engine. ``VLM(..., engine=EngineSettings(...))``, or a mapping of these."""

    max_running: int = 16
    """Sequences that decode together."""
    max_waiting: int = 4096
    """Requests in line; one more is refused with a typed error."""
    step_tokens: int = 1024
    """Tokens that one step computes at most: every running sequence's next one, then pieces of waiting prompts."""
    step_patches: int = 4096
    """Patches that one pass through the tower takes at most (a single frame may have more)."""
    step_seconds: float | Literal["auto"] | None = "auto"
    """Seconds that prompts and pictures may add to a step while another request decodes or is about to; None: as many as
    ``step_tokens`` and ``step_patches`` take; auto: 0.25 on a CPU, None elsewhere."""
    max_length: int | None = None
    """Most tokens of prompt and answer together; None: the model's context."""
    cache_bytes: int | None = None
    """Bytes of keys and values of all sequences together; None: what the device has free."""
    kv: Literal["auto", "int8"] = "auto"
    """How keys and values are kept: in the model's type, or as int8 with a scale per head and token."""
    layout: Literal["auto", "slab", "paged"] = "auto"
    """How they lie: a slab per sequence, or pages of one pool; auto: pages on CUDA, slabs elsewhere."""
    prefix_cache_bytes: int = 512 * MB
    encoder_cache_bytes: int = 256 * MB
    pixel_cache_bytes: int = 128 * MB
    """What earlier requests leave for later ones: keys and values of prompt beginnings, features, prepared pixels. 0: off."""
    speculate: int = 0
    """Tokens that n-gram lookup may propose per step for a greedy request, where they are worth their rows; 0: off."""
    prepared_bytes: int = 512 * MB
    """Prepared pixels of requests that have not ended; others are prepared when there is room (one may be larger, alone)."""
    cuda_graphs: bool = True
    """On CUDA, steps that only decode are captured once per number of sequences, and replayed."""
    workers: int | None = None
    """Processes that prepare large media; 0: none, None: derived from the number of cores."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_running", 1), ("max_waiting", 1), ("step_tokens", 1), ("step_patches", 1), ("max_length", 2),
            ("cache_bytes", 1), ("prefix_cache_bytes", 0), ("encoder_cache_bytes", 0), ("pixel_cache_bytes", 0),
            ("speculate", 0), ("prepared_bytes", 1), ("workers", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise SettingsError(
                    f"engine setting {name}={value!r} is out of range", f"give a whole number of at least {least}"
                )
        if not isinstance(self.cuda_graphs, bool):
            raise SettingsError(f"engine setting cuda_graphs={self.cuda_graphs!r} is no truth value", "give True or False")
        self._check_seconds()
        for name, known in (("kv", ("auto", "int8")), ("layout", ("auto", "slab", "paged"))):
            if (value := getattr(self, name)) not in known:
                raise SettingsError(f"engine setting {name}={value!r} is unknown", f"use one of {', '.join(known)}")

    def _check_seconds(self) -> None:
        seconds = self.step_seconds
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 < seconds < math.inf
        if seconds not in ("auto", None) and not number:
            raise SettingsError(
                f"engine setting step_seconds={seconds!r} is out of range", "give seconds above 0, 'auto', or None for no bound"
            )

    def seconds(self, device: str) -> float | None:
        """``step_seconds`` on a kind of device."""
        if self.step_seconds == "auto":
            return CPU_SECONDS if device == "cpu" else None
        return self.step_seconds
