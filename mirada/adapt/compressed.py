"""compressed-tensors: int4 or int8 weights in words along the inputs ("pack-quantized"), or e4m3 floats ("float-quantized").

Ported facts: vllm-project/compressed-tensors ``compressors/pack_quantized`` (packing of weights and zero points),
``compressors/naive_quantized`` (floats beside ``weight_scale``) and ``quantization/lifecycle`` (group order). The arithmetic
here is float32, whatever type the scales have, and activations are not rounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirada.adapt.fp8 import ACTIVATIONS, block_of, floats, scale_shapes
from mirada.adapt.method import (
    FLOATS,
    Field,
    Shape,
    as_bytes,
    ceil_div,
    group_size,
    halves,
    in_blocks,
    module_of,
    skipped,
)
from mirada.adapt.packed import Packed
from mirada.errors import ConfigError, TensorError
from mirada.keys import Keys

_FORMAT, _FLOAT = "pack-quantized", "float-quantized"
_IGNORED = (
    "quantization_status", "global_compression_ratio", "version", "kv_cache_scheme", "moe_sparsity_config",
)  # fmt: skip
_OBSERVED = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")


@dataclass(frozen=True)
class Group:
    """The settings of the modules that ``targets`` match."""

    targets: tuple[str, ...]
    bits: int
    """4 or 8; 0: floats."""
    group_size: int
    symmetric: bool = True
    reordered: bool = False
    block: tuple[int, int] | None = None
    """Of floats: rows and columns that share a scale; None: a row, or all."""


@dataclass(frozen=True)
class Compressed:
    """See ``method.Scheme``."""

    groups: tuple[Group, ...]
    ignored: tuple[str, ...]
    method: str = "compressed-tensors"
    widens: bool = False

    def covers(self, name: str, shape: Shape) -> bool:
        return in_blocks(name) and len(shape) == 2 and not _matches(name, self.ignored) and self._group(name) is not None

    def _group(self, name: str) -> Group | None:
        return next((g for g in self.groups if "Linear" in g.targets or _matches(name, g.targets)), None)

    def _settings(self, name: str) -> Group:
        group = self._group(name)
        assert group is not None, f"{name} is not covered"
        return group

    def fields(self, name: str, shape: Shape) -> Mapping[str, Field]:
        rows, columns = shape
        g = self._settings(name)
        if not g.bits:
            return _float_fields(name, shape, g.block)
        count = ceil_div(columns, g.group_size or columns)
        made = {
            f"{name}_packed": Field(((rows, ceil_div(columns * g.bits, 32)),), ("I32",)),
            f"{name}_scale": Field(((rows, count),), FLOATS),
            f"{name}_shape": Field(((2,),), ("I64", "I32")),
        }
        if not g.symmetric:
            made[f"{name}_zero_point"] = Field(((ceil_div(rows * g.bits, 32), count),), ("I32",))
        if g.reordered:
            made[f"{name}_g_idx"] = Field(((columns,),), ("I32", "I64"))
        return made

    def unpack(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
        rows, columns = shape
        g = self._settings(name)
        if not g.bits:
            return floats(name, tensors[name], tensors[f"{name}_scale"], g.block)
        said = tuple(tensors[f"{name}_shape"].tolist())
        if said != shape:
            raise TensorError(f"'{name}_shape' says {list(said)}, expected {list(shape)}", "take files of one save")
        values = as_bytes(tensors[f"{name}_packed"])[:, : ceil_div(columns * g.bits, 8)].contiguous()
        zeros = None
        if not g.symmetric:
            stored = as_bytes(tensors[f"{name}_zero_point"].T)
            zeros = (halves(stored) if g.bits == 4 else stored).T[:rows].contiguous()
        groups = tensors.get(f"{name}_g_idx")
        if groups is not None:
            count = tensors[f"{name}_scale"].shape[1]
            if int(groups.min()) < 0 or int(groups.max()) >= count:
                raise TensorError(f"'{name}_g_idx' names a group outside 0 to {count - 1}", "download the file again")
            groups = groups.to(torch.int32)
        return Packed(values, tensors[f"{name}_scale"], columns, g.bits, g.group_size, zeros, groups)


def _float_fields(name: str, shape: Shape, block: tuple[int, int] | None) -> dict[str, Field]:
    return {
        name: Field((shape,), ("F8_E4M3",)),
        f"{name}_scale": Field(scale_shapes(shape, block), FLOATS),
        f"{module_of(name)}.input_scale": ACTIVATIONS,
    }


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    """Module names are given whole, or as ``re:`` and a pattern that its beginning must match."""
    module = module_of(name)
    return any(re.match(t[3:], module) is not None if t.startswith("re:") else t == module for t in targets)


def read(keys: Keys) -> Compressed:
    """``quantization_config`` of a compressed-tensors checkpoint; ConfigError names formats and settings that are not read."""
    keys.ignore(*_IGNORED)
    top = keys.take("format", str)
    _form(top, keys.where)
    for name in ("sparsity_config", "transform_config"):
        if keys.take(name, (dict, type(None)), None):
            raise ConfigError(f"{keys.where}: {name} is not supported", f"supported: {_FORMAT!r} weights alone")
    found = keys.take("config_groups", dict)
    groups = [_group(value, f"{keys.where}: {name}", top) for name, value in found.items()]
    return Compressed(tuple(groups), skipped(keys, "ignore"))


def _form(form: Any, where: str) -> None:
    if form not in (_FORMAT, _FLOAT):
        raise ConfigError(
            f"{where}: compressed-tensors format {form!r} is not supported", f"supported: {_FORMAT!r} and {_FLOAT!r}"
        )


def _group(mapping: Any, where: str, top: str) -> Group:
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where} holds a {type(mapping).__name__}", "it must be a mapping of settings")
    keys = Keys(mapping, where)
    form = keys.take("format", (str, type(None)), None) or top
    _form(form, where)
    if form == _FLOAT:
        keys.ignore("input_activations")  # how they would be rounded; they stay as they are
    for name in ("output_activations",) if form == _FLOAT else ("input_activations", "output_activations"):
        if keys.take(name, (dict, type(None)), None):
            raise ConfigError(f"{where}: quantised activations ({name}) are not supported", "supported: weights alone")
    targets = tuple(str(t) for t in keys.take("targets", list))
    weights = Keys(keys.take("weights", dict), f"{where}: weights")
    made = (_float_weights if form == _FLOAT else _weights)(weights, targets)
    weights.done()
    keys.done()
    return made


def _weights(keys: Keys, targets: tuple[str, ...]) -> Group:
    keys.ignore(*_OBSERVED)
    keys.expect("type", "int")
    keys.expect("dynamic", False)
    keys.expect("block_structure", None)
    keys.expect("num_bits", 4, 8)
    keys.expect("strategy", "group", "channel")
    keys.expect("actorder", None, "group", "weight", "static", "dynamic")
    size = keys.take("group_size", (int, type(None)), None)
    by_group = keys.take("strategy", str) == "group"
    if by_group and size is None:
        raise ConfigError(f"{keys.where}: strategy 'group' without a group_size", "give the number of columns of a group")
    return Group(
        targets=targets,
        bits=keys.take("num_bits", int),
        group_size=group_size(size, keys.where) if by_group and size is not None else 0,
        symmetric=keys.take("symmetric", bool, True),
        # "weight" orders columns while it quantises and puts them back; "group" leaves their groups apart.
        reordered=keys.take("actorder", (str, type(None)), None) in ("group", "dynamic"),
    )


def _float_weights(keys: Keys, targets: tuple[str, ...]) -> Group:
    keys.ignore(*_OBSERVED, "group_size")
    keys.expect("type", "float")
    keys.expect("num_bits", 8)
    keys.expect("dynamic", False)
    keys.expect("symmetric", True)
    keys.expect("actorder", None)
    keys.expect("strategy", "channel", "tensor", "block")
    by_block, block = keys.take("strategy", str) == "block", keys.take("block_structure", (list, type(None)), None)
    return Group(targets, 0, 0, block=block_of(block, f"{keys.where}: block_structure") if by_block else None)
