"""Checks of what comes before the model: sizes, sampling, pixels, slow-fast, chat renderings.

Pixels are compared by checksum. Similarities of frames are float32 means in the reference and float64 here: within 1e-6.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import clips
import numpy as np
from parity.files import Check, all_of
from parity.released import PREVIEW_8B
from tiny import FRAMES, MARKUP, SPECIAL, write_tokenizer

from mirada.compat import keye_vl_utils, keye_vl_utils_1_0
from mirada.errors import InputError
from mirada.media.exact import resize_bicubic, resize_bilinear
from mirada.media.frames import FrameList
from mirada.media.grid import fit, normalise
from mirada.media.limits import FetchLimits
from mirada.media.prepare import prepare, resize_first
from mirada.media.rule import KEYE_15, KEYE_PREVIEW, MediaRule
from mirada.media.sample import slowfast_nframes, strict_nframes
from mirada.media.slowfast import Typist, compared_size, frame_sizes
from mirada.media.video import prepare_video, video_budget
from mirada.models.family import FAMILIES
from mirada.prompt.builtin import KEYE_TEMPLATE, KEYE_TEXT_TEMPLATE
from mirada.prompt.render import Renderer
from mirada.prompt.template import Template
from mirada.prompt.tokenizer import Tokenizer
from mirada.records.wire import messages_from_openai
from mirada.types import Image, Message, Video


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the name under which the tables record its refusal."""
    try:
        return call()
    except InputError:
        return "ValueError"


# ---- image_processor.json

_PIXEL_FACTS = (
    "shape", "dtype", "grid_thw", "sha256_float32", "sum", "abs_sum", "first_patch_ch0_row0", "last_patch_ch2_row13",
    "patch_means_first8",
)  # fmt: skip


def _images(file: Path) -> dict[str, Check]:
    facts = json.loads(file.read_text())
    rule = _rule(facts)
    made: dict[str, Check] = {}
    for row in facts["images"]:
        made[f"{row['h']}x{row['w']}"] = partial(_check_image, rule, row)
    single: dict[str, Callable[[MediaRule, dict], None]] = {
        "two_images": _check_images,
        "video_frames_processor": _check_frames,
        "video_tensor_1.0.0": _check_tensor,
        "rgba": _check_rgba,
    }
    for name, check in single.items():
        if name in facts:
            made[name] = partial(check, rule, facts[name])
    made["facts"] = partial(all_of, facts, ("processor_config", "formula", "images", "resample", *single), file.name)
    return made


def _rule(facts: dict) -> MediaRule:
    """The image processor that the file's own settings describe, without the stage before it."""
    family = FAMILIES["Keye"]
    settings = facts.get("processor_config", {}) | ({"resample": facts["resample"]} if "resample" in facts else {})
    return replace(family.media_rule(family.config(PREVIEW_8B), settings), first=None)


def check_pixels(frames: Iterable[np.ndarray], rule: MediaRule, facts: dict, also: tuple[str, ...] = ()) -> None:
    """The pictures, one after another, through ``rule`` and made float; frames of a video share one grid."""
    all_of(facts, (*_PIXEL_FACTS, *also), "a record of pixels")
    made = [prepare(Image(frame), rule) for frame in frames]
    grids = [list(grid) for one in made for grid in one.grids]
    if grids != facts["grid_thw"]:
        assert all(grid == grids[0] for grid in grids), f"grids {grids} differ"
        assert [[len(grids), *grids[0][1:]]] == facts["grid_thw"], f"grids {grids} differ"
    values = np.concatenate([normalise(one.pixels, rule.grid) for one in made])
    assert list(values.shape) == facts["shape"] and str(values.dtype) == facts["dtype"], f"shape {values.shape} differs"
    assert sha(values) == facts["sha256_float32"], f"pixels differ; their sum is {values.sum()}, recorded {facts['sum']}"


def _check_image(rule: MediaRule, row: dict) -> None:
    array = clips.synth(row["h"], row["w"], row["k"])
    both = replace(rule, first=KEYE_PREVIEW.first)
    for name, fact in row.items():
        bounded = re.fullmatch(r"processor_min_pixels_(\d+)", name)
        if name in ("h", "w", "k"):
            continue
        if name == "input_sha256":
            assert sha(array) == fact, "the synthetic picture differs"
        elif name == "processor" or bounded:
            check_pixels([array], rule.bounded(min_pixels=int(bounded[1])) if bounded else rule, fact)
        elif name == "fetch_then_processor":
            check_pixels([array], both, fact)
        elif name == "fetch_image_1.0.0_size_wh":
            assert list(resize_first(Image(array), both).size) == fact, f"{name} differs"
        elif name == "fetch_image_1.0.0_sha256":
            assert sha(np.asarray(resize_first(Image(array), both))) == fact, f"{name} differs"
        elif name == "fetch_image_1.5.2_size_wh":
            assert list(resize_first(Image(array), KEYE_15).size) == fact, f"{name} differs"
        else:
            raise AssertionError(f"a picture holds the fact {name!r}, which no check knows")


def _check_images(rule: MediaRule, facts: dict) -> None:
    check_pixels([clips.synth(*size) for size in facts["sizes"]], rule, facts, ("sizes",))


def _frames(formula: str) -> list[np.ndarray]:
    """The pictures that ``synth(112,140,20+t) t=0..4`` names."""
    found = re.fullmatch(r"synth\((\d+),(\d+),(\d+)\+t\) t=(\d+)\.\.(\d+)", formula)
    assert found, f"frames {formula!r} are not understood"
    h, w, k, first, last = map(int, found.groups())
    return [clips.synth(h, w, k + t) for t in range(first, last + 1)]


def _check_frames(rule: MediaRule, facts: dict) -> None:
    check_pixels(_frames(facts["frames"]), rule, facts, ("frames",))


def _check_tensor(rule: MediaRule, facts: dict) -> None:
    frames = _frames(facts["frames"])
    size = video_budget(len(frames), *frames[0].shape[:2], Video(None), KEYE_PREVIEW)
    assert list(size) == facts["resized_hw"], f"size {size} differs"
    resized = np.stack([resize_bicubic(frame, size) for frame in frames])
    assert sha(resized.transpose(0, 3, 1, 2)) == facts["resized_sha256_uint8"], "resized frames differ"
    check_pixels(resized, rule, facts, ("frames", "resized_hw", "resized_sha256_uint8"))


def _check_rgba(rule: MediaRule, facts: dict) -> None:
    all_of(facts, ("h", "w", "note", "fetch_1_0_0_sha256", "fetch_1_5_2_sha256", "size_wh"), "rgba")
    found = re.fullmatch(r"rgb=synth\(\d+,\d+,(\d+)\), alpha=synth\(\d+,\d+,(\d+)\)\[\.\.\.,0\]", facts["note"])
    assert found, f"{facts['note']!r} is not understood"
    colour, alpha = (clips.synth(facts["h"], facts["w"], int(k)) for k in found.groups())
    rgba = np.dstack([colour, alpha[..., 0]])
    for face, name in ((keye_vl_utils_1_0, "fetch_1_0_0_sha256"), (keye_vl_utils, "fetch_1_5_2_sha256")):
        made = face.fetch_image({"image": rgba})
        assert list(made.size) == facts["size_wh"] and sha(np.asarray(made)) == facts[name], f"{name} differs"


# ---- resize_and_sampling_tables.json


def _tables(file: Path) -> dict[str, Check]:
    return {name: partial(_check_table, name, rows) for name, rows in json.loads(file.read_text()).items()}


def _check_table(name: str, rows: Any) -> None:
    assert name in _ROWS or name in _CONSTANTS, f"{name} is a table that no check knows"
    if name in _CONSTANTS:
        face, also = _CONSTANTS[name]
        for key, value in rows.items():
            ours = also[key] if key in also else getattr(face, key)
            assert ours == value, f"{name}: {key} differs: {ours}, recorded {value}"
        return
    for row in rows:
        ours = outcome(partial(_ROWS[name], *row[:-1]))
        theirs = tuple(row[-1]) if isinstance(row[-1], list) else row[-1]
        assert ours == theirs, f"{name}: {row[:-1]} differs: {ours}, recorded {theirs}"


def _budget(num: int, height: int, width: int, max_pixels: float) -> tuple[int, int]:
    # The table says which bound the reference arrived at; ours must arrive at it too.
    least = KEYE_PREVIEW.frame_min_pixels
    high = max(min(KEYE_PREVIEW.frame_max_pixels, KEYE_PREVIEW.total_pixels / num * 2), int(least * 1.05))
    assert high == max_pixels, f"the bound of {num} frames differs: {high}, recorded {max_pixels}"
    return video_budget(num, height, width, Video(None), KEYE_PREVIEW)


_ROWS: dict[str, Callable[..., Any]] = {
    "smart_resize_processor": lambda h, w, low, high: fit(h, w, factor=28, min_pixels=low, max_pixels=high),
    "smart_resize_utils_1.0.0": lambda h, w, low, high: keye_vl_utils_1_0.smart_resize(h, w, 28, low, high),
    "smart_resize_utils_1.5.2": lambda h, w, low, high: keye_vl_utils.smart_resize(h, w, 28, low, high),
    "smart_nframes_1.0.0": lambda ele, total, rate: strict_nframes(total, rate, Video(None, **ele), KEYE_PREVIEW),
    "smart_nframes_1.5.2": lambda ele, total, rate: slowfast_nframes(total, rate, Video(None, **ele), KEYE_15),
    "video_budget_1.0.0": _budget,
}
_CELL = 28 * 28
_CONSTANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "constants_1.0.0": (keye_vl_utils_1_0, {"MAX_RATIO": 200, "VIDEO_TOTAL_PIXELS": KEYE_PREVIEW.total_pixels}),
    "constants_1.5.2": (
        keye_vl_utils,
        {
            "MAX_RATIO": 200,
            "MAX_TOKENS": KEYE_15.first.max_pixels // _CELL if KEYE_15.first else None,
            "MIN_TOKENS": KEYE_15.first.min_pixels // _CELL if KEYE_15.first else None,
            "VIDEO_MAX_TOKENS": KEYE_15.frame_max_pixels // _CELL,
            "VIDEO_MIN_TOKENS": KEYE_15.frame_min_pixels // _CELL,
            "VIDEO_TOTAL_PIXELS": KEYE_15.total_pixels,
        },
    ),
}


# ---- slowfast_1.5.2.json and keye15_processor.json


def _slow_fast(file: Path) -> dict[str, Check]:
    facts = json.loads(file.read_text())
    made: dict[str, Check] = {case["name"]: partial(_check_slow_fast, case) for case in facts.get("cases", ())}
    if "budget" in facts:
        made["budget"] = partial(_check_budget, facts["budget_columns"], facts["budget"])
    made["facts"] = partial(all_of, facts, ("cases", "budget", "budget_columns"), file.name)
    return made


def _video(case: dict) -> Video:
    frames = [clips.scene(case["h"], case["w"], *which) for which in case["scenes"]]
    return Video(frames, **_settings(case["ele"]))


def _settings(ele: dict) -> dict[str, Any]:
    return {"total_pixels" if key == "video_total_pixels" else key: value for key, value in ele.items()}


def _sampled(case: dict) -> tuple[Video, FrameList, np.ndarray]:
    part = _video(case)
    reader = FrameList(part, KEYE_15, FetchLimits())
    return part, reader, np.stack(list(reader.read(reader.choose(part).indices.tolist())))


_SLOW_FAST_FACTS = (
    "name", "scenes", "h", "w", "ele", "out_frames_shape", "out_sha256", "sim_resize_hw", "sims", "height", "width",
    "fast_height", "fast_width", "timestamps", "frame_types",
)  # fmt: skip


def _check_slow_fast(case: dict) -> None:
    all_of(case, _SLOW_FAST_FACTS, case["name"])
    part, reader, frames = _sampled(case)
    planes = frames.transpose(0, 3, 1, 2)
    assert list(planes.shape) == case["out_frames_shape"] and sha(planes) == case["out_sha256"], "sampled frames differ"
    assert list(compared_size(*reader.size, KEYE_15)) == case["sim_resize_hw"], "size for comparing differs"
    typist = Typist(KEYE_15, part.min_frame_similarity or KEYE_15.min_frame_similarity)
    kinds = [int(typist.is_fast(frame)) for frame in frames]
    assert kinds == case["frame_types"], f"types {kinds} differ"
    assert [list(pair[:2]) for pair in typist.similarities] == [pair[:2] for pair in case["sims"]], "compared pairs differ"
    ours, theirs = ([pair[2] for pair in pairs] for pairs in (typist.similarities, case["sims"]))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    sizes = frame_sizes(reader.size, (kinds.count(0), kinds.count(1)), part, KEYE_15)
    wanted = (case["height"], case["width"]), (case["fast_height"], case["fast_width"])
    assert tuple(map(tuple, sizes)) == wanted, f"sizes {sizes} differ"
    stamps = prepare_video(part, KEYE_15).timestamps
    assert stamps == (tuple(case["timestamps"]) if "timestamps" in case else None), f"timestamps {stamps} differ"


def _check_budget(columns: list[str], rows: list[list]) -> None:
    assert columns == ["h", "w", "n_slow", "n_fast", "ele", "slow_h", "slow_w", "fast_h", "fast_w"]
    for height, width, num_slow, num_fast, ele, *sizes in rows:
        slow, fast = frame_sizes((height, width), (num_slow, num_fast), Video(None, **_settings(ele)), KEYE_15)
        assert [*slow, *fast] == sizes, f"{height, width, num_slow, num_fast, ele} differs: {slow, fast}, recorded {sizes}"


def _processor15(file: Path) -> dict[str, Check]:
    return {case["name"]: partial(_check_processor15, case) for case in json.loads(file.read_text())}


_PROCESSOR15_FACTS = (
    "name", "scenes", "h", "w", "ele", "frame_types", "video_grid_thw", "num_frames", "prompt_between_vision_start_end",
    "pixel_values_videos", "slow_resized_sha256_uint8", "fast_resized_sha256_uint8",
)  # fmt: skip


def _check_processor15(case: dict) -> None:
    all_of(case, _PROCESSOR15_FACTS, case["name"])
    part, reader, frames = _sampled(case)
    made = prepare_video(part, KEYE_15)
    kinds = [int(fast) for fast in made.fast or ()]
    assert kinds == case["frame_types"] and made.num_frames == case["num_frames"], f"types {kinds} differ"
    assert [list(grid) for grid in made.grids] == case["video_grid_thw"], f"grids {made.grids} differ"
    values = normalise(made.pixels, KEYE_15.grid)
    facts = case["pixel_values_videos"]
    all_of(facts, ("shape", "sha256_float32", "sum", "first_row"), case["name"])
    assert list(values.shape) == facts["shape"] and sha(values) == facts["sha256_float32"], "pixels differ"
    sizes = frame_sizes(reader.size, (kinds.count(0), kinds.count(1)), part, KEYE_15)
    for kind, name in enumerate(("slow_resized_sha256_uint8", "fast_resized_sha256_uint8")):
        resized = [resize_bilinear(f, sizes[kind]) for f, k in zip(frames, kinds, strict=True) if k == kind]
        ours = sha(np.stack(resized).transpose(0, 3, 1, 2)) if resized else None
        assert ours == case[name], f"{name} differs"
    tokens = _renderer().render([Message("user", part)], [made]).tokens
    text = _tokenizer().decode(tokens)
    between = text.split("<|vision_start|>")[1].split("<|vision_end|>")[0]
    assert _counted(between) == case["prompt_between_vision_start_end"], f"prompt {_counted(between)} differs"


def _counted(text: str) -> str:
    """Runs of placeholders as ``<|video_pad|>*66``."""
    pad = "<|video_pad|>"
    return re.sub(f"({re.escape(pad)})+", lambda run: f"{pad}*{len(run[0]) // len(pad)}", text)


@cache
def _tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), SPECIAL + MARKUP + FRAMES)
        return Tokenizer.from_directory(folder)


@cache
def _renderer() -> Renderer:
    family = FAMILIES["KeyeVL1_5"]
    form = family.prompt_format(family.config(PREVIEW_8B | {"model_type": "KeyeVL1_5"}))
    return Renderer(_tokenizer(), Template(KEYE_TEMPLATE), form)


# ---- chat_template.json


def _chats(file: Path) -> dict[str, Check]:
    facts = json.loads(file.read_text())
    made: dict[str, Check] = {}
    for group, template in (("processor_template", KEYE_TEMPLATE), ("tokenizer_config_template", KEYE_TEXT_TEMPLATE)):
        for case in facts.get(group, ()):
            made[f"{group}.{case['name']}"] = partial(_check_chat, template, case)
    made["facts"] = partial(all_of, facts, ("processor_template", "tokenizer_config_template"), file.name)
    return made


def _check_chat(template: str, case: dict) -> None:
    all_of(case, ("name", "messages", "kwargs", "rendered"), case["name"])
    text = Template(template).render(case["messages"], **case["kwargs"])
    assert text == case["rendered"], f"rendering differs: {text!r}"
    if template is KEYE_TEMPLATE and set(case["kwargs"]) <= {"add_generation_prompt", "add_vision_id"}:
        whole = _renderer().text(messages_from_openai(case["messages"]), **case["kwargs"])
        assert whole == case["rendered"], f"rendering of messages differs: {whole!r}"


CHECKS: dict[str, Callable[[Path], dict[str, Check]]] = {
    "image_processor.json": _images,
    "resize_and_sampling_tables.json": _tables,
    "slowfast_1.5.2.json": _slow_fast,
    "keye15_processor.json": _processor15,
    "chat_template.json": _chats,
}
