"""Dense supervision of the vision tower from labels that are known for every patch.

A drawn picture comes with its truth: which character, shape or colour lies under each patch. Telling it to the tower
directly teaches reading far sooner than a caption alone does (cf. dense labels in LeCun et al. 1989 for ZIP codes, and
pixel-to-sequence alignment in CTC, Graves et al. 2006, which has to find what is given here).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mirada.train.batch import IGNORE, TrainBatch
from mirada.train.objectives.base import Loss


class DenseHeads(nn.Module):
    """Linear probes on patch features. ``kinds``: name -> (labels per patch, number of classes).

    They exist in training alone and are never exported.
    """

    def __init__(self, width: int, kinds: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.kinds = dict(kinds)
        self.heads = nn.ModuleDict({name: nn.Linear(width, places * classes) for name, (places, classes) in kinds.items()})

    def loss(self, features: torch.Tensor, labels: Mapping[str, torch.Tensor]) -> Loss:
        """Mean over kinds of the cross entropy over known places. ``features`` [N, D]; ``labels`` name -> [N(, places)]."""
        total = features.new_zeros(())
        figures: dict[str, torch.Tensor] = {}
        for name, known in labels.items():
            classes = self.kinds[name][1]
            known = known.reshape(-1)
            rows = (known != IGNORE).nonzero()[:, 0]
            if not len(rows):
                continue
            logits = self.heads[name](features).view(-1, classes)[rows]
            total = total + F.cross_entropy(logits, known[rows])
            marked = known[rows] > 0  # class 0 is "nothing here", which is most of a picture and easy
            hits = (logits.detach().argmax(-1) == known[rows]) & marked
            figures[f"dense_{name}"] = hits.sum() / marked.sum().clamp(min=1)
        return Loss(total, figures)


class Dense:
    """The vision tower alone."""

    def __init__(self, heads: DenseHeads) -> None:
        self.heads = heads

    def __call__(self, model: Any, batch: TrainBatch) -> Loss:
        assert batch.media is not None
        media = batch.media
        return self.heads.loss(model.visual(media.pixels, media.grids, model.segments(media.grids)), batch.dense)
