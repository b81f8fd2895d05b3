"""The checks themselves: other directories of the same form, fewer files, and what must not pass unseen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.checks import collect
from parity.conftest import KEYE as GOLDEN
from parity.golden import Case, load_reference_model
from safetensors.torch import load_file, save_file
from tiny import randomise, tiny_config

from mirada.models.load import build, save_model

NAMES = (
    "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
IDS = {name: 90 + i for i, name in enumerate(NAMES)}
START, END, IMAGE, VIDEO = (IDS[f"<|{name}|>"] for name in ("vision_start", "vision_end", "image_pad", "video_pad"))


def other_config() -> dict[str, Any]:
    """Other sizes and depths than the directory that is shipped: heads of 24 (vision) and 12 (text), three and one layers."""
    vision = {"hidden_size": 72, "num_attention_heads": 3, "num_hidden_layers": 3, "intermediate_size": 50, "image_size": 60}
    config = tiny_config("Keye", IDS)
    config |= {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12, "num_hidden_layers": 1}
    config |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 3]}, "rope_theta": 5000, "intermediate_size": 40}
    return config | {"vision_config": config["vision_config"] | vision}


@torch.no_grad()
def write_other(directory: Path) -> None:
    """A directory of goldens that our own model made (so its numbers prove nothing; how it is read does)."""
    model = build(other_config())
    randomise(model, 5)
    for file in save_model(model, directory):
        file.rename(directory / "model_weights.safetensors")
    (directory / "config.json").rename(directory / "model_config.json")
    row = [1, START, *[IMAGE] * 6, END, 7, START, *[VIDEO] * 8, END, 2, 3]
    inputs = {
        "input_ids": torch.tensor([row]),
        "attention_mask": torch.ones(1, len(row), dtype=torch.long),
        "pixel_values": torch.randn(24, 3, 14, 14, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values_videos": torch.randn(32, 3, 14, 14, generator=torch.Generator().manual_seed(1)),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "second_per_grid_ts": torch.tensor([0.7]),
    }
    loaded = load_reference_model(directory / "model_config.json", directory / "model_weights.safetensors")
    case = Case(loaded, inputs)
    case.logits  # noqa: B018  (fills what is seen on the way)
    made = {name: tensor[None] if name.startswith(("text", "inputs")) else tensor for name, tensor in case.seen.items()}
    made |= {"logits": case.logits[None], "generated": torch.tensor(case.greedy(4)[0])}
    made["position_ids"] = torch.from_numpy(case.places[0][0])[:, None]
    made["rope_deltas"] = torch.tensor([[case.places[0][1] - len(row)]])
    tensors = {f"one.{name}": tensor.contiguous().clone() for name, tensor in (inputs | made).items()}
    save_file(tensors, directory / "model_goldens.safetensors")


def run(directory: Path) -> dict[str, str]:
    """Name of each check that fails -> what it says."""
    failed = {}
    for name, check in collect(directory).items():
        try:
            check()
        except AssertionError as error:
            failed[name] = str(error)
    return failed


def test_a_directory_of_other_sizes_is_checked_whole(tmp_path: Path) -> None:
    write_other(tmp_path)
    found = collect(tmp_path)
    assert run(tmp_path) == {}
    whats = {name.split("one.")[1] for name in found}
    assert {"image_vision_layer2", "video_projected", "text_layer0", "logits", "position_ids", "generated_cached"} <= whats
    tensors = load_file(tmp_path / "model_goldens.safetensors")
    recorded = {name[4:] for name in tensors} - {"input_ids", "attention_mask", "second_per_grid_ts"}
    inputs = {name for name in recorded if name.startswith("pixel_values") or name.endswith("grid_thw")}
    assert whats == recorded - inputs | {"generated_cached"}


@pytest.mark.parametrize(
    "name", ["image_vision_layer1", "video_projected", "inputs_embeds", "logits", "position_ids", "generated"]
)
def test_any_recorded_value_that_is_off_fails_its_own_check(tmp_path: Path, name: str) -> None:
    write_other(tmp_path)
    tensors = load_file(tmp_path / "model_goldens.safetensors")
    tensors[f"one.{name}"].view(-1)[-1] += 1
    save_file(tensors, tmp_path / "model_goldens.safetensors")
    expected = {f"model_goldens.safetensors: one.{name}"}
    if name == "generated":
        expected.add("model_goldens.safetensors: one.generated_cached")
    assert set(run(tmp_path)) == expected


def test_an_unknown_tensor_fails(tmp_path: Path) -> None:
    write_other(tmp_path)
    tensors = load_file(tmp_path / "model_goldens.safetensors")
    save_file(
        tensors | {"one.text_layer7": torch.zeros(1), "one.secret": torch.zeros(1)}, tmp_path / "model_goldens.safetensors"
    )
    failed = run(tmp_path)
    assert set(failed) == {"model_goldens.safetensors: one.text_layer7", "model_goldens.safetensors: one.secret"}


def test_fewer_files_are_checked_for_what_they_hold(tmp_path: Path) -> None:
    for name in ("chat_template.json", "param_layout_8b_preview.json"):
        shutil.copy(GOLDEN / name, tmp_path)
    assert len(collect(tmp_path)) == 13 and run(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model_goldenz.safetensors", b"", "unknown"),
        ("model_goldens.safetensors", b"", "incomplete"),
        ("image_processor.json", b'{"images": []}', "empty"),
        ("keye15_processor.json", b"[]", "empty"),
        ("chat_template.json", b'{"other_template": []}', "facts"),
        ("resize_and_sampling_tables.json", b'{"smart_resize_3": [[1, 2, 3]]}', "smart_resize_3"),
    ],
)
def test_nothing_passes_unseen(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{name}: {said}" in run(tmp_path)


def test_facts_that_no_check_knows_fail(tmp_path: Path) -> None:
    facts = json.loads((GOLDEN / "slowfast_1.5.2.json").read_text())
    facts["cases"] = [facts["cases"][0] | {"blur": 1}]
    (tmp_path / "slowfast_1.5.2.json").write_text(json.dumps(facts))
    assert set(run(tmp_path)) == {"slowfast_1.5.2.json: two_scenes"}


def test_an_empty_directory_holds_no_check(tmp_path: Path) -> None:
    assert collect(tmp_path) == {}
    (tmp_path / "README.md").write_text("nothing")
    assert collect(tmp_path) == {}
