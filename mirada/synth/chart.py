"""Task ``chart``: bar charts with a labelled axis, values on ticks, and sometimes a title."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

import numpy as np

from mirada.synth import effects, glyphs
from mirada.synth.lines import pick_face, write_text
from mirada.synth.scene import Question, choose_question
from mirada.synth.shapes import colours_on, mark, place, tint
from mirada.synth.types import CELL, Dense, Options, Sample
from mirada.synth.words import DAYS, MONTHS, is_held, pick_word

Facts = dict[str, Any]
_MOST = {
    "high": (("tallest", "highest"), ("highest", "largest", "greatest")),
    "low": (("shortest", "lowest"), ("lowest", "smallest")),
}


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


def draw_chart(rng: random.Random, options: Options) -> Sample:
    """Draw 2 to 6 bars whose values lie on the ticks of the axis (multiples of its step), and ask one question."""
    level = options.level
    count = rng.randint(2, 3 + round(3 * level))
    font = pick_face(rng, options, 16, 17)
    labels = label_texts(rng, options.split, count)
    label_runs = [glyphs.lay_out(font, label) for label in labels]
    step, ticks = rng.choice((1, 2, 5, 10, 10, 20, 50, 100)), rng.randint(3, 4 + round(level))
    tick_runs = [glyphs.lay_out(font, str(step * i)) for i in range(ticks + 1)]
    slot = max(max(run.width for run in label_runs) + 7, 30)
    axis = max(run.width for run in tick_runs) + 8
    width = -(-(axis + slot * count + 4) // CELL) * CELL
    slot = (width - axis - 4) // count
    has_title = rng.random() < 0.6
    title_run = glyphs.lay_out(font, _title_text(rng, options.split, max((width - 16) // 11, 4)) if has_title else "")
    if title_run.width > width - 6:
        title_run = glyphs.lay_out(font, title_run.text.split()[0])
    if title_run.width > width - 6:
        title_run = glyphs.lay_out(font, "")
    head = 26 if title_run.text else 10
    pitch = rng.randint(19, 24)
    height = -(-(head + pitch * ticks + 26) // CELL) * CELL
    base = height - 24
    pitch = (base - head) // ticks
    paper = rng.choice(((255, 255, 255), (255, 255, 255), (242, 242, 238), (250, 244, 228), (24, 26, 34)))
    ink = (20, 20, 20) if paper[0] > 128 else (235, 235, 235)
    canvas = effects.background(rng, height, width, paper, paper, 0.3 * level)
    dense = Dense.empty(height, width)
    _axis(rng, canvas, dense, tick_runs, (axis, base, pitch), ink)
    names = [n for n in colours_on(paper) if n not in ("black", "white")]
    colours = rng.choices(names, k=count) if rng.random() < 0.5 else [rng.choice(names)] * count
    if rng.random() < 0.3:
        colours = rng.sample(names, count)
    bars: list[dict[str, Any]] = []
    share = rng.uniform(0.5, 0.8)
    for i, label in enumerate(labels):
        high = rng.randint(1, ticks)
        bar_width, middle = round(slot * share), axis + slot * i + slot // 2
        mask = np.full((high * pitch, bar_width), 255, np.uint8)
        left, top = middle - bar_width // 2, base - high * pitch
        place(canvas, mask, left, top, tint(rng, colours[i], level))
        mark(dense, mask, left, top, "bar", colours[i])
        write_text(canvas, dense, label_runs[i], middle, base + 18, ink, baseline=True)
        bars.append({"label": label, "value": high * step, "colour": colours[i], "left": left, "top": top, "width": bar_width})
    if title_run.text:
        write_text(canvas, dense, title_run, width // 2, 18, ink, baseline=True)
    image = effects.disturb(rng, canvas, 0.5 * level)
    facts: Facts = {"bars": bars, "title": title_run.text, "step": step, "ticks": ticks, "font": font.name, "size": font.size}
    question, answer = choose_question(rng, facts, QUESTIONS, options.phrasing)
    return Sample("chart", image, question, answer, dense, facts)


def _axis(
    rng: random.Random,
    canvas: np.ndarray,
    dense: Dense,
    runs: list[glyphs.TextRun],
    frame: tuple[int, int, int],
    ink: effects.RGB,
) -> None:
    """Axis lines, tick labels and sometimes grid lines. ``frame``: x of the axis, y of its foot, pixels per tick."""
    axis, base, pitch = frame
    grid = rng.random() < 0.5
    for i, run in enumerate(runs):
        y = base - i * pitch
        if grid and i:
            canvas[y, axis:] = 0.75 * canvas[y, axis:] + 0.25 * np.array(ink, np.float32)
        canvas[y, axis - 3 : axis] = ink
        write_text(canvas, dense, run, axis - 5 - run.width // 2, max(min(y, canvas.shape[0] - 10), 8), ink)
    canvas[base, axis:] = ink
    canvas[base - (len(runs) - 1) * pitch : base, axis] = ink
