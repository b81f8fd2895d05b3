"""How families write tool calls, and how a call is read while it comes: its name first, then its arguments piece by piece.

Qwen (and Keye-VL, which builds on Qwen3) writes ``<tool_call>`` JSON ``</tool_call>``. Kimi writes the calls of one reply
between ``<|tool_calls_section_begin|>`` and ``<|tool_calls_section_end|>``, each as ``<|tool_call_begin|>functions.NAME:NUMBER
<|tool_call_argument_begin|>`` JSON ``<|tool_call_end|>`` (the chat template and ``docs/tool_call_guidance.md`` of Kimi-K2).
"""

from __future__ import annotations

import json
import re

from mirada.prompt.format import PromptFormat
from mirada.types import ToolCall

NAME, NUMBER = "\1", "\0"
"""Places in ``written``."""
HEAD_MOST = 512
"""Characters of a call within which its name and the beginning of its arguments must stand to be told while it comes."""
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)+")\s*,\s*"arguments"\s*:\s*(?=\{)')
_MARKED_NAME = re.compile(r"\s*(?:functions\.)?(\S(?:.*?\S)??)(?::\d+)?\s*", re.DOTALL)
_OUTSIDE, _INSIDE = re.compile(r'[{}\[\]"]'), re.compile(r'["\\]')
_ENDS = re.compile(r'["\\\x00-\x1f]')
"""What ends a string of JSON, goes on with it otherwise, or cannot stand in one."""


class JsonText:
    """Follows JSON while it is written, so that what stands inside its strings is no tag.

    What does not begin as an object or a list is no JSON, and neither is what has a control character in a string; from there
    on, and after the end of the value, a tag is a tag wherever it stands.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._begun = self._over = self._quoted = self._escaped = False

    def find(self, text: str, at: int, tags: re.Pattern[str]) -> tuple[re.Match[str] | None, bool]:
        """(the first of ``tags`` in ``text[at:]`` that is not inside a string, whether the text ends inside one). What follows
        a tag that is found is not read; an end that may be the beginning of a tag is read again with what follows it."""
        tag = tags.search(text, at)
        while at < len(text) and not self._over:
            if not self._begun:
                at = self._begin(text, at)
            elif self._quoted:
                at = self._string(text, at)
            else:
                if tag is not None and tag.start() < at:  # it was inside a string
                    tag = tags.search(text, at)
                mark = _OUTSIDE.search(text, at)
                if mark is None or (tag is not None and tag.start() < mark.start()):
                    return tag, False
                at = mark.end()
                self._mark(mark[0])
        return (tags.search(text, at), False) if self._over else (None, self._quoted)

    def _begin(self, text: str, at: int) -> int:
        while at < len(text) and text[at].isspace():
            at += 1
        if at < len(text):
            self._begun, self._over = True, text[at] not in "{["
        return at

    def _string(self, text: str, at: int) -> int:
        """Where the string ends, or the text."""
        if self._escaped:
            self._escaped, at = False, at + 1
        while match := _ENDS.search(text, at):
            at = match.end()
            if match[0] != "\\":
                self._quoted, self._over = False, match[0] != '"'
                return at
            self._escaped = at == len(text)
            at += 1
        return len(text)

    def _mark(self, found: str) -> None:
        if found == '"':
            self._quoted = True
        else:
            self._depth += 1 if found in "{[" else -1
            self._over = self._depth <= 0


class JsonCall:
    """Reads ``{"name": ..., "arguments": {...}}``. As soon as the object of arguments opens, it is told, as it is written.

    Written in another order or form (arguments that are no object, or that are left out), it is read at its end. ``begun``:
    a part of it was told.
    """

    def __init__(self, number: int) -> None:
        self.begun = False
        self._id = f"call_{number}"
        self._body: list[str] = []
        self._size = 0
        self._depth = 0
        self._tail: list[str] = []
        """What follows the arguments."""
        self._quoted = self._escaped = self._done = False

    def feed(self, text: str) -> list[ToolCall]:
        """The pieces that this makes certain: the first has the name, the others none."""
        if self.begun:
            piece = self._arguments(text)
            return [ToolCall("", piece)] if piece else []
        known = self._size
        self._body.append(text)
        self._size += len(text)
        if known >= HEAD_MOST:
            return []
        body = "".join(self._body)
        match = _HEAD.match(body[:HEAD_MOST])
        name = None if match is None else _name(match[1])
        if match is None or name is None:
            return []
        self.begun = True
        return [ToolCall(name, self._arguments(body[match.end() :]), self._id)]

    def close(self) -> list[ToolCall] | None:
        """What is left, now that the call is at its end; None if it was no call."""
        if self.begun:
            return []
        call = read_call(self.text, self._id)
        return None if call is None else [call]

    @property
    def text(self) -> str:
        """All that was read, for one that is no call after all."""
        return "".join(self._body)

    @property
    def left(self) -> str:
        """What follows the arguments in vain."""
        tail = "".join(self._tail).strip()
        try:
            json.loads('{"arguments": 0' + tail)  # the end of the object, perhaps with more keys
        except (ValueError, RecursionError):
            return tail
        return ""

    def _arguments(self, text: str) -> str:
        """What of ``text`` belongs to the object of arguments."""
        if self._done:
            self._tail.append(text)
            return ""
        at = 0
        if self._escaped and text:
            self._escaped, at = False, 1
        while match := (_INSIDE if self._quoted else _OUTSIDE).search(text, at):
            at = match.end()
            found = match[0]
            if found == '"':
                self._quoted = not self._quoted
            elif found == "\\":
                self._escaped = at == len(text)
                at += 1
            else:
                self._depth += 1 if found in "{[" else -1
                if self._depth == 0:
                    self._done = True
                    self._tail.append(text[at:])
                    return text[:at]
        return text


class MarkedCall:
    """Reads a call of Kimi's: a head with the name (``name``), then the arguments as they are written."""

    def __init__(self, number: int) -> None:
        self.begun = False
        self._id = f"call_{number}"
        self._head: list[str] = []
        self._space = ""
        self._said = self._nameless = False

    def feed(self, text: str) -> list[ToolCall]:
        if not self.begun:
            self._head.append(text)
            return []
        whole = text if self._said else text.lstrip()
        kept = whole.rstrip()
        if not kept:
            self._space += whole
            return []
        piece, self._space = self._space + kept, whole[len(kept) :]
        self._said = True
        return [ToolCall("", piece)]

    def name(self) -> list[ToolCall] | None:
        """The head is whole; None if it names nothing."""
        match = _MARKED_NAME.fullmatch("".join(self._head))
        if match is None or self._nameless:
            self._nameless = True
            return None
        self.begun = True
        return [ToolCall(match[1], "", self._id)]

    def close(self) -> list[ToolCall] | None:
        if not self.begun:
            return None
        return [] if self._said else [ToolCall("", "{}")]

    @property
    def text(self) -> str:
        return "".join(self._head)

    @property
    def left(self) -> str:
        return ""


def read_call(body: str, id: str = "call_0") -> ToolCall | None:
    """``{"name": ..., "arguments": ...}`` -> ToolCall, or None if it is not that. Arguments may be left out."""
    try:
        value = json.loads(body)
        name, arguments = value["name"], value.get("arguments", {})
        if not isinstance(name, str) or not name:
            return None
        name.encode()
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=_has_surrogates(body))
        text.encode()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return ToolCall(name, text, id)


def written(form: PromptFormat) -> tuple[str, str, str]:
    """How the family writes a call around its arguments: (before, after, what is between two calls), with ``NAME`` for the
    function's name (``spelled``) and, where calls are numbered, ``NUMBER`` for the number."""
    tags = form.tool_call
    if form.call_arguments:
        return f"{tags.open}functions.{NAME}:{NUMBER}{form.call_arguments}", tags.close, ""
    return f'{tags.open}\n{{"name": "{NAME}", "arguments": ', f"}}\n{tags.close}", "\n"


def spelled(form: PromptFormat, name: str) -> str:
    """A function's name as it stands in a call."""
    return name if form.call_arguments else json.dumps(name, ensure_ascii=False)[1:-1]


def _name(quoted: str) -> str | None:
    try:
        name = json.loads(quoted)
        name.encode()
    except ValueError:
        return None
    return name


def _has_surrogates(body: str) -> bool:
    # JSON may escape half a surrogate pair, which no UTF-8 can hold: such arguments stay escaped.
    return "\\ud" in body.lower()
