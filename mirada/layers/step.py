"""A decoder's forward for a few new tokens on a CPU, as one call of compiled code (``kernels/step.c``).

For one token a small model spends most of its time between its matrix products: in some twenty torch calls per layer. Here a
plan is made once, of the addresses of all weights, and a step is one call that holds no lock of Python. What the plan cannot
take (gradients, hooks, modules of other kinds, other devices) is left to the modules' own forward, which is the reference.

n new tokens; D width; V vocabulary.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import contains, eq, is_
from typing import Any

import torch
from torch import Tensor, nn

from mirada.layers.attention import DEFAULT
from mirada.layers.batch import Batch
from mirada.layers.cache import SlabCache
from mirada.layers.kernels.library import Matrix, library
from mirada.layers.linear import Linear, MatrixLinear
from mirada.layers.norm import RMSNorm

MOST_ROWS = 1024
"""New tokens that one call takes."""
FEW_ROWS = 16
"""New tokens up to which a step is bound by reading the weights. More are left to the modules where layers are large or what
lies before them is long: torch's products and attention are as good there."""
SMALL_LAYER = 4 << 20
"""Weights of a layer in which torch's calls and what it keeps between them cost more than its products save."""
PARTS_BYTES = 32 << 20
"""Of attention's parts, with more than few new tokens."""
SPAN = 256
"""Keys of one part of attention (step.c)."""
LAYER_BYTES = 256 << 10
"""Bytes of a layer's weights that are worth one thread more."""
LARGE_PAGES = 4 << 20, 256 << 20
"""Bytes of all float weights from which and up to which they are put into large pages: with small ones a processor that reads
that much each step looks up more addresses than it can remember. Of more it costs seconds."""
_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_KEPT = {torch.float32: 0, torch.bfloat16: 1}
_FLOATS = tuple(_FORMATS.values())
_PAGE = 2 << 20
_KEPT_INT8 = 2
_NO_SUCH_TOKEN = ctypes.c_size_t(-1).value


@dataclass(frozen=True)
class Block:
    """The modules of one layer, in the order in which they are used."""

    norm1: nn.Module
    qkv: nn.Module
    head_norms: tuple[nn.Module, nn.Module] | None
    out: nn.Module
    norm2: nn.Module
    gate_up: nn.Module
    down: nn.Module


@dataclass(frozen=True)
class Shape:
    """Heads and rotation. ``frequencies`` [d/2], and for each of them the row of the positions that turns it."""

    heads: int
    kv_heads: int
    head_width: int
    scale: float
    frequencies: Tensor
    axes: Sequence[int]


@dataclass(frozen=True)
class Parts:
    """What a decoder is made of, the head apart."""

    shape: Shape
    blocks: Sequence[Block]
    norm: nn.Module
    embed: nn.Module | None = None
    """The table that tokens are looked up in."""


class _Layer(ctypes.Structure):
    """``mr_layer`` of step.h."""

    _fields_ = (
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm1", "norm2", "q_norm", "k_norm")),
    )


class _Wide(ctypes.Structure):
    """``mr_wide`` of step.h."""

    _fields_ = (("from_", ctypes.c_void_p), ("to", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Decoder(ctypes.Structure):
    """``mr_decoder`` of step.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "width", "heads", "kv_heads", "head_width", "inner")),
        *((name, ctypes.c_float) for name in ("eps", "head_eps", "scale")),
        ("layer", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("norm", "frequency", "axis")),
        *((name, Matrix) for name in ("head", "table")),
        ("wide", ctypes.POINTER(_Wide)),
        ("wides", ctypes.c_int32),
    )


class _Call(ctypes.Structure):
    """``mr_call`` of step.h."""

    _fields_ = (
        ("sequences", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("lengths", "past", "slabs")),
        ("kv", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("positions", ctypes.c_void_p),
        ("position_strides", ctypes.c_int64 * 2),
        *((name, ctypes.c_void_p) for name in ("x", "tokens", "hidden", "logits", "scratch")),
        ("room", ctypes.c_size_t),
    )


class Unplannable(Exception):
    """A module that a plan cannot take: its own forward computes. Never seen by callers of ``Step``."""


class Step:
    """Plans for one decoder, made when they are wanted and again when a module or a weight is no longer what it was.

    A copy or a pickle begins without a plan: addresses are of one process.
    """

    def __init__(self) -> None:
        self.on = True
        """False: every forward is the modules' own."""
        self._plan: _Plan | None = None
        self._refused: dict[bool, _Watch] = {}
        """What could not be planned without and with a head: nothing is tried again before it changes."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Step], tuple[()]]:
        return Step, ()

    @property
    def planned(self) -> bool:
        """Whether there is a plan."""
        return self._plan is not None

    def run(
        self,
        root: nn.Module,
        parts: Callable[[], Parts],
        x: Tensor | None,
        batch: Batch,
        cache: Any,
        head: nn.Module | None = None,
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """Embeddings x [n, D] -> hidden values [n, D] after the final norm, and with ``head`` float32 logits [n, V].

        Without x the embeddings are those of the batch's tokens, and only logits are made.
        ``parts`` gives the modules below ``root`` that compute them, or raises Unplannable. None, and nothing written, where
        this is not for a plan. OutOfMemory if the cache has no room.
        """
        if not self._suits(x, batch, cache):
            return None
        with self._lock:
            plan = self._current(root, parts, head)
            return None if plan is None or not plan.fits(x, batch, cache) else plan.run(x, batch, cache, head is not None)

    def _suits(self, x: Tensor | None, batch: Batch, cache: Any) -> bool:
        given = batch.tokens if x is None else x
        return (
            self.on
            and type(cache) is SlabCache
            and 0 < given.shape[0] <= MOST_ROWS
            and not torch.is_grad_enabled()
            and type(given) is Tensor
            and (given.dtype == torch.int64 if x is None else given.dtype in _KEPT)
            and given.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and library() is not None
        )

    def _current(self, root: nn.Module, parts: Callable[[], Parts], head: nn.Module | None) -> _Plan | None:
        plan = self._plan
        if plan is not None and (head is None or head is plan.head) and plan.watch.holds():
            return plan
        refused = self._refused.pop(head is not None, None)
        if refused is None or not refused.holds():
            refused = _Watch([root] if head is None else [root, head])
            try:
                self._plan = _Plan(parts(), head, refused)
                return self._plan
            except Unplannable:
                pass
        self._refused[head is not None] = refused
        return None


class _Watch:
    """What a plan rests on: modules, parameters, where they lie, and that nothing is put between them."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        modules = [module for root in roots for module in root.modules()]
        held: list[tuple[dict[str, Any], str, Any]] = []
        places: list[tuple[Tensor, int]] = []
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._own = [module.__dict__ for module in modules]
        self._attentions = [module for module in modules if hasattr(module, "attention_kind")]
        self._was_plain = self.plain()
        for module in modules:
            if isinstance(module, MatrixLinear):
                held.append((module.__dict__, "matrix", module.matrix))
            held += [(module._modules, name, child) for name, child in module._modules.items()]
            for name, parameter in module._parameters.items():
                held.append((module._parameters, name, parameter))
                if parameter is not None:
                    places.append((parameter, parameter.data_ptr()))
        # Columns, which are compared below without a line of Python for each: this is asked before every step.
        self._holders, self._names, self._values = zip(*held, strict=True) if held else ((), (), ())
        self._tensors, self._addresses = zip(*places, strict=True) if places else ((), ())

    def plain(self) -> bool:
        """Whether nothing is hooked in or put in a forward's place, and attention is of the kind that is compiled."""
        if any(self._hooks) or any(map(contains, self._own, repeat("forward"))):
            return False
        return all(module.attention_kind == DEFAULT for module in self._attentions)

    def holds(self) -> bool:
        """Whether all is as it was seen, and as ``plain`` or not."""
        return (
            all(map(is_, map(dict.get, self._holders, self._names), self._values))
            and all(map(eq, map(Tensor.data_ptr, self._tensors), self._addresses))
            and self.plain() == self._was_plain
        )


class _Plan:
    """Addresses of one decoder's weights, and scratch."""

    def __init__(self, parts: Parts, head: nn.Module | None, watch: _Watch) -> None:
        if not watch.plain():
            raise Unplannable
        self.watch, self.head = watch, head
        self._kept: list[Any] = []
        self._wide: list[_Wide] = []
        self.shape = shape = parts.shape
        norms = [norm for block in parts.blocks for norm in (block.norm1, block.norm2)] + [parts.norm]
        pairs = [norm for block in parts.blocks for norm in block.head_norms or ()]
        self._layers = (_Layer * len(parts.blocks))(*map(self._layer, parts.blocks))
        model = _Decoder(
            layers=len(parts.blocks), heads=shape.heads, kv_heads=shape.kv_heads, head_width=shape.head_width,
            eps=_eps(norms), head_eps=_eps(pairs), scale=shape.scale, layer=self._layers, norm=self._vector(parts.norm),
            frequency=self._keep(shape.frequencies.float().contiguous()),
            axis=self._keep(torch.tensor(shape.axes, dtype=torch.int32)),
        )  # fmt: skip
        model.width = self._layers[0].qkv.cols
        model.inner = self._layers[0].down.cols
        if head is not None:
            model.head = self._matrix(head)
        if parts.embed is not None:
            model.table = self._table(parts.embed, parts.norm)
        model.wides, model.wide = len(self._wide), (_Wide * len(self._wide))(*self._wide)
        self._model = model
        self._check(norms, pairs)
        self._weight = sum(_bytes(getattr(self._layers[0], name)) for name in ("qkv", "out", "gate_up", "down"))
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._calls: dict[int, tuple[_Call, Any, Any, Any]] = {}
        self._library: Any = library()
        self._by = ctypes.addressof(model)
        self._large_pages()
        first = self._layers[0]
        self._large = SMALL_LAYER < sum(w.rows * w.cols for w in (first.qkv, first.out, first.gate_up, first.down))

    def _large_pages(self) -> None:
        layers = [getattr(layer, name) for layer in self._layers for name in ("qkv", "out", "gate_up", "down")]
        found = {m.values: m for m in (*layers, self._model.head, self._model.table) if m.rows and m.format in _FLOATS}
        ranges = sorted((start, start + _bytes(m)) for start, m in found.items())
        if not LARGE_PAGES[0] <= sum(end - start for start, end in ranges) <= LARGE_PAGES[1]:
            return
        joined = ranges[:1]
        for start, end in ranges[1:]:  # tensors that were made together lie together
            if start - joined[-1][1] < _PAGE:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((start, end))
        for start, end in joined:
            self._library.mr_large_pages(start, end - start)

    def _layer(self, block: Block) -> _Layer:
        q_norm, k_norm = block.head_norms or (None, None)
        return _Layer(
            qkv=self._matrix(block.qkv), out=self._matrix(block.out),
            gate_up=self._matrix(block.gate_up), down=self._matrix(block.down),
            norm1=self._vector(block.norm1), norm2=self._vector(block.norm2),
            q_norm=q_norm and self._vector(q_norm), k_norm=k_norm and self._vector(k_norm),
        )  # fmt: skip

    def _matrix(self, module: nn.Module) -> Matrix:
        bias: Any = getattr(module, "bias", None)
        if type(module) is MatrixLinear:
            own, made = module.matrix, Matrix.from_buffer_copy(module.matrix.struct)
            self._kept += [own.values, own.scales, own.zeros, own.bias]
            if bias is not None and own.bias is not None:
                raise Unplannable
            if bias is not None:
                made.bias = self._floats(bias)
            return made
        if type(module) not in (nn.Linear, Linear):
            raise Unplannable
        weight: Any = module.weight
        if weight.dtype not in _FORMATS or weight.device.type != "cpu" or not weight.is_contiguous():
            raise Unplannable
        rows, cols = weight.shape
        return Matrix(
            format=_FORMATS[weight.dtype], rows=rows, cols=cols, values=weight.data_ptr(),
            bias=None if bias is None else self._floats(bias),
        )  # fmt: skip

    def _table(self, embed: Any, norm: Any) -> Matrix:
        """Of embeddings; one without rows where the modules would do more than read a row of it."""
        plain = type(embed) is nn.Embedding and embed.max_norm is None
        weight = embed.weight if plain else None
        if weight is None or weight.dtype not in _FORMATS or weight.device.type != "cpu" or not weight.is_contiguous():
            return Matrix()
        if norm.weight.dtype not in (torch.float32, weight.dtype):  # the modules would round what is looked up
            return Matrix()
        rows, cols = weight.shape
        return Matrix(format=_FORMATS[weight.dtype], rows=rows, cols=cols, values=weight.data_ptr())

    def _vector(self, norm: nn.Module) -> int:
        if type(norm) is not RMSNorm:
            raise Unplannable
        return self._floats(norm.weight)

    def _floats(self, tensor: Tensor) -> int:
        """The address of its values in float32: its own, or that of a copy that each step renews."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype not in _FORMATS:
            raise Unplannable
        if tensor.dtype == torch.float32:
            return tensor.data_ptr()
        place = self._keep(torch.empty(tensor.shape, dtype=torch.float32))
        self._wide.append(_Wide(tensor.data_ptr(), place, tensor.numel()))
        return place

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _check(self, norms: Sequence[Any], pairs: Sequence[Any]) -> None:
        """Every size that the compiled code takes for granted. Unplannable if one is another."""
        s, m = self.shape, self._model
        sizes = {
            "qkv": ((s.heads + 2 * s.kv_heads) * s.head_width, m.width),
            "out": (m.width, s.heads * s.head_width),
            "gate_up": (2 * m.inner, m.width),
            "down": (m.width, m.inner),
        }
        right = all(
            (matrix.rows, matrix.cols) == size
            for layer in self._layers
            for name, size in sizes.items()
            for matrix in (getattr(layer, name),)
        )
        right = right and all(norm.weight.numel() == m.width for norm in norms)
        right = right and all(norm.weight.numel() == s.head_width for norm in pairs)
        right = right and s.head_width % 4 == 0 and s.heads % s.kv_heads == 0
        right = right and len(s.frequencies) == len(s.axes) == s.head_width // 2
        if not right or (self.head is not None and m.head.cols != m.width) or (m.table.rows and m.table.cols != m.width):
            raise Unplannable

    def fits(self, x: Tensor | None, batch: Batch, cache: SlabCache) -> bool:
        """Whether the compiled code reads ``cache`` and, without x, knows the embeddings; and is the better choice."""
        s = self.shape
        if x is None and not self._model.table.rows:
            return False
        if len(batch.tokens) > FEW_ROWS and (self._large or self._parts_bytes(batch) > PARTS_BYTES):
            return False
        return (
            (cache.num_layers, cache.num_kv_heads, cache.head_dim) == (len(self._layers), s.kv_heads, s.head_width)
            and (cache.kv == "int8" or cache.dtype in _KEPT)
            and cache.device.type == "cpu"
        )

    def _parts_bytes(self, batch: Batch) -> int:
        s, pairs = self.shape, zip(batch.past, batch.lengths, strict=True)
        return 4 * s.heads * (s.head_width + 2) * sum(length * -(-(past + length) // SPAN) for past, length in pairs)

    def run(
        self, x: Tensor | None, batch: Batch, cache: SlabCache, with_logits: bool
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """What ``Step.run`` returns; None for a token that is not in the table. For one thread at a time."""
        n, positions = len(batch.tokens), batch.positions
        for slot, past, length in zip(batch.slots, batch.past, batch.lengths, strict=True):
            if cache.room(slot) < past + length:
                cache.grow(slot, past + length)
        wide = None if x is None else x.float().contiguous()
        tokens = batch.tokens.contiguous()
        hidden = None if wide is None else torch.empty_like(wide)
        logits = torch.empty(n, self._model.head.rows, dtype=torch.float32) if with_logits else None
        call, lengths, pasts, slabs = self._call(len(batch.lengths))
        lengths[:], pasts[:] = batch.lengths, batch.past
        slabs[:] = [cache.table(slot).data_ptr() for slot in batch.slots]
        threads = torch.get_num_threads()
        if self._library.mr_threads() != threads:
            self._library.mr_set_threads(threads)
        call.rows, call.kv = n, _KEPT_INT8 if cache.kv == "int8" else _KEPT[cache.dtype]
        call.threads = max(1, min(threads, self._weight // LAYER_BYTES))
        call.positions, call.position_strides[:] = positions.data_ptr(), positions.stride()
        call.x, call.tokens = None if wide is None else wide.data_ptr(), tokens.data_ptr()
        call.hidden = None if hidden is None else hidden.data_ptr()
        call.logits = None if logits is None else logits.data_ptr()
        while needed := self._library.mr_step(self._by, ctypes.addressof(call)):
            if needed == _NO_SUCH_TOKEN:
                return None
            self._make_room(needed)
            call.scratch, call.room = self._room
        return None if hidden is None or x is None else hidden.to(x.dtype), logits

    def _call(self, sequences: int) -> tuple[_Call, Any, Any, Any]:
        """A call for so many sequences, with its lengths, pasts and slabs: made once, written to each time."""
        if sequences not in self._calls:
            numbers, pointers = ctypes.c_int32 * sequences, ctypes.c_void_p * sequences
            lengths, pasts, slabs = numbers(), numbers(), pointers()
            call = _Call(sequences, 0, ctypes.addressof(lengths), ctypes.addressof(pasts), ctypes.addressof(slabs))
            self._calls[sequences] = call, lengths, pasts, slabs
        made = self._calls[sequences]
        made[0].scratch, made[0].room = self._room
        return made

    @property
    def _room(self) -> tuple[int, int]:
        """The scratch's first address that is a multiple of 64, and the bytes from there."""
        start = self._scratch.data_ptr()
        first = -(-start // 64) * 64
        return first, max(0, start + len(self._scratch) - first)

    def _make_room(self, size: int) -> None:
        # A third more than is wanted now: attention's share of it grows with the sequences.
        self._scratch = torch.empty(size * 4 // 3 + 64, dtype=torch.uint8)


def _eps(norms: Sequence[Any]) -> float:
    found = {norm.eps for norm in norms if type(norm) is RMSNorm} or {0.0}
    if len(found) > 1:
        raise Unplannable
    return found.pop()


def _bytes(matrix: Matrix) -> int:
    return matrix.rows * matrix.cols * (4, 2, 1, 1)[matrix.format] // (2 if matrix.format == 3 else 1)
