"""Kimi-VL's own promises: every key of its config counts, sizes as published, packed like single, saved as released."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.released import KIMI_A3B
from safetensors.torch import load_file, save_file
from tiny import flat, make_tiny, media_batch, pack, random_prompt, randomise
from tiny_deepseek import KIMI_CONTROL, KIMI_FILE, kimi_config

from mirada.errors import ConfigError, TensorError
from mirada.layers.batch import Batch, MediaBatch
from mirada.layers.cache import make_cache
from mirada.layers.embed import GridPositions
from mirada.models.family import FAMILIES
from mirada.models.kimi_vl import KimiConfig, KimiVL
from mirada.models.load import build, load_model, save_model

FAMILY = FAMILIES["kimi_vl"]
IDS = {name: 260 + i for i, name in enumerate(KIMI_CONTROL)}
PADS = (IDS["<|media_pad|>"], None)


def tiny() -> KimiVL:
    model = build(kimi_config("kimi_vl", IDS))
    assert isinstance(model, KimiVL)
    randomise(model, 0)
    return model.eval()


MODEL = tiny()


def changed(**changes) -> dict:
    """The released config with keys replaced (``text__x``, ``vision__x``), or left out where None."""
    made = copy.deepcopy(KIMI_A3B)
    for key, value in changes.items():
        where, _, name = key.rpartition("__")
        target = made[f"{where}_config"] if where else made
        if value is None:
            del target[name]
        else:
            target[name] = value
    return made


# ---- config


def test_the_released_config_is_understood() -> None:
    made = KimiConfig.from_hf(KIMI_A3B)
    assert made.vision.head_dim == 72 and (made.vision.table_rows, made.vision.table_columns) == (64, 64)
    assert made.vision.layer_norm_eps == 1e-5 and made.image_token_id == 163605 and made.video_token_id is None
    assert made.text.softmax_scale == 192**-0.5 and made.text.rope_theta == 800000 and made.text.mrope_section is None
    assert made.text.routed_scaling_factor == 2.446 and made.text.rms_norm_eps == 1e-5
    assert made.eos_token_ids == (163585,)


def test_sizes_as_published() -> None:
    """Counted by hand from the shapes: 329 + 6 + 5344 tensors, of which 27 are frequencies that are no parameters."""
    model = build(KIMI_A3B, device="meta")
    parts = (model.visual, model.projector, model.decoder, model.lm_head)
    vision, projector, decoder, head = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert (vision, projector, decoder + head) == (416_866_032, 30_679_808, 15_960_110_208)
    assert len(FAMILY.layout(model.config).stored()) == 5679 - 27
    spec = FAMILY.cache_spec(model.config)
    assert spec == {"kind": "latent", "num_layers": 27, "latent_dim": 512, "rope_dim": 64}
    assert make_cache(spec, torch.bfloat16, "cpu").bytes_per_token == 15_552 * 2


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        (changed(hiden=4), "config.json: key 'hiden'"),
        (changed(text__hiden_size=4), "text_config: key 'hiden_size'.*'hidden_size'"),
        (changed(vision__patchsize=14), "vision_config: key 'patchsize'.*'patch_size'"),
        (changed(text__kv_lora_rank=None), "text_config: key 'kv_lora_rank' is missing"),
        (changed(media_placeholder_token_id=None), "'media_placeholder_token_id' is missing"),
        (changed(text__scoring_func="softmax"), "scoring_func='softmax'"),
        (changed(text__topk_method="greedy"), "topk_method='greedy'"),
        (changed(text__rope_scaling={"type": "linear", "factor": 2}), "type='linear'"),
        (changed(text__rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]}), "mrope_section is set"),
        (changed(text__num_key_value_heads=4), "num_key_value_heads=4"),
        (changed(text__model_type="qwen2"), "text_config: model_type='qwen2'"),
        (changed(vision__model_type="siglip"), "vision_config: model_type='siglip'"),
        (changed(vision__merge_kernel_size=[3, 3]), r"merge_kernel_size=\[3, 3\]"),
        (changed(vision__num_attention_heads=7), "over 7 heads"),
        (changed(vocab_size=5), "vocab_size=5"),
        (changed(tie_word_embeddings=True), "tie_word_embeddings=True"),
    ],
)
def test_what_is_not_understood_is_named(mapping: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        KimiConfig.from_hf(mapping)


def test_what_the_family_offers() -> None:
    config = KimiConfig.from_hf(KIMI_A3B)
    form = FAMILY.prompt_format(config)
    assert form.eos == ("<|im_end|>", "[EOS]") and form.flat_positions and form.image_pad == "<|media_pad|>"
    assert form.think.open == "◁think▷" and form.think.close == "◁/think▷"


def test_media_follow_the_preprocessor_file() -> None:
    config = KimiConfig.from_hf(KIMI_A3B)
    assert FAMILY.media_rule(config).grid.max_pixels == 4096 * 196
    made = FAMILY.media_rule(config, KIMI_FILE | {"in_token_limit": 16384, "image_mean": [0.4, 0.5, 0.6]})
    assert made.grid.max_pixels == 16384 * 196 and made.grid.mean == (0.4, 0.5, 0.6) and made.video is None
    assert made.grid.border == "pad" and FAMILY.media_rule(config, {"pad_input": False}).grid.border == "crop"
    for key, value, named in (
        ("patch_size", 16, "patch_size=16"),
        ("in_token_limit", "many", "in_token_limit is 'many'"),
        ("merge_kernel_size", [1, 1], r"merge_kernel_size=\[1, 1\]"),
        ("crop", 1, "'crop'"),
    ):
        with pytest.raises(ConfigError, match=f"preprocessor_config.json.*{named}"):
            FAMILY.media_rule(config, KIMI_FILE | {key: value})


# ---- model


def split_media(media: MediaBatch) -> list[MediaBatch]:
    pieces = media.pixels.split([t * h * w for t, h, w in media.grids])
    return [MediaBatch(piece, (grid,), ("image",)) for piece, grid in zip(pieces, media.grids, strict=True)]


@torch.no_grad()
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4))
@settings(max_examples=15)
def test_packed_equals_single_equals_cached(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    made = [random_prompt(random, PADS, False, flat(MODEL.config)) for _ in range(count)]
    prompts, grids = [prompt for prompt, _ in made], [grid for _, each in made for grid in each]
    media = media_batch(grids, torch.Generator().manual_seed(seed)) if grids else None
    features = MODEL.encode(media) if media else None
    if media is not None and features is not None:
        alone = torch.cat([MODEL.encode(piece) for piece in split_media(media)])
        torch.testing.assert_close(features, alone, atol=2e-5, rtol=1e-4)
    batch = pack(prompts)
    packed = MODEL.logits(MODEL(batch, features))
    cache = make_cache(FAMILY.cache_spec(MODEL.config), torch.float32, "cpu")
    for slot in batch.slots:
        cache.allocate(slot)
    torch.testing.assert_close(MODEL.logits(MODEL(batch, features, cache)), packed, atol=1e-4, rtol=1e-4)
    at = row = 0
    for prompt in prompts:
        number = sum(span.num_tokens for span in prompt.spans)
        own = None if features is None or not number else features[row : row + number]
        single = MODEL.logits(MODEL(pack([prompt]), own))
        torch.testing.assert_close(packed[at : at + len(single)], single, atol=1e-4, rtol=1e-4)
        at, row = at + len(single), row + number


@torch.no_grad()
def test_one_picture_does_not_change_another() -> None:
    media = media_batch([(1, 4, 4), (1, 4, 6), (1, 4, 4)], torch.Generator().manual_seed(0))
    before = MODEL.encode(media).split([4, 6, 4])
    media.pixels[:16] += 1
    after = MODEL.encode(media).split([4, 6, 4])
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1]) and torch.allclose(before[2], after[2], atol=1e-6)


@torch.no_grad()
def test_positions_of_the_text_count_every_token_of_a_picture() -> None:
    """Absolute shifts do not matter to rotary scores, a gap between text and picture does: flat is what the decoder sees."""
    tokens = torch.tensor([1, *[PADS[0]] * 6, 2, 3])
    features = torch.randn(6, MODEL.config.text.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(1, 7)

    def run(places: list[int]) -> torch.Tensor:
        place = torch.tensor(places).expand(3, -1)
        return MODEL.logits(MODEL(Batch(tokens, place, (9,), feature_rows=rows), features))[-1]

    plain = run(list(range(9)))
    assert torch.allclose(plain, run(list(range(5, 14))), atol=1e-4)
    assert not torch.allclose(plain, run([0, 1, 1, 1, 1, 1, 1, 4, 5]), atol=1e-2)


def test_every_parameter_gets_a_gradient() -> None:
    """But for the routers' biases, which a rule balances, and experts that no token of the batch came to."""
    model = tiny()
    random = np.random.default_rng(0)
    prompt, _ = next(made for made in iter(lambda: random_prompt(random, PADS, False, True), None) if len(made[1]) > 1)
    grids = [span.grid for span in prompt.spans]
    batch = pack([prompt] * 3)
    features = model.encode(media_batch(grids * 3, torch.Generator().manual_seed(0)))
    torch.nn.functional.cross_entropy(model.logits(model(batch, features)), batch.tokens).backward()
    for label, parameter in model.named_parameters():
        if label.endswith("router.bias"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, label


def test_fresh_weights_of_experts_have_the_deviation_of_their_inputs() -> None:
    model = tiny()
    model.init_weights(1)
    experts = model.decoder.layers[1].mlp.experts
    depth = (2 * len(model.decoder.layers)) ** -0.5
    assert abs(float(experts.gate_up.detach().std()) * 64**0.5 - 1) < 0.1
    assert abs(float(experts.down.detach().std()) * 24**0.5 / depth - 1) < 0.1


def test_the_table_at_its_own_size_is_itself() -> None:
    table = GridPositions((6, 5), 8, "bicubic")
    assert torch.equal(table.resample(6, 5), table.weight.flatten(0, 1))
    assert table.resample(3, 9).shape == (27, 8)


# ---- files


def test_load_save_load_is_what_was_released(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path / "made", "kimi_vl", seed=3)
    stored = load_file(next(directory.glob("*.safetensors")))
    assert "language_model.model.layers.1.mlp.experts.3.down_proj.weight" in stored
    assert stored["vision_tower.patch_embed.pos_emb.weight"].shape == (6, 5, 32)
    save_model(load_model(directory), tmp_path / "again")
    again = load_file(next((tmp_path / "again").glob("*.safetensors")))
    assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)
    assert json.loads((directory / "config.json").read_text()) == json.loads((tmp_path / "again" / "config.json").read_text())


def test_stored_frequencies_are_dropped_and_other_tensors_named(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path, "kimi_vl", seed=3)
    file = next(directory.glob("*.safetensors"))
    stored, before = load_file(file), load_model(directory)
    stale = {f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0) for i in range(2)}
    save_file(stored | stale, file)
    after = load_model(directory)
    batch = Batch(torch.arange(9), torch.arange(9).expand(3, -1), (9,))
    assert torch.equal(before.logits(before(batch)), after.logits(after(batch)))
    save_file(stored | {"language_model.model.layers.0.self_attn.rotary_emb.freq": torch.ones(4)}, file)
    with pytest.raises(TensorError, match=r"rotary_emb\.freq"):
        load_model(directory)
    del stored["language_model.model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(stored, file)
    with pytest.raises(TensorError, match=r"lacks tensor .*experts\.2\.up_proj"):
        load_model(directory)


def test_the_router_stays_wide_in_half_storage(tmp_path: Path) -> None:
    model = load_model(make_tiny(tmp_path, "kimi_vl"), torch.bfloat16)
    router = model.decoder.layers[1].mlp.router
    assert router.weight.dtype == router.bias.dtype == torch.float32
    assert model.decoder.layers[1].mlp.experts.down.dtype == torch.bfloat16
