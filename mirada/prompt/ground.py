"""Boxes, points and outlines that an answer names, while it streams -> ``types.Annotation``, in pixels of the originals.

How families say them (``PromptFormat.markup``, ``PromptFormat.clicks``):

- Qwen2-VL: ``<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`` in thousandths of the
  picture (arXiv 2409.12191, 2.2.1), one pair of tags a box. Models tuned from it for screens write one pair of numbers in
  these tags, ``click(start_box='<|box_start|>(x,y)<|box_end|>')``: a point (ms-swift, UI-TARS). What its tokens
  ``<|quad_start|>`` hold is written nowhere; three or more corners are taken for an outline.
- Keye-VL, in thousandths (Table 1 of arXiv 2507.01949 and of 2509.01563): ``<|box_start|>[[x1, y1, x2, y2], [x3, y3, x4,
  y4]]<|box_end|>``, one box or several of one object, points in ``<|point_start|>[[x1, y1]]<|point_end|>``, and outlines in
  ``<|polygon_start|>[[[x1, y1], [x2, y2], [x3, y3]]]<|polygon_end|>`` (plain text: its vocabulary has no such token); text
  that was read, in ``<|ocr_text_start|>``, is a label like an object's name, and ``<|clip_time_start|>`` has seconds.
- Kimi-VL: calls such as ``pyautogui.click(x=0.25, y=0.5)``, ``pyautogui.click(0.25, 0.5)`` or a bare ``(x=0.25, y=0.5)``, and
  ``"bbox_2d": [x1, y1, x2, y2]`` or ``"point_2d": [x, y]`` in JSON, in fractions of the picture; a number above 1 is none of
  these. Its makers write the unit nowhere: users and the harness ScreenSpot-Pro read it so.

The rules:

- A mark counts once its closing tag is there. Inside it stand two numbers for each corner, with any of ``( ) [ ] ,`` and white
  space around them; what holds anything else, or any other count than the mark needs, is text like any other. A box has two
  corners; of several boxes in one mark each is one, with the mark's label.
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
_KINDS = ("object_ref", "ocr_text", "box", "quad", "polygon", "point", "clip_time")
_TAG = re.compile(rf"<\|({'|'.join(_KINDS)})_(start|end)\|>")
_LONGEST = max(len(f"<|{kind}_start|>") for kind in _KINDS)
_NUMBER = r"-?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})"
_ONLY_NUMBERS = re.compile(rf"[\s,()\[\]]*(?:{_NUMBER}[\s,()\[\]]+)*{_NUMBER}[\s,()\[\]]*")
_SPACE = r"\s{0,4}"
_X, _Y = rf"{_SPACE}x{_SPACE}={_SPACE}", rf"{_SPACE}y{_SPACE}={_SPACE}"
_ACTIONS = "click|doubleClick|rightClick|middleClick|tripleClick|moveTo|dragTo"
"""Calls of pyautogui whose first two numbers are a place."""
_CLICK = re.compile(
    rf"(?:\b([A-Za-z]{{1,24}}))?\({_X}({_NUMBER}){_SPACE},{_Y}({_NUMBER}){_SPACE}[,)]"
    rf"|\bpyautogui\.({_ACTIONS})\({_SPACE}({_NUMBER}){_SPACE},{_SPACE}({_NUMBER}){_SPACE}[,)]"
    rf'|"(bbox_2d|point_2d)"{_SPACE}:{_SPACE}\[((?:{_SPACE}{_NUMBER}{_SPACE},){{1,3}}{_SPACE}{_NUMBER}){_SPACE}\]'
)
_OUTLINES = re.compile(r"\]\s*\]\s*,\s*\[\s*\[")
"""Between two outlines of one mark."""
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
        elif kind == "polygon" and len(bodies := _OUTLINES.split(body)) > 1:
            outlines = [_numbers(one) for one in bodies]
            for numbers in outlines if None not in outlines else ():
                self._place(kind, start, numbers or [])
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
        label = self._said.label
        if len(numbers) % 2 == 0 and (kind == "point" or (kind == "box" and len(points) == 1)):
            for point in points:
                self._add("point", (point,), start, label, "thousand")
        elif kind == "box" and len(numbers) % 4 == 0:
            for at in range(0, len(points), 2):
                self._add("box", tuple(points[at : at + 2]), start, label, "thousand")
        elif kind in ("quad", "polygon") and len(numbers) % 2 == 0 and len(points) >= 3:
            self._add("polygon", tuple(points), start, label, "thousand")
        else:
            self._said.label = ""

    def _click(self, text: str, start: int) -> None:
        """Calls in ``text``, which begins at ``start``, that were not there before."""
        for match in _CLICK.finditer(text):
            label = match[1] or match[4] or ""
            said = match[8] or f"{match[2] or match[5]},{match[3] or match[6]}"
            numbers = [float(one) for one in said.split(",")]
            fits = all(0 <= one <= 1 for one in numbers) and len(numbers) == (4 if match[7] == "bbox_2d" else 2)
            if start + match.end() > self._clicked and fits:
                self._clicked = start + match.end()
                self._name(text[max(0, match.start() - _BEFORE) : match.start()])
                points = tuple(zip(numbers[::2], numbers[1::2], strict=True))
                kind = "box" if len(points) == 2 else "point"
                self._add(kind, points, start + match.start(), label, "unit", self._clicked)

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
