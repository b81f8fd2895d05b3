"""Where keys and values of past tokens live, and attention over them.

T new tokens of all sequences end to end; n new tokens of one sequence; S past + new; H query heads; K key-value heads;
d head width. A *side* is what is kept of a token (keys, values; or latents); a *plane* is a tensor that holds it: one per
side, or two where it is kept as int8 (values, scales).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mirada.errors import OutOfMemory, SettingsError
from mirada.layers.kinds import DEFAULT
from mirada.layers.kv_int8 import SCALE_TYPE, Quantised, quantise
from mirada.layers.past import attend_one
from mirada.table import Table

if TYPE_CHECKING:
    from mirada.layers.batch import Batch

BLOCK = 256
"""Tokens by which a slab grows, up to 8 blocks; beyond, by an eighth of the power of two below its length."""

FORMATS = ("auto", "int8")
"""How keys and values are kept: in the model's type, or as int8 with a scale per head and token."""

CACHES = Table(
    "cache",
    {
        "slab": "mirada.layers.cache:SlabCache",
        "latent": "mirada.layers.latent_cache:LatentCache",
        "paged slab": "mirada.layers.paged:PagedCache",
        "paged latent": "mirada.layers.paged:PagedLatentCache",
    },
)
"""What ``kind`` of a family's ``cache_spec`` may say (without it, ``slab``), and the same in pages."""


def make_cache(
    spec: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    layout: str | None = None,
    kv: str = "auto",
    budget: int | None = None,
) -> Cache:
    """The cache that a family's ``cache_spec`` describes.

    ``layout``: ``slab`` or ``paged``; None: pages on CUDA where a ``budget`` says how many, else slabs. ``kv``: see
    ``FORMATS``. ``budget``: most bytes that it holds, OutOfMemory beyond; pages need one, of slabs None is no bound.
    Raises UnknownName for a ``kind`` that is not in ``CACHES``, SettingsError for the other settings.
    """
    settings = dict(spec)
    kind = settings.pop("kind", "slab")
    if layout is None:
        layout = "paged" if torch.device(device).type == "cuda" and budget is not None else "slab"
    if layout not in ("slab", "paged"):
        raise SettingsError(f"cache layout {layout!r} is unknown", "use 'slab' or 'paged'")
    if kv not in FORMATS:
        raise SettingsError(f"cache format kv={kv!r} is unknown", f"use one of {', '.join(FORMATS)}")
    name = kind if layout == "slab" or kind not in CACHES else f"paged {kind}"
    return CACHES[name](**settings, dtype=dtype, device=device, kv=kv, budget=budget)


class KVCache(Protocol):
    """Hides how keys and values are laid out (pages, slabs) from the layers that use them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, kind: str = DEFAULT) -> Tensor:
        """Keep the new k, v [T, K, d] of each sequence, then attend causally over past and new: q [T, H, d] -> [T, H, d].

        ``kind``: see ``layers.kinds.KINDS``.
        """
        ...


class Store(Protocol):
    """Whole blocks of ``block`` tokens that outlive the sequence that computed them, ``bytes_per_block`` each."""

    block: int
    bytes_per_block: int

    def keep(self, slot: int, first: int, count: int) -> list[int]:
        """Keep ``count`` blocks of ``slot`` from its block ``first`` on, all of them written; a handle for each."""
        ...

    def reuse(self, slot: int, handles: Sequence[int]) -> None:
        """Let the blocks behind ``handles`` be the beginning of ``slot``, which holds nothing yet."""
        ...

    def drop(self, handle: int) -> None:
        """Let go of a block."""
        ...


class Cache(ABC):
    """What slabs and pages share: sides and planes, devices, and bytes, which never exceed ``budget``.

    Where a sequence stands is said by the batch (``past``, ``lengths``), not remembered here, so writing again from an
    earlier position simply overwrites.
    """

    def __init__(
        self,
        num_layers: int,
        sides: tuple[tuple[int, int], ...],
        dtype: torch.dtype,
        device: torch.device | str,
        kv: str = "auto",
        budget: int | None = None,
        parts: tuple[int, ...] = (),
    ) -> None:
        """``sides``: (heads, width) of each. ``parts``: widths of a row with an int8 scale each (none: the whole row)."""
        self.num_layers = num_layers
        self.sides = sides
        self.dtype = dtype
        self.device = torch.device(device)
        self.devices = (self.device,) * num_layers
        """Of each layer."""
        self.kv = kv
        self.budget = budget
        self.bytes_held = 0
        """Bytes that open slots hold now."""
        self._parts = parts
        self.planes = tuple(plane for side in sides for plane in self._planes_of(*side))
        """(heads, width, type) of what is held of a token and layer."""

    def _planes_of(self, heads: int, width: int) -> tuple[tuple[int, int, torch.dtype], ...]:
        if self.kv == "auto":
            return ((heads, width, self.dtype),)
        return (heads, width, torch.int8), (heads, len(self._parts) or 1, SCALE_TYPE)

    def spread(self, devices: Sequence[torch.device]) -> None:
        """Keep each layer on a device of its own. Raises ValueError unless there is one per layer and no sequence."""
        if len(devices) != self.num_layers or self.num_open:
            raise ValueError(f"{len(devices)} devices for {self.num_layers} layers and {self.num_open} open slots")
        self.devices = tuple(devices)

    @property
    @abstractmethod
    def num_open(self) -> int:
        """Slots that are in use."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes over all layers."""
        return self.num_layers * self.bytes_per_row

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one token takes in one layer."""
        return sum(heads * width * dtype.itemsize for heads, width, dtype in self.planes)

    @property
    def bytes_free(self) -> int | None:
        """Bytes that may yet be held; None without a budget."""
        return None if self.budget is None else self.budget - self.bytes_held

    @abstractmethod
    def capacity(self, tokens: int) -> int:
        """Tokens that there is room for once ``tokens`` are written."""

    def bytes_for(self, tokens: int) -> int:
        """Bytes that a sequence of ``tokens`` tokens holds, exactly, however it came to that length."""
        return self.capacity(tokens) * self.bytes_per_token

    def passing_bytes(self, tokens: int) -> int:
        """Bytes that are held besides, for a moment at a time, while one sequence grows to ``tokens`` tokens: at most."""
        return 0

    def peak_bytes(self, tokens: int) -> int:
        """Most bytes that are ever held for a sequence on its way to ``tokens`` tokens."""
        return self.bytes_for(tokens) + self.passing_bytes(tokens)

    @abstractmethod
    def growth_bytes(self, slot: int, tokens: int) -> int:
        """Bytes that will be held more once ``slot`` has ``tokens`` tokens: exact, 0 where they fit into what it has."""

    @abstractmethod
    def allocate(self, slot: int) -> None:
        """Open ``slot`` for a new sequence. Raises ValueError if it is in use."""

    @abstractmethod
    def grow(self, slot: int, tokens: int) -> None:
        """Make room for ``tokens`` tokens before they are computed. Raises OutOfMemory, and has then changed nothing."""

    @abstractmethod
    def free(self, slot: int) -> None:
        """Give back all memory of ``slot``."""

    @abstractmethod
    def write(self, layer: int, slot: int, past: int, *new: Tensor) -> tuple[Any, ...]:
        """Store each side's ``new`` [n, heads, width] after ``past`` tokens; all so far [heads, past + n, width] of each,
        as a tensor or ``Quantised``."""

    @abstractmethod
    def store(self, most: int, block: int) -> Store:
        """Where blocks of about ``block`` tokens outlive their sequence, ``most`` bytes of them."""

    def _take(self, size: int) -> None:
        """Count ``size`` more bytes as held; OutOfMemory beyond the budget."""
        if self.budget is not None and self.bytes_held + size > self.budget:
            raise OutOfMemory(
                f"the cache of keys and values needs {size:,} bytes more, and {self.budget - self.bytes_held:,} of its"
                f" {self.budget:,} are free",
                "raise the engine setting cache_bytes, or shorten the prompt or max_tokens",
                needed=size,
                available=self.budget - self.bytes_held,
                unit="bytes",
            )
        self.bytes_held += size

    def _stored(self, new: Sequence[Tensor]) -> list[Tensor]:
        """Sides [n, heads, width] as their planes."""
        if self.kv == "auto":
            return list(new)
        return [plane for side in new for plane in quantise(side, self._parts or side.shape[-1:])]

    def _sides(self, planes: Sequence[Tensor]) -> tuple[Any, ...]:
        """Planes [.., S, width] as sides that attention reads."""
        if self.kv == "auto":
            return tuple(planes)
        pairs = zip(planes[::2], planes[1::2], strict=True)
        return tuple(Quantised(values, scales, self._parts or values.shape[-1:]) for values, scales in pairs)


class Slabs(Cache):
    """Contiguous slabs [heads, capacity, width], one per sequence, layer and plane.

    A slab that is too short is copied into a longer one. Up to 8 blocks it grows by a block, then by at most an eighth of its
    length, so that a sequence of N tokens copies at most 9 N of them, fewer than one decode step in ten reads, and never
    holds more than an eighth too much. Layers grow one by one, and while one is copied the old one is held too: ``bytes_held``
    counts it, and ``passing_bytes`` says how much that may be.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._slabs: dict[int, list[tuple[Tensor, ...] | None]] = {}
        self._tables: dict[int, Tensor] = {}

    @property
    def num_open(self) -> int:
        return len(self._slabs)

    def capacity(self, tokens: int) -> int:
        unit = max(BLOCK, (1 << max(tokens, 1).bit_length() - 1) // 8)
        return -(-tokens // unit) * unit

    def passing_bytes(self, tokens: int) -> int:
        wanted = self.capacity(tokens)
        unit = max(BLOCK, (1 << (wanted - 1).bit_length() - 1) // 8)  # by which the one before it is shorter
        return (wanted - unit) * self.bytes_per_row

    def growth_bytes(self, slot: int, tokens: int) -> int:
        wanted = self.capacity(tokens)
        rows = sum(wanted - room for held in self._slabs[slot] if (room := _room_of(held)) < tokens)
        return rows * self.bytes_per_row

    def allocate(self, slot: int) -> None:
        if slot in self._slabs:
            raise ValueError(f"cache slot {slot} is in use")
        self._slabs[slot] = [None] * self.num_layers
        self._tables[slot] = torch.zeros(self.num_layers, len(self.planes) + 1, dtype=torch.int64)

    def grow(self, slot: int, tokens: int) -> None:
        # All or nothing: what the last layer would lack is refused before the first one grows.
        size = self.growth_bytes(slot, tokens)
        old = max(room for held in self._slabs[slot] if (room := _room_of(held)) < tokens) if size else 0
        self._take(size + old * self.bytes_per_row)
        self.bytes_held -= size + old * self.bytes_per_row
        for layer in range(self.num_layers):
            self._room(layer, slot, tokens)

    def free(self, slot: int) -> None:
        rows = sum(map(_room_of, self._slabs.pop(slot)))
        del self._tables[slot]
        self.bytes_held -= rows * self.bytes_per_row

    def write(self, layer: int, slot: int, past: int, *new: Tensor) -> tuple[Any, ...]:
        total = past + len(new[0])
        planes = self._room(layer, slot, total, past)
        for plane, fresh in zip(planes, self._stored(new), strict=True):
            plane[:, past:total] = fresh.transpose(0, 1)
        return self._sides([plane[:, :total] for plane in planes])

    def store(self, most: int, block: int) -> Store:
        return CopyStore(self, most, block)

    def planes_of(self, slot: int, layer: int) -> tuple[Tensor, ...]:
        """The planes [heads, capacity, width] of a layer of ``slot``, which has been written to."""
        held = self._slabs[slot][layer]
        assert held is not None
        return held

    def table(self, slot: int) -> Tensor:
        """int64 [layers, planes + 1], on the host: where each plane of ``slot`` begins in memory, and its room in tokens."""
        return self._tables[slot]

    def room(self, slot: int) -> int:
        """Tokens that every layer of ``slot`` has room for: they grow in order, so the last one says it."""
        return _room_of(self._slabs[slot][-1])

    def _room(self, layer: int, slot: int, total: int, past: int | None = None) -> tuple[Tensor, ...]:
        """Planes with room for ``total`` tokens, of which the first ``past`` (None: all that there are) hold something."""
        held = self._slabs[slot][layer]
        before = _room_of(held)
        if held is not None and before >= total:
            return held
        wanted = self.capacity(total)
        grown = self._slab(layer, wanted)
        if held is not None:
            used = before if past is None else min(past, before)
            for plane, old in zip(grown, held, strict=True):
                plane[:, :used] = old[:, :used]
        self._slabs[slot][layer] = grown
        del held
        self.bytes_held -= before * self.bytes_per_row
        self._tables[slot][layer] = torch.tensor([*(plane.data_ptr() for plane in grown), wanted])
        return grown

    def _slab(self, layer: int, room: int) -> tuple[Tensor, ...]:
        """Fresh planes of one layer, counted as held. OutOfMemory, or whatever the allocator raises, changes nothing."""
        size, device = room * self.bytes_per_row, self.devices[layer]
        self._take(size)
        try:
            return tuple(torch.empty((heads, room, width), dtype=dtype, device=device) for heads, width, dtype in self.planes)
        except BaseException:
            self.bytes_held -= size
            raise


def _room_of(held: tuple[Tensor, ...] | None) -> int:
    return 0 if held is None else held[0].shape[1]


class CopyStore:
    """Copies of blocks, for slabs. One arena [blocks, layers, heads, block, width] per plane, on the CPU.

    It is asked of the system once and used again, so that memory cannot fragment; what was never written takes no room.
    """

    def __init__(self, cache: Slabs, most: int, block: int) -> None:
        self.block = block
        self.bytes_per_block = block * cache.bytes_per_token
        self._cache = cache
        self._free = list(range(most // self.bytes_per_block))[::-1]
        self._total = len(self._free)
        self._arena: list[Tensor] = []

    def keep(self, slot: int, first: int, count: int) -> list[int]:
        if not self._arena:
            self._open()
        handles = [self._free.pop() for _ in range(count)]
        index, tokens = torch.tensor(handles), slice(first * self.block, (first + count) * self.block)
        for layer in range(self._cache.num_layers):
            for arena, plane in zip(self._arena, self._cache.planes_of(slot, layer), strict=True):
                arena[index, layer] = plane[:, tokens].unflatten(1, (count, self.block)).transpose(0, 1).to(arena.device)
        return handles

    def reuse(self, slot: int, handles: Sequence[int]) -> None:
        total = len(handles) * self.block
        self._cache.grow(slot, total)
        index = torch.tensor(list(handles))
        for layer in range(self._cache.num_layers):
            for arena, plane in zip(self._arena, self._cache.planes_of(slot, layer), strict=True):
                plane[:, :total].unflatten(1, (len(handles), self.block)).copy_(arena[index, layer].transpose(0, 1))

    def drop(self, handle: int) -> None:
        self._free.append(handle)

    def _open(self) -> None:
        shape = (self._total, self._cache.num_layers)
        self._arena = [torch.empty((*shape, h, self.block, w), dtype=dtype) for h, w, dtype in self._cache.planes]


class KeysAndValues(Cache):
    """Sides of a cache for attention by groups of query heads; a layout of them comes beside it."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv: str = "auto",
        budget: int | None = None,
        **layout: Any,
    ) -> None:
        super().__init__(num_layers, ((num_kv_heads, head_dim),) * 2, dtype, device, kv, budget, **layout)
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim


class SlabCache(KeysAndValues, Slabs):
    """Keys and values in slabs [K, capacity, d]."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, kind: str = DEFAULT) -> Tensor:
        """See KVCache. Each sequence is attended by itself, so its result cannot depend on its batch mates."""
        out: list[Tensor] = []
        parts = (x.split(batch.lengths) for x in (q, k, v))
        for rows, k_new, v_new, past, slot in zip(*parts, batch.past, batch.slots, strict=True):
            keys, values = self.write(layer, slot, past, k_new, v_new)
            out.append(attend_one(rows, keys, values, scale, kind))
        return out[0] if len(out) == 1 else torch.cat(out)
