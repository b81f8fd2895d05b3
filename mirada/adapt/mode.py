"""Precision modes: how the matrices of a plain checkpoint are kept, chosen when the model is loaded.

``exact``  on a CPU only: as they are stored, with float32 activations: bfloat16 matrices stay bfloat16 and are widened where
           they are used.
``int8``   8 bits, a float16 scale for every 128 columns.
``int4``   4 bits, a float16 scale for every 32 columns; the head of the vocabulary takes 8 bits, as it decides near ties.

In the last two the activations in front of integers are rounded to 8 bits in blocks of 32 on a CPU, so neither another row nor
an outlier in another block changes a result; on a GPU they stay as they are. Vision tower, projector, embeddings, norms,
routers and the latent's ``kv_b`` are never rounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mirada.adapt.packed import Packed, join_halves
from mirada.errors import SettingsError, TensorError, nearest
from mirada.layers.kernels.matrix import Format

Name = Literal["exact", "int8", "int4"]
NAMES = ("exact", "int8", "int4")
HEAD_GROUP = 128
_GROUPS = {"exact": (0,), "int8": (128, 64, 32, 0), "int4": (32, 64, 128)}


@dataclass(frozen=True)
class Mode:
    """``group``: columns that share a scale; 0: the whole row."""

    name: Name
    group: int = 0

    @property
    def format(self) -> Format:
        return {"exact": Format.BF16, "int8": Format.INT8, "int4": Format.INT4}[self.name]

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded."""
        return self.name != "exact"

    def __str__(self) -> str:
        return f"{self.name}:{self.group}" if self.rounds else self.name


def parse(quant: str | Mode | None, load_in_8bit: bool = False, load_in_4bit: bool = False) -> Mode | None:
    """``None``, ``exact``, ``int8``, ``int4`` or, with another group, ``int4:64``; the two flags are int8 and int4 by the names
    that users of other software know. SettingsError for others, or for more than one."""
    asked = [name for name, flag in (("int8", load_in_8bit), ("int4", load_in_4bit)) if flag]
    if len(asked) + (quant is not None) > 1:
        raise SettingsError("more than one of quant, load_in_8bit and load_in_4bit is given", "give one of them")
    if quant is None or isinstance(quant, Mode):
        return parse(asked[0]) if asked else quant
    found = re.fullmatch(r"([a-z0-9]+)(?::(\d+))?", str(quant))
    if found is None or found[1] not in NAMES:
        raise SettingsError(f"quant={quant!r} is unknown", nearest(str(quant), NAMES))
    groups = _GROUPS[found[1]]
    group = int(found[2]) if found[2] else groups[0]
    if group not in groups or (found[2] and found[1] == "exact"):
        raise SettingsError(
            f"quant={quant!r}: {found[1]} has no groups of {group}",
            f"use {', '.join(f'{found[1]}:{g}' for g in groups) if len(groups) > 1 else found[1]}",
        )
    return Mode(found[1], group)  # pyright: ignore[reportArgumentType]


HEAD = Mode("int8", HEAD_GROUP)
"""What the head takes in both modes that round."""


def quantise(weight: Tensor, bits: int, group: int) -> Packed:
    """Floats [R, C] to integers with float16 scales: the reference of ``mr_quantise``, and what stands without it.

    8 bits: the largest magnitude of a group to 127. 4 bits: -8 .. 7, where of several scales the one of least squared error
    stays. TensorError for values that are not finite.
    """
    if not torch.isfinite(weight).all():
        raise TensorError("a weight holds values that are not finite", "download the file again")
    rows, columns = weight.shape
    width = group or columns
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % width)).view(rows, -1, width)
    most = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    scale = (most.abs() / 127 if bits == 8 else _searched(padded, most)).to(torch.float16).float()
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    stored = (padded / divisor).round_().clamp_(low, high).add_(128 if bits == 8 else 8).to(torch.uint8)
    values = stored.flatten(1)[:, :columns]
    return Packed(
        values.contiguous() if bits == 8 else join_halves(values), scale.squeeze(-1).to(torch.float16), columns, bits, group
    )


def _searched(x: Tensor, most: Tensor) -> Tensor:
    best, gain = torch.zeros_like(most), torch.full_like(most, -1.0)
    safe = torch.where(most == 0, torch.ones_like(most), most)
    for step in range(-6, 7):
        values = (x * ((-8.0 + 0.1 * step) / safe)).round_().clamp_(-8, 7)
        product, square = (values * x).sum(-1, keepdim=True), (values * values).sum(-1, keepdim=True)
        better = (square > 0) & (product * product > gain * square)
        gain = torch.where(better, product * product / square, gain)
        best = torch.where(better, product / square, best)
    return torch.where(most == 0, torch.zeros_like(best), best)
