"""Tensor files on disk (the safetensors format): mapped for reading, streamed for writing.

Our own reader and writer, because memory must stay bounded: pages of a mapped file count as resident until they are given
back, and the format's library copies every tensor before it writes. Format: 8 bytes of header length (little-endian),
JSON header, data (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mirada.errors import CheckpointError, TensorError

CHUNK_BYTES = 8 << 20
"""Bytes of a file that are resident at once while it is read."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
"""How the text begins that stands in a repository in the place of a large file."""


@dataclass(frozen=True)
class Stored:
    """One tensor of one file: where it lies and what it is."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in _DTYPES:
            raise TensorError(
                f"{self.file.name}: tensor {self.name!r} is stored as {self.dtype}", f"supported: {', '.join(_DTYPES)}"
            )
        return _DTYPES[self.dtype]


def read_header(file: Path) -> dict[str, Stored]:
    """Tensors of one file, checked against its size. TensorError names the file if it is cut short or malformed."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        if not prefix:
            raise _broken(file, "it is empty")
        if prefix + handle.read(len(_POINTER) - 8) == _POINTER:
            raise TensorError(f"{file} is a pointer of Git LFS, not the weights", "run `git lfs pull` in that directory")
        handle.seek(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise _broken(file, f"its header should take {length} bytes but the file has {size}")
        try:
            header = json.loads(handle.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            made = {name: _stored(file, name, entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(file, "its header is not that of a safetensors file") from error
    for name, stored in made.items():
        begin, end = entries[name]["data_offsets"]
        needed = math.prod(stored.shape) * stored.torch_dtype.itemsize
        if end - begin != needed or begin < 0:
            raise _broken(file, f"tensor {name!r} of shape {list(stored.shape)} takes {needed} bytes, not {end - begin}")
        if 8 + length + end > size:
            raise _broken(file, f"tensor {name!r} ends at byte {8 + length + end} but the file has {size}")
    return made


def _stored(file: Path, name: str, entry: Mapping, base: int) -> Stored:
    return Stored(name, file, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), base + int(entry["data_offsets"][0]))


def _broken(file: Path, problem: str) -> TensorError:
    return TensorError(f"{file} is broken: {problem}", "download or save the file again")


def find(directory: Path) -> list[Path]:
    """The weight files of a model directory, whole: all shards that the index names, or the single file."""
    index = directory / _INDEX
    if index.is_file():
        return _indexed(directory, index)
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    parts = sorted(directory.glob("model-*-of-*.safetensors"))
    if parts:
        return _numbered(parts)
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} holds weights as Python pickles ({pickles[0]}), which can run any code when opened; they are refused",
            "convert them to safetensors in a place you trust",
        )
    raise CheckpointError(
        f"{directory} holds no weights", "model.safetensors, or shards with model.safetensors.index.json, must lie there"
    )


def _indexed(directory: Path, index: Path) -> list[Path]:
    try:
        where: dict[str, str] = json.loads(index.read_text())["weight_map"]
        names = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards", "it must hold a weight_map of tensor name to file"
        ) from error
    files = [directory / name for name in names]
    for file in files:
        if file.parent != directory or not file.is_file():
            raise CheckpointError(f"shard {file.name!r} that {index.name} names is missing", f"put it beside {index}")
    for file in files:
        held, said = set(read_header(file)), {name for name, place in where.items() if place == file.name}
        for name in sorted(held ^ said):
            fault = "holds" if name in held else "lacks"
            raise TensorError(f"{file.name} {fault} tensor {name!r}, against {index.name}", "take index and shards of one save")
    return files


def _numbered(parts: list[Path]) -> list[Path]:
    """Shards without an index: their names say how many there must be."""
    count = parts[0].stem.rsplit("-", 1)[-1]
    wanted = [f"model-{i + 1:05d}-of-{count}.safetensors" for i in range(int(count) if count.isdigit() else 0)]
    missing = sorted({part.name for part in parts} ^ set(wanted))
    if missing:
        raise CheckpointError(f"shard {missing[0]!r} is missing or does not belong", f"{count} numbered shards must lie there")
    return parts


def read_all(files: Sequence[Path]) -> dict[str, Stored]:
    """Tensors of all files; TensorError if two files hold the same name."""
    made: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in made:
                raise TensorError(
                    f"tensor {name!r} lies in {made[name].file.name} and in {file.name}", "remove the file that does not belong"
                )
            made[name] = stored
    return made


class Mapped:
    """Maps files one after another and hands out tensors piece by piece, giving pages back behind itself."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._map: mmap.mmap | None = None

    def chunks(self, stored: Stored, row_bytes: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(first element, flat tensor on the file's own pages) until the tensor is through.

        Cuts fall on multiples of ``row_bytes``. A piece is only valid until the next is taken.
        """
        data, dtype = self._open(stored.file), stored.torch_dtype
        total = math.prod(stored.shape) * dtype.itemsize
        row_bytes = max(row_bytes, dtype.itemsize)
        step = max(1, CHUNK_BYTES // row_bytes) * row_bytes
        for begin in range(0, total, step):
            size = min(step, total - begin)
            yield begin // dtype.itemsize, _view(data, stored.start + begin, size, dtype)
            self._give_back(data, stored.start + begin, size)

    def whole(self, stored: Stored) -> Tensor:
        """A copy of a tensor."""
        made = torch.empty(math.prod(stored.shape), dtype=stored.torch_dtype)
        for begin, piece in self.chunks(stored):
            made[begin : begin + len(piece)] = piece
        return made.view(stored.shape)

    def _open(self, file: Path) -> mmap.mmap:
        if self._map is None or self._file != file:
            with file.open("rb") as handle:
                # A private writable map: torch wants a writable buffer, and nothing is ever written to it.
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
            self._file = file
        return self._map

    @staticmethod
    def _give_back(data: mmap.mmap, start: int, size: int) -> None:
        if hasattr(data, "madvise"):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            data.madvise(mmap.MADV_DONTNEED, first, start + size - first)


class Views:
    """Tensors on the pages of their files, which are read when they are used and are the system's to drop and read again.

    The files must stay as they are for as long as a view lives; what replaces one (as ``write_all`` does) does it no harm.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def of(self, parts: Sequence[Stored]) -> Tensor | None:
        """Tensors [R, ..] of one type as one, their rows after one another. None where they do not lie so in one file, or not
        at a multiple of their type's size."""
        first, end = parts[0], parts[0].start
        if first.start % first.torch_dtype.itemsize:
            return None
        for part in parts:
            if (part.file, part.dtype, part.shape[1:], part.start) != (first.file, first.dtype, first.shape[1:], end):
                return None
            end += math.prod(part.shape) * part.torch_dtype.itemsize
        if first.file not in self._maps:
            with first.file.open("rb") as handle:
                # A private writable map: torch wants a writable buffer, and nothing is ever written to it.
                self._maps[first.file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        made = _view(self._maps[first.file], first.start, end - first.start, first.torch_dtype)
        return made.view(sum(part.shape[0] for part in parts), *first.shape[1:])


def _view(data: mmap.mmap, start: int, size: int, dtype: torch.dtype) -> Tensor:
    if start % dtype.itemsize:
        return torch.frombuffer(bytearray(data[start : start + size]), dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=size // dtype.itemsize, offset=start)


def write_all(directory: Path, tensors: Mapping[str, Tensor], max_bytes: int) -> list[Path]:
    """Writes tensors as one file, or as numbered shards of at most ``max_bytes`` each (one tensor may be larger) with an index.

    Order and header depend on names, types and shapes alone, so equal tensors give equal bytes. Replaces older weight
    files of the directory, once the new ones are whole.
    """
    shards = _divide(tensors, max_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    directory.mkdir(parents=True, exist_ok=True)
    for name, shard in zip(names, shards, strict=True):
        _write(directory / f"{name}.part", {key: tensors[key] for key in shard})
    for old in (*directory.glob("model-*-of-*.safetensors"), directory / "model.safetensors", directory / _INDEX):
        old.unlink(missing_ok=True)
    for name in names:
        (directory / f"{name}.part").rename(directory / name)
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [directory / name for name in names]


def _divide(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        if shards[-1] and held + size > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # Widest types first keeps every tensor aligned to its own type.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            flat = tensors[name].detach().contiguous().view(-1)
            for begin in range(0, len(flat), CHUNK_BYTES):
                piece = flat[begin : begin + CHUNK_BYTES].cpu().view(torch.uint8)
                handle.write(piece.numpy().data)
