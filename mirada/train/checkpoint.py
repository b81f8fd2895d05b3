"""A training run on disk: safetensors and JSON, no pickles. Resuming continues bit for bit.

``step-0000100/`` holds ``state.safetensors`` (``model/…``, ``average/…``, ``optim0/…``, ``random``) and ``state.json`` (step,
settings).
Written beside and renamed, so that a run killed at any moment leaves whole checkpoints only.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mirada.errors import CheckpointError

STATE, FACTS = "state.safetensors", "state.json"


def save(directory: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, object], keep: int = 2) -> Path:
    """Write one checkpoint and drop all but the newest ``keep``. Gives the folder's path."""
    final = directory / f"step-{step:07d}"
    draft = directory / f".draft-{step:07d}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, draft / STATE)
    (draft / FACTS).write_text(json.dumps({"step": step, **facts}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    for old in _all(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def newest(directory: Path) -> Path | None:
    """The last whole checkpoint of a run, if any."""
    found = _all(directory)
    return found[-1] if found else None


def load(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and facts of one checkpoint. Raises CheckpointError when a file is missing or broken."""
    try:
        return load_file(checkpoint / STATE), json.loads((checkpoint / FACTS).read_text())
    except (OSError, ValueError, SafetensorError) as cause:
        raise CheckpointError(
            f"training checkpoint {checkpoint} cannot be read: {cause}", "delete that folder to resume from an older one"
        ) from cause


def _all(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("step-*") if (p / FACTS).exists())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave; the groups must be the same."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
