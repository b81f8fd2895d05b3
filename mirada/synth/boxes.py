"""Task ``boxes``: a stack of coloured boxes, each with a digit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from mirada.synth import effects, glyphs
from mirada.synth.lines import pick_face, write_text
from mirada.synth.scene import Question, choose_question
from mirada.synth.shapes import PAPERS, colours_on, mark, place, tint
from mirada.synth.types import CELL, Dense, Options, Sample

_SPOKEN = {"above": ("above", "on top of", "over"), "below": ("below", "under", "beneath")}
Facts = dict[str, Any]


def _count(rng: random.Random, facts: Facts) -> Question:
    return {}, {}, str(len(facts["boxes"]))


def _colour(rng: random.Random, facts: Facts) -> Question:
    box = rng.choice(facts["boxes"])
    return {"number": box["number"]}, {"number": box["number"]}, box["colour"]


def _number(rng: random.Random, facts: Facts) -> Question | None:
    colours = [box["colour"] for box in facts["boxes"]]
    fitting = [box for box in facts["boxes"] if colours.count(box["colour"]) == 1]
    if not fitting:
        return None
    box = rng.choice(fitting)
    return {"colour": box["colour"]}, {"colour": box["colour"]}, str(box["number"])


def _end(rng: random.Random, facts: Facts) -> Question:
    end = rng.choice(("top", "bottom"))
    return {"end": end}, {"end": end}, str(facts["boxes"][0 if end == "top" else -1]["number"])


def _end_colour(rng: random.Random, facts: Facts) -> Question:
    end = rng.choice(("top", "bottom"))
    return {"end": end}, {"end": end}, facts["boxes"][0 if end == "top" else -1]["colour"]


def _next(rng: random.Random, facts: Facts) -> Question | None:
    boxes = facts["boxes"]
    if len(boxes) < 2:
        return None
    upper = rng.randrange(len(boxes) - 1)
    side = rng.choice(("above", "below"))
    anchor, found = (boxes[upper + 1], boxes[upper]) if side == "above" else (boxes[upper], boxes[upper + 1])
    spoken = rng.choice(_SPOKEN[side])
    return {"side": spoken, "number": anchor["number"]}, {"side": side, "number": anchor["number"]}, str(found["number"])


def _compare(rng: random.Random, facts: Facts) -> Question | None:
    boxes = facts["boxes"]
    if len(boxes) < 2:
        return None
    one, other = rng.sample(range(len(boxes)), 2)
    side = rng.choice(("above", "below"))
    holds = (one < other) == (side == "above")
    arguments = {"side": side, "number": boxes[one]["number"], "other": boxes[other]["number"]}
    spoken = rng.choice(("above", "over") if side == "above" else ("below", "under"))
    return {**arguments, "side": spoken}, arguments, "yes" if holds else "no"


def _exists(rng: random.Random, facts: Facts) -> Question:
    numbers = [box["number"] for box in facts["boxes"]]
    number = rng.choice(numbers) if rng.random() < 0.5 else rng.choice([n for n in range(10) if n not in numbers])
    return {"number": number}, {"number": number}, "yes" if number in numbers else "no"


def _list(rng: random.Random, facts: Facts) -> Question:
    return {}, {}, ", ".join(str(box["number"]) for box in facts["boxes"])


QUESTIONS: dict[str, Callable[[random.Random, Facts], Question | None]] = {
    "box_count": _count, "box_colour": _colour, "box_number": _number, "box_end": _end, "box_end_colour": _end_colour,
    "box_next": _next, "box_compare": _compare, "box_exists": _exists, "box_list": _list,
}  # fmt: skip


def draw_boxes(rng: random.Random, options: Options) -> Sample:
    """Draw a stack of 1 to 7 boxes from top to bottom, every digit at most once, and ask one question."""
    level = options.level
    count = rng.randint(1, 3 + round(4 * level))
    box_height = rng.randint(20, 28)
    width = CELL * rng.randint(3, 5)
    height = CELL * max(-(-(count * (box_height + 2) + 4) // CELL), 2)
    height += CELL * (rng.random() < 0.3 * level)
    paper = rng.choice(PAPERS)
    names = colours_on(paper)
    digits = rng.sample(range(10), count)
    if rng.random() < 0.2:  # the plain case: 1, 2, 3 ... from the top or from the bottom
        digits = list(range(1, count + 1)) if rng.random() < 0.5 else list(range(count, 0, -1))
    gap = rng.choice((0, 1, 2))
    stack_height = count * (box_height + gap) - gap
    top = rng.randint(1, height - stack_height - 1)
    middle = width // 2 + rng.randint(-6, 6)
    base = rng.randint(34, min(64, width - 28))
    font = pick_face(rng, options, 16, min(20, box_height - 2))
    canvas = effects.background(rng, height, width, paper, paper, 0.5 * level)
    dense = Dense.empty(height, width)
    boxes: list[dict[str, Any]] = []
    for i, digit in enumerate(digits):
        colour = rng.choice([n for n in names if not boxes or gap or n != boxes[-1]["colour"]])
        box_width = base + (rng.randint(-6, 6) if rng.random() < level else 0)
        left, y = middle - box_width // 2, top + i * (box_height + gap)
        mask = np.full((box_height, box_width), 255, np.uint8)
        fill = tint(rng, colour, level)
        place(canvas, mask, left, y, fill)
        mark(dense, mask, left, y, "box", colour, digit + 1)
        # Black or white ink, whichever stands out more.
        ink = max(((0, 0, 0), (255, 255, 255)), key=lambda c: effects.contrast(c, fill))
        write_text(canvas, dense, glyphs.lay_out(font, str(digit)), left + box_width // 2, y + box_height // 2, ink)
        boxes.append({"number": digit, "colour": colour, "left": left, "top": y, "width": box_width, "height": box_height})
    image = effects.disturb(rng, canvas, 0.6 * level)
    facts: Facts = {"boxes": boxes, "font": font.name, "size": font.size}
    question, answer = choose_question(rng, facts, QUESTIONS, options.phrasing)
    return Sample("boxes", image, question, answer, dense, facts)
