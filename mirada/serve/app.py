"""The application: routes of OpenAI's API over models that are open."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

import mirada
from mirada.errors import MiradaError, SettingsError
from mirada.serve import chat, log, openai, responses, schema
from mirada.serve.adapters import check_adapters, mount_adapters
from mirada.serve.errors import HttpError, error_reply, reply
from mirada.serve.guard import Gate, Guard, aside, read_body
from mirada.serve.live import mount_live
from mirada.serve.metrics import CONTENT_TYPE, Metrics
from mirada.serve.page import mount_page
from mirada.serve.settings import ServeSettings
from mirada.serve.sleep import check_sleep, mount_sleep

if TYPE_CHECKING:
    from mirada.engine.llm import VLM

READ = ["GET", "HEAD"]
"""How what can be read is asked for; who watches over servers often wants no more than the head."""


def create_app(models: Mapping[str, VLM], settings: ServeSettings | None = None) -> FastAPI:
    """An ASGI application for ``models`` by the names that requests use. ``app.state.gate`` says what is under way.

    Raises SettingsError for a model that would read any file a stranger names: open it with
    ``limits=FetchLimits.serving()``.
    """
    settings = settings or ServeSettings()
    check_models(models, settings)
    check_sleep(settings)
    check_adapters(settings)
    gate, metrics = Gate(), Metrics(models)
    metrics.under_way.set_function(lambda: gate.num_requests)
    app = FastAPI(title="Mirada", version=mirada.__version__, docs_url=None, redoc_url=None)
    app.state.gate = gate
    app.state.watch = _Watch(models, settings.stall_seconds)
    app.add_middleware(Guard, settings=settings, gate=gate, metrics=metrics)
    for kind in (HttpError, MiradaError):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    desk = chat.Desk(models, settings, metrics, gate, int(time.time()))
    _add_model_routes(app, desk)
    _add_state_routes(app, desk)
    _add_answer_routes(app, desk)
    mount_live(app, desk)
    mount_sleep(app, desk)
    mount_adapters(app, desk)
    mount_page(app)
    app.openapi = lambda: schema.document(app.title, app.version, desk.names, settings)
    return app


def check_models(models: Mapping[str, VLM], settings: ServeSettings) -> None:
    """Raises SettingsError for what would fail every request."""
    if not models:
        raise SettingsError("there is no model to serve", "give at least one")
    for name, vlm in models.items():
        if vlm.limits.allow_files and vlm.limits.file_root is None:
            raise SettingsError(
                f"{name} may read any file of this machine", "open it with limits=FetchLimits.serving(), or with a file_root"
            )
        modes = dict(vlm.parts.renderer.format.thinking_suffix)
        if settings.thinking is not None and settings.thinking not in modes:
            raise SettingsError(f"{name} has no thinking mode {settings.thinking!r}", f"use {' or '.join(modes)}")


class _Watch:
    """Logs when the engine of a model can no longer answer, and when it can again."""

    def __init__(self, models: Mapping[str, VLM], stall_seconds: float) -> None:
        self._models, self._seconds = models, stall_seconds
        self._last = dict.fromkeys(models, "ready")

    def look(self) -> None:
        for name, vlm in self._models.items():
            state = vlm.state(self._seconds)
            if state != self._last[name]:
                level = logging.ERROR if state in ("died", "stalled") else logging.INFO
                log.event("engine", level, model=name, state=state)
            self._last[name] = state


def _add_answer_routes(app: FastAPI, desk: chat.Desk) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Any:
        """Answer a chat about text, pictures and videos, whole or (``stream``) as server-sent events."""
        data = await read_body(request, desk.gate, desk.settings)
        return await chat.complete(request, await aside(request, openai.read_json, data), desk)

    @app.post("/v1/responses", response_model=None)
    async def create_response(request: Request) -> Any:
        """The same by OpenAI's newer form. Nothing is stored."""
        data = await read_body(request, desk.gate, desk.settings)
        return await responses.respond(request, await aside(request, openai.read_json, data), desk)


def _add_model_routes(app: FastAPI, desk: chat.Desk) -> None:
    def card(name: str) -> dict[str, Any]:
        model, adapter = desk.find(name)
        vlm = desk.models[model]
        made = openai.model_card(name, desk.created, vlm.parts.context, () if adapter else vlm.adapters)
        return made | ({"parent": model} if adapter else {})

    @app.api_route("/v1/models", methods=READ, response_model=None)
    async def models() -> Response:
        """The models that are served here, and their adapters, which may be asked for as models too."""
        return reply({"object": "list", "data": [card(name) for name in desk.names]})

    @app.api_route("/v1/models/{name:path}", methods=READ, response_model=None)
    async def model(name: str) -> Response:
        """One of them."""
        if name not in desk.names:
            raise openai.no_model(name, desk.names)
        return reply(card(name))


def _add_state_routes(app: FastAPI, desk: chat.Desk) -> None:
    @app.api_route("/health", methods=READ, response_model=None)
    async def health() -> Response:
        """Whether the process lives."""
        return reply({"status": "ok"})

    @app.api_route("/ready", methods=READ, response_model=None)
    async def ready() -> Response:
        """Whether requests that come now would be answered: 503 once the server was told to stop, while the engine of a model
        hangs in a step or has died, and while all models sleep. It names none of them, for it needs no key."""
        states = set(desk.states.values())
        broken = next((state for state in ("died", "closed", "stalled") if state in states), None)
        status = broken or ("asleep" if states == {"asleep"} else "ready")
        status = "draining" if desk.gate.draining else status
        return reply({"status": status}, 200 if status == "ready" else 503)

    @app.api_route("/metrics", methods=READ, response_model=None)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(desk.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, MiradaError):
        request.scope["mirada.ticket"].facts["error"] = type(error).__name__
    return error_reply(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    said = {404: f"there is no {path!r} here", 405: f"{path!r} does not take {request.method}"}
    message = said.get(error.status_code, str(error.detail))
    return error_reply(
        HttpError(error.status_code, message, code="not_found" if error.status_code == 404 else None, headers=error.headers)
    )
