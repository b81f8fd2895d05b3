"""DeepSeek's block fp8: e4m3 values, one float32 scale for each 128 x 128 block (arXiv 2412.19437, 3.3).

Weights only: the released kernels also round activations to fp8, which is less exact than what is computed here.
Ported fact: ``inference/kernel.py`` (weight_dequant) of deepseek-ai/DeepSeek-V3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mirada.adapt.method import Field, Shape, ceil_div, in_blocks, module_of, named, skipped
from mirada.adapt.packed import Packed
from mirada.errors import ConfigError, TensorError
from mirada.keys import Keys


@dataclass(frozen=True)
class BlockFP8:
    """See ``method.Scheme``. ``block``: rows and columns that share a scale."""

    block: tuple[int, int]
    skipped: tuple[str, ...]
    method: str = "fp8"
    widens: bool = False

    def covers(self, name: str, shape: Shape) -> bool:
        return in_blocks(name) and len(shape) == 2 and not named(module_of(name), self.skipped)

    def fields(self, name: str, shape: Shape) -> Mapping[str, Field]:
        blocks = tuple(ceil_div(n, b) for n, b in zip(shape, self.block, strict=True))
        return {
            name: Field((shape,), ("F8_E4M3",)),
            f"{name}_scale_inv": Field((blocks,), ("F32", "BF16", "F16")),
        }

    def unpack(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
        rows, columns = self.block
        if ((tensors[name].view(torch.uint8) & 0x7F) == 0x7F).any():
            raise TensorError(f"tensor {name!r} holds values that are no numbers", "download the file again")
        return Packed(tensors[name], tensors[f"{name}_scale_inv"], shape[1], group_size=columns, row_block=rows)


def read(keys: Keys) -> BlockFP8:
    """``quantization_config`` of a block-fp8 checkpoint; ConfigError names fp8 without blocks or of another kind."""
    keys.expect("fmt", "e4m3", "float8_e4m3fn")
    # How activations would be rounded; they stay as they are.
    keys.ignore("activation_scheme", "scale_fmt", "ignored_layers")
    block = keys.take("weight_block_size", (list, type(None)), None)
    if block is None:
        raise ConfigError(
            f"{keys.where}: fp8 with one scale per tensor is not supported", "supported: weight_block_size, as [128, 128]"
        )
    if len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise ConfigError(f"{keys.where}: weight_block_size is {block}", "it must be two numbers, as [128, 128]")
    return BlockFP8((block[0], block[1]), (*skipped(keys, "modules_to_not_convert"), *skipped(keys, "ignored_layers")))
