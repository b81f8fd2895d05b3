"""The many ways people ask. Each question type has training phrasings and held-out phrasings, which do not overlap."""

from __future__ import annotations

import functools
import random
from importlib import resources
from typing import Any


@functools.lru_cache(maxsize=1)
def phrasings() -> dict[str, dict[str, tuple[str, ...]]]:
    """``{question type: {"train": (...), "held": (...)}}`` from phrasings.txt."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    text = resources.files("mirada.synth").joinpath("phrasings.txt").read_text(encoding="utf-8")
    kind, split = "", "train"
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            kind, split = line[1:-1], "train"
            found[kind] = {"train": (), "held": ()}
        elif line == "--":
            split = "held"
        elif line and not line.startswith("#"):
            found[kind][split] += (line,)
    return found


def ask(rng: random.Random, kind: str, phrasing: str, **values: Any) -> str:
    """A question of type ``kind`` with its places filled; now and then its first letter is small or its final mark missing."""
    template = rng.choice(phrasings()[kind][phrasing])
    roll = rng.random()
    if roll < 0.08:
        template = template[0].lower() + template[1:]
    elif roll < 0.16 and template[-1] in "?.":
        template = template[:-1]
    text = template.format(**values)
    return text.replace(" a orange", " an orange")
