"""A step of decoding in tensors that stay where they are, so that on CUDA it is captured once per size and replayed.

A graph of CUDA replays the very launches that it saw: the same addresses, the same sizes, no word of the host. So tokens,
positions, places and block tables of a step lie in buffers of a fixed number of rows (a bucket), refilled from step to step;
rows that no sequence uses write nowhere and attend to nothing. Without CUDA the same buffers go through the model uncaptured,
which is what tests compare with the usual path.

B rows of a bucket; M pages of a block table's row; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirada.engine.chunk import Chunk
from mirada.layers import fused
from mirada.layers.batch import Batch
from mirada.layers.cache import Cache
from mirada.layers.kinds import DEFAULT
from mirada.layers.paged import PagedCache, PagedLatentCache, Pages
from mirada.layers.tables import Tables

BUCKETS = (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16))
"""Rows of a captured step."""
MOST_BYTES = 2 << 30
"""Bytes that all captured steps may hold beside weights and cache; what would come beyond is not captured."""
POOL_SHARE = 0.85
"""Of the free memory of a GPU, what pages take where no setting says it: pools are made at once. The rest is for steps."""


def pool_bytes(device: torch.device, free: int, asked: int | None) -> int | None:
    """Bytes of cache of an engine: ``asked``, or on CUDA a share of what is ``free``, so that there are pages."""
    return int(free * POOL_SHARE) if asked is None and device.type == "cuda" else asked


@dataclass
class _Bucket:
    """Buffers of one size, and the graph that reads them."""

    batch: Batch
    tables: Tables
    numbers: np.ndarray
    """int64 [6, B] on the host: tokens, three rows of positions, places, lengths."""
    pages: np.ndarray
    """int32 [B, M] on the host."""
    filled: list[tuple[list[int], int]]
    """Of each row of ``pages``, the list that it was written from, and how much of it."""
    staged: tuple[Tensor, Tensor]
    """``numbers`` and ``pages`` as tensors, pinned on CUDA."""
    whole: Tensor
    """int64 [6, B] on the device, of which ``batch`` and ``tables`` hold views."""
    graph: Any = None
    logits: Tensor | None = None
    """[B, V] of the graph, overwritten by its next replay."""


class Graphs:
    """Fixed steps of one model with its cache; used by one thread."""

    def __init__(self, model: Any, cache: Cache, context: int, most: int = MOST_BYTES) -> None:
        """``context``: most tokens of a sequence, which sizes the block tables. ``most``: bytes that captures may hold."""
        self.model, self.cache, self.context, self.most = model, cache, context, most
        self.device = next(model.parameters()).device
        self.on = self._able()
        self.bytes_held = 0
        """Bytes that torch reserved while steps were captured."""
        self.num_captured = self.num_replayed = 0
        self._buckets: dict[int, _Bucket] = {}
        self._refused: set[int] = set()
        self._weights: tuple[int, ...] = ()
        self._pool: Any = None

    def takes(self, chunks: Seq[Chunk]) -> bool:
        """Whether the step is nothing but decoding of the base model: one token of each, whose logits are wanted, no features
        and no adapter."""
        return (
            self.on
            and 0 < len(chunks) <= BUCKETS[-1]
            and all(c.count == 1 and c.rows == 1 and c.sequence.lora is None and not _has_features(c) for c in chunks)
        )

    def logits(self, chunks: Seq[Chunk]) -> Tensor | None:
        """float32 logits [len(chunks), V], to be used before the next call; None where the step must go the usual way."""
        size = next(b for b in BUCKETS if b >= len(chunks))
        if size in self._refused:
            return None
        self._forget_moved()
        bucket = self._buckets.get(size) or self._buckets.setdefault(size, self._make(size))
        self._fill(bucket, chunks)
        if self.device.type != "cuda":
            return self._forward(bucket)[: len(chunks)]
        if bucket.graph is None and not self._capture(size, bucket):
            return None
        assert bucket.graph is not None and bucket.logits is not None
        bucket.graph.replay()
        self.num_replayed += 1
        return bucket.logits[: len(chunks)]

    def clear(self) -> None:
        """Forget all captures, and give their memory back."""
        self._buckets.clear()
        self._refused.clear()
        self._pool = None
        self.bytes_held = 0

    def stats(self) -> dict[str, int]:
        """Counts since the start. Any thread may ask."""
        return {"captured": self.num_captured, "replayed": self.num_replayed, "bytes": self.bytes_held}

    def _able(self) -> bool:
        """Pages on one device, all attention of the usual kind, and on CUDA kernels that read block tables there."""
        cache = self.cache
        if not isinstance(cache, PagedCache | PagedLatentCache) or any(d != self.device for d in cache.devices):
            return False
        if any(getattr(module, "attention_kind", DEFAULT) != DEFAULT for module in self.model.modules()):
            return False
        if self.device.type != "cuda":
            return True
        return "cuda" in fused.status().devices and next(self.model.parameters()).dtype in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
        )

    def _make(self, size: int) -> _Bucket:
        pages = self._cache.num_pages
        most = max(1, min(pages, -(-self.context // self._cache.page)))
        pinned = self.device.type == "cuda"
        staged = torch.zeros(6, size, dtype=torch.int64), torch.zeros(size, most, dtype=torch.int32)
        if pinned:
            staged = staged[0].pin_memory(), staged[1].pin_memory()
        whole = torch.zeros_like(staged[0], device=self.device)
        batch = Batch(whole[0], whole[1:4], (1,) * size)
        lengths = torch.zeros(size, dtype=torch.int32, device=self.device)
        table = torch.zeros_like(staged[1], device=self.device)
        tables = Tables(batch, batch.lengths, whole[4], table, lengths, fixed=True)
        return _Bucket(batch, tables, staged[0].numpy(), staged[1].numpy(), [([], 0)] * size, staged, whole)

    @property
    def _cache(self) -> Pages:
        assert isinstance(self.cache, Pages)
        return self.cache

    def _fill(self, bucket: _Bucket, chunks: Seq[Chunk]) -> None:
        """Room for the new tokens, and all numbers of the step in two copies."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the last copies read the same memory of the host
        numbers, changed = bucket.numbers, False
        numbers[:] = 0
        numbers[4] = -1
        for row, chunk in enumerate(chunks):
            sequence, at = chunk.sequence, chunk.sequence.computed
            place, pages = self._cache.place_of(sequence.slot, at)
            numbers[0, row] = sequence.ids(at, at + 1)[0]
            numbers[1:4, row] = sequence.places(at, at + 1)[:, 0]
            numbers[4, row], numbers[5, row] = place, at + 1
            changed |= self._note(bucket, row, pages)
        bucket.whole.copy_(bucket.staged[0], non_blocking=True)
        bucket.tables.lengths.copy_(bucket.whole[5])
        if changed:
            bucket.tables.block_tables.copy_(bucket.staged[1], non_blocking=True)

    def _note(self, bucket: _Bucket, row: int, pages: list[int]) -> bool:
        """Bring a row of the block tables up to date; whether it was not."""
        held, count = bucket.filled[row]
        if held is pages and count == len(pages):
            return False
        first = count if held is pages else 0  # a slot's list is its own, and only grows
        bucket.pages[row, first : len(pages)] = pages[first:]
        bucket.filled[row] = (pages, len(pages))
        return True

    def _forward(self, bucket: _Bucket) -> Tensor:
        self._cache.place(bucket.tables)
        return self.model.next_logits(bucket.batch, None, self.cache)

    def _capture(self, size: int, bucket: _Bucket) -> bool:
        """Run once, so that kernels are compiled and libraries set up, then once more to record. False if there is no room."""
        if self.bytes_held >= self.most:
            self._refused.add(size)
            self._buckets.pop(size, None)
            return False
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(bucket)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_reserved(self.device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        bucket.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(bucket.graph, pool=self._pool):
            bucket.logits = self._forward(bucket)
        self.bytes_held += max(0, torch.cuda.memory_reserved(self.device) - before)
        self.num_captured += 1
        return True

    def _forget_moved(self) -> None:
        """Captured launches read the addresses that they saw: weights or pages elsewhere make them worthless."""
        pools = (pool for layer in range(self.cache.num_layers) for pool in self._cache.pools(layer))
        held = (*self.model.parameters(), *self.model.buffers(), *pools)
        weights = tuple(tensor.data_ptr() for tensor in held)
        if weights != self._weights:
            self.clear()
            self._weights = weights


def _has_features(chunk: Chunk) -> bool:
    """Whether the token of a chunk is a placeholder, which features replace."""
    features = chunk.sequence.features
    return features is not None and bool(len(features.take(chunk.sequence.computed, chunk.end)[0]))
