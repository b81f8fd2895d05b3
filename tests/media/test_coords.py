"""The one converter of coordinates: there and back, with every border, and against pictures whose pixels say where they are."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pil

from mirada.errors import SettingsError
from mirada.media.coords import View, box_of
from mirada.media.prepare import prepare
from mirada.media.rule import KEYE_PREVIEW, KIMI, QWEN2_VL
from mirada.types import Image, Video

sides = st.integers(1, 3000)
numbers = st.floats(0, 1)
CROP = replace(KIMI, grid=replace(KIMI.grid, border="crop"))


def picture(width, height, spot=None, size=12):
    """White, with a black square around ``spot``."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    if spot is not None:
        x, y = spot
        pixels[max(0, y - size) : y + size, max(0, x - size) : x + size] = 0
    return pil.fromarray(pixels)


@given(sides, sides, sides, sides, st.integers(-40, 40), st.sampled_from(["thousand", "unit", "pixels"]), numbers, numbers)
def test_there_and_back(height, width, high, wide, border, scale, x, y):
    canvas = max(1, high + border), max(1, wide - border)
    view = View("image", (height, width), (high, wide), canvas)
    point = x * width, y * height
    back = view.to_original(view.from_original(point, scale), scale)
    assert back == pytest.approx(point, rel=1e-6, abs=1e-6 * max(width, height))


def test_a_picture_that_was_only_resized_is_a_matter_of_its_own_sides():
    view = View("image", (600, 900), (308, 448), (308, 448))
    assert view.to_original((0, 0), "thousand") == (0, 0) and view.to_original((1000, 1000), "thousand") == (900, 600)
    assert view.to_original((500, 250), "thousand") == (450, 150) == view.to_original((0.5, 0.25), "unit")
    assert view.to_original((224, 77), "pixels") == (450, 150)


def test_nothing_lies_outside():
    view = View("image", (60, 90), (56, 84), (56, 84))
    assert view.to_original((-20, 1500), "thousand") == (0, 60) and view.to_original((2, -1), "unit") == (90, 0)


def test_an_unknown_scale_is_named():
    with pytest.raises(SettingsError, match="'percent'"):
        View("image", (60, 90), (56, 84), (56, 84)).to_original((1, 1), "percent")  # type: ignore[arg-type]


def centre(patches, rule):
    """Where the dark pixels of prepared patches lie on their canvas: (x, y)."""
    _, rows, columns = patches.grids[0]
    side, grid = rule.grid.patch, rule.grid
    pixels = patches.pixels[:, :, 0] if patches.pixels.ndim == 5 else patches.pixels
    square = grid.merge if grid.merged_order else 1
    order = np.arange(rows * columns).reshape(rows // square, columns // square, square, square).transpose(0, 2, 1, 3)
    whole = pixels[order.reshape(rows, columns)].transpose(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    ys, xs = np.nonzero(whole[..., 0] < 100)
    return float(xs.mean()) + 0.5, float(ys.mean()) + 0.5


CASES = [(rule, size) for rule in (QWEN2_VL, KEYE_PREVIEW) for size in ((420, 300), (301, 517), (2000, 1100))]


@pytest.mark.parametrize(("rule", "size"), [*CASES, (CROP, (425, 290)), (CROP, (281, 572))], ids=range(len(CASES) + 2))
def test_what_is_dark_on_the_canvas_is_dark_in_the_original(rule, size):
    width, height = size
    spot = round(0.7 * width), round(0.4 * height)
    patches = prepare(Image(picture(width, height, spot, 20)), rule)
    view = View.of(patches, rule.grid.patch)
    assert view.size == (height, width)
    assert view.to_original(centre(patches, rule), "pixels") == pytest.approx(spot, abs=3)


def test_a_border_of_black_moves_nothing():
    spot = 210, 120
    patches = prepare(Image(picture(301, 200, spot, 20)), KIMI)
    view = View.of(patches, 14)
    assert (view.resized, view.canvas) == ((200, 301), (224, 308))
    inside = prepare(Image(picture(308, 224, spot, 20)), KIMI)  # the same spot where there is no border
    assert view.to_original(centre(inside, KIMI), "pixels") == pytest.approx(spot, abs=1)
    assert view.to_original((0.5, 0.5), "unit") == (150.5, 100)  # fractions are of the picture, not of its border


@pytest.mark.parametrize("turn", range(1, 9))
def test_places_are_of_the_upright_picture(turn):
    """A phone's picture says in EXIF how to hold it; the spot is looked for where a viewer shows it."""
    out = io.BytesIO()
    exif = pil.Exif()
    exif[0x0112] = turn
    picture(420, 300, (60, 40), 20).save(out, "PNG", exif=exif)
    patches = prepare(Image(out.getvalue()), QWEN2_VL)
    view = View.of(patches, 14)
    upright = {1: (60, 40), 2: (360, 40), 3: (360, 260), 4: (60, 260), 5: (40, 60), 6: (260, 60), 7: (260, 360), 8: (40, 360)}
    assert view.size == ((420, 300) if turn >= 5 else (300, 420))
    assert view.to_original(centre(patches, QWEN2_VL), "pixels") == pytest.approx(upright[turn], abs=3)


def test_frames_of_a_video_are_of_its_size():
    frames = [picture(420, 300, (200, 100), 20)] * 4
    view = View.of(prepare(Video(frames, max_pixels=28 * 28 * 40), QWEN2_VL), 14)
    assert view.canvas != view.size
    assert view.kind == "video" and view.size == (300, 420) and view.to_original((500, 500), "thousand") == (210, 150)


def test_a_box_is_around_its_corners():
    assert box_of([(30.0, 5.0), (10.0, 40.0)]) == ((10, 5), (30, 40))
