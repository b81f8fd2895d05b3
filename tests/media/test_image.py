"""Every kind of source and every pixel mode becomes one upright RGB picture, or a typed error."""

from __future__ import annotations

import base64
import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pil

from mirada.errors import MediaDecodeError, MediaTooLarge, MediaUnsupported
from mirada.media.image import _formats, decode, from_array, open_image
from mirada.media.limits import FetchLimits

LIMITS = FetchLimits()
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(size: tuple[int, int] = (6, 4)) -> pil.Image:
    """Red, green / blue, white quarters: any turn or flip shows."""
    image = pil.new("RGB", size, RED)
    w, h = size[0] // 2, size[1] // 2
    image.paste(GREEN, (w, 0, size[0], h))
    image.paste(BLUE, (0, h, w, size[1]))
    image.paste(WHITE, (w, h, size[0], size[1]))
    return image


def saved(image: pil.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixel(picture, x: int = 0, y: int = 0):
    return picture.rgb.getpixel((x, y))


def same(one: pil.Image, other: pil.Image) -> None:
    assert one.mode == other.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = corners()
    data = saved(image)
    path = tmp_path / "a picture %41.png"
    path.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    text = base64.b64encode(data).decode()
    url = base64.urlsafe_b64encode(data).decode().rstrip("=")
    sources = [
        path,
        str(path),
        path.name,
        "file://" + str(path).replace("%", "%25").replace(" ", "%20"),
        "file://localhost" + str(path).replace("%", "%25"),
        f"data:image/png;base64,{text}",
        f"data:image;base64,{text}",
        f"DATA:;base64,{text[:40]}\n {text[40:]}",
        f"data:image/png;charset=x;base64,{url}",
        f"data:image/png;base64,{text.replace('+', '%2B').replace('=', '%3D')}",
        data,
        bytearray(data),
        memoryview(data),
        image,
        np.asarray(image),
        np.dstack([np.asarray(image), np.full((4, 6), 255, np.uint8)]),
        np.asarray(image)[:, ::-1][:, ::-1],
    ]
    for source in sources:
        same(open_image(source, LIMITS).rgb, image)


def half_clear(mode: str) -> pil.Image:
    """Left column opaque, right column fully transparent black, in ``mode``."""
    rgba = pil.new("RGBA", (2, 1), (0, 0, 0, 0))
    rgba.putpixel((0, 0), (200, 200, 200, 255))
    if mode == "PA":
        made = pil.new("PA", (2, 1))
        made.putpalette([200, 200, 200, 0, 0, 0])
        made.putpixel((0, 0), (0, 255))
        made.putpixel((1, 0), (1, 0))
        return made
    if mode == "La":
        return rgba.convert("LA").convert("La")
    return rgba.convert(mode)


def colour_key(mode: str, key, other) -> pil.Image:
    made = pil.new(mode, (2, 1), other)
    made.putpixel((1, 0), key)
    made.info["transparency"] = key
    return made


def palette(transparency) -> pil.Image:
    made = pil.new("P", (2, 1))
    made.putpalette([200, 200, 200, 0, 0, 0])
    made.putpixel((1, 0), 1)
    made.info["transparency"] = transparency
    return made


CLEAR = {
    "RGBA": half_clear("RGBA"),
    "LA": half_clear("LA"),
    "RGBa": half_clear("RGBA").convert("RGBa"),
    "La": half_clear("La"),
    "PA": half_clear("PA"),
    "P, one index": palette(1),
    "P, table": palette(b"\xff\x00"),
    "RGB, colour key": colour_key("RGB", (0, 0, 0), (200, 200, 200)),
    "L, key": colour_key("L", 0, 200),
}


@pytest.mark.parametrize("name", CLEAR)
def test_transparency_is_laid_on_white(name: str) -> None:
    picture = open_image(CLEAR[name], LIMITS)
    assert pixel(picture) == (200, 200, 200) and pixel(picture, 1) == WHITE
    assert picture.notes == ("transparent parts were laid on white",)
    dropped = open_image(CLEAR[name], LIMITS, "drop")
    assert pixel(dropped) == (200, 200, 200)
    assert pixel(dropped, 1) == (0, 0, 0) and "dropped" in dropped.notes[0]


@pytest.mark.parametrize(("mode", "white"), [("RGBA", True), ("LA", False), ("P, table", False)])
def test_white_rgba_lays_only_that_mode_on_white(mode: str, white: bool) -> None:
    assert (pixel(open_image(CLEAR[mode], LIMITS, "white_rgba"), 1) == WHITE) is white


def test_half_transparency_is_blended_and_an_opaque_alpha_says_nothing() -> None:
    picture = open_image(pil.new("RGBA", (1, 1), (0, 100, 200, 128)), LIMITS)
    assert pixel(picture) == (127, 177, 227)
    assert open_image(pil.new("RGBA", (1, 1), (0, 100, 200, 255)), LIMITS).notes == ()


GREY = np.array([[0, 128, 257, 32896, 65407, 65535]], np.uint16)
GREY_8 = [0, 0, 1, 128, 255, 255]  # rounded value / 257: scaled, not clipped


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_files_are_scaled(form: str) -> None:
    picture = open_image(saved(pil.fromarray(GREY), form), LIMITS)
    assert np.asarray(picture.rgb)[0, :, 0].tolist() == GREY_8
    assert picture.notes == ("16-bit grey values were scaled to 8 bits",)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_pil_images_of_both_byte_orders_are_scaled(order: str) -> None:
    mode = "I;16" if order == "<u2" else "I;16B"
    image = pil.frombytes(mode, (6, 1), GREY.astype(order).tobytes())
    assert np.asarray(open_image(image, LIMITS).rgb)[0, :, 1].tolist() == GREY_8


def test_16_bit_colour_key_becomes_white() -> None:
    image = pil.fromarray(GREY)
    image.info["transparency"] = 257
    assert np.asarray(open_image(image, LIMITS).rgb)[0, :, 0].tolist() == [0, 0, 255, 128, 255, 255]


MODES = [  # (mode, colour given, RGB expected)
    ("1", 1, (255, 255, 255)),
    ("1", 0, (0, 0, 0)),
    ("L", 77, (77, 77, 77)),
    ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ("YCbCr", (255, 128, 128), (255, 255, 255)),
    ("HSV", (0, 255, 255), (255, 0, 0)),
    ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
]


@pytest.mark.parametrize(("mode", "colour", "expected"), MODES)
def test_modes_become_rgb(mode: str, colour, expected) -> None:
    picture = open_image(pil.new(mode, (3, 2), colour), LIMITS)
    assert picture.size == (2, 3) and pixel(picture, 2, 1) == expected
    assert picture.notes == (("CMYK was converted to RGB without its colour profile",) if mode == "CMYK" else ())


def test_cmyk_jpeg_is_not_inverted() -> None:
    picture = open_image(saved(pil.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"), LIMITS)
    assert min(pixel(picture)) > 250


def test_1_bit_file() -> None:
    image = corners().convert("1")
    same(open_image(saved(image), LIMITS).rgb, image.convert("RGB"))


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_of_unknown_range_are_refused(mode: str) -> None:
    with pytest.raises(MediaUnsupported, match=rf"pixel mode {mode}, .* 8-bit"):
        open_image(pil.new(mode, (2, 2)), LIMITS)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000"])
def test_formats(form: str) -> None:
    size = (32, 16) if form != "ICO" else (32, 32)
    data = saved(corners(size), form, **({"sizes": [size]} if form == "ICO" else {}))
    picture = open_image(data, LIMITS)
    assert picture.size == (size[1], size[0])
    for x, y, colour in ((2, 2, RED), (size[0] - 3, 2, GREEN), (2, size[1] - 3, BLUE), (size[0] - 3, size[1] - 3, WHITE)):
        assert max(abs(a - b) for a, b in zip(pixel(picture, x, y), colour, strict=True)) < 60  # lossy ones


TURNS = {
    2: pil.Transpose.FLIP_LEFT_RIGHT,
    3: pil.Transpose.ROTATE_180,
    4: pil.Transpose.FLIP_TOP_BOTTOM,
    5: pil.Transpose.TRANSPOSE,
    6: pil.Transpose.ROTATE_90,  # what a camera stores for orientation 6 is the upright picture turned this way
    7: pil.Transpose.TRANSVERSE,
    8: pil.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied(form: str, orientation: int) -> None:
    upright = corners((32, 16))
    exif = pil.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    data = saved(upright.transpose(TURNS[orientation]), form, exif=exif, **options)
    picture = open_image(data, LIMITS)
    assert picture.size == (16, 32)
    assert np.abs(np.asarray(picture.rgb, int) - np.asarray(upright, int)).max() < (12 if form == "JPEG" else 1)
    if form != "TIFF":  # Pillow turns it while loading
        assert picture.notes == (f"turned upright (EXIF orientation {orientation})",)
    given = pil.open(io.BytesIO(data))  # a PIL image that was only opened
    np.testing.assert_array_equal(np.asarray(open_image(given, LIMITS).rgb), np.asarray(picture.rgb))


def test_a_pil_image_whose_file_was_closed_unread_is_not_called_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(saved(corners()))
    with pil.open(path) as left:
        pass
    (shut := pil.open(path)).close()
    for image in (left, shut):
        with pytest.raises(MediaDecodeError, match=r"was closed before it was read.*image\.load\(\)"):
            open_image(image, LIMITS)
    with pil.open(path) as read:
        read.load()
    assert open_image(read, LIMITS).rgb.tobytes() == corners().tobytes()


def test_a_pil_image_is_left_as_it_was() -> None:
    image = corners()
    image.getexif()[0x0112] = 6
    before = image.tobytes()
    picture = open_image(image, LIMITS)
    assert picture.size == (6, 4) and image.size == (6, 4) and image.tobytes() == before and image.getexif()[0x0112] == 6
    plain = corners()
    open_image(plain, LIMITS).rgb.putpixel((0, 0), BLUE)
    assert plain.tobytes() == before


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_ignored(orientation: int) -> None:
    exif = pil.Exif()
    exif[0x0112] = orientation
    same(open_image(saved(corners(), exif=exif), LIMITS).rgb, corners())


def test_broken_exif_does_not_spoil_the_pixels() -> None:
    picture = open_image(saved(corners(), exif=b"Exif\0\0garbage that is no TIFF header"), LIMITS)
    same(picture.rgb, corners())
    assert "EXIF data is broken" in picture.notes[0]


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_used(form: str) -> None:
    frames = [pil.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if form == "WEBP" else {}
    picture = open_image(saved(frames[0], form, save_all=True, append_images=frames[1:], **options), LIMITS)
    assert pixel(picture) == RED
    assert picture.notes == ("the first of several frames or pages is used",)


def test_a_pil_animation_gives_the_frame_it_stands_at() -> None:
    frames = [pil.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    given = pil.open(io.BytesIO(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    given.seek(1)
    picture = open_image(given, LIMITS)
    assert pixel(picture) == GREEN and given.tell() == 1
    assert picture.notes == ("frame 1 of an animation is used",)


def test_a_pillow_without_a_format_still_reads_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pil.init()
    monkeypatch.delitem(pil.OPEN, "AVIF")
    _formats.cache_clear()
    try:
        assert open_image(saved(corners(), "JPEG2000"), LIMITS).size == (4, 6)
        with pytest.raises(MediaDecodeError, match=r"known format.*JPEG, PNG"):
            open_image(b"words", LIMITS)
    finally:
        _formats.cache_clear()


def test_one_pixel_and_long_strips_decode() -> None:
    assert open_image(saved(pil.new("RGB", (1, 1), BLUE)), LIMITS).size == (1, 1)
    assert open_image(saved(pil.new("RGB", (5000, 1))), LIMITS).size == (1, 5000)


ARRAYS = [  # (array, words of the message)
    (np.zeros((4, 4), np.float32), ("float32", "255")),
    (np.zeros((4, 4, 3), bool), ("bool", "255")),
    (np.zeros((4, 4, 3), np.uint16), ("uint16", "257")),
    (np.zeros((4, 4, 3), np.int64), ("int64", "uint8")),
    (np.zeros((3, 4, 5), np.uint8), ("transpose(1, 2, 0)",)),
    (np.zeros((4, 4, 1), np.uint8), ("[:, :, 0]",)),
    (np.zeros((4, 4, 2), np.uint8), ("width, 3]",)),
    (np.zeros((2, 4, 4, 3), np.uint8), ("Video(",)),
    (np.zeros(4, np.uint8), ("[height, width]",)),
    (np.zeros((0, 4, 3), np.uint8), ("one pixel",)),
]


@pytest.mark.parametrize(("array", "words"), ARRAYS)
def test_arrays_of_another_form_say_what_to_change(array: np.ndarray, words: tuple[str, ...]) -> None:
    with pytest.raises(MediaUnsupported) as caught:
        from_array(array)
    for word in (str(array.shape), *words):
        assert word in str(caught.value)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(pil.new("L", (300, 200)))
    assert open_image(data, FetchLimits(pixels=60_000)).size == (200, 300)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(MediaTooLarge, match="300x200"):
        open_image(data, FetchLimits(pixels=59_999))


def test_decompression_bombs_of_both_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(pil.new("1", (400, 400)))
    for most in (100_000, 50_000):  # Pillow warns above its limit, raises above twice that
        monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(MediaTooLarge, match="too large"):
            open_image(data, LIMITS)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_truncated_files_are_broken_at_every_length(form: str) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (40, 50, 3), np.uint8)
    data = saved(pil.fromarray(noise), form)
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(MediaDecodeError):
            decode(data[: max(1, int(len(data) * share))], LIMITS)


def test_random_damage_is_a_typed_error_or_a_picture() -> None:
    rng = np.random.default_rng(5)
    for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        data = saved(corners((64, 48)), form)
        for _ in range(40):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 6):
                broken[at] = rng.integers(256)
            with contextlib.suppress(MediaDecodeError, MediaUnsupported, MediaTooLarge):
                assert decode(bytes(broken), LIMITS).rgb.mode == "RGB"
