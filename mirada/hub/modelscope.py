"""ModelScope's file API. Facts: modelscope/modelscope, ``modelscope/hub/api.py`` and ``file_download.py``.

Its files carry a SHA-256 each, but a listing has no commit; what is kept is named by a hash over the listing instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mirada.config import env
from mirada.errors import HubError, HubNotFound, HubRefused, MiradaError
from mirada.hub.source import Asked, Listing, RemoteFile


class ModelScope:
    """See ``source.Source``."""

    title = "ModelScope"
    revision = "master"

    def endpoint(self) -> str:
        domain = (env("MODELSCOPE_DOMAIN") or "www.modelscope.cn").rstrip("/")
        return domain if "://" in domain else f"https://{domain}"

    def root(self) -> Path:
        return Path(env("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mirada" / "modelscope"

    def token(self) -> str | None:
        return env("MODELSCOPE_API_TOKEN") or None

    def headers(self, token: str | None) -> Mapping[str, str]:
        return {"Cookie": f"m_session_id={token}"} if token else {}

    def listing_url(self, asked: Asked) -> str:
        return (
            f"{asked.endpoint}/api/v1/models/{asked.model}/repo/files?Revision={quote(asked.revision, safe='')}&Recursive=false"
        )

    def listing(self, answer: Any) -> Listing:
        if answer.get("Code", 200) != 200:  # some refusals come with status 200
            raise HubError(f"ModelScope refuses ({answer.get('Message')})", "check the name, the revision and the token")
        found = [f for f in answer["Data"]["Files"] if f["Type"] == "blob" and "/" not in f["Path"]]
        files = sorted((RemoteFile(f["Path"], int(f["Size"]), str(f["Sha256"])) for f in found), key=lambda f: f.name)
        content = hashlib.sha256("".join(f"{f.name} {f.key}\n" for f in files).encode())
        return Listing(content.hexdigest()[:40], tuple(files))

    def file_url(self, asked: Asked, commit: str, name: str) -> str:
        where = f"Revision={quote(asked.revision, safe='')}&FilePath={quote(name, safe='')}"
        return f"{asked.endpoint}/api/v1/models/{asked.model}/repo?{where}"

    def refusal(self, asked: Asked, status: int, headers: Mapping[str, str], with_token: bool) -> MiradaError | None:
        page = f"{asked.endpoint}/models/{asked.model}"
        if status == 404:
            return HubNotFound(
                f"there is no model {asked.model!r} with revision {asked.revision!r} on {asked.endpoint}",
                f"check its name at {page}",
            )
        if status in (401, 403):
            why = "the ModelScope token is not valid for it" if with_token else "it needs a token"
            return HubRefused(
                f"ModelScope does not let you read {asked.model!r}: {why}",
                f"accept its terms at {page}, and give your token (MODELSCOPE_API_TOKEN or --token)",
            )
        return None


SOURCE = ModelScope()
