"""Facts from config.json alone: counts of the released models, bytes, cache, licence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from models.test_deepseek import KIMI as KIMI_TEXT
from models.test_deepseek import V3
from parity.released import PREVIEW_8B

from mirada.models import facts
from mirada.models.facts import describe, hardware

GOLDEN = Path(__file__).parents[1] / "golden"
QWEN_SIZES = {
    "2B": ({"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}, 2_208_985_600, 665_271_296),
    "7B": ({"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}, 8_291_375_616, 675_759_104),
    "72B": ({"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False}, 73_405_560_320, 699_356_672),
}  # fmt: skip


def qwen(size: str, **changes) -> dict:
    text, _, _ = QWEN_SIZES[size]
    vision = {
        "depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "in_chans": 3, "mlp_ratio": 4,
        "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    }  # fmt: skip
    return {
        "model_type": "qwen2_vl", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "max_position_embeddings": 32768,
        "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655,
        "video_token_id": 151656, "vision_config": vision, **text, **changes,
    }  # fmt: skip


def kimi() -> dict:
    vision = {"model_type": "moonvit", "patch_size": 14, "num_hidden_layers": 27, "num_attention_heads": 16,
              "hidden_size": 1152, "intermediate_size": 4304, "init_pos_emb_height": 64, "init_pos_emb_width": 64,
              "merge_kernel_size": [2, 2]}  # fmt: skip
    return {"model_type": "kimi_vl", "media_placeholder_token_id": 163605, "vocab_size": 163840, "torch_dtype": "bfloat16",
            "tie_word_embeddings": False, "vision_config": vision, "text_config": KIMI_TEXT}  # fmt: skip


@pytest.mark.parametrize("size", QWEN_SIZES)
def test_qwen2_vl(size: str) -> None:
    made = describe(qwen(size))
    assert (made.parameters, made.vision) == QWEN_SIZES[size][1:]
    assert made.weights["float32"] == 4 * made.parameters and made.weights["bfloat16"] == 2 * made.parameters
    assert made.context == 32768 and made.experts == made.unused == 0


def test_cache_of_shared_heads() -> None:
    made = describe(qwen("7B"))
    assert made.cache_values == 28 * 2 * 4 * 128 and made.cache_bytes(1) == 57344
    assert made.cache_kind == "4 key and value heads of 128 for 28 query heads"


def test_active_parameters_of_a_dense_model() -> None:
    # 7B: all of the decoder but the table of tokens; 2B: that table is the head.
    seven, two = describe(qwen("7B")), describe(qwen("2B"))
    assert seven.active == seven.parameters - seven.vision - 152064 * 3584
    assert two.active == two.parameters - two.vision


def test_keye_with_what_its_files_hold_besides() -> None:
    made = describe(PREVIEW_8B)
    listed = json.loads((GOLDEN / "keye_vl" / "param_layout_8b_preview.json").read_text())
    assert made.parameters + made.unused == 8_696_828_736
    extra = {n: e for n, e in listed["state_dict_names"].items() if ".head." in n or "packing" in n}
    assert len(extra) == 12 and sum(math.prod(e["shape"]) * e["count"] for e in extra.values()) == made.unused


def test_kimi() -> None:
    made = describe(kimi())
    assert made.parameters == 16_407_656_048 and made.vision == 416_866_032 + 30_679_808
    assert made.cache_values == 15552 and made.cache_bytes(1) == 31104
    assert made.cache_kind.startswith("latent: 512 + 64 values")
    assert made.experts == 26 * 64 * 3 * 1408 * 2048
    expected = 15_960_110_208 - 163840 * 2048 - made.experts * 58 // 64
    assert made.active == expected and 2.4e9 < made.active < 3e9


def keye_671b(**changes) -> dict:
    """Sizes of DeepSeek-V3 with KeyeViT; the release's own file is not public in readable form."""
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {**V3, "model_type": "KeyeVLMoe", "vision_config": PREVIEW_8B["vision_config"]} | dict.fromkeys(ids, 1) | changes


def test_keye_671b() -> None:
    made = describe(keye_671b())
    assert made.parameters - made.vision == 671_026_419_200
    assert 36.5e9 < made.active < 37.5e9 and made.cache_values == 61 * 576
    blocks = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    stored = describe(keye_671b(quantization_config=blocks)).weights["as stored"]
    assert 0.50 < stored / made.weights["bfloat16"] < 0.51
    assert "GPUs of 80 GB" in hardware(stored)


def test_bytes_of_packed_types() -> None:
    made = describe(qwen("7B"))
    d, inner, layers = 3584, 18944, 28
    matrices = [(d, d), (512, d), (512, d), (d, d), (inner, d), (inner, d), (d, inner)]
    packed = layers * sum(r * c for r, c in matrices)
    rest = 2 * (made.parameters - packed)
    assert made.weights["int8"] == rest + packed + 2 * layers * sum(r for r, _ in matrices)
    groups = layers * sum(r * c // 128 for r, c in matrices)
    assert made.weights["int4"] == rest + packed // 2 + 2 * groups + groups // 2
    assert "as stored" not in made.weights


def test_a_quantised_checkpoint_as_its_scheme_stores_it() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    made = describe(qwen("7B", quantization_config=awq | {"modules_to_not_convert": ["visual"]}))
    # Its integers, scales and zeros are those reckoned for int4.
    assert made.weights["as stored"] == made.weights["int4"]


def test_what_is_needed_grows_with_the_context() -> None:
    made = describe(qwen("2B"))
    assert made.needed("bfloat16", 0) == made.weights["bfloat16"]
    assert made.needed("bfloat16", 100) - made.needed("bfloat16", 0) == 100 * 2 * (made.cache_values + made.working_values)
    assert made.needed("float32", 100) - made.needed("float32", 0) == 100 * 4 * (made.cache_values + made.working_values)
    assert made.needed("int4", 100) - made.needed("int4", 0) == 100 * 2 * (made.cache_values + made.working_values)


def test_hardware() -> None:
    assert "8 GB" in hardware(7_000_000_000) and "12 GB" in hardware(8_000_000_000)
    assert "192 GB" in hardware(150_000_000_000) and hardware(1_400_000_000_000).startswith("20 GPUs of 80 GB")


def test_licences() -> None:
    assert describe(qwen("2B")).licence.name == describe(qwen("7B")).licence.name == "Apache-2.0"
    assert describe(qwen("72B")).licence.name == "Qwen licence" and "model page" in describe(qwen("72B")).licence.conditions
    assert describe(kimi()).licence.name == "MIT"
    assert describe(PREVIEW_8B).licence.conditions == "see the model page"


def test_nothing_is_allocated(monkeypatch) -> None:
    real, made = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    describe(qwen("72B"))
    assert made and all(tensor.device.type == "meta" for tensor in made)
    assert facts.CONTEXT < 32768
