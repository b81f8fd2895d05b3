"""The plan of a compiled step: addresses of one decoder's weights, and scratch.

n new tokens; D width; V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirada.layers.batch import Batch
from mirada.layers.cache import SlabCache
from mirada.layers.experts import Expert
from mirada.layers.kernels.library import Matrix, library
from mirada.layers.kernels.matrix import Format
from mirada.layers.latent_cache import LatentCache
from mirada.layers.linear import Linear, MatrixLinear
from mirada.layers.mla import MLA
from mirada.layers.mlp import GatedMLP
from mirada.layers.moe import Experts, MoE, Router
from mirada.layers.norm import RMSNorm
from mirada.layers.step_parts import Block, Heads, Parts, Unplannable
from mirada.layers.step_structs import Call, Decoder, Latent, Layer, Routed, Wide

FEW_ROWS = 16
"""New tokens up to which a step is bound by reading the weights. More are left to the modules where layers are large or what
lies before them is long, and always over latents and with experts: torch's products and attention are as good there."""
SMALL_LAYER = 4 << 20
"""Weights of a layer in which torch's calls and what it keeps between them cost more than its products save."""
PARTS_BYTES = 32 << 20
"""Of attention's parts, with more than few new tokens."""
SPAN = 256
"""Keys of one part of attention (step_own.h)."""
LAYER_BYTES = 256 << 10
"""Bytes of a layer's weights that are worth one thread more."""
LARGE_PAGES = 4 << 20, 256 << 20
"""Bytes of all float weights from which and up to which they are put into large pages: with small ones a processor that reads
that much each step looks up more addresses than it can remember. Of more it costs seconds."""
KEPT = {torch.float32: 0, torch.bfloat16: 1}
"""``enum mr_kv`` of step.h, without int8."""
_KEPT_INT8 = 2
_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_FLOATS = tuple(_FORMATS.values())
_PAGE = 2 << 20
_NO_SUCH_TOKEN = ctypes.c_size_t(-1).value


class Plan:
    """For one thread at a time. Unplannable for parts that the compiled code does not take."""

    def __init__(self, parts: Parts, head: nn.Module | None, watch: Any) -> None:
        """``watch``: see ``step.Step``; it is only asked whether nothing is in the way."""
        if not watch.plain() or not parts.blocks:
            raise Unplannable
        self.watch, self.head = watch, head
        self._kept: list[Any] = []
        self._read: list[Matrix] = []
        """What a step reads, or may read."""
        self._wide: list[Wide] = []
        self._library: Any = library()
        self.shape = shape = parts.shape
        self._layers = (Layer * len(parts.blocks))(*map(self._layer, parts.blocks))
        norms = [norm for block in parts.blocks for norm in (block.norm1, block.norm2)] + [parts.norm]
        pairs = [norm for block in parts.blocks for norm in _inner_norms(block)]
        self._model = model = Decoder(
            layers=len(parts.blocks), heads=shape.heads, kv_heads=shape.kv_heads, head_width=shape.head_width,
            eps=_eps(norms), head_eps=_eps(pairs), scale=shape.scale, turn_scale=shape.turn_scale, layer=self._layers,
            norm=self._vector(parts.norm), frequency=self._keep(shape.frequencies.float().contiguous()),
            axis=self._keep(torch.tensor(shape.axes, dtype=torch.int32)),
        )  # fmt: skip
        model.width = self._layers[0].out.rows
        model.inner = max(layer.down.cols for layer in self._layers)
        if shape.latent is not None:
            s = shape.latent
            model.rank, model.low_rank, model.nope, model.value = s.kv_rank, s.q_rank or 0, s.nope, s.value
        if head is not None:
            model.head = self._matrix(head)
        if parts.embed is not None:
            model.table = self._table(parts.embed, parts.norm)
        model.wides, model.wide = len(self._wide), (Wide * len(self._wide))(*self._wide)
        self._check(norms, pairs)
        self._few = shape.latent is not None or any(layer.routed for layer in self._layers)
        self._weight = sum(map(_active_bytes, self._layers)) // len(self._layers)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._calls: dict[int, tuple[Call, Any, Any, Any]] = {}
        self._by = ctypes.addressof(model)
        self._large_pages()
        first = self._layers[0]
        self._large = SMALL_LAYER < sum(w.rows * w.cols for w in (first.qkv, first.out, first.gate_up, first.down))

    def _large_pages(self) -> None:
        ranges = sorted({(m.values, m.values + _bytes(m)) for m in self._read if m.format in _FLOATS})
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

    def _layer(self, block: Block) -> Layer:
        made = Layer(out=self._matrix(block.attention.out), norm1=self._vector(block.norm1), norm2=self._vector(block.norm2))
        if isinstance(block.attention, Heads):
            made.qkv = self._matrix(block.attention.qkv)
            for name, norm in zip(("q_norm", "k_norm"), block.attention.norms or (), strict=False):
                setattr(made, name, self._vector(norm))
        else:
            made.latent = ctypes.pointer(self._latent(block.attention))
        if isinstance(block.mlp, GatedMLP):
            made.gate_up, made.down = self._matrix(block.mlp.gate_up), self._matrix(block.mlp.down)
        else:
            made.routed = ctypes.pointer(self._routed(block.mlp))
        return made

    def _latent(self, of: MLA) -> Latent:
        low = of.sizes.q_rank is not None
        made = Latent(latent=self._matrix(of.kv_a), heads=self._matrix(of.kv_b), norm=self._vector(of.kv_norm))
        made.q = self._matrix(of.q_b if low else of.q)
        if low:
            made.low, made.q_norm = self._matrix(of.q_a), self._vector(of.q_norm)
        self._check_latent(of, made)
        self._kept.append(made)
        return made

    def _check_latent(self, of: MLA, made: Latent) -> None:
        s, shape = of.sizes, self.shape
        low = s.q_rank or 0
        right = s == shape.latent and of.scale == shape.scale and made.heads.format in _FLOATS
        right = right and (made.low.rows, made.low.cols) == ((low, s.dim) if low else (0, 0))
        right = right and (made.q.rows, made.q.cols) == (s.heads * s.key, low or s.dim)
        right = right and (made.latent.rows, made.latent.cols) == (s.kv_rank + s.rope, s.dim)
        right = right and (made.heads.rows, made.heads.cols) == (s.heads * (s.nope + s.value), s.kv_rank)
        right = right and not any(matrix.bias for matrix in (made.low, made.q, made.latent, made.heads))
        right = right and of.kv_norm.weight.numel() == s.kv_rank and (not low or of.q_norm.weight.numel() == low)
        if not right or s.kv_rank % 4:
            raise Unplannable

    def _routed(self, of: MoE) -> Routed:
        router, experts = of.router, of.experts
        if type(router) is not Router or type(experts) is not Experts or (of.shared and type(of.shared) is not GatedMLP):
            raise Unplannable
        found = experts.table.addresses(experts.gate_up, experts.down, of.shared)
        if found is None or router.weight.dtype != torch.float32 or not router.weight.is_contiguous():
            raise Unplannable
        array, shared = found
        self._kept += [array, shared, experts.gate_up, experts.down]
        r, width = router.routing, array[0].down.rows
        made = Routed(
            experts=array, shared=None if shared is None else ctypes.pointer(shared), bias=self._floats(router.bias),
            router=Matrix(rows=r.experts, cols=width, values=router.weight.data_ptr()), count=r.experts, top=r.top_k,
            groups=r.groups, kept=r.kept, normalise=r.normalise, scale=r.scale,
        )  # fmt: skip
        made.pair_bytes = self._library.mr_block_pair_bytes(array, len(array), made.shared)
        if router.weight.shape != (len(array), width) or r.experts != len(array) or router.bias.numel() != len(array):
            raise Unplannable
        size = r.experts // r.groups  # as ``models.deepseek`` checks of a config
        if size * r.groups != r.experts or not 0 < r.top_k <= r.kept * size or not 0 < r.kept <= r.groups:
            raise Unplannable
        if r.kept < r.groups and size < 2:
            raise Unplannable
        self._read += [getattr(one, name) for one in (*array, shared) if one for name in ("gate", "up", "down")]
        self._kept.append(made)
        return made

    def _matrix(self, module: nn.Module) -> Matrix:
        made = self._address(module)
        self._read.append(made)
        return made

    def _address(self, module: nn.Module) -> Matrix:
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
        self._wide.append(Wide(tensor.data_ptr(), place, tensor.numel()))
        return place

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _check(self, norms: Sequence[Any], pairs: Sequence[Any]) -> None:
        """Every size that the compiled code takes for granted. Unplannable if one is another."""
        s, m = self.shape, self._model
        right = all(map(self._right, self._layers))
        right = right and all(norm.weight.numel() == m.width for norm in norms)
        right = right and (s.latent is not None or all(norm.weight.numel() == s.head_width for norm in pairs))
        right = right and s.head_width % 4 == 0 and s.heads % s.kv_heads == 0
        right = right and len(s.frequencies) == len(s.axes) == s.head_width // 2
        if not right or (self.head is not None and m.head.cols != m.width) or (m.table.rows and m.table.cols != m.width):
            raise Unplannable

    def _right(self, layer: Layer) -> bool:
        s, m = self.shape, self._model
        value = s.head_width if s.latent is None else s.latent.value
        sizes = {"out": (m.width, s.heads * value)}
        if not layer.latent:
            sizes["qkv"] = (s.heads + 2 * s.kv_heads) * s.head_width, m.width
        if not layer.routed:
            sizes |= {"gate_up": (2 * m.inner, m.width), "down": (m.width, m.inner)}
        right = all((of.rows, of.cols) == size for name, size in sizes.items() for of in (getattr(layer, name),))
        right = right and bool(layer.latent) == (s.latent is not None)
        right = right and (
            s.latent is None or (s.latent.dim, s.latent.heads, s.latent.rope) == (m.width, s.heads, s.head_width)
        )
        return right and not (layer.routed and layer.routed.contents.router.cols != m.width)

    def fits(self, x: Tensor | None, batch: Batch, cache: Any) -> bool:
        """Whether the compiled code reads ``cache`` and, without x, knows the embeddings; and is the better choice."""
        if x is None and not self._model.table.rows:
            return False
        large = self._few or self._large
        if len(batch.tokens) > FEW_ROWS and (large or self._parts_bytes(batch) > PARTS_BYTES):
            return False
        return (
            self._holds(cache)
            and cache.num_layers == len(self._layers)
            and (cache.kv == "int8" or cache.dtype in KEPT)
            and cache.device.type == "cpu"
        )

    def _holds(self, cache: SlabCache | LatentCache) -> bool:
        s = self.shape
        if isinstance(cache, LatentCache):
            return (cache.latent_dim, cache.rope_dim) == (self._model.rank, s.head_width)
        return not self._model.rank and (cache.num_kv_heads, cache.head_dim) == (s.kv_heads, s.head_width)

    def _parts_bytes(self, batch: Batch) -> int:
        s, pairs = self.shape, zip(batch.past, batch.lengths, strict=True)
        return 4 * s.heads * (s.head_width + 2) * sum(length * -(-(past + length) // SPAN) for past, length in pairs)

    def run(
        self, x: Tensor | None, batch: Batch, cache: SlabCache | LatentCache, with_logits: bool
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
        call.rows, call.kv = n, _KEPT_INT8 if cache.kv == "int8" else KEPT[cache.dtype]
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

    def _call(self, sequences: int) -> tuple[Call, Any, Any, Any]:
        """A call for so many sequences, with its lengths, pasts and slabs: made once, written to each time."""
        if sequences not in self._calls:
            numbers, pointers = ctypes.c_int32 * sequences, ctypes.c_void_p * sequences
            lengths, pasts, slabs = numbers(), numbers(), pointers()
            call = Call(sequences, 0, ctypes.addressof(lengths), ctypes.addressof(pasts), ctypes.addressof(slabs))
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


def _inner_norms(block: Block) -> tuple[nn.Module, ...]:
    of = block.attention
    if isinstance(of, Heads):
        return of.norms or ()
    return (of.kv_norm,) if of.sizes.q_rank is None else (of.kv_norm, of.q_norm)


def _eps(norms: Sequence[Any]) -> float:
    found = {norm.eps for norm in norms if type(norm) is RMSNorm} or {0.0}
    if len(found) > 1:
        raise Unplannable
    return found.pop()


def _bytes(matrix: Matrix) -> int:
    size = {Format.F32: 8, Format.BF16: 4, Format.INT4: 1}.get(Format(matrix.format), 2)
    return matrix.rows * matrix.cols * size // 2


def _active_bytes(layer: Layer) -> int:
    """What one token reads of a layer."""
    read = [layer.qkv, layer.out, layer.gate_up, layer.down]
    if layer.latent:
        read += [getattr(layer.latent.contents, name) for name in ("low", "q", "latent", "heads")]
    made = sum(map(_bytes, read))
    if layer.routed:
        routed = layer.routed.contents
        made += routed.top * _expert_bytes(routed.experts[0]) + _bytes(routed.router)
        made += _expert_bytes(routed.shared.contents) if routed.shared else 0
    return made


def _expert_bytes(expert: Expert) -> int:
    return _bytes(expert.gate) + _bytes(expert.up) + _bytes(expert.down)
