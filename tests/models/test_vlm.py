"""The model's own promises: packed like single, gradients everywhere, errors that name counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import frames_spelt, media_batch, pack, random_prompt, randomise, tiny_config

from mirada.errors import MessageError
from mirada.layers.batch import MediaBatch
from mirada.layers.cache import SlabCache
from mirada.models.load import build
from mirada.models.vlm import VisionLanguageModel
from mirada.types import Prompt, Span

NAMES = (
    "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
IDS = {name: 260 + i for i, name in enumerate(NAMES)}
PADS = (IDS["<|image_pad|>"], IDS["<|video_pad|>"])


def tiny(model_type: str, **changes) -> VisionLanguageModel:
    model = build(tiny_config(model_type, IDS) | changes)
    assert isinstance(model, VisionLanguageModel)
    randomise(model, 0)
    return model


MODELS = {name: tiny(name).eval() for name in ("Keye", "KeyeVL1_5", "qwen2_vl")}


def noise(model: VisionLanguageModel, grids, seed: int = 0) -> MediaBatch:
    """Random patches of ``grids``, as the model takes them."""
    return media_batch(grids, torch.Generator().manual_seed(seed), model.config.vision.temporal_patch_size)


def split_media(media: MediaBatch) -> list[MediaBatch]:
    pieces = media.pixels.split([t * h * w for t, h, w in media.grids])
    return [MediaBatch(piece, (grid,), ("image",)) for piece, grid in zip(pieces, media.grids, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4))
@settings(max_examples=15)
def test_packed_equals_single_equals_cached(name: str, seed: int, count: int) -> None:
    model = MODELS[name]
    random = np.random.default_rng(seed)
    made = [random_prompt(random, PADS, frames_spelt(model.config)) for _ in range(count)]
    prompts = [prompt for prompt, _ in made]
    grids = [grid for _, each in made for grid in each]
    media = noise(model, grids, seed) if grids else None
    features = model.encode(media) if media else None
    alone = torch.cat([model.encode(piece) for piece in split_media(media)]) if media else None
    if features is not None and alone is not None:
        torch.testing.assert_close(features, alone, atol=2e-5, rtol=1e-4)
    batch = pack(prompts)
    packed = model.logits(model(batch, features))
    text = model.config.text
    cache = SlabCache(text.num_hidden_layers, text.num_key_value_heads, text.head_dim)
    for slot in batch.slots:
        cache.allocate(slot)
    torch.testing.assert_close(model.logits(model(batch, features, cache)), packed, atol=1e-4, rtol=1e-4)
    at = row = 0
    for prompt in prompts:
        number = sum(span.num_tokens for span in prompt.spans)
        own = None if features is None or not number else features[row : row + number]
        single = model.logits(model(pack([prompt]), own))
        torch.testing.assert_close(packed[at : at + len(single)], single, atol=1e-4, rtol=1e-4)
        at, row = at + len(single), row + number


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_one_picture_does_not_change_another(name: str) -> None:
    model = MODELS[name]
    media = noise(model, [(1, 4, 4), (2, 4, 6), (1, 4, 4)])
    before = model.encode(media).split([4, 12, 4])
    media.pixels[:16] += 1
    after = model.encode(media).split([4, 12, 4])
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1]) and torch.allclose(before[2], after[2], atol=1e-6)


@torch.no_grad()
def test_frames_see_each_other_in_preview_alone() -> None:
    for name, model in MODELS.items():
        media = noise(model, [(2, 4, 4)])
        before = model.encode(media)
        media.pixels[16:] += 1
        changed = not torch.equal(model.encode(media)[:4], before[:4])
        assert changed == (name == "Keye")


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = tiny(name)
    prompt, grids = random_prompt(np.random.default_rng(4), PADS, frames_spelt(model.config))
    assert grids
    features = model.encode(noise(model, grids))
    batch = pack([prompt])
    torch.nn.functional.cross_entropy(model.logits(model(batch, features)), batch.tokens).backward()
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, label


def test_features_per_patch_are_open_to_supervision() -> None:
    model = tiny("KeyeVL1_5")
    media = media_batch([(1, 4, 6), (2, 2, 2)], torch.Generator().manual_seed(0))
    made = model.visual(media.pixels, media.grids, model.segments(media.grids))
    assert made.shape == (32, 32) and made.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 3, 5])
def test_a_wrong_number_of_features_is_refused_with_both_counts(given: int) -> None:
    model = MODELS["Keye"]
    prompt = Prompt((1, *[PADS[0]] * 4, 2), (Span("image", 1, (1, 4, 4), 0),))
    features = torch.zeros(given, 64) if given else None
    with pytest.raises(MessageError, match=f"{given} visual features for 4 placeholder"):
        model(pack([prompt]), features)


@torch.no_grad()
def test_half_storage_stays_near_single_precision() -> None:
    model, half = MODELS["KeyeVL1_5"], tiny("KeyeVL1_5").bfloat16().eval()
    prompt, grids = random_prompt(np.random.default_rng(4), PADS, True)
    media = media_batch(grids, torch.Generator().manual_seed(0))
    theirs = model.logits(model(pack([prompt]), model.encode(media)))
    ours = half.logits(half(pack([prompt]), half.encode(media)))
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().mean() < 0.05 * theirs.abs().mean()


def test_tied_head_is_one_parameter() -> None:
    model = tiny("Keye", tie_word_embeddings=True)
    assert model.lm_head.weight is model.decoder.embed.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    first, second, other = (tiny("KeyeVL1_5") for _ in range(3))
    first.init_weights(1), second.init_weights(1), other.init_weights(2)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert all(torch.equal(p, torch.ones_like(p)) for n, p in first.named_parameters() if n.endswith("norm1.weight"))


def test_building_on_meta_takes_no_memory() -> None:
    model = build(tiny_config("Keye", IDS), device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
