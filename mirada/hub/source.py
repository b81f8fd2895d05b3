"""What a hub must say about itself, and the files of a model that are wanted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mirada.errors import CheckpointError, MiradaError

INDEX = "model.safetensors.index.json"
_SMALL = re.compile(r"[\w.\-+]+\.(json|jinja|txt|model)|tiktoken\.model")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")
_NOT_OURS = ("training_args", "trainer_state", "optimizer", "scheduler")
_KEY = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a listing. ``key`` names its content: its SHA-256 (64 hex digits) or its git hash (40)."""

    name: str
    size: int
    key: str

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key) or self.size < 0:
            raise CheckpointError(f"the hub states no usable hash or size for {self.name!r}", "try again, or another hub")


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Asked:
    """One model on one hub."""

    model: str
    revision: str
    endpoint: str


class Source(Protocol):
    """A hub's API."""

    title: str
    revision: str
    """The revision that is meant when none is given."""

    def endpoint(self) -> str:
        """Address of the hub, from the environment or its usual one."""
        ...

    def root(self) -> Path:
        """Where its models are kept on this machine."""
        ...

    def token(self) -> str | None:
        """The user's token, if the environment or the hub's own tool keeps one."""
        ...

    def headers(self, token: str | None) -> Mapping[str, str]: ...

    def listing_url(self, asked: Asked) -> str: ...

    def listing(self, answer: Any) -> Listing:
        """From the parsed JSON behind ``listing_url``. KeyError, TypeError, ValueError: it is not what the hub says."""
        ...

    def file_url(self, asked: Asked, commit: str, name: str) -> str: ...

    def refusal(self, asked: Asked, status: int, headers: Mapping[str, str], with_token: bool) -> MiradaError | None:
        """What an answer of ``status`` means; None: nothing particular."""
        ...


def small(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """Config, tokenizer, template, preprocessor and index: everything but weights, and nothing that could run."""
    return [f for f in files if _SMALL.fullmatch(f.name) and not f.name.startswith(_NOT_OURS)]


def weight_names(names: Iterable[str], index: Mapping[str, Any] | None, model: str) -> list[str]:
    """The safetensors files of a model: those its index names, or the single file, or numbered shards.

    CheckpointError if there are none, saying so if there are pickles instead, or if a shard of the index is missing.
    """
    held = sorted(names)
    if index is not None:
        try:
            wanted = sorted(set(index["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{INDEX} of {model!r} is not an index of shards", "ask its authors") from error
        missing = [name for name in wanted if name not in held]
        if missing or not wanted:
            raise CheckpointError(f"{model!r} lacks the shard {missing[0] if missing else '(all)'!r}", f"{INDEX} names it")
        return wanted
    if "model.safetensors" in held:
        return ["model.safetensors"]
    shards = [name for name in held if _SHARD.fullmatch(name)]
    if shards:
        return shards
    pickles = [name for name in held if _PICKLE.fullmatch(name) and not name.startswith(_NOT_OURS)]
    if pickles:
        raise CheckpointError(
            f"{model!r} holds its weights only as Python pickles ({pickles[0]}), which can run any code when opened;"
            " they are refused",
            "look for a repository with safetensors, or convert them in a place you trust",
        )
    raise CheckpointError(f"{model!r} holds no weights", "model.safetensors, or shards with an index, must lie in it")
