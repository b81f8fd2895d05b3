"""Multi-head latent attention: keys and values of all heads are linear maps of one short latent per token.

T new tokens of all sequences, n of one; S past + new tokens of one sequence; D width; H heads; c latent size; r size of the
rotary part; W = c + r values cached per token. Ported facts: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3
(``modeling_deepseek.py``, ``inference/model.py`` of deepseek-ai/DeepSeek-V3).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.layers import fused
from mirada.layers.attention import attend_packed
from mirada.layers.batch import Batch
from mirada.layers.kinds import DEFAULT
from mirada.layers.kv_int8 import Quantised
from mirada.layers.latent_cache import LatentCache, Rows
from mirada.layers.linear import Linear, linear
from mirada.layers.norm import RMSNorm, norm_in_place
from mirada.layers.paged import PagedLatentCache
from mirada.layers.past import TILE, Read, attend_one, attend_pieces, in_pieces, merge, tiles, written_piece
from mirada.layers.rope import Rotation, pairs_to_halves, rotate

LATENT_EPS = 1e-6
"""The released code builds both latent norms with the default of its class, whatever ``rms_norm_eps`` says."""


SCORES = 1 << 24
"""Scores that the absorbed form holds at once, 64 MB; a few new tokens on a long past and many heads would take gigabytes."""


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of one attention: ``nope`` + ``rope`` channels of a query or key head, ``value`` of a value head."""

    dim: int
    heads: int
    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int

    @property
    def key(self) -> int:
        return self.nope + self.rope


class MLA(nn.Module):
    """Causal latent attention of layer ``index``; scores are multiplied by ``scale``.

    Two forms of one function. *Expanded* makes keys and values of every head from the latents. *Absorbed* maps queries into
    the space of the latents and the result out of it, so the cache is read as it is: one key of W for all heads.
    """

    attention_kind: str = DEFAULT
    """Of the expanded form, see ``layers.kinds.KINDS``; the absorbed one always computes its softmax as written."""
    variants: Sequence[tuple[Callable[[Tensor], Tensor] | None, tuple[int, ...]]] = ()
    """Where an adapter changes the weight of ``kv_b``: what makes the changed one (None: as it is), and for which of the
    sequences of a forward; together all of them."""

    def __init__(self, sizes: LatentSizes, scale: float, index: int) -> None:
        super().__init__()
        self.sizes, self.scale, self.index = sizes, scale, index
        s = sizes
        if s.q_rank is None:
            self.q = Linear(s.dim, s.heads * s.key)
        else:
            self.q_a = Linear(s.dim, s.q_rank)
            self.q_norm = RMSNorm(s.q_rank, LATENT_EPS)
            self.q_b = Linear(s.q_rank, s.heads * s.key)
        self.kv_a = Linear(s.dim, s.kv_rank + s.rope)
        self.kv_norm = RMSNorm(s.kv_rank, LATENT_EPS)
        self.kv_b = Linear(s.kv_rank, s.heads * (s.nope + s.value))
        self.kv_b.stays_float = True  # the absorbed form reads its weight: it is never held packed
        self.out = Linear(s.heads * s.value, s.dim)

    def forward(self, x: Tensor, turn: Rotation, batch: Batch, cache: LatentCache | None = None) -> Tensor:
        """[T, D] -> [T, D]. With a cache, the rows of the new tokens are kept there."""
        q, rows = self.queries(x, turn), self.rows(x, turn)
        if cache is None:
            if self.variants:
                raise RuntimeError("adapters of kv_b are for forwards with a cache")
            k, v = self.expand(rows)
            mixed = attend_packed(
                q, k, self._as_wide(v), batch.lengths, causal=True, scale=self.scale, kind=self.attention_kind
            )
            return self.out(mixed[..., : self.sizes.value].flatten(1))
        if not self.variants and (made := self._over_pages(q, rows, batch, cache)) is not None:
            return self.out(made.flatten(1))
        so_far = cache.extend(self.index, rows, batch)
        attend = self._attend_variants if self.variants else self._attend
        return self.out(attend(q, so_far, batch.lengths).flatten(1))

    def queries(self, x: Tensor, turn: Rotation) -> Tensor:
        """[T, D] -> [T, H, nope + rope], the last ``rope`` channels turned."""
        s = self.sizes
        last = self.q if s.q_rank is None else self.q_b
        flat = self.q(x) if s.q_rank is None else self.q_b(self.q_norm(self.q_a(x)))
        whole = flat.view(len(x), s.heads, s.key)
        if fused.plain(last) and fused.turn_in_place(flat, last, whole[..., s.nope :], turn, pairs=True) is not None:
            return whole
        nope, rope = whole.split((s.nope, s.rope), -1)
        return torch.cat((nope, rotate(pairs_to_halves(rope), turn)), -1)

    def rows(self, x: Tensor, turn: Rotation) -> Tensor:
        """[T, D] -> [T, W]: normalised latent, and the turned key that all heads share."""
        rows = self.kv_a(x)
        latent, key = rows.split((self.sizes.kv_rank, self.sizes.rope), -1)
        if fused.plain(self.kv_a) and fused.turn_in_place(rows, self.kv_a, key[:, None], turn, pairs=True) is not None:
            norm_in_place(latent, self.kv_norm)
            return rows
        return torch.cat((self.kv_norm(latent), rotate(pairs_to_halves(key)[:, None], turn)[:, 0]), -1)

    def expand(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[S, W] -> keys [S, H, nope + rope] and values [S, H, value] of every head."""
        s = self.sizes
        latent, key = rows.split((s.kv_rank, s.rope), -1)
        k, v = self.kv_b(latent).view(len(rows), s.heads, -1).split((s.nope, s.value), -1)
        return torch.cat((k, key[:, None].expand(-1, s.heads, -1)), -1), v

    def absorbs(self, n: int, total: int) -> bool:
        """Whether the absorbed form takes fewer multiplications for ``n`` new of ``total`` tokens.

        Expanded maps every cached token, absorbed only the new ones; in return each of its scores and sums is longer.
        """
        s = self.sizes
        return (total - n) * s.kv_rank * (s.nope + s.value) > n * total * (2 * s.kv_rank - s.nope - s.value)

    def attend_expanded(self, q: Tensor, rows: Rows) -> Tensor:
        """The last n tokens of one sequence: q [n, H, nope + rope], rows [S, W] -> [n, H, value].

        Keys and values of a long past are made and forgotten a tile at a time: of 128K tokens they would take gigabytes.
        """
        total, s = len(rows), self.sizes
        if total > len(q) and (in_pieces(self.attention_kind, q.device) or isinstance(rows, Quantised)):
            tile = max(1, 4 * TILE // (s.heads * s.key))
            made = attend_pieces(q, self._reader(rows, q.dtype), total - len(q), tile, self.scale, self.attention_kind)
        else:
            made = attend_one(q, *self._reader(rows, q.dtype)(0, total), self.scale, self.attention_kind)
        return made[..., : s.value]

    def _reader(self, rows: Rows, dtype: torch.dtype) -> Read:
        def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
            k, v = (side.transpose(0, 1) for side in self.expand(rows[start:stop].to(dtype)))
            return k, self._as_wide(v)

        return read

    def attend_absorbed(self, q: Tensor, rows: Rows) -> Tensor:
        """As ``attend_expanded``."""
        return self._leave(attend_latents(self._enter(q), rows, self.sizes.kv_rank, self.scale))

    def _over_pages(self, q: Tensor, rows: Tensor, batch: Batch, cache: LatentCache) -> Tensor | None:
        """[T, H, value]; None where the rows of each sequence are to be brought together: no pages, or no kernel reads them."""
        if not isinstance(cache, PagedLatentCache):
            return None
        if cache.decodes(batch, q):
            mixed = cache.attend_kept(self.index, self._enter(q), rows, batch, self.sizes.kv_rank, self.scale)
            return self._leave(mixed)
        return self._forms_over_pages(q, rows, batch, cache) if fused.on(q) else None

    def _forms_over_pages(self, q: Tensor, rows: Tensor, batch: Batch, cache: PagedLatentCache) -> Tensor:
        """As ``_attend``: the absorbed form reads pages where they lie, and what has no past needs but its own rows."""
        cache.keep(self.index, rows, batch)
        parts, news = q.split(batch.lengths), rows.split(batch.lengths)
        ahead = list(zip(batch.lengths, batch.past, strict=True))
        made: dict[int, Tensor] = {}
        members = [i for i, (n, past) in enumerate(ahead) if self.absorbs(n, past + n)]
        if members:
            entered = self._enter(torch.cat([parts[i] for i in members]))
            mixed = cache.attend_members(self.index, entered, members, batch, self.sizes.kv_rank, self.scale)
            made.update(zip(members, self._leave(mixed).split([batch.lengths[i] for i in members]), strict=True))
        for i, (n, past) in enumerate(ahead):
            if i not in made:
                fresh = not past and cache.kv == "auto"
                held = news[i] if fresh else cache.kept(self.index, batch.slots[i], past + n)
                made[i] = self.attend_expanded(parts[i], held)
        return torch.cat([made[i] for i in range(len(parts))])

    def _attend(self, q: Tensor, so_far: list[Rows], lengths: tuple[int, ...]) -> Tensor:
        """Each sequence in the form that suits it; which one depends on nothing but that sequence."""
        parts, kinds = q.split(lengths), [self.absorbs(n, len(rows)) for n, rows in zip(lengths, so_far, strict=True)]
        if not all(kinds) or len(parts) == 1:
            forms = {True: self.attend_absorbed, False: self.attend_expanded}
            made = [forms[kind](part, rows) for kind, part, rows in zip(kinds, parts, so_far, strict=True)]
            return made[0] if len(made) == 1 else torch.cat(made)
        # A step of decoding: the maps into and out of the latents are read once for all sequences.
        entered = self._enter(q).split(lengths)
        made = [attend_latents(part, rows, self.sizes.kv_rank, self.scale) for part, rows in zip(entered, so_far, strict=True)]
        return self._leave(torch.cat(made))

    def _attend_variants(self, q: Tensor, so_far: list[Rows], lengths: tuple[int, ...]) -> Tensor:
        """As ``_attend``, the sequences of each variant together."""
        parts, made = q.split(lengths), list[Tensor | None]([None] * len(lengths))
        for change, members in self.variants:
            of = self if change is None else self._with(change(self.kv_b.weight))
            sizes = tuple(lengths[i] for i in members)
            done = of._attend(torch.cat([parts[i] for i in members]), [so_far[i] for i in members], sizes)
            for i, piece in zip(members, done.split(sizes), strict=True):
                made[i] = piece
        return torch.cat(made)  # pyright: ignore[reportArgumentType]

    def _with(self, weight: Tensor) -> MLA:
        """This attention with another weight of ``kv_b``; all else is shared."""
        made = copy.copy(self)
        made._modules = self._modules | {"kv_b": _Weight(weight)}
        return made

    def _maps(self) -> tuple[Tensor, Tensor]:
        """Views of ``kv_b``: [H, nope, c] to keys and [H, value, c] to values."""
        s = self.sizes
        key, value = self.kv_b.weight.view(s.heads, s.nope + s.value, s.kv_rank).split((s.nope, s.value), 1)
        return key, value

    def _enter(self, q: Tensor) -> Tensor:
        """[n, H, nope + rope] -> [n, H, W]."""
        nope, rope = q.split((self.sizes.nope, self.sizes.rope), -1)
        return torch.cat((torch.bmm(nope.transpose(0, 1), self._maps()[0]).transpose(0, 1), rope), -1)

    def _leave(self, mixed: Tensor) -> Tensor:
        """[n, H, c] -> [n, H, value]."""
        return torch.bmm(mixed.transpose(0, 1), self._maps()[1].transpose(1, 2)).transpose(0, 1)

    def _as_wide(self, v: Tensor) -> Tensor:
        """Values padded to the width of the keys: the kernels that never hold all scores want one width."""
        return F.pad(v, (0, self.sizes.key - self.sizes.value))


class _Weight(nn.Module):
    """A Linear without a bias, made for one forward."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def attend_latents(q: Tensor, rows: Rows, rank: int, scale: float) -> Tensor:
    """Causal attention of the last n tokens: q [n, H, W], rows [S, W] as keys, their first ``rank`` channels as values
    -> [n, H, rank]. At most ``SCORES`` scores are held at once (or those of one token)."""
    n, heads, _ = q.shape
    step = max(1, SCORES // (heads * len(rows)))
    pieces: list[Tensor] = []
    for part in q.split(step):
        n -= len(part)
        seen = rows[: len(rows) - n]
        of = _attend_int8 if isinstance(seen, Quantised) else _attend_latents
        pieces.append(of(part, seen, rank, scale))  # pyright: ignore[reportArgumentType]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _attend_latents(q: Tensor, rows: Tensor, rank: int, scale: float) -> Tensor:
    n, heads, _ = q.shape
    scores = (q.to(rows.dtype).flatten(0, 1) @ rows.T).view(n, heads, -1).float() * scale
    if n > 1:
        later = torch.ones(n, len(rows), dtype=torch.bool, device=q.device).triu(len(rows) - n + 1)
        scores = scores.masked_fill(later[:, None], float("-inf"))
    return (scores.softmax(-1).to(rows.dtype).flatten(0, 1) @ rows[:, :rank]).view(n, heads, rank).to(q.dtype)


def _attend_int8(q: Tensor, rows: Quantised, rank: int, scale: float) -> Tensor:
    """As ``_attend_latents``; at most a tile of the rows is floats at a time."""
    n, heads, width = q.shape
    past, tile = len(rows) - n, max(1, TILE // width)
    flat = q.float().flatten(0, 1)[None]
    new = rows[past:].to(torch.float32)
    later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1).repeat_interleave(heads, 0)
    out = written_piece(flat, new[None], new[None, :, :rank], later, scale)
    for start, stop in tiles(past, tile):
        some = rows[start:stop].to(torch.float32)[None]
        out = merge(out, written_piece(flat, some, some[..., :rank], None, scale))
    return out[0].view(n, heads, rank).to(q.dtype)
