"""Videos from source to patches: sources, sampling, sizes, notes, goldens of Keye-VL-Preview, bounded memory."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import clips
import numpy as np
import pytest
from PIL import Image as pil

from mirada.errors import MediaDecodeError, MediaNotFound, MediaRefused, MediaTooLarge, MediaUnsupported, SettingsError
from mirada.media.grid import Patches, normalise
from mirada.media.limits import FetchLimits
from mirada.media.prepare import prepare
from mirada.media.rule import KEYE_15, KEYE_PREVIEW
from mirada.media.video import merged, prepare_video
from mirada.types import Video

GOLDEN = Path(__file__).parents[1] / "golden" / "keye_vl"
ROOT = Path(__file__).parents[2]
hits: list[str] = []
"""Paths that the web server was asked for."""
LOCAL = FetchLimits(allow_private=True, seconds=5)


def frames_of(made: Patches) -> list[np.ndarray]:
    """uint8 [H, W, 3] of every frame, put together from its patches."""
    frames, at = [], 0
    for t, h, w in made.grids:
        for _ in range(t):
            patches = made.pixels[at : at + h * w].reshape(h, w, 3, 14, 14)
            frames.append(patches.transpose(0, 3, 1, 4, 2).reshape(h * 14, w * 14, 3))
            at += h * w
    assert at == len(made.pixels)
    return frames


def shown(made: Patches) -> list[int]:
    return [clips.number_of(frame) for frame in frames_of(made)]


@pytest.fixture(scope="module")
def clip() -> bytes:
    """40 numbered frames, 10 a second."""
    return clips.encode(40)


@pytest.fixture(scope="module")
def web(clip: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format, *args) -> None:
            pass

        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_response(200 if self.path == "/clip.mp4" else 404)
            self.send_header("Content-Length", str(len(clip)))
            self.end_headers()
            self.wfile.write(clip)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_every_kind_of_source_gives_the_same_patches(clip: bytes, web: str, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    encoded = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    made = [prepare(Video(s), KEYE_PREVIEW, LOCAL) for s in (clip, path, str(path), path.as_uri(), encoded, f"{web}/clip.mp4")]
    assert len({one.key for one in made}) == 1
    assert made[0].kind == "video"
    assert made[0].size == (48, 64)
    assert all(np.array_equal(made[0].pixels, one.pixels) for one in made)


def test_sources_that_may_not_be_read(clip: bytes, web: str, tmp_path: Path) -> None:
    with pytest.raises(MediaRefused):
        prepare_video(Video(f"{web}/clip.mp4"), KEYE_PREVIEW)
    with pytest.raises(MediaNotFound):
        prepare_video(Video(f"{web}/other.mp4"), KEYE_PREVIEW, LOCAL)
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    with pytest.raises(MediaRefused):
        prepare_video(Video(path), KEYE_PREVIEW, FetchLimits.serving())


def test_a_playlist_never_makes_the_decoder_fetch(web: str, tmp_path: Path) -> None:
    hits.clear()
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{web}/clip.mp4\n#EXT-X-ENDLIST\n"
    dash = f"<?xml version='1.0'?><MPD><Period><AdaptationSet><BaseURL>{web}/clip.mp4</BaseURL></AdaptationSet></Period></MPD>"
    for text in (playlist, f"ffconcat version 1.0\nfile {web}/clip.mp4\n", dash):
        path = tmp_path / "list.m3u8"
        path.write_text(text)
        for source in (path, text.encode()):
            with pytest.raises((MediaUnsupported, MediaDecodeError), match=r"playlist|not a video"):
                prepare_video(Video(source), KEYE_PREVIEW, LOCAL)
    assert not hits


@pytest.mark.parametrize(
    ("part", "numbers"),
    [
        ({}, [0, 6, 11, 17, 22, 28, 33, 39]),
        ({"fps": 1.0}, [0, 13, 26, 39]),
        ({"nframes": 4}, [0, 13, 26, 39]),
        ({"nframes": 4, "video_start": 2.0}, [20, 26, 33, 39]),
        ({"nframes": 4, "video_start": 1.0, "video_end": 2.0}, [10, 13, 17, 20]),
        ({"fps": 5.0, "max_frames": 3}, [0, 39]),
        ({"min_frames": 10}, [0, 4, 9, 13, 17, 22, 26, 30, 35, 39]),
    ],
    ids=str,
)
def test_evenly_sampled_frames_and_their_times(clip: bytes, part: dict, numbers: list[int]) -> None:
    made = prepare_video(Video(clip, **part), KEYE_PREVIEW)
    assert shown(made) == numbers
    assert made.timestamps == tuple(float(np.float32(n / 10)) for n in numbers)
    assert made.grids[0][0] == len(made.timestamps)
    assert len(made.grids) == 1
    assert made.fast is None


def test_rate_of_the_sampled_frames_as_the_reference_counts_it(clip: bytes) -> None:
    assert prepare_video(Video(clip), KEYE_PREVIEW).fps == 8 / 40 * 10
    assert prepare_video(Video(clip, nframes=4, video_start=1.0, video_end=2.0), KEYE_PREVIEW).fps == 4 / 11 * 10


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("rule", [KEYE_PREVIEW, KEYE_15], ids=["preview", "1.5"])
def test_very_short_clips_clamp_and_say_so(num: int, rule) -> None:
    made = prepare_video(Video(clips.encode(num)), rule)
    wanted, asked = (min(num, 2), 4) if rule is KEYE_PREVIEW else (1, 0)
    assert made.num_frames == wanted
    assert shown(made)[0] == 0
    assert made.notes == (f"number of frames clamped from {asked} to {wanted} ({num} frames at 10 a second)",)


def test_sizes_follow_budget_bounds_and_explicit_size(clip: bytes) -> None:
    def size(**settings) -> tuple[int, int]:
        made = prepare_video(Video(clip, nframes=4, **settings), KEYE_PREVIEW)
        return made.grids[0][1] * 14, made.grids[0][2] * 14

    assert size() == (280, 392)  # at least 128 cells of 28x28
    assert size(min_pixels=20_000) == (140, 168)
    assert size(max_pixels=50_000) == (56, 56)  # the family's least size gives way to what was asked
    assert size(total_pixels=10_000, min_pixels=10_000) == (112, 140)
    assert size(resized_height=100, resized_width=200) == (112, 196)
    # The image processor's own bounds come last.
    small = KEYE_PREVIEW.bounded(max_pixels=28 * 28 * 16)
    assert prepare_video(Video(clip, nframes=4), small).grids == ((4, 6, 8),)


def test_slow_fast_takes_an_explicit_size_for_slow_frames(clip: bytes) -> None:
    made = prepare_video(Video(clip, nframes=3, resized_height=224, resized_width=280, min_frame_similarity=1.1), KEYE_15)
    assert made.grids == ((3, 16, 20),)


def test_list_of_frames_keeps_all_and_pads_to_an_even_number(tmp_path: Path) -> None:
    pictures = [clips.numbered(i, 112, 140) for i in range(5)]
    path = tmp_path / "two.png"
    pil.fromarray(pictures[2]).save(path)
    made = prepare_video(Video([pictures[0], pil.fromarray(pictures[1]), path, *pictures[3:]], fps=4.0), KEYE_PREVIEW)
    assert shown(made) == [0, 1, 2, 3, 4, 4]
    assert made.grids == ((6, 8, 10),)
    assert made.timestamps == (0.0, 0.25, 0.5, 0.75, 1.0, 1.0)
    assert made.fps == 4.0
    assert prepare_video(Video(pictures), KEYE_PREVIEW).fps == 2.0
    assert np.array_equal(prepare_video(Video(np.stack(pictures)), KEYE_PREVIEW).pixels, made.pixels)
    assert shown(prepare_video(Video(pictures, fps=4.0, nframes=2), KEYE_PREVIEW)) == [0, 4]
    assert shown(prepare_video(Video(pictures, fps=1.0, video_start=1.0, video_end=2.5), KEYE_PREVIEW)) == [1, 2]


def test_list_without_a_rate_has_no_times_in_slow_fast() -> None:
    pictures = [clips.numbered(i, 112, 140) for i in range(3)]
    assert prepare_video(Video(pictures), KEYE_15).timestamps is None
    assert prepare_video(Video(pictures, fps=2.0), KEYE_15).timestamps == (0.0, 0.5, 1.0)


def test_bad_lists_say_which_picture() -> None:
    good, other = clips.numbered(0, 112, 140), clips.numbered(0, 140, 112)
    with pytest.raises(MediaUnsupported, match="picture 1 of the video is 112x140 after its resize, picture 0 is 140x112"):
        prepare_video(Video([good, other]), KEYE_PREVIEW)
    with pytest.raises(MediaDecodeError, match="picture 1 of the video"):
        prepare_video(Video([good, b"no picture"]), KEYE_PREVIEW)
    with pytest.raises(MediaDecodeError, match="empty list"):
        prepare_video(Video([]), KEYE_15)
    with pytest.raises(MediaTooLarge, match="video of 3 pictures"):
        prepare_video(Video([good] * 3), KEYE_PREVIEW, replace(LOCAL, video_frames=2))


def test_golden_frames_through_the_preview_processor() -> None:
    golden = json.loads((GOLDEN / "image_processor.json").read_text())["video_frames_processor"]
    made = prepare_video(Video([clips.synth(112, 140, 20 + t) for t in range(5)]), replace(KEYE_PREVIEW, frame_multiple=1))
    assert [list(grid) for grid in made.grids] == golden["grid_thw"]
    assert hashlib.sha256(normalise(made.pixels, KEYE_PREVIEW.grid).tobytes()).hexdigest() == golden["sha256_float32"]


def test_golden_clip_resized_as_utils_1_0_0_does() -> None:
    golden = json.loads((GOLDEN / "image_processor.json").read_text())["video_tensor_1.0.0"]
    pictures = [clips.synth(90, 160, 40 + t) for t in range(4)]
    data = clips.encode(pictures, form="nut", codec="ffv1", prepare=lambda stream: setattr(stream, "pix_fmt", "bgr0"))
    made = prepare_video(Video(data), KEYE_PREVIEW)  # lossless, so that the file's frames are the golden's
    assert [list(grid) for grid in made.grids] == golden["grid_thw"]
    assert hashlib.sha256(normalise(made.pixels, KEYE_PREVIEW.grid).tobytes()).hexdigest() == golden["sha256_float32"]


def test_variable_rate_returns_real_times() -> None:
    seconds = [0.0, 0.1, 0.2, 0.3, 2.3, 2.4]
    data = clips.encode(6, seconds=seconds)
    made = prepare_video(Video(data, nframes=6), KEYE_PREVIEW)
    # Moments 0, 0.48, 0.96, 1.44, 1.92, 2.4: frame 3 stays on show for two seconds.
    assert shown(made) == [0, 3, 3, 3, 3, 5]
    assert made.timestamps == pytest.approx((0.0, 0.3, 0.3, 0.3, 0.3, 2.4))
    once = prepare_video(Video(data, nframes=6), KEYE_15)
    assert shown(once) == [0, 3, 5]
    assert once.timestamps == pytest.approx((0.0, 0.3, 2.4))


def test_over_long_videos_name_the_limit(clip: bytes) -> None:
    with pytest.raises(MediaTooLarge, match=r"runs for 3\.9 seconds, more than 2\.0") as caught:
        prepare_video(Video(clip), KEYE_PREVIEW, replace(LOCAL, video_seconds=2.0))
    assert "video_end" in caught.value.fix
    assert prepare_video(Video(clip, video_end=1.9), KEYE_PREVIEW, replace(LOCAL, video_seconds=2.0)).num_frames == 4
    with pytest.raises(MediaTooLarge, match="bytes"):
        prepare_video(Video(clip), KEYE_PREVIEW, replace(LOCAL, video_bytes=1000))


def test_contradicting_settings_are_refused_before_anything_is_read() -> None:
    with pytest.raises(SettingsError, match="both fps and nframes"):
        prepare_video(Video("no such file", fps=1.0, nframes=4), KEYE_PREVIEW)


def test_key_tells_pixels_and_grids_apart(clip: bytes) -> None:
    keys = {prepare_video(Video(clip, nframes=n), rule).key for n in (2, 4) for rule in (KEYE_PREVIEW, KEYE_15)}
    assert len(keys) == 4


def test_equal_neighbours_share_a_grid() -> None:
    assert merged([(28, 56), (28, 56), (56, 56), (28, 56)], 14) == ((2, 2, 4), (1, 4, 4), (1, 2, 4))


def _benchmark():
    spec = importlib.util.spec_from_file_location("video_memory", ROOT / "benchmarks" / "video_memory.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memory_of_a_video_of_minutes_is_its_patches(tmp_path: Path) -> None:
    benchmark = _benchmark()
    path = benchmark.make_video(tmp_path / "minutes.mp4", minutes=1, rate=2)
    facts = benchmark.in_fresh_process(path, "slowfast")
    assert facts["frames"] == 120
    # All frames at full size would be 141 MB more.
    assert facts["growth_mb"] < facts["patches_mb"] + 90, facts


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["slowfast", "uniform"])
def test_memory_of_an_hour_of_480p_stays_under_600_mb(tmp_path: Path, rule: str) -> None:
    benchmark = _benchmark()
    path = benchmark.make_video(tmp_path / "hour.mp4", minutes=60, rate=2)
    facts = benchmark.in_fresh_process(path, rule)
    assert facts["frames"] == {"slowfast": 1365, "uniform": 768}[rule]
    assert facts["growth_mb"] < 600, facts


def test_a_budget_that_the_least_sizes_exceed_is_noted(clip: bytes) -> None:
    made = prepare_video(Video(clip, nframes=8, total_pixels=100_000), KEYE_PREVIEW)
    assert any("more than total_pixels=100,000" in note for note in made.notes)
    assert not any("total_pixels" in note for note in prepare_video(Video(clip, total_pixels=10**7), KEYE_PREVIEW).notes)
