"""The Hugging Face Hub's file API and the layout of its cache, which other tools share.

Facts: huggingface.co/docs/hub/api and huggingface_hub (``constants.py``, ``utils/_http.py``: error codes). Not done through
huggingface_hub itself: since 1.x it drops what was fetched of a file when a transfer fails, and over HTTP it does not
compare hashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mirada.config import env
from mirada.errors import HubNotFound, HubRefused, MiradaError, SettingsError
from mirada.hub.source import Asked, Listing, RemoteFile


class HuggingFace:
    """See ``source.Source``."""

    title = "Hugging Face"
    revision = "main"

    def endpoint(self) -> str:
        return (env("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def _home(self) -> Path:
        cache = Path(env("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return Path(env("HF_HOME") or cache / "huggingface").expanduser()

    def root(self) -> Path:
        return Path(env("HF_HUB_CACHE") or env("HUGGINGFACE_HUB_CACHE") or self._home() / "hub").expanduser()

    def token(self) -> str | None:
        """Raises SettingsError for a file that is there and cannot be read."""
        found = env("HF_TOKEN") or env("HUGGING_FACE_HUB_TOKEN")
        if found:
            return found.strip()
        file = Path(env("HF_TOKEN_PATH") or self._home() / "token").expanduser()
        try:
            return file.read_text(encoding="utf-8").strip() or None
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"the token file {str(file)!r} cannot be read: {error}",
                "mend or remove it (hf auth login writes it anew), or give the token as HF_TOKEN or --token",
            ) from error

    def headers(self, token: str | None) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {token}"} if token else {}

    def listing_url(self, asked: Asked) -> str:
        return f"{asked.endpoint}/api/models/{asked.model}/revision/{quote(asked.revision, safe='')}?blobs=true"

    def listing(self, answer: Any) -> Listing:
        return Listing(str(answer["sha"]), tuple(_file(found) for found in answer["siblings"] if "/" not in found["rfilename"]))

    def file_url(self, asked: Asked, commit: str, name: str) -> str:
        return f"{asked.endpoint}/{asked.model}/resolve/{commit}/{quote(name)}"

    def refusal(self, asked: Asked, status: int, headers: Mapping[str, str], with_token: bool) -> MiradaError | None:
        code, said = headers.get("x-error-code", ""), headers.get("x-error-message", "")
        page = f"{asked.endpoint}/{asked.model}"
        if code == "GatedRepo":
            return HubRefused(
                f"{asked.model!r} is gated: its authors ask for consent to their terms first",
                f"open {page}, accept them, and give your token (HF_TOKEN or --token)",
            )
        if code == "RevisionNotFound":
            return HubNotFound(f"{asked.model!r} has no revision {asked.revision!r}", f"see the branches and tags at {page}")
        if status == 401 and "invalid" in said.lower():
            return HubRefused(
                "the Hugging Face token is not valid", "make another at huggingface.co/settings/tokens, or give none"
            )
        if code == "RepoNotFound" or status in (401, 404):
            private = "" if with_token else "; if it is private, give a token (HF_TOKEN or --token)"
            return HubNotFound(f"there is no model {asked.model!r} on {asked.endpoint}", f"check its name at {page}{private}")
        if status == 403:
            return HubRefused(
                f"the hub does not let you read {asked.model!r}{f' ({said})' if said else ''}",
                "check what your token may do at huggingface.co/settings/tokens",
            )
        return None


def _file(found: Mapping[str, Any]) -> RemoteFile:
    lfs = found.get("lfs")
    if lfs:
        return RemoteFile(found["rfilename"], int(lfs["size"]), str(lfs["sha256"]))
    return RemoteFile(found["rfilename"], int(found["size"]), str(found["blobId"]))


SOURCE = HuggingFace()
