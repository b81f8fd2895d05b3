"""Private-use characters that stand in for ``<`` and the like while a template runs.

User text must never become control tokens, not even when a template joins two parts of it or puts its own text beside
it. So the first and the last character of every control string are replaced, wherever they occur in user text, by
characters that occur nowhere in the chat. One character stands for one: lengths, white space and offsets stay as they
are, so that a template's logic (trim, length, slices) does the same. After rendering, whatever still reads as a control
string was written by the template; then the marks are put back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from mirada.errors import MessageError

_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class Marks:
    """The marks of one rendering."""

    def __init__(self, control: Iterable[str], allowed: Sequence[str], texts: Iterable[str]) -> None:
        """``control``: strings to disarm; ``allowed``: those that keep their meaning in an assistant's text; ``texts``:
        all that the marks must not occur in. Raises MessageError if the texts use up every private-use character."""
        edges = sorted({text.strip()[at] for text in control for at in (0, -1)})
        free = _unused("".join(texts))
        try:
            pairs = [(edge, next(free)) for edge in edges]
        except StopIteration:
            raise MessageError("the chat holds every private-use character of Unicode", "leave some of them out") from None
        self._hide = {ord(edge): mark for edge, mark in pairs}
        self._show = {ord(mark): edge for edge, mark in pairs}
        self._escaped = [(f"\\u{ord(mark):04x}", mark) for _, mark in pairs if ord(mark) <= 0xFFFF]
        ordered = sorted(filter(None, allowed), key=len, reverse=True)
        self._allowed = re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None

    def hide(self, text: str) -> str:
        """Disarm every control string, whole or in part."""
        return text.translate(self._hide)

    def hide_assistant(self, text: str) -> str:
        """Disarm every control string but the allowed ones."""
        if self._allowed is None:
            return self.hide(text)
        pieces = self._allowed.split(text)
        return "".join(piece if index % 2 else self.hide(piece) for index, piece in enumerate(pieces))

    def hide_json(self, value: Any) -> Any:
        """Disarm every string inside a JSON value, keys included."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide(str(key)): self.hide_json(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_json(item) for item in value]
        return value

    def settle(self, rendered: str) -> str:
        """Undo a template's ``\\uXXXX`` escapes of marks (``tojson(ensure_ascii=True)``), so that a mark is one character."""
        if "\\u" in rendered:
            for escape, mark in self._escaped:
                rendered = rendered.replace(escape, mark)
        return rendered

    def show(self, text: str) -> str:
        """Put the characters back."""
        return text.translate(self._show)


def _unused(text: str) -> Iterator[str]:
    used = frozenset() if text.isascii() else frozenset(text)
    escapes = text.lower() if "\\u" in text.lower() else ""
    for code in chain(*_PRIVATE):
        if chr(code) not in used and f"\\u{code:04x}" not in escapes:
            yield chr(code)


def parse_arguments(text: str) -> Any:
    """Arguments of a tool call as an object where the text is one, else as the text itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
