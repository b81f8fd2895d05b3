"""Opening and decoding real files: times, streams, orientation, seeks equal to sequential decodes, broken files."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import av
import clips
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image as pil

from mirada.errors import MediaDecodeError, MediaError, MediaTimeout, MediaTooLarge, MediaUnsupported
from mirada.media.decode import Animation, VideoFile, _advance, _Painter, on_white, open_reader
from mirada.media.limits import FetchLimits

LIMITS = FetchLimits()


def numbers(data: bytes, indices: list[int] | None = None, limits: FetchLimits = LIMITS) -> list[int]:
    with closing(open_reader(data, limits)) as reader:
        return [clips.number_of(frame) for frame in reader.read(indices or range(reader.timeline.num_frames))]


FORMS = {
    "mp4": {},
    "fragmented mp4": {"mux": {"movflags": "frag_keyframe+empty_moov"}},
    "mkv": {"form": "matroska"},
    "webm": {"form": "webm", "codec": "libvpx-vp9", "codec_options": {"deadline": "realtime", "cpu-used": "8"}},
    "ts": {"form": "mpegts"},
    "flv": {"form": "flv"},
    "avi": {"form": "avi", "codec": "mpeg4"},
    "raw h264": {"form": "h264"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_frame_of_every_container_has_its_number_and_time(form: str) -> None:
    data = clips.encode(12, rate=5, **FORMS[form])
    with closing(open_reader(data, LIMITS)) as reader:
        assert (reader.timeline.num_frames, reader.timeline.rate, reader.timeline.uniform) == (12, 5.0, True)
        assert reader.size == (48, 64)
        frames = list(reader.read(range(12)))
        assert [clips.number_of(frame) for frame in frames] == list(range(12))
        assert all(frame.shape == (48, 64, 3) and frame.dtype == np.uint8 and frame.flags.c_contiguous for frame in frames)
        assert [clips.number_of(frame) for frame in reader.read([0, 3, 3, 11])] == [0, 3, 3, 11]
        assert np.allclose(reader.timeline.times, np.arange(12) / 5, atol=0.0011)


def test_paths_are_read_without_loading_them(tmp_path) -> None:
    path = tmp_path / "a clip.mp4"
    path.write_bytes(clips.encode(3))
    with closing(open_reader(path, LIMITS)) as reader:
        assert "a clip.mp4" in reader.name
        assert [clips.number_of(frame) for frame in reader.read([0, 1, 2])] == [0, 1, 2]
    with pytest.raises(MediaTooLarge, match="bytes"):
        open_reader(path, replace(LIMITS, video_bytes=100))


B_FRAMES = {"preset": "veryfast", "x264-params": "keyint=24:bframes=3:scenecut=0"}
SEEKS = {
    "b-frames": {"codec_options": B_FRAMES},
    "open gop": {"codec_options": {**B_FRAMES, "x264-params": "open-gop=1:keyint=24:bframes=3"}},
    "open gop ts": {"form": "mpegts", "codec_options": {**B_FRAMES, "x264-params": "open-gop=1:keyint=24:bframes=3"}},
    "intra refresh": {"codec_options": {"preset": "medium", "x264-params": "intra-refresh=1:keyint=24"}},
    "vp8 with hidden frames": {
        "form": "webm",
        "codec": "libvpx",
        "codec_options": {"g": "24", "deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "8"},
    },
    "mpeg4 avi": {"form": "avi", "codec": "mpeg4", "codec_options": {"g": "24"}},
}


@pytest.mark.parametrize("how", SEEKS)
def test_seeking_gives_what_a_sequential_decode_gives(how: str) -> None:
    data = clips.encode(120, **SEEKS[how])
    everything = VideoFile(io.BytesIO(data), "all", LIMITS, seek_gap=None)
    frames = list(everything.read(range(120)))
    draw = np.random.default_rng(0)
    choices = [sorted(draw.choice(120, 4, replace=False).tolist()) for _ in range(4)] + [[119], [0, 119], [60, 60, 100]]
    for chosen in choices:
        seeking = VideoFile(io.BytesIO(data), "some", LIMITS, seek_gap=4)
        for index, frame in zip(chosen, seeking.read(chosen), strict=True):
            assert np.array_equal(frame, frames[index]), (chosen, index)


def test_every_frame_of_an_intra_refreshed_file_can_be_read_alone() -> None:
    # Its packets say "key frame" where only a stripe is fresh: a decode from there shows rubbish for a second.
    ground = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)  # it never changes, so only stripes renew it
    pictures = [np.concatenate([clips.numbered(i)[:16], ground[16:]]) for i in range(96)]
    data = clips.encode(pictures, codec_options=SEEKS["intra refresh"]["codec_options"])
    frames = list(VideoFile(io.BytesIO(data), "all", LIMITS, seek_gap=None).read(range(96)))
    for index in range(24, 96, 6):
        reader = VideoFile(io.BytesIO(data), "one", LIMITS, seek_gap=4)
        assert np.array_equal(next(reader.read([index])), frames[index]), index


def remuxed(data: bytes, change: Callable[[list[Any]], list[Any]]) -> bytes:
    """The packets of a file, after ``change``, in a new Matroska file."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="matroska") as target:
        copied = target.add_stream_from_template(source.streams.video[0])
        for packet in change([packet for packet in source.demux(video=0) if packet.size]):
            packet.stream = copied
            target.mux(packet)
    return buffer.getvalue()


def test_a_file_that_starts_between_key_frames_is_read_from_its_first_one() -> None:
    whole = clips.encode(20, **FORMS["webm"] | {"codec_options": {"g": "8", "deadline": "realtime", "cpu-used": "8"}})
    assert numbers(remuxed(whole, lambda packets: packets[3:])) == list(range(8, 20))


def test_a_file_that_calls_every_frame_a_key_frame_is_not_trusted() -> None:
    def lie(packets: list[Any]) -> list[Any]:
        for packet in packets:
            packet.is_keyframe = True
        return packets

    data = remuxed(clips.encode(40, form="matroska", codec="msmpeg4", codec_options={"g": "40"}), lie)
    frames = list(VideoFile(io.BytesIO(data), "all", LIMITS, seek_gap=None).read(range(40)))
    reader = VideoFile(io.BytesIO(data), "some", LIMITS, seek_gap=4)
    assert len(reader._probe.keys) == 40
    for index, frame in zip([20, 30], reader.read([20, 30]), strict=True):
        assert np.array_equal(frame, frames[index]), index


def test_seeking_decodes_less() -> None:
    data = clips.encode(240, codec_options=B_FRAMES)
    counts = []
    for gap in (None, 16):
        reader = VideoFile(io.BytesIO(data), "it", LIMITS, seek_gap=gap)
        assert [clips.number_of(frame) for frame in reader.read([5, 239])] == [5, 239]
        counts.append(reader.num_decoded)
    assert counts[0] >= 240
    assert counts[1] < 60


def test_variable_frame_rate_keeps_real_times() -> None:
    seconds = [0.0, 0.1, 0.2, 1.7, 1.8, 3.0]
    for form in ("mp4", "matroska"):
        data = clips.encode(6, form=form, seconds=seconds)
        with closing(open_reader(data, LIMITS)) as reader:
            assert not reader.timeline.uniform
            assert np.allclose(reader.timeline.times, seconds, atol=0.0011)
            assert [clips.number_of(frame) for frame in reader.read([2, 3, 5])] == [2, 3, 5]


def test_millisecond_times_of_30_frames_a_second_are_an_even_rate() -> None:
    with closing(open_reader(clips.encode(40, rate=30, form="matroska"), LIMITS)) as reader:
        assert reader.timeline.uniform
        assert reader.timeline.rate == pytest.approx(30)
        assert reader.timeline.timestamps(np.array([9]))[0] == float(np.float32(9 / 30))


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotation_of_the_container_is_applied(angle: int) -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:16, :16] = 250
    data = clips.encode([picture] * 2, prepare=lambda stream: stream.set_display_rotation(angle))
    with closing(open_reader(data, LIMITS)) as reader:
        frame = next(iter(reader.read([0])))
    wanted = np.rot90(picture, angle // 90)  # a display rotation turns counter-clockwise
    assert frame.shape == wanted.shape == (*reader.size, 3)
    assert np.abs(frame.astype(int) - wanted).mean() < 12
    assert reader.notes == ("turned upright (display matrix of the file)",)


def test_a_phones_portrait_video_comes_out_upright() -> None:
    # Phones store landscape pictures and the matrix (0 1 / -1 0): turn clockwise by a quarter. Written byte by byte.
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:16, :16] = 250
    data = bytearray(clips.encode([picture] * 2))
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix starts 40 bytes after version and flags
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    with closing(open_reader(bytes(data), LIMITS)) as reader:
        frame = next(iter(reader.read([0])))
    assert np.abs(frame.astype(int) - np.rot90(picture, -1)).mean() < 12


def test_mirrored_matrix_is_applied() -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:16, :16] = 250
    data = bytearray(clips.encode([picture] * 2))
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", -(1 << 16), 0, 0, 0, 1 << 16, 0, 64 << 16, 0, 1 << 30)
    with closing(open_reader(bytes(data), LIMITS)) as reader:
        frame = next(iter(reader.read([0])))
    assert np.abs(frame.astype(int) - picture[:, ::-1]).mean() < 12


def streams(*sizes: tuple[int, int], default: int | None = None, cover: int | None = None) -> bytes:
    """A Matroska file of several video streams; the frames of stream k show the number 100 + k."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        made = []
        for index, (height, width) in enumerate(sizes):
            picture = clips.numbered(100 + index, height, width)
            stream = clips.add_stream(container, picture, "mjpeg" if index == cover else "libx264")
            if index == cover:
                stream.pix_fmt = "yuvj420p"
            stream.disposition = Disposition.default if index == default else Disposition(0)
            made.append((stream, picture))
        for stream, picture in made:
            clips.mux_frames(container, stream, [picture] * 2)
    return buffer.getvalue()


def test_the_stream_flagged_default_is_chosen_else_the_largest_else_the_first() -> None:
    small, large = (48, 64), (96, 128)
    assert numbers(streams(large, small, default=1))[0] == 101
    assert numbers(streams(small, large))[0] == 101
    assert numbers(streams(small, small))[0] == 100


def sound(with_cover: bool) -> bytes:
    """An MP4 with a sound stream, and perhaps cover art."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=8000, layout="mono")
        cover = clips.add_stream(container, clips.numbered(0), "png") if with_cover else None
        if cover is not None:
            cover.pix_fmt, cover.disposition = "rgb24", Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
        if cover is not None:
            clips.mux_frames(container, cover, [clips.numbered(0)])
    return buffer.getvalue()


@pytest.mark.parametrize("with_cover", [False, True])
def test_sound_is_no_video_even_with_cover_art(with_cover: bool) -> None:
    with pytest.raises(MediaUnsupported, match=r"has no video stream.*audio"):
        open_reader(sound(with_cover), LIMITS)


LONG = 40


@pytest.mark.parametrize("form", ["mp4", "fragmented mp4", "mkv", "avi"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_a_truncated_file_is_an_error(form: str, share: float) -> None:
    data = clips.encode(LONG, **FORMS[form])
    with pytest.raises(MediaDecodeError, match=r"truncated|cannot|broken|not a video"):
        numbers(data[: int(len(data) * share)])


def test_a_truncated_mp4_whose_index_comes_first_is_an_error(tmp_path) -> None:
    data = clips.encode(LONG, mux={"movflags": "faststart"}, path=tmp_path / "first.mp4")
    assert data.index(b"moov") < data.index(b"mdat")
    assert numbers(data) == list(range(LONG))
    with pytest.raises(MediaDecodeError, match=r"truncated: .* bytes are there"):
        open_reader(data[:-50], LIMITS)


def test_rubbish_behind_the_last_box_is_no_truncation() -> None:
    assert numbers(clips.encode(3) + b"\xff\xff\xff\xffjunk" + bytes(40)) == [0, 1, 2]


def test_overwritten_pictures_are_an_error_not_a_grey_frame() -> None:
    data = bytearray(clips.encode(LONG, codec_options={"bf": "0"}))
    start = data.index(b"mdat") + 4
    middle = start + (len(data) - start) // 3
    data[middle : middle + 400] = b"\xff" * 400
    with pytest.raises(MediaDecodeError, match="broken"):
        numbers(bytes(data))


@pytest.mark.parametrize(
    ("data", "kind", "problem"),
    [
        (b"no video at all " * 20, MediaDecodeError, "not a video that can be opened"),
        (b"\xff\xd8\xff\xe0" + bytes(100), MediaUnsupported, "JPEG picture"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", MediaUnsupported, "playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", MediaUnsupported, "playlist"),
        (b"\0\0\0\x18ftypmp42" + bytes(12), MediaDecodeError, "its index is missing"),
        (b"GIF89a" + bytes(4), MediaDecodeError, "broken or truncated"),
        (b"RIFF\xff\0\0\0WEBPVP8 ", MediaDecodeError, "broken or truncated"),
        (b"", MediaDecodeError, "empty"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else None,
)
def test_what_is_no_video_says_so(data: bytes, kind: type[MediaError], problem: str) -> None:
    with pytest.raises(kind, match=problem) as caught:
        open_reader(data, LIMITS)
    assert caught.value.fix


def test_a_video_stream_without_frames_is_an_error() -> None:
    for form, problem in (("avi", "without any frame"), ("matroska", "ends before its first frame")):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=form) as container:
            clips.add_stream(container, clips.numbered(0), "mpeg4")
            container.start_encoding()
        with pytest.raises(MediaDecodeError, match=problem):
            open_reader(buffer.getvalue(), LIMITS)


def test_limits_of_frames_pixels_and_time() -> None:
    data = clips.encode(20)
    with pytest.raises(MediaTooLarge, match="more than 10 frames"):
        open_reader(data, replace(LIMITS, video_frames=10))
    with pytest.raises(MediaTooLarge, match="frames of 64x48"):
        open_reader(data, replace(LIMITS, pixels=64 * 48 - 1))
    with pytest.raises(MediaTimeout, match="decode_seconds"):
        numbers(data, limits=replace(LIMITS, decode_seconds=1e-6))


def gif(num: int, form: str = "GIF", milliseconds: int | list[int] = 100, size: tuple[int, int] = (64, 48), **more) -> bytes:
    frames = [pil.fromarray(clips.numbered(i, size[1], size[0])) for i in range(num)]
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations_are_videos(form: str) -> None:
    data = gif(6, form, [100, 100, 100, 400, 100, 100], **({"lossless": True} if form == "WEBP" else {}))
    with closing(open_reader(data, LIMITS)) as reader:
        assert isinstance(reader, Animation)
        assert reader.timeline.times.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.7, 0.8])
        assert reader.timeline.seconds == pytest.approx(0.9)
        assert [clips.number_of(frame) for frame in reader.read([0, 2, 2, 5])] == [0, 2, 2, 5]
        assert [clips.number_of(frame) for frame in reader.read([4])] == [4]
    assert numbers(gif(3, form)) == [0, 1, 2]


def test_frames_of_a_gif_that_say_no_time_last_a_tenth_of_a_second() -> None:
    with closing(open_reader(gif(4, milliseconds=0), LIMITS)) as reader:
        assert (reader.timeline.uniform, reader.timeline.rate) == (True, pytest.approx(10.0))


def test_transparency_is_laid_on_white() -> None:
    clear = pil.new("RGBA", (40, 30), (255, 0, 0, 0))
    drawn = pil.new("RGBA", (40, 30), (0, 0, 255, 255))
    buffer = io.BytesIO()
    clear.save(buffer, "PNG", save_all=True, append_images=[drawn], duration=100)
    with closing(open_reader(buffer.getvalue(), LIMITS)) as reader:
        first, second = reader.read([0, 1])
    assert first.min() == 255
    assert second[0, 0].tolist() == [0, 0, 255]
    assert on_white(np.array([[[10, 20, 30, 128]]], np.uint8)).tolist() == [[[132, 137, 142]]]


def test_ten_thousand_frames_of_a_gif_are_too_many() -> None:
    block = gif(2, size=(16, 8))
    first = block.index(b"!\xf9")
    frame = block[first : block.index(b"!\xf9", first + 1)]
    bomb = block[:first] + frame * 10_000 + b";"
    with pytest.raises(MediaTooLarge, match="more than 5,000 frames"):
        open_reader(bomb, LIMITS)
    with pytest.raises(MediaTooLarge, match="more than 20 frames"):
        open_reader(bomb, replace(LIMITS, animation_frames=20))


def test_an_animation_of_few_large_frames_is_bounded_too() -> None:
    with pytest.raises(MediaTooLarge, match="frames of 64x48"):
        open_reader(gif(2), replace(LIMITS, pixels=1000))


def test_a_change_of_size_within_a_stream_is_scaled_to_the_first() -> None:
    larger = [clips.numbered(i, 96, 128) for i in range(3, 6)]
    data = clips.encode(3, form="h264") + clips.encode(larger, form="h264")
    with closing(open_reader(data, LIMITS)) as reader:
        frames = list(reader.read(range(6)))
    assert {frame.shape for frame in frames} == {(48, 64, 3)}
    assert [clips.number_of(frame) for frame in frames] == list(range(6))


def test_a_damaged_transport_stream_is_read_as_far_as_it_is_whole() -> None:
    # Recordings from the air start and end anywhere, and lose packets.
    data = clips.encode(LONG, form="mpegts", codec_options={"g": "10", "bf": "0"})
    for packets in (7, 15, 25):
        rest = numbers(data[188 * packets :])
        assert rest == list(range(LONG - len(rest), LONG))
        assert rest[0] in (0, 10, 20, 30), "it starts at a key frame"
    assert numbers(data[: len(data) * 2 // 3])[:5] == list(range(5))


def test_a_packet_that_shows_no_frame_of_its_own_gives_the_one_on_show() -> None:
    frames = [SimpleNamespace(pts=pts) for pts in (0, 10, 30, 40)]
    held, ahead = _advance(iter(frames), 20, None, None)
    assert (held, ahead) == (frames[1], frames[2])
    assert _advance(iter(frames[3:]), 30, held, ahead) == (frames[2], None)
    assert _advance(iter(frames[3:]), 99, frames[2], None)[0] == frames[3]
    assert _advance(iter(frames), -5, None, None) == (None, frames[0])


def test_a_frame_that_the_decoder_calls_corrupt_is_an_error() -> None:
    paint = _Painter((48, 64), (False, False, False), "the clip")
    with pytest.raises(MediaDecodeError, match=r"the clip has a broken frame at 1\.500 seconds"):
        paint(SimpleNamespace(is_corrupt=True, time=1.5))
    with pytest.raises(MediaDecodeError, match="ends before its last frame"):
        paint(None)
