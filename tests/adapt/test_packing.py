"""Packed integers: the released packers' own output, every form at ragged sizes, and the modules that compute with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packers import FORMS, awq_config, compressed_config, compressed_float_config, fp8_config, gptq_config
from safetensors.torch import load_file

from mirada import adapt
from mirada.adapt import packed as packing
from mirada.adapt.packed import Packed, PackedLinear, PackedRows, PackedStack
from mirada.errors import ConfigError, TensorError
from mirada.layers.linear import dequantise_rows, quantise_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen2_vl" / "quant_packing.safetensors"
X = "model.layers.0.mlp.down_proj"
NAME = f"{X}.weight"


def scheme_of(config: dict) -> adapt.Scheme:
    made = adapt.read({"quantization_config": config})
    assert made is not None
    return made


def unpack(config: dict, shape: tuple[int, int], tensors: dict[str, torch.Tensor]) -> Packed:
    scheme = scheme_of(config)
    named = {f"{X}.{suffix}": tensor for suffix, tensor in tensors.items()}
    fields = scheme.fields(NAME, shape)
    required = {name for name, field in fields.items() if not field.optional}
    assert scheme.covers(NAME, shape) and required <= set(named) <= set(fields)
    for name, tensor in named.items():
        assert tuple(tensor.shape) in fields[name].shapes, name
    return scheme.unpack(NAME, shape, named)


# ---- what AutoAWQ and AutoGPTQ packed


GOLDENS = {
    "awq": awq_config(32),
    "gptq4_sym": gptq_config(32),
    "gptq8_sym": gptq_config(32, bits=8),
    "gptq4_asym": gptq_config(32, sym=False),
    "gptq4_sym_actorder": gptq_config(32, desc_act=True),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_the_integers_of_the_released_packers(name: str) -> None:
    held = {key.removeprefix(f"{name}."): t for key, t in load_file(GOLDEN).items() if key.startswith(f"{name}.")}
    stored = {key: held[key] for key in ("qweight", "qzeros", "scales", "g_idx") if key in held}
    made = unpack(GOLDENS[name], (32, 64), stored)
    assert torch.equal(made.integers(), held["int_weight_out_in"].float())
    assert made.zeros is not None and torch.equal(made.zeros.int(), held["int_zero_out_group"])
    assert torch.equal(made.scales, held["scales"].T)
    assert (made.groups is not None) == ("actorder" in name)
    # AutoAWQ multiplies in float16: its product is one rounding away from the exact one.
    theirs = held["dequant_weight_out_in"]
    if name == "awq":
        assert torch.equal(made.widen().half().float(), theirs) and (made.widen() - theirs).abs().max() < 1.3e-4
    else:
        assert torch.equal(made.widen(), theirs)
    x = torch.randn(3, 64)
    rows = PackedRows(32, 64)
    rows.fill(made, "cpu")
    linear = PackedLinear([rows], torch.nn.Parameter(held["bias"].float()), 64)
    torch.testing.assert_close(
        linear(x), F.linear(x, theirs, held["bias"].float()), atol=2e-3 if name == "awq" else 1e-5, rtol=0
    )


# ---- every form, at sizes that divide nothing


@pytest.mark.parametrize("shape", [(32, 64), (13, 27), (130, 257), (1, 9)])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_at_ragged_sizes(form: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    config, packer = FORMS[form]
    stored, meant = packer(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    made = unpack(config, shape, stored)
    assert torch.equal(made.widen(), meant)
    assert torch.equal(made.widen(min(5, shape[0] - 1), min(9, shape[0])), meant[min(5, shape[0] - 1) : 9])
    monkeypatch.setattr(packing, "TILE_BYTES", 4 * shape[1] * 3)
    assert [b - a for a, b in made.tiles()][:-1] == [3] * ((shape[0] - 1) // 3)
    rows = PackedRows(*shape)
    rows.fill(made, "cpu")
    x = torch.randn(2, 4, shape[1])
    torch.testing.assert_close(rows(x), F.linear(x, meant), atol=1e-4, rtol=1e-5)
    assert torch.equal(rows.weight, meant)


@pytest.mark.parametrize(("form", "most"), [("gptq asymmetric", 15), ("gptq 8 asymmetric", 255)])
def test_the_highest_stored_zero_of_gptq_stands_for_none(form: str, most: int) -> None:
    config, packer = FORMS[form]
    stored, _ = packer(torch.randn(8, 64))
    stored["qzeros"] = torch.full_like(stored["qzeros"], -1)  # all bits set
    made = unpack(config, (8, 64), stored)
    assert made.zeros is not None and most + 1 == 1 << made.bits and not made.zeros.any()


def test_every_fp8_number_is_widened_exactly() -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(16, 16)
    numbers = every[(every & 127) != 127].view(torch.float8_e4m3fn)[None]
    made = Packed(numbers, torch.ones(1, 1), 254)
    assert torch.equal(made.integers(), numbers.float()) and made.integers().abs().max() == 448
    config, packer = FORMS["fp8"]
    stored, _ = packer(torch.randn(8, 64))
    stored["weight"].view(torch.uint8)[3, 5] = 255
    with pytest.raises(TensorError, match=f"'{NAME}' holds values that are no numbers"):
        unpack(config, (8, 64), stored)


def test_fp8_without_a_scale_is_named() -> None:
    config, packer = FORMS["fp8 by row"]
    stored, _ = packer(torch.randn(8, 64))
    del stored["weight_scale"]
    with pytest.raises(TensorError, match=f"no '{NAME}_scale'"):
        unpack(config, (8, 64), stored)


def test_a_tile_of_a_wide_matrix_stays_small() -> None:
    made = Packed(torch.zeros(1000, 4096, dtype=torch.uint8), torch.ones(1000, 1), 4096)
    spans = list(made.tiles())
    assert spans[0] == (0, 128) and spans[-1][1] == 1000 and packing.TILE_BYTES == 128 * 4096 * 4


def test_awq_unpacks_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    from mirada.adapt import awq

    monkeypatch.setattr(awq, "_UNPACK_COLUMNS", 16)
    config, packer = FORMS["awq"]
    stored, meant = packer(torch.randn(72, 64))
    assert torch.equal(unpack(config, (72, 64), stored).widen(), meant)


def test_int8_rows_are_what_the_quantiser_means() -> None:
    weight = torch.randn(7, 3, 5)
    values, scale = quantise_rows(weight)
    scheme = scheme_of({"quant_method": "mirada_int8_rows"})
    made = scheme.unpack("t", (7, 3, 5), {"t": values, "t_scale": scale})
    assert torch.equal(made.widen().view(7, 3, 5), dequantise_rows(values, scale))


# ---- modules


def filled(weight: torch.Tensor, form: str = "gptq act-order") -> tuple[PackedRows, torch.Tensor]:
    config, packer = FORMS[form]
    stored, meant = packer(weight)
    rows = PackedRows(*weight.shape)
    rows.fill(unpack(config, tuple(weight.shape), stored), "cpu")  # pyright: ignore[reportArgumentType]
    return rows, meant


def test_fused_parts_and_bias() -> None:
    (a, wide_a), (b, wide_b) = filled(torch.randn(12, 64)), filled(torch.randn(20, 64), "fp8")
    plain = torch.nn.Linear(64, 4, bias=False)
    bias = torch.nn.Parameter(torch.randn(36))
    made = PackedLinear([a, plain, b], bias, 64)
    weight = torch.cat([wide_a, plain.weight, wide_b])
    x = torch.randn(5, 64)
    assert made.in_features == 64 and made.out_features == 36 and torch.equal(made.weight, weight)
    torch.testing.assert_close(made(x), F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)
    assert {name for name, _ in made.named_parameters()} == {"bias", "parts.1.weight"}


def test_scales_keep_their_type_when_a_model_is_cast() -> None:
    for form in ("gptq 4", "fp8"):
        rows, meant = filled(torch.randn(16, 64), form)
        rows.to(torch.bfloat16)
        assert torch.equal(rows.weight, meant)
        assert rows(torch.randn(1, 64).bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_the_input() -> None:
    rows, meant = filled(torch.randn(16, 64))
    x = torch.randn(2, 64, requires_grad=True)
    rows(x).sum().backward()
    torch.testing.assert_close(x.grad, meant.sum(0).expand(2, -1), atol=1e-4, rtol=1e-4)


def test_a_stack_gives_its_matrices() -> None:
    made = [filled(torch.randn(6, 64)) for _ in range(6)]
    stack = PackedStack([rows for rows, _ in made], (3, 12, 64), torch.float32)
    assert len(stack) == 3
    for e in range(3):
        assert torch.equal(stack[e], torch.cat([made[2 * e][1], made[2 * e + 1][1]]))
    assert torch.equal(stack[-1], stack[2])
    with pytest.raises(IndexError):
        stack[3]


# ---- what is covered


def test_only_the_blocks_of_the_language_model_are_covered() -> None:
    for config in (awq_config(32), gptq_config(32), fp8_config(128), compressed_config(32)):
        scheme = scheme_of(config)
        for name in (NAME, "language_model.model.layers.3.self_attn.q_proj.weight", "model.language_model.layers.0.x.weight"):
            assert scheme.covers(name, (8, 8)), (config["quant_method"], name)
        for name in (
            "visual.blocks.0.attn.qkv.weight", "vision_tower.encoder.layers.0.wqkv.weight", "model.embed_tokens.weight",
            "lm_head.weight", "mlp_AR.linear_1.weight", "model.visual.layers.0.x.weight",
            "model.layers.0.self_attn.q_proj.bias",
        ):  # fmt: skip
            assert not scheme.covers(name, (8, 8)), (config["quant_method"], name)
        assert not scheme.covers("model.layers.0.input_layernorm.weight", (8,))


@pytest.mark.parametrize(
    "config",
    [
        awq_config(32, modules_to_not_convert=["visual", "layers.0.mlp"]),
        gptq_config(32, modules_to_not_convert=["mlp"]),
        fp8_config(128, modules_to_not_convert=["model.layers.0.mlp.down_proj"]),
        fp8_config(128, ignored_layers=["mlp.down_proj"]),
        compressed_config(32, ignore=["model.layers.0.mlp.down_proj"]),
        compressed_config(32, ignore=["re:.*mlp.*"]),
    ],
)
def test_modules_left_plain_are_honoured(config: dict) -> None:
    scheme = scheme_of(config)
    assert not scheme.covers(NAME, (8, 8))
    assert scheme.covers("model.layers.0.self_attn.o_proj.weight", (8, 8))


def test_a_name_is_a_whole_part_of_the_path() -> None:
    scheme = scheme_of(fp8_config(128, modules_to_not_convert=["mlp.gate"]))
    assert not scheme.covers("model.layers.0.mlp.gate.weight", (8, 8))
    assert scheme.covers("model.layers.0.mlp.gate_proj.weight", (8, 8))


def test_targets_of_compressed_groups() -> None:
    config = compressed_config(32)
    groups = config["config_groups"]
    other = {**groups["group_0"], "targets": ["re:.*down_proj"]}
    other["weights"] = {**other["weights"], "num_bits": 8}
    config["config_groups"] = {"a": other, "b": {**groups["group_0"], "targets": ["model.layers.0.self_attn.q_proj"]}}
    scheme = scheme_of(config)
    assert scheme.fields(NAME, (8, 64))[f"{X}.weight_packed"].shapes == ((8, 16),)
    assert scheme.fields("model.layers.0.self_attn.q_proj.weight", (8, 64))[
        "model.layers.0.self_attn.q_proj.weight_packed"
    ].shapes == ((8, 8),)
    assert not scheme.covers("model.layers.1.self_attn.q_proj.weight", (8, 64))


def test_no_quantisation() -> None:
    assert adapt.read({}) is None and adapt.read({"quantization_config": None}) is None
    older = adapt.read({"compression_config": compressed_config(32)})
    assert older is not None and older.method == "compressed-tensors"


REFUSED = {
    "awq gemv": (awq_config(32, version="gemv"), r"AWQ version 'gemv'.*'gemm'"),
    "awq marlin": (awq_config(32, version="marlin"), r"AWQ version 'marlin'"),
    "awq 3 bits": (awq_config(32, bits=3), "bits=3"),
    "awq without zeros": (awq_config(32, zero_point=False), "zero_point=False"),
    "awq size": (awq_config(0), "group_size is 0"),
    "gptq 2 bits": (gptq_config(32, bits=2), r"GPTQ with 2 bits.*4 and 8"),
    "gptq 3 bits": (gptq_config(32, bits=3), "GPTQ with 3 bits"),
    "gptq marlin": (gptq_config(32, checkpoint_format="marlin"), r"checkpoint_format 'marlin'.*gptq_v2"),
    "gptq marlin flag": (gptq_config(32, is_marlin_format=True), "is_marlin_format=True"),
    "gptq head": (gptq_config(32, lm_head=True), "lm_head=True"),
    "gptq rules": (gptq_config(32, dynamic={"+:.*": {"bits": 8}}), r"dynamic rule '\+:"),
    "gptq unknown": (gptq_config(32, bitz=4), "'bitz'.*'bits'"),
    "compressed float block": (compressed_float_config("block"), "block_structure is None"),
    "compressed float group": (compressed_float_config("group"), "strategy='group'"),
    "fp8 e5m2": (fp8_config(128, fmt="e5m2"), "fmt='e5m2'"),
    "fp8 block": (fp8_config(128, weight_block_size=[128]), r"weight_block_size is \[128\]"),
    "nvfp4": (compressed_config(32, format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized'.*'pack-quantized'"),
    "compressed w8a8": (compressed_config(32, format="int-quantized"), "format 'int-quantized'"),
    "compressed float": (compressed_config(32, weights={"type": "float"}), "type='float'"),
    "compressed tensor": (compressed_config(32, weights={"strategy": "tensor"}), "strategy='tensor'"),
    "compressed 2 bits": (compressed_config(32, 2), "num_bits=2"),
    "compressed sparse": (compressed_config(32, sparsity_config={"format": "sparse-24"}), "sparsity_config"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"'bitsandbytes'.*awq, compressed-tensors, fp8"),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt'.*NVFP4"),
    "another": ({"quant_method": "gptqq"}, "mean 'gptq'"),
    "nameless": ({"bits": 4}, "'quant_method' is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name: str) -> None:
    config, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said) as caught:
        adapt.read({"quantization_config": config})
    assert caught.value.fix


def test_rules_that_leave_modules_out_are_taken() -> None:
    assert scheme_of(gptq_config(32, dynamic={"-:.*mlp.*": {}})).method == "gptq"


def test_groups_that_are_not_there_are_refused() -> None:
    for form, key in (("gptq act-order", "g_idx"), ("compressed act-order", "weight_g_idx")):
        config, packer = FORMS[form]
        stored, _ = packer(torch.randn(8, 64))
        stored[key][3] = 2
        with pytest.raises(TensorError, match=f"down_proj.{key}"):
            unpack(config, (8, 64), stored)


def test_a_shape_that_disagrees_is_refused() -> None:
    config, packer = FORMS["compressed 4"]
    stored, _ = packer(torch.randn(8, 64))
    stored["weight_shape"] = torch.tensor([64, 8])
    with pytest.raises(TensorError, match=r"weight_shape' says \[64, 8\], expected \[8, 64\]"):
        unpack(config, (8, 64), stored)
