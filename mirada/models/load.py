"""A model directory to a model, and back.

Files are checked against the family's layout before any memory is taken; then each tensor goes from its mapped pages
straight to its place, type and device. Ignored tensors of a release are not kept: what is saved is the layout's set.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mirada import adapt
from mirada.adapt.method import Scheme
from mirada.adapt.mode import Mode
from mirada.adapt.rows import NAME as INT8_ROWS
from mirada.adapt.rows import SCALE
from mirada.errors import CheckpointError, ConfigError, NotAvailable, TensorError
from mirada.layers import fused
from mirada.layers.linear import quantise_rows
from mirada.models import formed, precision, quantised, rounding, shards
from mirada.models.family import Family, family_of
from mirada.models.layout import Layout
from mirada.models.shards import Mapped, Stored

MAX_SHARD_BYTES = 5 << 30
Place = Callable[[str], torch.device]
"""The device of a parameter, by its name."""


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; ConfigError names the file if it is absent or malformed."""
    if not file.is_file():
        raise ConfigError(f"{file} is missing", "give the directory of a whole checkpoint")
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error})", "download it again") from error
    if not isinstance(made, dict):
        raise ConfigError(f"{file} holds a {type(made).__name__}", "it must hold a JSON object")
    return made


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    widen: bool = False,
    place: Place | None = None,
    mode: Mode | None = None,
) -> nn.Module:
    """The model of ``directory`` with its weights in ``dtype`` (None: float32 on a CPU, bfloat16 elsewhere) on ``device``,
    or each parameter where ``place`` says.

    Matrices that the checkpoint packs stay packed and are widened tile by tile as they are used; with ``widen`` they take
    ``dtype`` on load: faster, but as large as if they had never been packed. ``mode`` (on a CPU with float32, or where
    ``fused.packs`` says so): how plain matrices are kept, see ``adapt.mode``; a large model is written so to a cache on disk
    and read from there the next time.
    Raises CheckpointError and its kinds, each naming the file, key or tensor.
    """
    directory, device = Path(directory), torch.device(device)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory", "give the directory that holds config.json and the weights")
    where = directory / "config.json"
    mapping = read_json(where)
    scheme, family = adapt.read(mapping, str(where)), family_of(mapping, str(where))
    config = family.config(mapping)
    layout = family.layout(config)
    stored = layout.released(shards.read_all(shards.find(directory)))
    packed = quantised.check(layout, stored, scheme)  # first: a checkpoint that does not fit must not cost its size
    keep = scheme is not None and not widen and not scheme.widens
    if mode is not None and not keep:
        if mode.rounds and fused.packs(device):
            model = _in_integers(directory, mapping, layout, stored, scheme, mode, dtype, device)
        else:
            model = _in_mode(directory, mapping, layout, stored, scheme, mode)
        model.config_text = where.read_text(encoding="utf-8")  # pyright: ignore[reportArgumentType]
        return model.eval()
    change = (lambda model: quantised.replace(model, packed, mode is not None)) if keep else None
    model = build(mapping, dtype, device, str(where), change, place)
    load_weights(model, layout, stored, scheme)
    if keep:
        quantised.join(model)
    if scheme is None or scheme.widens or keep:
        model.config_text = where.read_text(encoding="utf-8")  # pyright: ignore[reportArgumentType]
    else:  # what is in memory is plain now, and so is what a save writes
        model.config_text = json.dumps(adapt.without(mapping), indent=2) + "\n"  # pyright: ignore[reportArgumentType]
    return model.eval()


def _in_mode(
    directory: Path, mapping: Mapping[str, Any], layout: Layout, stored: Mapping[str, Stored], scheme: Scheme | None, mode: Mode
) -> nn.Module:
    """The model in the forms of ``mode``, from the cache on disk or into it."""
    where = str(directory / "config.json")
    if not mode.rounds:
        return _as_it_lies(where, mapping, layout, stored, scheme, mode)
    size = precision.resident_bytes(layout, mode, stored, torch.float32)
    file = formed.place(shards.find(directory), json.dumps(mapping), mode, size)
    kept = formed.read(file)
    make = precision.made if kept is None else kept.make
    change = lambda model: precision.replace(model, layout, mode, stored, make)  # noqa: E731
    model: Any = build(mapping, torch.float32, "cpu" if kept is None else "meta", where, change)
    if kept is None:
        load_weights(model, layout, stored, scheme)
        _keep_exact(model, layout, stored, scheme)
    else:
        model.mapped_bytes = file.stat().st_size if file is not None else 0
        kept.install(model)
        model.tie_weights()
        model.rounding = kept.rounding
    precision.finish(model, fill=kept is None)
    rounding.say(model, directory.name)
    if kept is None and file is not None:
        formed.write(file, model)
    return model


def _in_integers(
    directory: Path,
    mapping: Mapping[str, Any],
    layout: Layout,
    stored: Mapping[str, Stored],
    scheme: Scheme | None,
    mode: Mode,
    dtype: torch.dtype | None,
    device: torch.device,
) -> nn.Module:
    """The model with canonical integers on ``device`` for what ``mode`` rounds and ``dtype`` for the rest, from the cache on
    disk or into it."""
    where, dtype = str(directory / "config.json"), dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    size = precision.resident_bytes(layout, mode, stored, dtype, packed=True)
    file = formed.place(shards.find(directory), json.dumps(mapping), mode, size, f"integers beside {dtype}")
    kept = formed.read(file)
    home = torch.device("meta") if kept is not None else device
    change = lambda model: precision.replace(model, layout, mode, stored, packed=home)  # noqa: E731
    model: Any = build(mapping, dtype, home, where, change)
    if kept is None:
        load_weights(model, layout, stored, scheme)
        _keep_exact(model, layout, stored, scheme, (dtype, device))
    else:
        kept.fill(model, device)
        model.tie_weights()
        model.rounding = kept.rounding
    if kept is None:
        precision.finish_head(model)
        if file is not None:
            formed.write(file, model)
    precision.hand_over(model)
    rounding.say(model, directory.name)
    return model


def _keep_exact(
    model: Any,
    layout: Layout,
    stored: Mapping[str, Stored],
    scheme: Scheme | None,
    plain: tuple[torch.dtype, torch.device] | None = None,
) -> None:
    """Reads once more, as they are stored (or ``plain``), the matrices that rounding changed too much."""
    precision.measured(model)
    again = rounding.spoilt(layout, rounding.of(model))
    for rule in again:
        rounding.restore(model, rule, stored, plain)
    if again:
        load_weights(
            model, layout, stored, scheme, there=layout.stored().keys() - {n for rule in again for n, _ in rule.tensors}
        )


def _as_it_lies(
    where: str, mapping: Mapping[str, Any], layout: Layout, stored: Mapping[str, Stored], scheme: Scheme | None, mode: Mode
) -> nn.Module:
    """The model with its matrices as they are stored. Nothing is computed, so nothing is kept in the cache: what needs no
    joining is mapped from the checkpoint's own files, and the rest (queries with keys and values, gates with ups) is copied."""
    filed = precision.Filed(layout, stored)
    change = lambda model: precision.replace(model, layout, mode, stored, filed.make)  # noqa: E731
    model: Any = build(mapping, torch.float32, "cpu", where, change)
    filed.install(model)
    model.tie_weights()
    model.mapped_bytes = filed.nbytes
    load_weights(model, layout, stored, scheme, there=filed.names)
    precision.finish(model)
    return model


def build(
    mapping: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    where: str = "config.json",
    change: Callable[[nn.Module], None] | None = None,
    place: Place | None = None,
) -> nn.Module:
    """The modules that a config describes, on ``device``, their weights not yet set. On ``meta`` nothing is allocated.

    ``change`` may put other modules in their places before memory is taken; ``place`` may give parameters devices of their own.
    """
    family: Family = family_of(mapping, where)
    config = family.config(mapping)
    with torch.device("meta"), _Blank():
        model = family.build(config)
    family.layout(config).check_parameters({name: tuple(p.shape) for name, p in model.named_parameters()})
    device = torch.device(device)
    model.to(dtype or (torch.float32 if device.type in ("cpu", "meta") else torch.bfloat16))
    if change is not None:
        change(model)
    if device.type != "meta":
        _allocate(model, place or (lambda _: device))
        model.tie_weights()  # pyright: ignore[reportCallIssue]
    model.config_text = json.dumps(mapping, indent=2) + "\n"  # pyright: ignore[reportArgumentType]
    return model


def _allocate(model: nn.Module, place: Place) -> None:
    """``Module.to_empty`` of a model on meta, without the symbolic shapes (half a second, 30 MB) that torch imports for it."""
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, held in tensors.items():
                if held is not None:
                    made = torch.empty(held.shape, dtype=held.dtype, device=place(f"{path}.{name}"))
                    kept = nn.Parameter(made, held.requires_grad) if isinstance(held, nn.Parameter) else made
                    tensors[name] = kept  # pyright: ignore[reportArgumentType]


class _Blank(TorchFunctionMode):
    """Draws no first weights: on meta there is nothing to fill, and ``normal_`` there imports torch._dynamo (over a second)."""

    _DRAWS = frozenset(
        {torch.Tensor.normal_, torch.Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def load_weights(
    model: nn.Module,
    layout: Layout,
    stored: Mapping[str, Stored],
    scheme: Scheme | None = None,
    there: Collection[str] = (),
) -> None:
    """Fills every parameter from ``stored``, but for those that are ``there`` already. Raises TensorError before anything is
    written if the names do not fit."""
    stored = layout.released(stored)
    packed, mapped = quantised.check(layout, stored, scheme), Mapped()
    wanted = layout.stored()
    first = {name: stored[next(iter(packed[name].fields)) if name in packed else name] for name in wanted}
    # In the order of the files, so that each is read once from front to back.
    for name in sorted(wanted.keys() - there, key=lambda name: (str(first[name].file), first[name].start)):
        if name in packed and scheme is not None:
            quantised.load(model, packed[name], scheme, stored, mapped)
        else:
            rule, index, _ = wanted[name]
            place = quantised.target(model, rule, index)
            assert isinstance(place, Tensor | precision.Rows), f"{name} is plain, but was to be packed"
            _fill(place, stored[name], mapped)


def _fill(place: Tensor | precision.Rows, stored: Stored, mapped: Mapped) -> None:
    row = math.prod(stored.shape[1:])
    if isinstance(place, precision.Rows):
        try:
            for begin, piece in mapped.chunks(stored, row * stored.torch_dtype.itemsize):
                place.fill(begin // row, piece.view(-1, row))
        except TensorError as error:
            raise TensorError(f"tensor {stored.name!r}: {error.problem}", error.fix) from error
        return
    flat = place.view(-1)
    for begin, piece in mapped.chunks(stored, row * stored.torch_dtype.itemsize):
        flat[begin : begin + len(piece)].copy_(piece)


@torch.no_grad()
def save_model(
    model: nn.Module, directory: str | Path, *, int8_rows: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Writes config.json as it was read, and the weights under their released names; returns the weight files.

    Equal weights give equal bytes. ``int8_rows`` stores matrices as int8 rows with float16 scales and says so in
    config.json; a model that was read so is written so. Raises NotAvailable if matrices are packed in another form.
    """
    if quantised.is_packed(model):
        raise NotAvailable("this model holds packed matrices, which cannot be written", "load it with widen=True, then save")
    directory = Path(directory)
    mapping = json.loads(str(model.config_text))
    text = str(model.config_text)
    method = {"quant_method": INT8_ROWS}
    if int8_rows and mapping.get("quantization_config") != method:
        text = json.dumps(mapping | {"quantization_config": method}, indent=2) + "\n"
    layout: Layout = family_of(mapping).layout(model.config)
    tensors = dict(layout.read(dict(model.named_parameters())))
    if int8_rows or mapping.get("quantization_config") == method:
        tensors = _quantised(tensors)
    files = shards.write_all(directory, tensors, max_shard_bytes)
    (directory / "config.json").write_text(text, encoding="utf-8")
    return files


def _quantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            made[name] = tensor
        else:
            made[name], made[name + SCALE] = quantise_rows(tensor)
    return made
