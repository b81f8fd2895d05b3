"""Keys and values in pages of one pool, found by block tables: the layout of GPUs.

B sequences; T new tokens of all; S past + new tokens of one; K key-value heads; d head width; page tokens of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mirada.errors import OutOfMemory, SettingsError
from mirada.layers import fused
from mirada.layers.cache import Cache, KeysAndValues, Store
from mirada.layers.kinds import DEFAULT
from mirada.layers.kv_int8 import Quantised
from mirada.layers.latent_cache import Latents, Rows
from mirada.layers.past import attend_one
from mirada.layers.tables import Tables

if TYPE_CHECKING:
    from mirada.layers.batch import Batch

PAGE = 32
"""Tokens of a page; also the least that a prefix shares."""


class Pages(Cache):
    """One pool of pages [pages, page, heads, width] per layer and plane; a page id means the same page in every layer.

    The pool is made at once, as many pages as ``budget`` has room for: growth copies nothing, and addresses never change (a
    CUDA graph may hold them). A page is held by any number of slots, and kept by a ``Store``; one that neither needs is free.
    What is kept alone is taken back (``reclaim``) when no other page is free.
    """

    def __init__(self, *args: Any, page: int = PAGE, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.budget is None or self.budget < page * self.bytes_per_token:
            raise SettingsError(
                f"pages of {page * self.bytes_per_token:,} bytes need a budget of at least one, and it is {self.budget}",
                "give cache_bytes, or layout='slab'",
            )
        self.page = page
        self.num_pages = self.budget // (page * self.bytes_per_token)
        self.budget = self.num_pages * page * self.bytes_per_token
        self.reclaim: Callable[[int], int] | None = None
        """Called with a number of pages that a slot lacks: drops so many kept ones, and says how many there were."""
        self._free = list(range(self.num_pages))[::-1]
        self._holders = [0] * self.num_pages
        self._kept = [0] * self.num_pages
        self._tables: dict[int, list[int]] = {}
        self._pools: list[tuple[Tensor, ...]] = []
        self._last: Tables | None = None

    @property
    def num_open(self) -> int:
        return len(self._tables)

    @property
    def bytes_per_page(self) -> int:
        return self.page * self.bytes_per_token

    @property
    def made(self) -> bool:
        """Whether the pool is there: its bytes are then taken from the device already."""
        return bool(self._pools)

    def pools(self, layer: int) -> tuple[Tensor, ...]:
        """The planes [pages, page, heads, width] of a layer."""
        if not self._pools:
            self._pools = [
                tuple(torch.empty((self.num_pages, self.page, h, w), dtype=t, device=device) for h, w, t in self.planes)
                for device in self.devices
            ]
        return self._pools[layer]

    def capacity(self, tokens: int) -> int:
        return -(-tokens // self.page) * self.page

    def growth_bytes(self, slot: int, tokens: int) -> int:
        return max(0, -(-tokens // self.page) - len(self._tables[slot])) * self.bytes_per_page

    def allocate(self, slot: int) -> None:
        if slot in self._tables:
            raise ValueError(f"cache slot {slot} is in use")
        self._tables[slot] = []

    def grow(self, slot: int, tokens: int) -> None:
        size = self.growth_bytes(slot, tokens)
        if not size:
            return
        count = size // self.bytes_per_page
        if count > len(self._free) and self.reclaim is not None and self.bytes_held + size <= (self.budget or 0):
            while count > len(self._free) and self.reclaim(count - len(self._free)):
                pass  # a block may be dropped whose page a sequence holds: that frees none
        self._take(size)
        if count > len(self._free):
            self.bytes_held -= size
            raise OutOfMemory(
                f"the cache lacks {count - len(self._free)} of {count} pages: blocks that are kept take the others",
                "lower the engine setting prefix_cache_bytes", needed=count, available=len(self._free), unit="pages",
            )  # fmt: skip
        for _ in range(count):
            page = self._free.pop()
            self._holders[page] = 1
            self._tables[slot].append(page)

    def free(self, slot: int) -> None:
        self._last = None
        for page in self._tables.pop(slot):
            self._holders[page] -= 1
            if not self._holders[page]:
                self.bytes_held -= self.bytes_per_page
                self._settle(page)

    def write(self, layer: int, slot: int, past: int, *new: Tensor) -> tuple[Any, ...]:
        total = past + len(new[0])
        self.grow(slot, total)
        self.put(layer, torch.tensor(self._rows(slot, past, total), device=self.devices[layer]), *new)
        return self.gather(layer, slot, total)

    def put(self, layer: int, rows: Tensor, *new: Tensor) -> None:
        """Each side's ``new`` [T, heads, width] to the places ``rows`` [T] of the pool."""
        if fused.on(new[0]):
            for pool, fresh in zip(self.pools(layer), self._stored(new), strict=True):
                fused.write(pool, rows.to(pool.device), fresh)
            return
        if self._last is not None and self._last.fixed:
            held = rows >= 0
            rows, new = rows[held], tuple(side[held] for side in new)
        for pool, fresh in zip(self.pools(layer), self._stored(new), strict=True):
            pool.flatten(0, 1).index_copy_(0, rows.to(pool.device), fresh.to(pool.dtype))

    def gather(self, layer: int, slot: int, total: int) -> tuple[Any, ...]:
        """The first ``total`` tokens of a slot as sides [heads, total, width]: a copy, where no kernel reads pages."""
        pages = torch.tensor(self._tables[slot][: -(-total // self.page)], device=self.devices[layer])
        return self._sides([pool[pages].flatten(0, 1)[:total].transpose(0, 1) for pool in self.pools(layer)])

    def tables(self, batch: Batch) -> Tables:
        """The places of ``batch``, with room made for its new tokens."""
        if self._last is None or self._last.batch is not batch:
            totals = [past + n for past, n in zip(batch.past, batch.lengths, strict=True)]
            rows: list[int] = []
            for slot, past, total in zip(batch.slots, batch.past, totals, strict=True):
                self.grow(slot, total)
                rows += self._rows(slot, past, total)
            most = -(-max(totals) // self.page)
            padded = [(self._tables[slot] + [0] * most)[:most] for slot in batch.slots]
            self._last = Tables(
                batch,
                tuple(batch.lengths),
                torch.tensor(rows, device=self.device),
                torch.tensor(padded, dtype=torch.int32, device=self.device),
                torch.tensor(totals, dtype=torch.int32, device=self.device),
            )
        return self._last

    def place(self, tables: Tables) -> None:
        """Use ``tables`` for their batch, in place of what ``tables()`` would make of it."""
        self._last = tables

    def place_of(self, slot: int, token: int) -> tuple[int, list[int]]:
        """The row of ``token``, the next one of ``slot``, with room made for it; and the slot's pages."""
        self.grow(slot, token + 1)
        return self._rows(slot, token, token + 1)[0], self._tables[slot]

    def gather_tables(self, layer: int, tables: Tables) -> tuple[list[Tensor], Tensor]:
        """Every row's pages side by side, [B, heads, M * page, width] of each side, and bool [B, M * page]: what is a token.
        As it is written, with no word to the host: the reference of kernels that read block tables."""
        sides = [pool[tables.block_tables.long()].flatten(1, 2).transpose(1, 2) for pool in self.pools(layer)]
        live = torch.arange(sides[0].shape[2], device=tables.lengths.device) < tables.lengths[:, None]
        return [_floats(side) for side in self._sides(sides)], live

    def store(self, most: int, block: int) -> Store:
        return SharedStore(self, most)

    def _rows(self, slot: int, past: int, total: int) -> list[int]:
        table, page = self._tables[slot], self.page
        touched = table[past // page : -(-total // page)]
        if shared := [p for p in touched if self._holders[p] > 1 or self._kept[p]]:
            raise ValueError(f"slot {slot} would write tokens {past} to {total} into the shared pages {shared}")
        return [table[at // page] * page + at % page for at in range(past, total)]

    def _settle(self, page: int) -> None:
        if not self._holders[page] and not self._kept[page]:
            self._free.append(page)


class SharedStore:
    """Pages that are kept where they lie: nothing is copied, and a slot that begins with them holds the very same."""

    def __init__(self, cache: Pages, most: int) -> None:
        self.block = cache.page
        self.bytes_per_block = cache.bytes_per_page
        self._cache = cache

    def keep(self, slot: int, first: int, count: int) -> list[int]:
        pages = self._cache._tables[slot][first : first + count]
        for page in pages:
            self._cache._kept[page] += 1
        return pages

    def reuse(self, slot: int, handles: Sequence[int]) -> None:
        cache = self._cache
        if cache._tables[slot]:
            raise ValueError(f"cache slot {slot} holds tokens already")
        for page in handles:
            if not cache._holders[page]:
                cache._take(cache.bytes_per_page)
            cache._holders[page] += 1
            cache._tables[slot].append(page)

    def drop(self, handle: int) -> None:
        self._cache._kept[handle] -= 1
        self._cache._settle(handle)


class PagedCache(KeysAndValues, Pages):
    """Keys and values in pages [page, K, d]."""

    def turn_and_keep(
        self,
        layer: int,
        qkv: Tensor,
        heads: int,
        turn: tuple[Tensor, Tensor],
        norms: Sequence[fused.Share],
        batch: Batch,
    ) -> Tensor | None:
        """qkv [T, (H + 2 K) d] -> turned queries [T, H, d], the keys and values being in their places; None, and nothing is
        written, where no kernel computes. ``norms``: of the queries and of the keys, or none."""
        if self.kv != "auto" or not fused.on(qkv):
            return None
        rows = self.tables(batch).on(qkv.device).rows
        return fused.turn_and_keep(qkv, heads, turn, norms, rows, self.pools(layer))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, kind: str = DEFAULT) -> Tensor:
        """See KVCache. All new tokens are written at once; a step of decoding is one call of a kernel where there is one."""
        self.put(layer, self.tables(batch).rows, k, v)
        return self.attend_kept(layer, q, batch, scale, kind)

    def attend_kept(self, layer: int, q: Tensor, batch: Batch, scale: float, kind: str = DEFAULT) -> Tensor:
        """``attend`` where the new keys and values are in their places already."""
        tables = self.tables(batch)
        made = fused.attend_pages(self.pools(layer), q, tables, scale) if kind == DEFAULT else None
        if made is not None:
            return made
        if tables.fixed:
            (keys, values), live = self.gather_tables(layer, tables)
            rows = q.unflatten(1, (self.num_kv_heads, -1))
            return attend_rows(rows, keys.to(q.dtype), values.to(q.dtype), live, scale).flatten(1, 2)
        parts, totals = q.split(batch.lengths), map(sum, zip(batch.past, batch.lengths, strict=True))
        out: list[Tensor] = []
        for part, slot, total in zip(parts, batch.slots, totals, strict=True):
            keys, values = self.gather(layer, slot, total)
            out.append(attend_one(part, keys, values, scale, kind))
        return out[0] if len(out) == 1 else torch.cat(out)


def attend_rows(q: Tensor, keys: Tensor, values: Tensor, live: Tensor, scale: float) -> Tensor:
    """One token of each sequence: q [B, K, G, d], keys and values [B, K, S, .], live [B, S] -> [B, K, G, .]; zeros where none
    is live. Softmax in float32."""
    scores = (q @ keys.transpose(-1, -2)).float() * scale
    shares = scores.masked_fill(~live[:, None, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    # What a page holds behind its tokens may be anything.
    return shares.to(q.dtype) @ values.masked_fill(~live[:, None, :, None], 0.0)


def _floats(side: Any) -> Tensor:
    return side.to(torch.float32) if isinstance(side, Quantised) else side


class PagedLatentCache(Latents, Pages):
    """Latents in pages [page, 1, W]."""

    def decodes(self, batch: Batch, q: Tensor) -> bool:
        """Whether a step is attended by ``attend_kept``: one new token each, and a kernel or a fixed batch."""
        return max(batch.lengths) == 1 and (self.tables(batch).fixed or fused.on(q))

    def keep(self, layer: int, rows: Tensor, batch: Batch) -> None:
        """Put the new ``rows`` [T, W] to their places."""
        self.put(layer, self.tables(batch).rows, rows[:, None])

    def kept(self, layer: int, slot: int, total: int) -> Rows:
        """The first ``total`` rows of a slot [total, W]: a copy."""
        (side,) = self.gather(layer, slot, total)
        return Quantised(side.values[0], side.scales[0], side.parts) if isinstance(side, Quantised) else side[0]

    def attend_members(self, layer: int, q: Tensor, members: Sequence[int], batch: Batch, rank: int, scale: float) -> Tensor:
        """The new tokens of some sequences of ``batch``, whose rows are kept, where kernels compute: queries in the space of
        the latents [T, H, W] -> [T, H, rank]."""
        made = fused.attend_latents(self.pools(layer), q, self._some(tuple(members), batch), rank, scale)
        assert made is not None
        return made

    def _some(self, members: tuple[int, ...], batch: Batch) -> Tables:
        """The tables of some sequences, made once for all layers."""
        whole = self.tables(batch)
        if members not in whole.some:
            at = torch.tensor(members, device=whole.lengths.device)
            counts = tuple(whole.counts[i] for i in members)
            whole.some[members] = Tables(batch, counts, whole.rows, whole.block_tables[at], whole.lengths[at])
        return whole.some[members]

    def attend_kept(self, layer: int, q: Tensor, rows: Tensor, batch: Batch, rank: int, scale: float) -> Tensor:
        """Keep the new ``rows`` [B, W], then attend: queries in the space of the latents [B, H, W] -> [B, H, rank]."""
        tables = self.tables(batch)
        self.put(layer, tables.rows, rows[:, None])
        made = fused.attend_latents(self.pools(layer), q, tables, rank, scale)
        if made is not None:
            return made
        (keys,), live = self.gather_tables(layer, tables)
        keys = keys.to(q.dtype)
        return attend_rows(q[:, None], keys, keys[..., :rank], live, scale)[:, 0]
