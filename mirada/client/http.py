"""Any server that speaks OpenAI's ``/v1/chat/completions``, as a ``types.Client``.

One event loop in a thread of its own carries all requests of a client, so that cancelling one closes its connection at once
and a thousand in line cost nothing: media are read and encoded when a request's turn comes. Redirects are not followed and
proxies of the environment are not used, for the key would go along.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import ssl
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import httpx

from mirada import config
from mirada.client.body import Tools, chat_to_body, options_to_body, sampling_to_body
from mirada.client.handle import Growing, ReplyHandle, join
from mirada.client.loop import Loop
from mirada.client.reading import AnswerReader, CatchUp, excerpt, read_json
from mirada.client.retry import Retry
from mirada.client.sse import SSEParser
from mirada.client.status import Passing, refusal
from mirada.errors import (
    MiradaError,
    RemoteError,
    RemoteNotFound,
    RemoteTimeout,
    RemoteUnreachable,
    SettingsError,
    nearest,
)
from mirada.media.limits import FetchLimits
from mirada.types import Chat, Delta, Prompt, Sampling, Thinking

KEY_VARIABLE = "MIRADA_API_KEY"
_MOST_ERROR = 64 << 10
_MOST_WHOLE = 64 << 20


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; None waits for ever."""

    connect: float | None = 10.0
    first_token: float | None = 600.0
    """From sending to the first piece of the answer: the server's queue and prompt included. Of a whole reply
    (``stream=False``): to all of it."""
    between: float | None = 120.0
    """From one piece of the answer to the next; bytes that are no piece do not count."""
    total: float | None = None
    """All attempts of a request and the pauses between them, from when its turn comes."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise SettingsError(f"timeout {field.name}={value!r} is no time", "give seconds above 0, or None for no limit")


class HttpClient:
    """Asks a server. Implements ``types.Client``; safe to use from several threads and event loops.

    ``base_url``: ``http://host:8000/v1`` (``/v1`` is added to a bare host). ``api_key``: else the variable MIRADA_API_KEY.
    ``model``: as the server names it; None takes the only one it has. ``timeout``: ``Timeouts``, or a number of seconds for the
    whole request. ``retries``: a number of further attempts, or ``Retry``. ``max_in_flight``: requests that are under way
    at once; others wait here. ``stream=False`` asks for whole replies. ``inline_urls`` fetches media here (within
    ``limits``) instead of leaving it to the server. ``extra``: fields of every body beside those of Sampling; None takes one
    out. ``headers``: beside the usual ones. ``trust_env``: use proxies and certificates that the environment names.
    Raises SettingsError. What goes wrong later is the ``error`` of the Output.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        model: str | None = None,
        *,
        timeout: Timeouts | float | None = None,
        retries: Retry | int = 4,
        max_in_flight: int = 16,
        stream: bool = True,
        inline_urls: bool = False,
        limits: FetchLimits | None = None,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        trust_env: bool = False,
    ) -> None:
        if isinstance(max_in_flight, bool) or not isinstance(max_in_flight, int) or max_in_flight < 1:
            raise SettingsError(f"max_in_flight={max_in_flight!r} lets nothing through", "give a whole number of at least 1")
        self.base_url = _base(base_url)
        self.model = model
        self._key = _checked_key(api_key if api_key is not None else config.env(KEY_VARIABLE))
        self.timeouts = timeout if isinstance(timeout, Timeouts) else Timeouts(total=timeout)
        self.retry = retries if isinstance(retries, Retry) else Retry(retries)
        self._stream, self._inline, self._limits = stream, inline_urls, limits or FetchLimits()
        self._extra = dict(extra or {})
        self._slots = asyncio.Semaphore(max_in_flight)
        self._naming = asyncio.Lock()
        given = {"User-Agent": "mirada", "Accept-Encoding": "identity", **(headers or {})}
        self._web = httpx.AsyncClient(
            headers=given | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            timeout=httpx.Timeout(None, connect=self.timeouts.connect),
            limits=httpx.Limits(max_connections=max_in_flight + 1, max_keepalive_connections=max_in_flight),
            follow_redirects=False,
            trust_env=trust_env,
            verify=trust_env or (_tls() if self.base_url.startswith("https") else False),
        )
        self._loop = Loop(self._web)
        self._end = weakref.finalize(self, self._loop.end)

    def __repr__(self) -> str:
        return f"HttpClient({self.base_url!r}, model={self.model!r})"

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all requests, as ``cancelled``, and close the connections. Nothing can be asked any more."""
        self._end()

    def models(self, timeout: float | None = 30.0) -> list[str]:
        """The names of the server's models. Raises RemoteError and its kinds."""
        return self._loop.wait(self._models(timeout))

    def submit(
        self,
        chat: Chat | Prompt,
        sampling: Sampling | None = None,
        *,
        thinking: Thinking = "auto",
        tools: Tools | None = None,
        adapter: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> ReplyHandle:
        """Start a request; returns at once. Bad input and failures do not raise here: the handle carries them. ``extra``:
        further fields of this body, such as ``response_format``."""
        sampling = sampling or Sampling()

        def body() -> bytes:
            fields = {
                "model": self.model,
                "messages": chat_to_body(chat, self._limits, self._inline),
                **({"stream": True, "stream_options": {"include_usage": True}} if self._stream else {}),
                **sampling_to_body(sampling),
                **options_to_body(thinking, tools, adapter),
                **self._extra,
                **(extra or {}),
            }
            return _encode({name: value for name, value in fields.items() if value is not None})

        return self._start(body)

    def send(self, body: Mapping[str, Any]) -> ReplyHandle:
        """Start a request whose body is given as the server is to have it (``stream`` is set as this client reads, ``model`` if
        it is missing)."""

        def made() -> bytes:
            fields = {"model": self.model, **body, "stream": self._stream}
            if self._stream:
                fields["stream_options"] = {"include_usage": True}
            else:
                fields.pop("stream_options", None)
            return _encode(fields)

        return self._start(made)

    def _start(self, body: Callable[[], bytes]) -> ReplyHandle:
        reply = Growing()
        self._loop.start(lambda: self._work(reply, body), reply)
        return ReplyHandle(reply, self)

    async def _work(self, reply: Growing, make: Callable[[], bytes]) -> None:
        born = time.perf_counter()
        try:
            async with self._slots:
                reply.metrics["queued"] = time.perf_counter() - born
                async with asyncio.timeout(self.timeouts.total):
                    if self.model is None:
                        await self._choose_model()
                    await self._attempts(reply, await asyncio.to_thread(make), born)
        except MiradaError as error:
            reply.metrics["total"] = time.perf_counter() - born
            reply.fail(error)
        except TimeoutError:
            reply.fail(self._late("in all", "total", self.timeouts.total))

    async def _attempts(self, reply: Growing, body: bytes, born: float) -> None:
        for attempt in itertools.count():
            try:
                await self._once(reply, body, born)
                return
            except Passing as passing:
                error = passing.error
                pause = self.retry.pause(attempt, passing.after)
                if reply.deltas and not self.retry.after_tokens:
                    pause = None
                if pause is None:
                    raise _counted(error, attempt + 1, passing.after) from passing
            await asyncio.sleep(pause)

    async def _once(self, reply: Growing, body: bytes, born: float) -> None:
        """One attempt. Raises Passing where another may do better, MiradaError where not."""
        said = join(reply.deltas)
        progress = _Progress(reply, CatchUp(said), born)
        try:
            async with asyncio.timeout(self.timeouts.first_token) as clock:
                url, kind = f"{self.base_url}/chat/completions", {"Content-Type": "application/json"}
                async with self._web.stream("POST", url, content=body, headers=kind) as answer:
                    if answer.status_code != 200:
                        raise await self._refused(answer)
                    read = self._read_stream if self._stream else self._read_whole
                    await read(answer, progress, clock)
        except httpx.HTTPError as error:
            raise self._broken(error) from error
        except TimeoutError as error:
            if isinstance(error, MiradaError):
                raise
            raise self._stalled(progress.begun) from None
        progress.end()

    async def _read_stream(self, answer: httpx.Response, progress: _Progress, clock: asyncio.Timeout) -> None:
        await self._check_kind(answer, "text/event-stream")
        parser, chunks = SSEParser(), answer.aiter_bytes()
        async for chunk in chunks:
            for event in parser.feed(chunk):
                if event.data.strip() == "[DONE]":
                    await _drain(chunks)
                    return
                value = read_json(event.data)
                if value.get("error"):
                    raise self._said(refusal(_status(value), {}, event.data.encode(), self._name))
                if progress.take(value):
                    between = self.timeouts.between
                    clock.reschedule(None if between is None else asyncio.get_running_loop().time() + between)
        if progress.reader.finish is None:
            raise Passing(RemoteError(f"{self._name} broke off in the middle of its answer", "ask again"))

    async def _read_whole(self, answer: httpx.Response, progress: _Progress, _: asyncio.Timeout) -> None:
        await self._check_kind(answer, "application/json")
        body = await _at_most(answer, _MOST_WHOLE)
        if body is None:
            raise RemoteError(f"{self._name} sent more than {_MOST_WHOLE} bytes", "check that it speaks OpenAI's API")
        value = read_json(body)
        if value.get("error"):
            raise self._said(refusal(_status(value), {}, body, self._name))
        progress.whole(value)

    async def _check_kind(self, answer: httpx.Response, wanted: str) -> None:
        kind = answer.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() == wanted:
            return
        begin = self._hide(excerpt(await _at_most(answer, _MOST_ERROR, cut=True) or b""))
        raise RemoteError(
            f"{self._name} sent {kind or 'no content type'!r} where {wanted!r} was asked for: {begin}",
            "check that the address is that of an OpenAI-compatible API",
        )

    async def _refused(self, answer: httpx.Response) -> Exception:
        body = await _at_most(answer, _MOST_ERROR, cut=True) or b""
        error = self._said(refusal(answer.status_code, answer.headers, body, self._name))
        if isinstance(error, RemoteNotFound) and self.model:
            with contextlib.suppress(MiradaError, Passing):  # the list only makes the message better
                known = await self._models(10.0)
                if self.model not in known:
                    fix = nearest(self.model, known)
                    return RemoteNotFound(f"{self._name} has no model {self.model!r}", fix, status=404)
        return error

    async def _choose_model(self) -> None:
        async with self._naming:
            if self.model is None:
                known = await self._models(30.0)
                if len(known) != 1:
                    raise SettingsError(f"{self._name} has {len(known)} models", f"name one: {', '.join(known) or 'none'}")
                self.model = known[0]

    async def _models(self, seconds: float | None) -> list[str]:
        try:
            async with asyncio.timeout(seconds), self._web.stream("GET", f"{self.base_url}/models") as answer:
                body = await _at_most(answer, _MOST_WHOLE, cut=True) or b""
        except httpx.HTTPError as error:
            raise self._broken(error).error from error
        except TimeoutError:
            raise self._late("to list its models", "", seconds) from None
        if answer.status_code != 200:
            error = self._said(refusal(answer.status_code, answer.headers, body, self._name))
            raise error.error if isinstance(error, Passing) else error
        try:
            return [str(one["id"]) for one in read_json(body)["data"]]
        except (KeyError, TypeError) as error:
            raise RemoteError(f"{self._name} lists its models in no known form", "name the model") from error

    @property
    def _name(self) -> str:
        return f"the server at {self.base_url}"

    def _hide(self, text: str) -> str:
        """``text`` without the key: servers like to repeat it."""
        return text.replace(self._key, "***") if self._key else text

    def _said(self, error: Exception) -> Exception:
        inner = error.error if isinstance(error, Passing) else error
        if isinstance(inner, MiradaError):
            inner.problem = self._hide(inner.problem)
            inner.args = (inner.problem, inner.fix)
        return error

    def _broken(self, error: httpx.HTTPError) -> Passing:
        why = self._hide(str(error)) or type(error).__name__
        if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
            return Passing(self._late("to connect to", "connect", self.timeouts.connect))
        if isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol | httpx.ProxyError):
            fix = "check the address, and that the server runs; proxies of the environment are not used"
            return Passing(RemoteUnreachable(f"{self._name} cannot be reached ({why})", fix))
        return Passing(RemoteError(f"{self._name} broke off ({why})", "ask again; the server's own log says more"))

    def _late(self, what: str, name: str, seconds: float | None) -> RemoteTimeout:
        fix = f"wait longer (Timeouts.{name}), or ask less" if name else "try again later"
        return RemoteTimeout(f"{self._name} took more than {seconds:g} s {what}", fix)

    def _stalled(self, begun: bool) -> RemoteTimeout:
        if begun:
            return self._late("from one piece of its answer to the next", "between", self.timeouts.between)
        return self._late("to begin its answer", "first_token", self.timeouts.first_token)


class _Progress:
    """One attempt's answer on its way into the reply."""

    def __init__(self, reply: Growing, catch_up: CatchUp, born: float) -> None:
        self.reply, self.reader, self._catch_up, self._born = reply, AnswerReader(), catch_up, born
        self.begun = False

    def take(self, value: dict[str, Any]) -> bool:
        """Read one chunk; whether it holds a piece of the answer."""
        fragments = self.reader.num_fragments
        delta = self.reader.chunk(value)
        self._publish(delta)
        held = bool(delta.text or delta.reasoning or delta.tokens or self.reader.num_fragments > fragments)
        self.begun = self.begun or held
        return held

    def whole(self, value: dict[str, Any]) -> None:
        self._publish(self.reader.completion(value))

    def end(self) -> None:
        """Publish the last piece. RemoteError if the answer is not whole."""
        last = self._catch_up.rest(self.reader.close())
        self.reply.usage = self.reader.usage
        self.reply.logprobs = self.reader.logprobs
        self.reply.metrics["total"] = time.perf_counter() - self._born
        self.reply.publish(last)

    def _publish(self, delta: Delta) -> None:
        delta = self._catch_up.rest(delta)
        if delta != Delta():
            self.reply.metrics.setdefault("first_token", time.perf_counter() - self._born)
            self.reply.publish(delta)


async def _at_most(answer: httpx.Response, most: int, cut: bool = False) -> bytes | None:
    """The body; of a longer one its beginning (``cut``) or None."""
    body = bytearray()
    async for chunk in answer.aiter_bytes():
        body += chunk
        if len(body) > most:
            return bytes(body[:most]) if cut else None
    return bytes(body)


async def _drain(chunks: Any) -> None:
    """Read the end of a body whose last event is known, so that the connection can be used again."""
    with contextlib.suppress(httpx.HTTPError, TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(1):
            await anext(chunks)


def _status(value: Mapping[str, Any]) -> int:
    """The status that an error inside a stream stands for (vLLM writes it as its code)."""
    error = value["error"]
    code = error.get("code") or error.get("status") if isinstance(error, Mapping) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 400 if _is_invalid(error) else 500


def _is_invalid(error: Any) -> bool:
    return isinstance(error, Mapping) and "invalid" in str(error.get("type", "")).lower()


def _counted(error: MiradaError, attempts: int, after: float | None) -> MiradaError:
    if attempts > 1:
        error.problem += f" ({attempts} attempts)"
    if after is not None:
        error.problem += f" (it asks to wait {after:.0f} s)"
    error.args = (error.problem, error.fix)
    return error


def _encode(body: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # ValueError: NaN, or half a surrogate pair
        raise SettingsError(f"the request cannot be written as JSON ({error})", "correct its fields") from error


def _base(url: str) -> str:
    try:
        parsed = httpx.URL(url)
        usable = parsed.scheme in ("http", "https") and bool(parsed.host) and 0 < (parsed.port or 80) < 65536
    except (httpx.InvalidURL, TypeError, UnicodeError) as error:
        raise SettingsError(f"the server's address is none ({error})", "write http://host:port/v1") from error
    if parsed.userinfo or parsed.query:
        raise SettingsError("the server's address holds a user, password or query", "give the key as api_key")
    if not usable:
        raise SettingsError(f"the server's address {url!r} is no http address", "write http://host:port/v1")
    path = parsed.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parsed.scheme}://{parsed.netloc.decode()}{path or '/v1'}"


def _checked_key(key: str | None) -> str | None:
    key = (key or "").strip()
    if any(not 32 < ord(c) < 127 for c in key):
        raise SettingsError("the API key holds characters that no key has", "give it without quotes or line ends")
    return key or None


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)  # reads all certificates: a tenth of a second
