"""Qwen2-VL: every form of its config, sizes of the releases, both namings, and what the family hands to the other rooms."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import randomise, tiny_config

from mirada.errors import ConfigError, TensorError
from mirada.media.grid import GridRule
from mirada.media.prepare import prepare
from mirada.media.rule import QWEN2_VL_LATER
from mirada.models import shards
from mirada.models.family import FAMILIES
from mirada.models.load import build, load_model, save_model
from mirada.models.positions import positions
from mirada.models.qwen2_vl import Qwen2VLConfig
from mirada.types import Image, Span, Video

FAMILY = FAMILIES["qwen2_vl"]
RELEASED: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 3584,
    "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
    "model_type": "qwen2_vl", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064,
}  # fmt: skip
"""config.json of Qwen2-VL-7B-Instruct."""
SIZES = {  # the releases: what differs, all parameters, those of tower and merger, stored tensors
    "2B": (
        {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
         "vocab_size": 151936, "tie_word_embeddings": True}, 2_208_985_600, 665_271_296, 729,
    ),
    "7B": ({}, 8_291_375_616, 675_759_104, 730),
    "72B": (
        {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8}, 73_405_560_320, 699_356_672, 1354,
    ),
}  # fmt: skip
NAMES = (
    "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
IDS = {name: 260 + i for i, name in enumerate(NAMES)}


def changed(**changes: Any) -> dict[str, Any]:
    """The released config with other values; ``a__b`` is key b of a, None leaves it out."""
    made = copy.deepcopy(RELEASED)
    for key, value in changes.items():
        where, _, name = key.rpartition("__")
        target = made[where] if where else made
        if value is None:
            del target[name]
        else:
            target[name] = value
    return made


def nested(**also: Any) -> dict[str, Any]:
    """As transformers 5 saves it: sizes of the decoder in text_config, sections in rope_parameters."""
    top = {"architectures", "model_type", "tie_word_embeddings", "transformers_version", "vision_config"}
    text = {k: v for k, v in RELEASED.items() if k not in top and not (k.endswith("_token_id") and k[0] in "iv")}
    for name in ("rope_theta", "rope_scaling", "torch_dtype"):
        del text[name]
    text |= {
        "model_type": "qwen2_vl_text", "dtype": "bfloat16", "layer_types": ["full_attention"] * 28, "sliding_window": None,
        "pad_token_id": None,
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default", "type": "mrope"},
    }  # fmt: skip
    made = {k: v for k, v in RELEASED.items() if k in top or (k.endswith("_token_id") and k[0] in "iv")}
    vision = made["vision_config"] | {
        "in_channels": 3, "hidden_act": "quick_gelu", "initializer_range": 0.02, "model_type": "qwen2_vl_vision",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    }  # fmt: skip
    return made | {"dtype": "bfloat16", "text_config": text, "vision_config": vision} | also


# ---- config


def test_the_released_config_is_understood() -> None:
    made = Qwen2VLConfig.from_hf(RELEASED)
    assert made.vision.head_dim == 80 and made.vision.intermediate_size == 5120 and made.vision.temporal_patch_size == 2
    assert made.text.head_dim == 128 and made.text.mrope_section == (16, 24, 24) and made.text.rope_theta == 1e6
    assert made.text.qkv_bias and not made.text.qk_norm and made.eos_token_ids == (151645,)


@pytest.mark.parametrize(
    "mapping",
    [
        nested(),
        nested(hidden_size=3584, rms_norm_eps=1e-06, eos_token_id=151645),  # both forms at once, as 4.52 to 4.57 write
        changed(vision_config__in_chans=None, vision_config__in_channels=3),
        changed(rope_scaling={"type": "default", "mrope_section": [16, 24, 24], "rope_type": "default"}),
    ],
    ids=["nested", "both", "in_channels", "default"],
)
def test_forms_that_were_saved_again_mean_the_same(mapping: dict) -> None:
    assert Qwen2VLConfig.from_hf(mapping) == Qwen2VLConfig.from_hf(RELEASED)


def test_the_tie_of_the_whole_model_holds() -> None:
    mapping = nested(tie_word_embeddings=True)
    mapping["text_config"]["tie_word_embeddings"] = False
    assert Qwen2VLConfig.from_hf(mapping).text.tie_word_embeddings
    del mapping["tie_word_embeddings"]
    assert not Qwen2VLConfig.from_hf(mapping).text.tie_word_embeddings


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        (changed(hiden_size=4), "'hiden_size'.*'hidden_size'"),
        (changed(vision_config__dept=1), "vision_config.*'dept'.*'depth'"),
        (changed(vision_config__depth=None), "vision_config: key 'depth' is missing"),
        (changed(vision_config__hidden_size=1280), "vision_config: hidden_size=1280"),
        (changed(vision_config__hidden_act="gelu"), "hidden_act='gelu'"),
        (changed(vision_config__num_heads=7), "1280 over 7 heads"),
        (changed(use_sliding_window=True), "use_sliding_window=True"),
        (changed(rope_scaling={"type": "mrope"}), "'mrope_section' is missing"),
        (changed(rope_scaling={"type": "yarn", "mrope_section": [16, 24, 24]}), "type='yarn'"),
        (changed(rope_scaling=None), "'rope_scaling' is missing"),
        (nested(hidden_size=4096), "hidden_size is 4096, in text_config 3584"),
        (nested(hiden_size=1), "'hiden_size'"),
        (nested(text_config=nested()["text_config"] | {"layer_types": ["sliding_attention"] * 28}), "layer_types"),
        (nested(text_config=nested()["text_config"] | {"vocab": 3}), "text_config: key 'vocab'"),
    ],
)
def test_what_is_not_understood_is_named(mapping: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Qwen2VLConfig.from_hf(mapping)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_tensors_of_the_releases(size: str) -> None:
    changes, total, vision, tensors = SIZES[size]
    mapping = changed(vision_config__hidden_size=changes.get("hidden_size", 3584)) | changes
    model = build(mapping, device="meta")
    assert sum(p.numel() for p in model.parameters()) == total
    parts: Any = model
    assert sum(p.numel() for part in (parts.visual, parts.projector) for p in part.parameters()) == vision
    assert len(FAMILY.layout(model.config).stored()) == tensors


# ---- weights


def tiny(**changes: Any) -> Any:
    model = build(tiny_config("qwen2_vl", IDS) | changes)
    randomise(model, 0)
    return model.eval()


def renamed(directory: Path, change) -> None:
    """Changes {name: tensor} of the saved weights."""
    files = shards.find(directory)
    stored = shards.read_all(files)
    mapped = shards.Mapped()
    shards.write_all(directory, change({name: mapped.whole(s) for name, s in stored.items()}), 1 << 30)


def later(name: str) -> str:
    if name.startswith("visual."):
        return f"model.{name}"
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


@pytest.mark.parametrize("tied", [False, True])
def test_both_namings_load_and_saves_are_of_the_released_one(tmp_path: Path, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    save_model(model, tmp_path)
    first = (tmp_path / "model.safetensors").read_bytes()
    renamed(tmp_path, lambda tensors: {later(name): tensor for name, tensor in tensors.items()})
    assert (tmp_path / "model.safetensors").read_bytes() != first
    again = load_model(tmp_path)
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    save_model(again, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_the_same_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path)
    renamed(tmp_path, lambda tensors: tensors | {"model.language_model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(TensorError, match=r"'model\.norm\.weight' twice"):
        load_model(tmp_path)


def test_a_redundant_head_is_taken_from_the_embedding(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    save_model(model, tmp_path)
    renamed(tmp_path, lambda tensors: tensors | {"lm_head.weight": torch.zeros_like(tensors["model.embed_tokens.weight"])})
    again: Any = load_model(tmp_path)
    assert again.lm_head.weight is again.decoder.embed.weight and torch.equal(again.lm_head.weight, model.lm_head.weight)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen2_vl", IDS)))
    assert not load_model(tmp_path).lm_head.weight.any()  # pyright: ignore[reportCallIssue]


# ---- media


def test_media_follow_the_preprocessor_file() -> None:
    config = Qwen2VLConfig.from_hf(RELEASED)
    default = FAMILY.media_rule(config)
    assert default.frame_rounding == "nearest" and default.grid == GridRule(
        max_pixels=16384 * 784, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
        frames=2, merged_order=True, enlarge=False,
    )  # fmt: skip
    released = {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor",
    }  # fmt: skip
    later = {k: v for k, v in released.items() if "pixels" not in k} | {
        "size": {"shortest_edge": 3136, "longest_edge": 12845056}, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "resample": 3, "rescale_factor": 1 / 255, "crop_size": None, "min_pixels": None,
    }  # fmt: skip
    assert FAMILY.media_rule(config, released) == FAMILY.media_rule(config, later) == default
    small = later | {"size": {"shortest_edge": 3136, "longest_edge": 784_000}}
    assert FAMILY.media_rule(config, small).grid.max_pixels == 784_000
    for key, value in (("temporal_patch_size", 1), ("do_resize", False), ("size", {"height": 3})):
        with pytest.raises(ConfigError, match=f"preprocessor_config.json.*{'height' if key == 'size' else key}"):
            FAMILY.media_rule(config, released | {key: value})


def frames(count: int, high: int = 56, wide: int = 84) -> list[np.ndarray]:
    random = np.random.default_rng(count)
    return [random.integers(0, 256, (high, wide, 3), dtype=np.uint8) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_frames_come_in_pairs_and_the_last_is_repeated(count: int) -> None:
    rule = FAMILY.media_rule(Qwen2VLConfig.from_hf(RELEASED))
    given = frames(count)
    made = prepare(Video(given), rule)
    pairs = -(-count // 2)
    assert made.grids == ((pairs, 4, 6),) and made.pixels.shape == (pairs * 24, 3, 2, 14, 14) and made.num_frames == 2 * pairs
    whole = [*given, *given[-1:] * (2 * pairs - count)]
    for pair in range(pairs):
        cut = made.pixels[pair * 24 : (pair + 1) * 24].reshape(2, 3, 2, 2, 3, 2, 14, 14)
        back = cut.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(2, 56, 84, 3)
        assert np.array_equal(back, np.stack(whole[2 * pair : 2 * pair + 2]))


def test_a_picture_is_a_pair_of_itself() -> None:
    (picture,) = frames(1)
    made = prepare(Image(picture), FAMILY.media_rule(Qwen2VLConfig.from_hf(RELEASED)))
    assert made.grids == ((1, 4, 6),) and np.array_equal(made.pixels[:, :, 0], made.pixels[:, :, 1])
    # The first four patches are one square of 28 pixels.
    square = made.pixels[:4, :, 0].reshape(2, 2, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(28, 28, 3)
    assert np.array_equal(square, picture[:28, :28])


def test_both_rules_of_frames(lossless_clip: Path) -> None:
    """90 frames at 25 a second: 7.2 frames are 8 by the first rule, 6 by the later one."""
    rule = FAMILY.media_rule(Qwen2VLConfig.from_hf(RELEASED))
    later = replace(QWEN2_VL_LATER, grid=rule.grid)
    assert prepare(Video(lossless_clip), rule).num_frames == 8
    assert prepare(Video(lossless_clip), later).num_frames == 6


@pytest.fixture(scope="module")
def lossless_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import clips

    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    path.write_bytes(clips.encode(90, rate=25))
    return path


def test_max_pixels_of_a_long_video_wins_over_its_budget_as_released() -> None:
    from mirada.media.video import video_budget

    rule, part = FAMILY.media_rule(Qwen2VLConfig.from_hf(RELEASED)), Video(None, max_pixels=360 * 420)
    assert video_budget(768, 720, 1280, part, rule) == (280, 504)
    high, wide = video_budget(768, 720, 1280, part, replace(rule, max_pixels_wins=False))
    assert high * wide <= 105369 < 280 * 504


# ---- positions


def test_text_after_a_long_video() -> None:
    """Five pairs of one row and two columns: text counts on from time, or, by the newer rule, from the columns."""
    span = Span("video", 1, (5, 2, 4), 0, t_step=1.0)
    made, following = positions(13, (span,))
    assert made[:, 11:].tolist() == [[6, 7]] * 3 and following == 8
    other, after = positions(13, (replace(span, advance="plane"),))
    assert np.array_equal(other[:, :11], made[:, :11])
    assert other[:, 11:].tolist() == [[3, 4]] * 3 and after == 6  # one past the highest of all, which is the video's


def test_prompt_of_a_video_counts_pairs_whatever_the_rate() -> None:
    form = FAMILY.prompt_format(Qwen2VLConfig.from_hf(RELEASED))
    assert form.tokens_per_second is None and form.video_layout == "joint" and form.video_advance == "block"
