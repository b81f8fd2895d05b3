"""The many ways people ask. Each question type has training phrasings and held-out phrasings, which do not overlap."""

from __future__ import annotations

import random
from typing import Any

PHRASINGS: dict[str, dict[str, tuple[str, ...]]] = {}


def register(kind: str, train: str, held: str) -> None:
    """Add a question type: phrasings one a line, with ``{name}`` places to fill."""
    split = {"train": train, "held": held}
    PHRASINGS[kind] = {name: tuple(line.strip() for line in text.strip().splitlines()) for name, text in split.items()}


def ask(rng: random.Random, kind: str, phrasing: str, **values: Any) -> str:
    """A question of type ``kind``, now and then in another letter case or without its final mark."""
    text = rng.choice(PHRASINGS[kind][phrasing]).format(**values)
    roll = rng.random()
    if roll < 0.08:
        text = text.lower()
    elif roll < 0.16 and text[-1] in "?.":
        text = text[:-1]
    return text


register(
    "read",
    """
    What does the text say?
    What does it say?
    What does this say?
    Read the text.
    Read this.
    Read the text in the image.
    Read out the text.
    Read it to me.
    What is written here?
    What is written in the image?
    What's written here?
    What text is shown?
    What text do you see?
    What text is in the picture?
    What is the text?
    Transcribe this.
    Transcribe the text.
    Transcribe the image.
    Please transcribe the text in this picture.
    OCR
    OCR this image.
    Do OCR.
    Text?
    Please read the text.
    Can you read this?
    Can you read the text for me?
    Extract the text.
    Extract all text from the image.
    Give me the text.
    Type out what is written.
    Write down the text you see.
    What words are shown?
    Which text appears in the image?
    Tell me what it says.
    Copy the text from the picture.
    What does the image say?
    What does the sign say?
    Return the exact text.
    """,
    """
    What is the writing in this picture?
    Could you tell me what is written?
    Spell out the text in the image.
    Please write what you read here.
    What can be read here?
    Recognize the text.
    What's the text in the photo?
    Output the text exactly as shown.
    """,
)
