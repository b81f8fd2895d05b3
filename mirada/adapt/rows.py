"""Mirada's own int8: every matrix of the model, embeddings and towers too, as int8 rows with one float16 scale each.

Written by ``models.load.save_model``; ``layers.linear.quantise_rows`` makes the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mirada.adapt.method import Field, Shape
from mirada.adapt.packed import Packed
from mirada.keys import Keys

NAME = "mirada_int8_rows"
SCALE = "_scale"
"""``X`` stored as int8 has its scales, float16 [rows], beside it as ``X_scale``."""


@dataclass(frozen=True)
class Rows:
    """See ``method.Scheme``."""

    method: str = NAME
    widens: bool = True

    def covers(self, name: str, shape: Shape) -> bool:
        return len(shape) > 1

    def fields(self, name: str, shape: Shape) -> Mapping[str, Field]:
        return {name: Field((shape,), ("I8",)), name + SCALE: Field((shape[:1],), ("F16",))}

    def unpack(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
        values = tensors[name].flatten(1)
        unsigned = values.view(torch.uint8) ^ 0x80  # moves the middle from 0 to 128
        return Packed(unsigned, tensors[name + SCALE][:, None], values.shape[1])


def read(keys: Keys) -> Rows:
    return Rows()
