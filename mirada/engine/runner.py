"""Drives the model: encode, prefill, decode, sample. Knows sequences and tensors, no text and no waiting lines.

T tokens, F features, D width, V vocabulary, B sequences.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirada.engine import memory, sample, vision
from mirada.engine.sequence import Sequence
from mirada.errors import RequestFailed
from mirada.layers.batch import Batch
from mirada.layers.cache import Slabs
from mirada.media.grid import GridRule

PREFILL_TOKENS = 8192
"""Tokens that one prefill takes together at most, unless a single prompt is longer."""


class Runner:
    """One model on one device, with its cache."""

    def __init__(self, model: Any, cache: Slabs, rule: GridRule, eos: Iterable[int]) -> None:
        self.model = model
        self.cache = cache
        self.rule = rule
        self.eos = frozenset(eos)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype

    def free(self, lasting: int) -> int:
        """Bytes that requests may take now, of which ``lasting`` will be cache: that lies on the devices of its layers."""
        held = Counter(self.cache.devices)
        held.setdefault(self.device, 0)
        return min(
            memory.available(device) + lasting * (self.cache.num_layers - layers) // self.cache.num_layers
            for device, layers in held.items()
        )

    def prefill(self, sequences: Seq[Sequence]) -> None:
        """Encode media, fill the cache with the prompts, and generate the first token of each."""
        began = time.perf_counter()
        media = [patches for sequence in sequences for patches in sequence.media]
        features = vision.encode(self.model, media, self.rule, self.device, self.dtype)
        encoded = time.perf_counter()
        hidden = self.model.forward(self._prompts(sequences), features, self.cache)
        last = np.cumsum([len(s.prompt.tokens) for s in sequences]) - 1
        logits = self.model.logits(hidden[torch.from_numpy(last).to(self.device)])
        for sequence in sequences:
            if sequence.media:
                sequence.spent("encode", encoded - began)
            sequence.media, sequence.positions = (), None
        self._extend(sequences, logits, "prefill", encoded)

    def decode(self, sequences: Seq[Sequence]) -> None:
        """One more token for each sequence."""
        began = time.perf_counter()
        hidden = self.model.forward(self._steps(sequences), None, self.cache)
        self._extend(sequences, self.model.logits(hidden), "decode", began)

    def _prompts(self, sequences: Seq[Sequence]) -> Batch:
        tokens, places, rows, start = [], [], [], 0
        for sequence in sequences:
            tokens.extend(sequence.prompt.tokens)
            places.append(sequence.positions)
            rows.extend(np.arange(span.start, span.end) + start for span in sequence.prompt.spans)
            start = len(tokens)
        return Batch(
            tokens=torch.tensor(tokens, dtype=torch.int64, device=self.device),
            positions=torch.from_numpy(np.concatenate(places, 1)).to(self.device),
            lengths=tuple(len(s.prompt.tokens) for s in sequences),
            past=(0,) * len(sequences),
            slots=tuple(s.slot for s in sequences),
            feature_rows=torch.from_numpy(np.concatenate(rows)).to(self.device) if rows else None,
        )

    def _steps(self, sequences: Seq[Sequence]) -> Batch:
        last = torch.tensor([(s.tokens[-1], s.position) for s in sequences], dtype=torch.int64, device=self.device)
        return Batch(
            tokens=last[:, 0],
            positions=last[:, 1].expand(3, -1),
            lengths=(1,) * len(sequences),
            past=tuple(s.past for s in sequences),
            slots=tuple(s.slot for s in sequences),
        )

    def _extend(self, sequences: Seq[Sequence], logits: Tensor, stage: str, began: float) -> None:
        """Choose a token per row of ``logits`` [B, V] and hand it to its sequence."""
        tokens, reports = self._choose(sequences, logits)
        seconds = time.perf_counter() - began
        for sequence, token, report in zip(sequences, tokens, reports, strict=True):
            sequence.spent(stage, seconds)
            sequence.append(token, report, token in self.eos and not sequence.sampling.ignore_eos)
            if sequence.seen is not None:
                sequence.seen[token] = True

    def _choose(self, sequences: Seq[Sequence], logits: Tensor) -> tuple[list[int], list[Any]]:
        best, greedy = logits.max(-1)
        if not all(map(math.isfinite, best.tolist())):
            raise RequestFailed(
                f"the model gave no finite logits in {str(self.dtype).removeprefix('torch.')}",
                "check the weights, or use dtype='float32'",
            )
        steered = logits
        if any(s.seen is not None for s in sequences):
            steered = self._penalised(sequences, logits)
        if steered is not logits or any(s.sampling.temperature > 0 for s in sequences):
            tokens = sample.choose(steered, [_choice(s) for s in sequences])
        else:
            tokens = greedy.tolist()
        return tokens, self._reports(sequences, logits, tokens)

    def _penalised(self, sequences: Seq[Sequence], logits: Tensor) -> Tensor:
        blank = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        seen = torch.stack([blank if s.seen is None else s.seen for s in sequences])
        penalty = torch.tensor([s.sampling.repetition_penalty for s in sequences], device=logits.device)
        return sample.penalise(logits, seen, penalty)

    def _reports(self, sequences: Seq[Sequence], logits: Tensor, tokens: list[int]) -> list[Any]:
        rows = [row for row, s in enumerate(sequences) if s.sampling.logprobs is not None]
        reports: list[Any] = [None] * len(sequences)
        if rows:
            wanted = [sequences[row].sampling.logprobs or 0 for row in rows]
            for row, made in zip(rows, sample.logprobs(logits[rows], [tokens[r] for r in rows], wanted), strict=True):
                reports[row] = made
        return reports

    def note_seen(self, sequence: Sequence) -> None:
        """Prepare the repetition penalty, which counts the tokens of prompt and answer."""
        if sequence.sampling.repetition_penalty != 1.0:
            sequence.seen = torch.zeros(self.model.config.text.vocab_size, dtype=torch.bool, device=self.device)
            sequence.seen[torch.tensor(sequence.prompt.tokens, device=self.device)] = True


def _choice(sequence: Sequence) -> sample.Choice:
    s = sequence.sampling
    # One draw a step, whatever its batch mates do: a seeded reply depends on nothing else.
    return sample.Choice(s.temperature, s.top_k, s.top_p, s.min_p, sequence.random.random() if s.temperature > 0 else 0.0)
