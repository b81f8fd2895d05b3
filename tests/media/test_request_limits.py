"""What all media of one request may cost together, known before a pixel is decoded and before room is made for any."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from media import web as web_module
from PIL import Image as pil

from mirada.errors import ContextOverflow, MediaTimeout, MediaTooLarge, RequestFailed, SettingsError
from mirada.media import prepare as prepare_module
from mirada.media import task as task_module
from mirada.media import video as video_module
from mirada.media.cache import PixelCache
from mirada.media.limits import FetchLimits
from mirada.media.pool import Cancel, Pool
from mirada.media.prepare import prepare_many
from mirada.media.rule import KEYE_15, KEYE_PREVIEW, KIMI, QWEN2_VL
from mirada.types import Image, Video

RULES = {"keye": KEYE_PREVIEW, "keye15": KEYE_15, "kimi": KIMI, "qwen": QWEN2_VL}
SERVING = FetchLimits.serving()
LOCAL = FetchLimits(allow_private=True, seconds=10)


def png(seed: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    pil.new("RGB", size, (seed % 256, seed // 256, 7)).save(out, "PNG")
    return out.getvalue()


def gif(frames: int, side: int = 16) -> bytes:
    out = io.BytesIO()
    shown = [pil.fromarray(np.full((side, side), 2 * n % 256, np.uint8)) for n in range(frames)]
    shown[0].save(out, "GIF", save_all=True, append_images=shown[1:], duration=100)
    return out.getvalue()


CLIP = gif(120)


@pytest.fixture
def blind(monkeypatch):
    """Whoever decodes a picture or makes room for a video fails."""

    def never(*given, **more):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(task_module, "decode", never)
    seen = {name: getattr(np, name) for name in ("stack", "asarray", "ndarray", "uint8")}
    monkeypatch.setattr(video_module, "np", SimpleNamespace(empty=never, **seen))


@pytest.fixture(scope="module")
def web() -> Iterator:
    with web_module.serve() as made:
        yield made


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_many_small_files_that_become_large_are_counted_by_their_headers(rule, blind):
    parts = [Image(png(i), min_pixels=rule.grid.max_pixels - 30_000) for i in range(200)]
    with pytest.raises(ContextOverflow, match="room for 32,768") as error:
        prepare_many(parts, rule, SERVING, most_tokens=32_768)
    assert error.value.needed > error.value.available == 32_768 and error.value.unit == "tokens"
    assert "max_pixels" in error.value.fix


@pytest.mark.parametrize("rule", [KEYE_PREVIEW, KEYE_15, QWEN2_VL], ids=["keye", "keye15", "qwen"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_small_clip_that_becomes_large(rule, workers, blind):
    pool = Pool(workers)
    try:
        with pytest.raises(ContextOverflow, match="video"):
            prepare_many([Video(CLIP, nframes=14, min_pixels=800_000)], rule, SERVING, pool=pool, most_tokens=6000)
    finally:
        pool.close()


def test_clips_that_fit_one_by_one_and_not_together():
    clips = [Video(CLIP, nframes=8 + i, max_pixels=100_352) for i in range(4)]
    alone = prepare_many(clips[:1], KEYE_PREVIEW, SERVING, most_tokens=2000)[0]
    tokens = len(alone.pixels) // 4
    assert len(prepare_many(clips[:2], KEYE_PREVIEW, SERVING, most_tokens=3 * tokens)) == 2
    with pytest.raises(ContextOverflow, match="are taken by what comes before"):
        prepare_many(clips, KEYE_PREVIEW, SERVING, most_tokens=3 * tokens)


@pytest.mark.parametrize("most", [2**40, 10**12], ids=str)
@pytest.mark.parametrize("part", [Image(png()), Video(CLIP, nframes=2), Video([png()] * 4)], ids=["picture", "clip", "frames"])
@pytest.mark.parametrize("rule", [KEYE_PREVIEW, KEYE_15, QWEN2_VL], ids=["keye", "keye15", "qwen"])
def test_what_only_a_resize_in_between_would_make_large(rule, part, most, monkeypatch):
    """The references enlarge to min_pixels before they shrink to what the model takes."""
    part = type(part)(part.source, min_pixels=most, **({"nframes": 2} if isinstance(part, Video) else {}))
    sizes = []
    resize = pil.Image.resize
    monkeypatch.setattr(pil.Image, "resize", lambda self, size, *a, **k: sizes.append(size) or resize(self, size, *a, **k))
    with pytest.raises((SettingsError, ContextOverflow), match=r"min_pixels|max_pixels"):
        prepare_many([part], rule, SERVING, most_tokens=32_768)
    assert all(high * wide < 1e8 for high, wide in sizes)


def test_the_number_of_parts_counts_frames_that_are_given_one_by_one():
    limits = FetchLimits(parts=4)
    assert len(prepare_many([Image(png())] * 4, KEYE_PREVIEW, limits)) == 4
    for parts in ([Image(png())] * 5, [Image(png()), Video([png()] * 4)]):
        with pytest.raises(MediaTooLarge, match=r"5 pictures and videos.*more than 4"):
            prepare_many(parts, KEYE_PREVIEW, limits)


def test_pixels_of_all_pictures_together(blind):
    with pytest.raises(MediaTooLarge, match=r"picture or video 3 of 3.*more than 20,000 pixels together.*request_pixels"):
        prepare_many([Image(png(i, (100, 80)), max_pixels=784) for i in range(3)], KIMI, FetchLimits(request_pixels=20_000))


def test_bytes_of_all_sources_together(web):
    data = png()
    with pytest.raises(MediaTooLarge, match=r"bytes together.*request_bytes"):
        prepare_many([Image(data), Image(png(1))], KEYE_PREVIEW, FetchLimits(request_bytes=len(data) + 10))
    size = len(web_module.PICTURE)
    limits = FetchLimits(allow_private=True, request_bytes=2 * size)
    addresses = [Image(web.url(f"/picture.png?{i}")) for i in range(3)]
    assert len(prepare_many(addresses[:2], KEYE_PREVIEW, limits)) == 2
    with pytest.raises(MediaTooLarge, match="bytes together"):
        prepare_many(addresses, KEYE_PREVIEW, limits)


def test_bytes_of_a_video_that_another_prepares_count_once():
    class Busy(PixelCache):
        others = 3

        def claim(self, key: bytes) -> threading.Event | None:
            if not self.others:
                return super().claim(key)
            self.others -= 1
            (event := threading.Event()).set()  # somebody prepares it, and fails at once
            return event

    cache = Busy()
    made = prepare_many([Video(CLIP, nframes=2)], KEYE_PREVIEW, FetchLimits(request_bytes=2 * len(CLIP)), cache=cache)
    assert len(made) == 1 and not cache.others


def test_addresses_are_fetched_side_by_side_and_each_once(web):
    before = len(web.seen)
    parts = [Image(web.url(f"/late?0.4&{i}")) for i in range(8)]
    began = time.monotonic()
    made = prepare_many([*parts, parts[0], Video([web.url("/picture.png?v")] * 2)], KEYE_PREVIEW, LOCAL)
    assert time.monotonic() - began < 8 * 0.4
    assert len({patches.key for patches in made[:9]}) == 1 and len(made) == 10
    assert len(web.seen) - before == 9


def test_one_clock_for_all_that_a_request_names(web):
    limits = FetchLimits(allow_private=True, seconds=10, request_seconds=0.5)
    began = time.monotonic()
    with pytest.raises(MediaTimeout, match=r"picture or video .* of 30.*within 0.5 seconds.*request_seconds"):
        prepare_many([Image(web.url(f"/late?0.3&{i}")) for i in range(30)], KEYE_PREVIEW, limits)
    assert time.monotonic() - began < 5


def test_the_first_that_fails_ends_the_rest_at_once(web):
    began = time.monotonic()
    parts = [Image(web.url("/missing")), *(Image(web.url(f"/late?60&end{i}")) for i in range(30))]
    with pytest.raises(Exception, match=r"picture or video 1 of 31.*404"):
        prepare_many(parts, KEYE_PREVIEW, LOCAL)
    assert time.monotonic() - began < 30 and len([1 for path, _ in web.seen if "end" in path]) <= prepare_module.SIDE_BY_SIDE


@pytest.mark.parametrize("count", [1, 3, 20])
def test_any_error_of_a_fetch_ends_it(count):
    def fails() -> None:
        raise IndexError("of whatever it calls")

    ended: list[BaseException] = []

    def ask() -> None:
        try:
            prepare_module.side_by_side([fails] * count)
        except IndexError as error:
            ended.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(5)
    assert ended


def test_what_is_cancelled_fetches_nothing_more(web):
    cancel = Cancel()
    cancel.now()
    with pytest.raises(RequestFailed, match="cancelled"):
        prepare_many([Image(web.url(f"/picture.png?gone{i}")) for i in range(3)], KEYE_PREVIEW, LOCAL, cancel=cancel)
    assert not [path for path, _ in web.seen if "gone" in path]


def test_frames_given_one_by_one_have_a_clock():
    with pytest.raises(MediaTimeout, match="decode_seconds"):
        prepare_many([Video([png()] * 50)], KEYE_PREVIEW, FetchLimits(decode_seconds=1e-4))


def test_what_a_server_allows_is_less_than_what_a_person_does():
    own, served = FetchLimits(), FetchLimits.serving()
    for name in ("parts", "video_bytes", "video_seconds", "decode_seconds", "animation_frames", "request_seconds",
                 "request_bytes", "request_pixels"):  # fmt: skip
        assert getattr(served, name) < getattr(own, name), name
    assert served.decode_seconds <= 120 and served.request_seconds <= 60
