"""Rendered samples to packed tensors. T tokens of all sequences end to end; N patches of all pictures end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from mirada.errors import MessageError
from mirada.layers.batch import Batch, MediaBatch
from mirada.media.grid import GridRule, Patches, normalise
from mirada.models.positions import positions
from mirada.types import Prompt

IGNORE = -100
"""Label of a place that bears no loss (torch's own default)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One training sample: a rendered chat, its pictures in order, and what else is known of every patch.

    ``dense``: name -> integer labels [n, ...] over the patches of all its pictures, ``IGNORE`` where unknown.
    """

    prompt: Prompt
    media: tuple[Patches, ...] = ()
    dense: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """Packed sequences with labels.

    ``labels`` [T]: the token after each place, ``IGNORE`` where no loss is taken. ``dense``: name -> [N, ...].
    """

    batch: Batch
    media: MediaBatch | None
    labels: torch.Tensor
    dense: Mapping[str, torch.Tensor]

    def to(self, device: torch.device) -> TrainBatch:
        """This batch on ``device``."""
        if self.labels.device == device:
            return self
        batch, media = self.batch, self.media
        rows = None if batch.feature_rows is None else batch.feature_rows.to(device)
        batch = replace(batch, tokens=batch.tokens.to(device), positions=batch.positions.to(device), feature_rows=rows)
        media = None if media is None else replace(media, pixels=media.pixels.to(device))
        return TrainBatch(batch, media, self.labels.to(device), {name: known.to(device) for name, known in self.dense.items()})

    @property
    def num_tokens(self) -> int:
        return len(self.batch.tokens)

    @property
    def num_patches(self) -> int:
        return 0 if self.media is None else len(self.media.pixels)


def collate(examples: Sequence[Example], rule: GridRule) -> TrainBatch:
    """Pack ``examples`` into one batch; each stays its own sequence. Raises MessageError on an unlabelled prompt."""
    tokens = np.concatenate([np.asarray(e.prompt.tokens, np.int64) for e in examples])
    media = [patches for e in examples for patches in e.media]
    lengths = tuple(len(e.prompt.tokens) for e in examples)
    batch = Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(
            np.concatenate([positions(len(e.prompt.tokens), e.prompt.spans)[0] for e in examples], axis=1)
        ),
        lengths=lengths,
        past=(0,) * len(examples),
        slots=tuple(range(len(examples))),
        feature_rows=_feature_rows(examples, lengths),
    )
    labels = torch.from_numpy(np.concatenate([_labels(e.prompt) for e in examples]))
    return TrainBatch(batch, _media_batch(media, rule), labels, _dense(examples))


def _labels(prompt: Prompt) -> np.ndarray:
    if len(prompt.learn) != len(prompt.tokens):
        raise MessageError("a training prompt carries no learn flags", "render it with the renderer that marks assistant text")
    labels = np.full(len(prompt.tokens), IGNORE, np.int64)
    learned = np.flatnonzero(np.asarray(prompt.learn[1:], bool))
    labels[learned] = np.asarray(prompt.tokens, np.int64)[learned + 1]
    return labels


def _feature_rows(examples: Sequence[Example], lengths: tuple[int, ...]) -> torch.Tensor | None:
    starts = np.cumsum((0, *lengths[:-1]))
    rows = [
        np.arange(start + span.start, start + span.end)
        for start, example in zip(starts, examples, strict=True)
        for span in example.prompt.spans
    ]
    return torch.from_numpy(np.concatenate(rows)) if rows else None


def _media_batch(media: Sequence[Patches], rule: GridRule) -> MediaBatch | None:
    if not media:
        return None
    pixels = normalise(np.concatenate([m.pixels for m in media]), rule)
    grids = tuple(grid for m in media for grid in m.grids)
    kinds: tuple[Literal["image", "video"], ...] = tuple(m.kind for m in media for _ in m.grids)
    return MediaBatch(torch.from_numpy(pixels), grids, kinds)


def _dense(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Stack each kind of patch label; an example that lacks a kind counts as unknown there."""
    shapes = {name: labels.shape[1:] for e in examples for name, labels in e.dense.items()}
    made: dict[str, torch.Tensor] = {}
    for name, tail in shapes.items():
        parts = [_dense_of(example, name, tail) for example in examples if example.media]
        made[name] = torch.from_numpy(np.concatenate(parts))
    return made


def _dense_of(example: Example, name: str, tail: tuple[int, ...]) -> np.ndarray:
    num_patches = sum(len(m.pixels) for m in example.media)
    if name in example.dense:
        return np.asarray(example.dense[name], np.int64)
    return np.full((num_patches, *tail), IGNORE, np.int64)
