"""Questions without a picture, for a decoder that must learn letters and answers before it sees anything."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from mirada.synth import boxes, chart, scene
from mirada.synth.phrasing import ask
from mirada.synth.sample import stream
from mirada.synth.shapes import DRAWN_SHAPES, PALETTE
from mirada.synth.types import Split
from mirada.synth.words import line_text, pick_word

_SCENE = ("count_all", "count_shape", "count_colour", "count_both", "colour_of", "shape_of", "exists")
_CHART = ("chart_count", "chart_extreme", "chart_value", "chart_which", "chart_compare", "chart_labels")


def _form(rng: random.Random, forms: str, value: str) -> str:
    return rng.choice(forms.split("|")).format(value)


def _spell(rng: random.Random, split: Split) -> tuple[str, str]:
    word = pick_word(rng, split)
    return _form(rng, "Spell {}.|Spell the word {}.|How do you spell {}?|Spell: {}|Letters of {}?", word), " ".join(word)


def _join(rng: random.Random, split: Split) -> tuple[str, str]:
    word = pick_word(rng, split)
    return _form(rng, "Join: {}|Write as one word: {}|Join the letters {}.|Which word is {}?", " ".join(word)), word


def _copy(rng: random.Random, split: Split) -> tuple[str, str]:
    text, _ = line_text(rng, split, rng.choice((6, 12, 20, 40)))
    return _form(rng, "Repeat: {}|Copy: {}|Say: {}|Write this: {}|Repeat after me: {}|Copy the text: {}", text), text


def _recase(rng: random.Random, split: Split) -> tuple[str, str]:
    text = line_text(rng, split, 20)[0] if rng.random() < 0.3 else pick_word(rng, split)
    if rng.random() < 0.5:
        return _form(rng, "Upper case: {}|Write in capitals: {}|In capital letters: {}", text), text.upper()
    text = text.upper() if rng.random() < 0.5 else text.capitalize()
    return _form(rng, "Lower case: {}|Write in small letters: {}|In lower case: {}", text), text.lower()


def _letter(rng: random.Random, split: Split) -> tuple[str, str]:
    word = pick_word(rng, split)
    roll = rng.random()
    if roll < 0.35:
        return _form(rng, "First letter of {}?|What is the first letter of {}?", word), word[0]
    if roll < 0.7:
        return _form(rng, "Last letter of {}?|What is the last letter of {}?", word), word[-1]
    return _form(rng, "How many letters has {}?|How long is the word {}?|Number of letters in {}?", word), str(len(word))


def _number(rng: random.Random, split: Split) -> tuple[str, str]:
    number = rng.randrange(10 ** rng.randint(1, 6))
    if rng.random() < 0.4:
        return _form(rng, "Which number follows {}?|What comes after {}?", str(number)), str(number + 1)
    return _form(rng, "Repeat the number {}.|Say the number {}.|Which number is {}?", str(number)), str(number)


def _reading(rng: random.Random, split: Split) -> tuple[str, str]:
    text, _ = line_text(rng, split, rng.choice((6, 12, 20, 40)))
    return f"The text is: {text}\n{ask(rng, 'read', split)}", text


def _about(
    rng: random.Random, split: Split, told: str, facts: dict[str, Any], questions: dict[str, Any], kinds: tuple[str, ...]
) -> tuple[str, str]:
    question, answer = scene.choose_question(rng, facts, {kind: questions[kind] for kind in kinds}, split)
    return f"{told}\n{question}", answer


def _scene(rng: random.Random, split: Split) -> tuple[str, str]:
    colours = list(PALETTE)
    things = [{"shape": rng.choice(DRAWN_SHAPES), "colour": rng.choice(colours)} for _ in range(rng.randint(1, 6))]
    told = "Shapes: " + ", ".join(map(scene.name, things)) + "."
    return _about(rng, split, told, {"objects": things, "colours": colours}, scene.QUESTIONS, _SCENE)


def _boxes(rng: random.Random, split: Split) -> tuple[str, str]:
    digits = rng.sample(range(10), rng.randint(1, 6))
    stack = [{"number": digit, "colour": rng.choice(tuple(PALETTE))} for digit in digits]
    told = "Boxes from top to bottom: " + ", ".join(f"{box['number']} {box['colour']}" for box in stack) + "."
    return _about(rng, split, told, {"boxes": stack}, boxes.QUESTIONS, tuple(boxes.QUESTIONS))


def _chart(rng: random.Random, split: Split) -> tuple[str, str]:
    labels = chart.label_texts(rng, split, rng.randint(2, 6))
    step = rng.choice((1, 2, 5, 10, 20, 50, 100))
    bars = [{"label": label, "value": step * rng.randint(1, 5)} for label in labels]
    told = "Bars: " + ", ".join(f"{bar['label']} {bar['value']}" for bar in bars) + "."
    return _about(rng, split, told, {"bars": bars}, chart.QUESTIONS, _CHART)


KINDS: dict[str, Callable[[random.Random, Split], tuple[str, str]]] = {
    "spell": _spell, "join": _join, "copy": _copy, "recase": _recase, "letter": _letter, "number": _number,
    "reading": _reading, "scene": _scene, "boxes": _boxes, "chart": _chart,
}  # fmt: skip


def text_sample(seed: int, index: int, split: Split = "train", kind: str | None = None) -> tuple[str, str]:
    """(question, answer) without a picture, deterministic from (seed, index, split); ``kind`` is an entry of KINDS."""
    rng = stream("text", seed, index, split)
    chosen = rng.choice(tuple(KINDS))
    return KINDS[kind or chosen](rng, split)
