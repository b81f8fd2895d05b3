"""What a drawn sample is: picture, question, answer, and a label for every patch.

H, W pixels; h, w patches of 14 pixels; a sub-column is 7 pixels wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

PATCH = 14
CELL = 28
"""Side of one merged token in pixels; every default canvas is a multiple of it."""
MIN_PIXELS = 4 * CELL * CELL
"""Smaller pictures would be enlarged before the model sees them, so none is drawn smaller."""
IGNORE = -100
"""Label of a place where the class is ambiguous or does not apply; no loss is taken there."""

CHARS: tuple[str, ...] = ("", *map(chr, range(33, 127)))
"""Character classes: 0 is none (also the space), then printable ASCII from ``!`` to ``~``."""
CHAR_CLASS: dict[str, int] = {c: i for i, c in enumerate(CHARS) if c} | {" ": 0}
SHAPES: tuple[str, ...] = ("none", "circle", "square", "triangle", "star", "diamond", "cross", "box", "bar")
COLOURS: tuple[str, ...] = (
    "none", "red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray", "cyan",
)  # fmt: skip
NUM_BOX_CLASSES = 11
"""Box classes: 0 is none, d + 1 is the box that carries digit d."""

Split = Literal["train", "held"]


@dataclass(frozen=True, slots=True)
class Dense:
    """Labels per patch.

    ``char`` int16 [h, w, 2]: class (index in CHARS) of the character that owns the sub-column, on every patch row that
    overlaps the ink of its text line by 3 pixels or more; IGNORE where the overlap is 1 or 2 pixels, or where two lines
    meet in one patch; 0 elsewhere and in spaces. A character owns the sub-columns whose centre its advance box covers;
    one too narrow to cover any takes the sub-column under its middle from a neighbour that keeps another.
    ``shape``, ``colour``, ``box`` int8 [h, w]: class of the object that covers a quarter of the patch or has its centre
    there; IGNORE where an object covers 5 % to 25 %; 0 below. ``colour`` is IGNORE all over pictures of text lines.
    """

    char: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    box: np.ndarray

    @staticmethod
    def empty(height: int, width: int, colour: int = 0) -> Dense:
        """All-none labels of a canvas of ``height`` x ``width`` pixels."""
        h, w = height // PATCH, width // PATCH
        return Dense(
            np.zeros((h, w, 2), np.int16),
            np.zeros((h, w), np.int8),
            np.full((h, w), colour, np.int8),
            np.zeros((h, w), np.int8),
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One drawn picture with a question and its exact answer.

    ``image`` uint8 [H, W, 3]; ``facts`` the JSON-able truth from which ``answer`` follows; ``dense`` is None only for
    pictures of odd size (``any_size``), whose patches depend on a later resize.

    Canonical answers: reading gives the exact text (lines joined by one newline in paragraphs, by one space in a
    wrapped line); counts and numbers are digits; colours and shapes one lower-case word; objects "<colour> <shape>";
    places "top left", "top", ... "middle" ... "bottom right"; yes/no questions "yes" or "no"; lists are joined by ", ".
    """

    task: str
    image: np.ndarray
    question: str
    answer: str
    dense: Dense | None
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    """How to draw. ``level`` 0..1 scales lengths and disturbances; ``max_chars`` bounds the text of a line."""

    split: Split = "train"
    level: float = 1.0
    phrasing: Split = "train"
    fonts: str = "debian"
    max_chars: int = 40
