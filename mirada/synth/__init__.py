"""Synthetic pictures with known truth: deterministic from (task, seed, index, split); NumPy and Pillow only.

>>> from mirada import synth
>>> drawn = synth.sample("line", seed=0, index=7, split="train", level=0.3)
"""

from mirada.synth.phrasing import phrasings
from mirada.synth.sample import TASKS, max_chars_at, more_questions, sample
from mirada.synth.textonly import text_sample
from mirada.synth.types import CHARS, COLOURS, IGNORE, NUM_BOX_CLASSES, SHAPES, Dense, Sample
from mirada.synth.video import VideoSample, video_sample

__all__ = [
    "CHARS",
    "COLOURS",
    "IGNORE",
    "NUM_BOX_CLASSES",
    "SHAPES",
    "TASKS",
    "Dense",
    "Sample",
    "VideoSample",
    "max_chars_at",
    "more_questions",
    "phrasings",
    "sample",
    "text_sample",
    "video_sample",
]
