"""Layers of one model on several devices: which goes where, and moving what flows between them.

All outside the decoder's layers (tower, projector, embedding, last norm, head) lies on the *main* device; there the engine
keeps its batches, and there hidden values come back to. Layers fill the devices one after another, so that values cross each
border once per forward.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirada import adapt
from mirada.engine import memory
from mirada.errors import OutOfMemory
from mirada.layers.cache import BLOCK, make_cache
from mirada.models import shards
from mirada.models.family import family_of
from mirada.models.layout import Layout
from mirada.models.load import read_json
from mirada.models.quantised import resident_bytes

CONTEXT = 8192
"""Tokens of cache that a plan leaves room for (fewer if the model's context is shorter)."""
WORK_TOKENS = 8192
"""Tokens of one prefill whose passing values every device has room for."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model: weights outside the layers, weights of each layer, cache of one layer, passing values."""

    main: int
    layers: tuple[int, ...]
    cache: int = 0
    working: int = 0


@dataclass(frozen=True)
class Room:
    """A device and the bytes that are free there."""

    device: torch.device
    free: int


@dataclass(frozen=True)
class Plan:
    """The device of each layer, and of all else."""

    main: torch.device
    layers: tuple[torch.device, ...]

    def device_of(self, name: str) -> torch.device:
        """Where the parameter ``name`` lies."""
        found = _LAYER.match(name)
        return self.layers[int(found[1])] if found else self.main

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All of them, once each, the main one first."""
        return tuple(dict.fromkeys((self.main, *self.layers)))


def plan(sizes: Sizes, rooms: Sequence[Room]) -> Plan:
    """Layers to ``rooms`` in order, each filled before the next is begun; all else to the first room that holds it.

    A room that holds anything keeps ``sizes.working`` bytes free besides. OutOfMemory if the rooms do not suffice.
    """
    left = [room.free - sizes.working for room in rooms]
    main = next((i for i, free in enumerate(left) if free >= sizes.main), None)
    if main is None:
        raise _too_large(sizes, rooms)
    left[main] -= sizes.main
    layers: list[torch.device] = []
    at = 0
    for size in sizes.layers:
        while at < len(rooms) and left[at] < size + sizes.cache:
            at += 1
        if at == len(rooms):
            raise _too_large(sizes, rooms)
        left[at] -= size + sizes.cache
        layers.append(rooms[at].device)
    return Plan(rooms[main].device, tuple(layers))


def _too_large(sizes: Sizes, rooms: Sequence[Room]) -> OutOfMemory:
    needed = sizes.main + sum(sizes.layers) + len(sizes.layers) * sizes.cache + sizes.working
    free = sum(room.free for room in rooms)
    shown = ", ".join(f"{memory.say(max(room.free, 0))} on {room.device}" for room in rooms)
    return OutOfMemory(
        f"the model needs {memory.say(needed)} with its cache and passing values, and there is {shown}",
        "use a quantised checkpoint, dtype='bfloat16', a smaller model, or a machine with more memory",
        needed=needed,
        available=max(free, 0),
        unit="bytes",
    )


def rooms() -> list[Room]:
    """Every GPU in order, then the CPU, with what is free now."""
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not found and torch.backends.mps.is_available():
        found = [torch.device("mps")]
    return [Room(device, memory.available(device)) for device in (*found, torch.device("cpu"))]


def measure(directory: Path, dtype: torch.dtype, widen: bool = False) -> Sizes:
    """Sizes of the checkpoint in ``directory`` once loaded in ``dtype``, from config.json and the headers of its files."""
    where = str(directory / "config.json")
    mapping = read_json(directory / "config.json")
    family, scheme = family_of(mapping, where), adapt.read(mapping, where)
    config = family.config(mapping)
    layout = family.layout(config)
    stored = layout.released(shards.read_all(shards.find(directory)))
    wide = widen or (scheme is not None and scheme.widens)
    parts: dict[int, list[Any]] = {index: [] for index in range(-1, config.text.num_hidden_layers)}
    for rule in layout.rules:
        found = _LAYER.match(rule.parameter)
        parts[int(found[1]) if found else -1].append(rule)
    owner = {_module(name): index for index, rules in parts.items() for rule in rules for name, _ in rule.tensors}
    held: dict[int, dict[str, Any]] = {index: {} for index in parts}
    for name, tensor in stored.items():
        if _module(name) in owner:
            held[owner[_module(name)]][name] = tensor
    sizes = {i: resident_bytes(Layout(tuple(rules)), held[i], scheme, dtype, wide) for i, rules in parts.items()}
    cache = make_cache(family.cache_spec(config), dtype, "meta")
    context = min(CONTEXT, config.text.max_position_embeddings)
    tokens = math.ceil(context / BLOCK) * BLOCK
    return Sizes(
        main=sizes.pop(-1),
        layers=tuple(sizes[index] for index in sorted(sizes)),
        cache=tokens * cache.bytes_per_token // cache.num_layers,
        working=_working(config.text, min(WORK_TOKENS, context), dtype),
    )


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _working(text: Any, tokens: int, dtype: torch.dtype) -> int:
    """Per token: residual, normed, q, k, v, mixed and the halves of the gated MLP with their product; and one row of logits."""
    wide = 4 * text.hidden_size + 3 * text.num_attention_heads * text.head_dim + 3 * text.intermediate_size
    return tokens * wide * dtype.itemsize + 3 * 4 * text.vocab_size


def install(model: nn.Module, made: Plan) -> None:
    """Makes values follow the layers of ``model``, whose parameters already lie where ``made`` says."""
    decoder: Any = model.get_submodule("decoder")
    mover = Mover()
    for layer, device in zip(decoder.layers, made.layers, strict=True):
        layer.register_forward_pre_hook(mover.to(device), with_kwargs=True)
    decoder.norm.register_forward_pre_hook(mover.to(made.main), with_kwargs=True)
    decoder.register_forward_hook(mover.forget, always_call=True)


class Mover:
    """Moves what a layer is called with. What all layers share (rotations) is moved once per device and forward."""

    def __init__(self) -> None:
        self._moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def forget(self, *_: Any) -> None:
        """A forward hook of the decoder: what its layers shared is let go."""
        self._moved.clear()

    def to(self, device: torch.device) -> Any:
        """A forward pre-hook that brings every tensor among the arguments to ``device``."""

        def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            # The first argument is what flows; it is new at each layer, so there is nothing to remember of it.
            flow = self.move(args[0], device, keep=False)
            rest = tuple(self.move(value, device, keep=True) for value in args[1:])
            return (flow, *rest), {name: self.move(value, device, keep=True) for name, value in kwargs.items()}

        return hook

    def move(self, value: Any, device: torch.device, keep: bool) -> Any:
        """``value`` with its tensors on ``device``: tensors, tuples and frozen dataclasses of them; all else as it is."""
        if isinstance(value, Tensor):
            return self._tensor(value, device, keep)
        if isinstance(value, tuple):
            made = tuple(self.move(item, device, keep) for item in value)
            return made if any(a is not b for a, b in zip(made, value, strict=True)) else value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            moved = {name: self.move(held, device, keep) for name, held in fields.items()}
            changed = {name: held for name, held in moved.items() if held is not fields[name]}
            return dataclasses.replace(value, **changed) if changed else value
        return value

    def _tensor(self, value: Tensor, device: torch.device, keep: bool) -> Tensor:
        if value.device == device:
            return value
        if not keep:
            return value.to(device)
        key = (id(value), device)
        if key not in self._moved:  # the original is held beside, so that its id is not given to another tensor
            self._moved[key] = (value, value.to(device))
        return self._moved[key][1]
