"""The front door: checksums of the references, settings of one picture, a budget over many, the cache."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pil

from mirada.errors import MediaNotFound, MediaTooLarge, MediaUnsupported, SettingsError
from mirada.media.cache import PixelCache, source_key
from mirada.media.grid import GridRule, Patches, normalise
from mirada.media.limits import FetchLimits
from mirada.media.prepare import prepare, prepare_many, resize_first
from mirada.media.rule import KEYE_15, KEYE_PREVIEW, MediaRule, Stage
from mirada.types import Image, Text

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/keye_vl/image_processor.json").read_text())
ONE_STAGE = replace(KEYE_PREVIEW, first=None)
PICTURES = pytest.mark.parametrize("row", GOLDEN["images"], ids=lambda row: f"{row['h']}x{row['w']}")


def synth(height: int, width: int, k: int) -> np.ndarray:
    """The synthetic picture that the golden file names by (height, width, k)."""
    y, x, c = (axis.astype(np.int64) for axis in np.ogrid[:height, :width, :3])
    values = 7 * y + 13 * x + 61 * c + 29 * k + (x * y) // 5 + 80 * ((x // 9 + y // 7) % 2)
    return (values % 256).astype(np.uint8)


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    pil.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def check(patches: list[Patches], golden: dict, rule: MediaRule) -> None:
    assert [list(grid) for made in patches for grid in made.grids] == golden["grid_thw"]
    values = np.concatenate([normalise(made.pixels, rule.grid) for made in patches])
    assert list(values.shape) == golden["shape"]
    assert sha(values) == golden["sha256_float32"]


@PICTURES
def test_the_synthetic_pictures_are_the_ones_meant(row: dict) -> None:
    assert sha(synth(row["h"], row["w"], row["k"])) == row["input_sha256"]


@PICTURES
def test_processor_stage_equals_the_reference(row: dict) -> None:
    image = Image(synth(row["h"], row["w"], row["k"]))
    check([prepare(image, ONE_STAGE)], row["processor"], ONE_STAGE)
    other = ONE_STAGE.bounded(min_pixels=102400)
    check([prepare(image, other)], row["processor_min_pixels_102400"], other)


@PICTURES
def test_both_stages_equal_the_reference(row: dict) -> None:
    source = png(synth(row["h"], row["w"], row["k"]))
    made = prepare(Image(source), KEYE_PREVIEW)
    check([made], row["fetch_then_processor"], KEYE_PREVIEW)
    assert made.size == (row["h"], row["w"]) and made.kind == "image" and made.notes == ()
    first = resize_first(Image(source), KEYE_PREVIEW)
    assert list(first.size) == row["fetch_image_1.0.0_size_wh"] and sha(np.asarray(first)) == row["fetch_image_1.0.0_sha256"]
    assert list(resize_first(Image(source), KEYE_15).size) == row["fetch_image_1.5.2_size_wh"]


def test_two_images_equal_the_reference() -> None:
    golden = GOLDEN["two_images"]
    made = prepare_many([Image(synth(*size)) for size in golden["sizes"]], ONE_STAGE)
    check(made, golden, ONE_STAGE)


def test_frames_through_the_processor_equal_the_reference() -> None:
    golden = GOLDEN["video_frames_processor"]
    made = prepare_many([Image(synth(112, 140, 20 + t)) for t in range(5)], ONE_STAGE)
    values = np.concatenate([normalise(one.pixels, ONE_STAGE.grid) for one in made])
    assert sha(values) == golden["sha256_float32"] and made[0].grids == ((1, *golden["grid_thw"][0][1:]),)


def test_alpha_as_in_each_version_of_the_reference() -> None:
    golden = GOLDEN["rgba"]
    rgba = np.dstack([synth(60, 80, 3), synth(60, 80, 9)[..., 0]])
    for rule in (KEYE_PREVIEW, replace(KEYE_PREVIEW, alpha="white_rgba"), KEYE_15):  # white is the default of ours
        assert sha(np.asarray(resize_first(Image(rgba), rule))) == golden["fetch_1_0_0_sha256"]
    dropped = resize_first(Image(rgba), replace(KEYE_15, alpha="drop"))
    assert sha(np.asarray(dropped)) == golden["fetch_1_5_2_sha256"] and list(dropped.size) == golden["size_wh"]


def test_sources_of_one_picture_give_one_key(tmp_path: Path) -> None:
    array = synth(50, 70, 1)
    data = png(array)
    (tmp_path / "a.png").write_bytes(data)
    uri = "data:image;base64," + base64.b64encode(data).decode()
    made = [prepare(Image(s), KEYE_PREVIEW) for s in (array, data, uri, tmp_path / "a.png", pil.fromarray(array))]
    assert len({one.key for one in made}) == 1 and len(made[0].key) == 32
    assert all(one.size == (50, 70) for one in made)


def test_the_key_depends_on_pixels_grid_and_rule() -> None:
    array = np.zeros((56, 112, 3), np.uint8)
    dot = array.copy()
    dot[40, 40] = 1
    other_mean = replace(KEYE_PREVIEW, grid=replace(KEYE_PREVIEW.grid, mean=(0.4, 0.5, 0.5)))
    keys = [
        prepare(Image(array), KEYE_PREVIEW).key,
        prepare(Image(dot), KEYE_PREVIEW).key,
        prepare(Image(array.transpose(1, 0, 2)), KEYE_PREVIEW).key,
        prepare(Image(array), other_mean).key,
    ]
    assert len(set(keys)) == 4


# Settings of one picture

SIZES = [  # (settings, rule, size of the resized picture, word of the note or None); the picture is 600x800
    ({}, KEYE_PREVIEW, (588, 812), None),
    ({"max_pixels": 200_000}, KEYE_PREVIEW, (364, 504), None),
    ({"min_pixels": 900_000}, KEYE_PREVIEW, (840, 1120), None),
    ({"min_pixels": 2_000_000}, KEYE_PREVIEW, (840, 1148), "max_pixels of the model"),
    ({"max_pixels": 784}, KEYE_PREVIEW, (56, 56), "min_pixels"),
    ({"resized_height": 280, "resized_width": 560}, KEYE_PREVIEW, (280, 560), None),
    ({"resized_height": 100, "resized_width": 100}, KEYE_PREVIEW, (112, 112), "asked for 100x100, resized to 112x112"),
    ({"resized_height": 2800, "resized_width": 2800}, KEYE_PREVIEW, (980, 980), "multiples of 28"),
    ({"resized_height": 280, "resized_width": 560, "max_pixels": 784}, KEYE_PREVIEW, (280, 560), None),
    ({"max_pixels": 200_000}, ONE_STAGE, (364, 504), None),
    ({"min_pixels": 2_000_000}, ONE_STAGE, (1232, 1652), None),
    ({"resized_height": 300, "resized_width": 300}, ONE_STAGE, (308, 308), "300x300"),
    ({}, KEYE_PREVIEW.bounded(max_pixels=100_000), (252, 364), None),
    ({"max_pixels": 200_000}, KEYE_PREVIEW.bounded(max_pixels=100_000), (252, 364), "max_pixels of the model"),
]


@pytest.mark.parametrize(("settings", "rule", "size", "note"), SIZES)
def test_settings_of_one_picture(settings: dict, rule: MediaRule, size: tuple[int, int], note: str | None) -> None:
    made = prepare(Image(synth(600, 800, 2), **settings), rule)
    t, h, w = made.grids[0]
    assert (t, h * 14, w * 14) == (1, *size)
    assert made.pixels.shape == (h * w, 3, 14, 14) and made.pixels.dtype == np.uint8
    assert (not made.notes) if note is None else (len(made.notes) == 1 and note in made.notes[0])


BAD_SETTINGS = [
    ({"min_pixels": 0}, "min_pixels=0"),
    ({"max_pixels": -5}, "max_pixels=-5"),
    ({"max_pixels": 1e6}, "max_pixels=1000000.0"),
    ({"max_pixels": True}, "max_pixels=True"),
    ({"max_pixels": "big"}, "max_pixels='big'"),
    ({"max_pixels": 783}, "at least 784"),
    ({"min_pixels": 5000, "max_pixels": 4000}, "min_pixels=5000"),
    ({"resized_height": 280}, "resized_width"),
    ({"resized_height": 280, "resized_width": 0}, "resized_width=0"),
]


@pytest.mark.parametrize(("settings", "word"), BAD_SETTINGS)
def test_settings_that_contradict(settings: dict, word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        prepare(Image("never-opened.png", **settings), KEYE_PREVIEW)


def test_bounds_of_the_model_are_checked() -> None:
    assert KEYE_PREVIEW.bounded() == KEYE_PREVIEW
    with pytest.raises(SettingsError, match="min_pixels=2000000 is above max_pixels=1003520"):
        KEYE_PREVIEW.bounded(min_pixels=2_000_000)
    with pytest.raises(SettingsError, match="at least 784"):
        KEYE_PREVIEW.bounded(min_pixels=1, max_pixels=700)


def test_extreme_shapes() -> None:
    assert prepare(Image(np.zeros((1, 1, 3), np.uint8)), KEYE_PREVIEW).grids == ((1, 4, 4),)
    assert prepare(Image(np.zeros((1, 150), np.uint8)), KEYE_PREVIEW).grids == ((1, 2, 10),)
    for shape in ((1, 5000), (5000, 1)):
        with pytest.raises(MediaUnsupported, match=rf"the array \({shape[0]}, {shape[1]}\).*200 times"):
            prepare(Image(np.zeros(shape, np.uint8)), KEYE_PREVIEW)


def test_notes_say_what_was_done() -> None:
    exif = pil.Exif()
    exif[0x0112] = 8
    buffer = io.BytesIO()
    pil.new("RGBA", (80, 40), (0, 0, 0, 0)).save(buffer, "PNG", exif=exif)
    made = prepare(Image(buffer.getvalue(), min_pixels=10**7), KEYE_PREVIEW)
    assert made.size == (80, 40)
    assert ["upright" in made.notes[0], "white" in made.notes[1], "max_pixels" in made.notes[2], len(made.notes)] == [
        True
    ] * 3 + [3]
    assert (made.pixels == 255).all()


@pytest.mark.parametrize("part", [Text("a"), "a.png", None])
def test_parts_that_are_no_media(part) -> None:
    with pytest.raises(MediaUnsupported, match="Image"):
        prepare(part, KEYE_PREVIEW)


def test_the_rule_chooses_the_filter_and_the_order_of_passes() -> None:
    array = synth(60, 80, 3)
    size = {"resized_height": 56, "resized_width": 84}
    image = pil.fromarray(array)
    for rule, other in (
        (KEYE_PREVIEW, image.resize((84, 60)).resize((84, 56))),
        (replace(KEYE_PREVIEW, width_first=False), image.resize((84, 56))),
        (replace(KEYE_PREVIEW, resample="bilinear"), image.resize((84, 60), 2).resize((84, 56), 2)),
    ):
        np.testing.assert_array_equal(np.asarray(resize_first(Image(array, **size), rule)), np.asarray(other))


# Many pictures


def areas(made: list[Patches]) -> list[int]:
    return [len(one.pixels) * 196 for one in made]


def test_a_budget_takes_from_the_largest() -> None:
    shapes = [(560, 560), (56, 84), (1000, 900), (280, 280), (900, 1000)]
    parts = [Image(synth(h, w, i)) for i, (h, w) in enumerate(shapes)]
    free = prepare_many(parts, KEYE_PREVIEW)
    made = prepare_many(parts, KEYE_PREVIEW, total_pixels=900_000)
    assert sum(areas(made)) <= 900_000 and sum(areas(made)) > 800_000
    for i in (1, 3):
        assert made[i].key == free[i].key and made[i].notes == ()
    for i in (0, 2, 4):
        assert f"shrunk from {areas(free)[i]:,} to {areas(made)[i]:,}" in made[i].notes[-1]
    shrunk = [areas(made)[i] for i in (0, 2, 4)]
    assert max(shrunk) < 1.25 * min(shrunk)  # one common area, but for the steps of whole cells
    assert [one.size for one in made] == shapes


def test_a_budget_that_suffices_changes_nothing() -> None:
    parts = [Image(synth(100, 100, 1)), Image(synth(200, 100, 2))]
    free = prepare_many(parts, KEYE_PREVIEW)
    made = prepare_many(parts, KEYE_PREVIEW, total_pixels=sum(areas(free)))
    assert [one.key for one in made] == [one.key for one in free] and all(one.notes == () for one in made)
    assert sum(areas(prepare_many(parts, KEYE_PREVIEW, total_pixels=sum(areas(free)) - 1))) < sum(areas(free))


def test_a_budget_that_cannot_hold_them_says_what_is_needed() -> None:
    parts = [Image(synth(300, 300, i)) for i in range(3)]
    with pytest.raises(MediaTooLarge, match=r"3 pictures need at least 9,408 .*total_pixels=9,000"):
        prepare_many(parts, KEYE_PREVIEW, total_pixels=9000)
    assert areas(prepare_many(parts, KEYE_PREVIEW, total_pixels=9408)) == [3136] * 3


def test_a_budget_keeps_what_a_picture_asked_for_at_least() -> None:
    parts = [Image(synth(800, 800, 0), min_pixels=200_000), Image(synth(800, 800, 1))]
    made = prepare_many(parts, ONE_STAGE, total_pixels=300_000)
    assert areas(made) == [420**2, 336**2]  # 200,000 rounded down to whole cells; the other takes all the rest


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=5), st.integers(5, 120))
def test_no_budget_is_exceeded_and_nothing_is_dropped(shapes: list[tuple[int, int]], cells: int) -> None:
    parts = [Image(np.zeros(shape, np.uint8)) for shape in shapes if max(shape) <= 200 * min(shape)]
    try:
        made = prepare_many(parts, KEYE_PREVIEW, total_pixels=cells * 784)
    except MediaTooLarge:
        assert cells * 784 < sum(min(area, 784 * 210) for area in areas(prepare_many(parts, KEYE_PREVIEW)))
        return
    assert len(made) == len(parts) and sum(areas(made)) <= cells * 784


def test_errors_name_which_of_many() -> None:
    good = Image(synth(30, 30, 0))
    for total in (None, 10**6):
        with pytest.raises(MediaNotFound, match=r"picture or video 2 of 3: there is no file 'absent\.png'"):
            prepare_many([good, Image("absent.png"), good], KEYE_PREVIEW, total_pixels=total)
    with pytest.raises(SettingsError, match=r"3 of 3: max_pixels=0"):
        prepare_many([good, good, replace(good, max_pixels=0)], KEYE_PREVIEW)
    assert prepare_many([], KEYE_PREVIEW, total_pixels=5) == []


@pytest.mark.parametrize("total", [0, -1, 1.5, True])
def test_budgets_that_are_none(total) -> None:
    with pytest.raises(SettingsError, match="total_pixels"):
        prepare_many([], KEYE_PREVIEW, total_pixels=total)


# Cache


def test_the_cache_answers_for_equal_bytes_and_settings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    array = synth(60, 80, 1)
    data, cache = png(array), PixelCache()
    first = prepare(Image(data), KEYE_PREVIEW, cache=cache)
    assert prepare(Image(bytearray(data)), KEYE_PREVIEW, cache=cache) is first
    assert (cache.hits, cache.misses) == (1, 1)
    changed = bytearray(png(synth(60, 80, 1) ^ 1))
    others = [
        (Image(bytes(changed)), KEYE_PREVIEW),
        (Image(data, max_pixels=10_000), KEYE_PREVIEW),
        (Image(data), ONE_STAGE),
        (Image(data), KEYE_15),
        (Image(data), KEYE_PREVIEW.bounded(max_pixels=10_000)),
        (Image(data), replace(KEYE_PREVIEW, alpha="drop")),
        (Image(data), replace(KEYE_PREVIEW, first=Stage(max_pixels=5000))),
    ]
    for part, rule in others:
        assert prepare(part, rule, cache=cache) is not first
    assert (cache.hits, cache.misses) == (1, 1 + len(others))


def test_the_cache_knows_arrays_and_pil_images_by_their_pixels() -> None:
    array, cache = synth(60, 80, 1), PixelCache()
    first = prepare(Image(array), KEYE_PREVIEW, cache=cache)
    assert prepare(Image(array.copy()), KEYE_PREVIEW, cache=cache) is first
    assert prepare(Image(pil.fromarray(array)), KEYE_PREVIEW, cache=cache) is first
    assert prepare(Image(array.reshape(80, 60, 3)), KEYE_PREVIEW, cache=cache) is not first
    array[0, 0, 0] ^= 1
    assert prepare(Image(array), KEYE_PREVIEW, cache=cache) is not first
    assert cache.hits == 2


def test_a_limit_holds_although_the_cache_has_it() -> None:
    data, cache = png(synth(60, 80, 1)), PixelCache()
    prepare(Image(data), KEYE_PREVIEW, cache=cache)
    with pytest.raises(MediaTooLarge):
        prepare(Image(data), KEYE_PREVIEW, FetchLimits(pixels=100), cache=cache)


def test_a_budget_with_a_cache() -> None:
    cache = PixelCache()
    parts = [Image(png(synth(300, 300, i))) for i in range(2)]
    plain = prepare_many(parts, KEYE_PREVIEW, total_pixels=100_000)
    for _ in range(2):
        made = prepare_many(parts, KEYE_PREVIEW, total_pixels=100_000, cache=cache)
        assert [(one.key, one.notes) for one in made] == [(one.key, one.notes) for one in plain]
    assert cache.hits == 4 and prepare(parts[0], KEYE_PREVIEW, cache=cache).notes == ()


def entry(size: int) -> Patches:
    return Patches("image", np.zeros(size, np.uint8), ((1, 1, 1),), (1, 1), b"")


def test_the_cache_is_bounded_and_forgets_the_least_recently_used() -> None:
    cache = PixelCache(100)
    for name in (b"a", b"b"):
        cache.put(name, entry(40))
    assert cache.get(b"a") is not None
    cache.put(b"c", entry(30))  # b goes: a was used since
    assert cache.get(b"b") is None and cache.get(b"a") is not None and cache.get(b"c") is not None
    assert (cache.bytes_held, len(cache), cache.evictions) == (70, 2, 1)
    cache.put(b"a", entry(10))
    assert cache.bytes_held == 40
    cache.put(b"huge", entry(101))
    assert cache.get(b"huge") is None and cache.bytes_held == 40
    cache.clear()
    assert (len(cache), cache.bytes_held) == (0, 0)
    with pytest.raises(SettingsError, match="max_bytes"):
        PixelCache(-1)


class Slow:
    """Pixels that let another thread in whenever their size is asked."""

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def nbytes(self) -> int:
        time.sleep(1e-5)
        return self.size


def test_the_cache_counts_right_between_threads() -> None:
    cache = PixelCache(400)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(200):
            key = bytes([rng.integers(40)])
            if cache.get(key) is None:
                cache.put(key, Patches("image", Slow(key[0] + 1), ((1, 1, 1),), (1, 1), b""))  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.hits + cache.misses == 800 and cache.evictions > 0
    assert cache.bytes_held == sum(one.pixels.nbytes for one in cache._entries.values()) <= 400


def test_source_keys(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert source_key(b"abc", 1) == source_key(path, 1) == source_key(memoryview(b"abc"), 1)
    assert len({source_key(b"abc", 1), source_key(b"abc", 2), source_key(b"abd", 1), source_key(b"abc", 1, 2)}) == 4


def test_media_loads_without_torch() -> None:
    code = "import sys, mirada.media.prepare, mirada.media.download; print('torch' in sys.modules, 'av' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_another_patch_size_and_merge() -> None:
    rule = MediaRule(grid=GridRule(patch=16, merge=1, min_pixels=256, max_pixels=65536))
    made = prepare(Image(synth(100, 200, 0)), rule)
    assert made.grids == ((1, 6, 12),) and made.pixels.shape == (72, 3, 16, 16)
