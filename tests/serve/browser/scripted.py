"""A server that speaks the chat API and says what a test wrote: the page's behaviour without a model's whims.

What it answers depends on the last question's text; every request body is kept in ``seen``.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from mirada.serve.page import mount_page

USAGE = {
    "prompt_tokens": 280, "completion_tokens": 24, "total_tokens": 304,
    "prompt_tokens_details": {"image_tokens": 256, "video_tokens": 0},
}  # fmt: skip
MARKS = [
    {"type": "box", "label": "red circle", "box": [10, 36, 50, 76]},
    {"type": "box", "label": "<i>blue</i> rectangle", "box": [66, 38, 103, 75]},
    {"type": "polygon", "label": "tip", "points": [[120, 40], [150, 70], [110, 80]]},
    {"type": "point", "label": "", "point": [84, 84]},
]
ATTACK = """<img src=x onerror="window.hurt=1"><script>window.hurt=2</script>

[click](javascript:window.hurt=3) [data](data:text/html,<script>window.hurt=4</script>) [ok](https://example.org/a)

![beacon](https://evil.example/pixel.png) <a href="javascript:window.hurt=5">x</a>

```html"><script>window.hurt=6</script>
<script>window.hurt=7</script>
```

| a<img src=x onerror=window.hurt=8> | b |
|---|---|
| <svg onload=window.hurt=9> | `<b>` |
"""
BOXES = "Yes, to the right of the <|object_ref_start|>blue square<|object_ref_end|><|box_start|>(393,226),(613,446)<|box_end|>."
RICH = """## What is there

The sign has **two words** in *white* on green, set in `Helvetica`:

1. **Station**, on the left
2. **42**, on the right
   - in the same size

| Word | Letters |
|---|---|
| Station | 7 |
| 42 | 2 |

```python
from mirada import VLM

print(VLM("mini").ask("sign.png", "What does the sign say?"))
```

> Nothing else is written on it.
"""


class Scripted:
    """The application, what it has seen, and the thread that serves it."""

    def __init__(self, key: str = "") -> None:
        self.key = key
        self.seen: list[dict[str, Any]] = []
        self.gone = threading.Event()
        self.go_on = threading.Event()
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", self._models, methods=["GET"], response_model=None)
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"], response_model=None)
        mount_page(self.app)

    def __enter__(self) -> Scripted:
        self._server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until = time.monotonic() + 20
        while not self._server.started and time.monotonic() < until:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    def _refused(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "the API key is missing or wrong"}}, 401)
        return None

    async def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse(
            {"object": "list", "data": [{"id": "mini"}, {"id": "large"}, {"id": "receipts", "parent": "large"}]}
        )

    async def _chat(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        self.seen.append(body)
        said = _last_text(body)
        if "fail" in said:
            error = {"message": "temperature=9 is out of range <b>really</b>", "param": "temperature", "code": "bad_value"}
            return JSONResponse({"error": error}, 400)
        return StreamingResponse(self._events(said), media_type="text/event-stream")

    async def _events(self, said: str) -> AsyncIterator[str]:
        try:
            async for delta in _script(said, self.go_on):
                yield _event(delta)
        except asyncio.CancelledError:
            self.gone.set()
            raise
        yield "data: [DONE]\r\n\r\n"


def _last_text(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


async def _script(said: str, go_on: threading.Event) -> AsyncIterator[dict[str, Any]]:
    if "break" in said:
        yield {"choices": [{"delta": {"content": "Half an"}}]}
        yield {"error": {"message": "the worker was lost", "code": "server_error"}}
        return
    if "endless" in said:
        for number in range(600):
            yield {"choices": [{"delta": {"content": f"word{number} "}}]}
            await asyncio.sleep(0.05)
    if "think" in said:
        for word in ("Two words ", "are written ", "on the sign. "):
            yield {"choices": [{"delta": {"reasoning_content": word}}]}
            await asyncio.sleep(0.1)
        while "hold" in said and not go_on.is_set():
            await asyncio.sleep(0.02)
    text = (
        BOXES
        if "green triangle" in said
        else ATTACK
        if "attack" in said
        else RICH
        if "rich" in said
        else "The sign says Station 42."
    )
    for start in range(0, len(text), 7):
        yield {"choices": [{"delta": {"content": text[start : start + 7]}}]}
        await asyncio.sleep(0.004)
    last: dict[str, Any] = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    if "green triangle" in said:
        seen = {"chosen": "only", "size": [168, 112], "resized": [168, 112], "start": 0, "end": 3}
        elsewhere = {"type": "point", "point": [1, 1], "label": "of a video", "video": 0}
        last["choices"][0]["annotations"] = [{**mark, "image": 0, **seen} for mark in MARKS] + [{**elsewhere, **seen}]
    yield last
    yield {"choices": [], "usage": USAGE}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\r\n\r\n"


def until(page, expression: str, seconds: float = 15) -> None:
    """Waits for a script's expression to hold (the page's policy forbids Playwright's own way, which evaluates text in it)."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)
