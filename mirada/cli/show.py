"""What the commands share: looking for media, printing an answer as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from mirada.errors import MediaNotFound
from mirada.types import Delta, Output


def stream(deltas: Iterable[Delta]) -> None:
    """Write the answer piece by piece. Reasoning is shown, dim, only to a person at a terminal."""
    out = sys.stdout
    terminal, dim = out.isatty(), False
    for delta in deltas:
        if delta.reasoning and terminal:
            out.write(("" if dim else "\033[2m") + printable(delta.reasoning))
            dim = True
        if delta.text:
            out.write(("\033[0m\n" if dim else "") + printable(delta.text))
            dim = False
        out.flush()
    out.write("\033[0m\n" if dim else "\n")
    out.flush()


def notes(output: Output) -> None:
    """What was done to media on the caller's behalf, and what to expect, on the error stream."""
    for note in output.notes:
        print(f"mirada: note: {printable(note)}", file=sys.stderr)


def printable(text: str) -> str:
    """Without control characters other than newline and tab: a picture must not steer a terminal through its text."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def check_paths(sources: Iterable[str]) -> None:
    """Raise MediaNotFound for a path where nothing lies: before the model is opened, so that a slip costs no time."""
    for source in sources:
        if "://" not in source and not source.startswith("data:") and not Path(source).exists():
            raise MediaNotFound(f"nothing lies at {source!r}", "check the path; the question comes last, in quotes")
