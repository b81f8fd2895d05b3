"""Mistakes in what comes before the model, each planted: each must turn the named parity check red."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from parity import preprocessing
from parity.planting import Mistakes

from mirada.media import grid, sample, slowfast, video
from mirada.media.rule import KEYE_15, KEYE_PREVIEW, MediaRule
from mirada.prompt.expand import Expander

MISTAKES = Mistakes()
caught_by = MISTAKES.caught_by
TABLES, IMAGES = "resize_and_sampling_tables.json: ", "image_processor.json: "
SLOW_FAST, PROCESSOR = "slowfast_1.5.2.json: ", "keye15_processor.json: "


# ---- sizes and pixels


@caught_by(TABLES + "smart_resize_processor")
def halves_rounded_up(patch) -> None:
    patch.setattr(grid, "round", lambda x: math.floor(x + 0.5), raising=False)


@caught_by(TABLES + "smart_resize_processor")
def small_sides_clamped_instead_of_enlarged(patch) -> None:
    true = preprocessing.fit
    patch.setattr(preprocessing, "fit", lambda *size, **options: true(*size, **options, enlarge=False))


@caught_by(TABLES + "smart_resize_processor")
def size_above_the_bound_rounded_to_the_nearest(patch) -> None:
    true = grid._steps
    patch.setattr(grid, "_steps", lambda side, factor, rounding: true(side, factor, round))


@caught_by(IMAGES + "37x61")
def patches_read_by_columns(patch) -> None:
    def patchify(frames: np.ndarray, size: int, span: int, square: int) -> np.ndarray:
        t, high, wide, c = frames.shape
        cut = frames.reshape(t, high // size, size, wide // size, size, c).transpose(0, 3, 1, 5, 2, 4)
        return np.ascontiguousarray(cut).reshape(-1, c, size, size)

    patch.setattr(grid, "patchify", patchify)


@caught_by(IMAGES + "37x61")
def values_rescaled_in_single_precision(patch) -> None:
    def normalised(pixels: np.ndarray, rule: grid.GridRule) -> np.ndarray:
        return (pixels.astype(np.float32) * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)

    patch.setattr(preprocessing, "normalise", normalised)


def _other_rule(patch, change: dict[str, Any]) -> None:
    true = preprocessing._rule
    patch.setattr(preprocessing, "_rule", lambda facts: replace(true(facts), **change))


@caught_by(IMAGES + "37x61")
def pictures_resized_bilinearly(patch) -> None:
    _other_rule(patch, {"resample": "bilinear"})


@caught_by(IMAGES + "1200x900")
def stage_before_the_processor_left_out(patch) -> None:
    true = preprocessing.prepare
    patch.setattr(preprocessing, "prepare", lambda part, rule: true(part, replace(rule, first=None)))


# ---- sampling


@caught_by(TABLES + "smart_nframes_1.0.0")
def odd_numbers_of_frames_kept(patch) -> None:
    patch.setattr(preprocessing, "KEYE_PREVIEW", replace(KEYE_PREVIEW, frame_multiple=1))


@caught_by(TABLES + "smart_nframes_1.5.2")
def number_of_frames_rounded(patch) -> None:
    patch.setattr(sample, "int", round, raising=False)


@caught_by(TABLES + "video_budget_1.0.0")
def budget_of_one_frame_counted_once(patch) -> None:
    true = video.video_budget

    def budget(num: int, height: int, width: int, part: Any, rule: MediaRule) -> tuple[int, int]:
        return true(num, height, width, part, replace(rule, frame_multiple=1))

    patch.setattr(preprocessing, "video_budget", budget)


# ---- slow-fast


def _other_slow_fast(patch, **change: Any) -> None:
    patch.setattr(preprocessing, "KEYE_15", replace(KEYE_15, **change))


@caught_by(SLOW_FAST + "gradual_wipe")
def frames_compared_with_the_one_before(patch) -> None:
    true = slowfast.Typist.is_fast

    def is_fast(self, frame: np.ndarray) -> bool:
        fast = true(self, frame)
        self._slow = (len(self.fast) - 1, slowfast.look(frame, self.rule))
        return fast

    patch.setattr(slowfast.Typist, "is_fast", is_fast)


@caught_by(SLOW_FAST + "gradual_wipe")
def threshold_of_the_report(patch) -> None:
    _other_slow_fast(patch, min_frame_similarity=0.95)


@caught_by(SLOW_FAST + "gradual_wipe")
def frames_compared_in_rgb(patch) -> None:
    patch.setattr(slowfast, "rgb_to_hsv", lambda frame: frame)


@caught_by(SLOW_FAST + "budget")
def budget_of_the_report(patch) -> None:
    _other_slow_fast(patch, total_pixels=75_000 * 784)


@caught_by(SLOW_FAST + "budget")
def fast_frames_get_a_quarter(patch) -> None:
    _other_slow_fast(patch, fast_ratio=0.25)


@caught_by(SLOW_FAST + "budget")
def least_frame_of_the_source_comment(patch) -> None:
    _other_slow_fast(patch, frame_min_pixels=25_088)


@caught_by(PROCESSOR + "two_scenes")
def frames_of_all_sizes_kept_apart(patch) -> None:
    patch.setattr(video, "merged", lambda sizes, patch: tuple((1, h // patch, w // patch) for h, w in sizes))


# ---- prompts


@caught_by(PROCESSOR + "two_scenes")
def fast_marks_left_out(patch) -> None:
    true = Expander._frames
    patch.setattr(Expander, "_frames", lambda self, patches, *rest: true(self, replace(patches, fast=None), *rest))


@caught_by(PROCESSOR + "wipe")
def timestamps_rounded_half_up(patch) -> None:
    true = Expander._frames

    def frames(self, patches, *rest: Any):
        times = tuple(math.floor(t * 10 + 0.5) / 10 for t in patches.timestamps)
        return true(self, replace(patches, timestamps=times), *rest)

    patch.setattr(Expander, "_frames", frames)


@caught_by("chat_template.json: processor_template.auto_think_image")
def no_system_message_when_none_is_given(patch) -> None:
    changed = preprocessing.KEYE_TEMPLATE.replace("You are a helpful assistant.", "")
    patch.setattr(preprocessing, "KEYE_TEMPLATE", changed)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES.prove(name, monkeypatch)
