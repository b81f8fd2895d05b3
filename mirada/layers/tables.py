"""Where the tokens of a batch lie in pages: what kernels read.

B sequences; T new tokens of all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mirada.layers.batch import Batch


@dataclass(eq=False)
class Tables:
    """Where the tokens of one batch lie, made once for all layers."""

    batch: Batch
    counts: tuple[int, ...]
    """New tokens of each sequence."""
    rows: Tensor
    """int64 [T]: page * (tokens of a page) + offset of each new token; of a fixed batch negative where there is none."""
    block_tables: Tensor
    """int32 [B, most pages of a sequence]; behind a sequence's own, zeros."""
    lengths: Tensor
    """int32 [B]: past + new tokens."""
    fixed: bool = False
    """The tensors are refilled from step to step (``engine.graphs``): nothing but them may be read, and rows may be empty."""
    places: tuple[Tensor, ...] | None = None
    """What a kernel makes of the sizes, once for all layers."""
    some: dict[tuple[int, ...], Tables] = field(default_factory=dict)
    """Of some of the sequences, by their numbers; ``rows`` are all."""
    _elsewhere: dict[torch.device, Tables] = field(default_factory=dict)

    def on(self, device: torch.device) -> Tables:
        """The same with its tensors on ``device``."""
        if device == self.rows.device:
            return self
        if device not in self._elsewhere:
            rows, tables, lengths = (x.to(device) for x in (self.rows, self.block_tables, self.lengths))
            self._elsewhere[device] = Tables(self.batch, self.counts, rows, tables, lengths, self.fixed)
        return self._elsewhere[device]
