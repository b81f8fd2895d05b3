"""Attention over packed sequences, without masks.

T tokens of all sequences, H query heads, K key/value heads (H a multiple of K), d head size; B padded sequences
of L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirada.layers import fused
from mirada.layers.kinds import DEFAULT, KINDS

CAUSAL_SLACK = 0.25
"""Causal sequences share a padded batch while the shorter lacks at most this share of the longer."""


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, scale: float, kind: str = DEFAULT
) -> Tensor:
    """softmax(q kᵀ · scale) v inside each of the consecutive segments ``lengths``: q [T, H, d], k and v [T, K, d] -> [T, H, d].

    Segments never see each other. On CUDA they lie end to end as they are, where torch has a kernel for it. Else bidirectional
    ones are batched with others of exactly equal length, and causal ones padded on the right, where no real query looks. So no
    mask is ever built. On a CPU in float32 without gradients a compiled kernel takes bidirectional ones (``fused.seen``).
    Differentiable.
    """
    if q.shape[1] != k.shape[1]:
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    if not causal and kind == DEFAULT and (made := fused.seen(q, k, v, lengths, scale)) is not None:
        return made
    if min(lengths) == max(lengths):
        shape = (len(lengths), lengths[0], *q.shape[1:])
        return _attend(q.reshape(shape), k.reshape(shape), v.reshape(shape), causal, scale, kind).reshape(q.shape)
    made = fused.varlen(q, k, v, tuple(lengths), causal, scale) if kind == DEFAULT else None
    if made is not None:
        return made
    parts = [x.split(list(lengths)) for x in (q, k, v)]
    pieces: dict[int, Tensor] = {}
    for group in groups(lengths, CAUSAL_SLACK if causal else 0.0):
        sizes = [lengths[i] for i in group]
        padded = [_pad([part[i] for i in group], sizes) for part in parts]
        made = _attend(padded[0], padded[1], padded[2], causal, scale, kind)
        pieces.update(zip(group, _unpad(made, sizes), strict=True))
    return torch.cat([pieces[i] for i in range(len(lengths))])


def attend_some(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str = DEFAULT) -> Tensor:
    """The same for some queries of one segment, all of whose tokens they see: q [n, H, d], k and v [T, H, d] -> [n, H, d]."""
    if kind == DEFAULT and (made := fused.seen(q, k, v, (len(k),), scale)) is not None:
        return made
    return _attend(q[None], k[None], v[None], False, scale, kind)[0]


def _pad(pieces: list[Tensor], sizes: list[int]) -> Tensor:
    """Pieces [n_i, ..] -> [B, sizes[0], ..], zeros on the right. One ``cat``: its backward only takes views."""
    filled = [
        x for piece, n in zip(pieces, sizes, strict=True) for x in (piece, piece.new_zeros(sizes[0] - n, *piece.shape[1:]))
    ]
    return torch.cat(filled).view(len(pieces), sizes[0], *pieces[0].shape[1:])


def _unpad(x: Tensor, sizes: list[int]) -> list[Tensor]:
    cuts = [n for size in sizes for n in (size, sizes[0] - size)]
    return list(x.flatten(0, 1).split(cuts)[::2])


def groups(lengths: Sequence[int], slack: float) -> list[list[int]]:
    """Indices of sequences that are batched together: the longest first, none shorter than its first by more than ``slack``."""
    made: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if made and lengths[i] >= (1 - slack) * lengths[made[-1][0]]:
            made[-1].append(i)
        else:
            made.append([i])
    return made


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, kind: str) -> Tensor:
    """[B, L, H, d] -> [B, L, H, d]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return KINDS[kind](q, k, v, causal, scale).transpose(1, 2)
