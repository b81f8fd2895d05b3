"""Next-token prediction on the tokens that bear loss, optionally with dense supervision of the vision tower."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mirada.train.batch import IGNORE, TrainBatch
from mirada.train.objectives.base import Loss
from mirada.train.objectives.dense import DenseHeads


class NextToken:
    """Cross entropy in float32 over labelled places alone; ``dense_weight`` adds the dense loss of the same pass."""

    def __init__(self, heads: DenseHeads | None = None, dense_weight: float = 0.0) -> None:
        self.heads = heads
        self.dense_weight = dense_weight

    def __call__(self, model: Any, batch: TrainBatch) -> Loss:
        features, dense = self._see(model, batch)
        hidden = model(batch.batch, features)
        rows = (batch.labels != IGNORE).nonzero()[:, 0]
        labels = batch.labels[rows]
        logits = model.logits(hidden[rows])
        loss = F.cross_entropy(logits, labels)
        figures = {"token_loss": loss.detach(), "token_right": (logits.detach().argmax(-1) == labels).float().mean()}
        if dense is None:
            return Loss(loss, figures)
        return Loss(loss + self.dense_weight * dense.total, {**figures, **dense.figures})

    def _see(self, model: Any, batch: TrainBatch) -> tuple[torch.Tensor | None, Loss | None]:
        """Features of all pictures, and the dense loss on the way."""
        if batch.media is None:
            return None, None
        if self.heads is None or not batch.dense or self.dense_weight == 0:
            return model.encode(batch.media), None
        media = batch.media
        patches = model.visual(media.pixels, media.grids, model.segments(media.grids))
        return model.projector(patches, media.grids), self.heads.loss(patches, batch.dense)
