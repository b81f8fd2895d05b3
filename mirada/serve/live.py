"""Live video: ``/v1/live`` is a WebSocket that takes frames all the time and answers questions about the last seconds.

Messages are described by ``live.schema.json`` beside this file and in docs/serve.md, "Live video". The client sends ``start``
first; then binary messages, each 8 bytes of milliseconds (big endian) and a JPEG; ``question`` and ``stop`` whenever it likes.
The server sends ``state``, ``delta``, ``done``, ``stopped`` and ``error``.
After the streaming demo of Qwen2-VL, but with a window that is bounded in seconds, rate, frames and bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from mirada.errors import MessageError, MiradaError, ParameterError, nearest
from mirada.serve import chat, log, openai
from mirada.serve.errors import HttpError, as_json, http_error
from mirada.serve.guard import GONE, VALUE_BYTES, Ticket, aside, busy, stopping
from mirada.serve.stream import Pace
from mirada.serve.window import LiveLimits, Window
from mirada.types import Message, Output, Video

if TYPE_CHECKING:
    from fastapi import FastAPI

PROTOCOL = "mirada.live"
STATE_SECONDS = 1.0
"""Between two messages ``state``."""
PLACELESS = (
    "model", "messages", "stream", "stream_options", "request_id", "fps", "nframes", "mm_processor_kwargs", "media_io_kwargs",
)  # fmt: skip
"""Parameters of a chat that a question cannot have: ``start`` says the first two, every answer is streamed and has the
question's id, and frames are taken as they came (``min_pixels`` and ``max_pixels`` hold for them)."""


def mount_live(app: FastAPI, desk: chat.Desk) -> None:
    """Adds the WebSocket ``/v1/live``. Who may come in is the guard's."""
    limits = desk.settings.live
    under_way: set[Session] = set()
    desk.metrics.live_connections.set_function(lambda: len(under_way))
    desk.metrics.live_bytes.set_function(lambda: sum(session.window.num_bytes for session in under_way))

    async def live(socket: WebSocket) -> None:
        await socket.accept(subprotocol=PROTOCOL if PROTOCOL in socket.scope.get("subprotocols", ()) else None)
        session = Session(socket, desk, limits)
        if len(under_way) >= limits.connections:
            await session.refuse(busy(f"{len(under_way)} live connections are open", "live.connections"))
            return
        under_way.add(session)
        try:
            await session.run()
        finally:
            under_way.discard(session)

    app.router.add_websocket_route("/v1/live", live)


class Session:
    """One connection: its window, its conversation, and at most one answer under way."""

    def __init__(self, socket: WebSocket, desk: chat.Desk, limits: LiveLimits) -> None:
        self._socket, self._desk, self._limits = socket, desk, limits
        self._ticket: Ticket = socket.scope["mirada.ticket"]
        self.window = Window(limits)
        self._model: str | None = None
        self._system: str | None = None
        self._turns: deque[tuple[str, str]] = deque(maxlen=limits.turns)
        self._answer: asyncio.Task[None] | None = None
        self._answer_id = ""
        self._told = 0.0
        self._num_asked = 0

    async def refuse(self, error: HttpError) -> None:
        """Say why, and close: a page is told nothing of a connection that is not opened at all."""
        self._ticket.status = error.status
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await self._say_error(error)
            await self._socket.close(1013)

    async def run(self) -> None:
        """Until the client goes or keeps silent; whatever happens, its answer is ended."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self._limits.idle_seconds):
                        message = await self._socket.receive()
                except TimeoutError:
                    if self._answering:
                        continue
                    await self._socket.close(1001, "no frame or question arrived for too long")
                    return
                if message["type"] == "websocket.disconnect":
                    return
                await self._take(message)
        except (WebSocketDisconnect, RuntimeError):
            return
        finally:
            await self._end()
            self._ticket.facts |= {"questions": self._num_asked, "left_out": self.window.num_left_out}

    async def _take(self, message: Mapping[str, Any]) -> None:
        """One message. Whatever is wrong with it, and a defect of ours, is said; the connection lives on."""
        asked: dict[str, Any] = {}
        try:
            if (frame := message.get("bytes")) is not None:
                await self._frame(frame)
            else:
                asked = await self._read(message["text"])
                await self._command(asked)
        except WebSocketDisconnect:
            raise
        except Exception as error:
            self._note_defect(error)
            id = asked.get("id")  # with the id of an answer under way it would say that this one has ended
            await self._say_error(error, None if self._answering and id == self._answer_id else id)

    async def _frame(self, frame: bytes) -> None:
        try:
            self._check_started()
            kept = self.window.add(frame)
        except MiradaError:
            self._desk.metrics.live_frames.labels("refused").inc()
            raise
        self._desk.metrics.live_frames.labels("kept" if kept else "left_out").inc()
        if time.monotonic() - self._told >= STATE_SECONDS:
            await self._tell()

    async def _read(self, text: str) -> dict[str, Any]:
        values = sum(map(text.count, ",{["))
        if values > self._desk.settings.max_body_values:
            raise HttpError(400, "the message holds too many values (server setting max_body_values)", code="body_too_complex")
        self._ticket.held_bytes = len(text) + VALUE_BYTES * values
        return await aside(self._socket, openai.read_json, text.encode("utf-8", "surrogatepass"))

    def _note_defect(self, error: BaseException) -> None:
        if not isinstance(error, MiradaError | HttpError):
            log.event("defect", logging.ERROR, error, id=self._ticket.id, path="/v1/live")

    def _check_started(self) -> None:
        if self._model is None:
            raise MessageError("nothing was started", 'send {"type": "start", "model": NAME} first')

    async def _command(self, asked: dict[str, Any]) -> None:
        kind = asked.get("type")
        if kind == "start":
            await self._start(asked)
        elif kind == "question":
            self._check_started()
            await self._ask(asked)
        elif kind == "stop":
            _check_names(asked, ("type", "id"))
            if "id" not in asked or _id(asked) == self._answer_id:
                await self._stop()
        else:
            raise ParameterError(
                f"the message type {str(kind)[:80]!r} is unknown", "send start, question or stop", param="type"
            )

    async def _start(self, asked: dict[str, Any]) -> None:
        _check_names(asked, ("type", "model", "system", "messages"))
        model, system = openai.check_model_name(asked, self._desk.names), asked.get("system")
        if not isinstance(system, str | None):
            raise ParameterError("the system message is no text", "give a text, or leave it out", param="system")
        turns = _turns(asked["messages"]) if "messages" in asked else None
        await self._stop()
        self._model, self._system = model, system
        if turns is not None:
            self._turns = deque(turns, maxlen=self._limits.turns)
        await self._tell()

    async def _ask(self, asked: dict[str, Any]) -> None:
        if self._answering:
            raise ParameterError("an answer is under way", 'wait for its done, or send {"type": "stop"}', param="id")
        gate, most = self._desk.gate, self._desk.settings.max_requests
        if gate.draining:
            raise stopping()
        if gate.num_requests >= most:
            raise busy(f"{gate.num_requests} requests are under way", "max_requests")
        id, text, seconds = self._checked(asked)
        rest = {name: value for name, value in asked.items() if name not in ("type", "id", "text", "seconds")}
        request = await aside(self._socket, self._request, text, seconds, rest)
        self._answer_id = id
        self._num_asked += 1
        self._answer = asyncio.create_task(self._reply(id, text, request))

    def _checked(self, asked: Mapping[str, Any]) -> tuple[str, str, float]:
        """Id, text and seconds of a question. Raises ParameterError."""
        id, text, seconds = _id(asked), asked.get("text"), asked.get("seconds", min(10, self._limits.seconds))
        if not isinstance(text, str) or not text.strip():
            raise ParameterError("the question has no text", "give some", param="text")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= self._limits.seconds:
            raise ParameterError(
                f"seconds={str(seconds)[:80]} does not do",
                f"give more than 0, at most {self._limits.seconds:g}",
                param="seconds",
            )
        placeless = [name for name in PLACELESS if name in asked]
        if placeless or asked.get("n", 1) != 1:
            name = placeless[0] if placeless else "n"
            raise ParameterError(f"{name} has no place in a live question", "leave it out", param=name)
        return id, text, float(seconds)

    def _request(self, text: str, seconds: float, rest: Mapping[str, Any]) -> chat.Asked:
        """The conversation as text, the frames, and the question: read by the same reader as a chat's body."""
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for question, answer in self._turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        body = {**rest, "model": self._model, "messages": [*messages, {"role": "user", "content": text}]}
        asked = chat.read(body, self._desk, self._socket.scope["mirada.tenant"])
        frames, fps = self.window.last(seconds)
        rest = self._desk.settings.completed(rest)
        bounds = {name: rest[name] for name in ("min_pixels", "max_pixels") if name in rest}
        question = Message("user", (Video(frames, fps=fps, **bounds), text))
        return replace(asked, chat=asked.chat._replace(messages=[*asked.chat.messages[:-1], question]))

    async def _reply(self, id: str, text: str, asked: chat.Asked) -> None:
        """One answer. Whatever fails in it is said to its question, and ends nothing else."""
        gate, facts, began = self._desk.gate, {"number": self._num_asked, "model": asked.name}, time.perf_counter()
        gate.num_requests += 1
        gate.empty.clear()
        status = GONE  # cancelled: stopped, or nobody is there
        try:
            output = await self._stream(id, text, asked)
            usage, status = output.usage, 200
            facts |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        except WebSocketDisconnect:
            return  # nobody is there to be told; ``run`` hears of it too
        except Exception as error:
            self._note_defect(error)
            status = http_error(error).status
            with contextlib.suppress(WebSocketDisconnect):
                await self._say_error(error, id)
        finally:
            gate.num_requests -= 1
            if not gate.num_requests:
                gate.empty.set()
            self._desk.metrics.live_questions.labels(str(status)).inc()
            seconds = round(time.perf_counter() - began, 4)
            log.event("live_question", id=self._ticket.id, status=status, seconds=seconds, **facts)

    async def _stream(self, id: str, text: str, asked: chat.Asked) -> Output:
        choices = await chat.submit(asked)
        options, logprobs = asked.chat.options, asked.chat.sampling.logprobs is not None
        chunks = openai.Chunks(
            id, int(time.time()), asked.name, True, logprobs, chat.token_bytes(asked.vlm), options.return_token_ids,
            options.include_reasoning,
        )  # fmt: skip
        pace = Pace(self._desk.metrics.inter_token.labels(asked.name).observe)
        said = ""
        try:
            choices.begin()
            while (news := await choices.next()) is not None:
                said += news[1].text
                pace.piece(news[0])
                for chunk in chunks.pieces(*news):
                    await self._say({"type": "delta", "id": id, "choices": chunk["choices"]})
            outputs = await choices.outputs()
        finally:
            choices.end()
        self._desk.metrics.note(asked.name, outputs[0])
        self._turns.append((text, said))
        ignored = {"ignored": list(asked.chat.options.unknown)} if asked.chat.options.unknown else {}
        await self._say({"type": "done", "id": id, "usage": chunks.usage(outputs)["usage"], **ignored})
        return outputs[0]

    @property
    def _answering(self) -> bool:
        return self._answer is not None and not self._answer.done()

    async def _stop(self) -> None:
        if self._answering:
            await self._end()
            await self._say({"type": "stopped", "id": self._answer_id})

    async def _end(self) -> None:
        if self._answer and not self._answer.done():
            self._answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._answer

    async def _tell(self) -> None:
        self._told = time.monotonic()
        window = self.window
        await self._say({
            "type": "state", "request_id": self._ticket.id, "model": self._model, "frames": len(window),
            "seconds": round(window.seconds, 3), "bytes": window.num_bytes, "left_out": window.num_left_out,
            "turns": len(self._turns),
        })  # fmt: skip

    async def _say_error(self, error: BaseException, id: Any = None) -> None:
        said = {"id": id} if isinstance(id, str) and 1 <= len(id) <= 128 else {}
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


def _id(asked: Mapping[str, Any]) -> str:
    id = asked.get("id")
    if not isinstance(id, str) or not 1 <= len(id) <= 128:
        raise ParameterError(f"id={str(id)[:80]!r} does not do", "give a text of 1 to 128 characters", param="id")
    return id


def _check_names(asked: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if (unknown := next((name for name in asked if name not in known), None)) is not None:
        raise ParameterError(f"{asked['type']} has no {unknown!r}", nearest(unknown, known), param=unknown)


def _turns(messages: Any) -> list[tuple[str, str]]:
    """Questions with their answers. Raises ParameterError that names the message at fault."""
    if not isinstance(messages, list):
        raise ParameterError("messages is no list", "give the turns so far, or []", param="messages")
    for number, one in enumerate(messages):
        role = ("user", "assistant")[number % 2]
        if not isinstance(one, dict) or one.keys() != {"role", "content"} or one["role"] != role:
            raise ParameterError(
                f"messages[{number}] is no message of the {role}",
                'give {"role", "content"}, users and assistants in turns',
                param=f"messages[{number}]",
            )
        if not isinstance(one["content"], str):
            raise ParameterError(
                f"the content of messages[{number}] is no text", "give a text", param=f"messages[{number}].content"
            )
    if len(messages) % 2:
        raise ParameterError("the last of messages is no answer", "ask with a question", param="messages")
    said = [one["content"] for one in messages]
    return list(zip(said[::2], said[1::2], strict=True))
