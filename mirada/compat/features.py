"""Pictures, videos and prompts as the tensors that transformers' processors give, and back.

N patches, C channels, P patch side, T frames, H, W pixels, L tokens of the longest prompt, B prompts. Layouts are those of
``Qwen2VLProcessor`` (transformers 4.45.2), ``KeyeProcessor`` (Keye-VL-8B-Preview ``processing_keye.py``), keye-vl-utils 1.5.2
with Keye-VL-1.5, and ``KimiVLProcessor`` (``image_grid_hws``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image as pil
from torch import Tensor

from mirada.errors import MediaUnsupported, MessageError, SettingsError
from mirada.media.exact import resize_bilinear
from mirada.media.grid import Patches, content_key, denormalise, normalise
from mirada.media.limits import FetchLimits
from mirada.media.prepare import prepare
from mirada.media.rule import MediaRule
from mirada.media.video import merged, resize
from mirada.prompt.format import PromptFormat
from mirada.prompt.tokenizer import Tokenizer
from mirada.types import Grid, Image, Prompt, Span

MEDIA = ("pixel_values", "image_grid_thw", "image_grid_hws", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
"""Names of the tensors that ``prompts`` reads."""
PER_VIDEO = ("fps", "height", "width", "fast_height", "fast_width", "timestamps", "frame_types")
"""What the utility packages say of each video."""


# Media -> patches


def picture(source: Any, rule: MediaRule, limits: FetchLimits) -> Patches:
    """One picture through the image processor alone: the utility package's resize is the caller's. Alpha is dropped."""
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
        source = source.transpose(1, 2, 0) if source.ndim == 3 and source.shape[0] in (1, 3, 4) else source
    return prepare(Image(source), replace(rule, first=None, alpha="drop"), limits)


def video(source: Any, rule: MediaRule, facts: Mapping[str, Any]) -> Patches:
    """One video of decoded frames: float or uint8 [T, C, H, W], uint8 [T, H, W, C], or a list of pictures."""
    frames = _frames(source)
    if rule.video is None:
        raise MediaUnsupported("this model takes pictures, no videos", "give the frames as pictures")
    grid, num = rule.grid, len(frames)
    timestamps = facts.get("timestamps")
    kinds = facts.get("frame_types")
    fast = None if kinds is None else tuple(bool(kind) for kind in kinds)
    sizes = _sizes(frames, fast or (False,) * num, rule, facts)
    if rule.video == "slowfast":
        cut = [grid.patchify(resize_bilinear(f, size)[None]) for f, size in zip(frames, sizes, strict=True)]
        pixels, grids = np.concatenate(cut), merged(sizes, grid.patch)
    else:
        pixels = grid.patchify(np.stack([resize(frame, sizes[0], rule) for frame in frames]))
        grids = ((-(-num // grid.frames), sizes[0][0] // grid.patch, sizes[0][1] // grid.patch),)
    return Patches(
        "video", pixels, grids, frames.shape[1:3], content_key(pixels, "video", grids, grid),
        timestamps=None if timestamps is None else tuple(map(float, timestamps)), fast=fast, fps=facts.get("fps"),
    )  # fmt: skip


def _sizes(frames: np.ndarray, fast: Sequence[bool], rule: MediaRule, facts: Mapping[str, Any]) -> list[tuple[int, int]]:
    if len(fast) != len(frames):
        raise MessageError(f"a video of {len(frames)} frames has {len(fast)} frame_types", "give one for each frame")
    if rule.video != "slowfast" or facts.get("height") is None:
        return [rule.grid.fit(*frames.shape[1:3])] * len(frames)
    slow = int(facts["height"]), int(facts["width"])
    small = slow if facts.get("fast_height") is None else (int(facts["fast_height"]), int(facts["fast_width"]))
    for side in (*slow, *small):
        if side < 1 or side % rule.grid.factor:
            raise SettingsError(f"frames of {side} pixels a side cannot be cut", f"give multiples of {rule.grid.factor}")
    return [small if one else slow for one in fast]


def _frames(source: Any) -> np.ndarray:
    """uint8 [T, H, W, 3]"""
    if isinstance(source, list | tuple):
        made = [np.asarray(f.convert("RGB") if isinstance(f, pil.Image) else f) for f in source]
        if not made or any(frame.shape != made[0].shape for frame in made):
            raise MediaUnsupported("the frames of a video are none, or differ in size", "give frames of one size")
        source = np.stack(made)
    array = source.detach().cpu().numpy() if isinstance(source, Tensor) else np.asarray(source)
    if array.ndim == 4 and array.shape[1] == 3 and array.shape[3] != 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] != 3 or not array.size:
        raise MediaUnsupported(f"a video has the shape {array.shape}", "give [T, 3, H, W], [T, H, W, 3] or a list of pictures")
    if array.dtype != np.uint8:
        whole = np.nan_to_num(np.asarray(array, np.float64), nan=-1).astype(np.int64)
        if not np.array_equal(whole, array) or whole.min() < 0 or whole.max() > 255:
            raise MediaUnsupported(f"a video of {array.dtype} holds other than whole numbers of 0 to 255", "give bytes")
        array = whole.astype(np.uint8)
    return np.ascontiguousarray(array)


# Patches -> tensors


def media_tensors(
    images: Sequence[Patches], videos: Sequence[Patches], rule: MediaRule, form: PromptFormat
) -> dict[str, Tensor]:
    """What transformers calls them; a kind that is absent has no tensors."""
    made: dict[str, Tensor] = {}
    if images:
        made["pixel_values"] = _values(images, rule)
        grids = torch.tensor([grid for item in images for grid in item.grids])
        made |= {"image_grid_thw": grids} if rule.video else {"image_grid_hws": grids[:, 1:]}
    if videos:
        made["pixel_values_videos"] = _values(videos, rule)
        made["video_grid_thw"] = torch.tensor([grid for item in videos for grid in item.grids])
        if form.video_layout == "frames":
            made["num_frames"] = torch.tensor([item.num_frames for item in videos])
        elif form.tokens_per_second is not None:
            made["second_per_grid_ts"] = torch.tensor([1.0 / (item.fps or rule.fps) for item in videos])
    return made


def _values(items: Sequence[Patches], rule: MediaRule) -> Tensor:
    """float32 [N, C, P, P]; [N, C * f * P * P] where patches span f frames."""
    values = torch.from_numpy(normalise(np.concatenate([item.pixels for item in items]), rule.grid))
    return values.flatten(1) if rule.grid.frames > 1 else values


def token_tensors(prompts: Sequence[Prompt], pad: int, side: str) -> dict[str, Tensor]:
    """input_ids and attention_mask, int64 [B, L]."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        count = len(prompt.tokens)
        where = slice(longest - count, longest) if side == "left" else slice(count)
        ids[row, where] = torch.tensor(prompt.tokens)
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


# Tensors -> prompts and patches


@dataclass
class _Queue:
    """Grids of one kind with their patches, taken from the front."""

    kind: str
    grids: list[Grid]
    pixels: np.ndarray
    steps: list[float]
    at: int = 0
    row: int = 0

    def take(self, rule: MediaRule, ids: Sequence[int], start: int, merge: int) -> tuple[Patches, float]:
        """The next grid; MessageError unless its tokens stand at ``start``, all of them."""
        if self.row == len(self.grids):
            raise MessageError(
                f"input_ids hold more {self.kind} tokens than the grids of {self.kind}s account for",
                "give all tensors of one processor call together",
            )
        grid = self.grids[self.row]
        count = grid[0] * grid[1] * grid[2]
        run = ids[start : start + count // merge**2]
        if len(run) != count // merge**2 or any(token != ids[start] for token in run):
            raise MessageError(
                f"input_ids hold fewer {self.kind} tokens at {start} than the {count // merge**2} of its grid {grid}",
                "never cut or change the ids between processor and model",
            )
        pixels = self.pixels[self.at : self.at + count]
        step = self.steps[self.row]
        self.at, self.row = self.at + count, self.row + 1
        key = content_key(pixels, self.kind, (grid,), rule.grid)
        return Patches(self.kind, pixels, (grid,), grid[1:], key), step  # type: ignore[arg-type]


def prompts(
    inputs: Mapping[str, Any], rule: MediaRule, form: PromptFormat, tokenizer: Tokenizer
) -> list[tuple[Prompt, list[Patches]]]:
    """Rows of ``input_ids`` where ``attention_mask`` is not 0, with the spans of their placeholders and the media in order.

    Raises MessageError where ids, grids and pixel values do not fit together.
    """
    ids = torch.as_tensor(inputs["input_ids"])
    mask = torch.as_tensor(inputs["attention_mask"]) if inputs.get("attention_mask") is not None else torch.ones_like(ids)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise MessageError(
            f"input_ids have the shape {tuple(ids.shape)}, attention_mask {tuple(mask.shape)}", "both must be [rows, tokens]"
        )
    queues = {
        tokenizer.control[pad]: _queue(kind, inputs, rule, form)
        for kind, pad in (("image", form.image_pad), ("video", form.video_pad))
        if pad in tokenizer.control
    }
    made = [_row(row[keep != 0].tolist(), queues, rule, form) for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    for queue in queues.values():
        if queue.row < len(queue.grids):
            raise MessageError(
                f"there are {len(queue.grids)} grids of {queue.kind}s, and input_ids have places for {queue.row}",
                "give all tensors of one processor call together",
            )
    return made


def _row(ids: Sequence[int], queues: Mapping[int, _Queue], rule: MediaRule, form: PromptFormat) -> tuple[Prompt, list[Patches]]:
    spans: list[Span] = []
    media: list[Patches] = []
    at = 0
    while at < len(ids):
        queue = queues.get(ids[at])
        if queue is None:
            at += 1
            continue
        patches, step = queue.take(rule, ids, at, form.merge)
        spans.append(
            Span(patches.kind, at, patches.grids[0], len(media), 0, step, form.merge, patches.key, form.flat_positions,
                 form.video_advance)
        )  # fmt: skip
        media.append(patches)
        at = spans[-1].end
    return Prompt(tuple(ids), tuple(spans)), media


def _queue(kind: str, inputs: Mapping[str, Any], rule: MediaRule, form: PromptFormat) -> _Queue:
    suffix = "" if kind == "image" else "_videos"
    values, grids = inputs.get(f"pixel_values{suffix}"), inputs.get(f"{kind}_grid_thw")
    if kind == "image" and inputs.get("image_grid_hws") is not None:
        grids = [(1, *grid) for grid in torch.as_tensor(inputs["image_grid_hws"]).tolist()]
    rows: list[Grid] = [] if grids is None else [tuple(map(int, grid)) for grid in torch.as_tensor(grids).tolist()]  # type: ignore[misc]
    seconds = inputs.get("second_per_grid_ts") if kind == "video" else None
    steps = [_step(None if seconds is None else float(seconds[i]), kind, form) for i in range(len(rows))]
    if kind == "video" and form.video_layout == "frames":
        rows = [(1, h, w) for t, h, w in rows for _ in range(t)]
        steps = [0.0] * len(rows)
    count = sum(t * h * w for t, h, w in rows)
    given = 0 if values is None else len(values)
    if count != given:
        raise MessageError(
            f"pixel_values{suffix} hold {given} patches, the grids of {kind}s {count}",
            "give all tensors of one processor call together",
        )
    return _Queue(kind, rows, _bytes(values, rule), steps)


def _step(seconds: float | None, kind: str, form: PromptFormat) -> float:
    if kind == "image":
        return 0.0
    if form.tokens_per_second is None:
        return 1.0
    return float(np.float32(1.0 if seconds is None else seconds) * np.float32(form.tokens_per_second))


def _bytes(values: Any, rule: MediaRule) -> np.ndarray:
    """The pixels behind normalised values, so that the engine starts from what it would have cut itself."""
    grid = rule.grid
    depth = (grid.frames,) if grid.frames > 1 else ()
    if values is None:
        return np.empty((0, 3, *depth, grid.patch, grid.patch), np.uint8)
    values = torch.as_tensor(values)
    coarse = values.dtype in (torch.bfloat16, torch.float16)
    array = values.detach().cpu().float().numpy().reshape(-1, 3, *depth, grid.patch, grid.patch)
    return denormalise(array, grid, 2**-7 if coarse else 1e-4)


def flat(items: Any) -> list[Any]:
    """Lists of lists of media as one list; a single one as a list of one."""
    if isinstance(items, list | tuple):
        return [one for item in items for one in flat(item)]
    return [] if items is None else [items]


def videos_of(items: Any) -> Iterator[Any]:
    """The videos in ``items``: one (an array of four axes, or a list of pictures), or a list of them."""
    if items is None:
        return
    single = getattr(items, "ndim", 0) == 4 or not isinstance(items, list | tuple)
    if single or (items and not isinstance(items[0], list | tuple) and getattr(items[0], "ndim", 0) != 4):
        yield items
    else:
        yield from items
