"""Keye-VL-671B: no output of the whole is recorded anywhere, so its halves are compared, each with what is known of it.

The vision side with the recorded outputs of Keye-VL-1.5, the decoder behind its features with transformers' DeepSeek-V3.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.conftest import KEYE
from parity.golden import Case, cases
from parity.released import KEYE_671B
from safetensors.torch import load_file, save_file
from tiny import flat, make_tiny, media_batch, pack, random_prompt, randomise
from tiny_deepseek import deepseek_text

from mirada.errors import ConfigError, TensorError
from mirada.models.family import FAMILIES, family_of
from mirada.models.keye_moe import KeyeMoe, KeyeMoeConfig
from mirada.models.load import build, load_model, save_model

FAMILY = FAMILIES["KeyeVLMoe"]


def changed(**changes) -> dict:
    made = copy.deepcopy(KEYE_671B)
    for key, value in changes.items():
        made[key] = value
        if value is None:
            del made[key]
    return made


def test_sizes_are_those_of_deepseek_v3_and_keye_vit() -> None:
    model = build(KEYE_671B, device="meta")
    assert isinstance(model, KeyeMoe)
    decoder = sum(p.numel() for part in (model.decoder, model.lm_head) for p in part.parameters())
    assert decoder == 671_026_419_200
    assert sum(p.numel() for p in model.visual.parameters()) == 412_987_248
    wide = 4 * 1152
    assert sum(p.numel() for p in model.projector.parameters()) == 2 * wide + wide * wide + wide + wide * 7168 + 7168
    assert FAMILY.cache_spec(model.config) == {"kind": "latent", "num_layers": 61, "latent_dim": 512, "rope_dim": 64}
    stored = FAMILY.layout(model.config).stored()
    assert stored["mlp_AR.pre_norm.weight"][2] == (wide,)
    assert stored["model.layers.60.mlp.experts.255.down_proj.weight"][2] == (7168, 2048)
    assert stored["model.layers.2.mlp.down_proj.weight"][2] == (7168, 18432)
    assert stored["model.layers.0.self_attn.q_b_proj.weight"][2] == (128 * 192, 1536)
    for name in ("model.layers.61.embed_tokens.weight", "visual.vision_model.head.probe"):
        assert FAMILY.layout(model.config).ignores(name) and name not in stored


def test_the_config_is_understood() -> None:
    made = KeyeMoeConfig.from_hf(KEYE_671B)
    assert made.text.yarn is not None and made.text.n_group == 8 and made.text.topk_group == 4
    assert abs(made.text.softmax_scale - 192**-0.5 * (0.1 * np.log(40) + 1) ** 2) < 1e-12
    assert made.merge_then_norm and made.frames_apart
    assert family_of(KEYE_671B | {"model_type": "keye_something"}) is FAMILY
    assert FAMILY.prompt_format(made).flat_positions and FAMILY.prompt_format(made).video_layout == "frames"
    rule = FAMILY.media_rule(made)
    assert (rule.grid.min_pixels, rule.grid.max_pixels, rule.total_pixels) == (102400, 4096 * 784, 8192 * 784)
    assert rule.video == "slowfast"


def test_sections_of_the_rope_bring_positions_by_rows_and_columns() -> None:
    made = KeyeMoeConfig.from_hf(changed(rope_scaling=KEYE_671B["rope_scaling"] | {"mrope_section": [8, 12, 12]}))
    assert made.text.mrope_section == (8, 12, 12) and made.text.yarn is not None
    assert not FAMILY.prompt_format(made).flat_positions


@pytest.mark.parametrize(
    ("mapping", "named"),
    [
        (changed(q_lora_rnk=4), "'q_lora_rnk'.*'q_lora_rank'"),
        (changed(q_lora_rank=None), "'q_lora_rank' is missing"),
        (changed(image_token_id=None), "'image_token_id' is missing"),
        (changed(topk_group=9), "topk_group 9"),
        (changed(vision_config=KEYE_671B["vision_config"] | {"hidden_act": "gelu"}), "vision_config: hidden_act='gelu'"),
    ],
)
def test_what_is_not_understood_is_named(mapping: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        KeyeMoeConfig.from_hf(mapping)


# ---- the vision side, recorded


def recorded_vision(folder: Path) -> Path:
    """A checkpoint of Keye-VL-671B whose tower and projector are those of the recorded Keye-VL-1.5."""
    config = json.loads((KEYE / "keye15_config.json").read_text())
    kept = ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    mapping = deepseek_text(config["vocab_size"], hidden_size=config["hidden_size"], q_lora_rank=16, n_group=2)
    mapping |= {name: config[name] for name in kept} | {"model_type": "KeyeVLMoe"}
    model = build(mapping)
    randomise(model, 1)
    save_model(model, folder)
    theirs = load_file(KEYE / "model_weights.safetensors") | load_file(KEYE / "keye15_projector_override.safetensors")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: x for name, x in theirs.items() if name.startswith(("visual.", "mlp_AR."))}, file)
    return folder


@torch.no_grad()
def test_features_are_those_recorded_of_keye_vl_15(tmp_path: Path) -> None:
    model = load_model(recorded_vision(tmp_path))
    assert isinstance(model, KeyeMoe)
    recorded = cases(KEYE / "keye15_goldens.safetensors")
    checked = 0
    for tensors in recorded.values():
        case = Case(model, tensors)  # pyright: ignore[reportArgumentType]
        for name in tensors:
            if name.startswith(("image_", "video_")) and not name.endswith("grid_thw") and "grid_thw" not in name:
                case.check(name)
                checked += 1
    assert checked >= 4


# ---- the decoder behind it, beside transformers


@torch.no_grad()
@pytest.mark.reference
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_behind_the_features_are_those_of_transformers(tmp_path: Path, seed: int) -> None:
    """Low-rank queries, four groups of experts, YaRN beyond its first context; released names load with nothing missing."""
    transformers = pytest.importorskip("transformers", reason="pip install 'mirada[parity]'")
    directory = make_tiny(tmp_path / "keye", "KeyeVLMoe", seed)
    model = load_model(directory)
    theirs = reference(transformers, directory, tmp_path / "deepseek")
    random = np.random.default_rng(seed)
    pads = (model.config.image_token_id, model.config.video_token_id)
    made = [random_prompt(random, pads, True, flat(model.config)) for _ in range(8)]
    made = [one for one in made if one[1]]
    assert made and max(len(prompt.tokens) for prompt, _ in made) > 32
    for prompt, grids in made:
        batch = pack([prompt])
        features = model.encode(media_batch(grids, torch.Generator().manual_seed(seed)))
        expected = theirs(inputs_embeds=model.embed(batch, features)[None]).logits[0]
        assert expected.std() > 0.3
        worst = float((model.logits(model(batch, features)) - expected).abs().max())
        print(f"{len(prompt.tokens)} tokens, {len(features)} of them visual: logits differ by {worst:.1e}")
        assert worst < 1e-4


def reference(transformers, directory: Path, folder: Path):
    """DeepseekV3ForCausalLM over the tensors of ``directory`` that are not of its vision side."""
    folder.mkdir()
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {name: x for name, x in tensors.items() if not name.startswith(("visual.", "mlp_AR."))},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_nextn_predict_layers": 0}
    del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    model, report = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


# ---- files


def test_load_save_load_is_what_was_stored(tmp_path: Path) -> None:
    directory = make_tiny(tmp_path / "made", "KeyeVLMoe", seed=3)
    stored = load_file(directory / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"visual", "mlp_AR", "model", "lm_head"}
    extra = {"model.layers.2.eh_proj.weight": torch.ones(3), "visual.vision_model.head.probe": torch.ones(1)}
    save_file(stored | extra, directory / "model.safetensors")
    save_model(load_model(directory), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert stored.keys() == again.keys() and all(torch.equal(stored[name], again[name]) for name in stored)


def test_weights_of_another_projector_are_refused(tmp_path: Path) -> None:
    """The Preview's projector normalises each patch alone; its norm is a quarter as wide."""
    directory = make_tiny(tmp_path, "KeyeVLMoe")
    stored = load_file(directory / "model.safetensors")
    narrow = {f"mlp_AR.pre_norm.{name}": stored[f"mlp_AR.pre_norm.{name}"][:32].clone() for name in ("weight", "bias")}
    save_file(stored | narrow, directory / "model.safetensors")
    with pytest.raises(TensorError, match=r"mlp_AR\.pre_norm\.weight' has shape \[32\], expected \[128\]"):
        load_model(directory)
