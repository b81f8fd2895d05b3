"""Checks of what callers may have made without the renderer: prompts, spans and patches. Engine and caches believe these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from mirada.errors import MessageError, SettingsError
from mirada.media.grid import GridRule, Patches
from mirada.types import Prompt, Span

KINDS = ("image", "video")
MOST_FRAMES = 1 << 31
RENDER = "give a prompt as the model's renderer makes it"
PREPARE = "give media as they were prepared for this model"


def check_prompt(prompt: Prompt, vocabulary: int, merge: int) -> None:
    """MessageError unless ``prompt`` has tokens of a vocabulary of that size, and spans of squares of ``merge`` patches."""
    try:
        tokens = np.asarray(prompt.tokens)
    except (ValueError, OverflowError):
        tokens = np.empty(0, object)
    if tokens.ndim == 1 and not len(tokens):
        raise MessageError("the prompt has no tokens", "give at least one message")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iuO" or (tokens.dtype.kind == "O" and not _numbers(tokens)):
        raise MessageError("the prompt's tokens are no row of whole numbers", RENDER)
    if not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise MessageError(f"the prompt has a token outside the vocabulary of {vocabulary}", "render it for this very model")
    for span in prompt.spans:
        if (wrong := _wrong_span(span, merge)) is not None:
            raise MessageError(f"a span of the prompt has {wrong}", RENDER)


def check_media(media: Any, rule: GridRule) -> None:
    """MessageError unless ``media`` are patches as ``rule`` makes them."""
    if isinstance(media, str | bytes) or not isinstance(media, Seq):
        raise MessageError(f"media are given as a {type(media).__name__}", "give a list of prepared media")
    for item in media:
        if not isinstance(item, Patches):
            raise MessageError(f"a prepared medium is a {type(item).__name__}", PREPARE)
        if (wrong := _wrong_patches(item, rule)) is not None:
            raise MessageError(f"a prepared medium has {wrong}", PREPARE)


def check_tools(tools: Any) -> None:
    """SettingsError unless ``tools`` is None or a list of mappings."""
    if tools is None:
        return
    if isinstance(tools, str | bytes) or not isinstance(tools, Seq) or not all(isinstance(tool, Mapping) for tool in tools):
        raise SettingsError(f"tools is {tools!r:.80}", "give a list of mappings, one for each tool")


def check_salt(salt: Any) -> None:
    """SettingsError unless ``salt`` is text that can be hashed."""
    if not isinstance(salt, str):
        raise SettingsError(f"salt is a {type(salt).__name__}", "give a string, the same for all who may share what is kept")
    try:
        salt.encode()
    except UnicodeEncodeError:
        raise SettingsError("salt holds half of a surrogate pair, which is no character", "give valid Unicode") from None


def _wrong_span(span: Any, merge: int) -> str | None:
    if not isinstance(span, Span):
        return f"a {type(span).__name__} in its place"
    for name in ("start", "media_id", "frame"):
        if not _is_whole(getattr(span, name)):
            return f"{name}={getattr(span, name)!r}"
    if not 0 <= span.frame < MOST_FRAMES:
        return f"frame={span.frame!r}"
    if span.kind not in KINDS:
        return f"kind={span.kind!r}"
    if span.merge != merge:
        return f"merge={span.merge!r}, and the model's is {merge}"
    if not _is_grid(span.grid, merge):
        return f"grid={span.grid!r}"
    if not isinstance(span.hash, bytes):
        return f"a content key of type {type(span.hash).__name__}"
    if not isinstance(span.t_step, int | float) or not math.isfinite(span.t_step):
        return f"t_step={span.t_step!r}"
    return None


def _wrong_patches(item: Patches, rule: GridRule) -> str | None:
    if item.kind not in KINDS:
        return f"kind={item.kind!r}"
    if not item.grids or not all(_is_grid(grid, rule.merge) for grid in item.grids):
        return f"grids={item.grids!r}"
    count = sum(t * h * w for t, h, w in item.grids)
    shape = (count, 3, *((rule.frames,) if rule.frames > 1 else ()), rule.patch, rule.patch)
    if not isinstance(item.pixels, np.ndarray):
        return f"pixels of type {type(item.pixels).__name__}"
    if item.pixels.dtype != np.uint8 or item.pixels.shape != shape:
        return f"pixels {item.pixels.dtype} {list(item.pixels.shape)} where uint8 {list(shape)} belong"
    return None


def _is_grid(grid: Any, merge: int) -> bool:
    """Whether it is (t, h, w), of whole squares of ``merge`` patches."""
    return (
        isinstance(grid, tuple) and len(grid) == 3 and all(_is_whole(side) and side > 0 for side in grid)
        and grid[1] % merge == 0 and grid[2] % merge == 0
    )  # fmt: skip


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _numbers(values: np.ndarray) -> bool:
    """Whether all of them are whole numbers (numpy has no type for very large ones)."""
    return all(isinstance(value, int) for value in values)
