"""What ``ask`` makes of what it is given."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as pil

from mirada.engine.inputs import as_part, is_video, question, split_options
from mirada.errors import MediaNotFound, MessageError, SettingsError
from mirada.media.limits import FetchLimits
from mirada.types import Image, Text, Video

LIMITS = FetchLimits()
FRAME = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("head", "video"),
    [
        (b"\0\0\0\x20ftypisom", True),
        (b"\0\0\0\x14ftypqt  ", True),
        (b"\0\0\0\x1cftypavif", False),
        (b"\0\0\0\x18ftypheic", False),
        (b"\x1a\x45\xdf\xa3\x01", True),
        (b"RIFF\0\0\0\0AVI LIST", True),
        (b"RIFF\0\0\0\0WEBPVP8 ", False),
        (b"FLV\x01\x05", True),
        (b"\x00\x00\x01\xba\x44", True),
        (b"OggS\0", True),
        (b"\x89PNG\r\n\x1a\n", False),
        (b"\xff\xd8\xff\xe0", False),
        (b"GIF89a", False),
        (b"hello", None),
        (b"", None),
    ],
)
def test_containers(head, video):
    assert is_video(head) is video


def test_the_bytes_win_over_the_name(tmp_path):
    film, photo, unknown = tmp_path / "film.png", tmp_path / "photo.mp4", tmp_path / "unknown.ts"
    film.write_bytes(b"\0\0\0\x20ftypisom")
    photo.write_bytes(b"\x89PNG\r\n\x1a\n")
    unknown.write_bytes(b"G" * 200)
    assert as_part(film, LIMITS) == Video(film)
    assert as_part(str(photo), LIMITS) == Image(str(photo))
    assert as_part(unknown, LIMITS) == Video(unknown)  # only its name tells
    assert as_part(film.as_uri(), LIMITS) == Video(film.as_uri())
    assert as_part(film.read_bytes(), LIMITS) == Video(film.read_bytes())


def test_addresses_that_tell_are_not_fetched_to_see():
    assert as_part("https://example.com/a.MP4?x=1.png", LIMITS) == Video("https://example.com/a.MP4?x=1.png")
    assert as_part("http://example.com/a.jpeg#top", LIMITS) == Image("http://example.com/a.jpeg#top")


def test_arrays_pictures_and_parts():
    assert isinstance(as_part(FRAME, LIMITS), Image)
    assert isinstance(as_part(np.stack([FRAME] * 3), LIMITS), Video)
    assert isinstance(as_part(pil.new("RGB", (3, 3)), LIMITS), Image)
    own = Video([FRAME], fps=3.0)
    assert as_part(own, LIMITS) is own


def test_a_missing_file_is_said_at_once(tmp_path):
    with pytest.raises(MediaNotFound, match=r"nothing\.mp4"):
        as_part(tmp_path / "nothing.mp4", LIMITS)


def test_order_and_settings_of_the_question():
    turn = question((FRAME, [Image(FRAME, max_pixels=7), Video([FRAME])], "Why?"), None, {"max_pixels": 9, "fps": 2.0}, LIMITS)
    first, second, third, text = turn.parts
    assert isinstance(first, Image) and isinstance(second, Image) and isinstance(third, Video)
    assert (first.max_pixels, second.max_pixels, third.max_pixels, third.fps) == (9, 7, 9, 2.0)
    assert text == Text("Why?")
    assert question((FRAME,), "Why?", {}, LIMITS).parts[-1] == Text("Why?")


def test_options_by_name():
    sampling, media = split_options({"max_tokens": 3, "fps": 1.0, "seed": None})
    assert (sampling, media) == ({"max_tokens": 3}, {"fps": 1.0})
    with pytest.raises(SettingsError, match="did you mean 'max_pixels'"):
        split_options({"max_pixel": 3})
    with pytest.raises(SettingsError, match="resized_height is for a picture or video"):
        question(("Why?",), None, {"resized_height": 28}, LIMITS)
    with pytest.raises(MessageError, match="question is empty"):
        question((FRAME, "  "), None, {}, LIMITS)


def test_a_picture_where_the_question_belongs_is_not_asked(tmp_path):
    file = tmp_path / "sign"
    file.write_bytes(b"\x89PNG")
    for inputs in (
        ("sign.png",),
        ("What?", "sign.png"),
        (str(file),),
        ("What?", "https://a.b/c.MP4?x=1"),
        ("data:image/png;base64,AA",),
    ):
        with pytest.raises(MessageError, match=r"question is missing.*question comes last"):
            question(inputs, None, {}, LIMITS)
    for inputs in ((), (file,), ("What?", FRAME)):
        with pytest.raises(MessageError, match="question is missing"):
            question(inputs, None, {}, LIMITS)
    assert question(("What is in sign.png",), None, {}, LIMITS).parts == (Text("What is in sign.png"),)
    assert question((FRAME,), "sign.png", {}, LIMITS).parts[-1] == Text("sign.png")
