"""Forms in which callers may give settings and chats to the front door, and what is made of them. Raises SettingsError."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mirada import config
from mirada.engine.load import Parts
from mirada.engine.settings import EngineSettings
from mirada.errors import SettingsError
from mirada.media.limits import FetchLimits
from mirada.types import Sampling

SamplingLike = Sampling | Mapping[str, Any] | None
"""Settings of one request; a mapping is checked key by key."""
EngineSettingsLike = EngineSettings | Mapping[str, Any] | None
"""Bounds of the engine; a mapping is checked key by key."""
LimitsLike = FetchLimits | Mapping[str, Any] | None
"""What may be fetched, and from where; a mapping is checked key by key."""


def sampling_of(given: SamplingLike) -> Sampling:
    if isinstance(given, Sampling):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise SettingsError(f"sampling is a {type(given).__name__}", "give Sampling(...) or a mapping of its fields")
    values = dict(given or {})
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    if isinstance(bias := values.get("logit_bias"), Mapping):  # JSON has no numbers as keys
        values["logit_bias"] = {
            int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key: value
            for key, value in bias.items()
        }
    return config.parse(Sampling, values, "sampling")


def engine_settings_of(given: EngineSettingsLike) -> EngineSettings:
    return given if isinstance(given, EngineSettings) else config.parse(EngineSettings, given or {}, "engine settings")


def limits_of(given: LimitsLike) -> FetchLimits:
    return given if isinstance(given, FetchLimits) else config.parse(FetchLimits, {} if given is None else given, "limits")


def bounded(parts: Parts, most: int | None) -> Parts:
    """``parts`` whose context holds at most ``most`` tokens."""
    if most is None:
        return parts
    if most > parts.context:
        raise SettingsError(
            f"engine setting max_length={most} is more than the model's context of {parts.context}", "lower it, or leave it out"
        )
    return replace(parts, context=most)


def label(name: str, parts: Parts) -> str:
    """A model in a few words: what it was opened by (of one in memory its type), how matrices are kept, and where."""
    devices = parts.placement.devices if parts.placement is not None else [next(parts.model.parameters()).device]
    return f"{name or parts.model.config.model_type}, {parts.precision} on {' and '.join(map(str, devices))}"
