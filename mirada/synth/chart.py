"""Task ``chart``: bar charts with a labelled axis, values on ticks, and sometimes a title."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mirada.synth import effects, glyphs
from mirada.synth.glyphs import TextRun
from mirada.synth.lines import pick_face, write_text
from mirada.synth.scene import Question, choose_question
from mirada.synth.shapes import colours_on, mark, place, tint
from mirada.synth.types import CELL, Dense, Options, Sample
from mirada.synth.words import DAYS, MONTHS, pick_word

Facts = dict[str, Any]
_MOST = {
    "high": (("tallest", "highest"), ("highest", "largest", "greatest")),
    "low": (("shortest", "lowest"), ("lowest", "smallest")),
}
"""Words for the bar, and for its value."""


def _count(rng: random.Random, facts: Facts) -> Question:
    return {}, {}, str(len(facts["bars"]))


def _extreme(rng: random.Random, facts: Facts) -> Question | None:
    end = rng.choice(("high", "low"))
    values = [bar["value"] for bar in facts["bars"]]
    best = max(values) if end == "high" else min(values)
    if values.count(best) > 1 or len(values) < 2:
        return None
    most, value_most = (rng.choice(words) for words in _MOST[end])
    return {"most": most, "value_most": value_most}, {"end": end}, facts["bars"][values.index(best)]["label"]


def _value(rng: random.Random, facts: Facts) -> Question:
    bar = rng.choice(facts["bars"])
    return {"label": bar["label"]}, {"label": bar["label"]}, str(bar["value"])


def _which(rng: random.Random, facts: Facts) -> Question | None:
    values = [bar["value"] for bar in facts["bars"]]
    fitting = [bar for bar in facts["bars"] if values.count(bar["value"]) == 1]
    if not fitting:
        return None
    bar = rng.choice(fitting)
    return {"value": bar["value"]}, {"value": bar["value"]}, bar["label"]


def _title(rng: random.Random, facts: Facts) -> Question | None:
    return ({}, {}, facts["title"]) if facts["title"] else None


def _colour(rng: random.Random, facts: Facts) -> Question:
    bar = rng.choice(facts["bars"])
    return {"label": bar["label"]}, {"label": bar["label"]}, bar["colour"]


def _compare(rng: random.Random, facts: Facts) -> Question | None:
    one, other = rng.sample(facts["bars"], 2)
    if one["value"] == other["value"]:
        return None
    arguments = {"label": one["label"], "other": other["label"]}
    return arguments, arguments, "yes" if one["value"] > other["value"] else "no"


def _labels(rng: random.Random, facts: Facts) -> Question:
    return {}, {}, ", ".join(bar["label"] for bar in facts["bars"])


QUESTIONS: dict[str, Callable[[random.Random, Facts], Question | None]] = {
    "chart_count": _count, "chart_extreme": _extreme, "chart_value": _value, "chart_which": _which, "chart_title": _title,
    "chart_colour": _colour, "chart_compare": _compare, "chart_labels": _labels,
}  # fmt: skip


def label_texts(rng: random.Random, split: str, count: int) -> list[str]:
    """Distinct bar labels: letters, days, months, years or short words."""
    roll = rng.random()
    if roll < 0.4:
        return sorted(rng.sample(string.ascii_uppercase, count)) if rng.random() < 0.6 else list(string.ascii_uppercase[:count])
    if roll < 0.5:
        first = rng.randrange(8 - count)
        return list(DAYS[first : first + count])
    if roll < 0.6:
        first = rng.randrange(13 - count)
        return list(MONTHS[first : first + count])
    if roll < 0.7:
        first = rng.randint(1990, 2030)
        return [str(first + i) for i in range(count)]
    found: list[str] = []
    while len(found) < count:
        word = pick_word(rng, split, 4, 2).capitalize()
        if word not in found:
            found.append(word)
    return found


def _title_text(rng: random.Random, split: str, max_chars: int) -> str:
    text = pick_word(rng, split, min(10, max_chars), 3).capitalize()
    while rng.random() < 0.5 and len(text) + 4 < max_chars:
        text += " " + pick_word(rng, split, min(8, max_chars - len(text) - 1), 2)
    return text


@dataclass(slots=True)
class _Frame:
    """Where things stand, in pixels: ``axis`` x of the vertical axis, ``base`` y of its foot, ``pitch`` per tick."""

    width: int
    height: int
    axis: int
    base: int
    pitch: int
    slot: int


def _frame(rng: random.Random, labels: list[TextRun], ticks: list[TextRun], has_title: bool) -> _Frame:
    """A frame that holds the labels and the ticks, in multiples of CELL."""
    slot = max(max(run.width for run in labels) + 7, 30)
    axis = max(run.width for run in ticks) + 8
    width = -(-(axis + slot * len(labels) + 4) // CELL) * CELL
    head, steps = (26 if has_title else 10), len(ticks) - 1
    height = -(-(head + rng.randint(19, 24) * steps + 26) // CELL) * CELL
    base = height - 24
    return _Frame(width, height, axis, base, (base - head) // steps, (width - axis - 4) // len(labels))


def draw_chart(rng: random.Random, options: Options) -> Sample:
    """Draw 2 to 6 bars whose values lie on the ticks of the axis (multiples of its step), and ask one question."""
    level = options.level
    count = rng.randint(2, 3 + round(3 * level))
    font = pick_face(rng, options, 16, 17)
    labels = label_texts(rng, options.split, count)
    runs = [glyphs.lay_out(font, label) for label in labels]
    step, ticks = rng.choice((1, 2, 5, 10, 10, 20, 50, 100)), rng.randint(3, 4 + round(level))
    tick_runs = [glyphs.lay_out(font, str(step * i)) for i in range(ticks + 1)]
    has_title = rng.random() < 0.6
    frame = _frame(rng, runs, tick_runs, has_title)
    title = glyphs.lay_out(font, _title_text(rng, options.split, max((frame.width - 16) // 11, 4)) if has_title else "")
    if title.width > frame.width - 6:
        title = glyphs.lay_out(font, "")
    paper = rng.choice(((255, 255, 255), (255, 255, 255), (242, 242, 238), (250, 244, 228), (24, 26, 34)))
    ink = (20, 20, 20) if paper[0] > 128 else (235, 235, 235)
    canvas = effects.background(rng, frame.height, frame.width, paper, paper, 0.3 * level)
    dense = Dense.empty(frame.height, frame.width)
    _draw_axis(rng, canvas, dense, tick_runs, frame, ink)
    if title.text:
        write_text(canvas, dense, title, frame.width // 2, 18, ink, baseline=True)
    colours = _bar_colours(rng, [n for n in colours_on(paper) if n not in ("black", "white")], count)
    bar_width = round(frame.slot * rng.uniform(0.5, 0.8))
    bars: list[dict[str, Any]] = []
    for i, label in enumerate(labels):
        high, middle = rng.randint(1, ticks), frame.axis + frame.slot * i + frame.slot // 2
        left, top = middle - bar_width // 2, frame.base - high * frame.pitch
        mask = np.full((high * frame.pitch, bar_width), 255, np.uint8)
        place(canvas, mask, left, top, tint(rng, colours[i], level))
        mark(dense, mask, left, top, "bar", colours[i])
        write_text(canvas, dense, runs[i], middle, frame.base + 18, ink, baseline=True)
        bars.append({"label": label, "value": high * step, "colour": colours[i], "left": left, "top": top, "width": bar_width})
    image = effects.disturb(rng, canvas, 0.5 * level)
    facts: Facts = {"bars": bars, "title": title.text, "step": step, "ticks": ticks, "font": font.name, "size": font.size}
    question, answer = choose_question(rng, facts, QUESTIONS, options.phrasing)
    return Sample("chart", image, question, answer, dense, facts)


def _bar_colours(rng: random.Random, names: list[str], count: int) -> list[str]:
    """All alike, all different, or any."""
    roll = rng.random()
    if roll < 0.35:
        return [rng.choice(names)] * count
    return rng.sample(names, count) if roll < 0.65 else rng.choices(names, k=count)


def _draw_axis(
    rng: random.Random, canvas: np.ndarray, dense: Dense, runs: list[TextRun], frame: _Frame, ink: effects.RGB
) -> None:
    """Axis lines, tick labels and sometimes grid lines."""
    grid = rng.random() < 0.5
    for i, run in enumerate(runs):
        y = frame.base - i * frame.pitch
        if grid and i:
            canvas[y, frame.axis :] = 0.75 * canvas[y, frame.axis :] + 0.25 * np.array(ink, np.float32)
        canvas[y, frame.axis - 3 : frame.axis] = ink
        write_text(canvas, dense, run, frame.axis - 5 - run.width // 2, y, ink)
    canvas[frame.base, frame.axis :] = ink
    canvas[frame.base - (len(runs) - 1) * frame.pitch : frame.base, frame.axis] = ink
