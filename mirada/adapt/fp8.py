"""fp8 weights: e4m3 values with a scale for each block (DeepSeek, 128 x 128; arXiv 2412.19437, 3.3), each row, or the matrix.

Weights only: the released kernels also round activations to fp8, which is less exact than what is computed here.
Ported facts: ``inference/kernel.py`` (weight_dequant) of deepseek-ai/DeepSeek-V3; AutoFP8 and vLLM ``quantization/fp8.py``
(``weight_scale``, ``input_scale``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mirada.adapt.method import FLOATS, Field, Shape, ceil_div, in_blocks, module_of, named, skipped
from mirada.adapt.packed import Packed
from mirada.errors import ConfigError, TensorError
from mirada.keys import Keys


@dataclass(frozen=True)
class FP8:
    """See ``method.Scheme``. ``block``: rows and columns that share a scale; None: a row, or all, as the file has it."""

    block: tuple[int, int] | None
    skipped: tuple[str, ...]
    method: str = "fp8"
    widens: bool = False

    def covers(self, name: str, shape: Shape) -> bool:
        return in_blocks(name) and len(shape) == 2 and not named(module_of(name), self.skipped)

    def fields(self, name: str, shape: Shape) -> Mapping[str, Field]:
        if self.block is not None:
            scale = Field(scale_shapes(shape, self.block), FLOATS)
            return {name: Field((shape,), ("F8_E4M3",)), f"{name}_scale_inv": scale}
        scale = Field(scale_shapes(shape, None), FLOATS, optional=True)
        made = {name: Field((shape,), ("F8_E4M3",)), **{f"{name}{suffix}": scale for suffix in SCALES}}
        return made | {f"{module_of(name)}.input_scale": ACTIVATIONS}

    def unpack(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
        if self.block is not None:
            return floats(name, tensors[name], tensors[f"{name}_scale_inv"], self.block)
        scale = next((tensors[f"{name}{suffix}"] for suffix in SCALES if f"{name}{suffix}" in tensors), None)
        if scale is None:
            raise TensorError(f"there is no '{name}_scale'", "take files of one save")
        return floats(name, tensors[name], scale)


SCALES = ("_scale", "_scale_inv")
"""What is written after a matrix' name: by AutoFP8 and vLLM, and by transformers."""
ACTIVATIONS = Field(((), (1,)), FLOATS, optional=True)
"""The scale by which other software rounds activations; nothing here does."""


def scale_shapes(shape: Shape, block: tuple[int, int] | None) -> tuple[Shape, ...]:
    """Shapes that the scales of a matrix of blocks, or (None) of rows or of all, may have."""
    if block is not None:
        return (tuple(ceil_div(n, b) for n, b in zip(shape, block, strict=True)),)
    return (), (1,), (1, 1), (shape[0], 1), (shape[0],)


def block_of(value: list[int] | None, what: str) -> tuple[int, int]:
    """Rows and columns of a block, as ``what`` gives them. Raises ConfigError."""
    if value is None or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise ConfigError(f"{what} is {value}", "it must be two numbers, as [128, 128]")
    return value[0], value[1]


def floats(name: str, values: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> Packed:
    """e4m3 [R, C] with scales of blocks, of rows ([R] or [R, 1]), or of all (one number). TensorError for what is no number."""
    if ((values.view(torch.uint8) & 0x7F) == 0x7F).any():
        raise TensorError(f"tensor {name!r} holds values that are no numbers", "download the file again")
    rows, columns = values.shape
    if block is not None:
        return Packed(values, scale, columns, group_size=block[1], row_block=block[0])
    scale = scale.reshape(-1, 1)
    return Packed(values, scale, columns, row_block=max(rows, 1) if len(scale) == 1 else 1)


def read(keys: Keys) -> FP8:
    """``quantization_config`` of an fp8 checkpoint; ConfigError names another kind of floats, or blocks that are none."""
    keys.expect("fmt", "e4m3", "float8_e4m3fn")
    # How activations would be rounded; they stay as they are.
    keys.ignore("activation_scheme", "scale_fmt", "ignored_layers", "kv_cache_scheme")
    block = keys.take("weight_block_size", (list, type(None)), None)
    left = (*skipped(keys, "modules_to_not_convert"), *skipped(keys, "ignored_layers"))
    return FP8(None if block is None else block_of(block, f"{keys.where}: weight_block_size"), left)
