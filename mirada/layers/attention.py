"""Attention over packed sequences, without masks, and the kinds of arithmetic that compute it.

T tokens of all sequences, H query heads, K key/value heads (H a multiple of K), d head size. In a kind of attention: B batch,
L query rows, S key rows, of which the queries are the last L where it is causal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.errors import NotAvailable, SettingsError, nearest
from mirada.layers import fused

CAUSAL_SLACK = 0.25
"""Causal sequences share a padded batch while the shorter lacks at most this share of the longer."""
DEFAULT = "sdpa"
FLASH_TYPES = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY = (8, 0)
"""Least compute capability (Ampere) that torch's flash kernels run on."""


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


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v by whichever kernel torch chooses: q [B, H, L, d], k and v [B, H, S, d] -> [B, H, L, d]."""
    # Without a past the plain triangle of is_causal holds and no mask is made.
    mask = _triangle(q, k) if causal and q.shape[-2] != k.shape[-2] else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale)


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """As ``sdpa``, by torch's flash kernels or not at all: RuntimeError where they cannot (see ``check_kind``)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    past = causal and q.shape[-2] != k.shape[-2]
    mask = causal_lower_right(q.shape[-2], k.shape[-2]) if past else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and not past, scale=scale)  # pyright: ignore


def eager(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """As ``sdpa``, as it is written: all scores at once, softmax in float32. Slow and large; to compare with."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if causal:
        scores = scores.masked_fill(~_triangle(q, k), float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


KINDS = {"sdpa": sdpa, "flash": flash, "eager": eager}
"""What ``attention_kind`` of a module may say."""


def _triangle(q: Tensor, k: Tensor) -> Tensor:
    """bool [L, S]: which keys each query may look at, where the queries are the last of the keys' tokens."""
    n, total = q.shape[-2], k.shape[-2]
    return torch.ones(n, total, dtype=torch.bool, device=q.device).tril(total - n)


def check_kind(kind: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kind that ``kind`` (one of ``KINDS``, or ``auto``) means for a model in ``dtype`` on ``device``.

    Raises SettingsError for an unknown kind or a type that rules it out, NotAvailable for a device that does.
    """
    if kind == "auto":
        return DEFAULT
    if kind not in KINDS:
        raise SettingsError(f"attn {kind!r} is unknown", nearest(str(kind), ("auto", *KINDS)))
    if kind == "flash":
        if device.type != "cuda":
            raise NotAvailable(f"attn 'flash' is not available on device {device.type}", "use attn='auto', or device='cuda'")
        if dtype not in FLASH_TYPES:
            name = str(dtype).removeprefix("torch.")
            raise SettingsError(f"attn 'flash' does not compute in {name}", "use dtype='bfloat16' or 'float16', or attn='auto'")
        capability = torch.cuda.get_device_capability(device)
        if capability < FLASH_CAPABILITY or not torch.backends.cuda.is_flash_attention_available():
            raise NotAvailable(
                f"attn 'flash' is not available: {device} has capability {capability[0]}.{capability[1]}",
                "it needs 8.0 and a torch built with it; use attn='auto'",
            )
    return kind


def set_kind(model: nn.Module, kind: str) -> None:
    """Every attention of ``model`` computes by ``kind``, one of ``KINDS``."""
    for module in model.modules():
        if hasattr(module, "attention_kind"):
            setattr(module, "attention_kind", kind)  # noqa: B010  (its type says Tensor or Module only)
