"""Random adapters for tiny models, in PEFT's format, and the same models with them merged."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from mirada.models.family import family_of
from mirada.models.lora import Target, targets

PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "auto_mapping": None, "base_model_name_or_path": "a", "revision": None,
    "inference_mode": True, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "layer_replication": None, "loftq_config": {}, "lora_alpha": 6, "lora_dropout": 0.1,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "r": 2, "rank_pattern": {},
    "alpha_pattern": {}, "use_dora": False, "use_rslora": False, "target_modules": None,
}  # fmt: skip
"""adapter_config.json, as PEFT 0.14 writes it but for ``target_modules``."""


def where(model: nn.Module) -> dict[str, Target]:
    """All that an adapter of ``model`` may change, by released name."""
    family = family_of({"model_type": model.config.model_type})  # pyright: ignore[reportAttributeAccessIssue]
    return targets(family.layout(model.config), model)


def make_adapter(
    directory: Path,
    model: nn.Module,
    seed: int = 0,
    chosen: Callable[[str], bool] = lambda name: True,
    rename: Callable[[str], str] = lambda module: module,
    strength: float = 0.6,
    **changes: Any,
) -> Path:
    """An adapter of every matrix whose released name is ``chosen``, drawn from ``seed``; ``changes`` are of the config."""
    config = CONFIG | changes
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, target in where(model).items():
        a = torch.randn(config["r"], *target.columns, generator=random)
        b = torch.randn(target.rows, config["r"], *[1] * (len(target.columns) - 1), generator=random)
        if chosen(name):
            module = PREFIX + rename(name.removesuffix(".weight"))
            tensors[f"{module}.lora_A.weight"] = a / a[0].numel() ** 0.5
            tensors[f"{module}.lora_B.weight"] = b * (strength / config["lora_alpha"])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@torch.no_grad()
def merged(model: nn.Module, directory: Path, rename: Callable[[str], str] = lambda module: module) -> nn.Module:
    """A copy of ``model`` with W + scale B A in place of W, read without the code under test (one rank for all)."""
    from safetensors.torch import load_file

    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    made = copy.deepcopy(model)
    layout = family_of({"model_type": made.config.model_type}).layout(made.config)  # pyright: ignore
    places = layout.stored()
    parameters = dict(made.named_parameters())
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            a, b = tensors[name], tensors[f"{module}.lora_B.weight"]
            module = module.removeprefix(PREFIX)
            released = next(known for known in places if rename(known.removesuffix(".weight")) == module)
            rule, index, shape = places[released]
            change = scale * (b.flatten(1).double() @ a.flatten(1).double())
            rule.place(parameters[rule.parameter], index).add_(change.view(shape).float())
    return made
