"""The cache on disk: each content once under ``blobs``, each commit a folder of links to them, each branch a note.

The layout is huggingface_hub's (docs: "Understand caching"), so what other tools fetched is found here, and the reverse.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mirada.errors import CheckpointError
from mirada.hub.source import INDEX, RemoteFile, weight_names

COMMIT = re.compile(r"[0-9a-f]{40}")
MOST_REVISION = 240
"""Characters of a branch or tag; a longer name would be none of a file."""
_READ = 1 << 20


class Store:
    """One model's folder under ``root``."""

    def __init__(self, root: Path, model: str) -> None:
        self.folder = root / f"models--{model.replace('/', '--')}"
        self.model = model

    def snapshot(self, commit: str) -> Path:
        """The folder of a commit."""
        return self.folder / "snapshots" / commit

    def commit_of(self, revision: str) -> str | None:
        """The commit that a branch or tag named when it was last fetched; a commit names itself."""
        if COMMIT.fullmatch(revision):
            return revision
        note = self._note(revision)
        found = note.read_text().strip() if note.is_file() else ""
        return found if COMMIT.fullmatch(found) else None

    def note(self, revision: str, commit: str) -> None:
        """Remembers the commit of a branch or tag, once its files are whole."""
        if revision != commit:
            note = self._note(revision)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(commit)

    def _note(self, revision: str) -> Path:
        made = Path(os.path.normpath(self.folder / "refs" / revision))
        if self.folder / "refs" not in made.parents or len(revision) > MOST_REVISION:
            raise CheckpointError(f"revision {revision!r} is not a name", "give a branch, a tag or a commit")
        return made

    def whole(self, commit: str, weights: bool) -> bool:
        """Whether everything of a commit is here: its config and, with ``weights``, every file of them."""
        folder = self.snapshot(commit)
        if not (folder / "config.json").is_file():
            return False
        if not weights:
            return True
        names = [entry.name for entry in folder.iterdir() if entry.exists()]  # a link to what is not there is no file
        try:
            wanted = weight_names(names, read_index(folder), self.model)
        except CheckpointError:
            return False
        last = re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", wanted[-1])
        return last is None or len(wanted) == int(last[1]) or (folder / INDEX).is_file()

    def blob(self, file: RemoteFile) -> Path:
        """Where a content lies, or will."""
        return self.folder / "blobs" / file.key

    def part(self, file: RemoteFile) -> Path:
        """Where a content lies while it is incomplete."""
        return self.folder / "blobs" / f"{file.key}.part"

    @contextmanager
    def locked(self, file: RemoteFile) -> Iterator[None]:
        """Holds a content against other processes that fetch it (huggingface_hub's too); they wait, then find it there."""
        import fcntl

        lock = self.folder.parent / ".locks" / self.folder.name / f"{file.key}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def has(self, commit: str, file: RemoteFile) -> bool:
        """Whether a file of a commit is here whole. Another tool's copy counts if its size is right."""
        places = (self.snapshot(commit) / file.name, self.blob(file))
        return any(place.is_file() and place.stat().st_size == file.size for place in places)

    def link(self, commit: str, file: RemoteFile) -> Path:
        """The file in the folder of its commit, leading to its content."""
        place, blob = self.snapshot(commit) / file.name, self.blob(file)
        if place.is_file() and place.stat().st_size == file.size:
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            place.symlink_to(os.path.relpath(blob, place.parent))
        except OSError:  # a file system without links: the content itself goes there
            blob.replace(place)
        return place


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of shards in a folder, or None. CheckpointError if it is not JSON."""
    file = folder / INDEX
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON", "remove it and download it again") from error


class Digest:
    """The hash that a key states: SHA-256, or git's SHA-1 over ``blob SIZE`` and the content."""

    def __init__(self, file: RemoteFile) -> None:
        self.key = file.key
        self._hash = hashlib.sha256() if len(file.key) == 64 else hashlib.sha1(f"blob {file.size}\0".encode())

    def update(self, data: bytes) -> None:
        self._hash.update(data)

    def read(self, path: Path) -> None:
        """Takes in what lies at ``path``."""
        with path.open("rb") as handle:
            while data := handle.read(_READ):
                self._hash.update(data)

    def fits(self) -> bool:
        return self._hash.hexdigest() == self.key
