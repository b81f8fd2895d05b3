"""From a name to an engine, or to an error that says what is missing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mirada import VLM, Message, Sampling
from mirada.engine.load import pick_device, pick_dtype
from mirada.errors import CheckpointError, ConfigError, NotAvailable, SettingsError, TensorError

CPU = torch.device("cpu")


@pytest.fixture
def copy(tiny_directories, tmp_path):
    made = tmp_path / "model"
    shutil.copytree(tiny_directories["KeyeVL1_5"], made)
    return made


def test_names(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing.*directory of a checkpoint"):
        VLM("nothing")
    with pytest.raises(ConfigError, match=r"config\.json"):
        VLM(tmp_path)


def test_devices():
    assert pick_device("cpu") == CPU
    assert pick_device(None).type in ("cpu", "cuda")
    for device in ("toaster", "meta", "cpu:x"):
        with pytest.raises(SettingsError, match="cpu, cuda"):
            pick_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_said(tiny_directories):
    with pytest.raises(NotAvailable, match="device='cpu'"):
        VLM(tiny_directories["Keye"], device="cuda")
    with pytest.raises(NotAvailable, match="mps"):
        pick_device("mps")


def test_types():
    config = {"torch_dtype": "bfloat16"}
    assert pick_dtype(None, CPU, config) == torch.float32
    assert pick_dtype(None, torch.device("cuda"), config) == torch.bfloat16
    assert pick_dtype("bf16", CPU, config) == pick_dtype(torch.bfloat16, CPU, config) == torch.bfloat16
    for bad in ("float8", torch.int8):
        with pytest.raises(SettingsError, match="dtype"):
            pick_dtype(bad, CPU, config)


def test_bfloat16_answers_much_alike(tiny_directories):
    sampling = Sampling(max_tokens=4, logprobs=0, ignore_eos=True)
    chat = [Message("user", "hi")]
    wide, narrow = (
        VLM(tiny_directories["Keye"], device="cpu", dtype=dtype).generate([chat], sampling)[0] for dtype in (None, "bf16")
    )
    assert narrow.error is None and wide.logprobs and narrow.logprobs
    assert abs(wide.logprobs[0].logprob - narrow.logprobs[0].logprob) < 0.3


def test_ends_come_from_every_file_that_names_them(copy):
    ids = VLM(copy, device="cpu").parts.renderer.tokenizer.control
    assert VLM(copy, device="cpu").parts.eos == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert 5 in VLM(copy, device="cpu").parts.eos
    (copy / "generation_config.json").unlink()
    assert ids["<|im_end|>"] in VLM(copy, device="cpu").parts.eos


def test_a_checkpoint_without_its_preprocessor_takes_the_familys_bounds(copy):
    (copy / "preprocessor_config.json").unlink()
    assert VLM(copy, device="cpu").parts.rule.grid.max_pixels > 100352


def test_broken_checkpoints_name_what_is_broken(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "Kaye"}))
    with pytest.raises(ConfigError, match=r"Kaye.*Keye"):
        VLM(copy, device="cpu")
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 168}))
    with pytest.raises(TensorError, match="mlp"):
        VLM(copy, device="cpu")
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        VLM(copy, device="cpu")
