"""The output items of ``/v1/responses`` as an answer grows, the events that tell of them, and the whole reply."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mirada.errors import MiradaError
from mirada.records.answer import (
    TokenBytes,
    annotation_to_openai,
    logprobs_to_openai,
    notes_to_openai,
    stop_reason_to_openai,
    usage_to_openai,
)
from mirada.serve import chat
from mirada.serve.errors import http_error
from mirada.serve.openai import tier_of
from mirada.types import Delta, Logprob, Output, Sampling, ToolCall


class Items:
    """Output items as they grow, and the events that tell of it. Feed every delta once, then ``close``.

    ``sampling``: what the answer was drawn by; None where another server chooses, and the response repeats what ``body``
    says. ``ends``: tokens that end an answer, which no ``logprobs`` of a text have. ``reasoning``: say what is thought too.
    """

    def __init__(
        self,
        id: str,
        model: str,
        sampling: Sampling | None,
        body: Mapping[str, Any],
        ends: Collection[int] = (),
        token_bytes: TokenBytes | None = None,
        reasoning: bool = True,
    ) -> None:
        self.id, self._model, self._sampling, self._body = id, model, sampling, body
        self._ends, self._token_bytes, self._reasoning = ends, token_bytes, reasoning
        self._created = int(time.time())
        self._done: list[dict[str, Any]] = []
        self._open: tuple[str, list[str]] | None = None
        """Kind of the item that grows (message, reasoning or call), and its text or arguments."""
        self._name = ""
        """Of the call that grows."""
        self._found: list[dict[str, Any]] = []
        """Boxes and points in the message that grows."""
        self._logprobs: list[dict[str, Any]] = []
        """Of the message that grows."""
        self._waiting: list[Logprob] = []
        """Those of tokens whose text is still to come."""
        self._told = 0
        """Characters of earlier messages."""
        self._cut = False
        self._number = -1

    def opening(self) -> bytes:
        """The first events."""
        whole = self.object(None)
        return self._event("response.created", response=whole) + self._event("response.in_progress", response=whole)

    def feed(self, delta: Delta) -> bytes:
        """What ``delta`` adds."""
        said = b""
        calls = list(delta.tool_calls)
        while calls and not calls[0].name:  # the rest of a call goes before what follows it
            said += self._call(calls.pop(0))
        if delta.reasoning and self._reasoning:
            said += self._grow("reasoning", delta.reasoning)
        logprobs = self._logprobs_of(delta)
        if delta.text:
            said += self._grow("message", delta.text, logprobs)
        self._found += [annotation_to_openai(one, self._told) for one in delta.annotations]
        for call in calls:
            said += self._call(call)
        self._cut = delta.finish in ("length", "repetition")
        return said

    def close(self) -> bytes:
        """The item that grew is whole, or cut off."""
        return self._close("incomplete" if self._cut else "completed")

    def _close(self, status: str = "completed") -> bytes:
        if self._open is None:
            return b""
        kind, texts = self._open
        self._open = None
        if kind == "call":
            return self._end_call("".join(texts), status)
        item = self._item(kind, "".join(texts), status)
        more: dict[str, Any] = {}
        if kind == "message":
            item["content"][0]["logprobs"] = self._logprobs
            more = {"logprobs": [_short(one) for one in self._logprobs]}
            # Beside the part, whose own annotations OpenAI's schema keeps for citations.
            item |= {"annotations": self._found} if self._found else {}
            self._found, self._logprobs, self._told = [], [], self._told + len("".join(texts))
        at, part = self._at(item), item["content"][0]
        name = "output_text" if kind == "message" else "reasoning_text"
        said = self._event(f"response.{name}.done", **at, content_index=0, text=part["text"], **more)
        said += self._event("response.content_part.done", **at, content_index=0, part=part)
        self._done.append(item)
        return said + self._event("response.output_item.done", output_index=at["output_index"], item=item)

    def ending(self, output: Output) -> bytes:
        """The last event, which holds the whole response."""
        whole = self.object(output)
        return self._event(f"response.{whole['status']}", response=whole)

    def failing(self, error: MiradaError) -> bytes:
        """An error in the middle."""
        found = http_error(error)
        failed = self.object(None) | {"status": "failed", "error": {"code": "server_error", "message": found.message}}
        return self._event("response.failed", response=failed)

    def object(self, output: Output | None) -> dict[str, Any]:
        """The response so far; whole where there is an ``output``."""
        body, drawn = self._body, _drawn(self._sampling, self._body)
        cut = output is not None and output.finish in ("length", "repetition")
        ended: dict[str, Any] = {}
        said = body.get("text") or {}
        if output is not None:
            ended = {"usage": _usage([output]), **stop_reason_to_openai(output), **notes_to_openai([output])}
        return {
            "id": self.id, "object": "response", "created_at": self._created, "model": self._model,
            "status": "in_progress" if output is None else "incomplete" if cut else "completed", "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "background": False,
            "instructions": body.get("instructions"), "max_output_tokens": body.get("max_output_tokens"),
            "output": list(self._done), "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **(body.get("reasoning") or {})}, "store": False,
            "temperature": drawn["temperature"],
            "text": {"format": {"type": "text"}, **said, **({"verbosity": "medium"} if "verbosity" in said else {})},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": [{"parameters": None, "strict": None, **tool} for tool in body.get("tools") or ()],
            "top_logprobs": drawn["top_logprobs"], "top_p": drawn["top_p"], "truncation": "disabled",
            "metadata": body.get("metadata") or {}, **tier_of(body), **ended,
        }  # fmt: skip

    def _logprobs_of(self, delta: Delta) -> list[dict[str, Any]]:
        """Those of the tokens of ``delta.text``, with tokens before it that said nothing yet."""
        ended = delta.finish in ("stop", "tool_calls")
        self._waiting += [one for one in delta.logprobs if not (ended and one.token in self._ends)]
        if delta.text:
            found = logprobs_to_openai(self._waiting, self._token_bytes)["content"]
            self._waiting = []
            return found
        if delta.reasoning or delta.tool_calls or (self._open is not None and self._open[0] != "message"):
            self._waiting = []  # of what is no text, or of the tag that closes it
        return []

    def _grow(self, kind: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> bytes:
        said = b""
        if self._open is not None and self._open[0] != kind:
            said += self._close()
        if self._open is None:
            self._open = (kind, [])
            item = self._item(kind, "", "in_progress")
            at = self._at(item)
            said += self._event("response.output_item.added", output_index=at["output_index"], item=item | {"content": []})
            said += self._event("response.content_part.added", **at, content_index=0, part=item["content"][0])
        self._open[1].append(text)
        self._logprobs += logprobs
        name = "output_text" if kind == "message" else "reasoning_text"
        more = {"logprobs": [_short(one) for one in logprobs]} if kind == "message" else {}
        at = self._at(self._item(kind, "", ""))
        return said + self._event(f"response.{name}.delta", **at, content_index=0, delta=text, **more)

    def _call(self, call: ToolCall) -> bytes:
        """A call begins, or goes on."""
        said = b""
        if call.name:
            said += self._close()
            self._open, self._name = ("call", []), call.name
            item = self._call_item("", "in_progress")
            said += self._event("response.output_item.added", output_index=len(self._done), item=item)
        assert self._open is not None
        self._open[1].append(call.arguments)
        if not call.arguments:
            return said
        at = self._at(self._call_item("", ""))
        return said + self._event("response.function_call_arguments.delta", **at, delta=call.arguments)

    def _end_call(self, arguments: str, status: str) -> bytes:
        item = self._call_item(arguments, status)
        at = self._at(item)
        said = self._event("response.function_call_arguments.done", **at, name=self._name, arguments=arguments)
        self._done.append(item)
        return said + self._event("response.output_item.done", output_index=at["output_index"], item=item)

    def _call_item(self, arguments: str, status: str) -> dict[str, Any]:
        number = len(self._done)
        return {
            "type": "function_call", "id": f"fc_{self.id[5:]}_{number}", "call_id": f"call_{self.id[5:]}_{number}",
            "name": self._name, "arguments": arguments, "status": status,
        }  # fmt: skip

    def _item(self, kind: str, text: str, status: str) -> dict[str, Any]:
        number = len(self._done)
        if kind == "message":
            part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
            head: dict[str, Any] = {"type": "message", "id": f"msg_{self.id[5:]}_{number}", "role": "assistant"}
        else:
            part = {"type": "reasoning_text", "text": text}
            head = {"type": "reasoning", "id": f"rs_{self.id[5:]}_{number}", "summary": []}
        return head | {"status": status, "content": [part]}

    def _at(self, item: Mapping[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._done)}

    def _event(self, kind: str, **said: Any) -> bytes:
        self._number += 1
        return chat.event({"type": kind, "sequence_number": self._number, **said}, kind)


def _drawn(sampling: Sampling | None, body: Mapping[str, Any]) -> dict[str, Any]:
    """What a response says of sampling."""
    if sampling is None:
        return {name: body.get(name) for name in ("temperature", "top_p")} | {"top_logprobs": body.get("top_logprobs") or 0}
    return {
        "temperature": sampling.temperature if sampling.temperature <= 2 else None,  # OpenAI's schema ends at 2
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "top_logprobs": min(sampling.logprobs or 0, 20),  # where OpenAI's schema ends
    }


def _short(one: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of logprobs as events have it."""
    top = [{"token": other["token"], "logprob": other["logprob"]} for other in one["top_logprobs"]]
    return {"token": one["token"], "logprob": one["logprob"], "top_logprobs": top}


def _usage(outputs: Sequence[Output]) -> dict[str, Any]:
    """As chat completions say it, under the names of this API."""
    told = usage_to_openai([output.usage for output in outputs])
    return {
        "input_tokens": told.pop("prompt_tokens"),
        "input_tokens_details": told.pop("prompt_tokens_details"),
        "output_tokens": told.pop("completion_tokens"),
        "output_tokens_details": told.pop("completion_tokens_details"),
        **told,
    }
