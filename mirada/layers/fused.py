"""The one place that decides whether a Triton kernel computes or the modules' own torch code, which is the reference.

Kernels are for inference on CUDA: never where gradients are wanted or a graph is traced. Triton is an extra (``gpu``), and
it is imported when the first of them runs.

T tokens, D width, H query and K key-value heads, d head width, I inner width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mirada import config
from mirada.errors import SettingsError

if TYPE_CHECKING:
    from mirada.layers.norm import RMSNorm

SETTING = "MIRADA_GPU_KERNELS"
"""Environment: auto (on CUDA where Triton is installed), off, or interpret: on the CPU too, in Triton's interpreter, which
takes a thousand times as long and is for tests (it needs TRITON_INTERPRET=1)."""
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Status:
    """``devices`` that kernels compute on, ``why``, and ``fix``: what would change it (if anything)."""

    devices: tuple[str, ...]
    why: str
    fix: str = ""


@cache
def status() -> Status:
    """Whether Triton's kernels are used. Raises SettingsError for an unknown setting."""
    wanted = config.env(SETTING, "auto") or "auto"
    if wanted not in ("auto", "off", "interpret"):
        raise SettingsError(f"{SETTING}={wanted!r} is unknown", "use auto, off or interpret")
    if wanted == "off":
        return Status((), f"{SETTING}=off", f"unset {SETTING}")
    if find_spec("triton") is None:
        return Status((), "Triton is not installed", "pip install 'mirada[gpu]'")
    if wanted == "interpret":
        if config.env("TRITON_INTERPRET", "0") != "1":
            raise SettingsError(f"{SETTING}=interpret needs TRITON_INTERPRET=1", f"set it, or unset {SETTING}")
        return Status(("cpu",), "in Triton's interpreter, which is for tests", f"unset {SETTING}")
    return Status(("cuda",), "Triton is installed")


def on(x: Tensor) -> bool:
    """Whether kernels compute with ``x``."""
    return (
        x.device.type in status().devices
        and x.dtype in _TYPES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """See ``norm.RMSNorm``: x [.., D] of at least one row; None where no kernel computes."""
    if not on(x) or weight.dtype != x.dtype or not x.numel():
        return None
    from mirada.layers.kernels import triton_norm

    rows = x if x.ndim == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
    return triton_norm.rms_norm(rows, weight, eps).view(x.shape)


def add_norm(x: Tensor, delta: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """x and delta [T, D] -> x + delta, and the norm of that."""
    # A norm that something is hooked on is called as a module.
    if on(x) and norm.weight.dtype == x.dtype == delta.dtype and not norm._forward_hooks and not norm._forward_pre_hooks:
        from mirada.layers.kernels import triton_norm

        return triton_norm.add_norm(x.contiguous(), delta, norm.weight, norm.eps)
    total = x + delta
    return total, norm(total)


def swiglu(gate_up: Tensor) -> Tensor:
    """[.., 2 I], gates then ups -> silu(gate) * up [.., I]."""
    if on(gate_up):
        from mirada.layers.kernels import triton_norm

        made = triton_norm.swiglu(gate_up.reshape(-1, gate_up.shape[-1]))
        return made.view(*gate_up.shape[:-1], -1)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@cache
def _varlen() -> Any:
    """torch's attention over segments of one tensor, or None: torch < 2.10, or a build without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def segments(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [segments + 1]: where each begins, and the end of the last."""
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device)


def varlen(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float) -> Tensor | None:
    """As ``attention.attend_packed`` for as many key-value as query heads, without padding; None where torch has no kernel:
    off CUDA, other types than bfloat16 and float16, heads that are no multiple of 8 wide or wider than 256."""
    width = q.shape[-1]
    if q.device.type != "cuda" or q.dtype not in _TYPES[1:] or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    attend = _varlen()
    if attend is None or width % 8 or width > 256 or not _varlen_works(q.device, q.dtype, width):
        return None
    return _call_varlen(attend, q, k, v, segments(lengths, q.device), max(lengths), causal, scale)


def _call_varlen(attend: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, most: int, causal: bool, scale: float) -> Tensor:
    names = _parameters(attend)
    options: dict[str, Any] = {}
    if "scale" in names:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    if causal:  # the first release had a flag, later ones have a window
        options |= {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    return attend(q.contiguous(), k.contiguous(), v.contiguous(), cu, cu, most, most, **options)


@cache
def _parameters(function: Any) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(function).parameters)


@cache
def _varlen_works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tried once on one token: which sizes and cards torch's kernels take differs between its releases."""
    x = torch.zeros(1, 1, width, dtype=dtype, device=device)
    try:
        _call_varlen(_varlen(), x, x, x, segments((1,), device), 1, False, 1.0)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False
    return True
