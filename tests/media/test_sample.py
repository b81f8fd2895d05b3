"""Which frames are chosen: counts against the tables of keye-vl-utils 1.0.0, cuts, variable rates, settings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.errors import SettingsError
from mirada.media.rule import KEYE_15, KEYE_PREVIEW
from mirada.media.sample import Timeline, choose, count_frames, cut, strict_nframes
from mirada.media.video import video_budget
from mirada.types import Video

TABLES = json.loads((Path(__file__).parents[1] / "golden" / "keye_vl" / "resize_and_sampling_tables.json").read_text())


def even(num: int, rate: float) -> Timeline:
    return Timeline(np.arange(num) / rate, rate, uniform=True)


def uneven(*times: float, last: float = 0.5) -> Timeline:
    return Timeline(np.array(times, float), len(times) / (times[-1] + last), uniform=False)


@pytest.mark.parametrize("row", TABLES["smart_nframes_1.0.0"], ids=str)
def test_number_of_frames_of_utils_1_0_0(row: list) -> None:
    ele, total, rate, wanted = row
    if wanted == "ValueError":
        with pytest.raises(SettingsError, match="is not between 2 and"):
            strict_nframes(total, rate, Video(None, **ele), KEYE_PREVIEW)
    else:
        assert strict_nframes(total, rate, Video(None, **ele), KEYE_PREVIEW) == wanted


@pytest.mark.parametrize("row", TABLES["video_budget_1.0.0"], ids=str)
def test_frame_size_of_utils_1_0_0(row: list) -> None:
    num, height, width, _, wanted = row
    assert list(video_budget(num, height, width, Video(None), KEYE_PREVIEW)) == wanted


@pytest.mark.parametrize(
    ("part", "total", "num"),
    [
        (Video(None), 1, 1),
        (Video(None), 2, 2),
        (Video(None), 3, 2),
        (Video(None, nframes=7), 7, 6),
        (Video(None, nframes=100), 9, 8),
        (Video(None, nframes=1), 9, 2),
        (Video(None, max_frames=1), 9, 1),
        (Video(None, fps=1000.0), 30, 30),
        (Video(None, min_frames=20), 10, 10),
    ],
    ids=str,
)
def test_evenly_sampled_counts_clamp_instead_of_failing(part: Video, total: int, num: int) -> None:
    assert count_frames(total, 10.0, part, KEYE_PREVIEW)[0] == num


def test_a_clamp_is_noted_with_what_was_asked() -> None:
    assert choose(even(9, 10.0), Video(None, nframes=100), KEYE_PREVIEW).notes == (
        "number of frames clamped from 100 to 8 (9 frames at 10 a second)",
    )
    assert choose(even(90, 10.0), Video(None, nframes=8), KEYE_PREVIEW).notes == ()


@pytest.mark.parametrize(
    ("part", "num"),
    [
        (Video(None, nframes=5), 5),
        (Video(None, nframes=5000), 100),
        (Video(None, min_frames=40), 40),
        (Video(None, fps=1.0), 10),
        (Video(None, max_frames=3), 3),
        (Video(None, total_pixels=10 * 37632), 10),
        (Video(None, nframes=50, total_pixels=10 * 37632), 10),
        (Video(None, total_pixels=1), 1),
    ],
    ids=str,
)
def test_slow_fast_counts_keep_what_was_asked_within_the_budget(part: Video, num: int) -> None:
    assert count_frames(100, 10.0, part, KEYE_15)[0] == num


def test_even_rate_chooses_by_index_and_says_the_rate() -> None:
    choice = choose(even(100, 25.0), Video(None, nframes=8), KEYE_PREVIEW)
    assert choice.indices.tolist() == [0, 14, 28, 42, 57, 71, 85, 99]
    assert choice.fps == 8 / 100 * 25


def test_timestamps_at_an_even_rate_are_the_float32_of_the_reference() -> None:
    assert even(10, 30000 / 1001).timestamps(np.array([7])) == (float(np.float32(7 * (1001 / 30000))),)


# A still for 4 seconds, then ten frames in one second.
BURST = uneven(0.0, *(4 + i / 10 for i in range(10)), last=0.1)


def test_variable_rate_chooses_what_is_on_show_at_even_moments() -> None:
    choice = choose(BURST, Video(None, nframes=6), KEYE_PREVIEW)
    # moments 0, 0.98, 1.96, 2.94, 3.92, 4.9: the still is on show until 4.0 less half a median interval
    assert choice.indices.tolist() == [0, 0, 0, 0, 0, 10]
    assert BURST.timestamps(choice.indices) == (0.0, 0.0, 0.0, 0.0, 0.0, 4.9)
    assert choice.fps == pytest.approx(6 / 5.0)


def test_variable_rate_takes_a_long_still_once_where_frames_carry_times() -> None:
    choice = choose(BURST, Video(None, nframes=6), KEYE_15)
    assert choice.indices.tolist() == [0, 10]


def test_a_frame_about_to_start_counts_as_on_show() -> None:
    line = uneven(0.0, 0.1, 0.2, 0.31, 0.4, last=0.1)
    assert choose(line, Video(None, fps=None, nframes=4), KEYE_PREVIEW).indices.tolist() == [0, 1, 3, 4]


def test_cut_keeps_frames_within_and_their_own_times() -> None:
    assert cut(even(100, 10.0), 2.0, 4.05)[:2] == (20, 40)
    assert cut(even(100, 10.0), None, 4.0)[:2] == (0, 40)
    assert cut(even(100, 10.0), 2.01, None)[:2] == (21, 99)
    assert cut(BURST, 4.05, 4.25)[:2] == (2, 3)
    line = even(100, 10.0)
    choice = choose(line, Video(None, video_start=2.0, video_end=4.0), KEYE_PREVIEW)
    assert line.timestamps(choice.indices)[0] == 2.0
    assert line.timestamps(choice.indices)[-1] == 4.0


def test_cut_past_the_end_is_clamped_with_a_note_and_one_between_frames_keeps_the_one_on_show() -> None:
    first, last, notes = cut(even(100, 10.0), 9.0, 99.0)
    assert (first, last) == (90, 99)
    assert notes == ("video_end=99 clamped to the video's 10.000 seconds",)
    assert cut(even(100, 10.0), 9.95, 9.99)[:2] == (99, 99)
    assert cut(BURST, 1.0, 2.0)[:2] == (0, 0)
    assert "on show" in cut(BURST, 1.0, 2.0)[2][0]


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (Video(None, fps=1.0, nframes=4), "both fps and nframes"),
        (Video(None, fps=0.0), "fps=0.0 is not above 0"),
        (Video(None, fps=math.nan), "fps=nan is not a finite number"),
        (Video(None, fps="2"), "fps='2'"),  # type: ignore[arg-type]
        (Video(None, nframes=0), "nframes=0"),
        (Video(None, nframes=True), "nframes=True"),
        (Video(None, min_frames=9, max_frames=8), "min_frames=9 is above max_frames=8"),
        (Video(None, total_pixels=-1), "total_pixels=-1"),
        (Video(None, resized_height=28), "only one of resized_height"),
        (Video(None, resized_height=28, resized_width=0), "resized size 0x28 is empty"),
        (Video(None, video_start=-1.0), "starts before 0"),
        (Video(None, video_start=3.0, video_end=3.0), "is empty"),
        (Video(None, video_start=10.0), "past the end of the video"),
        (Video(None, video_end=0.0), "is empty"),
    ],
    ids=str,
)
def test_bad_settings_are_named(part: Video, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        choose(even(100, 10.0), part, KEYE_PREVIEW)
    assert caught.value.fix


@settings(max_examples=60)
@given(
    times=st.lists(st.floats(0.001, 30.0), min_size=0, max_size=40),
    nframes=st.integers(1, 60),
    slow_fast=st.booleans(),
    is_even=st.booleans(),
)
def test_whatever_the_times_the_choice_is_usable(times: list[float], nframes: int, slow_fast: bool, is_even: bool) -> None:
    starts = np.concatenate([[0.0], np.cumsum(times)])
    line = even(len(starts), 7.0) if is_even else Timeline(starts, len(starts) / (starts[-1] + 0.1), uniform=False)
    rule = replace(KEYE_15 if slow_fast else KEYE_PREVIEW)
    choice = choose(line, Video(None, nframes=nframes), rule)
    assert 1 <= len(choice.indices) <= len(starts)
    assert (np.diff(choice.indices) >= 0).all()
    assert choice.indices[0] == 0
    assert choice.indices[-1] <= len(starts) - 1
    assert choice.fps > 0
