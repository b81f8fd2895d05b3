"""Attention of a few new tokens over the long past of one sequence, in pieces that are merged, without masks.

n new tokens; S past + new; H query heads; K key-value heads; G = H / K; d head width; t tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mirada.layers.kinds import DEFAULT, KINDS
from mirada.layers.kv_int8 import Quantised

TILE = 1 << 20
"""Values of keys (and as many of values) that are brought into floats at once: 4 MB, which a last-level cache holds."""

Read = Callable[[int, int], tuple[Tensor, Tensor]]
"""(start, stop) of tokens -> their keys and values [K, t, d]."""


def attend_one(q: Tensor, keys: Tensor | Quantised, values: Tensor | Quantised, scale: float, kind: str = DEFAULT) -> Tensor:
    """Causal attention of the last n tokens of one sequence: q [n, H, d], keys and values [K, S, d] -> [n, H, d].

    The heads that share a key-value head become query rows (every key is then read once); keys and values are never copied
    per head. Kept as int8, they are read tile by tile. A past is attended apart from the new tokens, so that no mask of
    n x S is made (chunk 512 after 16k tokens: 0.72 of the time with a mask).
    """
    if isinstance(keys, Quantised) and isinstance(values, Quantised):
        return _attend_int8(q, keys, values, scale, kind)
    assert isinstance(keys, Tensor) and isinstance(values, Tensor)
    n, num_heads, width = q.shape
    num_kv_heads, total = keys.shape[0], keys.shape[1]
    q = q.to(keys.dtype)
    if n == 1:
        rows = q.view(1, num_kv_heads, num_heads // num_kv_heads, width)
        return KINDS[kind](rows, keys[None], values[None], False, scale).view(1, num_heads, width)
    if n < total and in_pieces(kind, q.device):
        return attend_pieces(q, lambda a, b: (keys[:, a:b], values[:, a:b]), total - n, total, scale, kind)
    group = num_heads // num_kv_heads
    by_group = q.view(n, num_kv_heads, group, width).permute(2, 1, 0, 3)
    shape = (group, num_kv_heads, total, width)
    out = KINDS[kind](by_group, keys.expand(shape), values.expand(shape), True, scale)
    return out.permute(2, 1, 0, 3).reshape(n, num_heads, width)


def in_pieces(kind: str, device: torch.device) -> bool:
    """Whether torch has a kernel of this ``kind`` that also gives the sums which merging needs."""
    return kind == DEFAULT and device.type == "cpu"


def attend_pieces(q: Tensor, read: Read, past: int, tile: int, scale: float, kind: str = DEFAULT) -> Tensor:
    """As ``attend_one``, where ``read`` brings keys and values of at most ``tile`` past tokens at once, and the new ones.

    Each piece is a softmax of its own; they are merged by the logarithms of their sums (arXiv 2205.14135, section 3.1).
    """
    n, num_heads, width = q.shape
    fused = in_pieces(kind, q.device)
    k, v = read(past, past + n)
    group = num_heads // len(k)
    by_group = q.view(n, len(k), group, width).permute(2, 1, 0, 3)
    out, sums = _piece(by_group, k.expand(group, *k.shape), v.expand(group, *v.shape), True, scale, fused)
    rows = by_group.transpose(0, 1).reshape(1, len(k), group * n, width)
    for start, stop in tiles(past, tile):
        k, v = read(start, stop)
        more = _piece(rows, k[None], v[None], False, scale, fused)
        shape = (len(k), group, n)
        more = more[0].reshape(*shape, -1).transpose(0, 1), more[1].reshape(shape).transpose(0, 1)
        out, sums = merge((out, sums), more)
    return out.permute(2, 1, 0, 3).reshape(n, num_heads, -1).to(q.dtype)


def tiles(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive runs of at most ``size``."""
    for start in range(0, total, max(1, size)):
        yield start, min(start + max(1, size), total)


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(results [.., d], log of the sums of exponentials [..]) over two sets of keys -> over both together."""
    sums = torch.logaddexp(one[1], other[1])
    weights = [(part[1] - sums).exp().unsqueeze(-1) for part in (one, other)]
    return one[0] * weights[0] + other[0] * weights[1], sums


def _piece(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, fused: bool) -> tuple[Tensor, Tensor]:
    """q [B, H, L, d], k and v [B, H, S, d] (causal: L == S) -> results [B, H, L, d], log of the sums of exponentials."""
    if fused:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1) if causal else None
    return written_piece(q, k, v, later, scale)


def written_piece(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """As ``_piece``, as it is written: all scores at once, softmax in float32; none of a row looks where ``hidden`` [L, S]."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    sums = scores.logsumexp(-1)
    return (scores - sums[..., None]).exp().to(v.dtype) @ v, sums


def _attend_int8(q: Tensor, keys: Quantised, values: Quantised, scale: float, kind: str) -> Tensor:
    n, num_heads, width = q.shape
    num_kv_heads, total = keys.values.shape[:2]
    tile = max(1, TILE // (num_kv_heads * width))
    if n > 1:
        return attend_pieces(
            q.float(), lambda a, b: (keys[a:b].to(torch.float32), values[a:b].to(torch.float32)), total - n, tile, scale, kind
        ).to(q.dtype)  # fmt: skip
    rows = (q.float() * scale).view(num_kv_heads, num_heads // num_kv_heads, width)
    return _decode_int8(rows, keys, values, tile).view(1, num_heads, width).to(q.dtype)


def _decode_int8(rows: Tensor, keys: Quantised, values: Quantised, tile: int) -> Tensor:
    """[K, G, d] of one token -> [K, G, d]. Scales of keys multiply scores, those of values probabilities."""
    num_kv_heads, total, width = keys.values.shape
    room = torch.empty(num_kv_heads * min(tile, total) * width, dtype=torch.float32, device=rows.device)
    spans = list(tiles(total, tile))

    def floats(side: Quantised, start: int, stop: int) -> Tensor:
        return room[: num_kv_heads * (stop - start) * width].view(num_kv_heads, -1, width).copy_(side.values[:, start:stop])

    scores = [torch.bmm(rows, floats(keys, start, stop).transpose(1, 2)) for start, stop in spans]
    held = scores[0] if len(scores) == 1 else torch.cat(scores, -1)
    weights = (held * keys.scales.transpose(1, 2)).softmax(-1) * values.scales.transpose(1, 2)
    out = torch.bmm(weights[..., : spans[0][1]], floats(values, *spans[0]))
    for start, stop in spans[1:]:
        out.baddbmm_(weights[..., start:stop], floats(values, start, stop))
    return out
