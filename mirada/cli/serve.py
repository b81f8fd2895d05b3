"""``mirada serve``: open the models, then answer over HTTP until told to stop."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mirada.errors import NotAvailable, SettingsError

NEEDS = ("fastapi", "uvicorn", "prometheus_client")


def run(
    models: list[str],
    host: str,
    port: int,
    keys: list[str],
    key_file: str | None,
    media_root: str | None,
    private_media: bool,
    device: str | None,
    config: str | None,
) -> None:
    """Serve ``models`` (names, folders, or NAME=FOLDER). What can be checked is, before a model is opened."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise NotAvailable(f"serving needs {', '.join(missing)}", "run: pip install mirada[serve]")
    import mirada
    from mirada.serve import run as server
    from mirada.serve.settings import find_keys

    named = _named(models or ["mini"])
    more = {"api_keys": find_keys(tuple(keys), key_file), "host": host, "port": port}
    settings, engine, limits = _settings(config, more)
    root = _root(media_root)
    limits = replace(limits, allow_files=root is not None, file_root=root, allow_private=private_media)
    sock = server.listen(settings)
    try:
        opened = {name: mirada.VLM(path, device=device, limits=limits, engine=engine) for name, path in named.items()}
        server.serve(opened, settings, lambda address: _say(address, next(iter(named)), bool(settings.api_keys)), sock)
    finally:
        sock.close()


def _settings(config: str | None, more: dict[str, Any]) -> tuple[Any, Any, Any]:
    """``ServeSettings`` of a yaml file, under what was given as options, the ``EngineSettings`` of its ``engine`` and the
    ``FetchLimits`` of its ``media``; where files may lie is said by the options alone."""
    from mirada.config import parse, read_yaml
    from mirada.engine.settings import EngineSettings
    from mirada.media.fetch import FetchLimits
    from mirada.serve.settings import ServeSettings

    given = read_yaml(config) if config else {}
    keys = (*more.pop("api_keys"), *given.pop("api_keys", ()))
    engine = parse(EngineSettings, given.pop("engine", None) or {}, f"engine in {config}")
    media = given.pop("media", None) or {}
    if isinstance(media, dict) and (own := sorted(media.keys() & {"allow_files", "file_root", "allow_private"})):
        raise SettingsError(f"{own[0]} has no place under media in {config}", "use --media-root and --private-media")
    limits = parse(FetchLimits, media, f"media in {config}")
    return parse(ServeSettings, {**more, **given, "api_keys": keys}, config or "server settings"), engine, limits


def _named(models: list[str]) -> dict[str, str]:
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
