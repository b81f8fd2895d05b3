"""The utility packages' faces: the three return shapes, sizes and frames as the originals give them, and their variables."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirada.compat import keye_vl_utils, keye_vl_utils_1_0, qwen_vl_utils, vision
from mirada.errors import MediaError, MediaNotFound, MediaTooLarge, MessageError, SettingsError
from mirada.media.sample import Timeline, choose
from mirada.media.video import video_budget
from mirada.types import Video

GOLDEN = Path(__file__).parents[1] / "golden"
KEYE = json.loads((GOLDEN / "keye_vl/resize_and_sampling_tables.json").read_text())
QWEN = json.loads((GOLDEN / "qwen2_vl/processing_tables.json").read_text())
SLOW_FAST = json.loads((GOLDEN / "keye_vl/slowfast_1.5.2.json").read_text())
FACES = pytest.mark.parametrize(
    "face", [qwen_vl_utils, keye_vl_utils_1_0, keye_vl_utils], ids=["qwen", "keye 1.0.0", "keye 1.5.2"]
)


def sha(values: np.ndarray | torch.Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(np.asarray(values)).tobytes()).hexdigest()


def user(*parts: object) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


# Sizes and counts


@pytest.mark.parametrize(("face", "version"), [(keye_vl_utils_1_0, "1.0.0"), (keye_vl_utils, "1.5.2")])
def test_sizes_of_keye(face, version):
    for height, width, low, high, size in KEYE[f"smart_resize_utils_{version}"]:
        assert face.smart_resize(height, width, min_pixels=low, max_pixels=high) == tuple(size)
        if (low, high) == (face.MIN_PIXELS, face.MAX_PIXELS):
            assert face.smart_resize(height, width) == tuple(size)
    for name, value in KEYE[f"constants_{version}"].items():
        if name not in ("MAX_RATIO", "MAX_TOKENS", "MIN_TOKENS", "VIDEO_MAX_TOKENS", "VIDEO_MIN_TOKENS"):
            assert getattr(face, name, face.RULE.total_pixels) == value, name


def test_sizes_of_qwen():
    for row in QWEN["smart_resize_factor28"]:
        made = qwen_vl_utils.smart_resize(row["h"], row["w"], 28, row["min_pixels"], row["max_pixels"])
        # 0.0.8 can round a side to nothing; one step is kept here.
        assert made == tuple(max(28, side) for side in row["qwen_vl_utils_0_0_8"])


@FACES
def test_a_strip_is_a_value_error(face):
    with pytest.raises(ValueError, match="200"):
        face.smart_resize(1, 300)


def test_frame_counts_and_indices_of_qwen():
    seen = 0
    for row in QWEN["smart_nframes"]:
        total, wanted = row["total_frames"], row["v0_0_8"]
        if "indices" not in wanted:
            continue
        timeline = Timeline(np.arange(total) / row["video_fps"], row["video_fps"], uniform=True)
        choice = choose(timeline, Video("x", **row["request"]), qwen_vl_utils.RULE)
        listed = ",".join(map(str, choice.indices.tolist()))
        assert hashlib.sha256(listed.encode()).hexdigest() == wanted["sha256_indices_csv"], row
        seen += 1
    assert seen > 5


def test_frame_sizes_of_qwen(lossless, synth):
    for row in QWEN["video_pixel_budget_v0_0_8"]:
        part = Video("x", **row["request"])
        assert list(video_budget(row["nframes"], row["h"], row["w"], part, qwen_vl_utils.RULE)) == row["resized_hw"]
    # 0.0.8 lets max_pixels go past the budget, 1.0.0 does not
    ele = {"video": str(lossless([synth(1000, 1000, 0)] * 2, 2)), "max_pixels": 1_000_000}
    assert qwen_vl_utils.fetch_video(ele).shape == (2, 3, 980, 980)
    assert keye_vl_utils_1_0.fetch_video(ele).shape == (2, 3, 756, 756)


# Pictures


@FACES
def test_pictures_have_the_size_and_pixels_of_a_plain_resize(face, synth):
    for height, width, k in ((37, 61, 0), (333, 517, 4), (13, 9, 6)):
        picture = Image.fromarray(synth(height, width, k))
        high, wide = face.smart_resize(height, width)
        assert sha(face.fetch_image({"image": picture})) == sha(picture.resize((wide, high)))
        assert face.fetch_image({"image": picture, "resized_height": 100, "resized_width": 70}).size == (56, 112)
        assert face.fetch_image({"image": picture, "max_pixels": 28 * 28 * 2}).size[0] <= 56
    assert face.fetch_image({"image": picture}, 32).size == tuple(reversed(face.smart_resize(13, 9, 32)))


def test_alpha_as_in_each(synth):
    rgba = Image.fromarray(np.dstack([synth(60, 80, 3), synth(60, 80, 9)[..., 0]]))
    recorded = json.loads((GOLDEN / "keye_vl/image_processor.json").read_text())["rgba"]
    on_white, dropped = recorded["fetch_1_0_0_sha256"], recorded["fetch_1_5_2_sha256"]
    assert on_white != dropped
    assert sha(keye_vl_utils_1_0.fetch_image({"image": rgba})) == on_white
    assert sha(keye_vl_utils.fetch_image({"image": rgba})) == dropped
    assert sha(qwen_vl_utils.fetch_image({"image": rgba})) == dropped


@FACES
def test_every_kind_of_source(face, tmp_path, synth):
    picture = Image.fromarray(synth(60, 80, 1))
    path = tmp_path / "a b.png"
    picture.save(path)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    uri = "base64," + base64.b64encode(buffer.getvalue()).decode()
    want = sha(face.fetch_image({"image": picture}))
    for source in (str(path), path, f"file://{path}", f"data:image/png;{uri}", f"data:image;{uri}"):
        assert sha(face.fetch_image({"type": "image", "image": source})) == want
    assert sha(face.fetch_image({"image_url": {"url": str(path)}})) == want
    with pytest.raises(MediaNotFound):
        face.fetch_image({"image": str(tmp_path / "none.png")})


# Return shapes


@FACES
def test_nothing_to_see(face):
    made = face.process_vision_info([{"role": "user", "content": "text"}])
    assert made[:2] == (None, None) and len(made) == (3 if face is keye_vl_utils else 2)


def test_shapes_of_qwen_and_keye_1_0(synth, lossless):
    picture, video = Image.fromarray(synth(60, 80, 1)), lossless([synth(90, 160, t) for t in range(8)], 4)
    chats = [user({"type": "image", "image": picture}, {"type": "text", "text": "?"}), user({"video": str(video), "fps": 1.0})]
    for face in (qwen_vl_utils, keye_vl_utils_1_0):
        images, videos = face.process_vision_info(chats)
        assert [image.size for image in images] == [(84, 56)]
        assert [(clip.shape, clip.dtype) for clip in videos] == [((4, 3, 252, 448), torch.float32)]
        again, _, kwargs = face.process_vision_info(chats, return_video_kwargs=True)
        assert again[0].tobytes() == images[0].tobytes() and kwargs == {"fps": [2.0]}  # no fewer than 4 of 8 frames
    one, _ = qwen_vl_utils.process_vision_info(chats[0])
    assert len(one) == 1


def test_the_way_to_each_version_of_keye(synth):
    chat = user({"image": Image.fromarray(synth(60, 80, 1))})
    assert len(keye_vl_utils.process_vision_info(chat)) == 3
    assert len(keye_vl_utils.process_vision_info(chat, version="1.0.0")) == 2
    assert keye_vl_utils.process_vision_info(chat, return_video_kwargs=True)[2] == {"fps": []}
    assert len(keye_vl_utils.process_vision_info(chat, return_video_kwargs=False)) == 2
    assert len(keye_vl_utils.process_vision_info(vision_infos=chat[0]["content"], version="1.0.0")) == 2
    assert len(keye_vl_utils.process_vision_info(chat, version="1.5.2", return_video_kwargs=True)) == 3
    with pytest.raises(SettingsError, match=r"2\.0"):
        keye_vl_utils.process_vision_info(chat, version="2.0")
    with pytest.raises(MessageError, match="nothing"):
        keye_vl_utils.process_vision_info()


def test_lists_of_settings_per_video(synth, lossless):
    clip = lossless([scene(90, 160, 2 * (t // 3), 0) for t in range(6)], 2)
    frames = [Image.fromarray(synth(90, 160, 0))] * 4
    images, videos, kwargs = keye_vl_utils.process_vision_info(user({"video": str(clip)}, {"video": frames, "fps": 1.0}))
    assert images is None and [tuple(video.shape) for video in videos] == [(6, 3, 90, 160), (4, 3, 168, 280)]
    assert all(video.dtype == torch.uint8 for video in videos)
    assert set(kwargs) == {"height", "width", "fast_height", "fast_width", "timestamps", "frame_types"}
    assert [times.tolist() for times in kwargs["timestamps"]] == [[0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [0.0, 1.0, 2.0, 3.0]]
    assert [kinds.tolist() for kinds in kwargs["frame_types"]] == [[0, 1, 1, 0, 1, 1], [0, 1, 1, 1]]
    assert kwargs["frame_types"][0].dtype == torch.int32 and kwargs["timestamps"][0].dtype == torch.float32
    untimed = keye_vl_utils.process_vision_info(user({"video": frames}))[2]
    assert "timestamps" not in untimed and kwargs["missing"] == []


# Videos


def test_a_video_file_as_1_0_0_resizes_it(synth, lossless):
    golden = json.loads((GOLDEN / "keye_vl/image_processor.json").read_text())["video_tensor_1.0.0"]
    frames = [synth(90, 160, 40 + t) for t in range(4)]
    for face in (keye_vl_utils_1_0, qwen_vl_utils):
        clip, fps = face.fetch_video({"video": str(lossless(frames, 2))}, return_video_sample_fps=True)
        assert list(clip.shape) == [4, 3, *golden["resized_hw"]] and fps == 2.0
        assert sha(clip.to(torch.uint8)) == golden["resized_sha256_uint8"]
        assert torch.equal(clip, clip.round())


def test_frames_in_order_and_their_number(synth, lossless):
    path = lossless([np.full((56, 56, 3), 10 * t, np.uint8) for t in range(21)], 10)
    for ele, values in (
        ({"fps": 2.0}, [0, 70, 130, 200]),
        ({"nframes": 6}, [0, 40, 80, 120, 160, 200]),
        ({"video_start": 1.0, "nframes": 2}, [100, 200]),
        ({"video_end": 0.5, "nframes": 2}, [0, 50]),
    ):
        clip = keye_vl_utils_1_0.fetch_video({"video": str(path), **ele})
        assert clip[:, 0, 0, 0].tolist() == values


def test_a_list_of_frames_is_padded_to_an_even_number(synth):
    frames = [Image.fromarray(synth(60, 80, t)) for t in range(3)]
    for face in (keye_vl_utils_1_0, qwen_vl_utils):
        made, fps = face.fetch_video({"video": frames, "fps": 3.0}, return_video_sample_fps=True)
        assert len(made) == 4 and fps == 3.0
        assert [sha(frame) for frame in made] == [sha(face.fetch_image({"image": f})) for f in (*frames, frames[-1])]


def scene(height: int, width: int, which: int, step: int) -> np.ndarray:
    palette = [(250, 250, 250), (250, 10, 10), (10, 10, 60), (200, 10, 150), (10, 200, 20), (0, 0, 0)]
    made = np.empty((height, width, 3), np.int64)
    made[:] = palette[which % 6]
    made[:, : (step * width) // 20] = palette[(which + 2) % 6]
    y, x = np.ogrid[:height, :width]
    return np.clip(made + ((y + x) % 7)[..., None], 0, 255).astype(np.uint8)


@pytest.mark.parametrize("case", SLOW_FAST["cases"], ids=lambda case: case["name"])
def test_slow_fast_equals_1_5_2(case):
    frames = [Image.fromarray(scene(case["h"], case["w"], *which)) for which in case["scenes"]]
    clip, kwargs = keye_vl_utils.fetch_video({"video": frames, **case["ele"]})
    assert list(clip.shape) == case["out_frames_shape"]
    assert sha(clip) == case["out_sha256"]
    assert {name: kwargs[name] for name in ("height", "width", "fast_height", "fast_width")} == {
        name: case[name] for name in ("height", "width", "fast_height", "fast_width")
    }
    assert kwargs["frame_types"].tolist() == case["frame_types"]
    assert ("timestamps" in kwargs) == ("timestamps" in case)
    if "timestamps" in case:
        assert kwargs["timestamps"].tolist() == case["timestamps"]


def test_frames_with_settings_of_their_own(synth):
    picture = Image.fromarray(synth(300, 400, 1))
    frame = {"image": picture, "max_pixels": 50_000}
    clip, _ = keye_vl_utils.fetch_video({"video": [frame, frame]})
    assert clip.shape == (2, 3, 168, 252)


def test_a_video_too_large_to_hold(lossless, synth, monkeypatch):
    path = lossless([synth(90, 160, t) for t in range(4)], 2)
    monkeypatch.setattr(vision, "MAX_BYTES", 4 * 90 * 160 * 3 - 1)
    with pytest.raises(MediaTooLarge, match="max_frames"):
        keye_vl_utils.fetch_video({"video": str(path)})


@FACES
def test_bad_videos(face, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    for source in (str(tmp_path / "a.mp4"), str(tmp_path / "none.mp4"), []):
        with pytest.raises(MediaError):
            face.fetch_video({"video": source})
    with pytest.raises(SettingsError, match="both fps and nframes"):
        face.fetch_video({"video": str(tmp_path / "a.mp4"), "fps": 1.0, "nframes": 2})


# Finding parts, and the environment


def test_parts_are_found_by_key_and_by_type():
    parts = [
        {"type": "image", "image": 1},
        {"image_url": 2},
        {"type": "text", "text": "x"},
        {"video": 3},
        {"type": "video"},
    ]
    chat = [{"role": "system", "content": "x"}, *user(*parts)]
    for face in (qwen_vl_utils, keye_vl_utils_1_0, keye_vl_utils):
        assert face.extract_vision_info(chat) == [parts[0], parts[1], parts[3], parts[4]]
        assert face.extract_vision_info([chat, chat]) == face.extract_vision_info(chat) * 2
        with pytest.raises(MessageError, match="'video' holds no source"):
            face.process_vision_info(user({"type": "video"}))


@pytest.mark.parametrize(
    ("face", "variable"),
    [
        (qwen_vl_utils, "FORCE_QWENVL_VIDEO_READER"),
        (keye_vl_utils_1_0, "FORCE_KEYEVL_VIDEO_READER"),
        (keye_vl_utils, "FORCE_KEYEVL_VIDEO_READER"),
    ],
)
def test_a_reader_asked_for_is_noted(face, variable, monkeypatch, synth):
    frames = [Image.fromarray(synth(60, 80, t)) for t in range(2)]
    monkeypatch.setenv(variable, "decord")
    with pytest.warns(UserWarning, match=f"{variable}=decord has no effect.*PyAV"):
        face.fetch_video({"video": frames})


@pytest.mark.parametrize("face", [qwen_vl_utils, keye_vl_utils_1_0])
def test_the_budget_from_the_environment(face, monkeypatch, lossless, synth):
    ele = {"video": str(lossless([synth(400, 400, t) for t in range(4)], 2))}
    assert face.fetch_video(ele).shape[2:] == (392, 392)
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "2.4e5")
    assert face.fetch_video(ele).shape[2:] == (336, 336)
    assert face.fetch_video({**ele, "total_pixels": 10**7}).shape[2:] == (392, 392)
    monkeypatch.setenv("VIDEO_MAX_PIXELS", "much")
    with pytest.raises(SettingsError, match="VIDEO_MAX_PIXELS='much'"):
        face.fetch_video(ele)
