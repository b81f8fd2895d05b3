"""Adapters beside huggingface/peft, live: what it trains and saves we load, and compute alike, tower and projector included."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.test_live_qwen2_vl import case_of, drawn, inputs_of, padded

from mirada.adapt.lora import Adapted
from mirada.layers.batch import MediaBatch
from mirada.models.family import FAMILIES
from mirada.models.load import save_model
from mirada.models.lora import load_adapter

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
SETTINGS = {
    "every linear layer": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "patterns, rsLoRA, and the convolution of patches": {
        "target_modules": [
            "q_proj", "v_proj", "down_proj", "qkv", "mlp.0", "lm_head", "patch_embed.proj", "blocks.0.attn.proj"
        ],
        "r": 4, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"q_proj": 2, "^.*visual.*qkv": 5},
        "alpha_pattern": {"layers.0.mlp.down_proj": 9},
    },
    "an expression": {"target_modules": r".*layers\.1\..*(k_proj|o_proj|gate_proj)", "r": 2, "lora_alpha": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers", reason="pip install 'mirada[parity]'")
        return pytest.importorskip("peft", reason="pip install 'mirada[parity]'")


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_what_peft_saves_we_load_and_compute_alike(peft: Any, tmp_path: Path, name: str) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    model = drawn(5)
    save_model(model, tmp_path / "base")
    base = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.get_peft_model(base, peft.LoraConfig(**SETTINGS[name])).eval()
    random = torch.Generator().manual_seed(1)
    for parameter_name, parameter in theirs.named_parameters():
        if "lora_" in parameter_name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    theirs.save_pretrained(tmp_path / "adapter")

    adapter = load_adapter(tmp_path / "adapter", model, FAMILIES["qwen2_vl"].layout(model.config))
    case = case_of(model, 3)
    plain = case.logits
    case = case_of(model, 3)
    released = theirs(**inputs_of(case), position_ids=padded(case, case.places)).logits[case.mask]
    adapted, made = Adapted(model), {}
    for kind, grids in case.grids.items():
        pixels = case.theirs["pixel_values" if kind == "image" else "pixel_values_videos"]
        count = len(pixels)
        with adapted.over({"visual": [(adapter, count)], "projector": [(adapter, count // 4)]}):
            made[kind] = model.encode(MediaBatch(pixels, tuple(grids), (kind,) * len(grids)))
    case.__dict__["features"] = made
    tokens = sum(case.batch().lengths)
    with adapted.over({"decoder": [(adapter, tokens)], "lm_head": [(adapter, tokens)]}):
        ours = case.logits
    assert (released - plain).abs().max() > 0.1, "the adapter changes nothing, so nothing was compared"
    worst = float((released - ours).abs().max())
    print(f"{name}: logits within {worst:.1e} of PEFT {peft.__version__}, spread {float(ours.std()):.2f}")
    assert worst < 1e-4 * max(1.0, float(released.abs().max()))
