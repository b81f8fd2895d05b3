"""Routes that load and unload LoRA adapters while the server runs, named and answered as vLLM does
(vllm/entrypoints/serve/lora/api_router.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, Response

from mirada.errors import CheckpointError, ParameterError, SettingsError, nearest
from mirada.serve import log, openai
from mirada.serve.chat import Desk
from mirada.serve.guard import read_body
from mirada.serve.settings import ServeSettings


def check_adapters(settings: ServeSettings) -> None:
    """Raises SettingsError: whoever may load adapters changes what all others can ask for."""
    root = settings.adapter_root
    if root is not None and not settings.api_keys:
        raise SettingsError(
            "server setting adapter_root needs an API key", "give --api-key-file FILE, or leave adapter_root out"
        )
    if root is not None and not root.is_dir():
        raise SettingsError(f"server setting adapter_root={str(root)!r} is no folder", "give the folder that holds adapters")


def mount_adapters(app: FastAPI, desk: Desk) -> None:
    """The two routes, if the settings name a folder to load from."""
    if desk.settings.adapter_root is None:
        return
    root, one_at_a_time = desk.settings.adapter_root.resolve(), asyncio.Lock()

    @app.post("/v1/load_lora_adapter", response_model=None)
    async def load(request: Request) -> Response:
        """``{"lora_name", "lora_path"}``, and ``model`` where there are several: a folder as PEFT saves it, below the root."""
        body = await _read(request, desk, "lora_name", "lora_path", "model")
        name, folder, model = _text(body, "lora_name"), _folder(root, _text(body, "lora_path")), _model(desk, body)
        async with one_at_a_time:
            if name in desk.names:
                raise ParameterError(f"{name!r} is served already", "give another name", param="lora_name")
            try:
                await asyncio.to_thread(desk.models[model].load_adapter, name, folder)
            except (SettingsError, CheckpointError) as error:
                raise ParameterError(error.problem, error.fix, param="lora_path") from error
        log.event("adapter_loaded", adapter=name, model=model, id=request.scope["mirada.ticket"].id)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", response_model=None)
    async def unload(request: Request) -> Response:
        """``{"lora_name"}``. Requests that have it end with it."""
        name = _text(await _read(request, desk, "lora_name"), "lora_name")
        async with one_at_a_time:
            if name in desk.models or name not in desk.names:
                raise openai.no_model(name, [one for one in desk.names if one not in desk.models])
            model, _ = desk.find(name)
            await asyncio.to_thread(desk.models[model].unload_adapter, name)
        log.event("adapter_unloaded", adapter=name, model=model, id=request.scope["mirada.ticket"].id)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def _read(request: Request, desk: Desk, *known: str) -> dict[str, Any]:
    body = openai.read_json(await read_body(request, desk.gate, desk.settings))
    if (unknown := next((name for name in body if name not in known), None)) is not None:
        raise ParameterError(f"there is no parameter {unknown[:80]!r} here", nearest(unknown[:80], known), param=unknown[:80])
    return body


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= 256 or not value.isprintable():
        raise ParameterError(f"{name} is no name", "give a text of 1 to 256 printable characters", param=name)
    return value


def _folder(root: Path, given: str) -> Path:
    """The folder ``given``, below ``root`` wherever links lead."""
    try:
        folder = (root / given).resolve()
        fits = folder.is_relative_to(root) and folder.is_dir()
    except (OSError, RuntimeError):  # a name too long for the file system, links in a circle, a folder that is closed to us
        fits = False
    if not fits:
        raise ParameterError(f"{given!r} is no folder below adapter_root", "put the adapter there", param="lora_path")
    return folder


def _model(desk: Desk, body: Mapping[str, Any]) -> str:
    if "model" not in body and len(desk.models) == 1:
        return next(iter(desk.models))
    return openai.check_model_name(body, tuple(desk.models))
