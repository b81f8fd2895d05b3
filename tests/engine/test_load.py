"""From a name to an engine, or to an error that says what is missing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image as Pillow

from mirada import VLM, Image, Message, Sampling, Text
from mirada.engine.load import area_of, pick_device, pick_dtype
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


def test_pictures_are_bounded_in_tokens(tiny_directories):
    """For a whole model and for one question; a family that adds borders may spend one more on each side."""
    picture, most = Pillow.new("RGB", (400, 400)), 9
    chat = [Message("user", [Image(picture), Text("?")])]
    for directory in tiny_directories.values():
        with VLM(directory, device="cpu", max_image_tokens=most) as small, VLM(directory, device="cpu") as plain:
            spent = [vlm._requests.make(chat, Sampling(), "auto").prompt for vlm in (small, plain)]
            least, more = (sum(span.num_tokens for span in prompt.spans) for prompt in spent)
            border = small.parts.rule.grid.border == "pad"
            assert most / 2 < least <= (most**0.5 + border) ** 2 < more
            with pytest.MonkeyPatch.context() as patch:
                seen = []
                patch.setattr(plain, "submit", lambda chat, *_, seen=seen, **__: seen.append(chat) or pytest.fail("seen"))
                with pytest.raises(pytest.fail.Exception):
                    plain.ask(picture, "?", max_image_tokens=most)
            asked = plain._requests.make(seen[0], Sampling(), "auto").prompt
            assert sum(span.num_tokens for span in asked.spans) == least


def test_tokens_of_a_picture_that_make_no_sense(tiny_directories):
    with VLM(tiny_directories["qwen2_vl"], device="cpu") as vlm:
        grid = vlm.parts.rule.grid
        assert area_of(None, grid) is None and area_of(None, grid, 5) == 5 and area_of(64, grid) == 64 * 784
        for options, said in (
            ({"max_image_tokens": 0}, "positive"), ({"max_image_tokens": "9"}, "positive"),
            ({"max_image_tokens": True}, "positive"),
            ({"max_image_tokens": 64, "max_pixels": 9000}, "beside max_pixels"), ({"max_image_tokens": 1}, "at least"),
        ):  # fmt: skip
            with pytest.raises(SettingsError, match=said):
                vlm.ask(Pillow.new("RGB", (60, 60)), "?", **options)
            with pytest.raises(SettingsError, match=said):
                VLM(tiny_directories["qwen2_vl"], device="cpu", **options)
    with pytest.raises(SettingsError, match="max_pixels is for"):
        VLM(tiny_directories["qwen2_vl"], device="cpu").ask("no picture", max_image_tokens=64)
