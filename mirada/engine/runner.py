"""Drives the model: one packed forward over chunks of sequences, and the choice of tokens. Knows sequences and tensors, no
text and no waiting lines.

T tokens, F features, D width, V vocabulary, R rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirada.engine import sample
from mirada.engine.adapters import Adapters
from mirada.engine.chunk import Choice, Chunk
from mirada.engine.graphs import Graphs
from mirada.engine.ngram import accept
from mirada.engine.sample import Chooser, Picked
from mirada.engine.sequence import Sequence
from mirada.layers.batch import Batch
from mirada.layers.cache import Cache
from mirada.types import Sampling


class Runner:
    """One model on one device, with its cache."""

    def __init__(self, model: Any, cache: Cache, eos: Iterable[int], adapters: Adapters | None = None) -> None:
        self.model = model
        self.cache = cache
        self.adapters = adapters or Adapters(model)
        self.eos = frozenset(eos)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.graphs: Graphs | None = None
        """Where steps that only decode go in fixed buffers."""

    def run(self, chunks: Seq[Chunk]) -> list[Choice]:
        """Compute the chunks by one forward, and choose the tokens that follow. Changes nothing but the cache, where it
        overwrites, so it may be done again."""
        if self.graphs is not None and self.graphs.takes(chunks) and (fixed := self.graphs.logits(chunks)) is not None:
            return self._sample(chunks, fixed)
        batch, features = self._batch(chunks)
        with self.adapters.tokens([(chunk.sequence.lora, chunk.count, chunk.rows) for chunk in chunks]):
            logits = self._forward(batch, features, _rows(chunks))
        if logits is None:
            return [Choice()] * len(chunks)
        made = iter(self._sample([chunk for chunk in chunks if chunk.rows], logits))
        return [next(made) if chunk.rows else Choice() for chunk in chunks]

    def _forward(self, batch: Batch, features: Tensor | None, rows: np.ndarray | None) -> Tensor | None:
        """Logits [R, V] of the ``rows`` of ``batch`` that are wanted: None means all, and none are None."""
        if rows is None:
            return self.model.next_logits(batch, features, self.cache)
        hidden = self.model.forward(batch, features, self.cache)
        return self.model.logits(hidden[torch.from_numpy(rows).to(self.device)]) if len(rows) else None

    def _batch(self, chunks: Seq[Chunk]) -> tuple[Batch, Tensor | None]:
        if all(_decodes(chunk) for chunk in chunks):
            return self._decoding([chunk.sequence for chunk in chunks]), None
        tokens: list[int] = []
        places, rows, features = [], [], []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.computed
            if sequence.features is not None:
                at, found = sequence.features.take(start, chunk.end)
                rows.append(at + (len(tokens) - start))
                features += found
            tokens += sequence.ids(start, chunk.end)
            places.append(sequence.places(start, chunk.end))
        return Batch(
            tokens=torch.tensor(tokens, dtype=torch.int64, device=self.device),
            positions=torch.from_numpy(np.concatenate(places, 1)).to(self.device),
            lengths=tuple(chunk.count for chunk in chunks),
            past=tuple(chunk.sequence.computed for chunk in chunks),
            slots=tuple(chunk.sequence.slot for chunk in chunks),
            feature_rows=torch.from_numpy(np.concatenate(rows)).to(self.device) if features else None,
        ), torch.cat(features) if features else None

    def _decoding(self, sequences: Seq[Sequence]) -> Batch:
        """The last token of each sequence."""
        place = [s.first_position + len(s.tokens) - 1 for s in sequences]
        return Batch(
            tokens=torch.tensor([s.tokens[-1] for s in sequences], dtype=torch.int64, device=self.device),
            positions=torch.tensor([place, place, place], dtype=torch.int64, device=self.device),
            lengths=(1,) * len(sequences),
            past=tuple(s.computed for s in sequences),
            slots=tuple(s.slot for s in sequences),
        )

    def _sample(self, chunks: Seq[Chunk], logits: Tensor) -> list[Choice]:
        """Tokens from ``logits`` [R, V], of which each chunk has its rows, at least one; those of a draft are the likeliest."""
        choosers = [chunk.sequence.chooser if chunk.rows == 1 else None for chunk in chunks for _ in range(chunk.rows)]
        picked = self._pick([chunk.sequence for chunk in chunks for _ in range(chunk.rows)], logits, choosers)
        made, start = [], 0
        for chunk in chunks:
            end = start + chunk.rows
            error = next((picked.errors[row] for row in range(start, end) if row in picked.errors), None)
            tokens = picked.tokens[start:end]
            if chunk.rows > 1:
                tokens = tokens[: accept(chunk.sequence.draft, tokens) + 1]
            made.append(Choice(tokens, picked.reports[start : start + len(tokens)], error))
            start = end
        return made

    def _pick(self, sequences: Seq[Sequence], logits: Tensor, choosers: Seq[Chooser | None]) -> Picked:
        """A token per row; ``sequences`` says whose the rows are."""
        return sample.pick(logits, choosers)

    def begin(self, sequence: Sequence) -> None:
        """Prepare how it chooses its tokens; what it has chosen by is kept when it is preempted."""
        if sequence.chooser is None:
            sequence.chooser = Chooser(sequence.sampling, sequence.prompt.tokens, sequence.guide, self._ends(sequence.sampling))

    def is_end(self, sequence: Sequence, token: int) -> bool:
        sampling = sequence.sampling
        return (token in self.eos and not sampling.ignore_eos) or token in sampling.stop_token_ids

    def _ends(self, sampling: Sampling) -> frozenset[int]:
        return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos)


def _decodes(chunk: Chunk) -> bool:
    """Whether it is the last token of a sequence, which the model chose; others may be one token of what is computed again."""
    return chunk.count == chunk.rows == 1 and bool(chunk.sequence.tokens)


def _rows(chunks: Seq[Chunk]) -> np.ndarray | None:
    """int64 [R]: the rows whose logits are wanted; None: all."""
    if all(chunk.rows == chunk.count for chunk in chunks):
        return None
    ends = np.cumsum([chunk.count for chunk in chunks])
    return np.concatenate([np.arange(end - chunk.rows, end) for chunk, end in zip(chunks, ends, strict=True)])
