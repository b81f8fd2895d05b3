"""Where a layout and a quantisation scheme meet: which stored matrices are packed, and what takes them.

A matrix is packed if the scheme covers it and the checkpoint holds its packed tensors; configs name what they leave plain
only loosely, the files say it exactly. Two ways to hold it: packed (``replace``: modules that widen as they compute), or
widened while it is loaded, into the parameter that the layout names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mirada.adapt.fbgemm import Int8Linear
from mirada.adapt.method import Field, Scheme, module_of
from mirada.adapt.packed import Packed, PackedLinear, PackedRows, PackedStack
from mirada.errors import TensorError
from mirada.layers import fused
from mirada.layers.linear import MatrixLinear, MatrixStack
from mirada.models import precision
from mirada.models.layout import Layout, Rule
from mirada.models.shards import Mapped, Stored

_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point")
_PLAIN_FIX = "take the config.json that belongs to these weights: its quantization_config says what is packed, and how"


@dataclass(frozen=True)
class Source:
    """One stored matrix that is packed: its plain name and shape, where it belongs, and the tensors that hold it."""

    name: str
    shape: tuple[int, ...]
    rule: Rule
    index: int
    fields: Mapping[str, Field]
    zero_bias: str | None = None
    """A bias that the model has no place for; it must hold zeros."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Everything stored that it uses (if it is there)."""
        return (*self.fields, *((self.zero_bias,) if self.zero_bias else ()))


def sources(layout: Layout, scheme: Scheme | None, stored: Mapping[str, Stored]) -> dict[str, Source]:
    """Plain name -> source, of every matrix that the checkpoint holds packed.

    TensorError names a tensor of theirs that is missing, misshapen or of a wrong type.
    """
    made: dict[str, Source] = {}
    wanted = layout.stored()
    for name, (rule, index, shape) in wanted.items() if scheme else ():
        assert scheme is not None
        if not scheme.covers(name, shape):
            continue
        fields = scheme.fields(name, shape)
        if not any(_is_packed(name, other, field, stored) for other, field in fields.items()):
            continue
        for other, field in fields.items():
            _check_field(name, other, field, stored.get(other))
        if name in stored and name not in fields:
            raise TensorError(f"tensor {name!r} is stored plain and packed", "remove the one that does not belong")
        bias = f"{module_of(name)}.bias"
        extra = bias if bias in stored and bias not in wanted else None
        made[name] = Source(name, shape, rule, index, fields, extra)
    return made


def _is_packed(name: str, other: str, field: Field, stored: Mapping[str, Stored]) -> bool:
    """Whether ``other`` shows that the matrix is packed: by being there, or, under the plain name, by its type."""
    return other in stored and (other != name or stored[other].dtype in field.dtypes)


def _check_field(name: str, other: str, field: Field, found: Stored | None) -> None:
    expected = " or ".join(str(list(shape)) for shape in field.shapes)
    if found is None:
        if not field.optional:
            raise TensorError(
                f"the checkpoint lacks tensor {other!r} of shape {expected}, which belongs to the packed {name!r}",
                "the files are incomplete or belong to another config.json",
            )
        return
    if found.shape not in field.shapes:
        raise TensorError(f"tensor {other!r} has shape {list(found.shape)}, expected {expected}", _PLAIN_FIX)
    if found.dtype not in field.dtypes:
        raise TensorError(f"tensor {other!r} is stored as {found.dtype}, expected {' or '.join(field.dtypes)}", _PLAIN_FIX)


def check(layout: Layout, stored: Mapping[str, Stored], scheme: Scheme | None) -> dict[str, Source]:
    """Raises TensorError unless every stored tensor is used exactly once; returns what ``sources`` finds."""
    packed = sources(layout, scheme, stored)
    used = {other for source in packed.values() for other in source.tensors} - set(packed)
    wanted = layout.stored()
    _check_plain({name: s for name, s in stored.items() if name in wanted and name not in packed})
    _check_uncovered(layout, stored, used | set(wanted))
    shapes = {name: s.shape for name, s in stored.items() if name not in used}
    # A packed matrix stands for its plain name, whether or not a tensor of that name is among those that hold it.
    layout.check_stored(shapes | {name: source.shape for name, source in packed.items()})
    return packed


def _check_plain(stored: Mapping[str, Stored]) -> None:
    for name, found in stored.items():
        if not found.torch_dtype.is_floating_point or found.dtype.startswith("F8"):
            kind = "int8" if found.dtype == "I8" else found.dtype
            raise TensorError(f"tensor {name!r} is stored as {kind}, but nothing says that it is packed", _PLAIN_FIX)


def _check_uncovered(layout: Layout, stored: Mapping[str, Stored], known: Collection[str]) -> None:
    """Packed tensors of a matrix that the scheme does not cover are said to be that, rather than to be in the way."""
    wanted = layout.stored()
    for name in stored:
        module, _, suffix = name.rpartition(".")
        if name not in known and suffix in _SUFFIXES and f"{module}.weight" in wanted and not layout.ignores(name):
            raise TensorError(f"tensor {name!r} packs a matrix that quantization_config leaves plain", _PLAIN_FIX)


def replace(model: nn.Module, packed: Mapping[str, Source], compiled: bool = False) -> None:
    """Puts modules that hold packed integers where ``packed`` goes, before the plain ones take memory.

    ``compiled``: matrices whose form allows it are multiplied by the compiled kernels, which round activations to 8 bits.

    A Linear becomes a PackedLinear and a parameter [E, R, C] of stacked matrices a PackedStack. What another module reads as
    a matrix of its own (``stays_float`` on the Linear, or any other parameter) stays, and is widened on load.
    """
    for rule in {source.rule.parameter: source.rule for source in packed.values()}.values():
        owner, _, attribute = rule.parameter.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, nn.Linear) and attribute == "weight" and not getattr(module, "stays_float", False):
            parts = _parts(rule, packed, module.weight, compiled)
            parent, _, child = owner.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(parts, module.bias, module.in_features))
        elif rule.how == "stack" and _stacks_rows(rule, held := getattr(module, attribute)):
            parts = _parts(rule, packed, held, compiled)
            delattr(module, attribute)
            setattr(module, attribute, PackedStack(parts, held.shape, held.dtype))


def _stacks_rows(rule: Rule, held: Tensor) -> bool:
    return held.ndim == 3 and all(len(shape) == 2 and shape[1] == held.shape[2] for _, shape in rule.tensors)


def _parts(rule: Rule, packed: Mapping[str, Source], like: Tensor, compiled: bool = False) -> list[nn.Module]:
    made: list[nn.Module] = []
    for name, (rows, columns) in rule.tensors:  # pyright: ignore[reportAssignmentType]
        if name in packed:
            made.append(PackedRows(rows, columns, compiled))
        else:
            made.append(nn.Linear(columns, rows, bias=False, dtype=like.dtype, device=like.device))
    return made


def target(model: nn.Module, rule: Rule, index: int) -> Tensor | PackedRows | precision.Rows:
    """What takes stored tensor ``index`` of ``rule``: a view of its stored shape, the module that holds it packed, or what
    rounds its rows."""
    rounding = precision.target(model, rule, index)
    if rounding is not None:
        return rounding
    owner, _, attribute = rule.parameter.rpartition(".")
    module = model.get_submodule(owner)
    holder = module if isinstance(module, PackedLinear) and attribute == "weight" else getattr(module, attribute)
    if not isinstance(holder, PackedLinear | PackedStack):
        return rule.place(holder, index)
    part = holder.parts[index]
    return part if isinstance(part, PackedRows) else part.weight.view(rule.tensors[index][1])  # pyright: ignore


@torch.no_grad()
def load(model: nn.Module, source: Source, scheme: Scheme, stored: Mapping[str, Stored], mapped: Mapped) -> None:
    """Unpacks one matrix to where it belongs. TensorError if its values make no sense, or a bias with no place is not zero."""
    found = {other: mapped.whole(stored[other]) for other in source.fields if other in stored}
    packed = scheme.unpack(source.name, source.shape, found)
    del found
    if source.zero_bias is not None and mapped.whole(stored[source.zero_bias]).any():
        raise TensorError(
            f"tensor {source.zero_bias!r} is not zero, and the model has no such bias", "take the config.json of these weights"
        )
    place = target(model, source.rule, source.index)
    if isinstance(place, PackedRows):
        place.fill(packed, device_of(model, source.rule.parameter))
    else:
        _widen(packed, place)


def join(model: nn.Module) -> None:
    """Stacked matrices one below another, where kernels for many experts read them so."""
    for module in model.modules():
        held = next(module.buffers(), None) if isinstance(module, PackedStack) else None
        if held is not None and fused.packs(held.device):
            module.join()  # pyright: ignore[reportCallIssue]


def device_of(model: nn.Module, parameter: str) -> torch.device:
    """Where the plain parameters nearest to ``parameter`` lie: the norms of its layer, as layers may be on several devices."""
    path = parameter.split(".")[:-1]
    while True:
        near = next(model.get_submodule(".".join(path)).parameters(), None)
        if near is not None:
            return near.device
        path.pop()


def _widen(packed: Packed, place: Tensor | precision.Rows) -> None:
    if isinstance(place, precision.Rows):
        for begin, end in packed.tiles():
            place.fill(begin, packed.widen(begin, end))
        return
    rows = place.view(packed.rows, packed.columns)
    for begin, end in packed.tiles():
        rows[begin:end].copy_(packed.widen(begin, end))


def is_packed(model: nn.Module) -> bool:
    """Whether some matrices of ``model`` are held packed."""
    held = (PackedRows, MatrixLinear, MatrixStack, Int8Linear)
    return any(isinstance(module, held) for module in model.modules())


def resident_bytes(
    layout: Layout, stored: Mapping[str, Stored], scheme: Scheme | None, dtype: torch.dtype, widen: bool = False
) -> int:
    """Bytes of the weights once loaded: plain ones in ``dtype``, packed ones as stored (with ``widen``: in ``dtype`` too).

    The few matrices that another module reads, and that are widened all the same, are counted as stored.
    """
    packed, wanted = sources(layout, scheme, stored), layout.stored()
    plain = sum(math.prod(s.shape) for name, s in stored.items() if name in wanted and name not in packed) * dtype.itemsize
    return plain + sum(_held(source, stored, dtype, widen) for source in packed.values())


def _held(source: Source, stored: Mapping[str, Stored], dtype: torch.dtype, widen: bool) -> int:
    if widen:
        return math.prod(source.shape) * dtype.itemsize
    return sum(_bytes(stored[other]) for other in source.fields if other in stored)


def _bytes(stored: Stored) -> int:
    return math.prod(stored.shape) * stored.torch_dtype.itemsize
