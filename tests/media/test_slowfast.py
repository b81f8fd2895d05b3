"""Slow-fast against keye-vl-utils 1.5.2: integers exact, similarities within 1e-6 (float32 means there, float64 here)."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import clips
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.media.frames import FrameList
from mirada.media.grid import normalise
from mirada.media.limits import FetchLimits
from mirada.media.rule import KEYE_15
from mirada.media.sample import slowfast_nframes
from mirada.media.slowfast import Typist, _slow_tokens, compared_size, frame_sizes, look, similarity
from mirada.media.video import prepare_video
from mirada.types import Video

GOLDEN = Path(__file__).parents[1] / "golden" / "keye_vl"
SLOW_FAST = json.loads((GOLDEN / "slowfast_1.5.2.json").read_text())
PROCESSOR = json.loads((GOLDEN / "keye15_processor.json").read_text())
TABLES = json.loads((GOLDEN / "resize_and_sampling_tables.json").read_text())


def as_part(case: dict) -> Video:
    settings = {{"video_total_pixels": "total_pixels"}.get(key, key): value for key, value in case["ele"].items()}
    return Video([clips.scene(case["h"], case["w"], *which) for which in case["scenes"]], **settings)


@pytest.mark.parametrize("case", SLOW_FAST["cases"], ids=lambda case: case["name"])
def test_golden_case(case: dict) -> None:
    part = as_part(case)
    reader = FrameList(part, KEYE_15, FetchLimits())
    frames = np.stack(list(reader.read(reader.choose(part).indices.tolist())))
    planes = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
    assert list(planes.shape) == case["out_frames_shape"]
    assert hashlib.sha256(planes.tobytes()).hexdigest() == case["out_sha256"]
    assert list(compared_size(*reader.size, KEYE_15)) == case["sim_resize_hw"]

    typist = Typist(KEYE_15, case["ele"].get("min_frame_similarity", 0.9))
    assert [int(typist.is_fast(frame)) for frame in frames] == case["frame_types"]
    assert [pair[:2] for pair in typist.similarities] == [tuple(pair[:2]) for pair in case["sims"]]
    assert np.allclose([pair[2] for pair in typist.similarities], [pair[2] for pair in case["sims"]], rtol=0, atol=1e-6)

    made = prepare_video(part, KEYE_15)
    assert made.fast == tuple(bool(kind) for kind in case["frame_types"])
    assert made.timestamps == (tuple(case["timestamps"]) if "timestamps" in case else None)
    slow, fast = (case["height"], case["width"]), (case["fast_height"], case["fast_width"])
    rows = sum((h // 14) * (w // 14) for h, w in ((fast if kind else slow) for kind in made.fast))
    assert len(made.pixels) == rows == sum(t * h * w for t, h, w in made.grids)


@pytest.mark.parametrize("row", SLOW_FAST["budget"], ids=str)
def test_budget_row(row: list) -> None:
    height, width, num_slow, num_fast, ele, *sizes = row
    settings = {{"video_total_pixels": "total_pixels"}.get(key, key): value for key, value in ele.items()}
    slow, fast = frame_sizes((height, width), (num_slow, num_fast), Video(None, **settings), KEYE_15)
    assert [*slow, *fast] == sizes


@settings(max_examples=100)
@given(num_slow=st.integers(0, 300), num_fast=st.integers(0, 300), total=st.integers(48 * 784, 65536 * 784))
def test_the_search_ends_at_the_first_size_over_the_budget(num_slow: int, num_fast: int, total: int) -> None:
    def over(tokens: int) -> bool:
        return (num_slow * tokens + num_fast * max(int(0.3 * tokens), 48)) * 784 > total

    found = _slow_tokens(num_slow, num_fast, 48 * 784, Video(None, total_pixels=total), KEYE_15)
    assert found == next((tokens for tokens in range(48, 768) if over(tokens)), 768)


@pytest.mark.parametrize("row", TABLES["smart_nframes_1.5.2"], ids=str)
def test_number_of_frames(row: list) -> None:
    ele, total, rate, wanted = row
    assert slowfast_nframes(total, rate, Video(None, **ele), KEYE_15) == wanted


@pytest.mark.parametrize("case", PROCESSOR, ids=lambda case: case["name"])
def test_golden_processor(case: dict) -> None:
    made = prepare_video(as_part(case), KEYE_15)
    assert [list(grid) for grid in made.grids] == case["video_grid_thw"]
    assert made.num_frames == case["num_frames"]
    values = normalise(made.pixels, KEYE_15.grid)
    assert hashlib.sha256(values.tobytes()).hexdigest() == case["pixel_values_videos"]["sha256_float32"]


def test_two_black_frames_are_alike_and_a_black_one_is_unlike_a_bright_one() -> None:
    black, bright = np.zeros((200, 200, 3), np.uint8), np.full((200, 200, 3), 200, np.uint8)
    assert similarity(look(black, KEYE_15), look(black, KEYE_15)) == 1.0
    assert similarity(look(black, KEYE_15), look(bright, KEYE_15)) == 0.0
    made = prepare_video(Video([black, black, bright, black], fps=2.0), KEYE_15)
    assert made.fast == (False, True, False, False)


def test_patches_black_in_both_frames_do_not_count() -> None:
    one = np.zeros((196, 196, 3), np.uint8)
    other = one.copy()
    one[:28, :28], other[:28, :28] = (250, 250, 250), (10, 10, 250)
    assert similarity(look(one, KEYE_15), look(other, KEYE_15)) == 0.0
    assert similarity(look(one, KEYE_15), look(one, KEYE_15)) == 1.0


def test_frames_are_compared_with_the_latest_slow_one_not_with_the_one_before() -> None:
    # A slow wipe: neighbours are alike all the way, the first and the last are not.
    frames = [clips.scene(180, 320, 0, step) for step in range(14)]
    typist = Typist(KEYE_15, 0.9)
    fast = [typist.is_fast(frame) for frame in frames]
    assert False in fast[1:]
    neighbours = [similarity(look(a, KEYE_15), look(b, KEYE_15)) for a, b in itertools.pairwise(frames)]
    assert min(neighbours) > 0.9


def test_threshold_of_the_part_overrides_the_rules() -> None:
    frames = [clips.scene(180, 320, 0, step) for step in range(6)]
    assert prepare_video(Video(frames, min_frame_similarity=0.0), KEYE_15).fast == (False, *[True] * 5)
    assert prepare_video(Video(frames, min_frame_similarity=1.01), KEYE_15).fast == (False,) * 6


def test_a_file_shorter_than_one_interval_gives_one_frame() -> None:
    made = prepare_video(Video(clips.encode(3, rate=10)), KEYE_15)
    assert (made.num_frames, made.fast, made.timestamps) == (1, (False,), (0.0,))
    assert any("clamped from 0 to 1" in note for note in made.notes)


def test_a_file_is_typed_and_timed() -> None:
    pictures = [clips.scene(180, 320, 0 if i < 20 else 2, 0) for i in range(40)]
    made = prepare_video(Video(clips.encode(pictures)), KEYE_15)
    assert made.num_frames == 8
    assert made.fast == (False, True, True, True, False, True, True, True)
    assert made.timestamps is not None
    assert np.allclose(made.timestamps, [0.0, 0.6, 1.1, 1.7, 2.2, 2.8, 3.3, 3.9], atol=1e-6)
    assert [grid[0] for grid in made.grids] == [1, 3, 1, 3]
