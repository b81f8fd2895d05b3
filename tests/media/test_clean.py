"""Clean-up options: each drops or improves what it names, and nothing else."""

from __future__ import annotations

import itertools
from contextlib import closing

import clips
import numpy as np
import pytest
from PIL import Image as pil
from PIL import ImageFilter

from mirada.errors import SettingsError
from mirada.media.clean import VideoClean, find_scenes, sharpness
from mirada.media.grid import Patches
from mirada.media.rule import KEYE_15, KEYE_PREVIEW
from mirada.media.video import open_video, prepare_video
from mirada.types import Video

HEIGHT, WIDTH = 112, 140


def textured(seed: int) -> np.ndarray:
    """A sharp picture of blocks, another for each seed."""
    blocks = np.random.default_rng(seed).integers(40, 255, (14, 14, 3), np.uint8)
    return np.ascontiguousarray(np.kron(blocks, np.ones((8, 10, 1), np.uint8)))


def blurred(picture: np.ndarray) -> np.ndarray:
    return np.asarray(pil.fromarray(picture).filter(ImageFilter.GaussianBlur(6)))


BLACK = np.zeros((HEIGHT, WIDTH, 3), np.uint8)


def run(pictures: list[np.ndarray], clean: VideoClean, rule=KEYE_PREVIEW, **settings) -> Patches:
    return prepare_video(Video(pictures, fps=2.0, **settings), rule, clean=clean)


def times(made: Patches) -> list[float]:
    assert made.timestamps is not None
    assert made.num_frames == len(made.timestamps)
    return list(made.timestamps)


@pytest.mark.parametrize("rule", [KEYE_PREVIEW, KEYE_15], ids=["preview", "1.5"])
def test_black_frames_are_dropped_and_the_rest_keep_their_times(rule) -> None:
    pictures = [BLACK, textured(0), BLACK + 5, textured(1), textured(2), BLACK]
    made = run(pictures, VideoClean(drop_black=True), rule)
    assert times(made) == [0.5, 1.5, 2.0]
    assert made.fps == 2.0 * 3 / 6
    assert "dropped 3 of 6 frames (3 black)" in made.notes
    assert times(run(pictures, VideoClean(), rule)) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def test_lights_in_the_night_are_not_black() -> None:
    night = BLACK.copy()
    night[40:60, 50:80] = 255
    assert night.mean() < VideoClean().black_mean
    assert times(run([night, textured(0), BLACK], VideoClean(drop_black=True))) == [0.0, 0.5]


def test_blurred_frames_are_dropped_against_the_clips_own_sharpness() -> None:
    pictures = [textured(0), blurred(textured(1)), textured(2), textured(3)]
    made = run(pictures, VideoClean(drop_blurred=True))
    assert times(made) == [0.0, 1.0, 1.5]
    assert "dropped 1 of 4 frames (1 blurred)" in made.notes
    # A clip that is soft throughout is left alone, and black frames do not lower what is usual.
    soft = [blurred(textured(i)) for i in range(4)]
    assert times(run(soft, VideoClean(drop_blurred=True))) == [0.0, 0.5, 1.0, 1.5]
    assert times(run([BLACK] * 4 + pictures, VideoClean(drop_blurred=True, drop_black=True))) == [2.0, 3.0, 3.5]


def test_near_duplicates_of_the_latest_kept_frame_are_dropped() -> None:
    first, second = textured(0), textured(1)
    noisy = np.clip(first.astype(int) + np.random.default_rng(9).integers(-2, 3, first.shape), 0, 255).astype(np.uint8)
    made = run([first, noisy, first, second, second, first], VideoClean(drop_near_duplicates=True))
    assert times(made) == [0.0, 1.5, 2.5]
    assert "dropped 3 of 6 frames (3 near-duplicate)" in made.notes


def test_a_small_local_change_is_no_duplicate() -> None:
    first = textured(0)
    captioned = first.copy()
    captioned[100:108, 40:50] = 255 - captioned[100:108, 40:50]
    assert np.abs(captioned.astype(int) - first).mean() < VideoClean().duplicate_mean
    assert times(run([first, captioned], VideoClean(drop_near_duplicates=True))) == [0.0, 0.5]


def test_a_change_of_colour_alone_is_no_duplicate() -> None:
    red, green = np.full((HEIGHT, WIDTH, 3), (200, 20, 20), np.uint8), np.full((HEIGHT, WIDTH, 3), (20, 112, 20), np.uint8)
    assert (
        abs(int(pil.fromarray(red).convert("L").getpixel((0, 0))) - int(pil.fromarray(green).convert("L").getpixel((0, 0)))) < 2
    )
    assert times(run([red, green], VideoClean(drop_near_duplicates=True))) == [0.0, 0.5]


def test_a_slow_drift_is_compared_with_the_kept_frame_not_with_the_last_one() -> None:
    drift = [np.clip(textured(0).astype(int) - step, 0, 255).astype(np.uint8) for step in range(12)]
    kept = times(run(drift, VideoClean(drop_near_duplicates=True)))
    assert 3 <= len(kept) <= 8


def test_it_never_drops_everything() -> None:
    dim = (textured(0) // 30).astype(np.uint8)
    made = run([BLACK, dim, BLACK, BLACK], VideoClean(drop_black=True))
    assert times(made) == [0.5]
    assert "every frame would have been dropped; the best one was kept" in made.notes


def test_denoise_brings_a_noisy_frame_closer_to_the_clean_one() -> None:
    clean = textured(0)
    noisy = clean.copy()
    spots = np.random.default_rng(1).random(clean.shape[:2])
    noisy[spots < 0.03], noisy[spots > 0.97] = 0, 255
    wanted = run([clean] * 2, VideoClean())
    before, after = (run([noisy] * 2, VideoClean(denoise=side)) for side in (None, 3))
    errors = [np.abs(made.pixels.astype(int) - wanted.pixels).mean() for made in (before, after)]
    assert errors[1] < errors[0] / 3
    assert before.key != after.key


def test_cut_replaces_the_videos_own() -> None:
    data = clips.encode(40)
    made = prepare_video(Video(data, nframes=4, video_start=0.0, video_end=0.5), KEYE_PREVIEW, clean=VideoClean(cut=(2.0, 3.0)))
    assert made.timestamps == pytest.approx((2.0, 2.3, 2.7, 3.0))


@pytest.fixture(scope="module")
def three_scenes() -> bytes:
    """2 s, 1 s and 2 s at 10 frames a second."""
    return clips.encode([clips.scene(96, 128, which, 0) for which in [0] * 20 + [2] * 10 + [4] * 20])


def test_scenes_are_found_and_can_be_chosen(three_scenes: bytes) -> None:
    with closing(open_video(three_scenes)) as reader:
        scenes = find_scenes(reader)
    assert [start for start, _ in scenes] == pytest.approx([0.0, 2.0, 3.0], abs=0.25)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(scenes))
    assert scenes[-1][1] == pytest.approx(5.0)
    for scene, low, high in ((0, 0.0, 2.0), (1, 2.0, 3.0), (-1, 3.0, 5.0)):
        made = prepare_video(Video(three_scenes, nframes=4), KEYE_PREVIEW, clean=VideoClean(scene=scene))
        assert made.timestamps is not None
        assert all(low <= at < high for at in made.timestamps)
        assert np.ptp(made.pixels.reshape(4, -1).mean(axis=1)) < 2  # four frames of one ground
    with pytest.raises(SettingsError, match="has no scene 3"):
        prepare_video(Video(three_scenes), KEYE_PREVIEW, clean=VideoClean(scene=3))


def test_options_work_together_on_a_file(three_scenes: bytes) -> None:
    made = prepare_video(Video(three_scenes, nframes=20), KEYE_15, clean=VideoClean(denoise=3, drop_near_duplicates=True))
    assert [sum(low <= at < high for at in times(made)) for low, high in ((0, 2), (2, 3), (3, 5))] == [1, 1, 1]
    assert made.fast is not None
    assert len(made.fast) == 3


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"denoise": 4}, "denoise=4"),
        ({"cut": (3.0, 1.0)}, "cut="),
        ({"cut": (-1.0, 1.0)}, "cut="),
        ({"cut": (0.0, 1.0), "scene": 0}, "both cut and scene"),
    ],
    ids=str,
)
def test_bad_options_are_named(settings: dict, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        VideoClean(**settings)


def test_sharpness_does_not_depend_on_size_much_and_falls_with_blur() -> None:
    large = np.kron(textured(0), np.ones((8, 8, 1), np.uint8))
    assert sharpness(blurred(textured(0))) < sharpness(textured(0)) / 10
    assert sharpness(large) > sharpness(blurred(large))
