"""Where keys and values of past tokens live, and attention over them.

T new tokens of all sequences end to end; n new tokens of one sequence; S past + new; H query heads; K key-value heads;
G = H / K; d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mirada.layers.attention import DEFAULT, KINDS
from mirada.table import Table

if TYPE_CHECKING:
    from mirada.layers.batch import Batch

BLOCK = 256
"""Tokens by which a slab grows."""


CACHES = Table("cache", {"slab": "mirada.layers.cache:SlabCache", "latent": "mirada.layers.latent_cache:LatentCache"})
"""What ``kind`` of a family's ``cache_spec`` may say; without it, ``slab``."""


def make_cache(spec: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str) -> Slabs:
    """The cache that a family's ``cache_spec`` describes; UnknownName for a ``kind`` that is not in ``CACHES``."""
    settings = dict(spec)
    return CACHES[settings.pop("kind", "slab")](**settings, dtype=dtype, device=device)


class KVCache(Protocol):
    """Hides how keys and values are laid out (pages, slabs) from the layers that use them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, kind: str = DEFAULT) -> Tensor:
        """Keep the new k, v [T, K, d] of each sequence, then attend causally over past and new: q [T, H, d] -> [T, H, d].

        ``kind``: see ``layers.attention.KINDS``.
        """
        ...


class Slabs:
    """Contiguous slabs [heads, capacity, width], one per sequence, layer and side, grown in blocks of ``BLOCK`` tokens.

    ``sides`` gives (heads, width) of each. Where a sequence stands is said by the batch (``past``, ``lengths``), not
    remembered here, so writing again from an earlier position simply overwrites. Slabs grow layer by layer: the copy needs
    room for one layer of one sequence.
    """

    def __init__(
        self, num_layers: int, sides: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.num_layers = num_layers
        self.sides = sides
        self.dtype = dtype
        self.device = torch.device(device)
        self.devices = (self.device,) * num_layers
        """Of each layer."""
        self._slabs: dict[int, list[tuple[Tensor, ...] | None]] = {}

    def spread(self, devices: Sequence[torch.device]) -> None:
        """Keep each layer's slabs on a device of its own. Raises ValueError unless there is one per layer and no sequence."""
        if len(devices) != self.num_layers or self._slabs:
            raise ValueError(f"{len(devices)} devices for {self.num_layers} layers and {len(self._slabs)} open slots")
        self.devices = tuple(devices)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes over all layers."""
        return self.num_layers * sum(heads * width for heads, width in self.sides) * self.dtype.itemsize

    @property
    def bytes_held(self) -> int:
        """Bytes of all slabs that are allocated now."""
        sides = (side for slabs in self._slabs.values() for held in slabs if held is not None for side in held)
        return sum(side.numel() * side.element_size() for side in sides)

    def bytes_for(self, tokens: int) -> int:
        """Bytes that a sequence of ``tokens`` tokens holds, whole blocks counted."""
        return -(-tokens // BLOCK) * BLOCK * self.bytes_per_token

    def allocate(self, slot: int) -> None:
        """Open ``slot`` for a new sequence. Raises ValueError if it is in use."""
        if slot in self._slabs:
            raise ValueError(f"cache slot {slot} is in use")
        self._slabs[slot] = [None] * self.num_layers

    def free(self, slot: int) -> None:
        """Give back all memory of ``slot``."""
        del self._slabs[slot]

    def write(self, layer: int, slot: int, past: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Store each side's ``new`` [n, heads, width] after ``past`` tokens; all so far [heads, past + n, width], as views."""
        total = past + new[0].shape[0]
        held = self._room(layer, slot, past, total)
        for side, fresh in zip(held, new, strict=True):
            side[:, past:total] = fresh.transpose(0, 1)
        return tuple(side[:, :total] for side in held)

    def _room(self, layer: int, slot: int, past: int, total: int) -> tuple[Tensor, ...]:
        held = self._slabs[slot][layer]
        if held is not None and held[0].shape[1] >= total:
            return held
        capacity = -(-total // BLOCK) * BLOCK
        grown = tuple(
            torch.empty((heads, capacity, width), dtype=self.dtype, device=self.devices[layer]) for heads, width in self.sides
        )
        if held is not None:
            for side, old in zip(grown, held, strict=True):
                side[:, :past] = old[:, :past]
        self._slabs[slot][layer] = grown
        return grown


class SlabCache(Slabs):
    """Keys and values in slabs [K, capacity, d]."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_layers, ((num_kv_heads, head_dim),) * 2, dtype, device)
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, kind: str = DEFAULT) -> Tensor:
        """See KVCache. Each sequence is attended by itself, so its result cannot depend on its batch mates."""
        out: list[Tensor] = []
        start = 0
        for length, past, slot in zip(batch.lengths, batch.past, batch.slots, strict=True):
            new = slice(start, start + length)
            keys, values = self.write(layer, slot, past, k[new], v[new])
            out.append(attend_one(q[new], keys, values, scale, kind))
            start += length
        return out[0] if len(out) == 1 else torch.cat(out)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, scale: float, kind: str = DEFAULT) -> Tensor:
    """Causal attention of the last n tokens of one sequence: q [n, H, d], keys and values [K, S, d] -> [n, H, d].

    The heads that share a key-value head become query rows when they are few (decode: every key is then read once), and
    a batch of G otherwise; keys and values are never copied per head.
    """
    n, num_heads, width = q.shape
    num_kv_heads, total = keys.shape[0], keys.shape[1]
    group = num_heads // num_kv_heads
    q = q.to(keys.dtype)
    if n == 1:
        rows = q.view(1, num_kv_heads, group, width)
        return KINDS[kind](rows, keys[None], values[None], False, scale).view(1, num_heads, width)
    by_group = q.view(n, num_kv_heads, group, width).permute(2, 1, 0, 3)
    shape = (group, num_kv_heads, total, width)
    out = KINDS[kind](by_group, keys.expand(shape), values.expand(shape), True, scale)
    return out.permute(2, 1, 0, 3).reshape(n, num_heads, width)
