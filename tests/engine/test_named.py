"""A picture that was sent with a name may come again by its name: to one tenant, at one size, for as long as it is kept."""

from __future__ import annotations

import numpy as np
import pytest
from media.test_pool import png

from mirada import VLM, Image, Message, Sampling, Text
from mirada.errors import ContextOverflow, MediaNotFound, MediaTooLarge, MessageError
from mirada.media.limits import FetchLimits
from mirada.records.wire import message_from_json, message_to_json

SHORT = Sampling(max_tokens=6, ignore_eos=True)


@pytest.fixture
def vlm(tiny_directories):
    with VLM(tiny_directories["qwen2_vl"], device="cpu", engine={"workers": 0}) as made:
        yield made


def answer(vlm: VLM, *media: Image, salt: str = ""):
    return vlm.submit([Message("user", (*media, Text("what?")))], SHORT, salt=salt).result(60)


def test_a_name_stands_for_the_picture(vlm):
    first = answer(vlm, Image(png(1), id="a"))
    again = answer(vlm, Image(id="a"))
    assert first.error is None and again.tokens == first.tokens and again.usage.image_tokens == first.usage.image_tokens
    both = answer(vlm, Image(png(2)), Image(id="a"), Image(png(3), id="b"))
    plain = answer(vlm, Image(png(2)), Image(png(1)), Image(png(3)))
    assert both.tokens == plain.tokens and both.error is None
    array = np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    assert answer(vlm, Image(array, id="array")).tokens == answer(vlm, Image(id="array")).tokens


def test_nobody_else_finds_it(vlm):
    mine = answer(vlm, Image(png(1), id="a"), salt="me")
    assert answer(vlm, Image(id="a"), salt="me").tokens == mine.tokens
    for salt in ("", "you"):
        error = answer(vlm, Image(id="a"), salt=salt).error
        assert isinstance(error, MediaNotFound) and "'a'" in error.problem and "again" in error.fix
    other = answer(vlm, Image(png(2), id="a"), salt="you")
    assert answer(vlm, Image(id="a"), salt="you").tokens == other.tokens != mine.tokens
    assert answer(vlm, Image(id="a"), salt="me").tokens == mine.tokens


def test_a_name_is_not_believed_over_content(vlm):
    one, two = answer(vlm, Image(png(1))), answer(vlm, Image(png(2)))
    assert one.tokens != two.tokens
    answer(vlm, Image(png(1), id="a"))
    assert answer(vlm, Image(png(2), id="a")).tokens == two.tokens  # and from now on it is this one's
    assert answer(vlm, Image(id="a")).tokens == two.tokens


def test_other_sizes_are_another_picture(vlm):
    answer(vlm, Image(png(1), id="a"))
    assert isinstance(answer(vlm, Image(id="a", max_pixels=4000)).error, MediaNotFound)
    small = answer(vlm, Image(png(1), id="a", max_pixels=4000))
    assert answer(vlm, Image(id="a", max_pixels=4000)).usage.image_tokens == small.usage.image_tokens


def test_it_is_kept_within_the_bytes_of_the_cache(tiny_directories):
    size = 60 * 90 * 3
    with VLM(tiny_directories["qwen2_vl"], device="cpu", engine={"workers": 0, "pixel_cache_bytes": 8 * size}) as vlm:
        for i in range(12):
            assert answer(vlm, Image(png(i), id=str(i))).error is None
            assert vlm.stats()["pixel_cache_bytes"] <= 8 * size
        assert isinstance(answer(vlm, Image(id="0")).error, MediaNotFound) and answer(vlm, Image(id="11")).error is None
        vlm.sleep()
        vlm.wake()
        assert isinstance(answer(vlm, Image(id="11")).error, MediaNotFound)
    with VLM(tiny_directories["qwen2_vl"], device="cpu", engine={"workers": 0, "pixel_cache_bytes": 0}) as vlm:
        assert answer(vlm, Image(png(1), id="a")).error is None
        assert "pixel_cache_bytes is 0" in str(answer(vlm, Image(id="a")).error)


def test_as_programs_write_it():
    for part, image in (
        (
            {"type": "image_url", "image_url": {"url": "a.png", "max_pixels": 9}, "uuid": "x"},
            Image("a.png", max_pixels=9, id="x"),
        ),
        ({"type": "image_url", "image_url": None, "uuid": "x"}, Image(id="x")),
        ({"type": "image_url", "image_url": {}, "uuid": "x"}, Image(id="x")),
        ({"image": None, "uuid": "x", "max_pixels": 9}, Image(id="x", max_pixels=9)),
    ):
        message = message_from_json({"role": "user", "content": [part]})
        assert message.parts == (image,)
        assert message_from_json(message_to_json(message)) == message
    for part in (
        {"type": "image_url", "image_url": None}, {"image_url": {}}, {"image_url": "a.png", "uuid": ""},
        {"image_url": "a.png", "uuid": 7}, {"image_url": None, "uuid": "x" * 257}, {"video_url": "a.mp4", "uuid": "x"},
        {"image_url": "", "uuid": "x"},
    ):  # fmt: skip
        with pytest.raises(MessageError):
            message_from_json({"role": "user", "content": [part]})


@pytest.mark.parametrize("how", ["parts", "tokens"])
def test_names_count_as_the_pictures_do(vlm, monkeypatch, how):
    """A name is short, and a body may hold many: what they stand for is bounded before it is written into a prompt."""
    tokens = answer(vlm, Image(png(1), id="a")).usage.image_tokens
    most = {"parts": 6, "tokens": vlm.parts.context // tokens}[how]
    limits = FetchLimits(parts=most if how == "parts" else 10**9)
    monkeypatch.setattr(vlm._requests, "limits", limits)
    named = [Image(id="a")] * most
    rendered: list[int] = []
    render = vlm.parts.renderer.render
    monkeypatch.setattr(vlm.parts.renderer, "render", lambda *a, **k: rendered.append(1) or render(*a, **k))
    if how == "parts":
        assert answer(vlm, *named).error is None and rendered
        rendered.clear()
    kind = MediaTooLarge if how == "parts" else ContextOverflow
    for more in ([Image(id="a")] * 2, [Image(png(2))] * 2, [Image(png(2), id="b"), Image(id="a")]):
        assert isinstance(answer(vlm, *named, *more).error, kind)
        assert not rendered
