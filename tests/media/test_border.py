"""Rules that keep a picture's size and fill up or cut its border (Kimi-VL)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mirada.errors import MediaTooLarge, MediaUnsupported
from mirada.media.grid import GridRule
from mirada.media.prepare import prepare, prepare_many
from mirada.media.rule import KIMI
from mirada.types import Image, Video

SMALL = KIMI.bounded(max_pixels=64 * 196)
SIDES = st.integers(1, 3000)


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8)


def whole(made) -> np.ndarray:
    """Patches laid out again: uint8 [H, W, 3]."""
    ((_, h, w),) = made.grids
    return made.pixels.reshape(h, w, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(h * 14, w * 14, 3)


@given(height=SIDES, width=SIDES, limit=st.integers(4, 16384))
def test_sizes(height: int, width: int, limit: int) -> None:
    rule = replace(KIMI.grid, max_pixels=limit * 196)
    high, wide = rule.shrink(height, width)
    count = (width // 14) * (height // 14)
    if count <= limit:
        assert (high, wide) == (height, width)
    else:  # as many pixels as that many patches take, if each held as many as here
        assert high * wide <= height * width * limit / count
        assert (high + 1) * (wide + 1) > height * width * limit / count
    tall, broad = rule.fit(height, width)
    assert tall % 28 == broad % 28 == 0
    assert 0 <= tall - high < 28 and 0 <= broad - wide < 28


def test_what_fits_is_kept_pixel_for_pixel_and_filled_up_with_black() -> None:
    picture = drawn(45, 77)
    made = prepare(Image(picture), KIMI)
    assert made.grids == ((1, 4, 6),) and made.size == (45, 77) and made.notes == ()
    laid = whole(made)
    assert np.array_equal(laid[:45, :77], picture)
    assert not laid[45:].any() and not laid[:, 77:].any()


def test_a_border_that_is_cut_is_cut_around_the_centre() -> None:
    rule = replace(KIMI, grid=replace(KIMI.grid, border="crop"))
    picture = drawn(61, 87)
    made = prepare(Image(picture), rule)
    assert made.grids == ((1, 4, 6),)
    assert np.array_equal(whole(made), picture[2:58, 2:86])  # 5 rows and 3 columns go: 2 (half to even) above, 2 on the left
    for height in (13, 45):
        with pytest.raises(MediaUnsupported, match=f"side of {height} pixels"):
            prepare(Image(drawn(height, 87)), rule)


def test_least_pictures_and_longest_strips() -> None:
    assert prepare(Image(drawn(1, 1)), KIMI).grids == ((1, 2, 2),)
    assert prepare(Image(drawn(1, 7140)), KIMI).grids == ((1, 2, 510),)
    for height, width in ((1, 7141), (7168, 1)):
        with pytest.raises(MediaUnsupported, match=f"{width}x{height} pixels has more than 511 patches"):
            prepare(Image(drawn(height, width)), KIMI)
    with pytest.raises(MediaUnsupported, match="more than 511"):
        KIMI.grid.fit(14, 14 * 10**6)
    with pytest.raises(MediaUnsupported, match="empty"):
        KIMI.grid.fit(0, 5)


def test_settings_of_one_picture() -> None:
    picture = drawn(280, 420)
    assert prepare(Image(picture), KIMI).grids == ((1, 20, 30),)
    lower = prepare(Image(picture, max_pixels=150 * 196), KIMI)
    assert lower.grids == ((1, 10, 16),)  # 140x210, filled up to 140x224
    assert lower.notes == ("224x140 exceeds max_pixels=29400: sides are filled up to multiples of 28",)
    assert prepare(Image(picture, max_pixels=170 * 196), KIMI).grids == ((1, 12, 16),)
    larger = prepare(Image(drawn(28, 42), min_pixels=112 * 168), KIMI)
    assert larger.grids == ((1, 8, 12),)
    exact = prepare(Image(picture, resized_height=56, resized_width=84), KIMI)
    assert exact.grids == ((1, 4, 6),) and exact.notes == ()


def test_a_budget_over_all_pictures() -> None:
    pictures = [Image(drawn(280, 420, i)) for i in range(3)] + [Image(drawn(28, 28))]
    made = prepare_many(pictures, KIMI, total_pixels=3 * 168 * 252 + 784)
    areas = [len(one.pixels) * 196 for one in made]
    assert sum(areas) <= 3 * 168 * 252 + 784 and areas[3] == 784 and areas[0] < 280 * 420
    assert all("shrunk" in one.notes[-1] for one in made[:3]) and made[3].notes == ()
    with pytest.raises(MediaTooLarge, match="at least 3,136 pixels"):
        prepare_many(pictures, KIMI, total_pixels=3000)


def test_a_video_is_refused_before_it_is_fetched() -> None:
    for source in ("/nowhere.mp4", [drawn(28, 28)] * 4):
        with pytest.raises(MediaUnsupported, match="no videos") as caught:
            prepare(Video(source), KIMI)
        assert "Image(frame)" in caught.value.fix
    with pytest.raises(MediaUnsupported, match="picture or video 2 of 2: this model takes pictures"):
        prepare_many([Image(drawn(28, 28)), Video("/nowhere.mp4")], KIMI)


def test_the_key_tells_borders_apart() -> None:
    picture = drawn(56, 84)
    crop = replace(KIMI, grid=replace(KIMI.grid, border="crop"))
    assert whole(prepare(Image(picture), KIMI)).tobytes() == whole(prepare(Image(picture), crop)).tobytes()
    assert prepare(Image(picture), KIMI).key != prepare(Image(picture), crop).key


def test_a_large_picture_keeps_its_ratio() -> None:
    made = prepare(Image(drawn(400, 600)), SMALL)
    ((_, h, w),) = made.grids
    assert SMALL.grid.shrink(400, 600) == (93, 139) and (h, w) == (8, 10)
    assert whole(made)[92, 138].any() and not whole(made)[93:].any() and not whole(made)[:, 139:].any()


def test_other_rules_are_as_they_were() -> None:
    assert GridRule().border == "stretch" and GridRule().fit(45, 77) == (56, 84)
