"""Routes that put models to sleep and wake them, named and answered as vLLM does (vllm/entrypoints/openai/api_server.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.responses import Response

from mirada.errors import ParameterError, SettingsError, nearest
from mirada.serve import log, openai
from mirada.serve.chat import Desk
from mirada.serve.errors import reply
from mirada.serve.settings import ServeSettings

if TYPE_CHECKING:
    from mirada.engine.llm import VLM


def check_sleep(settings: ServeSettings) -> None:
    """Raises SettingsError: whoever may put a server to sleep can stop it for all others."""
    if settings.sleep and not settings.api_keys:
        raise SettingsError("server setting sleep needs an API key", "give --api-key-file FILE, or leave sleep out")


def mount_sleep(app: FastAPI, desk: Desk) -> None:
    """The three routes, if the settings want them. ``?model=NAME`` is for one of several models, none for all."""
    if not desk.settings.sleep:
        return
    # It waits for what is under way, and that may need the threads that all requests share.
    bedroom = ThreadPoolExecutor(1, "mirada-sleep")

    async def aside(work: Callable[..., None], *given: object) -> None:
        await asyncio.get_running_loop().run_in_executor(bedroom, work, *given)

    @app.post("/sleep", response_model=None)
    async def sleep(request: Request) -> Response:
        """Answer what is under way, then give memory back: ``level=1`` keeps the weights, ``level=2`` drops them too."""
        models = _asked(request, desk, "level")
        level = _level(request.query_params.get("level", "1"))
        for name, vlm in models.items():
            await aside(vlm.sleep, level, desk.settings.drain_seconds)
            log.event("asleep", model=name, level=vlm.asleep)
        return _state(models)

    @app.post("/wake_up", response_model=None)
    async def wake_up(request: Request) -> Response:
        """Take requests again. Answered when that is so."""
        models = _asked(request, desk)
        for name, vlm in models.items():
            await aside(vlm.wake)
            log.event("awake", model=name)
        return _state(models)

    @app.get("/is_sleeping", response_model=None)
    async def is_sleeping(request: Request) -> Response:
        """Whether all that is asked for sleeps, and the level of each."""
        return _state(_asked(request, desk))


def _state(models: dict[str, VLM]) -> Response:
    levels = {name: vlm.asleep for name, vlm in models.items()}
    return reply({"is_sleeping": all(levels.values()), "levels": levels})


def _asked(request: Request, desk: Desk, *parameters: str) -> dict[str, VLM]:
    """The models that a request is about. Raises ParameterError for a parameter that nobody knows, HttpError for a model."""
    known = ("model", *parameters)
    for name in request.query_params:
        if name not in known:
            raise ParameterError(f"there is no parameter {name[:80]!r} here", nearest(name[:80], known), param=name[:80])
    wanted = request.query_params.get("model")
    if wanted is None:
        return dict(desk.models)
    if wanted not in desk.models:
        raise openai.no_model(wanted, tuple(desk.models))
    return {wanted: desk.models[wanted]}


def _level(given: str) -> int:
    if given not in ("1", "2"):
        raise ParameterError(
            f"level={given[:80]!r} is unknown", "give 1 (keep the weights) or 2 (drop them too)", param="level"
        )
    return int(given)
