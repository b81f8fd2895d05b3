"""What a release advises about choosing tokens: its generation_config.json, or, where that is silent, what its card says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from mirada.errors import ConfigError
from mirada.keys import Keys
from mirada.types import Sampling

CARDS: Mapping[str, Sampling] = {
    "Kimi-VL-A3B-Instruct": Sampling(temperature=0.2),
    # The card of the first Thinking said 0.6; the repository now says 0.8 for both.
    "Kimi-VL-A3B-Thinking": Sampling(temperature=0.8, max_tokens=32768),
    "Kimi-VL-A3B-Thinking-2506": Sampling(temperature=0.8, max_tokens=32768),
}
"""Name of a release -> what its card advises (moonshotai/Kimi-VL on GitHub). Releases of one family differ in nothing else that
a file says."""


def advised(places: list[str | PurePath], generation: Mapping[str, Any] | None = None, where: str = "") -> Sampling | None:
    """From ``generation``, what generation_config.json holds, if it says how to sample; else from the card of the release
    whose name is part of a path or hub name among ``places``; None if neither is known.

    Raises ConfigError for a value of a wrong type.
    """
    said = {name: value for name, value in (generation or {}).items() if value is not None}
    if said.get("do_sample", True) and "temperature" in said:
        return _stated(Keys(said, where or "generation_config.json"))
    parts = [part for place in places for part in PurePath(place).parts[::-1]]
    return next((CARDS[name] for part in parts for name in CARDS if _names(part, name)), None)


def _names(part: str, name: str) -> bool:
    # Caches of hubs spell org/name as models--org--name.
    return part.rpartition("--")[2].lower() == name.lower()


def _stated(keys: Keys) -> Sampling:
    top_k = keys.take("top_k", int, 0)
    top_p = keys.take("top_p", float, 1.0)
    try:
        return Sampling(
            max_tokens=keys.take("max_new_tokens", int, Sampling().max_tokens),
            temperature=keys.take("temperature", float),
            top_k=top_k or None,
            top_p=top_p if top_p < 1 else None,
            repetition_penalty=keys.take("repetition_penalty", float, 1.0),
        )
    except ValueError as error:
        raise ConfigError(f"{keys.where}: {error}", "take the file that belongs to these weights") from error
