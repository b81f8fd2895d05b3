"""Records as jsonl, parquet and tar shards, read and written alike.

A record is ``{"id": ..., "messages": [{"role": ..., "content": ...}], "meta": {...}}``, its messages as in ``wire``. Media that
are bytes lie inside: as ``data:`` URIs in jsonl, in a column of their own in parquet, as members in tar.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

from mirada.errors import MessageError, NotAvailable, SettingsError, nearest
from mirada.records.wire import message_from_json, message_to_json
from mirada.types import Image, Message, Part, Video

SUFFIXES = (".jsonl", ".parquet", ".tar")
MAX_MEMBER_BYTES = 1 << 30
"""A tar member above this is refused, before it is read."""
_PICKLES = (".pkl", ".pickle", ".pyd", ".pth", ".pt")


@dataclass(frozen=True, slots=True)
class Record:
    """One chat. ``meta`` is whatever a data set says beside it (JSON values)."""

    id: str
    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


def record_from_json(value: Mapping[str, Any], where: str = "record", default_id: str = "") -> Record:
    """``{"id"?, "messages", "meta"?}`` -> Record; keys beside these go to ``meta``. Raises MessageError naming ``where``."""
    if not isinstance(value, Mapping) or not isinstance(value.get("messages"), Sequence) or isinstance(value["messages"], str):
        raise MessageError(f"{where} has no list of messages", 'write it as {"messages": [{"role": ..., "content": ...}]}')
    messages = tuple(message_from_json(message, f"{where}, message {index}") for index, message in enumerate(value["messages"]))
    meta = {key: item for key, item in value.items() if key not in ("id", "messages", "meta")}
    return Record(str(value.get("id", default_id)), messages, {**(value.get("meta") or {}), **meta})


def record_to_json(record: Record, store: Callable[[bytes], str] | None = None) -> dict[str, Any]:
    """Record -> JSON value, the inverse of ``record_from_json``."""
    value: dict[str, Any] = {"id": record.id, "messages": [message_to_json(message, store) for message in record.messages]}
    if record.meta:
        value["meta"] = dict(record.meta)
    return value


def shards(path: str | Path) -> list[Path]:
    """The files behind ``path``: itself, or those of a known suffix in a folder, by name."""
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        if not found:
            raise SettingsError(f"the folder {str(path)!r} holds no records", f"put {', '.join(SUFFIXES)} files into it")
        return found
    if path.suffix not in SUFFIXES:
        raise SettingsError(f"the records {str(path)!r} have an unknown suffix", nearest(path.suffix, SUFFIXES))
    if not path.is_file():
        raise SettingsError(f"no records lie at {str(path)!r}", "check the path")
    return [path]


def read(path: str | Path, start: int = 0) -> Iterator[Record]:
    """Records of a file, or of all shards of a folder in the order of their names, from number ``start`` on.

    A record that is not well formed raises MessageError naming file and place; a torn last line of a jsonl file is left out.
    """
    number = 0
    for shard in shards(path):
        reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".tar": _read_tar}[shard.suffix]
        for make in reader(shard):  # records are made only from `start` on
            if number >= start:
                yield make()
            number += 1


def _read_jsonl(path: Path) -> Iterator[Callable[[], Record]]:
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if line.endswith(b"\n") or _is_json(line):
                yield lambda line=line, index=index: _record_from_line(line, f"{path}:{index + 1}", str(index))


def _record_from_line(line: bytes, where: str, default_id: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise MessageError(f"{where} is not JSON: {error}", "correct or remove that line") from error
    return record_from_json(value, where, default_id)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[Callable[[], Record]]:
    file = _parquet().ParquetFile(path)
    if "messages" not in file.schema_arrow.names:
        raise MessageError(f"{path} has no column 'messages'", nearest("messages", file.schema_arrow.names))
    index = 0
    for batch in file.iter_batches(batch_size=64):
        for row in batch.to_pylist():
            yield lambda row=row, index=index: _record_from_row(row, f"{path}, row {index}", str(index))
            index += 1


def _record_from_row(row: dict[str, Any], where: str, default_id: str) -> Record:
    media = dict(enumerate(row.pop("media", None) or ()))
    for key in ("messages", "meta"):
        if isinstance(row.get(key), str):
            row[key] = json.loads(row[key])
    return _with_members(record_from_json(row, where, default_id), {f"media:{i}": data for i, data in media.items()})


def _read_tar(path: Path) -> Iterator[Callable[[], Record]]:
    key, members = None, {}
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            if not info.isfile():
                continue
            if Path(info.name).suffix in _PICKLES:
                raise SettingsError(f"{path} holds the pickle {info.name!r}", "write records as .json and media as they are")
            if info.size > MAX_MEMBER_BYTES:
                raise SettingsError(
                    f"{info.name!r} in {path} has {info.size} bytes", f"keep members below {MAX_MEMBER_BYTES} bytes"
                )
            stem = _stem(info.name)
            if stem != key and members:
                yield lambda key=key, members=members: _record_from_members(path, str(key), members)
                members = {}
            key = stem
            file = tar.extractfile(info)
            assert file is not None  # isfile() said so
            members[info.name] = file.read()
    if members:
        yield lambda: _record_from_members(path, str(key), members)


def _stem(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _record_from_members(path: Path, key: str, members: dict[str, bytes]) -> Record:
    name = f"{key}.json"
    if name not in members:
        raise MessageError(f"the sample {key!r} in {path} has no {name}", "put the messages into a .json beside its media")
    record = _record_from_line(members[name], f"{path}:{name}", key)
    return _with_members(record, members)


def _with_members(record: Record, members: Mapping[str, bytes]) -> Record:
    """Sources that name a member become its bytes."""
    if not members:
        return record

    def fill(source: Any) -> Any:
        if isinstance(source, list):
            return [fill(item) for item in source]
        return members.get(source, source) if isinstance(source, str) else source

    def part(part: Part) -> Part:
        return replace(part, source=fill(part.source)) if isinstance(part, Image | Video) else part

    messages = tuple(
        Message(m.role, tuple(part(p) for p in m.parts), reasoning=m.reasoning, tool_call_id=m.tool_call_id)
        for m in record.messages
    )
    return Record(record.id, messages, record.meta)


class JsonLines:
    """Appends values, each as one whole line in one write; on opening, a torn last line of an earlier run is cut off.

    ``count`` is how many lines the file holds. Raises SettingsError, and changes nothing, where what would be cut off is no
    piece of such a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self.path.open("a+b")
        try:
            self.count = _cut_torn_line(self._file)
        except SettingsError:
            self._file.close()
            raise

    def append_json(self, value: Any) -> None:
        try:
            line = json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can say and UTF-8 cannot
            line = json.dumps(value).encode()
        self._file.write(line + b"\n")
        self._file.flush()
        self.count += 1

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonlWriter(JsonLines):
    """Appends records; a run resumes with ``itertools.islice(source, writer.count, None)``."""

    def append(self, record: Record) -> None:
        self.append_json(record_to_json(record))


def _cut_torn_line(file: BinaryIO) -> int:
    """Leave whole lines only; their number. A last line that is whole JSON and lacks just its end is kept and ended."""
    file.seek(0)
    count = whole = 0
    ours = True
    for line in file:
        if line.endswith(b"\n"):
            ours = _is_json(line) if count == 0 else ours
            count, whole = count + 1, whole + len(line)
        elif _is_json(line):
            file.write(b"\n")
            return count + 1
        elif not ours or not line.startswith((b"{", b"[", b'"')):  # somebody's picture, given by a slip
            raise SettingsError(f"{str(file.name)!r} does not hold JSON lines", "give another file; this one is left as it was")
    file.truncate(whole)
    file.seek(whole)
    return count


def write(path: str | Path, records: Iterable[Record]) -> int:
    """Write a new .jsonl, .parquet or .tar file; the number of records. It appears under its name only when it is whole."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise SettingsError(f"the records {str(path)!r} have an unknown suffix", nearest(path.suffix, SUFFIXES))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    writer = {".jsonl": _write_jsonl, ".parquet": _write_parquet, ".tar": _write_tar}[path.suffix]
    try:
        count = writer(partial, records)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write_jsonl(path: Path, records: Iterable[Record]) -> int:
    count = 0
    with path.open("wb") as file:
        for record in records:
            file.write(json.dumps(record_to_json(record), ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def _write_parquet(path: Path, records: Iterable[Record]) -> int:
    parquet = _parquet()
    import pyarrow as pa

    schema = pa.schema(
        [("id", pa.string()), ("messages", pa.string()), ("meta", pa.string()), ("media", pa.list_(pa.binary()))]
    )
    rows: list[dict[str, Any]] = []
    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        for record in records:
            media: list[bytes] = []

            def store(data: bytes, media: list[bytes] = media) -> str:
                media.append(data)
                return f"media:{len(media) - 1}"

            value = record_to_json(record, store)
            texts = {key: json.dumps(value.get(key, {}), ensure_ascii=False) for key in ("messages", "meta")}
            rows.append({"id": record.id, **texts, "media": media})
            count += 1
            if len(rows) == 256:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return count


def _write_tar(path: Path, records: Iterable[Record]) -> int:
    count = 0
    with tarfile.open(path, "w:") as tar:
        for index, record in enumerate(records):
            key = f"{index:08d}"
            members: dict[str, bytes] = {}

            def store(data: bytes, key: str = key, members: dict[str, bytes] = members) -> str:
                name = f"{key}.{len(members)}.bin"
                members[name] = data
                return name

            line = json.dumps(record_to_json(record, store), ensure_ascii=False).encode()
            for name, data in {f"{key}.json": line, **members}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            count = index + 1
    return count


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise NotAvailable("parquet needs the package pyarrow", "pip install 'mirada[data]'") from error
    return pyarrow.parquet
