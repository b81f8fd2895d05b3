"""Every check that a directory of reference outputs allows, by name.

A file that no check knows, or that lacks what it needs beside it, is a check that fails; so nothing passes unseen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from parity import preprocessing
from parity.golden import Case, cases, load_reference_model

from mirada.models.family import FAMILIES
from mirada.models.load import build

Check = Callable[[], None]


def collect(directory: Path) -> dict[str, Check]:
    """Name -> check for all files of ``directory``."""
    made: dict[str, Check] = {}
    for file in sorted(directory.iterdir()):
        if file.name in _WITHOUT_CHECKS:
            continue
        if file.name not in _CHECKS:
            made[f"{file.name}: unknown"] = partial(_unknown, file)
            continue
        needed = [directory / name for name in _NEEDS.get(file.name, ())]
        absent = [path.name for path in needed if not path.exists()]
        if absent:
            made[f"{file.name}: incomplete"] = partial(_incomplete, file, absent)
            continue
        made |= {f"{file.name}: {name}": check for name, check in _CHECKS[file.name](file).items()}
    return made


def _unknown(file: Path) -> None:
    raise AssertionError(f"{file} is not of a known name; known: {', '.join(sorted({*_CHECKS, *_WITHOUT_CHECKS}))}")


def _incomplete(file: Path, absent: list[str]) -> None:
    raise AssertionError(f"{file} cannot be checked without {', '.join(absent)} beside it")


def _model_cases(file: Path) -> dict[str, Check]:
    folder = file.parent
    model = load_reference_model(folder / "model_config.json", folder / "model_weights.safetensors")
    return _checks_of(file, model)


def _model15_cases(file: Path) -> dict[str, Check]:
    folder = file.parent
    model = load_reference_model(
        folder / "keye15_config.json", folder / "model_weights.safetensors", folder / "keye15_projector_override.safetensors"
    )
    return _checks_of(file, model)


def _checks_of(file: Path, model) -> dict[str, Check]:
    made: dict[str, Check] = {}
    for name, tensors in cases(file).items():
        for what, check in Case(model, tensors).checks().items():
            made[f"{name}.{what}" if name else what] = check
    return made


def _summary(file: Path) -> dict[str, Check]:
    """Generated ids and the smallest gap of logits on the way, for every case that is named."""
    folder, made = file.parent, {}
    model = load_reference_model(folder / "model_config.json", folder / "model_weights.safetensors")
    recorded = cases(folder / "model_goldens.safetensors")
    for name, facts in json.loads(file.read_text()).items():
        if name.startswith(("quirk_", "single_image_")):
            continue  # how far the reference's own slower path is from its true one: nothing of ours
        made[name] = partial(_check_summary, model, recorded, name, facts)
    return made


@torch.no_grad()
def _check_summary(model, recorded: dict, name: str, facts: dict) -> None:
    assert set(facts) == {"generated", "min_top1_top2_margin"}, f"{name} holds other facts: {sorted(facts)}"
    ids, gap = Case(model, recorded[name]).greedy(len(facts["generated"][0]))
    assert ids == facts["generated"], f"{name}: other ids"
    assert abs(gap - facts["min_top1_top2_margin"]) < 1e-3, f"{name}: smallest gap {gap}"


def _layout(file: Path) -> dict[str, Check]:
    return {"names and shapes": partial(_check_layout, file), "number of parameters": partial(_check_totals, file)}


def _expanded(file: Path) -> dict[str, list[int]]:
    """Stored name -> shape, the ``{i}`` of layers written out."""
    made = {}
    for name, fact in json.loads(file.read_text())["state_dict_names"].items():
        for i in range(fact["count"]):
            made[name.replace("{i}", str(i))] = fact["shape"]
    return made


def _check_layout(file: Path) -> None:
    theirs = _expanded(file)
    assert len(theirs) == json.loads(file.read_text())["n_tensors"]
    model = build(PREVIEW_8B, device="meta")
    layout = FAMILIES["Keye"].layout(model.config)
    ours = {name: list(shape) for name, (_, _, shape) in layout.stored().items()}
    assert ours == {name: shape for name, shape in theirs.items() if not layout.ignores(name)}


def _check_totals(file: Path) -> None:
    theirs, totals = _expanded(file), json.loads(file.read_text())["param_totals"]
    model = build(PREVIEW_8B, device="meta")
    layout = FAMILIES["Keye"].layout(model.config)
    sizes = {name: torch.Size(shape).numel() for name, shape in theirs.items()}
    ignored = {name: size for name, size in sizes.items() if layout.ignores(name)}
    assert sum(p.numel() for p in model.parameters()) + sum(ignored.values()) == sum(sizes.values())
    head = sum(size for name, size in ignored.items() if ".head." in name)
    packing = sum(size for name, size in ignored.items() if "packing" in name)
    ours = {
        "mlp_AR": sum(p.numel() for p in model.projector.parameters()),
        "visual": sum(p.numel() for p in model.visual.parameters()) + packing + head,
        "visual_head_unused": head,
        "model": sum(p.numel() for p in model.decoder.parameters()),
        "lm_head": model.lm_head.weight.numel(),
    }
    assert ours == totals


PREVIEW_8B = {
    "architectures": ["KeyeForConditionalGeneration"], "model_type": "Keye", "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "rope_theta": 1000000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "max_position_embeddings": 40960,
    "vocab_size": 151936, "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656,
    "vision_config": {
        "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304,
        "image_size": 384, "patch_size": 14, "attention_dropout": 0.0, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "tokens_per_second": 2, "model_type": "siglip_vision_model",
    },
}  # fmt: skip
"""config.json of Keye-VL-8B-Preview (public repository of Keye, keye-vl-8b-preview)."""

_CHECKS: dict[str, Callable[[Path], dict[str, Check]]] = {
    "model_goldens.safetensors": _model_cases,
    "keye15_goldens.safetensors": _model15_cases,
    "model_summary.json": _summary,
    "param_layout_8b_preview.json": _layout,
    **preprocessing.CHECKS,
}
_NEEDS = {
    "model_goldens.safetensors": ("model_config.json", "model_weights.safetensors"),
    "model_summary.json": ("model_config.json", "model_weights.safetensors", "model_goldens.safetensors"),
    "keye15_goldens.safetensors": (
        "keye15_config.json",
        "model_weights.safetensors",
        "keye15_projector_override.safetensors",
    ),
}
_WITHOUT_CHECKS = {
    "README.md", "model_config.json", "model_weights.safetensors", "keye15_config.json",
    "keye15_projector_override.safetensors",
}  # fmt: skip
"""What other files are checked with."""
