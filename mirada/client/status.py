"""What an HTTP answer other than 200 means: a typed error with the server's own words, and whether to ask again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mirada.client.reading import excerpt
from mirada.client.retry import retry_after
from mirada.errors import (
    ContextOverflow,
    MiradaError,
    RemoteBusy,
    RemoteError,
    RemoteNotFound,
    RemoteRefused,
    RemoteRejected,
    RemoteTimeout,
)

_TRY_LATER = "try again later, or ask less at once (max_in_flight)"


class Passing(Exception):
    """An error that may be gone at the next attempt; ``after``: seconds that the server asks to wait."""

    def __init__(self, error: MiradaError, after: float | None = None) -> None:
        super().__init__(error)
        self.error = error
        self.after = after


def refusal(status: int, headers: Mapping[str, str], body: bytes, name: str) -> MiradaError | Passing:
    """The error behind an answer of ``status``; ``name``: the server, for messages."""
    said, code = words(body)
    told = f"{name} answered {status}" + (f": {said}" if said else "")
    if 300 <= status < 400:
        target = excerpt(headers.get("location", "").partition("?")[0])
        return RemoteError(
            f"{name} redirects to {target}",
            "redirects are not followed, for the key would go along: give that address",
            status=status,
        )
    if status in (401, 403) or code == "insufficient_quota":
        return RemoteRefused(told, "check the key (--api-key, or MIRADA_API_KEY) and what it may do", status=status)
    if code == "context_length_exceeded":
        return ContextOverflow(told, "shorten the text, or send smaller or fewer pictures", unit="tokens")
    if status == 404:
        return RemoteNotFound(told, "check the address (it mostly ends in /v1) and the model", status=status)
    after = retry_after(headers.get("retry-after"))
    if status in (429, 503):
        return Passing(RemoteBusy(told, _TRY_LATER, status=status), after)
    if status in (408, 504):
        return Passing(RemoteTimeout(told, "try again later", status=status), after)
    if status in (409, 425) or (status >= 500 and status != 501):
        return Passing(RemoteError(told, "try again later; the server's own log says more", status=status), after)
    if 400 <= status < 500:
        return RemoteRejected(told, "correct what it names", status=status)
    return RemoteError(told, "check that it speaks OpenAI's API", status=status)


def words(body: bytes) -> tuple[str, str]:
    """(what the server says, its code) out of the body of an error: OpenAI's shape, FastAPI's, or plain text."""
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        return (excerpt(body, 300) if body.strip() else ""), ""
    if not isinstance(value, dict):
        return excerpt(body, 300), ""
    inner = value.get("error")
    found = inner if isinstance(inner, dict) else value
    said = found.get("message") or found.get("detail") or inner or found
    said = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    said = "".join(c if c.isprintable() else " " for c in said[:2000]).strip().rstrip(".")
    return said, str(found.get("code") or "")
