"""Configs: every key counts, and what a family hands to the other rooms."""

from __future__ import annotations

import copy

import pytest
from parity.released import PREVIEW_8B

from mirada.errors import ConfigError
from mirada.models.family import FAMILIES, family_of
from mirada.models.keye_vl import KeyeConfig


def changed(**changes) -> dict:
    made = copy.deepcopy(PREVIEW_8B)
    for key, value in changes.items():
        where, _, name = key.rpartition("__")
        target = made[where] if where else made
        if value is None:
            del target[name]
        else:
            target[name] = value
    return made


def test_the_released_config_is_understood() -> None:
    made = KeyeConfig.from_hf(PREVIEW_8B)
    assert made.vision.head_dim == 72 and made.vision.table_side == 27 and made.vision.layer_norm_eps == 1e-6
    assert made.text.head_dim == 128 and made.text.mrope_section == (16, 24, 24) and made.text.rope_theta == 1e6
    assert made.eos_token_ids == (151645,) and not made.frames_apart and not made.merge_then_norm
    newer = KeyeConfig.from_hf(changed(model_type="KeyeVL1_5", rope_theta=8000000, max_position_embeddings=131072))
    assert newer.frames_apart and newer.merge_then_norm and newer.text.rope_theta == 8e6


def test_the_form_of_transformers_5_means_the_same() -> None:
    newer = changed(rope_theta=None, rope_scaling=None, torch_dtype=None, dtype="bfloat16")
    newer["rope_parameters"] = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0}
    assert KeyeConfig.from_hf(newer) == KeyeConfig.from_hf(PREVIEW_8B)


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        (changed(hiden_size=4), "'hiden_size'.*'hidden_size'"),
        (changed(vision_config__patchsize=14), "vision_config.*'patchsize'.*'patch_size'"),
        (changed(hidden_size=None), "'hidden_size' is missing"),
        (changed(hidden_size="4096"), "hidden_size is '4096'"),
        (changed(tie_word_embeddings=1), "tie_word_embeddings is 1"),
        (changed(num_hidden_layers=True), "num_hidden_layers is True"),
        (changed(hidden_act="gelu"), "hidden_act='gelu'"),
        (changed(vision_config__hidden_act="gelu"), "vision_config: hidden_act='gelu'"),
        (changed(vision_config__use_qk_norm=True), "use_qk_norm=True"),
        (changed(use_sliding_window=True), "use_sliding_window=True"),
        (changed(rope_scaling={"type": "yarn", "mrope_section": [16, 24, 24]}), "type='yarn'"),
        (changed(rope_scaling={"type": "mrope", "mrope_section": [16, 24, 25]}), r"mrope_section \[16, 24, 25\]"),
        (changed(rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24], "beta": 1}), "'beta'"),
        (changed(num_key_value_heads=5), "num_key_value_heads 5"),
        (changed(vision_config__num_attention_heads=7), "over 7 heads"),
    ],
)
def test_what_is_not_understood_is_named(mapping: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        KeyeConfig.from_hf(mapping)


@pytest.mark.parametrize(
    ("mapping", "named"), [({}, "no model_type.*KeyeVL1_5"), ({"model_type": "KeyeVL15"}, "'KeyeVL15'.*mean 'KeyeVL1_5'")]
)
def test_an_unknown_family_names_what_is_supported(mapping: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        family_of(mapping)


@pytest.mark.parametrize("name", ["Keye", "KeyeVL1_5"])
def test_what_a_family_offers(name: str) -> None:
    family = FAMILIES[name]
    config = family.config(PREVIEW_8B | {"model_type": name})
    assert family.model_type == name
    assert family.cache_spec(config) == {"num_layers": 36, "num_kv_heads": 8, "head_dim": 128}
    prompt = family.prompt_format(config)
    assert prompt.tokens_per_second == 2 and prompt.merge == 2
    assert prompt.video_layout == {"Keye": "joint", "KeyeVL1_5": "frames"}[name]


@pytest.mark.parametrize("name", ["Keye", "KeyeVL1_5"])
def test_media_follow_the_preprocessor_file(name: str) -> None:
    family = FAMILIES[name]
    config = family.config(PREVIEW_8B | {"model_type": name})
    assert family.media_rule(config).video == {"Keye": "uniform", "KeyeVL1_5": "slowfast"}[name]
    file = {
        "min_pixels": 102400, "max_pixels": 1003520, "patch_size": 14, "temporal_patch_size": 1, "merge_size": 2,
        "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.5, 0.5], "resample": 2, "processor_class": "KeyeProcessor",
    }  # fmt: skip
    made = family.media_rule(config, file)
    assert (made.grid.min_pixels, made.grid.max_pixels) == (102400, 1003520)
    assert made.grid.mean == (0.4, 0.5, 0.6) and made.resample == "bilinear"
    for key, value, named in (
        ("patch_size", 16, "patch_size=16"),
        ("crop", 1, "'crop'"),
        ("image_mean", [0.5], "image_mean holds 1"),
    ):
        with pytest.raises(ConfigError, match=f"preprocessor_config.json.*{named}"):
            family.media_rule(config, file | {key: value})
