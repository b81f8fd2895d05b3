"""The kinds of arithmetic that compute attention, and which of them a device has.

B batch, H heads, d head size; L query rows, S key rows, of which the queries are the last L where it is causal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada.errors import NotAvailable, SettingsError, nearest

DEFAULT = "sdpa"
FLASH_TYPES = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY = (8, 0)
"""Least compute capability (Ampere) that torch's flash kernels run on."""


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
