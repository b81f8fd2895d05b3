"""Short videos of one moving shape, with known direction, colour and shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mirada.synth import effects
from mirada.synth.phrasing import ask
from mirada.synth.sample import stream
from mirada.synth.shapes import DRAWN_SHAPES, PAPERS, colours_on, place, shape_mask, tint
from mirada.synth.types import CELL, Split

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, slots=True)
class VideoSample:
    """``frames`` uint8 [T, H, W, 3] (H and W multiples of 28), ``fps`` frames a second; question, answer, truth."""

    frames: np.ndarray
    fps: float
    question: str
    answer: str
    facts: dict[str, Any]


def video_sample(seed: int, index: int, split: Split = "train", level: float = 1.0, num_frames: int = 8) -> VideoSample:
    """A shape that moves left, right, up or down by 4 to 9 pixels a frame; asked for direction, colour or shape.

    ``num_frames`` 2 to 10: more would not fit the 112 x 112 canvas.
    """
    rng = stream("video", seed, index, split)
    side = 4 * CELL
    paper = rng.choice(PAPERS)
    shape, colour, direction = rng.choice(DRAWN_SHAPES), rng.choice(colours_on(paper)), rng.choice(tuple(DIRECTIONS))
    radius = rng.randint(10, 15)
    speed = rng.randint(4, max(4, min(9, (side - 2 * radius - 2) // num_frames)))
    dx, dy = DIRECTIONS[direction]
    travel = speed * (num_frames - 1)
    along, across = rng.randint(radius + 1, side - radius - 2 - travel), rng.randint(radius + 1, side - radius - 2)
    if dx + dy < 0:
        along += travel
    mask, fill = shape_mask(shape, radius), tint(rng, colour, level)
    frames = np.empty((num_frames, side, side, 3), np.uint8)
    path: list[list[int]] = []
    for t in range(num_frames):
        x, y = (along + dx * speed * t, across) if dx else (across, along + dy * speed * t)
        canvas = effects.background(rng, side, side, paper, paper, 0.0)
        place(canvas, mask, x - radius, y - radius, fill)
        frames[t] = effects.disturb(rng, canvas, 0.3 * level)
        path.append([x, y])
    kind = rng.choice(("video_direction", "video_direction", "video_colour", "video_shape"))
    answer = {"video_direction": direction, "video_colour": colour, "video_shape": shape}[kind]
    facts = {"shape": shape, "colour": colour, "direction": direction, "path": path, "radius": radius, "question_type": kind}
    return VideoSample(frames, 2.0, ask(rng, kind, split, object=f"{colour} {shape}"), answer, facts)
