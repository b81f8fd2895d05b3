"""What the server's own document says of routes that only some settings bring, and bounds that it sets before an engine is
asked."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from serving import KEY, user
from starlette.routing import Route

from mirada import VLM
from mirada.errors import SettingsError
from mirada.media.limits import FetchLimits
from mirada.serve import ServeSettings, create_app

TOOL = {"type": "function", "function": {"name": "f"}}
HIDDEN = {"/", "/ui/{name}", "/openapi.json"}


@pytest.fixture(scope="module")
def mini():
    with VLM("mini", engine={"workers": 0}, limits=FetchLimits.serving()) as vlm:
        yield {"mini": vlm}


def asked(app, path: str, body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.post(path, json=body)

    return asyncio.run(send())


@pytest.mark.parametrize("all_of_them", [False, True])
def test_every_route_is_in_the_document(mini, tmp_path, all_of_them):
    more = {"sleep": True, "adapter_root": tmp_path, "api_keys": (KEY,)} if all_of_them else {}
    app = create_app(mini, ServeSettings(**more))
    routes = {
        (route.path, method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if route.path not in HIDDEN and method != "HEAD"
    }
    told = {(path.replace("{name}", "{name:path}"), method) for path, ways in app.openapi()["paths"].items() for method in ways}
    assert told == routes and (("/sleep", "post") in told) == all_of_them
    assert (("/v1/load_lora_adapter", "post") in told) == all_of_them


def test_tools_of_one_request_are_bounded(mini):
    app = create_app(mini, ServeSettings(max_tools=2))
    chat = {"model": "mini", "messages": user("hi"), "max_tokens": 1, "tool_choice": "none"}
    for path, body, tool in (
        ("/v1/chat/completions", chat, TOOL),
        ("/v1/responses", {"model": "mini", "input": "hi", "tool_choice": "none"}, {"type": "function", "name": "f"}),
    ):
        refused = asked(app, path, {**body, "tools": [tool] * 3})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools"), refused.text
        assert "3" in refused.json()["error"]["message"]
        assert asked(
            app, path, {**body, "tools": [tool] * 2, "max_tokens" if "chat" in path else "max_output_tokens": 1}
        ).is_success
    assert ServeSettings().max_tools == 128
    with pytest.raises(SettingsError, match="max_tools"):
        ServeSettings(max_tools=0)
