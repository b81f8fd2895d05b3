"""From what a user wrote to a directory."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirada import config
from mirada.config import env
from mirada.errors import CapacityError, CheckpointError, HubError, HubNotFound
from mirada.hub.source import INDEX, Asked, RemoteFile, Source, small, weight_names
from mirada.hub.store import COMMIT, Store, read_index
from mirada.hub.transfer import Progress, Report, Unreachable, Web
from mirada.table import Table

SOURCES = Table("hub", {"hf": "mirada.hub.huggingface:SOURCE", "modelscope": "mirada.hub.modelscope:SOURCE"})
_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}")
_TRUE = ("1", "on", "yes", "true")


@dataclass(frozen=True)
class HubOptions:
    """Where a model is fetched from, and how.

    ``source``: hf or modelscope. ``revision``: branch, tag or commit (None: the hub's main branch). ``token``: None takes
    the environment's. ``offline``: use only what is on this machine (None: as HF_HUB_OFFLINE says). ``cache_dir``: None is
    the hub's usual place. ``endpoint``: address of a mirror.
    """

    source: str = "hf"
    revision: str | None = None
    token: str | None = None
    offline: bool | None = None
    cache_dir: str | Path | None = None
    endpoint: str | None = None


def is_id(name: object) -> bool:
    """Whether ``name`` has the form of a model on a hub: two parts and one slash."""
    return isinstance(name, str) and _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def resolve(
    model: str | Path,
    source: str | None = None,
    revision: str | None = None,
    *,
    token: str | None = None,
    offline: bool | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    weights: bool = True,
    report: Report | None = None,
) -> Path:
    """The directory of ``model``: itself, if it is one; else what a hub has under that name (see ``HubOptions``).

    Fetches config, tokenizer, template, preprocessor and, with ``weights``, safetensors; never pickles or code. ``report``
    hears of the progress. Raises CheckpointError (no such place, only pickles), HubError and its kinds, CapacityError (disk),
    SettingsError.
    """
    if source is None and _is_directory(model):
        return Path(model)
    if not is_id(model):
        raise CheckpointError(
            f"there is no model {str(model)!r}", "give the directory of a checkpoint, or a name on a hub as org/name"
        )
    hub: Source = SOURCES[source or "hf"]
    asked = Asked(str(model), revision or hub.revision, (endpoint or hub.endpoint()).rstrip("/"))
    store = Store(Path(cache_dir).expanduser() if cache_dir else hub.root(), asked.model)
    found = _cached(store, asked.revision, weights)
    if offline if offline is not None else (env("HF_HUB_OFFLINE") or "").lower() in _TRUE:
        return found or _not_there(hub, store, asked)
    if found is not None and COMMIT.fullmatch(asked.revision):
        return found  # a commit never changes
    try:
        with Web(hub, asked, token or hub.token()) as web:
            return _fetch(web, store, weights, report or _quiet)
    except Unreachable as error:
        if found is None:
            raise
        warnings.warn(f"{error.problem}; using {found.name[:12]}, fetched before", stacklevel=2)
        return found
    except OSError as error:
        raise HubError(
            f"{asked.model!r} cannot be kept in {store.folder} ({error})",
            "make room there, or choose another place with cache_dir (--cache-dir)",
        ) from error


def resolve_with(model: str | Path, options: HubOptions | Mapping[str, Any] | None = None) -> Path:
    """``resolve`` with its settings in one value; a mapping is checked key by key (SettingsError)."""
    o = options if isinstance(options, HubOptions) else config.parse(HubOptions, options or {}, "hub")
    if _is_directory(model):
        return Path(model)
    return resolve(
        model, o.source, o.revision, token=o.token, offline=o.offline, cache_dir=o.cache_dir, endpoint=o.endpoint
    )  # fmt: skip


def _is_directory(model: Any) -> bool:
    try:
        return Path(model).is_dir()
    except (OSError, TypeError):  # a name that is too long, or none at all
        return False


def _quiet(_: Progress) -> None:
    pass


def _cached(store: Store, revision: str, weights: bool) -> Path | None:
    commit = store.commit_of(revision)
    return store.snapshot(commit) if commit is not None and store.whole(commit, weights) else None


def _not_there(hub: Source, store: Store, asked: Asked) -> Path:
    part = "only a part of " if store.folder.is_dir() else ""
    where = " --from modelscope" if hub.title == "ModelScope" else ""
    raise HubNotFound(
        f"{part or 'nothing of '}{asked.model!r} (revision {asked.revision}) is in {store.folder.parent}, and offline is set",
        f"where there is a connection, run: mirada download {asked.model}{where}",
    )


def _fetch(web: Web, store: Store, weights: bool, report: Report) -> Path:
    listing, model = web.listing(), web.asked.model
    if not COMMIT.fullmatch(listing.commit):
        raise HubError(f"{web.source.title} states no commit for {model!r}", "check the address of the hub")
    by_name = {file.name: file for file in listing.files}
    first = small(listing.files)
    if "config.json" not in by_name:
        raise CheckpointError(f"{model!r} holds no config.json", "it may be an adapter or another kind of repository")
    if weights and not any(file.name == INDEX for file in first):
        weight_names(by_name, None, model)  # before anything is fetched: there may be nothing that can be used
    for file in first:
        web.fetch(store, listing.commit, file, report)
    folder = store.snapshot(listing.commit)
    if weights:
        chosen = [by_name[name] for name in weight_names(by_name, read_index(folder), model)]
        _check_disk(store, listing.commit, chosen)
        for file in chosen:
            web.fetch(store, listing.commit, file, report)
    store.note(web.asked.revision, listing.commit)
    return folder


def _check_disk(store: Store, commit: str, files: list[RemoteFile]) -> None:
    missing = [f for f in files if not store.has(commit, f)]
    needed = sum(f.size - (p.stat().st_size if (p := store.part(f)).is_file() else 0) for f in missing)
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise CapacityError(
            f"{store.model!r} needs {needed / 1e9:.1f} GB more in {store.folder}, where {free / 1e9:.1f} GB are free",
            "free some, or choose another place with cache_dir (--cache-dir)",
            needed=needed,
            available=free,
            unit="bytes",
        )
