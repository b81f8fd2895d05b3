"""Directories of Kimi-VL of other sizes, seeds and groups of experts, and what must not pass unseen in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.checks import collect
from parity.kimi import KimiCase
from parity.test_harness import run
from safetensors.torch import load_file, save_file
from tiny import randomise
from tiny_deepseek import KIMI_CONTROL, KIMI_FILE, kimi_config

from mirada.models.load import build, save_model

IDS = {name: 90 + i for i, name in enumerate(KIMI_CONTROL)}
PAD = IDS["<|media_pad|>"]


def other_config() -> dict[str, Any]:
    """Heads of 24 in the tower; low-rank queries, four groups of experts, YaRN, two dense layers first."""
    config = kimi_config("kimi_vl", IDS)
    config["vision_config"] |= {"hidden_size": 72, "num_attention_heads": 3, "num_hidden_layers": 1, "init_pos_emb_width": 9}
    yarn = {"type": "yarn", "factor": 8, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
    config["text_config"] |= {
        "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 20,
        "kv_lora_rank": 16, "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "rope_theta": 5000.0,
        "rope_scaling": yarn, "first_k_dense_replace": 2,
    }  # fmt: skip
    return config


@torch.no_grad()
def write_other(directory: Path) -> None:
    """A directory of goldens that our own model made (so its numbers prove nothing; how it is read does)."""
    model = build(other_config())
    randomise(model, 5)
    save_model(model, directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(KIMI_FILE))
    inputs = {
        "input_ids": torch.tensor([[1, *[PAD] * 6, 7, 8, *[PAD] * 2, 2, 3]]),
        "pixel_values": torch.randn(32, 3, 14, 14, generator=torch.Generator().manual_seed(0)),
        "image_grid_hws": torch.tensor([[4, 6], [2, 4]]),
    }
    case = KimiCase(model.eval(), inputs)
    made = {"logits": case.logits[None], "hidden_last_norm": case.hidden[None], "image_features": case.features}
    made |= {"generated_ids": torch.tensor([case.greedy(4)]), **case.seen} | {"hidden_first": case.seen["hidden_first"][None]}
    save_file({name: x.contiguous().clone() for name, x in (inputs | made).items()}, directory / "case.safetensors")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    write_other(folder)
    return folder


def test_a_directory_of_other_sizes_is_checked_whole(other: Path) -> None:
    found = {name.split(": ")[1] for name in collect(other)}
    assert found == {
        "patch_embed_out", "encoder_out", "image_features", "hidden_first", "hidden_last_norm", "logits", "generated_ids",
        "generated_ids over a cache", "router_l2_indices_sorted", "router_l2_weights", "router_l3_indices_sorted",
        "router_l3_weights", "names and shapes",
    }  # fmt: skip
    assert run(other) == {}


@pytest.mark.parametrize("name", ["patch_embed_out", "image_features", "router_l3_weights", "logits", "generated_ids"])
def test_any_recorded_value_that_is_off_fails_its_own_check(other: Path, tmp_path: Path, name: str) -> None:
    for file in other.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "case.safetensors")
    tensors[name].view(-1)[-1] += 1
    save_file(tensors | {"router_l1_weights": torch.zeros(13, 2), "secret": torch.zeros(1)}, tmp_path / "case.safetensors")
    expected = {f"case.safetensors: {one}" for one in (name, "router_l1_weights", "secret")}
    if name == "generated_ids":
        expected.add("case.safetensors: generated_ids over a cache")
    assert set(run(tmp_path)) == expected


def test_a_directory_of_an_unknown_family_fails(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "kimi_v1"}')
    assert set(run(tmp_path)) == {"config.json: family"}
    (tmp_path / "config.json").write_text('{"model_type": "kimi_vl"}')
    (tmp_path / "case.safetensors").write_bytes(b"")
    assert set(run(tmp_path)) == {"case.safetensors: incomplete"}
    (tmp_path / "cases.safetensors").write_bytes(b"")
    assert set(run(tmp_path)) == {"case.safetensors: incomplete", "cases.safetensors: unknown"}
