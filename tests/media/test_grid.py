"""The resize arithmetic against tables of the references, and as properties."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirada.errors import MediaUnsupported
from mirada.media.grid import GridRule, content_key, denormalise, fit, normalise, patchify
from mirada.media.rule import QWEN2_VL

TABLES = json.loads((Path(__file__).parents[1] / "golden/keye_vl/resize_and_sampling_tables.json").read_text())
# Height, width, least and largest area -> size of qwen-vl-utils 0.0.8 (which makes 0 of the last two's short side).
QWEN = [
    (37, 53, 3136, 12845056, [56, 84]),
    (14, 300, 3136, 12845056, [28, 308]),
    (10, 1000, 3136, 12845056, [28, 1008]),
    (42, 70, 3136, 12845056, [56, 56]),
    (98, 126, 3136, 12845056, [112, 112]),
    (1080, 1920, 3136, 12845056, [1092, 1932]),
    (4000, 6000, 3136, 12845056, [2912, 4368]),
    (1080, 1920, 200704, 1003520, [728, 1316]),
    (20, 20, 200704, 1003520, [448, 448]),
    (28, 5600, 3136, 12845056, [28, 5600]),
    (5, 5, 3136, 12845056, [56, 56]),
    (13, 400, 3136, 12845056, [28, 392]),
    (1, 150, 3136, 12845056, [28, 140]),
    (3000, 31, 3136, 100352, [2996, 28]),
    (4000, 21, 3136, 100352, [4368, 28]),
    (12000, 61, 3136, 12544, [1568, 28]),
]


def sized(height: int, width: int, low: float, high: float, enlarge: bool) -> list[int] | str:
    try:
        return list(fit(height, width, factor=28, min_pixels=low, max_pixels=high, enlarge=enlarge))
    except MediaUnsupported:
        return "ValueError"


@pytest.mark.parametrize(
    ("table", "enlarge"),
    [("smart_resize_processor", True), ("smart_resize_utils_1.0.0", False), ("smart_resize_utils_1.5.2", False)],
)
def test_fit_equals_the_reference_tables(table: str, enlarge: bool) -> None:
    rows = TABLES[table]
    assert len(rows) >= 19
    assert [sized(h, w, low, high, enlarge) for h, w, low, high, _ in rows] == [row[4] for row in rows]


def test_fit_equals_the_budgets_of_video_frames() -> None:
    for _, h, w, high, size in TABLES["video_budget_1.0.0"]:
        assert sized(h, w, 128 * 784, high, enlarge=False) == size


def test_fit_equals_the_qwen_table() -> None:
    assert [sized(h, w, low, high, enlarge=False) for h, w, low, high, _ in QWEN] == [row[4] for row in QWEN]


@pytest.mark.parametrize(
    ("height", "width", "word"), [(1, 5000, "5000"), (20000, 28, "20000"), (0, 5, "empty"), (5, 0, "empty")]
)
def test_fit_refuses_what_has_no_sensible_size(height: int, width: int, word: str) -> None:
    with pytest.raises(MediaUnsupported, match=word):
        fit(height, width, factor=28, min_pixels=3136, max_pixels=10**6, enlarge=False)


sides = st.integers(1, 9000)
factors = st.sampled_from([14, 28, 32])


@given(sides, sides, factors, st.integers(1, 400), st.integers(400, 40000), st.booleans())
def test_fit_gives_multiples_within_the_bounds(h: int, w: int, factor: int, low: int, high: int, enlarge: bool) -> None:
    low, high = low * factor**2, high * factor**2
    try:
        high_side, wide = fit(h, w, factor=factor, min_pixels=low, max_pixels=high, enlarge=enlarge)
    except MediaUnsupported:
        ratio = max(h, w) / min(h, w)
        assert ratio > 200 or (enlarge and min(h, w) < factor)  # rounding of the enlarged side may tip it over
        return
    assert high_side % factor == 0 and wide % factor == 0 and high_side >= factor and wide >= factor
    area = high_side * wide
    if enlarge and min(h, w) < factor:
        h, w = (factor, round(w * factor / h)) if h < factor else (h, w)
        h, w = (round(h * factor / w), factor) if w < factor else (h, w)
    nearest = max(factor, round(h / factor) * factor) * max(factor, round(w / factor) * factor)
    if nearest > high:
        assert area <= high or min(high_side, wide) == factor  # a strip of one cell has no shorter side to give
    elif nearest < low:
        assert area >= low
    else:
        assert area == nearest
    assert (high_side >= wide) == (h >= w) or abs(high_side - wide) <= factor  # orientation is kept


@given(st.integers(28, 4000), st.integers(28, 4000), st.integers(4, 4000), st.integers(4, 4000))
def test_fit_does_not_shrink_when_the_bound_grows(h: int, w: int, one: int, other: int) -> None:
    small, large = sorted((one, other))
    if max(h, w) / min(h, w) > 200:
        return
    areas = [math.prod(fit(h, w, factor=28, min_pixels=784, max_pixels=bound * 784)) for bound in (small, large)]
    assert areas[0] <= areas[1]


@given(st.integers(1, 60), st.integers(1, 60))
def test_fit_leaves_what_fits_already(rows: int, columns: int) -> None:
    if max(rows, columns) > 200 * min(rows, columns):
        return
    size = rows * 28, columns * 28
    assert fit(*size, factor=28, min_pixels=784, max_pixels=3600 * 784) == size


def test_patchify_is_row_major_over_frames_rows_columns() -> None:
    frames = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    patches = patchify(frames, 2)
    assert patches.shape == (2 * 2 * 3, 3, 2, 2)
    for t in range(2):
        for y in range(2):
            for x in range(3):
                cut = frames[t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].transpose(2, 0, 1)
                np.testing.assert_array_equal(patches[t * 6 + y * 3 + x], cut)


def test_normalise_rounds_as_the_reference() -> None:
    rule = GridRule(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    pixels = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1), (256, 3, 1, 1))
    made = normalise(pixels, rule)
    assert made.dtype == np.float32
    for value in (0, 1, 127, 128, 255):
        scaled = np.float32(value * (1 / 255))
        expected = [(scaled - np.float32(m)) / np.float32(s) for m, s in zip(rule.mean, rule.std, strict=True)]
        assert made[value, :, 0, 0].tolist() == [float(x) for x in expected]


def test_content_key_depends_on_pixels_shape_and_facts() -> None:
    pixels = np.arange(64, dtype=np.uint8)
    changed = pixels.copy()
    changed[63] ^= 1
    keys = {
        content_key(pixels, (1, 2, 2)),
        content_key(changed, (1, 2, 2)),
        content_key(pixels.reshape(8, 8), (1, 2, 2)),
        content_key(pixels, (1, 1, 4)),
    }
    assert len(keys) == 4 and all(len(key) == 32 for key in keys)
    assert content_key(pixels, (1, 2, 2)) == content_key(pixels.copy(), (1, 2, 2))


@pytest.mark.parametrize("rule", [GridRule(), QWEN2_VL.grid], ids=["halves", "clip"])
def test_every_byte_comes_back_from_its_value(rule):
    frames = (rule.frames,) if rule.frames > 1 else ()
    pixels = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(256, *[1] * (3 + len(frames))), (256, 3, *frames, 2, 2))
    values = normalise(pixels, rule)
    assert np.array_equal(denormalise(values, rule), pixels)
    assert np.array_equal(denormalise(values + np.float32(9e-5), rule), pixels)
    for wrong in (values + np.float32(2e-4), values * np.float32(np.nan), values - 5, values + np.float32(np.inf)):
        with pytest.raises(MediaUnsupported, match="8 bits"):
            denormalise(wrong, rule)
