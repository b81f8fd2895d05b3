"""The server's own OpenAPI document: what is written here is what ``/openapi.json`` says, and tests hold the server to it.

Written by hand, for bodies are read by room ``records`` and not by classes that a framework could look at. Every optional
parameter may be null, which is as good as leaving it out. What bodies hold is in ``schema_requests`` and ``schema_answers``.
"""

from __future__ import annotations

from collections.abc import Sequence

from mirada.serve.schema_answers import answers
from mirada.serve.schema_requests import chat_parameters, parts, responses_parameters
from mirada.serve.schema_words import Schema, flag, one_of, ref, text, thing, told
from mirada.serve.settings import ServeSettings

ERRORS = {
    400: "A parameter or a picture does not do; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "Without an API key, only this machine and its own pages may ask.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too much is under way; come again after `Retry-After`.",
    501: "This server lacks what would be needed.",
    503: "The server is about to stop, or asleep, or memory ran out.",
    504: "What is under way took too long.",
}
_ID = {"X-Request-Id": {"schema": text(), "description": "The client's own, or one that the server's log knows."}}
_LATER = {"Retry-After": {"schema": text(), "description": "Seconds."}}
_IGNORED = {
    "X-Mirada-Ignored": {"schema": text(), "description": "Unknown parameters that were left aside, where that is allowed."}
}


def document(title: str, version: str, names: Sequence[str], settings: ServeSettings) -> Schema:
    """The whole document of a server of the models and adapters ``names``: what its settings leave out is not in it."""
    keys = bool(settings.api_keys)
    guarded = [{"bearer": []}] if keys else []
    schemas = {"ChatRequest": chat_parameters(names), "ResponseRequest": responses_parameters(names), **parts(), **answers()}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": "OpenAI's API around open vision-language models."},
        "paths": {
            "/v1/chat/completions": {
                "post": _answering("chat", "ChatRequest", "ChatCompletion", "ChatCompletionChunk", guarded)
            },
            "/v1/responses": {"post": _answering("response", "ResponseRequest", "Response", "ResponseEvent", guarded)},
            "/v1/models": {
                "get": _reading("models", "The models, and their adapters.", _json(ref("ModelList")), (401, 403, 503), guarded)
            },
            "/v1/models/{name}": {
                "get": _reading("model", "One of them.", _json(ref("Model")), (401, 403, 404, 503), guarded)
                | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": text(minLength=1)}]}
            },
            "/health": {
                "get": _reading("health", "Whether the process lives.", _json(told({"status": one_of("ok")})), (403,), [])
            },
            "/ready": {"get": _ready()},
            "/metrics": {
                "get": _reading("metrics", "Figures for Prometheus.", {"text/plain": {"schema": text()}}, (401, 403), guarded)
            },
            **(_sleeping(guarded) if settings.sleep else {}),
            **(_adapters(guarded) if settings.adapter_root is not None else {}),
        },
        "components": {
            "schemas": schemas,
            **({"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}} if keys else {}),
        },
    }


def _sleeping(guarded: list[Schema]) -> Schema:
    levels = {"type": "object", "additionalProperties": one_of(0, 1, 2)}
    told_so = _json(told({"is_sleeping": flag(), "levels": levels}))
    model = {"name": "model", "in": "query", "schema": text(), "description": "One of several models; none: all."}
    level = {"name": "level", "in": "query", "schema": one_of("1", "2"), "description": "2: drop the weights too."}

    def route(name: str, said: str, statuses: Sequence[int], *parameters: Schema) -> Schema:
        return _reading(name, said, told_so, (400, 401, 403, 404, *statuses), guarded) | {"parameters": list(parameters)}

    late, lacking = (501, 503, 504), (501, 503)
    return {
        "/sleep": {"post": route("sleep", "Answer what is under way, then give memory back.", late, model, level)},
        "/wake_up": {"post": route("wake_up", "Take requests again.", lacking, model)},
        "/is_sleeping": {"get": route("is_sleeping", "Whether all that is asked for sleeps.", (503,), model)},
    }


def _adapters(guarded: list[Schema]) -> Schema:
    name = text(minLength=1, maxLength=256)

    def route(called: str, said: str, body: Schema) -> Schema:
        statuses = (400, 401, 403, 404, 408, 413, 415, 429, 501, 503)
        made = _reading(called, said, {"text/plain": {"schema": text()}}, statuses, guarded)
        return {"post": made | {"requestBody": {"required": True, "content": _json(body)}}}

    loaded = thing({"lora_name": name, "lora_path": name}, {"model": text()})
    return {
        "/v1/load_lora_adapter": route("load_lora_adapter", "Read a LoRA adapter from below the adapters' folder.", loaded),
        "/v1/unload_lora_adapter": route("unload_lora_adapter", "Forget one.", thing({"lora_name": name})),
    }


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _errors(statuses: Sequence[int]) -> Schema:
    return {
        str(status): {
            "description": ERRORS[status],
            "content": _json(ref("Error")),
            "headers": _ID | (_LATER if status in (429, 503) else {}),
        }
        for status in statuses
    }


def _reading(name: str, said: str, content: Schema, statuses: Sequence[int], guarded: list[Schema]) -> Schema:
    answer = {"description": said, "content": content, "headers": _ID}
    return {"operationId": name, "summary": said, "security": guarded, "responses": {"200": answer, **_errors(statuses)}}


def _ready() -> Schema:
    states = {"200": ("ready",), "503": ("draining", "asleep", "stalled", "died", "closed")}
    made = _reading("ready", "Whether requests that come now would be answered.", {}, (403,), [])
    for status, state in states.items():
        told_so = _json(told({"status": one_of(*state)}))
        made["responses"][status] = {"description": ", ".join(state), "content": told_so, "headers": _ID}
    return made


def _answering(name: str, body: str, answer: str, event: str, guarded: list[Schema]) -> Schema:
    stream = {
        "schema": text(description=f"Server-sent events; the data of each is JSON of {event} (or Error)."),
        "x-event": ref(event),
    }
    content = _json(ref(answer)) | {"text/event-stream": stream}
    statuses = tuple(status for status in ERRORS if status != 504)
    made = _reading(name, "An answer, whole or (`stream`) as server-sent events.", content, statuses, guarded)
    made["responses"]["200"]["headers"] = _ID | _IGNORED
    return made | {"requestBody": {"required": True, "content": _json(ref(body))}}
