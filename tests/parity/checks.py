"""Every check that a directory of reference outputs allows, by name. Its config.json says of which family it is.

A file that no check knows, or that lacks what it needs beside it, is a check that fails; so nothing passes unseen.
"""

from __future__ import annotations

import json
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from parity import preprocessing
from parity.files import Check, Files
from parity.golden import Case, cases, load_reference_model
from parity.released import PREVIEW_8B

from mirada.models.family import FAMILIES
from mirada.models.load import build

FAMILY_FILES = {"kimi_vl": "parity.kimi", "qwen2_vl": "parity.qwen2_vl"}
"""model_type of config.json -> the module whose ``FILES`` know its directories. Those of Keye-VL name their configs apart."""


def collect(directory: Path) -> dict[str, Check]:
    """Name -> check for all files of ``directory``."""
    made: dict[str, Check] = {}
    files = files_of(directory)
    for file in sorted(directory.iterdir()):
        if file.name in files.without:
            continue
        if file.name not in files.checks:
            made[f"{file.name}: unknown"] = partial(_unknown, files, file)
            continue
        needed = [directory / name for name in files.needs.get(file.name, ())]
        absent = [path.name for path in needed if not path.exists()]
        if absent:
            made[f"{file.name}: incomplete"] = partial(_incomplete, file, absent)
            continue
        found = files.checks[file.name](file)
        if set(found) <= {"facts"}:
            found["empty"] = partial(_empty, file)
        made |= {f"{file.name}: {name}": check for name, check in found.items()}
    return made


def files_of(directory: Path) -> Files:
    """The known files of the family that config.json names, or of Keye-VL where there is none."""
    config = directory / "config.json"
    if not config.exists():
        return KEYE_FILES
    model_type = json.loads(config.read_text()).get("model_type")
    if model_type not in FAMILY_FILES:
        return Files({"config.json": lambda file: {"family": partial(_unknown_family, model_type)}})
    return import_module(FAMILY_FILES[model_type]).FILES


def _unknown_family(model_type: object) -> None:
    raise AssertionError(f"no checks are known for the model_type {model_type!r}; known: {', '.join(FAMILY_FILES)}")


def _unknown(files: Files, file: Path) -> None:
    raise AssertionError(f"{file} is not of a known name; known: {', '.join(sorted({*files.checks, *files.without}))}")


def _empty(file: Path) -> None:
    raise AssertionError(f"{file} holds nothing that could be checked")


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


_CHECKS = {
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
KEYE_FILES = Files(_CHECKS, _NEEDS, frozenset(_WITHOUT_CHECKS))
