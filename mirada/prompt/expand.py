"""Placeholders to runs of tokens with their spans."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from mirada.errors import MessageError
from mirada.media.grid import Patches
from mirada.prompt.format import PromptFormat
from mirada.prompt.tokenizer import Tokenizer
from mirada.types import Grid, Image, Span, Video


class Expander:
    """``kinds``: id of a placeholder -> "image" or "video". ``silent``: ids of vision marks, which are never learnt."""

    def __init__(self, tokenizer: Tokenizer, form: PromptFormat) -> None:
        self._tokenizer, self._format = tokenizer, form
        pads = {"image": form.image_pad, "video": form.video_pad}
        self.kinds = {tokenizer.control[pad]: kind for kind, pad in pads.items() if pad in tokenizer.control}
        marks = (form.vision_start, form.vision_end, form.frame, form.fast_start, form.fast_end)
        self.silent = frozenset(tokenizer.control[mark] for mark in marks if mark in tokenizer.control)

    def check(self, parts: Sequence[Image | Video], media: Sequence[Patches]) -> None:
        """Raises MessageError unless there is one Patches of the right kind for each part."""
        wanted = [_kind(part) for part in parts]
        given = [patches.kind for patches in media]
        if wanted != given:
            raise MessageError(
                f"the chat holds {_count(wanted)}, but {_count(given)} were prepared{_first_difference(wanted, given)}",
                "prepare every Image and Video of the chat, in its order",
            )

    def check_written(self, written: Sequence[str], parts: Sequence[Image | Video], origin: str) -> None:
        """Raises MessageError unless the template wrote one placeholder of the right kind for each part."""
        wanted = [_kind(part) for part in parts]
        if list(written) != wanted:
            raise MessageError(
                f"{origin} wrote placeholders for {_count(written)}, but the chat holds {_count(wanted)}"
                f"{_first_difference(wanted, written)}",
                f"use a template that writes {self._format.image_pad} or {self._format.video_pad} for each of them",
            )

    def expand(self, patches: Patches, number: int, start: int) -> tuple[list[int], list[Span]]:
        """Tokens in place of the ``number``-th placeholder, and spans for them; the first token is at ``start``."""
        for grid in patches.grids:
            self._check_grid(grid, number)
        if patches.kind == "video" and self._format.video_layout == "frames":
            return self._frames(patches, number, start)
        pad = self._tokenizer.id(self._format.image_pad if patches.kind == "image" else self._format.video_pad)
        if len(patches.grids) != 1 or (patches.kind == "image" and patches.grids[0][0] != 1):
            raise MessageError(
                f"{patches.kind} {number + 1} of the chat has the grids {patches.grids}",
                "this family takes one grid (1, h, w) per picture and one grid (frames, h, w) per video",
            )
        step = self._step(patches) if patches.kind == "video" else 0.0
        form = self._format
        span = Span(
            patches.kind, start, patches.grids[0], number, 0, step, form.merge, patches.key,
            form.flat_positions, form.video_advance,
        )  # fmt: skip
        return [pad] * span.num_tokens, [span]

    def _check_grid(self, grid: Grid, number: int) -> None:
        merge = self._format.merge
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            raise MessageError(
                f"the grid {grid} of picture or video {number + 1} is empty or cannot be merged {merge}x{merge}",
                f"rows and columns of patches must be multiples of {merge}",
            )

    def _step(self, patches: Patches) -> float:
        if self._format.tokens_per_second is None:
            return 1.0
        # In float32, as the reference computes it: seconds between frames, times position units per second.
        seconds = np.float32(1.0 if patches.fps is None else 1.0 / patches.fps)
        return float(seconds * np.float32(self._format.tokens_per_second))

    def _frames(self, patches: Patches, number: int, start: int) -> tuple[list[int], list[Span]]:
        form, tokenizer = self._format, self._tokenizer
        pad, frame = tokenizer.id(form.video_pad), tokenizer.id(form.frame)
        grids: list[Grid] = [(1, h, w) for t, h, w in patches.grids for _ in range(t)]
        fast = patches.fast or (False,) * len(grids)
        times = patches.timestamps
        for name, values in (("fast", fast), ("timestamps", times)):
            if values is not None and len(values) != len(grids):
                raise MessageError(
                    f"video {number + 1} of the chat has {len(grids)} frames, but {len(values)} {name}",
                    "give one for each frame",
                )
        around = (tokenizer.id(form.fast_start), tokenizer.id(form.fast_end)) if any(fast) else (-1, -1)
        ids: list[int] = []
        spans: list[Span] = []
        for index, grid in enumerate(grids):
            ids.append(frame)
            if times is not None:
                ids += tokenizer.encode(f"{times[index]:.1f}")
            if fast[index]:
                ids.append(around[0])
            key = hashlib.blake2b(patches.key + index.to_bytes(4, "little"), digest_size=32).digest()
            spans.append(Span("video", start + len(ids), grid, number, index, 0.0, form.merge, key, form.flat_positions))
            ids += [pad] * spans[-1].num_tokens
            if fast[index]:
                ids.append(around[1])
        return ids, spans


def _kind(part: Image | Video) -> str:
    return "image" if isinstance(part, Image) else "video"


def _count(kinds: Sequence[str]) -> str:
    return " and ".join(f"{kinds.count(kind)} {kind}{'' if kinds.count(kind) == 1 else 's'}" for kind in ("image", "video"))


def _first_difference(wanted: Sequence[str], given: Sequence[str]) -> str:
    if sorted(wanted) != sorted(given):
        return ""
    at = next(index for index, pair in enumerate(zip(wanted, given, strict=True)) if pair[0] != pair[1])
    return f" in another order (number {at + 1} should be {wanted[at]}, is {given[at]})"
