"""Live video: ``/v1/live`` is a WebSocket that takes frames all the time and answers questions about the last seconds.

Messages (docs/serve.md, "Live video"). The client sends ``start`` first; then binary messages, each 8 bytes of milliseconds
(big endian) and a JPEG; ``question`` and ``stop`` whenever it likes. The server sends ``state``, ``delta``, ``done`` and
``error``.
After the streaming demo of Qwen2-VL, but with a window that is bounded in seconds, frames and bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from mirada.errors import MediaDecodeError, MediaTooLarge, MessageError, MiradaError, ParameterError
from mirada.media.image import header_pixels
from mirada.serve import chat, openai
from mirada.serve.errors import HttpError, as_json, http_error
from mirada.serve.guard import busy
from mirada.types import Message, Video

if TYPE_CHECKING:
    from fastapi import FastAPI

PROTOCOL = "mirada.live"
STATE_SECONDS = 1.0
"""Between two messages ``state``."""


@dataclass(frozen=True, slots=True)
class LiveLimits:
    """What one connection may hold, and how many there may be."""

    seconds: float = 60.0
    """How far back the window reaches."""
    frames: int = 240
    bytes: int = 16 << 20
    frame_bytes: int = 1 << 20
    frame_pixels: int = 1920 * 1080
    asked_frames: int = 64
    """Most frames that one question looks at; of more, evenly spread ones are taken."""
    turns: int = 8
    """Earlier questions and answers, as text, that a question follows."""
    connections: int = 16
    idle_seconds: float = 60.0
    """Without any message; then the connection is closed."""


class Window:
    """The last frames, with their times in milliseconds: bounded in seconds, number and bytes; the oldest go first."""

    def __init__(self, limits: LiveLimits) -> None:
        self._limits = limits
        self._frames: deque[tuple[int, bytes]] = deque()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def seconds(self) -> float:
        return (self._frames[-1][0] - self._frames[0][0]) / 1000 if self._frames else 0.0

    def add(self, message: bytes) -> None:
        """One binary message. Raises MediaError: too large, not a JPEG, or of an earlier time than the one before."""
        limits, time_ms, jpeg = self._limits, int.from_bytes(message[:8], "big"), message[8:]
        if len(jpeg) > limits.frame_bytes:
            raise MediaTooLarge(f"a frame has {len(jpeg)} bytes", f"send at most {limits.frame_bytes}")
        if not jpeg.startswith(b"\xff\xd8\xff"):
            raise MediaDecodeError("a frame is not a JPEG", "send 8 bytes of milliseconds (big endian), then a JPEG")
        if header_pixels(jpeg) > limits.frame_pixels:
            raise MediaTooLarge(f"a frame has {header_pixels(jpeg)} pixels", f"send at most {limits.frame_pixels}")
        if self._frames and time_ms <= self._frames[-1][0]:
            raise MediaDecodeError(
                f"a frame of {time_ms} ms came after one of {self._frames[-1][0]} ms", "send frames in the order of their times"
            )
        self._frames.append((time_ms, jpeg))
        self.num_bytes += len(jpeg)
        self._forget(time_ms - round(limits.seconds * 1000))

    def _forget(self, oldest_ms: int) -> None:
        limits = self._limits
        while self._frames and (
            self._frames[0][0] < oldest_ms or len(self._frames) > limits.frames or self.num_bytes > limits.bytes
        ):
            self.num_bytes -= len(self._frames.popleft()[1])

    def last(self, seconds: float) -> tuple[list[bytes], float]:
        """(frames of the last ``seconds``, frames per second), at most ``asked_frames``, the newest among them. Raises
        MessageError where there is none."""
        if not self._frames:
            raise MessageError("no frame has arrived", "send frames before a question")
        since = self._frames[-1][0] - seconds * 1000
        found = [frame for frame in self._frames if frame[0] >= since]
        most = self._limits.asked_frames
        if len(found) > most:
            found = [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]
        taken = (found[-1][0] - found[0][0]) / 1000
        return [jpeg for _, jpeg in found], (len(found) - 1) / taken if taken else 1.0


def mount_live(app: FastAPI, desk: chat.Desk, limits: LiveLimits | None = None) -> None:
    """Adds the WebSocket ``/v1/live``. Who may come in is the guard's."""
    limits = limits or LiveLimits()
    under_way: set[Session] = set()

    async def live(socket: WebSocket) -> None:
        await socket.accept(subprotocol=PROTOCOL if PROTOCOL in socket.scope.get("subprotocols", ()) else None)
        session = Session(socket, desk, limits)
        if len(under_way) >= limits.connections:
            await session.say_error(busy(f"{len(under_way)} live connections are open", "live connections"))
            await socket.close(1013)
            return
        under_way.add(session)
        try:
            await session.run()
        finally:
            under_way.discard(session)

    app.router.add_websocket_route("/v1/live", live)


class Session:
    """One connection: its window, its turns, and at most one answer under way."""

    def __init__(self, socket: WebSocket, desk: chat.Desk, limits: LiveLimits) -> None:
        self._socket, self._desk, self._limits = socket, desk, limits
        self._window = Window(limits)
        self._model: str | None = None
        self._turns: deque[tuple[str, str]] = deque(maxlen=limits.turns)
        self._answer: asyncio.Task[None] | None = None
        self._answer_id = ""
        self._told = 0.0

    async def run(self) -> None:
        """Until the client goes or keeps silent; whatever happens, its answer is ended."""
        try:
            while True:
                async with asyncio.timeout(self._limits.idle_seconds):
                    message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                await self._take(message)
        except TimeoutError:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await self._socket.close(1001, "no frame or question arrived for too long")
        except WebSocketDisconnect:
            return
        finally:
            await self._end()

    async def _take(self, message: Mapping[str, Any]) -> None:
        asked: dict[str, Any] = {}
        try:
            if (frame := message.get("bytes")) is not None:
                self._check_started()
                self._window.add(frame)
                await self._tell()
            else:
                asked = openai.read_json(message["text"].encode("utf-8", "surrogatepass"))
                await self._command(asked)
        except (MiradaError, HttpError) as error:
            await self.say_error(error, asked.get("id"))

    def _check_started(self) -> None:
        if self._model is None:
            raise MessageError("nothing was started", 'send {"type": "start", "model": NAME} first')

    async def _command(self, asked: dict[str, Any]) -> None:
        kind = asked.get("type")
        if kind == "start":
            self._model = openai.check_model_name(asked, self._desk.names)
            await self._tell(always=True)
        elif kind == "question":
            self._check_started()
            self._ask(asked)
        elif kind == "stop":
            if asked.get("id") in (None, self._answer_id):
                await self._end()
        else:
            raise ParameterError(f"the message type {kind!r} is unknown", "send start, question or stop", param="type")

    def _ask(self, asked: dict[str, Any]) -> None:
        if self._answer and not self._answer.done():
            raise ParameterError("an answer is under way", 'wait for its done, or send {"type": "stop"}', param="id")
        gate, most = self._desk.gate, self._desk.settings.max_requests
        if gate.draining or gate.num_requests >= most:
            raise busy(f"{gate.num_requests} requests are under way", "max_requests")
        id, text, seconds = asked.get("id"), asked.get("text"), asked.get("seconds", 10)
        if not isinstance(id, str) or not 1 <= len(id) <= 128:
            raise ParameterError(f"id={str(id)[:80]!r} does not do", "give a text of 1 to 128 characters", param="id")
        if not isinstance(text, str) or not text.strip():
            raise ParameterError("the question has no text", "give some", param="text")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= self._limits.seconds:
            raise ParameterError(
                f"seconds={str(seconds)[:80]} does not do",
                f"give more than 0, at most {self._limits.seconds:g}",
                param="seconds",
            )
        rest = {name: value for name, value in asked.items() if name not in ("type", "id", "text", "seconds", "model")}
        request = self._request(text, float(seconds), rest)
        self._answer_id = id
        self._answer = asyncio.create_task(self._reply(id, text, request))

    def _request(self, text: str, seconds: float, rest: Mapping[str, Any]) -> chat.Asked:
        """The earlier turns as text, the frames, and the question: read by the same reader as a chat's body."""
        if "messages" in rest or rest.get("n", 1) != 1:
            name = "messages" if "messages" in rest else "n"
            raise ParameterError(f"{name} has no place in a live question", "leave it out", param=name)
        said = [part for turn in self._turns for part in turn]
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": one} for i, one in enumerate([*said, text])]
        body = {**rest, "model": self._model, "messages": messages}
        asked = chat.read(body, self._desk, self._socket.scope["mirada.tenant"])
        frames, fps = self._window.last(seconds)
        rest = self._desk.settings.completed(rest)
        bounds = {name: rest[name] for name in ("min_pixels", "max_pixels") if name in rest}
        question = Message("user", (Video(frames, fps=fps, **bounds), text))
        return replace(asked, chat=asked.chat._replace(messages=[*asked.chat.messages[:-1], question]))

    async def _reply(self, id: str, text: str, asked: chat.Asked) -> None:
        gate = self._desk.gate
        gate.num_requests += 1
        gate.empty.clear()
        try:
            await self._stream(id, text, asked)
        except MiradaError as error:
            await self.say_error(error, id)
        except WebSocketDisconnect:
            return  # nobody is there to be told; ``run`` hears of it too
        finally:
            gate.num_requests -= 1
            if not gate.num_requests:
                gate.empty.set()

    async def _stream(self, id: str, text: str, asked: chat.Asked) -> None:
        choices = await chat.submit(asked)
        token_bytes = chat.token_bytes(asked.vlm)
        chunks = openai.Chunks(
            id, int(time.time()), asked.name, True, asked.chat.sampling.logprobs is not None, token_bytes, False
        )
        said = ""
        try:
            choices.begin()
            while (news := await choices.next()) is not None:
                said += news[1].text
                for chunk in chunks.pieces(*news):
                    await self._say({"type": "delta", "id": id, "choices": chunk["choices"]})
            outputs = await choices.outputs()
        finally:
            choices.end()
        self._desk.metrics.note(asked.name, outputs[0])
        self._turns.append((text, said))
        await self._say({"type": "done", "id": id, "usage": chunks.usage(outputs)["usage"]})

    async def _end(self) -> None:
        if self._answer and not self._answer.done():
            self._answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._answer

    async def _tell(self, always: bool = False) -> None:
        now = time.monotonic()
        if always or now - self._told >= STATE_SECONDS:
            self._told = now
            held = {"frames": len(self._window), "seconds": round(self._window.seconds, 3), "bytes": self._window.num_bytes}
            await self._say({"type": "state", "model": self._model, **held})

    async def say_error(self, error: BaseException, id: Any = None) -> None:
        said = {"id": id} if isinstance(id, str) else {}
        await self._say({"type": "error", **said, **http_error(error).body})

    async def _say(self, message: Mapping[str, Any]) -> None:
        """Sends; a client that has gone, or does not read for too long, ends the session."""
        if self._socket.client_state is not WebSocketState.CONNECTED:
            raise WebSocketDisconnect(1006)
        try:
            async with asyncio.timeout(self._desk.settings.send_seconds):
                await self._socket.send_text(as_json(message).decode())
        except (TimeoutError, OSError, RuntimeError):
            raise WebSocketDisconnect(1006) from None
