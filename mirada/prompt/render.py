"""The one renderer: chat -> Prompt(tokens, spans, learn), for asking as for training.

The template runs over text whose control strings are disarmed (``marks``); its output is cut at the control strings that
the template itself wrote; placeholders grow to as many tokens as the media have; the text between two control strings
is encoded in one go, as ``tokenizers`` does, so that merges across newlines are those of the model's training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirada.errors import CheckpointError, MessageError
from mirada.media.grid import Patches
from mirada.prompt.expand import Expander
from mirada.prompt.format import PromptFormat
from mirada.prompt.marks import Marks, parse_arguments
from mirada.prompt.rendered import Rendered
from mirada.prompt.template import Template
from mirada.prompt.tokenizer import Tokenizer
from mirada.table import nearest
from mirada.types import Chat, Image, Message, Prompt, Span, Text, Thinking, ToolCall, Video

Tools = Sequence[Mapping[str, Any]]
MAX_CHARS = 4 * 1024 * 1024
"""Characters of a chat, far above what any context holds."""


class Renderer:
    """Renders chats for one checkpoint. Immutable and safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer, template: Template, form: PromptFormat) -> None:
        self.tokenizer, self.template, self.format = tokenizer, template, form
        self._expander = Expander(tokenizer, form)

    @classmethod
    def from_directory(cls, path: str | Path, form: PromptFormat) -> Renderer:
        """Tokenizer and template of a checkpoint's folder. Raises CheckpointError, also where the family's own template would
        write turns that the vocabulary does not know."""
        tokenizer, template = Tokenizer.from_directory(path), Template.from_directory(path, form)
        if template.source == form.template and form.turn_end not in tokenizer.control:
            raise CheckpointError(
                f"the vocabulary in {path} has no token {form.turn_end!r}, with which {template.origin} ends turns",
                "put the chat template of the model's release beside its tokenizer (chat_template.jinja)",
            )
        return cls(tokenizer, template, form)

    def render(
        self,
        messages: Chat,
        media: Sequence[Patches] = (),
        *,
        thinking: Thinking = "auto",
        add_vision_id: bool = False,
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
    ) -> Prompt:
        """``media``: one Patches per Image and Video of the chat, in order.

        ``learn`` holds for what an assistant wrote and for the token that ends its turn. ``add_vision_id`` numbers
        pictures and videos in the text. Raises MessageError (placeholders and media differ, no user text to put a thinking
        mode on) and CheckpointError (template or vocabulary).
        """
        text, marks = self._run(messages, thinking, add_vision_id, add_generation_prompt, tools)
        parts = [part for message in messages for part in message.parts if isinstance(part, Image | Video)]
        self._expander.check(parts, media)
        made = _Build(list(media))
        turns = self._turns(text, sum(message.role == "assistant" for message in messages))
        at = 0
        for piece, token in self.tokenizer.split(text):
            self._add(made, marks, piece, token, at, turns)
            at += len(piece)
        self._expander.check_written(made.written, parts, self.template.origin)
        return Prompt(tuple(made.tokens), tuple(made.spans), tuple(made.learn))

    def text(
        self,
        messages: Chat,
        *,
        thinking: Thinking = "auto",
        add_vision_id: bool = False,
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
    ) -> Rendered:
        """The rendered chat as text, one placeholder per picture or video: to read, or to give to ``encode``."""
        text, marks = self._run(messages, thinking, add_vision_id, add_generation_prompt, tools)
        return Rendered(text, marks)

    def encode(self, text: str, images: Iterator[Patches], videos: Iterator[Patches]) -> Prompt:
        """Rendered text -> Prompt, without ``learn``; the next picture or video is taken for each placeholder.

        As safe as ``render`` for what ``text`` returned. Every control string in a plain ``str`` becomes its token. Raises
        MessageError for a placeholder without media.
        """
        disarmed, show = (text.disarmed, text.marks.show) if isinstance(text, Rendered) else (text, str)
        made = _Build([])
        for piece, token in self.tokenizer.split(disarmed):
            kind = None if token is None else self._expander.kinds.get(token)
            if kind is not None:
                number = len(made.patches)
                patches = next(images if kind == "image" else videos, None)
                if patches is None:
                    raise MessageError(
                        f"the text has a placeholder ({piece}) for {kind} {number + 1}, and none is left",
                        f"give one of the {kind}s for each placeholder, in order",
                    )
                made.patches.append(patches)
                made.media(kind, self._expander)
            else:
                made.tokens += self.tokenizer.encode(show(piece)) if token is None else (token,)
        return Prompt(tuple(made.tokens), tuple(made.spans))

    def _run(
        self, messages: Chat, thinking: Thinking, add_vision_id: bool, add_generation_prompt: bool, tools: Tools | None
    ) -> tuple[str, Marks]:
        try:
            return self._run_once(messages, thinking, add_vision_id, add_generation_prompt, tools)
        except RecursionError:
            raise MessageError("tools or arguments of the chat are nested too deeply", "send flatter ones") from None

    def _run_once(
        self, messages: Chat, thinking: Thinking, add_vision_id: bool, add_generation_prompt: bool, tools: Tools | None
    ) -> tuple[str, Marks]:
        if not messages:
            raise MessageError("the chat is empty", 'give at least one message, such as Message("user", "...")')
        suffixes: dict[str, str] = dict(self.format.thinking_suffix)
        if thinking not in suffixes:
            raise MessageError(f"the thinking mode {thinking!r} is unknown", nearest(str(thinking), suffixes))
        messages = _suffixed(messages, suffixes[thinking], thinking)
        size = sum(map(len, _texts(messages, tools, "")))
        if size > MAX_CHARS:
            raise MessageError(f"the chat holds {size} characters", f"a chat may hold {MAX_CHARS}; send less text")
        marks = Marks(self.tokenizer.control, self.format.assistant_strings, _texts(messages, tools, self.template.source))
        variables = {"add_generation_prompt": add_generation_prompt, "add_vision_id": add_vision_id}
        if tools:
            if not self.template.knows("tools"):
                raise MessageError(f"{self.template.origin} has no place for tools", "use a model whose template takes tools")
            variables["tools"] = marks.hide_json(list(tools))
        rows = [self._row(message, marks) for message in messages]
        return marks.settle(self.template.render(rows, **variables)), marks

    def _row(self, message: Message, marks: Marks) -> dict[str, Any]:
        """A message in the form that templates know."""
        row: dict[str, Any] = {"role": message.role}
        hide = marks.hide_assistant if message.role == "assistant" else marks.hide
        parts: list[str | dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, Text):
                parts.append(hide(part.text))
            elif isinstance(part, Image | Video):
                # Sources (names, addresses, bytes) are no part of a prompt: templates ask only for the key.
                kind = "image" if isinstance(part, Image) else "video"
                parts.append({"type": kind, kind: kind})
        if message.tool_call_id is not None:
            row["tool_call_id"] = marks.hide(message.tool_call_id)
        if message.reasoning:
            self._reason(row, parts, marks.hide(message.reasoning))
        if message.tool_calls:
            self._call(row, parts, message.tool_calls, marks)
        if all(isinstance(part, str) for part in parts):
            return row | {"content": "".join(map(str, parts))}
        return row | {"content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}

    def _reason(self, row: dict[str, Any], parts: list[Any], reasoning: str) -> None:
        if self.template.knows("reasoning_content"):
            row["reasoning_content"] = reasoning
            return
        think, answer = self.format.think, self.format.answer
        if any(parts):
            parts[:] = [think.open + reasoning + think.close + answer.open, *parts, answer.close]
        else:
            parts[:] = [think.open + reasoning + think.close]

    def _call(self, row: dict[str, Any], parts: list[Any], calls: Sequence[ToolCall], marks: Marks) -> None:
        functions = [
            {"name": marks.hide(call.name), "arguments": marks.hide_json(parse_arguments(call.arguments))} for call in calls
        ]
        if self.template.knows("tool_calls"):
            row["tool_calls"] = [
                {"type": "function", "id": marks.hide(call.id), "function": function}
                for call, function in zip(calls, functions, strict=True)
            ]
            return
        tags = self.format.tool_call
        if not tags.open:
            raise MessageError("this model's chats hold no tool calls", "leave them out, or use a model that calls tools")
        for function in functions:
            lead = "\n" if parts else ""
            parts.append(f"{lead}{tags.open}\n{call_json(function['name'], function['arguments'])}\n{tags.close}")

    def _turns(self, text: str, expected: int) -> list[tuple[int, int]]:
        """Where assistants' turns lie in the rendered text: (start, end) with the end token, in order."""
        turns, start, end = [], self.format.assistant_start, self.format.turn_end
        at = text.find(start)
        while at >= 0:
            stop = text.find(end, at + len(start))
            if stop < 0:
                break
            turns.append((at + len(start), stop + len(end)))
            at = text.find(start, stop)
        if len(turns) != expected:
            raise CheckpointError(
                f"{self.template.origin} writes {len(turns)} assistant turns for {expected} assistant messages",
                f"the family writes them as {start!r} ... {end!r}; use the template of the model's release",
            )
        return turns

    def _add(self, made: _Build, marks: Marks, piece: str, token: int | None, at: int, turns: list[tuple[int, int]]) -> None:
        """Append one piece of the rendered text, which starts at character ``at``."""
        while made.turn < len(turns) and turns[made.turn][1] <= at:
            made.turn += 1
        begin, end = turns[made.turn] if made.turn < len(turns) else (len(piece) + at, 0)
        if token is None:
            shown = marks.show(piece)
            if begin <= at or begin >= at + len(piece):
                made.add(self.tokenizer.encode(shown), begin <= at < end)
            else:
                # A token across the border (two newlines in one) is not learnt: when asked, the model never chooses it.
                ids, starts = self.tokenizer.encode_offsets(shown)
                made.tokens += ids
                made.learn += [at + start >= begin for start in starts]
        elif (kind := self._expander.kinds.get(token)) is not None:
            made.media(kind, self._expander)
        else:
            made.add((token,), begin <= at < end and token not in self._expander.silent)


@dataclass
class _Build:
    """A prompt in the making."""

    patches: list[Patches]
    tokens: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    """Kind of every placeholder that the template wrote."""
    turn: int = 0

    def add(self, ids: Sequence[int], learn: bool) -> None:
        self.tokens += ids
        self.learn += [learn] * len(ids)

    def media(self, kind: str, expander: Expander) -> None:
        number = len(self.written)
        self.written.append(kind)
        if number < len(self.patches) and self.patches[number].kind == kind:
            ids, spans = expander.expand(self.patches[number], number, len(self.tokens))
            self.add(ids, False)
            self.spans += spans


def call_json(name: str, arguments: Any) -> str:
    """A tool call as models write it."""
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def _suffixed(messages: Chat, suffix: str, thinking: Thinking) -> Chat:
    """The chat with a thinking mode at the end of its last user text."""
    if not suffix:
        return messages
    at = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    if at < 0:
        raise MessageError(f"thinking={thinking!r} has no user message to stand in", 'add a Message("user", ...)')
    parts = list(messages[at].parts)
    last = max((index for index, part in enumerate(parts) if isinstance(part, Text)), default=-1)
    if last < 0:
        parts.append(Text(suffix))
    else:
        text = parts[last].text  # type: ignore[union-attr]
        parts[last] = Text(text if text.endswith(suffix) else text + suffix)
    changed = Message("user", parts, messages[at].reasoning, messages[at].tool_call_id)
    return [*messages[:at], changed, *messages[at + 1 :]]


def _texts(messages: Chat, tools: Tools | None, source: str) -> Iterator[str]:
    """Every text that goes into a rendering."""
    yield source
    if tools:
        yield repr(tools)
    for message in messages:
        yield message.reasoning
        yield message.tool_call_id or ""
        for part in message.parts:
            if isinstance(part, Text):
                yield part.text
            elif isinstance(part, ToolCall):
                yield from (part.name, part.arguments, part.id)
