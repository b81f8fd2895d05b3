"""The one place that decides whether a Triton kernel computes or the modules' own torch code, which is the reference.

Kernels are for inference on CUDA: never where gradients are wanted or a graph is traced. Triton is an extra (``gpu``), and
it is imported when the first of them runs.

T tokens, D width, H query and K key-value heads, d head width, I inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirada import config
from mirada.errors import SettingsError
from mirada.layers.kernels import library, matrix
from mirada.layers.past import attend_one
from mirada.layers.tables import Tables

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


def packs(device: torch.device) -> bool:
    """Whether matrices that are rounded while a model is loaded are kept as integers for these kernels (``packed``)."""
    return device.type in status().devices


def on(x: Tensor) -> bool:
    """Whether kernels compute with ``x``."""
    return (
        x.device.type in status().devices
        and x.dtype in _TYPES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def compiles(x: Tensor) -> bool:
    """Whether the compiled CPU kernels may read ``x``: they take addresses, which subclasses and traces do not have. Triton's
    come first where tests interpret them."""
    return (
        x.device.type == "cpu"
        and not on(x)
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and library.library() is not None
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """See ``norm.RMSNorm``: x [.., D] of at least one row; None where no kernel computes."""
    if not on(x) or weight.dtype != x.dtype or not x.numel():
        return None
    from mirada.layers.kernels import triton_norm

    rows = x if x.ndim == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
    return triton_norm.rms_norm(rows, weight, eps).view(x.shape)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """x and delta [T, D] -> x + delta, and its norm; None where no kernel computes."""
    if not on(x) or not weight.dtype == x.dtype == delta.dtype:
        return None
    from mirada.layers.kernels import triton_norm

    return triton_norm.add_norm(x.contiguous(), delta, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """[.., 2 I], gates then ups -> silu(gate) * up [.., I]."""
    if on(gate_up):
        from mirada.layers.kernels import triton_norm

        made = triton_norm.swiglu(gate_up.reshape(-1, gate_up.shape[-1]))
        return made.view(*gate_up.shape[:-1], -1)
    if gate_up.dtype == torch.float32 and compiles(gate_up):
        return matrix.swiglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


MOST_HEAD = 1024
"""Channels of a head that the CPU kernel turns."""
Share = tuple[Tensor, float, int]
"""Of a norm of heads: its weight [d], its eps, and how many of the heads are its."""


def turn_in_place(
    made: Tensor,
    by: nn.Module,
    heads: Tensor,
    turn: tuple[Tensor, Tensor],
    norms: Sequence[Share] = (),
    pairs: bool = False,
) -> Tensor | None:
    """Normalises and turns ``heads`` [T, H, d], a view of what ``by`` has ``made``, where they lie, on a CPU.

    That is ``rope.rotate`` of ``norm.norm_heads``, or, with ``pairs``, of ``rope.pairs_to_halves``. ``norms`` are of
    modules that nothing is hooked on (``plain``).

    Returns the heads; None, and nothing is written, where no kernel computes. What is hooked on ``by`` may keep what it saw:
    heads are then of a copy.
    """
    if made.dtype != torch.float32 or not compiles(made) or heads.shape[-1] > MOST_HEAD:
        return None
    if any(weight.dtype != torch.float32 for weight, _, _ in norms) or any(side.dtype != torch.float32 for side in turn):
        return None
    if not plain(by):
        heads = heads.clone()
    begin = 0
    for weight, eps, count in norms:
        matrix.normalise_heads(heads[:, begin : begin + count], weight, eps)
        begin += count
    matrix.turn_heads(heads, turn, pairs)
    return heads


def gelu_in_place(x: Tensor, by: nn.Module, kind: str) -> bool:
    """x, which ``by`` has made, becomes ``mlp.gelu`` of it, ``tanh`` or ``quick``, on a CPU; False, and nothing is written,
    where no kernel computes. What is hooked on ``by`` may keep what it saw."""
    if kind not in ("tanh", "quick") or x.dtype != torch.float32 or not x.is_contiguous() or not _lanes(x) or not plain(by):
        return False
    matrix.gelu(x, kind == "quick")
    return True


def seen(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor | None:
    """As ``attention.attend_packed`` (of one segment: as ``attend_some``) where all tokens of a segment see each other, for as
    many key-value as query heads, on a CPU in float32; None where no kernel computes."""
    same = q.dtype == k.dtype == v.dtype == torch.float32 and k.shape == v.shape and q.shape[1:] == k.shape[1:]
    if not same or not _lanes(q) or any(type(x) is not Tensor or x.stride(-1) != 1 for x in (k, v, q)):
        return None
    return matrix.attend_seen(q, k, v, lengths, scale)


def _lanes(x: Tensor) -> bool:
    """Whether kernels that are written for vectors may read ``x``: as plain C they are slower than torch."""
    return compiles(x) and library.status().name != "scalar"


def norm_in_place(x: Tensor, weight: Tensor, eps: float) -> bool:
    """x [T, D], any number apart, becomes its norm, on a CPU; False, and nothing is written, where no kernel computes."""
    if not x.dtype == weight.dtype == torch.float32 or not compiles(x):
        return False
    matrix.normalise_heads(x[:, None], weight, eps)
    return True


def plain(*modules: nn.Module) -> bool:
    """Whether nothing is hooked on them, or put in the place of a forward."""
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)


def turn_and_keep(
    qkv: Tensor,
    heads: int,
    turn: tuple[Tensor, Tensor],
    norms: Sequence[Share],
    rows: Tensor,
    pools: tuple[Tensor, ...],
) -> Tensor | None:
    """qkv [T, (H + 2 K) d] -> turned queries [T, H, d], the keys and values being at the places ``rows`` of their pools; None,
    and nothing is written, where the kernel does not take ``norms`` (see ``paged.PagedCache.turn_and_keep``)."""
    weights = None
    if norms:
        (q_weight, eps, _), (k_weight, k_eps, _) = norms
        if eps != k_eps or not q_weight.dtype == k_weight.dtype == qkv.dtype:
            return None
        weights = q_weight, k_weight, eps
    from mirada.layers.kernels import triton_rope

    return triton_rope.rope_write(qkv, heads, turn, weights, rows, *pools)


def write(pool: Tensor, rows: Tensor, new: Tensor) -> None:
    """new [T, heads, width] to places ``rows`` (int64 [T], negative: nowhere) of ``pool`` [pages, page, heads, width]."""
    from mirada.layers.kernels import triton_rope

    triton_rope.write(pool, rows, new.contiguous())


def attend_pages(pools: tuple[Tensor, ...], q: Tensor, tables: Tables, scale: float) -> Tensor | None:
    """Causal attention of new tokens whose keys and values are in their pages: q [T, H, d] -> [T, H, d]; None where no kernel
    computes. ``pools``: planes [pages, page, K, width], two of floats or four of int8 and scales."""
    decodes, kv_heads = max(tables.counts) == 1, pools[0].shape[2]
    if not on(q) or q.shape[1] // kv_heads > 64:
        return None
    from mirada.layers.kernels import triton_paged

    tables = tables.on(q.device)
    if decodes:
        return triton_paged.paged_decode(q, pools, tables.block_tables, tables.lengths, scale)
    if len(pools) == 2 and (made := _varlen_pages(q, pools, tables, scale)) is not None:
        return made
    if tables.places is None:
        tables.places = triton_paged.tiles(tables.counts, triton_paged.queries(q.shape[1], kv_heads), q.device)
    return triton_paged.paged_prefill(q, pools, tables.block_tables, tables.lengths, tables.places, scale)


def attend_latents(pools: tuple[Tensor, ...], q: Tensor, tables: Tables, rank: int, scale: float) -> Tensor | None:
    """New tokens over latents in pages: q [T, H, W] -> [T, H, rank]; None where no kernel computes."""
    if not on(q):
        return None
    from mirada.layers.kernels import triton_mla, triton_paged

    tables = tables.on(q.device)
    if max(tables.counts) == 1:
        return triton_mla.latent_decode(q, pools, tables.block_tables, tables.lengths, rank, scale)
    if tables.places is None:
        tables.places = triton_paged.tiles(tables.counts, triton_mla.QUERIES, q.device)
    return triton_mla.latent_prefill(q, pools, tables.block_tables, tables.lengths, tables.places, rank, scale)


MOST_GROUPED = 4096
"""Rows (tokens times experts per token) up to which experts are multiplied by our kernel, which fuses more; torch's grouped
product for more. A guess that no GPU has checked: ``benchmarks/gpu_kernels.py`` times both."""


def experts(x: Tensor, gate_up: Any, down: Any, tokens: Tensor, shares: Tensor, order: Tensor, counts: Tensor) -> Tensor | None:
    """See ``triton_moe.grouped_experts``; None where no kernel computes, or for so many rows that torch's is better. Stacks
    that are held as integers (``adapt.packed.PackedStack``) are multiplied as they lie."""
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor)):
        return _packed_experts(x, gate_up, down, tokens, shares, order, counts)
    grouped = x.device.type == "cuda" and x.dtype == torch.bfloat16
    if not on(x) or x.dtype != gate_up.dtype or not x.numel() or (grouped and len(tokens) > MOST_GROUPED):
        return None
    from mirada.layers.kernels import triton_moe

    return triton_moe.grouped_experts(x, gate_up, down, tokens, shares, order, counts)


def _packed_experts(x: Tensor, gate_up: Any, down: Any, *sorted_by_expert: Tensor) -> Tensor | None:
    joined = [one for stack in (gate_up, down) if (one := getattr(stack, "joined", None)) is not None]
    if not on(x) or not x.numel() or len(joined) < 2:
        return None
    forms = [one.packed for one in joined]
    if not all(map(_reads, forms)):
        return None
    from mirada.layers.kernels import triton_moe_packed

    return triton_moe_packed.grouped_packed_experts(x, *forms, *sorted_by_expert)


def packed(x: Tensor, form: Any) -> Tensor | None:
    """x [.., C] times ``adapt.packed.Packed`` [R, C] transposed -> [.., R]; None where no kernel reads its form."""
    if not on(x) or not _reads(form):
        return None
    from mirada.layers.kernels import triton_packed

    rows = x.reshape(-1, form.columns).contiguous()
    made = triton_packed.packed_linear(rows, form.values, form.scales, form.zeros, form.columns, form.bits)
    return made.view(*x.shape[:-1], -1)


def _reads(form: Any) -> bool:
    """Whether kernels multiply by an ``adapt.packed.Packed`` as it lies."""
    if form.values.dtype != torch.uint8 or form.groups is not None or form.row_block != 1 or form.bits not in (4, 8):
        return False
    group, rest = divmod(form.columns, form.scales.shape[1])
    if rest or form.group_size not in (0, group):
        return False
    from mirada.layers.kernels import triton_packed

    return triton_packed.takes(form.columns, group)


@cache
def _varlen() -> Any:
    """torch's attention over segments of one tensor, or None: torch < 2.10, or a build without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@lru_cache(maxsize=16)
def segments(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept for the layers of a forward: int32 [segments + 1]: where each begins, and the end of the last."""
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device)


def varlen(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool, scale: float) -> Tensor | None:
    """As ``attention.attend_packed`` for as many key-value as query heads, without padding: by torch's kernel, or by ours where
    it has none (float32, widths that are no multiple of 8, a card or a release that it does not know); None off CUDA, where
    gradients are wanted, and for heads wider than 256."""
    width = q.shape[-1]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or width > 256 or v.shape != q.shape:
        return None
    if q.device.type == "cuda" and q.dtype in _TYPES[1:] and width % 8 == 0 and _varlen_works(q.device, q.dtype, width):
        return _call_varlen(_varlen(), q, k, v, segments(lengths, q.device), max(lengths), causal, scale)
    if not on(q):
        return None
    from mirada.layers.kernels import triton_varlen

    return triton_varlen.varlen(q, k, v, _places(lengths, q.device), causal, scale)


@lru_cache(maxsize=16)
def _places(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept for the layers of a forward: see ``triton_varlen.tiles``."""
    from mirada.layers.kernels import triton_varlen

    return triton_varlen.tiles(lengths, device)


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
    if _varlen() is None:
        return False
    x = torch.zeros(1, 1, width, dtype=dtype, device=device)
    try:
        _call_varlen(_varlen(), x, x, x, segments((1,), device), 1, False, 1.0)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False
    return True


def _varlen_pages(q: Tensor, pools: tuple[Tensor, ...], tables: Tables, scale: float) -> Tensor | None:
    """New tokens over pages by torch's kernel, or None: it wants block tables (torch >= 2.11), and pages of a size that depends
    on the build (its second version of flash attention takes multiples of 256 only, so not ours)."""
    attend = _varlen()
    if q.device.type != "cuda" or q.dtype not in _TYPES[1:] or attend is None or "block_table" not in _parameters(attend):
        return None
    if not _varlen_pages_work(q.device, q.dtype, q.shape[1], *pools[0].shape[1:]):
        return None
    most = tables.block_tables.shape[1] * pools[0].shape[1]
    ends = segments(tables.counts, q.device)
    return attend(
        q, pools[0], pools[1], ends, None, max(tables.counts), most, scale=scale, window_size=(-1, 0),
        enable_gqa=True, seqused_k=tables.lengths, block_table=tables.block_tables,
    )  # fmt: skip


@cache
def _varlen_pages_work(device: torch.device, dtype: torch.dtype, heads: int, page: int, kv_heads: int, width: int) -> bool:
    """Tried once: a context of two pages in the wrong order, of which the last token must find its own value."""
    random = torch.Generator(device).manual_seed(0)
    q, keys, values = (
        torch.randn(*shape, generator=random, device=device, dtype=dtype)
        for shape in ((2, heads, width), (2, page, kv_heads, width), (2, page, kv_heads, width))
    )
    tables = torch.tensor([[1, 0]], dtype=torch.int32, device=device)
    lengths = torch.tensor([page + 1], dtype=torch.int32, device=device)
    try:
        made = _varlen()(
            q, keys, values, segments((2,), device), None, 2, 2 * page, scale=0.1, window_size=(-1, 0), enable_gqa=True,
            seqused_k=lengths, block_table=tables,
        )  # fmt: skip
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False
    k, v = (x[[1, 0]].flatten(0, 1)[: page + 1].transpose(0, 1) for x in (keys, values))
    return torch.allclose(made.float(), attend_one(q, k, v, 0.1).float(), atol=0.05)
