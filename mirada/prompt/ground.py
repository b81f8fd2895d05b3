"""Boxes, points and outlines that an answer names, while it streams -> ``types.Annotation``, in pixels of the originals.

How families say them (``PromptFormat.markup``, ``PromptFormat.clicks``):

- Qwen2-VL and Keye-VL: ``<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`` in thousandths
  of the picture; four corners in ``<|quad_start|>``, and with Keye-VL points in ``<|point_start|>``, text that was read in
  ``<|ocr_text_start|>`` (a label like an object's name) and seconds of a video in ``<|clip_time_start|>``.
- Kimi-VL: calls such as ``pyautogui.click(x=0.25, y=0.5)``, in fractions of the picture; a number above 1 is none of these.

The rules:

- A mark counts once its closing tag is there. Inside it stand two numbers for each corner, with any of ``( ) [ ] ,`` and white
  space around them; what holds anything else, or any other count than the mark needs, is text like any other.
- A label belongs to the marks that follow it with nothing but white space and commas between, as many as there are.
- Of several pictures and videos the one counts that the answer named last before the mark (``Picture 2``, ``Video 1``,
  counted from 1 over the whole chat, as the prompts of these families count), else the last that the chat shows.
- Where a mark says no time, the time said last before it in the answer counts, for videos alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mirada.media.coords import Point, Scale, View, box_of
from mirada.prompt.format import PromptFormat
from mirada.types import Annotation

MOST = 4096
"""Characters that a mark may have between its tags."""
_BEFORE = 512
"""Characters before a mark in which a picture's name counts."""
_KINDS = ("object_ref", "ocr_text", "box", "quad", "point", "clip_time")
_TAG = re.compile(rf"<\|({'|'.join(_KINDS)})_(start|end)\|>")
_LONGEST = max(len(f"<|{kind}_start|>") for kind in _KINDS)
_NUMBER = r"-?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
_ONLY_NUMBERS = re.compile(rf"[\s,()\[\]]*(?:{_NUMBER}[\s,()\[\]]+)*{_NUMBER}[\s,()\[\]]*")
_CLICK = re.compile(
    rf"\b([A-Za-z]{{1,24}})\(\s{{0,4}}x\s{{0,4}}=\s{{0,4}}({_NUMBER})\s{{0,4}},\s{{0,4}}y\s{{0,4}}=\s{{0,4}}({_NUMBER})\s{{0,4}}[,)]"
)
_NAMED = re.compile(r"\b(picture|image|photo|video)\s{0,2}#?(\d{1,4})(?!\d)|(图片?|视频)\s{0,2}(\d{1,4})(?!\d)", re.IGNORECASE)
_VIDEO_WORDS = ("video", "视频")
_GAP = re.compile(r"[\s,;，、]*")


@dataclass(slots=True)
class _Said:
    """What of an answer counts for the next mark."""

    label: str = ""
    media: int | None = None
    """Index of the view that was named last."""
    time: tuple[float, float] | None = None


class Grounder:
    """``feed`` the answer's text as it comes; annotations are the same however it was cut. ``views``: media of the chat."""

    def __init__(self, form: PromptFormat, views: Sequence[View]) -> None:
        self._views = tuple(views)
        self._marked = any(mark.startswith("<|box") for mark in form.markup)
        self._clicks = form.clicks
        self._rest = ""
        """The beginning of what may become a tag."""
        self._at = 0
        """Characters read, without ``_rest``."""
        self._before = ""
        """The text before ``_at`` outside of marks, its end alone."""
        self._clicked = 0
        """Where the last click ended."""
        self._open: tuple[str, int] | None = None
        """Kind and start of the mark that is being read."""
        self._body: list[str] = []
        self._size = 0
        self._said = _Said()
        self._found: list[Annotation] = []

    def feed(self, text: str) -> tuple[Annotation, ...]:
        """What this piece of the answer completes."""
        if not self._views or not text:
            return ()
        text = self._rest + text
        at = 0
        for match in _TAG.finditer(text) if self._marked else ():
            self._plain(text[at : match.start()])
            self._tag(match[1], match[2] == "start", match[0])
            at = match.end()
        held = _held(text, at) if self._marked else 0
        self._plain(text[at : len(text) - held])
        self._rest = text[len(text) - held :]
        found, self._found = tuple(self._found), []
        return found

    def _plain(self, text: str) -> None:
        """Text without tags, inside a mark or outside."""
        if not text:
            return
        self._at += len(text)
        if self._open is None:
            whole = self._before + text
            if self._clicks:
                self._click(whole, self._at - len(whole))
            self._before = whole[-2 * _BEFORE :]
            return
        if self._size <= MOST:
            self._body.append(text)
        self._size += len(text)

    def _tag(self, kind: str, opens: bool, text: str) -> None:
        start = self._at
        self._at += len(text)
        if opens:  # one that was open is never closed: it was text
            self._open, self._body, self._size = (kind, start), [], 0
            return
        if self._open is not None and self._open[0] == kind and self._size <= MOST:
            self._mark(kind, self._open[1], "".join(self._body))
        self._open, self._body = None, []

    def _mark(self, kind: str, start: int, body: str) -> None:
        said = self._said
        self._name(self._before[-_BEFORE:])
        if self._before and not _GAP.fullmatch(self._before):
            said.label = ""
        if kind in ("object_ref", "ocr_text"):
            said.label = body.strip()
        elif (numbers := _numbers(body)) is None:
            said.label = ""
        elif kind == "clip_time":
            said.time = (numbers[0], numbers[-1]) if 1 <= len(numbers) <= 2 else said.time
        else:
            self._place(kind, start, numbers)
        self._before = ""

    def _name(self, before: str) -> None:
        """Take in which picture or video the text before a mark names, if any."""
        for match in _NAMED.finditer(before):
            kind = "video" if (match[1] or match[3]).lower() in _VIDEO_WORDS else "image"
            fitting = [index for index, view in enumerate(self._views) if view.kind == kind]
            if 1 <= (number := int(match[2] or match[4])) <= len(fitting):
                self._said.media = fitting[number - 1]

    def _place(self, kind: str, start: int, numbers: list[float]) -> None:
        points = list(zip(numbers[::2], numbers[1::2], strict=False))
        whole = len(numbers) % 2 == 0 and {"box": len(points) == 2, "quad": len(points) >= 3, "point": True}[kind]
        if not whole:
            self._said.label = ""
        elif kind == "point":
            for point in points:
                self._add("point", (point,), start, self._said.label, "thousand")
        else:
            self._add("box" if kind == "box" else "polygon", tuple(points), start, self._said.label, "thousand")

    def _click(self, text: str, start: int) -> None:
        """Calls in ``text``, which begins at ``start``, that were not there before."""
        for match in _CLICK.finditer(text):
            x, y = float(match[2]), float(match[3])
            if start + match.end() > self._clicked and 0 <= x <= 1 and 0 <= y <= 1:
                self._clicked = start + match.end()
                self._name(text[max(0, match.start() - _BEFORE) : match.start()])
                self._add("point", ((x, y),), start + match.start(), match[1], "unit", self._clicked)

    def _add(
        self,
        kind: Literal["box", "point", "polygon"],
        points: tuple[Point, ...],
        start: int,
        label: str,
        scale: Scale,
        end: int | None = None,
    ) -> None:
        index = self._said.media
        chosen = "only" if len(self._views) == 1 else "last" if index is None else "named"
        index = len(self._views) - 1 if index is None else index
        view = self._views[index]
        placed = tuple(view.to_original(point, scale) for point in points)
        placed = box_of(placed) if kind == "box" else placed
        self._found.append(
            Annotation(
                kind=kind,
                points=tuple((round(x, 2), round(y, 2)) for x, y in placed),
                label=label,
                media=view.kind,
                index=sum(other.kind == view.kind for other in self._views[:index]),
                size=(view.size[1], view.size[0]),
                resized=(view.resized[1], view.resized[0]),
                time=self._said.time if view.kind == "video" else None,
                chosen=chosen,
                start=start,
                end=self._at if end is None else end,
            )
        )


def _held(text: str, at: int) -> int:
    """Length of the end of ``text`` past ``at`` that may be the beginning of a tag."""
    found = text.rfind("<", max(at, len(text) - _LONGEST))
    rest = text[found:] if found >= 0 else ""
    could = any(f"<|{kind}_{side}|>".startswith(rest) for kind in _KINDS for side in ("start", "end"))
    return len(rest) if rest and could else 0


def _numbers(body: str) -> list[float] | None:
    """The numbers of a mark, or None where it holds anything else."""
    return [float(one) for one in re.findall(_NUMBER, body)] if _ONLY_NUMBERS.fullmatch(body) else None
