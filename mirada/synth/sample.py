"""One front: ``sample(task, seed, index, ...)`` draws the same picture, question and answer everywhere."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np

from mirada.errors import SettingsError
from mirada.synth.types import Options, Sample, Split
from mirada.table import Table

TASKS = Table(
    "synth task",
    {
        "line": "mirada.synth.lines:draw_line",
        "paragraph": "mirada.synth.lines:draw_paragraph",
        "scene": "mirada.synth.scene:draw_scene",
        "boxes": "mirada.synth.boxes:draw_boxes",
        "chart": "mirada.synth.chart:draw_chart",
    },
)

ASKED = Table(
    "synth task with many questions",
    {
        "scene": "mirada.synth.scene:EXERCISES",
        "boxes": "mirada.synth.boxes:QUESTIONS",
        "chart": "mirada.synth.chart:QUESTIONS",
    },
)


def max_chars_at(level: float) -> int:
    """The curriculum of text length: 1 character at level 0, 40 at level 1, linear between."""
    return 1 + round(39 * level)


def stream(*parts: object) -> random.Random:
    """The random stream named by ``parts``: equal in every process (string seeds go through SHA-512)."""
    return random.Random("/".join(map(str, parts)))


def sample(
    task: str,
    seed: int,
    index: int,
    split: Split = "train",
    level: float = 1.0,
    phrasing: Split | None = None,
    *,
    fonts: str = "debian",
    max_chars: int | None = None,
    any_size: bool = False,
) -> Sample:
    """Draw sample ``index`` of the stream ``seed``. Height and width are multiples of 28 pixels.

    ``level`` 0..1 scales text length and disturbances; ``max_chars`` 1..40 bounds the text instead. ``phrasing`` chooses
    training or held-out questions (None: those of ``split``). ``any_size`` pads the picture by up to 27 pixels to the
    right and below (then ``dense`` is None). Raises UnknownName for a task, SettingsError for a value out of range,
    NotAvailable when a font package is missing.
    """
    if split not in ("train", "held") or phrasing not in ("train", "held", None):
        raise SettingsError(f"split {split!r} with phrasing {phrasing!r} is unknown", "use 'train' or 'held'")
    if not 0 <= level <= 1:
        raise SettingsError(f"level {level} is out of range", "use a number from 0 to 1")
    limit = max_chars_at(level) if max_chars is None else max_chars
    if not 1 <= limit <= 40:
        raise SettingsError(f"max_chars {limit} is out of range", "use 1 to 40")
    draw = TASKS[task]
    rng = stream(task, seed, index, split)
    drawn: Sample = draw(rng, Options(split, level, phrasing or split, fonts, limit))
    return _padded(rng, drawn) if any_size else drawn


def more_questions(drawn: Sample, count: int, seed: int, index: int, phrasing: Split = "train") -> list[Sample]:
    """The same picture with up to ``count`` further questions, all different; none for text, which is only read."""
    if drawn.task not in ASKED:
        return []
    from mirada.synth.scene import PRACTICE, choose_question  # drawn with the task; not needed to import the room

    rng, made = stream("more", drawn.task, seed, index, phrasing), []
    asked = {_asked(drawn.facts)}
    for _ in range(4 * count):
        facts = dict(drawn.facts)
        question, answer = choose_question(rng, facts, ASKED[drawn.task], phrasing, PRACTICE)
        if _asked(facts) not in asked:  # a question asked again would be answered by copying
            asked.add(_asked(facts))
            made.append(replace(drawn, question=question, answer=answer, facts=facts))
        if len(made) == count:
            break
    return made


def _asked(facts: dict[str, Any]) -> tuple[Any, ...]:
    return facts["question_type"], *sorted((key, str(value)) for key, value in facts["question_arguments"].items())


def _padded(rng: random.Random, drawn: Sample) -> Sample:
    bottom, right = rng.randrange(28), rng.randrange(28)
    image = np.pad(drawn.image, ((0, bottom), (0, right), (0, 0)), mode="edge")
    return Sample(drawn.task, image, drawn.question, drawn.answer, None, drawn.facts)
