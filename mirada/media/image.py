"""From bytes, a PIL image or an array to one upright RGB picture. The only place that decodes pictures.

ICC profiles are ignored, as the references do. Files with several frames give their first, PIL images the one they stand at.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image as pil
from PIL import UnidentifiedImageError, features

from mirada.errors import MediaDecodeError, MediaError, MediaTooLarge, MediaUnsupported
from mirada.media.fetch import fetch
from mirada.media.limits import FetchLimits, show
from mirada.media.rule import Alpha, MediaRule

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000")
"""What is decoded. The rest of Pillow's plug-ins stay shut: some run other programs, many are seldom tested."""

_RESAMPLE = {"bicubic": pil.Resampling.BICUBIC, "bilinear": pil.Resampling.BILINEAR}
_TURN = {  # EXIF tag 0x0112 -> what makes the picture upright
    2: pil.Transpose.FLIP_LEFT_RIGHT,
    3: pil.Transpose.ROTATE_180,
    4: pil.Transpose.FLIP_TOP_BOTTOM,
    5: pil.Transpose.TRANSPOSE,
    6: pil.Transpose.ROTATE_270,
    7: pil.Transpose.TRANSVERSE,
    8: pil.Transpose.ROTATE_90,
}
_NAMES = (  # (offset, magic, name, what to do) of files that are no picture we read
    (0, b"%PDF", "PDF", "render a page to PNG"),
    (0, b"%!PS", "PostScript", "render it to PNG"),
    (0, b"8BPS", "Photoshop", "export it as PNG"),
    (0, b"\xff\x0a", "JPEG XL", "convert it to PNG or JPEG"),
    (4, b"JXL ", "JPEG XL", "convert it to PNG or JPEG"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska or WebM video", "pass it as Video(...)"),
    (8, b"AVI ", "AVI video", "pass it as Video(...)"),
    (0, b"PK\x03\x04", "zip archive", "extract the picture from it"),
    (0, b"\x1f\x8b", "gzip archive", "extract the picture from it"),
)
_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    b"crx ": "Canon raw",
}


@dataclass(frozen=True, slots=True)
class Picture:
    """An upright RGB picture; ``notes`` say what was done to get there."""

    rgb: pil.Image
    name: str
    """How messages call it."""
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.rgb.height, self.rgb.width


def open_image(source: Any, limits: FetchLimits, alpha: Alpha = "white") -> Picture:
    """The picture behind any source that ``types.Image`` allows. Raises a MediaError."""
    name = show(source)
    if isinstance(source, pil.Image):
        return from_pil(source, limits, alpha, f"the PIL image ({source.mode}, {source.width}x{source.height})")
    if isinstance(source, np.ndarray):
        return from_pil(from_array(source), limits, alpha, f"the array {source.shape}")
    return decode(fetch(source, limits), limits, alpha, name)


def decode(data: bytes, limits: FetchLimits, alpha: Alpha = "white", name: str = "the picture") -> Picture:
    """The picture in a file's bytes. Its header is judged before any pixel is decoded."""
    try:
        with pil.open(io.BytesIO(data), formats=_formats()) as image:
            return from_pil(image, limits, alpha, name)
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:
        raise _too_many_pixels(name, str(error), limits) from error
    except UnidentifiedImageError as error:
        raise _unknown_format(data, name) from error
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise MediaDecodeError(f"{name} is broken ({_say(error)})", "open and save it again, or fetch it again") from error


def header_size(data: bytes) -> tuple[int, int] | None:
    """(height, width), not yet upright, by the header of a file's bytes, read without decoding; None where it does not say
    (``decode`` will)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size decode warns
            with pil.open(io.BytesIO(data), formats=_formats()) as image:
                return image.height, image.width
    except Exception:
        return None


def header_pixels(data: bytes) -> int:
    """Width times height by ``header_size``; 0 where it does not say."""
    high, wide = header_size(data) or (0, 0)
    return high * wide


@cache
def _formats() -> tuple[str, ...]:
    pil.init()  # 20 ms, once
    return tuple(form for form in FORMATS if form in pil.OPEN)  # Pillow before 11.3 has no AVIF, and raises for its name


def from_pil(image: pil.Image, limits: FetchLimits, alpha: Alpha = "white", name: str = "the PIL image") -> Picture:
    """Upright RGB from a PIL image of any mode; ``image`` itself is not changed (but read, if it was not yet)."""
    if image.width < 1 or image.height < 1:
        raise MediaUnsupported(f"{name} is {image.width}x{image.height} pixels", "give one with at least one pixel a side")
    if image.width * image.height > limits.pixels:
        raise _too_many_pixels(name, f"{image.width}x{image.height} pixels", limits)
    notes: list[str] = []
    try:
        image.load()
        turn = _orientation(image, notes)
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # as in decode: truncated files surface here
        file = getattr(image, "fp", image)
        if file is None or getattr(file, "closed", False):  # Pillow reads pixels when they are asked for
            raise MediaDecodeError(
                f"the file of {name} was closed before it was read", "call image.load() inside the with block, or give the path"
            ) from error
        raise MediaDecodeError(f"{name} is broken ({_say(error)})", "open and save it again, or fetch it again") from error
    if image.format != "MPO" and getattr(image, "is_animated", False):
        frame = image.tell()  # of a PIL image given, the one that the caller went to
        notes.append(f"frame {frame} of an animation is used" if frame else "the first of several frames or pages is used")
    rgb = _rgb(image, alpha, name, notes)
    if turn is not None:
        rgb = rgb.transpose(turn)
    return Picture(rgb, name, tuple(notes))


def resize(image: pil.Image, height: int, width: int, rule: MediaRule) -> pil.Image:
    """``image`` (8 bits a channel) in another size, with the filter and the order of passes that ``rule`` says."""
    if rule.width_first:
        image = image.resize((width, image.height), _RESAMPLE[rule.resample])
    return image.resize((width, height), _RESAMPLE[rule.resample])


def from_array(array: np.ndarray) -> pil.Image:
    """A PIL image of a uint8 array [H, W], [H, W, 3] or [H, W, 4]; any other is MediaUnsupported, with what to change."""
    name = f"an array of shape {array.shape} and type {array.dtype}"
    if array.ndim == 4:
        fix = "give one picture at a time, or Video(list of arrays)"
    elif array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] > 4:
        fix = "channels come last: use array.transpose(1, 2, 0)"
    elif array.ndim == 3 and array.shape[2] == 1:
        fix = "drop the last axis: use array[:, :, 0]"
    elif array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        fix = "give [height, width], [height, width, 3] or [height, width, 4]"
    elif array.dtype != np.uint8:
        fix = _to_uint8(array.dtype)
    elif 0 in array.shape:
        fix = "give at least one pixel a side"
    else:
        return pil.fromarray(np.ascontiguousarray(array))
    raise MediaUnsupported(f"{name} is not a picture", fix)


def _to_uint8(dtype: np.dtype) -> str:
    if dtype.kind == "f":
        return "values 0..1: use (array * 255).round().astype(numpy.uint8); values 0..255: round and cast to numpy.uint8"
    if dtype == np.bool_:
        return "use array.astype(numpy.uint8) * 255"
    if dtype == np.uint16:
        return "use (array // 257).astype(numpy.uint8)"
    return "scale to 0..255 and cast to numpy.uint8"


def _orientation(image: pil.Image, notes: list[str]) -> pil.Transpose | None:
    # Only now that the file is loaded: PNG may hold EXIF after the pixels, and Pillow turns TIFF by itself while it loads.
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception as error:  # broken EXIF is common and says nothing about the pixels
        notes.append(f"the EXIF data is broken ({_say(error)}), so no rotation was applied")
        return None
    if isinstance(value, tuple):
        value = value[0] if value else 1
    turn = _TURN.get(value) if isinstance(value, int) else None
    if turn is not None:
        notes.append(f"turned upright (EXIF orientation {value})")
    return turn


def _rgb(image: pil.Image, alpha: Alpha, name: str, notes: list[str]) -> pil.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        notes.append("16-bit grey values were scaled to 8 bits")
        return _from_16_bit(image, alpha)
    if image.mode in ("I", "F", "LAB"):
        raise MediaUnsupported(
            f"{name} has the pixel mode {image.mode}, whose range is not known", "convert it to 8-bit RGB or grey"
        )
    if image.mode == "CMYK":
        notes.append("CMYK was converted to RGB without its colour profile")
    if not image.has_transparency_data:
        return image.convert("RGB")  # a copy also of what is RGB
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if alpha == "drop" or (alpha == "white_rgba" and image.mode != "RGBA"):
        notes.append("transparency was dropped")
        return rgba.convert("RGB")
    white = pil.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    if rgba.getchannel("A").histogram()[255] < rgba.width * rgba.height:
        notes.append("transparent parts were laid on white")
    return white


def _from_16_bit(image: pil.Image, alpha: Alpha) -> pil.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    clear = image.info.get("transparency")
    if alpha != "drop" and isinstance(clear, int):
        grey[values == clear] = 255
    return pil.fromarray(grey).convert("RGB")


def _too_many_pixels(name: str, what: str, limits: FetchLimits) -> MediaTooLarge:
    fix = "shrink it, or raise FetchLimits.pixels (and PIL.Image.MAX_IMAGE_PIXELS)"
    return MediaTooLarge(f"{name} is too large ({what}; the limit is {limits.pixels:,} pixels)", fix)


def _unknown_format(data: bytes, name: str) -> MediaError:
    if data[4:8] == b"ftyp":
        kind = _BRANDS.get(data[8:12], "MP4 or QuickTime video")
        if kind == "AVIF" and features.check("avif"):
            return MediaDecodeError(f"{name} is a broken AVIF file", "open and save it again, or fetch it again")
        fix = "pass it as Video(...)" if "video" in kind else "convert it to JPEG or PNG"
        return MediaUnsupported(f"{name} is in the format {kind}, which is not read as a picture", fix)
    for offset, magic, kind, fix in _NAMES:
        if data[offset : offset + len(magic)] == magic:
            return MediaUnsupported(f"{name} is in the format {kind}, which is not read as a picture", fix)
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        return MediaUnsupported(f"{name} is in the format SVG, which is not read as a picture", "render it to PNG")
    if start.startswith((b"<!doctype html", b"<html")):
        return MediaUnsupported(f"{name} is a web page (HTML), not a picture", "give the address of the picture itself")
    return MediaDecodeError(f"{name} is not a picture in a known format", f"give {', '.join(FORMATS)}")


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200] if str(error) else type(error).__name__
