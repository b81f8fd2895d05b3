"""Every exchange with a model in a log, and answers out of it later, without the model.

One line of JSON for each exchange: the request in canonical form, its SHA-256, and the answer or error. Files, bytes and
pictures stand in it by the hash of their content, so that a log fits another machine; addresses stand for themselves.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mirada import errors
from mirada.client.body import Tools, chat_to_body, options_to_body
from mirada.client.fake import ending, pieces
from mirada.client.handle import Growing, ReplyHandle
from mirada.errors import MessageError, MiradaError, NotRecorded, RemoteError
from mirada.media.limits import FetchLimits
from mirada.records.answer import annotation_from_openai, annotation_to_openai, media_from_openai, media_to_openai
from mirada.records.files import JsonLines
from mirada.records.wire import message_from_json, message_to_json
from mirada.types import Chat, Client, Logprob, Output, Prompt, Sampling, Thinking, Usage


class ReplayClient:
    """Implements ``types.Client``. With ``client`` what the log lacks is asked there and added; without, it is an Output with
    the error NotRecorded, which names the nearest request that the log holds.

    Requests are the same if messages, content of media, sampling and options are. The n-th time that a request is asked, it
    gets the n-th answer that was recorded; after the last, a request without chance (temperature 0, or a seed) gets that
    again, and any other is not recorded. Recorded errors are answers without ``client``, and are asked again with it.
    Raises MessageError for a log that cannot be read; a torn last line is repaired where the log is added to.
    """

    def __init__(self, path: str | Path, client: Client | None = None, limits: FetchLimits | None = None) -> None:
        self._client, self._limits = client, limits or FetchLimits()
        self._lock = threading.Lock()
        self._served: dict[str, int] = defaultdict(int)
        self._requests: dict[str, dict[str, Any]] = {}
        self._outputs: dict[str, list[Output]] = defaultdict(list)
        self._lines = JsonLines(path) if client is not None else None
        for number, line in enumerate(_read(Path(path)), 1):
            self._take(line, f"{path}:{number}")

    def __enter__(self) -> ReplayClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the log."""
        if self._lines is not None:
            self._lines.close()

    def submit(
        self,
        chat: Chat | Prompt,
        sampling: Sampling | None = None,
        *,
        thinking: Thinking = "auto",
        tools: Tools | None = None,
        adapter: str | None = None,
    ) -> ReplyHandle:
        sampling, reply = sampling or Sampling(), Growing()
        given = options_to_body(thinking, tools, adapter)
        try:
            request = canonical(chat, sampling, given, self._limits)
            key = request_key(request)
            output = self._recorded(key, request, sampling)
        except MiradaError as error:
            output, request, key = Output(finish="error", error=error), {}, ""
        if output is not None:
            _say(reply, output)
            return ReplyHandle(reply)
        assert self._client is not None  # _recorded says so
        options: dict[str, Any] = {"thinking": thinking, "tools": tools, "adapter": adapter}
        options = {name: value for name, value in options.items() if value not in (None, "auto")}
        inner = self._client.submit(chat, sampling, **options)
        reply.stop = inner.cancel
        threading.Thread(target=self._follow, args=(inner, reply, key, request), name="mirada-record", daemon=True).start()
        return ReplyHandle(reply, self)

    def _recorded(self, key: str, request: dict[str, Any], sampling: Sampling) -> Output | None:
        """The answer in the log; None if the client is to be asked. Raises NotRecorded."""
        with self._lock:
            held, at = self._outputs.get(key, []), self._served[key]
            if self._client is not None:
                held = [output for output in held if output.error is None]
            if held and (sampling.temperature == 0 or sampling.seed is not None):
                at = min(at, len(held) - 1)
            if at < len(held):
                self._served[key] += 1
                return held[at]
            if self._client is not None:
                return None
            if held:
                raise NotRecorded(
                    f"the log holds {len(held)} answers to this request, and it is asked for another",
                    "record more, or set a seed",
                )
            raise NotRecorded("the log holds no answer to this request", self._nearest(request))

    def _follow(self, inner: Any, reply: Growing, key: str, request: dict[str, Any]) -> None:
        """Pass an answer on as it comes, and write it down when it is whole."""
        try:
            for delta in inner:
                if delta.finish is None:
                    reply.publish(delta)
                else:
                    last = delta
        except MiradaError:
            pass  # it is in the output
        output: Output = inner.result()
        if output.finish != "cancelled":
            try:
                self._write(key, request, output)
            except Exception as error:  # a full disk, a closed log: what is not in the log must not pass for what is
                reply.fail(
                    RemoteError(f"the exchange cannot be written down ({error})", "make room, or correct the log's path")
                )
                return
        reply.usage, reply.metrics, reply.notes = output.usage, dict(output.metrics), output.notes
        reply.logprobs = output.logprobs is not None
        if output.error is not None:
            reply.fail(output.error)
        else:
            reply.publish(last)

    def _write(self, key: str, request: dict[str, Any], output: Output) -> None:
        value = {"key": key, "request": request, "output": output_to_json(output)}
        with self._lock:
            assert self._lines is not None
            self._lines.append_json(value)
            self._requests[key] = request
            self._outputs[key].append(output)
            self._served[key] = len(self._outputs[key])

    def _take(self, line: bytes, where: str) -> None:
        try:
            value = json.loads(line)
            key, request, output = value["key"], value["request"], output_from_json(value["output"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise MessageError(f"{where} is no exchange ({type(error).__name__}: {error})", "remove that line") from error
        if request_key(request) != key:
            raise MessageError(f"the request in {where} does not fit its key", "it was changed by hand: record it again")
        self._requests[key] = request
        self._outputs[key].append(output)

    def _nearest(self, request: dict[str, Any]) -> str:
        """What the log holds that is most like ``request``, and where it differs."""
        flat, end = _flat(request), json.dumps(request.get("messages"))[-400:]

        def alike(other: dict[str, Any]) -> float:
            there = _flat(other)
            same = sum(there.get(path) == value for path, value in flat.items())
            return same + difflib.SequenceMatcher(None, end, json.dumps(other.get("messages"))[-400:]).ratio()

        if not self._requests:
            return "it is empty: record with a client"
        key = max(self._requests, key=lambda key: alike(self._requests[key]))
        there = _flat(self._requests[key])
        first = min(path for path in flat.keys() | there.keys() if flat.get(path) != there.get(path))
        return f"the nearest, {key[:12]}, differs in {first}: {there.get(first)!r:.80} there, {flat.get(first)!r:.80} here"


def canonical(chat: Chat | Prompt, sampling: Sampling, options: Mapping[str, Any], limits: FetchLimits) -> dict[str, Any]:
    """A request as JSON that is the same whenever the request is. Raises MediaError, MessageError."""
    if isinstance(chat, Prompt):
        return {
            "prompt": list(chat.tokens),
            "spans": [asdict(span) | {"hash": span.hash.hex()} for span in chat.spans],
            "sampling": _settings(sampling),
            "options": dict(options),
        }
    messages = _hashed(chat_to_body(chat, limits))
    made = {"messages": messages, "sampling": _settings(sampling), "options": dict(options)}
    return json.loads(json.dumps(made))


def request_key(request: Mapping[str, Any]) -> str:
    """SHA-256 of a canonical request, in hex."""
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(sampling: Sampling) -> dict[str, Any]:
    default = Sampling()
    chosen = {f.name: value for f in fields(sampling) if (value := getattr(sampling, f.name)) != getattr(default, f.name)}
    if "logit_bias" in chosen:
        chosen["logit_bias"] = {str(token): bias for token, bias in sorted(chosen["logit_bias"].items())}
    return json.loads(json.dumps(chosen))


def _hashed(value: Any) -> Any:
    """``value`` with its ``data:`` URIs as hashes."""
    if isinstance(value, dict):
        return {name: _hashed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_hashed(item) for item in value]
    if isinstance(value, str) and value.startswith("data:") and ";base64," in value[:100]:
        return "sha256:" + hashlib.sha256(value.partition(",")[2].encode()).hexdigest()
    return value


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name, item in value.items() for k, v in _flat(item, f"{path}.{name}".lstrip(".")).items()}
    if isinstance(value, list) and value:
        return {k: v for index, item in enumerate(value) for k, v in _flat(item, f"{path}[{index}]").items()}
    return {path: value}


def output_to_json(output: Output) -> dict[str, Any]:
    """An output as JSON; ``output_from_json`` gives it back."""
    if output.error is not None:
        error = output.error
        return {"error": {"kind": type(error).__name__, "problem": error.problem, "fix": error.fix}}
    return {
        "message": message_to_json(output.message),
        "tokens": list(output.tokens),
        "logprobs": None if output.logprobs is None else [asdict(one) for one in output.logprobs],
        "finish": output.finish,
        "usage": asdict(output.usage) | {"media": [media_to_openai(one) for one in output.usage.media]},
        "metrics": dict(output.metrics),
        "notes": list(output.notes),
        "annotations": [annotation_to_openai(one) for one in output.annotations],
        "stop_reason": output.stop_reason,
        "raw": output.raw,
    }


def output_from_json(value: Mapping[str, Any]) -> Output:
    """The other way round. Raises KeyError, TypeError, ValueError for what is no output."""
    if "error" in value:
        said = value["error"]
        kind = getattr(errors, said["kind"], RemoteError)
        kind = kind if isinstance(kind, type) and issubclass(kind, MiradaError) else RemoteError
        if kind is errors.ParameterError:
            kind = errors.SettingsError
        return Output(finish="error", error=kind(str(said["problem"]), str(said["fix"])))
    logprobs = value["logprobs"]
    usage = dict(value["usage"])
    usage["timestamps"] = tuple(map(tuple, usage.get("timestamps", ())))
    usage["media"] = tuple(map(media_from_openai, usage.get("media", ())))
    return Output(
        message=message_from_json(value["message"]),
        tokens=tuple(value["tokens"]),
        logprobs=None if logprobs is None else tuple(_logprob(one) for one in logprobs),
        finish=value["finish"],
        usage=Usage(**usage),
        metrics=value["metrics"],
        notes=tuple(value["notes"]),
        annotations=tuple(map(annotation_from_openai, value.get("annotations", ()))),
        stop_reason=value.get("stop_reason"),
        raw=value["raw"],
    )


def _logprob(value: Mapping[str, Any]) -> Logprob:
    top = tuple((int(token), float(logprob)) for token, logprob in value["top"])
    return Logprob(value["token"], value["logprob"], top, tuple(value.get("texts", ())))


def _say(reply: Growing, output: Output) -> None:
    if output.error is not None:
        reply.fail(output.error)
        return
    reply.usage, reply.metrics, reply.notes = output.usage, dict(output.metrics), output.notes
    reply.logprobs = output.logprobs is not None
    for delta in pieces(output, 1 << 30):
        reply.publish(delta)
    reply.publish(ending(output))


def _read(path: Path) -> list[bytes]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise MessageError(f"the log {str(path)!r} cannot be read ({error})", "check the path") from error
    return [line for line in lines if line.endswith(b"\n")]
