"""Where the matrices of an adapter belong: names of a release -> modules, by the family's layout.

An adapter names modules as the release (or the software that trained it) does; the layout says which module holds such a
matrix, in which rows. Every tensor of an adapter finds its place or is refused by name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mirada.adapt import lora
from mirada.adapt.lora import Adapter, Patch
from mirada.errors import CheckpointError, TensorError
from mirada.layers.moe import Experts
from mirada.models import shards
from mirada.models.layout import Layout
from mirada.models.load import read_json
from mirada.models.quantised import device_of
from mirada.models.shards import Mapped, Stored

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Target:
    """Outputs [start, start + rows) of the matrix at ``place``, whose inputs a release stores as ``columns``."""

    place: lora.Place
    start: int
    rows: int
    columns: tuple[int, ...]


def load_adapter(directory: str | Path, model: nn.Module, layout: Layout) -> Adapter:
    """The adapter of ``directory`` (PEFT's adapter_config.json and adapter_model.safetensors) for ``model``.

    Held in float32 on a CPU and in the model's type elsewhere. Raises CheckpointError and its kinds, each naming the file, key
    or tensor.
    """
    directory = Path(directory)
    file = _find(directory)
    config = lora.read_config(read_json(directory / CONFIG), str(directory / CONFIG))
    stored = shards.read_header(file)
    copies = lora.copies(stored)
    found = lora.pairs(set(stored) - set(copies.values()), config, file.name)
    if not found:
        raise TensorError(f"{file} holds no tensors", "save the adapter again")
    where = targets(layout, model)
    known = layout.released({f"{module}.weight": module for module in found})
    read = Mapped()
    gathered: dict[lora.Place, list[tuple[int, Tensor, Tensor]]] = {}
    for released, module in sorted(known.items()):
        a, b = (stored[name] for name in found[module])
        if released not in where:
            raise _homeless(a.name, released, layout)
        target = where[released]
        rank = config.rank(module)
        _check(a, b, target, rank)
        low, high = read.whole(a).float().view(rank, -1), read.whole(b).float().view(-1, rank) * config.scale(module)
        for tensor, name in ((low, a.name), (high, b.name)):
            if not torch.isfinite(tensor).all():
                raise TensorError(f"tensor {name!r} holds values that are not finite", "save the adapter again")
        device, dtype = _beside(model, target.place)
        gathered.setdefault(target.place, []).append((target.start, low.to(device, dtype), high.to(device, dtype)))
        if module in copies:
            _check_copy(read.whole(stored[copies.pop(module)]), model, target, released)
    if copies:
        name = next(iter(copies.values()))
        raise TensorError(f"{file.name} holds tensor {name!r}, which belongs to no LoRA pair", "save the adapter without it")
    patches = {place: lora.patch(sorted(parts, key=lambda part: part[0])) for place, parts in gathered.items()}
    seen = {place: made for place, made in patches.items() if place[0].startswith(("visual.", "projector."))}
    return Adapter(_key(patches), _key(seen) if seen else "", patches)


def size_of(directory: str | Path) -> int:
    """Bytes of the adapter in ``directory`` once loaded, at most. CheckpointError if it is not there."""
    return sum(4 * math.prod(stored.shape) for stored in shards.read_header(_find(Path(directory))).values())


def _find(directory: Path) -> Path:
    """The weights of an adapter. CheckpointError says what is there instead."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory", f"give the directory that holds {CONFIG} and {WEIGHTS}")
    file = directory / WEIGHTS
    if file.is_file():
        return file
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds an adapter as a Python pickle ({pickles[0]}), which can run any code when opened",
            "it is refused; save it as safetensors in a place you trust",
        )
    raise CheckpointError(f"{directory} holds no adapter", f"{CONFIG} and {WEIGHTS} must lie there")


def targets(layout: Layout, model: nn.Module) -> dict[str, Target]:
    """Released name of a weight -> where its product is made, of all matrices that adapters may change."""
    made: dict[str, Target] = {}
    for rule in layout.rules:
        owner, _, attribute = rule.parameter.rpartition(".")
        module = model.get_submodule(owner)
        each = 0
        if rule.how == "stack" and isinstance(module, Experts):
            each = len(rule.tensors) // len(getattr(module, attribute))
        elif rule.how == "stack" or attribute != "weight" or not hasattr(module, "in_features"):
            continue
        start = 0
        for index, (name, (rows, *columns)) in enumerate(rule.tensors):
            start = 0 if each and index % each == 0 else start
            place = (rule.parameter, index // each) if each else (owner, None)
            made[name] = Target(place, start, rows, tuple(columns))
            start += rows
    head = model.get_submodule("lm_head")
    for name in layout.ignored:
        if name.endswith("lm_head.weight"):  # tied to the embedding, which an adapter of the head leaves as it is
            made[name] = Target(("lm_head", None), 0, head.out_features, (head.in_features,))  # pyright: ignore
    return made


def _homeless(name: str, released: str, layout: Layout) -> TensorError:
    if released in layout.stored():
        return TensorError(
            f"adapter tensor {name!r} changes {released!r}, which is no matrix of a linear layer",
            "train without it, or merge the adapter into the model",
        )
    return TensorError(
        f"adapter tensor {name!r} finds no place in this model", "take the model that the adapter was trained for"
    )


def _check(a: Stored, b: Stored, target: Target, rank: int) -> None:
    ones = (1,) * (len(target.columns) - 1)  # of a convolution's second half
    for found, expected in ((a, (rank, *target.columns)), (b, (target.rows, rank, *ones))):
        if found.shape != expected:
            raise TensorError(
                f"adapter tensor {found.name!r} has shape {list(found.shape)}, expected {list(expected)}",
                f"take the {CONFIG} (r, rank_pattern) and the model that belong to it",
            )
        if found.dtype not in ("F64", "F32", "F16", "BF16"):
            raise TensorError(f"adapter tensor {found.name!r} is stored as {found.dtype}", "adapters are floats")


def _check_copy(copy: Tensor, model: nn.Module, target: Target, released: str) -> None:
    """The model's own matrix, saved with an adapter, must be what the model has: another would go unused."""
    path, index = target.place
    own = getattr(model.get_submodule(path), "weight", None) if index is None else None
    rows = None if own is None else own[target.start : target.start + target.rows]
    if rows is None or rows.numel() != copy.numel() or not torch.equal(rows.view(copy.shape).to("cpu", copy.dtype), copy):
        raise TensorError(
            f"the adapter comes with a matrix of its own for {released!r}, which is not the model's",
            "save it with save_embedding_layers=False, or merge it into the model",
        )


def _beside(model: nn.Module, place: lora.Place) -> tuple[torch.device, torch.dtype]:
    """The device of the matrix at ``place``, and the type that is computed in there."""
    device = device_of(model, place[0] if place[1] is not None else f"{place[0]}.weight")
    return device, torch.float32 if device.type == "cpu" else next(model.parameters()).dtype


def _key(patches: Mapping[lora.Place, Patch]) -> str:
    """256 bits over all that is added, and where."""
    digest = hashlib.blake2b(digest_size=32)
    for place in sorted(patches, key=repr):
        found = patches[place]
        facts = [(part.start, part.first, tuple(part.b.shape)) for part in found.parts]
        digest.update(repr((place, tuple(found.a.shape), str(found.a.dtype), facts)).encode())
        for tensor in _tensors(found):
            digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(found: Patch) -> Iterable[Tensor]:
    return (found.a, *(part.b for part in found.parts))
