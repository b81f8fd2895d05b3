"""AWQ, the "gemm" layout: 4 bits, zero points, groups along the inputs (Lin et al., arXiv 2306.00978).

Ported fact: the order of columns in a word, AutoAWQ ``awq/utils/packing_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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
    named,
    skipped,
)
from mirada.adapt.packed import Packed, join_halves
from mirada.errors import ConfigError
from mirada.keys import Keys

_WORD = 8
"""Columns in an int32."""
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of the word hold column j."""
_UNPACK_COLUMNS = 1024
_IGNORED = ("backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "quant_path", "provider")


@dataclass(frozen=True)
class AWQ:
    """See ``method.Scheme``."""

    group_size: int
    skipped: tuple[str, ...]
    method: str = "awq"
    widens: bool = False

    def covers(self, name: str, shape: Shape) -> bool:
        return in_blocks(name) and len(shape) == 2 and not named(module_of(name), self.skipped)

    def fields(self, name: str, shape: Shape) -> Mapping[str, Field]:
        rows, columns = shape
        x, words, groups = module_of(name), ceil_div(rows, _WORD), ceil_div(columns, self.group_size or columns)
        return {
            f"{x}.qweight": Field(((columns, words),), ("I32",)),
            f"{x}.qzeros": Field(((groups, words),), ("I32",)),
            f"{x}.scales": Field(((groups, rows), (groups, words * _WORD)), FLOATS),
        }

    def unpack(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
        rows, columns = shape
        x = module_of(name)
        words = tensors[f"{x}.qweight"]
        values = torch.empty(rows, ceil_div(columns, 2), dtype=torch.uint8)
        step = _UNPACK_COLUMNS // _WORD
        for at in range(0, words.shape[1], step):  # a slice of outputs at a time: unpacked, a matrix is twice as large
            made = _in_order(words[:, at : at + step])[:, : rows - at * _WORD]
            values[at * _WORD : at * _WORD + made.shape[1]] = join_halves(made.T)
        return Packed(
            values,
            tensors[f"{x}.scales"][:, :rows].T.contiguous(),
            columns,
            bits=4,
            group_size=self.group_size,
            zeros=_in_order(tensors[f"{x}.qzeros"])[:, :rows].T.contiguous(),
        )


def _in_order(words: Tensor) -> Tensor:
    """int32 [n, w] -> uint8 [n, 8w], columns in their own order."""
    stored = halves(as_bytes(words)).view(len(words), -1, _WORD)
    return stored[..., list(_PLACE)].flatten(1)


def read(keys: Keys) -> AWQ:
    """``quantization_config`` of an AWQ checkpoint; ConfigError names a layout other than gemm, or other bits than four."""
    keys.ignore(*_IGNORED)
    for name in ("bits", "w_bit"):
        keys.expect(name, 4)
    version = keys.take("version", str, "gemm")
    if version.lower() != "gemm":
        raise ConfigError(f"{keys.where}: AWQ version {version!r} is not supported", "supported: 'gemm' (convert it)")
    keys.expect("zero_point", True)
    size = keys.take("group_size", int, None) if "group_size" in keys.mapping else keys.take("q_group_size", int, 128)
    keys.ignore("q_group_size")
    return AWQ(group_size(size, keys.where), skipped(keys, "modules_to_not_convert"))
