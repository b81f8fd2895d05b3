"""What earlier requests computed of their beginnings: blocks of keys and values, found by what they were computed from.

A key is a 256-bit hash over the key of the block before and all that decides a block's keys and values: tokens, positions,
the content of every visual token in it, and, at the root, weights, adapter, format and salt. Equal keys mean equal blocks, so
nothing is ever compared or guessed. For the engine's thread alone.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mirada.engine.sequence import Sequence
from mirada.layers.cache import Cache
from mirada.layers.linear import MatrixLinear, MatrixStack
from mirada.types import Span

BLOCK = 16
"""Tokens of a block, where the cache lies in slabs (in pages: those of a page). Small pictures of few tokens are shared too."""
FOLLOW = 64
"""Tokens that a request must have in common with one that is computing them to wait for it: fewer are sooner computed again."""
HASH = 32
"""Bytes of a content key; a span with any other number of them has none, and its sequence is not kept from there on."""


@dataclass(eq=False)
class Block:
    """One block in the cache. It is dropped only after all that follow it."""

    key: bytes
    parent: bytes
    handle: int
    used: int = 0
    """When, in uses of the cache."""
    followers: int = 0


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """What a prefix cache has done and holds."""

    hits: int
    """Requests of which at least one block was there."""
    misses: int
    tokens_reused: int
    evictions: int
    blocks: int
    bytes_held: int
    max_bytes: int


@dataclass(eq=False)
class Chain:
    """Keys of the whole blocks of one sequence; its prompt is read once, for its positions are let go when it ends."""

    root: bytes
    size: int
    keys: list[bytes] = field(default_factory=list)
    whole: bool = True
    """False: a visual token without a content key was met, and no block from there on has a key."""
    _places: np.ndarray | None = None

    def reach(self, sequence: Sequence, end: int) -> None:
        """Make the keys of all whole blocks before token ``end``."""
        while self.whole and (len(self.keys) + 1) * self.size <= end:
            start = len(self.keys) * self.size
            tokens = np.asarray(sequence.ids(start, start + self.size), np.int64)
            seen = visual(sequence, start, start + self.size)
            if seen is None:
                self.whole = False
                return
            parent = self.keys[-1] if self.keys else self.root
            self.keys.append(block_key(parent, tokens, self._positions(sequence, start), seen))

    def _positions(self, sequence: Sequence, start: int) -> np.ndarray:
        """int64 [3, size] of the block at ``start``."""
        prompt = len(sequence.prompt.tokens)
        if self._places is None:
            self._places = np.asarray(sequence.places(0, prompt), np.int64)
        head = self._places[:, start : start + self.size]
        after = np.arange(max(start, prompt), start + self.size) + (sequence.first_position - prompt)
        return np.concatenate((head, np.broadcast_to(after, (3, len(after)))), 1)


def block_key(parent: bytes, tokens: np.ndarray, positions: np.ndarray, visual: bytes) -> bytes:
    """The key of a block after the one with key ``parent``: int64 tokens [N] and positions [3, N], ``visual`` content."""
    digest = hashlib.blake2b(parent, digest_size=HASH)  # all parts but the last are of fixed size
    digest.update(np.ascontiguousarray(tokens, np.int64).data)
    digest.update(np.ascontiguousarray(positions, np.int64).data)
    digest.update(visual)
    return digest.digest()


def visual(sequence: Sequence, start: int, end: int) -> bytes | None:
    """Which visual tokens lie among tokens ``start`` to ``end``: content key, kind and offset of each run; None where one
    has no content key of its own."""
    made, spans = b"", sequence.prompt.spans
    at = bisect.bisect_right(spans, start, key=lambda span: span.end)  # a long video has a span for every frame
    while at < len(spans) and spans[at].start < end:
        span, at = spans[at], at + 1
        if not _is_keyed(span, sequence):
            return None
        first, last = max(span.start, start), min(span.end, end)
        made += span.hash + struct.pack(
            "<?4q", span.kind == "video", first - start, last - start, first - span.start, span.frame
        )
    return made


def _is_keyed(span: Span, sequence: Sequence) -> bool:
    """Whether its key is that of the media that came with the prompt: one rendered for other media must not be found."""
    if len(span.hash) != HASH:
        return False
    if not 0 <= span.media_id < len(sequence.media):
        return not sequence.media
    key = sequence.media[span.media_id].key
    return span.hash in (key, hashlib.blake2b(key + span.frame.to_bytes(4, "little"), digest_size=HASH).digest())


class PrefixCache:
    """At most ``max_bytes`` of blocks of ``cache``; the least recently used goes first, but none before those that follow it.

    ``weights`` says which weights the model has now (``Weights``); when they change all blocks are dropped.
    """

    def __init__(self, cache: Cache, max_bytes: int, weights: Callable[[], bytes], block: int = BLOCK) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self.tokens_reused = self.evictions = 0
        self._store = cache.store(max_bytes, block)
        self._most = max_bytes // self._store.bytes_per_block
        self._format = repr((cache.kv, str(cache.dtype), cache.sides, self._store.block))
        self._read_weights = weights
        self._weights = weights()
        self._steps = self._seen = False
        """Whether steps are announced, and whether weights were looked at in this one."""
        self._blocks: dict[bytes, Block] = {}
        self._leaves: list[tuple[int, bytes]] = []
        """A heap of (used, key); entries that no longer hold are skipped."""
        self._clock = 0
        self._chains: WeakKeyDictionary[Sequence, Chain] = WeakKeyDictionary()
        if hasattr(cache, "reclaim"):
            setattr(cache, "reclaim", self.reclaim)  # noqa: B010  (pages alone have it)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def bytes_held(self) -> int:
        return len(self._blocks) * self._store.bytes_per_block

    @property
    def stats(self) -> PrefixStats:
        return PrefixStats(
            self.hits, self.misses, self.tokens_reused, self.evictions, len(self), self.bytes_held, self.max_bytes
        )

    def begin(self) -> None:
        """A step of the engine: until the next, weights are looked at once at most, which takes as long as some products. What
        is computed while they change is kept under those before, and dropped with them."""
        self._steps, self._seen = True, False

    def match(self, sequence: Sequence) -> tuple[int, Callable[[int], None]]:
        """How many of its first tokens are there (at least one fewer than it has), and what copies them into a slot."""
        chain = self._chain(sequence)
        found: list[Block] = []
        for key in chain.keys[: (sequence.num_tokens - 1) // self._store.block]:
            if key not in self._blocks:
                break
            found.append(self._blocks[key])
        self._touch(found)
        count = len(found) * self._store.block
        self.hits += bool(found)
        self.misses += not found
        self.tokens_reused += count
        handles = [block.handle for block in found]
        return count, lambda slot: self._store.reuse(slot, handles) if handles else None

    def offer(self, sequence: Sequence) -> None:
        """Keep what is new of the whole blocks among the first ``computed`` tokens of ``sequence``, which has its slot."""
        chain = self._chains.get(sequence)
        if chain is None or chain.root != self._root(sequence):
            return  # the weights have changed since it began: its blocks are of neither
        end = min(sequence.computed, sequence.num_tokens)  # a draft may have been right beyond its end
        chain.reach(sequence, end)
        keys = chain.keys[: end // self._store.block]
        known = next((i for i, key in enumerate(keys) if key not in self._blocks), len(keys))
        wanted = min(len(keys) - known, self._most - known)
        self._evict(len(self) + wanted - self._most, frozenset(keys))
        count = max(0, min(wanted, self._most - len(self)))
        if count:
            handles = self._store.keep(sequence.slot, known, count)
            self._insert(keys[known : known + count], keys[known - 1] if known else chain.root, handles)
        self._touch([self._blocks[key] for key in keys[: known + count]])

    def leader(self, sequence: Sequence, running: Iterable[Sequence]) -> tuple[Sequence, int] | None:
        """Of ``running``, the one that computes most of what ``sequence`` begins with beyond what is here, and the token before
        which that ends; None where that is less than FOLLOW tokens for each of them."""
        prompts = [other for other in running if other.left > 1 and not other.done]
        if not prompts:
            return None
        chain, size = self._chain(sequence), self._store.block
        keys = chain.keys[: min((sequence.num_tokens - 1) // size, self._most)]
        kept = next((i for i, key in enumerate(keys) if key not in self._blocks), len(keys))
        common = {other: _common(keys, self._chain(other).keys) for other in prompts}
        best = max(prompts, key=common.__getitem__)
        return (best, common[best] * size) if (common[best] - kept) * size >= FOLLOW else None

    def clear(self) -> None:
        """Drop everything."""
        for block in self._blocks.values():
            self._store.drop(block.handle)
        self._blocks.clear()
        self._leaves.clear()

    def reclaim(self, count: int) -> int:
        """Drop ``count`` blocks, if there are so many, whose pages a sequence needs; how many there were."""
        before = len(self)
        self._evict(count, frozenset())
        return before - len(self)

    def _chain(self, sequence: Sequence) -> Chain:
        root, chain = self._root(sequence), self._chains.get(sequence)
        if chain is None or chain.root != root:
            chain = self._chains[sequence] = Chain(root, self._store.block)
        chain.reach(sequence, sequence.num_tokens)
        return chain

    def _root(self, sequence: Sequence) -> bytes:
        if not self._seen:
            weights, self._seen = self._read_weights(), self._steps
            if weights != self._weights:
                self.clear()
                self._weights = weights
        return root_key(self._weights, sequence.adapter, self._format, sequence.salt)

    def _insert(self, keys: Iterable[bytes], parent: bytes, handles: Iterable[int]) -> None:
        for key, handle in zip(keys, handles, strict=True):
            self._blocks[key] = Block(key, parent, handle)
            if parent in self._blocks:
                self._blocks[parent].followers += 1
            parent = key

    def _touch(self, blocks: list[Block]) -> None:
        """They are used now; a block never looks older than one that follows it."""
        self._clock += 1
        for block in blocks:
            block.used = self._clock
        if blocks and not blocks[-1].followers:
            self._push(blocks[-1])

    def _push(self, leaf: Block) -> None:
        heapq.heappush(self._leaves, (leaf.used, leaf.key))
        if len(self._leaves) > 2 * len(self._blocks) + 64:
            self._leaves = [(block.used, key) for key, block in self._blocks.items() if not block.followers]
            heapq.heapify(self._leaves)

    def _evict(self, count: int, spared: frozenset[bytes]) -> None:
        """Drop ``count`` blocks, the oldest first, none of ``spared``; fewer if there are no more."""
        kept: list[Block] = []
        while count > 0 and self._leaves:
            used, key = heapq.heappop(self._leaves)
            block = self._blocks.get(key)
            if block is None or block.followers or block.used != used:
                continue
            if key in spared:
                kept.append(block)
                continue
            self._drop(block)
            count -= 1
        for block in kept:
            self._push(block)

    def _drop(self, block: Block) -> None:
        del self._blocks[block.key]
        self._store.drop(block.handle)
        self.evictions += 1
        if (parent := self._blocks.get(block.parent)) is not None:
            parent.followers -= 1
            if not parent.followers:
                self._push(parent)


def _common(some: list[bytes], others: list[bytes]) -> int:
    """How many first blocks two chains share: a key holds all before it, so none is equal behind one that differs."""
    return bisect.bisect_left(range(min(len(some), len(others))), True, key=lambda i: some[i] != others[i])


def root_key(weights: bytes, adapter: str, form: str, salt: str) -> bytes:
    """What stands before a first block: blocks of other weights, adapters, formats or salts are never found."""
    digest = hashlib.blake2b(digest_size=HASH)
    for part in (weights, adapter.encode(), form.encode(), salt.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


class Weights:
    """Says which weights a model has now: an id that changes, and never comes back, when a tensor takes another's place, lies
    elsewhere, or torch has written to it.

    It sees optimizer steps, ``load_state_dict``, ``copy_``, tensors and matrices put in another's place, also at an address
    that was used before: memory that is free is given out again, so tensors and their storage are known by identity. It cannot
    see what is written past torch's counters (``parameter.data.add_()``, numpy views, other processes, tensors made in
    inference mode, which have none): say ``changed`` then.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._said = False
        self._modules: list[Any] = []
        self._children: list[int] = []
        self._seen: list[_Seen] = []
        self._id = 0

    def changed(self) -> None:
        """The weights are others now, whatever it looks like."""
        self._said = True

    def __call__(self) -> bytes:
        # Asked several times a request: modules are listed anew only where one has taken another's place.
        if not self._modules or [id(child) for m in self._modules for child in m._modules.values()] != self._children:
            self._modules = list(self._model.modules())
            self._children = [id(child) for m in self._modules for child in m._modules.values()]
        tensors = list(_tensors(self._modules))
        same = len(tensors) == len(self._seen) and all(map(_Seen.holds, self._seen, tensors))
        if self._said or not same or not self._id:
            self._seen, self._said = [_Seen(tensor) for tensor in tensors], False
            self._id += 1
        return self._id.to_bytes(8, "little")


class _Seen:
    """One tensor as it was. Nothing is kept alive, and what is gone is not mistaken for what took its address: a weak
    reference to a storage keeps that address from being given to another."""

    __slots__ = ("_place", "_storage", "_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._storage = ref(tensor), StorageWeakRef(tensor.untyped_storage())
        self._place, self._version = tensor.data_ptr(), _version(tensor)

    def holds(self, tensor: Tensor) -> bool:
        return (
            self._tensor() is tensor
            and self._place == tensor.data_ptr()
            and self._version == _version(tensor)
            and self._storage.cdata == tensor.untyped_storage()._cdata
        )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _tensors(modules: Iterable[Any]) -> Iterator[Tensor]:
    """All that products read: parameters, buffers, and what lies in the form of the CPU kernels."""
    for module in modules:
        for held in (module._parameters, module._buffers):
            yield from (tensor for tensor in held.values() if tensor is not None)
        if isinstance(module, MatrixLinear | MatrixStack):
            for matrix in (module.matrix,) if isinstance(module, MatrixLinear) else module.matrices:
                yield from (t for t in (matrix.values, matrix.scales, matrix.zeros, matrix.bias) if t is not None)
