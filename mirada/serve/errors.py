"""What a server refuses of itself, and every error as an HTTP reply in OpenAI's shape."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from mirada import errors
from mirada.errors import MiradaError
from mirada.records.answer import error_to_openai
from mirada.records.wire import param_of

RETRY_AFTER = 1
"""Seconds after which a client that came at a busy time may come again."""


class HttpError(Exception):
    """A refusal that is no fault of the engine: ``status``, and what OpenAI's error object holds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def http_error(error: BaseException) -> HttpError:
    """Any error as the one that a client is told. What is no MiradaError is a defect: its words stay in the log."""
    if isinstance(error, HttpError):
        return error
    if not isinstance(error, MiradaError):
        return HttpError(500, "the server has a defect; its log says more", kind="server_error", code="internal_error")
    status, body = error_to_openai(error)
    found = body["error"]
    busy = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else {}
    return HttpError(
        status, found["message"], kind=found["type"], param=_param(error, found["param"]), code=found["code"], headers=busy
    )


_NAMED = re.compile(r"\b(min_pixels|max_pixels|fps|nframes|logit_bias|stop_token_ids|thinking|adapter|tools)\b")


def _param(error: MiradaError, param: str | None) -> str | None:
    """The parameter at fault as exactly as the message says it: ``messages[1].content[0]``, ``max_pixels``."""
    if getattr(error, "param", None) is not None or not isinstance(error, errors.InputError):
        return param
    if isinstance(error, errors.MessageError) and (place := param_of(error.problem)):
        return place
    if not isinstance(error, errors.MediaError) and (match := _NAMED.search(error.problem)):
        return match[1]
    return param or "messages"


def as_json(value: Any) -> bytes:
    """JSON in UTF-8; half a surrogate pair, which UTF-8 cannot hold, as its escape."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "backslashreplace")


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON reply."""
    return Response(as_json(value), status, dict(headers or {}), media_type="application/json")


def error_reply(error: BaseException) -> Response:
    found = http_error(error)
    return reply(found.body, found.status, found.headers)
