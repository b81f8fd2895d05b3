"""Kimi-VL beside transformers, live: random models of three sizes, random chats of text and pictures.

transformers has no Kimi-VL, but its Kimi-K2.5 is the same model where every picture has one frame, but for names and for the
order of channels in queries and keys of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import media_batch, pack, random_prompt, randomise
from tiny_deepseek import KIMI_CONTROL, kimi_config
from torch import Tensor

from mirada.layers.moe import MoE
from mirada.layers.rope import pairs_to_halves
from mirada.models.family import FAMILIES
from mirada.models.load import build

ATOL = 1e-4
IDS = {name: 300 + i for i, name in enumerate(KIMI_CONTROL)}
PAD = IDS["<|media_pad|>"]
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as released": ({"init_pos_emb_height": 8, "init_pos_emb_width": 8}, {}),
    "heads of 24, one table of 5": (
        {"hidden_size": 72, "num_attention_heads": 3, "init_pos_emb_height": 5, "init_pos_emb_width": 5},
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "rope_theta": 10000.0, "n_shared_experts": 1},
    ),
    "low-rank queries, groups": (
        {"intermediate_size": 50, "init_pos_emb_height": 7, "init_pos_emb_width": 7},
        {"q_lora_rank": 20, "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_hidden_layers": 3},
    ),
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    config = kimi_config("kimi_vl", IDS)
    vision, text = SIZES[name]
    config["vision_config"] |= vision
    config["text_config"] |= text
    return config


def reference(config: dict[str, Any], model: Any) -> Any:
    """transformers' model with the weights of ``model``; every parameter of it is set."""
    kimi = pytest.importorskip("transformers.models.kimi_k25", reason="needs transformers 5.23 or later")
    v = config["vision_config"]
    vision = {name: v[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    vision |= {"pos_emb_height": v["init_pos_emb_height"], "pos_emb_width": v["init_pos_emb_width"]}
    made = kimi.Kimi_K25ForConditionalGeneration(
        kimi.Kimi_K25Config(
            text_config=config["text_config"] | {"model_type": "deepseek_v3"}, vision_config=vision, image_token_id=PAD,
            projection_hidden_size=v["hidden_size"], tie_word_embeddings=False,
        )
    )  # fmt: skip
    held = made.state_dict()
    for name, tensor in theirs(model):
        held.pop(name).copy_(tensor)
    assert not held, f"left as they were: {sorted(held)}"
    return made.eval()


def theirs(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Our weights under the names, and in the order of channels, of transformers."""
    heads = model.config.vision.num_attention_heads
    for name, tensor in FAMILIES["kimi_vl"].layout(model.config).read(dict(model.named_parameters())):
        if ".experts." in name:
            continue
        if name.startswith("vision_tower.encoder.blocks") and "wqkv" in name:
            for x, part in zip("qkv", tensor.chunk(3), strict=True):
                rows = part.view(heads, -1, *part.shape[1:])
                if x != "v":
                    rows = pairs_to_halves(rows.transpose(1, -1)).transpose(1, -1)
                yield their_name(name).replace("qkv", f"{x}_proj"), rows.reshape(part.shape)
        else:
            yield their_name(name), tensor
    for i, layer in enumerate(model.decoder.layers):
        if isinstance(layer.mlp, MoE):
            yield f"model.language_model.layers.{i}.mlp.experts.gate_up_proj", layer.mlp.experts.gate_up
            yield f"model.language_model.layers.{i}.mlp.experts.down_proj", layer.mlp.experts.down


def their_name(name: str) -> str:
    for old, new in (
        ("language_model.lm_head", "lm_head"), ("language_model.model.", "model.language_model."),
        ("multi_modal_projector.linear_1", "model.mm_projector.in_proj"),
        ("multi_modal_projector.linear_2", "model.mm_projector.out_proj"),
        ("multi_modal_projector", "model.mm_projector"), ("vision_tower.encoder.blocks", "model.vision_tower.layers"),
        ("vision_tower.encoder.", "model.vision_tower."), ("vision_tower.patch_embed", "model.vision_tower.patch_embed"),
        ("pos_emb.weight", "pos_emb.position_embeddings"), ("wqkv", "attn.qkv"), (".wo.", ".attn.proj."),
        (".fc1.", ".fc2."), (".fc0.", ".fc1."), (".norm1.", ".norm2."), (".norm0.", ".norm1."),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


@torch.no_grad()
@pytest.mark.reference
@pytest.mark.parametrize("name", SIZES)
def test_features_and_logits(name: str) -> None:
    config = config_of(name)
    model = build(config)
    randomise(model, 3)
    other, random = reference(config, model.eval()), np.random.default_rng(1)
    worst = {"features": 0.0, "logits": 0.0}
    for seed in range(6):
        prompt, grids = random_prompt(random, (PAD, None), False, True)
        batch, given, features = pack([prompt]), {}, None
        if grids:
            media = media_batch(grids, torch.Generator().manual_seed(seed))
            features, rows = model.encode(media), torch.tensor(grids)
            expected = torch.cat(other.model.get_image_features(media.pixels, rows, return_dict=True).pooler_output)
            worst["features"] = max(worst["features"], float((features - expected).abs().max()))
            given = {"pixel_values": media.pixels, "image_grid_thw": rows}
        expected = other(input_ids=batch.tokens[None], **given).logits[0]
        assert expected.std() > 0.3
        worst["logits"] = max(worst["logits"], float((model.logits(model(batch, features)) - expected).abs().max()))
    print(f"{name}: features differ by {worst['features']:.1e}, logits by {worst['logits']:.1e}")
    assert 0 < worst["features"] < ATOL and worst["logits"] < ATOL
