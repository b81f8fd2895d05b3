"""What the commands share: looking for media, printing an answer as it comes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from mirada.errors import InputError, MediaNotFound
from mirada.media.limits import FetchLimits, show
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


def check_paths(sources: Iterable[str], fix: str = "check the path; the question comes last, in quotes") -> None:
    """Raise MediaNotFound for a path where nothing lies: before the model is opened, so that a slip costs no time."""
    for source in sources:
        # os.path.exists, unlike Path's, takes what is too long for a path.
        if "://" not in source and not source.startswith("data:") and not os.path.exists(source):
            raise MediaNotFound(f"nothing lies at {show(source)}", fix)


def piped(words: Sequence[str]) -> tuple[list[str | bytes], str]:
    """What comes before the question, and the question, with standard input in the place of ``-``. Raises InputError."""
    if "-" not in words:
        return list(words[:-1]), words[-1]
    if words.count("-") > 1:
        raise InputError("'-' is standard input, which can be read only once", "give it once; a file of that name is ./-")
    if sys.stdin.isatty():
        raise InputError("'-' is standard input, and nothing is piped into it", 'write: cat a.png | mirada ask - "What is it?"')
    data = sys.stdin.buffer.read(FetchLimits().video_bytes + 1)
    if words[-1] != "-":
        return [data if word == "-" else word for word in words[:-1]], words[-1]
    try:
        return list(words[:-1]), data.decode().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"the question on standard input is not UTF-8 ({error})", "media come before the question") from error
