"""``mirada serve``: open the models, then answer over HTTP until told to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mirada.cli.options import named_adapter
from mirada.errors import NotAvailable, SettingsError

NEEDS = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command was asked to do."""

    models: Sequence[str]
    """Names, folders, or NAME=FOLDER."""
    adapters: Sequence[str]
    """NAME=FOLDER, or MODEL:NAME=FOLDER."""
    chosen: dict[str, Any]
    """Settings of the server that were given as options."""
    keys: Sequence[str]
    key_file: str | None
    media_root: str | None
    private_media: bool
    device: str | None
    quant: str | None
    kv: str | None
    config: str | None


def run(plan: Plan) -> None:
    """Serve. What can be checked is, before a model is opened."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise NotAvailable(f"serving needs {', '.join(missing)}", "run: pip install 'mirada[serve]'")
    import mirada
    from mirada.adapt.mode import parse as check_quant
    from mirada.serve import run as server

    check_quant(plan.quant)
    named = _named(plan.models)
    adapters = _adapters(plan.adapters, tuple(named))
    settings, engine, limits = _settings(plan)
    root = _root(plan.media_root)
    limits = replace(limits, allow_files=root is not None, file_root=root, allow_private=plan.private_media)
    how = {"device": plan.device, "quant": plan.quant, "limits": limits, "engine": engine}
    sock = server.listen(settings)
    try:
        opened = {name: mirada.VLM(path, adapters=adapters[name], **how) for name, path in named.items()}
        server.serve(opened, settings, lambda address: _say(address, next(iter(named)), bool(settings.api_keys)), sock)
    finally:
        sock.close()


def _settings(plan: Plan) -> tuple[Any, Any, Any]:
    """``ServeSettings`` of a yaml file, under what was given as options, the ``EngineSettings`` of its ``engine`` and the
    ``FetchLimits`` of its ``media`` over those of a server; where files may lie is said by the options alone."""
    from mirada.config import parse, read_yaml
    from mirada.engine.settings import EngineSettings
    from mirada.media.limits import SERVING, FetchLimits
    from mirada.serve.settings import ServeSettings, find_keys

    config = plan.config
    read = read_yaml(config) if config else {}
    keys = (*find_keys(tuple(plan.keys), plan.key_file), *read.pop("api_keys", ()))
    bounds = parse(EngineSettings, read.pop("engine", None) or {}, f"engine in {config}")
    media = read.pop("media", None) or {}
    if isinstance(media, dict) and (own := sorted(media.keys() & {"allow_files", "file_root", "allow_private"})):
        raise SettingsError(f"{own[0]} has no place under media in {config}", "use --media-root and --private-media")
    limits = parse(FetchLimits, {**SERVING, **media} if isinstance(media, dict) else media, f"media in {config}")
    settings = parse(ServeSettings, {**read, **plan.chosen, "api_keys": keys}, config or "server settings")
    return settings, bounds if plan.kv is None else replace(bounds, kv=plan.kv), limits


def _adapters(given: Sequence[str], models: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Model -> name -> folder. Every name is one thing alone, for requests may give it as their model."""
    found: dict[str, dict[str, Path]] = {model: {} for model in models}
    taken = set(models)
    for text in given:
        model = next((model for model in models if text.startswith(f"{model}:")), None)
        if model is None and len(models) > 1:
            raise SettingsError(
                f"--adapter {text!r} does not say for which of {len(models)} models", f"write {models[0]}:NAME=FOLDER"
            )
        name, folder = named_adapter(text if model is None else text[len(model) + 1 :])
        if name in taken:
            raise SettingsError(f"two models or adapters are called {name!r}", "give the adapter another NAME=FOLDER")
        taken.add(name)
        found[model or models[0]][name] = folder
    return found


def _named(models: Sequence[str]) -> dict[str, str]:
    """Name -> model. Two of one name are refused."""
    found: dict[str, str] = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals:
            name, path = (Path(model).name if Path(model).is_dir() else model), model
        if not name or not path:
            raise SettingsError(f"--model {model!r} has no form that is known", "write NAME=FOLDER, a folder, or org/name")
        if name in found:
            raise SettingsError(f"two models are called {name!r}", "name them: --model a=FOLDER --model b=FOLDER")
        found[name] = path
    return found


def _root(media_root: str | None) -> Path | None:
    if media_root is None:
        return None
    if not Path(media_root).is_dir():
        raise SettingsError(f"--media-root {media_root!r} is no folder", "give the folder whose files may be read")
    return Path(media_root).resolve()


def _say(address: str, model: str, keyed: bool) -> None:
    """Where it is, and a line to try."""
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What is a receipt?"}}]}}'
    print(f"Serving {model} at {address}  (Ctrl-C stops it)")
    print(f"curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n  -d '{body}'", flush=True)
