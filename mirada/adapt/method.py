"""What a quantisation format must say about itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mirada.adapt.packed import Packed
from mirada.errors import ConfigError
from mirada.keys import Keys

Shape = tuple[int, ...]

# The blocks of the language model, under the names of every release; towers, projectors, embeddings and heads lie outside.
_BLOCKS = re.compile(r"(?:model\.|language_model\.)*layers\.\d+\.")
_LITTLE = sys.byteorder == "little"


@dataclass(frozen=True)
class Field:
    """A stored tensor that belongs to a quantised matrix: the shapes and types (names of the file format) it may have."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    optional: bool = False


FLOATS = ("F16", "BF16", "F32")


class Scheme(Protocol):
    """A format with its settings. Matrices are named as the plain checkpoint would name them (``X.weight``)."""

    method: str
    widens: bool
    """Always widened on load: nothing computes with the packed form."""

    def covers(self, name: str, shape: Shape) -> bool:
        """Whether the settings let tensor ``name`` be quantised. A checkpoint may still hold it plain."""
        ...

    def fields(self, name: str, shape: Shape) -> Mapping[str, Field]:
        """Stored name -> what lies there, for a matrix of ``shape`` [R, C]."""
        ...

    def unpack(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
        """The stored tensors of one matrix in canonical form. TensorError for values that make no sense."""
        ...


def in_blocks(name: str) -> bool:
    """Whether a stored tensor is a weight in the blocks of the language model."""
    return name.endswith(".weight") and _BLOCKS.match(name) is not None


def module_of(name: str) -> str:
    return name.removesuffix(".weight")


def named(module: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of ``patterns`` is a part of the module's path: ``visual`` names ``visual.blocks.0``, not ``visuals``."""
    return any(f".{pattern.strip('.')}." in f".{module}." for pattern in patterns)


def as_bytes(words: Tensor) -> Tensor:
    """int32 [.., n] -> uint8 [.., 4n], the lowest byte of each word first."""
    made = words.contiguous().view(torch.uint8)
    return made if _LITTLE else made.view(*words.shape, 4).flip(-1).flatten(-2)


def halves(packed: Tensor) -> Tensor:
    """uint8 [.., n] -> uint8 [.., 2n]: each byte's low four bits, then its high four."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def group_size(size: int, where: str) -> int:
    """Columns of a group, 0 for all (-1 in files). ConfigError for other numbers below one."""
    if size != -1 and size < 1:
        raise ConfigError(f"{where}: group_size is {size}", "it must be a number of columns, or -1 for all")
    return max(size, 0)


def skipped(keys: Keys, name: str) -> tuple[str, ...]:
    """A list of modules that stay as they are; null means none."""
    return tuple(str(item) for item in keys.take(name, (list, type(None)), None) or ())
