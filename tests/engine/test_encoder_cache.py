"""Features are kept by all that decides them: the tower runs once for one content, and never is another one's found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media.test_pool import png

from mirada import VLM, Image, Message, Sampling, Text
from mirada.engine.vision import EncoderCache
from mirada.media.grid import GridRule, Patches, content_key
from mirada.media.prepare import prepare
from mirada.media.rule import KEYE_15, QWEN2_VL
from mirada.types import Video

SAMPLING = Sampling(max_tokens=5, ignore_eos=True)


def item(pixels: np.ndarray, grids, kind="image", rule: GridRule | None = None) -> Patches:
    return Patches(kind, pixels, grids, (28, 28), content_key(pixels, kind, grids, rule or GridRule()))


def random_item(seed: int, count: int = 4) -> Patches:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, 14, 14), dtype=np.uint8)
    return item(pixels, ((1, 2, count // 2),))


def cache(size: int = 1 << 20, weights=lambda: b"w", *settings) -> EncoderCache:
    return EncoderCache(size, weights, *settings)


def kept(store: EncoderCache, one: Patches, value: float, adapter: str = "") -> None:
    assert store.get(one, adapter) is None
    store.put(one, torch.full((2, 4), value), adapter)


@given(st.integers(0, 4 * 3 * 14 * 14 - 1), st.integers(1, 255), st.integers(0, 5))
def test_one_pixel_changed_is_another_picture(at, by, seed):
    store, one = cache(), random_item(seed)
    pixels = one.pixels.copy()
    pixels.reshape(-1)[at] = (int(pixels.reshape(-1)[at]) + by) % 256
    other = item(pixels, one.grids)
    kept(store, one, 1.0)
    assert store.get(other) is None
    kept(store, other, 2.0)
    assert store.get(one)[0, 0] == 1.0 and store.get(other)[0, 0] == 2.0


@given(st.data())
def test_keys_differ_in_every_part(data):
    """The same pixels under another grid, kind, rule, adapter, number type."""
    pixels = np.zeros((8, 3, 14, 14), np.uint8)
    grids = [((1, 2, 4),), ((1, 4, 2),), ((2, 2, 2),), ((1, 2, 2), (1, 2, 2))]
    rules = [GridRule(), GridRule(mean=(0.4, 0.5, 0.5)), GridRule(merged_order=True), GridRule(max_pixels=784 * 5)]
    facts = st.tuples(
        st.sampled_from(grids), st.sampled_from(["image", "video"]), st.sampled_from(rules),
        st.text(max_size=3), st.sampled_from([(torch.float32,), (torch.bfloat16,), (torch.float32, "eager"), ()]),
    )  # fmt: skip
    one, other = data.draw(facts), data.draw(facts)
    keys = [
        cache(1, lambda: b"", *settings).key(item(pixels, grid, kind, rule), adapter)
        for grid, kind, rule, adapter, settings in (one, other)
    ]
    assert (keys[0] == keys[1]) == (one == other) and len(keys[0]) == 32


def test_frames_at_another_rate():
    """Where only times differ the features are the same ones; positions and text are not the tower's."""
    frames = [np.random.default_rng(i).integers(0, 256, (56, 56, 3), dtype=np.uint8) for i in range(4)]
    one, other = (prepare(Video(frames, fps=fps), QWEN2_VL) for fps in (1.0, 4.0))
    fewer = prepare(Video(frames[:2], fps=1.0), QWEN2_VL)
    assert one.key == other.key != fewer.key and one.timestamps != other.timestamps
    assert prepare(Video(frames, fps=1.0), KEYE_15).key != one.key


def test_other_weights_drop_all_and_are_never_mixed():
    now = [b"a"]
    store, one, two = cache(1 << 20, lambda: now[0]), random_item(1), random_item(2)
    kept(store, one, 1.0)
    assert store.get(two) is None  # begins to be encoded
    now[0] = b"b"
    store.put(two, torch.ones(2, 4))  # by the old weights, at least in part
    assert store.get(two) is None and store.get(one) is None and store.entries.bytes_held == 0
    store.put(two, torch.ones(2, 4))
    assert store.get(two) is not None
    store.put(random_item(3), torch.ones(2, 4))  # nobody had asked for it, so nobody knows by which weights it is
    assert store.get(random_item(3)) is None


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=40), st.integers(0, 5))
def test_bytes_are_bounded_and_the_least_recent_goes(steps, room):
    size = 2 * 4 * 4
    store, model = cache(room * size), []
    for seed, asks in steps:
        one = random_item(seed)
        found = store.get(one)
        assert (found is not None) == (seed in model)
        if found is not None:
            assert found[0, 0] == seed
            model.remove(seed)
            model.append(seed)
        elif not asks:
            store.put(one, torch.full((2, 4), float(seed)))
            model = [*model, seed][-room:] if room else []
        assert store.entries.bytes_held == len(model) * size <= store.entries.max_bytes


def test_what_is_kept_keeps_nothing_else_alive():
    store, whole = cache(), torch.ones(100, 4)
    one = random_item(1)
    store.get(one)
    store.put(one, whole[:2])
    assert store.get(one).untyped_storage().nbytes() == 2 * 4 * 4


@pytest.fixture(scope="module", params=["qwen2_vl", "KeyeVL1_5", "kimi_vl"])
def fresh(request, tiny_directories):
    settings = {"workers": 0, "prefix_cache_bytes": 0}
    with VLM(tiny_directories[request.param], device="cpu", engine=settings) as vlm:
        yield vlm


@pytest.fixture
def calls(fresh, monkeypatch):
    made, original = [], type(fresh.parts.model).encoding
    monkeypatch.setattr(
        type(fresh.parts.model), "encoding", lambda self, media, *rest: made.append(media.grids) or original(self, media, *rest)
    )
    return made


def chat(*pictures, text="What?"):
    return [Message("user", (*map(Image, pictures), Text(text)))]


def test_one_picture_goes_through_the_tower_once(fresh, calls):
    first = fresh.generate([chat(png(50), text="first")], SAMPLING)[0]
    assert len(calls) == 1 and "encode" in first.metrics
    again = fresh.generate([chat(png(50), text="first")], SAMPLING)[0]
    assert len(calls) == 1 and "encode" not in again.metrics
    assert again.tokens == first.tokens
    settings = {"workers": 0, "prefix_cache_bytes": 0, "encoder_cache_bytes": 0, "pixel_cache_bytes": 0}
    plain = VLM.from_parts(fresh.parts.model, fresh.parts.renderer, fresh.parts.rule, eos=fresh.parts.eos, engine=settings)
    with plain:
        assert plain.generate([chat(png(50), text="first")], SAMPLING)[0].tokens == first.tokens
    assert len(calls) == 2


def test_ten_questions_on_one_picture_at_once(fresh, calls):
    before = fresh.stats()
    outputs = fresh.generate([chat(png(60), text=f"question {i}") for i in range(10)], SAMPLING)
    assert all(output.error is None for output in outputs) and len(calls) == 1
    after = fresh.stats()
    assert after["encoder_cache_misses"] - before["encoder_cache_misses"] == 1
    assert after["encoder_cache_hits"] - before["encoder_cache_hits"] == 9
    assert after["pixel_cache_misses"] - before["pixel_cache_misses"] == 1
    alone = fresh.generate([chat(png(60), text="question 7")], SAMPLING)[0]
    assert alone.tokens == outputs[7].tokens


def test_order_and_company_do_not_matter(fresh, calls):
    a, b, c = png(70), png(71, 40, 40), png(72)
    both = fresh.generate([chat(a, b)], SAMPLING)[0]
    turned = fresh.generate([chat(b, c, a)], SAMPLING)[0]
    assert sum(len(grids) for grids in calls) == 3
    fresh._features.entries.clear()
    assert fresh.generate([chat(a, b)], SAMPLING)[0].tokens == both.tokens
    fresh._features.entries.clear()
    assert fresh.generate([chat(b, c, a)], SAMPLING)[0].tokens == turned.tokens


def test_weights_that_are_written_to_are_other_weights(fresh, calls):
    fresh.generate([chat(png(80))], SAMPLING)
    parameter = next(p for name, p in fresh.parts.model.named_parameters() if name.startswith("visual"))
    with torch.no_grad():
        parameter.mul_(1.0)
    fresh.generate([chat(png(80))], SAMPLING)
    assert len(calls) == 2


def test_what_a_caller_says_of_pixels_is_not_believed(fresh, calls):
    """Two different pictures handed over under one key."""
    made = [prepare(Image(png(seed)), fresh.parts.rule) for seed in (90, 91)]
    sequences = [fresh._requests.make(chat(png(seed)), SAMPLING, "auto") for seed in (90, 91)]
    outputs = [
        fresh.submit(sequence.prompt, SAMPLING, media=[replace(patches, key=bytes(32))]).result(60)
        for sequence, patches in zip(sequences, made, strict=True)
    ]
    assert len(calls) == 2 and all(output.error is None for output in outputs)


def test_a_model_in_memory_encodes_with_the_weights_of_the_moment(fresh, calls):
    """Torch does not count what is written through ``data``, so unasked nothing is kept."""
    parts = fresh.parts
    weight = next(iter(parts.model.visual.parameters()))
    with VLM.from_parts(parts.model, parts.renderer, parts.rule, eos=parts.eos) as made:
        image = np.random.default_rng(5).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        before = made.generate([chat(image)], {"max_tokens": 1, "logprobs": 3, "ignore_eos": True})[0].logprobs
        weight.data.mul_(-3)
        try:
            after = made.generate([chat(image)], {"max_tokens": 1, "logprobs": 3, "ignore_eos": True})[0].logprobs
        finally:
            weight.data.div_(-3)
        assert len(calls) == 2 and before != after
