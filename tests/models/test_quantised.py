"""Quantised checkpoints from end to end: what the files mean is what is computed, and what is wrong in them is named."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from packers import FORMS, Packer, gptq
from safetensors.torch import load_file, save_file
from tiny import make_tiny, make_tiny_keye, media_batch, pack, random_prompt
from torch import Tensor, nn

from mirada import VLM, Message, Sampling, adapt
from mirada.adapt.packed import PackedLinear, PackedRows, PackedStack
from mirada.engine.load import check_weights
from mirada.errors import NotAvailable, OutOfMemory, TensorError
from mirada.models import quantised, shards
from mirada.models.layout import Layout, Rule
from mirada.models.load import load_model, load_weights, save_model
from mirada.types import Prompt

COVERED = re.compile(r"(language_model\.)?model\.(language_model\.)?layers\.\d+\.(self_attn|mlp)\.[\w.]+_proj\w*\.weight")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_keye(tmp_path_factory.mktemp("tiny"), "KeyeVL1_5", 3)


def quantise(made: Path, out: Path, config: dict, packer: Packer, which: re.Pattern[str] = COVERED) -> tuple[Path, Path]:
    """Two copies of a checkpoint: packed, and plain with the weights that the packed one means."""
    tensors = load_file(made / "model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    for name in filter(which.match, tensors):
        stored, plain[name] = packer(packed.pop(name))
        packed |= {f"{name.removesuffix('weight')}{suffix}": t.contiguous() for suffix, t in stored.items()}
    settings = json.loads((made / "config.json").read_text())
    for folder, held, extra in (("packed", packed, {"quantization_config": config}), ("plain", plain, {})):
        shutil.copytree(made, out / folder)
        save_file(held, out / folder / "model.safetensors")
        (out / folder / "config.json").write_text(json.dumps(settings | extra))
    return out / "packed", out / "plain"


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    config = model.config
    prompt, grids = random_prompt(np.random.default_rng(5), (config.image_token_id, config.video_token_id), True)
    assert grids
    features = model.encode(media_batch(grids, torch.Generator().manual_seed(1)))
    return model.logits(model(pack([prompt]), features))


def modules(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_checkpoint_is_the_float_checkpoint_it_means(made: Path, tmp_path: Path, form: str) -> None:
    config, packer = FORMS[form]
    packed, plain = quantise(made, tmp_path, config, packer)
    model, expected = load_model(packed), logits(load_model(plain))
    assert len(modules(model, PackedRows)) == 2 * 7 and len(modules(model, PackedLinear)) == 2 * 4
    assert not [name for name in modules(model, PackedRows) if not name.startswith("decoder.layers.")]
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    wide = load_model(packed, widen=True)
    assert not modules(wide, PackedRows)
    for (name, ours), theirs in zip(wide.named_parameters(), load_model(plain).parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    fused = model.decoder.layers[1].attention.qkv
    assert torch.equal(fused.weight, wide.decoder.layers[1].attention.qkv.weight)


@torch.no_grad()
def text_logits(model: nn.Module) -> Tensor:
    return model.logits(model(pack([Prompt(tuple(range(40, 70)))])))


FAMILY_FORMS = {
    "Keye": "gptq asymmetric", "qwen2_vl": "gptq 4", "kimi_vl": "compressed 4", "KeyeVLMoe": "fp8 small blocks",
}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILY_FORMS)
def test_every_family(tmp_path: Path, model_type: str) -> None:
    config, packer = FORMS[FAMILY_FORMS[model_type]]
    packed, plain = quantise(make_tiny(tmp_path / "made", model_type), tmp_path, config, packer)
    model, expected = load_model(packed), text_logits(load_model(plain))
    held = modules(model, PackedRows)
    assert held and all(name.startswith("decoder.layers.") for name in held)
    torch.testing.assert_close(text_logits(model), expected, atol=1e-4, rtol=0)
    assert torch.equal(text_logits(load_model(packed, widen=True)), expected)


NEWER = {"model": "language_model", "visual": "visual"}


def test_the_newer_names_of_qwen2_vl(tmp_path: Path) -> None:
    made = make_tiny(tmp_path / "made", "qwen2_vl")
    stored = load_file(made / "model.safetensors")
    newer = {re.sub(r"^(model|visual)\.", lambda m: f"model.{NEWER[m[1]]}.", name): t for name, t in stored.items()}
    assert set(newer) != set(stored)
    save_file(newer, made / "model.safetensors")
    packed, plain = quantise(made, tmp_path, *FORMS["awq"])
    model = load_model(packed)
    assert len(modules(model, PackedRows)) == 14
    torch.testing.assert_close(text_logits(model), text_logits(load_model(plain)), atol=1e-4, rtol=0)


def test_settings_may_stand_in_the_text_config(tmp_path: Path) -> None:
    packed, plain = quantise(make_tiny(tmp_path / "made", "kimi_vl"), tmp_path, *FORMS["compressed 4"])
    config = json.loads((packed / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(text_logits(load_model(packed)), text_logits(load_model(plain)), atol=1e-4, rtol=0)
    save_model(load_model(packed, widen=True), tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert torch.equal(text_logits(load_model(tmp_path / "out")), text_logits(load_model(plain)))


def test_packed_matrices_go_where_their_layer_goes(made: Path, tmp_path: Path) -> None:
    packed, _ = quantise(made, tmp_path, *FORMS["gptq act-order"])
    model = load_model(packed, place=lambda name: torch.device("meta" if ".layers.1." in name else "cpu"))
    assert {t.device.type for t in model.decoder.layers[0].buffers()} == {"cpu"}
    assert {t.device.type for t in model.decoder.layers[1].buffers()} == {"meta"}


def test_the_quantised_model_differs_from_the_one_it_was_made_of(made: Path, tmp_path: Path) -> None:
    config, packer = FORMS["gptq 4"]
    packed, _ = quantise(made, tmp_path, config, packer)
    assert (logits(load_model(packed)) - logits(load_model(made))).abs().max() > 1e-2


def test_memory_stays_packed(made: Path, tmp_path: Path) -> None:
    config, packer = FORMS["gptq 4"]
    packed, plain = quantise(made, tmp_path, config, packer)

    def size(model: nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in (*model.decoder.layers.parameters(), *model.decoder.layers.buffers()))

    assert size(load_model(packed)) < 0.21 * size(load_model(plain))  # 4 bits, and 24 for each 32 columns, of 32


def test_an_engine_answers_alike(made: Path, tmp_path: Path) -> None:
    config, packer = FORMS["awq"]
    packed, plain = quantise(made, tmp_path, config, packer)
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    texts = [
        VLM(folder, device="cpu", widen=widen).generate([[Message("user", "say something")]], sampling)[0].message.text
        for folder, widen in ((packed, False), (packed, True), (plain, False))
    ]
    assert texts[0] == texts[1] == texts[2] != ""


def test_the_need_for_memory_counts_what_is_held(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, packer = FORMS["gptq 4"]
    packed, plain = quantise(made, tmp_path, config, packer)
    monkeypatch.setattr("mirada.engine.memory.available", lambda device: 0)

    def needed(folder: Path, dtype: torch.dtype, widen: bool = False) -> int:
        with pytest.raises(OutOfMemory) as caught:
            check_weights(folder, dtype, torch.device("cpu"), widen)
        return caught.value.needed

    def held(model: nn.Module) -> int:
        return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))

    assert needed(plain, torch.float32) == held(load_model(plain)) == needed(packed, torch.float32, widen=True)
    assert needed(plain, torch.bfloat16) == held(load_model(plain, torch.bfloat16))
    # Words and zeros are counted as stored: zeros are held as bytes, and an order of columns that is plain is not held.
    assert 1 <= needed(packed, torch.float32) / held(load_model(packed)) < 1.03


# ---- mixtures


def test_matrices_left_plain_stay_plain_even_inside_a_fused_one(made: Path, tmp_path: Path) -> None:
    config, packer = FORMS["gptq 4"]
    which = re.compile(r"model\.layers\.(0\.self_attn\.[kv]_proj|1\.mlp\.(up|down)_proj)\.weight")
    packed, plain = quantise(made, tmp_path, config, packer, which)
    model = load_model(packed)
    assert modules(model, PackedRows) == [
        "decoder.layers.0.attention.qkv.parts.1", "decoder.layers.0.attention.qkv.parts.2",
        "decoder.layers.1.mlp.gate_up.parts.1", "decoder.layers.1.mlp.down.parts.0",
    ]  # fmt: skip
    torch.testing.assert_close(logits(model), logits(load_model(plain)), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(load_model(packed, widen=True)), logits(load_model(plain)), atol=0, rtol=0)


def test_shards_may_part_a_matrix_from_its_scales(made: Path, tmp_path: Path) -> None:
    config, packer = FORMS["gptq act-order"]
    packed, plain = quantise(made, tmp_path, config, packer)
    tensors = load_file(packed / "model.safetensors")
    (packed / "model.safetensors").unlink()
    halves = [{n: t for n, t in tensors.items() if n.endswith("qweight") == first} for first in (True, False)]
    for i, half in enumerate(halves):
        save_file(half, packed / f"model-{i + 1:05d}-of-00002.safetensors")
    torch.testing.assert_close(logits(load_model(packed)), logits(load_model(plain)), atol=1e-4, rtol=0)


def test_bfloat16_computes_near(made: Path, tmp_path: Path) -> None:
    config, packer = FORMS["fp8"]
    packed, plain = quantise(made, tmp_path, config, packer)
    ours, theirs = logits(load_model(packed, torch.bfloat16)), logits(load_model(plain, torch.bfloat16))
    assert load_model(packed, torch.bfloat16).decoder.layers[0].mlp.down.parts[0].scales.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_zero_biases_of_autogptq_are_accepted(made: Path, tmp_path: Path) -> None:
    config, packer = FORMS["gptq 4"]
    packed, plain = quantise(made, tmp_path, config, packer)
    file = packed / "model.safetensors"
    tensors = load_file(file)
    zeros = {f"model.layers.{i}.mlp.down_proj.bias": torch.zeros(64, dtype=torch.float16) for i in range(2)}
    save_file(tensors | zeros, file)
    torch.testing.assert_close(logits(load_model(packed)), logits(load_model(plain)), atol=1e-4, rtol=0)
    zeros["model.layers.1.mlp.down_proj.bias"][7] = 0.5
    save_file(tensors | zeros, file)
    with pytest.raises(TensorError, match=r"'model.layers.1.mlp.down_proj.bias' is not zero"):
        load_model(packed)


# ---- saving


def test_a_widened_model_is_saved_plain(made: Path, tmp_path: Path) -> None:
    config, packer = FORMS["awq"]
    packed, plain = quantise(made, tmp_path, config, packer)
    save_model(load_model(packed, widen=True), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(plain / "model.safetensors")
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_packed_model_is_not_saved_as_something_else(made: Path, tmp_path: Path) -> None:
    config, packer = FORMS["awq"]
    packed, _ = quantise(made, tmp_path, config, packer)
    with pytest.raises(NotAvailable, match="widen=True"):
        save_model(load_model(packed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- what is wrong is named

Q = "model.layers.0.self_attn.q_proj"
Spoil = Callable[[dict[str, Tensor]], object]
BROKEN: dict[str, tuple[str, Spoil, str]] = {
    "scales missing": (
        "gptq 4", lambda t: t.pop(f"{Q}.scales"), rf"lacks tensor '{Q}.scales' of shape \[2, 64\].*'{Q}.weight'"
    ),
    "zeros missing": ("awq", lambda t: t.pop(f"{Q}.qzeros"), f"lacks tensor '{Q}.qzeros'"),
    "words missing": ("awq", lambda t: t.pop(f"{Q}.qweight"), f"lacks tensor '{Q}.qweight'"),
    "order missing": ("gptq act-order", lambda t: t.pop(f"{Q}.g_idx"), f"lacks tensor '{Q}.g_idx'"),
    "inverse scales missing": ("fp8", lambda t: t.pop(f"{Q}.weight_scale_inv"), f"lacks tensor '{Q}.weight_scale_inv'"),
    "shape missing": ("compressed 4", lambda t: t.pop(f"{Q}.weight_shape"), f"lacks tensor '{Q}.weight_shape'"),
    "all of it missing": (
        "gptq 4", lambda t: [t.pop(f"{Q}.{s}") for s in ("qweight", "qzeros", "scales", "g_idx")], f"lacks tensor '{Q}.weight'",
    ),
    "another group size": (
        "gptq 4", lambda t: t.update({f"{Q}.scales": torch.ones(1, 64)}), r"scales' has shape \[1, 64\], expected \[2, 64\]",
    ),
    "float words": ("awq", lambda t: t.update({f"{Q}.qweight": torch.ones(64, 8)}), "qweight' is stored as F32, expected I32"),
    "plain beside scales": (
        "fp8", lambda t: t.update({f"{Q}.weight": torch.ones(64, 64)}), "q_proj.weight' is stored as F32, expected F8_E4M3",
    ),
    "packed twice": (
        "awq", lambda t: t.update({f"{Q}.weight": torch.ones(64, 64)}), f"'{Q}.weight' is stored plain and packed"
    ),
    "packed head": (
        "gptq 4", lambda t: t.update({"lm_head.qweight": torch.ones(8, 298).int()}), "'lm_head.qweight' packs a matrix that",
    ),
    "fp8 norm": (
        "fp8", lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}), "is stored as F8_E4M3",
    ),
    "extra": ("gptq 4", lambda t: t.update({f"{Q}.perm": torch.ones(2)}), f"holds tensor '{Q}.perm'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("widen", [False, True])
def test_a_broken_checkpoint_names_what_is_wrong(made: Path, tmp_path: Path, name: str, widen: bool) -> None:
    form, spoil, said = BROKEN[name]
    packed, _ = quantise(made, tmp_path, *FORMS[form])
    tensors = load_file(packed / "model.safetensors")
    spoil(tensors)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(TensorError, match=said) as caught:
        load_model(packed, widen=widen)
    assert caught.value.fix


def test_packed_tensors_without_a_config_that_says_so(made: Path, tmp_path: Path) -> None:
    packed, _ = quantise(made, tmp_path, *FORMS["gptq 4"])
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    with pytest.raises(TensorError, match="packs a matrix that quantization_config leaves plain"):
        load_model(packed)


# ---- stacked experts, and matrices that another module reads


class Block(nn.Module):
    """Two experts of two fused matrices, and a Linear whose weight is read as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, 16, 64))
        self.read = nn.Linear(64, 8, bias=False)
        self.read.stays_float = True


def block_layout() -> Layout:
    names = [f"model.layers.0.mlp.experts.{e}.{x}_proj.weight" for e in range(2) for x in ("gate", "up")]
    return Layout(
        (
            Rule("gate_up", tuple((name, (8, 64)) for name in names), "stack"),
            Rule("read.weight", (("model.layers.0.self_attn.kv_b_proj.weight", (8, 64)),)),
        )
    )


@pytest.mark.parametrize("form", ["fp8", "gptq act-order"])
def test_stacked_matrices_stay_packed_and_read_ones_are_widened(tmp_path: Path, form: str) -> None:
    config, packer = FORMS[form]
    layout, tensors, meant = block_layout(), {}, {}
    for name in layout.stored():
        stored, meant[name] = packer(torch.randn(8, 64))
        tensors |= {f"{name.removesuffix('weight')}{suffix}": t for suffix, t in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    scheme, stored = adapt.read({"quantization_config": config}), shards.read_all([tmp_path / "model.safetensors"])
    model = Block()
    assert math.prod(model.gate_up.shape) == 2 * 16 * 64
    quantised.replace(model, quantised.check(layout, stored, scheme))
    load_weights(model, layout, stored, scheme)
    wide = list(meant.values())
    assert isinstance(model.gate_up, PackedStack) and len(model.gate_up) == 2
    assert torch.equal(model.gate_up[0], torch.cat(wide[:2])) and torch.equal(model.gate_up[1], torch.cat(wide[2:4]))
    assert type(model.read) is nn.Linear and torch.equal(model.read.weight, wide[4])
    plain = Block()
    load_weights(plain, layout, stored, scheme)
    assert torch.equal(plain.gate_up, torch.cat(wide[:4]).view(2, 16, 64))


def test_the_packers_of_these_tests_tell_orders_apart() -> None:
    weight = torch.randn(8, 64)
    assert not torch.equal(gptq(weight, 32, shuffled=1)[1], gptq(weight, 32)[1])
