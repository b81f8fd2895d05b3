"""Models in a precision mode, kept on disk in the form that computes: rounded once, mapped ever after.

A file holds every tensor of the model as it lies in memory, at multiples of 64 bytes, behind a header with a checksum for each.
Its name is a hash of all that decides its content: the files of the checkpoint (path, size, time, header), config.json, the
mode, and the version of the kernels. A file that is not whole and unchanged is removed and made anew. The least recently used
go first when all together take more than ``MIRADA_CACHE_GB``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirada import config
from mirada.adapt.mode import Mode
from mirada.errors import SettingsError
from mirada.layers.kernels import library
from mirada.layers.kernels.matrix import Format, Matrix
from mirada.layers.linear import MatrixLinear, MatrixStack
from mirada.models import rounding
from mirada.models.rounding import Rounding

FROM_BYTES = 128 << 20
"""A model that takes less is rounded in a moment: it is not kept."""
_MAGIC = b"MIRADAF2"
_ALIGN = 64
_DTYPES = {"U8": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ROUNDING = "__rounding__"
"""Key of the header beside the names of tensors: stored name -> [bits, error], see ``rounding``."""
_log = logging.getLogger(__name__)


def folder() -> Path:
    """Where models are kept: ``MIRADA_CACHE``, or ``mirada`` in the user's cache directory."""
    given = config.env("MIRADA_CACHE")
    return (Path(given) if given else Path(config.env("XDG_CACHE_HOME") or Path.home() / ".cache") / "mirada") / "formed"


def bound() -> int:
    """Bytes that all kept models may take: ``MIRADA_CACHE_GB``, by default 50; 0 keeps none. SettingsError if no number."""
    given = config.env("MIRADA_CACHE_GB", "50") or "0"
    try:
        size = float(given)
    except ValueError:
        size = -1.0
    if not (math.isfinite(size) and size >= 0):
        raise SettingsError(f"MIRADA_CACHE_GB={given!r} is no size", "give gigabytes, or 0 to keep nothing")
    return int(size * 1e9)


def place(files: Sequence[Path], config_text: str, mode: Mode, size: int, form: str = "") -> Path | None:
    """The file that belongs to a checkpoint in ``mode``, there or not; None if a model of ``size`` bytes is not kept. ``form``
    tells apart what is kept of the same mode in different ways."""
    if size < FROM_BYTES or size > bound() or library.library() is None:
        return None
    made = hashlib.sha256(f"{_MAGIC!r} {library.VERSION} {mode} {form} {config_text}".encode())
    for file in sorted(files):
        facts = file.stat()
        made.update(f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode())
        with file.open("rb") as handle:
            prefix = handle.read(8)
            made.update(prefix + handle.read(struct.unpack("<Q", prefix)[0]))
    return folder() / f"{made.hexdigest()[:40]}.mirada"


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ``model``, once: parameters under their names, matrices as ``name.values`` and ``name.scales``."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()
    for path, holder in _rounded(model):
        yield f"{path}.values", holder.packed.values
        yield f"{path}.scales", holder.packed.scales
    seen = {parameter.data_ptr() for parameter in model.parameters()}
    for path, module in model.named_modules():
        found = [(path, module.matrix)] if isinstance(module, MatrixLinear) else []
        if isinstance(module, MatrixStack):
            found = [(f"{path}.{e}", matrix) for e, matrix in enumerate(module.matrices)]
        for name, matrix in found:
            if matrix.values.data_ptr() in seen:  # a head that is the table of embeddings
                continue
            yield f"{name}.values", matrix.values
            if matrix.scales is not None:
                yield f"{name}.scales", matrix.scales


def write(file: Path, model: nn.Module) -> None:
    """Keeps ``model``: whole, or not at all. A disk that does not take it is logged, as the model is there all the same."""
    held = dict(tensors(model))
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in held.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "at": at, "sum": _checksum(tensor),
        }  # fmt: skip
        at = -(-(at + size) // _ALIGN) * _ALIGN
    header[_ROUNDING] = {name: [one.bits, one.error] for name, one in rounding.of(model).items()}
    text = json.dumps(header).encode()
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _make_room(file.parent, at)
        with part.open("wb") as handle:
            handle.write(_MAGIC + struct.pack("<Q", len(text)) + hashlib.sha256(text).digest() + text)
            start = _start(len(text))
            for name, tensor in held.items():
                handle.seek(start + header[name]["at"])
                handle.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
            handle.truncate(start + at)
        part.replace(file)
    except OSError as error:
        _log.warning("the model in its form could not be kept in %s: %s", file.parent, error)
        with suppress(OSError):
            part.unlink(missing_ok=True)


def read(file: Path | None) -> Kept | None:
    """What ``write`` kept, or None if it is not there. What is not whole is removed."""
    if file is None or not file.is_file():
        return None
    try:
        made = Kept(file)
        os.utime(file)
        return made
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is broken and made anew: %s", file, error)
        with suppress(OSError):
            file.unlink()
        return None


class Kept:
    """A mapped file. ValueError and its like if it is not what was written."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as handle:
            head = handle.read(48)
            if head[:8] != _MAGIC or len(head) < 48:
                raise ValueError("it does not begin as it should")
            length = struct.unpack("<Q", head[8:16])[0]
            text = handle.read(min(length, file.stat().st_size))
            if hashlib.sha256(text).digest() != head[16:]:
                raise ValueError("its header was changed")
            # A private writable map: torch wants a writable buffer, and nothing is ever written to it.
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        start, header = _start(length), json.loads(text)
        self.rounding = {name: Rounding(*one) for name, one in header.pop(_ROUNDING).items()}
        self._tensors = {name: self._tensor(name, entry, start) for name, entry in header.items()}

    def _tensor(self, name: str, entry: Mapping[str, Any], start: int) -> Tensor:
        count, begin = math.prod(entry["shape"]), start + entry["at"]
        dtype = _DTYPES[entry["dtype"]]
        if begin + count * dtype.itemsize > len(self._map):
            raise ValueError("it is cut short")
        made = torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(entry["shape"])
        if _checksum(made) != entry["sum"]:
            raise ValueError(f"{name} was changed")
        return made

    def make(self, name: str, format: Format, rows: int, columns: int, group: int) -> Matrix:
        """See ``precision.Make``; floats where the matrix was kept exact (a tied head then is the table of embeddings)."""
        values = self._tensors.get(f"{name}.values", self._tensors["decoder.embed.weight"])
        if values.dtype != torch.uint8:
            return Matrix.of(values)
        return Matrix(format, rows, columns, group, values, self._tensors.get(f"{name}.scales"))

    def install(self, model: nn.Module) -> None:
        """Puts the parameters into ``model``, which was built on meta with ``make``."""
        for path, module in model.named_modules():
            for name, held in module._parameters.items():
                if held is not None:
                    kept = self._tensors.get(f"{path}.{name}")
                    if kept is not None:  # else: tied to another
                        module._parameters[name] = nn.Parameter(kept, held.requires_grad)

    def fill(self, model: Any, device: torch.device) -> None:
        """The same for a model whose rounded matrices are canonical integers (``precision.replace`` with ``packed``): all goes
        to ``device``, and what was kept exact becomes plain again."""
        for path, holder in list(_rounded(model)):
            values = self._tensors.get(f"{path}.values")
            if values is not None:
                scales = self._tensors[f"{path}.scales"]
                holder.packed = replace(holder.packed, values=values.to(device), scales=scales.to(device))
            else:
                linear = hasattr(model.get_submodule(path), "in_features")  # else a stack
                owner, attribute = (path, "weight") if linear else path.rpartition(".")[::2]
                rounding.put_plain(model, owner, attribute, torch.float32, torch.device("meta"))
        self.install(model)
        for name, parameter in model.named_parameters():
            if name in self._tensors:
                parameter.data = parameter.data.to(device)


def _rounded(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and holder of every matrix, or stack, that takes canonical integers."""
    for path, module in model.named_modules():
        if getattr(module, "holder", None) is not None:
            yield path, module.holder


def _start(length: int) -> int:
    """Where the data begin behind a header of that length."""
    return -(-(48 + length) // 4096) * 4096


def _checksum(tensor: Tensor) -> int:
    kernels, held = library.library(), tensor.cpu()
    return kernels.mr_checksum(held.data_ptr(), held.numel() * held.element_size())  # pyright: ignore


def _make_room(folder: Path, size: int) -> None:
    """Removes what was not used for longest until ``size`` more bytes are within the bound."""
    kept = sorted(folder.glob("*.mirada"), key=lambda file: file.stat().st_mtime)
    total = size + sum(file.stat().st_size for file in kept)
    while kept and total > bound():
        total -= kept[0].stat().st_size
        kept.pop(0).unlink(missing_ok=True)
