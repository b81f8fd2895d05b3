"""The playground: one static page at ``/`` and its files under ``/ui/``.

The page talks to the public API alone; nothing here knows a model. Its files are read once, when they are mounted, and are
the only ones that can be asked for. The content security policy lets it run its own scripts and styles, show pictures and
videos that it made itself (``blob:``), and connect to this server; nothing else, and nobody may frame it.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

KINDS = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "camera=(self), display-capture=(self), microphone=(), geolocation=()",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, answered 304 while unchanged
}


def is_page(path: str) -> bool:
    """Whether ``path`` belongs to the page: such requests need no API key, for it holds nothing that is secret."""
    return path == "/" or path.startswith("/ui/")


def mount_page(app: FastAPI) -> None:
    """Adds ``GET /`` and ``GET /ui/{name}`` (not in the OpenAPI document, for they are no part of the API)."""
    from starlette.routing import Route

    held = {
        entry.name: entry.read_bytes()
        for entry in files("mirada.serve").joinpath("ui").iterdir()
        if entry.name.rpartition(".")[2] in KINDS
    }

    async def index(request: Request) -> Response:
        return _answer(request, "index.html", held["index.html"])

    async def part(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in held or name == "index.html":
            from starlette.exceptions import HTTPException

            raise HTTPException(404, f"the page has no file {name!r}")
        return _answer(request, name, held[name])

    app.router.routes.append(Route("/", index, methods=["GET"], include_in_schema=False))
    app.router.routes.append(Route("/ui/{name}", part, methods=["GET"], include_in_schema=False))


def _answer(request: Request, name: str, content: bytes) -> Response:
    from starlette.responses import Response

    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=KINDS[name.rpartition(".")[2]])
