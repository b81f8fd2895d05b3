"""Replies to reasoning, answer and tool calls, while they stream.

The rules, chosen so that each decision needs no more than a tag's length of what follows, and so that nothing is lost:

- ``<think>`` and ``<analysis>`` open only before any answer text; inside, all is reasoning up to their own closing tag.
- ``<answer>`` opens only before any answer text; after ``</answer>`` further text belongs to the answer.
- A tool call (``prompt.calls``) opens wherever answer text may stand, and ends at its first closing tag that is not inside a
  string of its JSON; if what is inside is no call, the whole of it, tags included, is answer text. Once its name and the
  beginning of its arguments are read it is a call, and its arguments are told as they are written, be they JSON to the end or
  not; what then follows in vain is text. Kimi's marks around the calls of a reply are dropped.
- A tag anywhere else (nested, stray, closing what is not open) is text. What is still open at the end is closed there.
- White space next to a tag is dropped unless answer text stands on both sides; a reply without tags comes through as it is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from typing import Literal

from mirada.prompt.calls import JsonCall, JsonText, MarkedCall
from mirada.prompt.format import PromptFormat, Tags
from mirada.types import Delta, Message, Text, ToolCall, joined_calls

State = Literal["start", "text", "answer", "think", "analysis", "section", "head", "call"]
Kind = Literal["think", "analysis", "answer", "call"]
KINDS: tuple[Kind, ...] = ("think", "analysis", "answer", "call")


class Parser:
    """``feed`` text as it comes, ``close`` at the end; the joined deltas are the same however the text was cut.

    ``inside``: the block that the prompt has already opened, if any. ``kinds``: the tags that count, others are text.
    ``most_calls``: after so many tool calls the reply is ``full``, and what follows is left out.
    """

    def __init__(
        self,
        form: PromptFormat,
        inside: Literal["think", "analysis", "answer"] | None = None,
        kinds: Collection[Kind] = KINDS,
        most_calls: int | None = None,
    ) -> None:
        think, analysis, answer = (_counted(form, kind, kinds) for kind in ("think", "analysis", "answer"))
        self._tool = _counted(form, "call", kinds)
        self._marked = bool(form.call_arguments)
        section = form.call_section if "call" in kinds else _NONE
        calls: dict[str, State] = {self._tool.open: "head" if self._marked else "call", section.open: "section"}
        self._tags: dict[State, _TagSet] = {
            "start": _TagSet({think.open: "think", analysis.open: "analysis", answer.open: "answer", **calls}),
            "text": _TagSet(calls),
            "answer": _TagSet({answer.close: "text", **calls}),
            "think": _TagSet({think.close: "start"}),
            "analysis": _TagSet({analysis.close: "start"}),
            "section": _TagSet({section.close: "start", **calls}),
            "head": _TagSet({self._tool.close: "start", form.call_arguments: "call"}),
            "call": _TagSet({self._tool.close: "start"}),
        }
        self._closing: dict[State, str] = {"think": form.think.close, "analysis": form.analysis.close}
        self._state: State = inside or "start"
        self._back: State = "start"
        """Where a tool call returns to."""
        self._rest = ""
        """The beginning of what may become a tag."""
        self._space: list[str] = []
        """White space that is dropped if a tag follows."""
        self._outer: State = "start"
        """Where Kimi's section of calls returns to."""
        self._call: JsonCall | MarkedCall = JsonCall(0)
        """The tool call that is open."""
        self._json = JsonText()
        """What it holds."""
        self._most_calls = most_calls
        self.full = False
        self._fresh = inside is not None
        """Whether the block that is open has no text yet."""
        self._tagged = inside is not None
        self._answered = self._reasoned = self._apart = False
        self._num_calls = 0
        self._out: list[Delta] = []

    @property
    def reasoning(self) -> tuple[str, str] | None:
        """Inside a block of reasoning: the tag that closes it, and what has been read of that tag, if it has begun."""
        tag = self._closing.get(self._state)
        return None if tag is None else (tag, self._rest)

    @property
    def opening(self) -> bool:
        """Whether the answer has yet to begin: a block may open, is open without any answer in it, or was just closed."""
        return not self._answered and self._state in ("start", "think", "analysis", "answer")

    @property
    def tagged(self) -> bool:
        """Whether any tag was read, so that white space before the answer is none of it."""
        return self._tagged

    def feed(self, text: str) -> list[Delta]:
        """What this piece makes certain; perhaps nothing yet."""
        text = self._rest + text
        at = 0
        while at < len(text) and not self.full:
            tags = self._tags[self._state]
            if self._state == "start":
                begin = _skip_space(text, at)
                if begin > at:
                    self._space.append(text[at:begin])
                    at = begin
                    continue
                match = tags.pattern.match(text, at)
                if match is None:
                    if tags.may_begin(text, at):
                        break
                    self._state = "text"
                    continue
            else:
                match, quoted = self._find(tags, text, at)
                if quoted:
                    self._content(text[at:])
                    at = len(text)
                    break
            stop = match.start() if match else len(text) - tags.held(text[max(at, len(text) - tags.longest) :])
            if stop > at:
                self._content(text[at:stop])
            at = stop
            if match is None:
                break
            self._tag(tags.leads[match.group()])
            at = match.end()
        self._rest = "" if self.full else text[at:]
        return self._taken()

    def close(self) -> list[Delta]:
        """What was held back, now that nothing follows."""
        rest, self._rest = self._rest, ""
        if rest:
            if self._state == "start":
                self._state = "text"
            self._content(rest)
        if self._state in ("head", "call"):
            self._end_call(closed=False)
        if self._space and not self._tagged:
            self._out.append(Delta(text="".join(self._space)))
        self._space = []
        return self._taken()

    def _find(self, tags: _TagSet, text: str, at: int) -> tuple[re.Match[str] | None, bool]:
        """(the next tag that counts, whether all of ``text`` is read and ends inside a string of a call)."""
        return self._json.find(text, at, tags.pattern) if self._state == "call" else (tags.pattern.search(text, at), False)

    def _content(self, text: str) -> None:
        """Text of the present state, with its white space at the end held back."""
        if self._state in ("head", "call"):
            self._tell(self._call.feed(text))
            return
        whole = text.rstrip()
        space = text[len(whole) :]
        if whole:
            first = self._fresh if self._state in ("think", "analysis") else self._tagged and not self._answered
            whole = whole.lstrip() if first else "".join(self._space) + whole
            self._space = []
            self._fresh = False
            self._give(whole)
        if space:
            self._space.append(space)

    def _give(self, text: str) -> None:
        if self._state in ("think", "analysis"):
            # Two blocks of reasoning (an analysis, then a thought) are set apart by an empty line.
            self._out.append(Delta(reasoning="\n\n" + text if self._apart else text))
            self._apart, self._reasoned = False, True
        else:
            self._answered = True
            self._out.append(Delta(text=text))

    def _tag(self, leads: State) -> None:
        """A tag that counts here was read whole."""
        if self._state == "head" and leads == "call":
            self._name_call()
        elif self._state in ("head", "call"):
            self._end_call(closed=True)
        elif leads in ("head", "call"):
            # Whether it is a call, and so whether the space before it goes, is known later.
            self._back, self._state, self._json = self._state, leads, JsonText()
            self._call = MarkedCall(self._num_calls) if self._marked else JsonCall(self._num_calls)
        elif leads == "section":
            self._outer = self._outer if self._state == "section" else self._state
            self._tagged, self._state = True, leads
        elif self._state == "section":
            self._state = self._outer
        else:
            if self._state != "answer":
                self._space = []
            self._tagged = self._fresh = True
            self._apart = self._reasoned
            self._state = leads

    def _tell(self, calls: list[ToolCall]) -> None:
        """Pieces of the open call."""
        if calls:
            self._tagged = True
            self._out += [Delta(tool_calls=(call,)) for call in calls]

    def _name_call(self) -> None:
        assert isinstance(self._call, MarkedCall)
        named = self._call.name()
        if named is not None:
            self._tell(named)
            self._state = "call"  # its JSON begins here
        else:  # it names nothing: this and what follows, to the closing tag, is text
            self._call.feed(self._tags["head"].tag_of("call"))

    def _end_call(self, closed: bool) -> None:
        call = self._call
        left = call.close()
        self._state = self._back
        if left is not None:
            self._tell(left)
            self._num_calls += 1
            self.full = self._num_calls == self._most_calls
            text = call.left
        else:
            text = self._tool.open + call.text + (self._tool.close if closed else "")
        if text:
            self._state = "text" if self._state == "start" else self._state
            self._content(text)

    def _taken(self) -> list[Delta]:
        """The deltas so far, neighbours of one kind joined."""
        taken: list[Delta] = []
        for kind, run in itertools.groupby(self._out, key=lambda delta: (bool(delta.text), bool(delta.reasoning))):
            pieces = list(run)
            if kind == (False, False):
                taken += pieces
            else:
                taken.append(
                    Delta(text="".join(piece.text for piece in pieces), reasoning="".join(piece.reasoning for piece in pieces))
                )
        self._out = []
        return taken


class _TagSet:
    """The tags that count in one state, and the state that each leads to."""

    def __init__(self, leads: Mapping[str, State]) -> None:
        self.leads: dict[str, State] = {tag: state for tag, state in leads.items() if tag}
        self.longest = max(map(len, self.leads), default=1)
        ordered = sorted(self.leads, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def tag_of(self, state: State) -> str:
        return next(tag for tag, leads in self.leads.items() if leads == state)

    def may_begin(self, text: str, at: int) -> bool:
        """Whether all that follows ``at`` is the beginning of a tag."""
        return len(text) - at < self.longest and any(tag.startswith(text[at:]) for tag in self.leads)

    def held(self, text: str) -> int:
        """Length of the longest end of ``text`` that may be the beginning of a tag."""
        for size in range(min(len(text), self.longest - 1), 0, -1):
            if any(tag.startswith(text[-size:]) for tag in self.leads):
                return size
        return 0


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


_NONE = Tags("", "")


def _counted(form: PromptFormat, kind: Kind, kinds: Collection[Kind]) -> Tags:
    tags = {"think": form.think, "analysis": form.analysis, "answer": form.answer, "call": form.tool_call}
    return tags[kind] if kind in kinds else _NONE


def parse(text: str, form: PromptFormat) -> Message:
    """A whole reply -> the assistant's message with its reasoning and tool calls."""
    parser = Parser(form)
    deltas = parser.feed(text) + parser.close()
    answer = "".join(delta.text for delta in deltas)
    calls = joined_calls(call for delta in deltas for call in delta.tool_calls)
    parts = [*([Text(answer)] if answer else []), *calls]
    return Message("assistant", parts, reasoning="".join(delta.reasoning for delta in deltas))


_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def extract_answer(text: str) -> str:
    """The bare answer of a reply, as Keye-VL is graded (Keye ``evaluation``): after the last ``</analysis>`` and the last
    ``</think>``; the last ``<answer>`` if there is one; inside that the content of the last ``\\boxed{}`` if there is one."""
    text = text.rpartition("</analysis>")[2]
    text = text.rpartition("</think>")[2].strip()
    bodies = _ANSWER.findall(text)
    if bodies:
        text = bodies[-1].strip()
    boxed = _last_boxed(text)
    return text if boxed is None else boxed


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at]
    return None
