"""From a chat to a sequence that the engine can run: prepare media, render, place, check that it fits the context."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import Any

from mirada.engine.load import Parts
from mirada.engine.sequence import Reply, Sequence
from mirada.errors import ContextOverflow, MessageError, SettingsError
from mirada.media.fetch import FetchLimits
from mirada.media.grid import Patches
from mirada.media.prepare import prepare_many
from mirada.models.positions import positions
from mirada.prompt.parse import Parser
from mirada.prompt.render import Tools
from mirada.records.wire import messages_from_openai
from mirada.types import Chat, Image, Message, Prompt, Sampling, Thinking, Usage, Video


class Requests:
    """Makes sequences for one model. Holds nothing that changes."""

    def __init__(self, parts: Parts, limits: FetchLimits) -> None:
        self.parts = parts
        self.limits = limits

    def make(
        self, chat: Chat | Prompt, sampling: Sampling, thinking: Thinking, media: Seq[Patches] = (), tools: Tools | None = None
    ) -> Sequence:
        """Raises MediaError, MessageError, SettingsError or ContextOverflow."""
        began = time.perf_counter()
        if isinstance(chat, Prompt):
            prompt, patches = chat, tuple(media)
        else:
            messages = check_chat(chat, thinking)
            wanted = [part for message in messages for part in message.parts if isinstance(part, Image | Video)]
            patches = tuple(prepare_many(wanted, self.parts.rule, self.limits))
        prepared = time.perf_counter()
        if not isinstance(chat, Prompt):
            prompt = self.parts.renderer.render(messages, patches, thinking=thinking, tools=tools)
        self._check(prompt, patches)
        where, following = positions(len(prompt.tokens), prompt.spans)
        sequence = Sequence(
            prompt=prompt,
            sampling=sampling,
            reply=self._reply(sampling),
            media=patches,
            positions=where,
            first_position=following,
            usage=usage(prompt, patches),
            limit=min(sampling.max_tokens, self.parts.context - len(prompt.tokens)),
            born=began,
        )
        sequence.spent("prepare", prepared - began)
        sequence.spent("render", time.perf_counter() - prepared)
        return sequence

    def _reply(self, sampling: Sampling) -> Reply:
        renderer = self.parts.renderer
        return Reply(renderer.tokenizer.decoder(), Parser(renderer.format), sampling.stop)

    def _check(self, prompt: Prompt, media: Seq[Patches]) -> None:
        num_tokens, vocabulary = len(prompt.tokens), self.parts.model.config.text.vocab_size
        if not num_tokens:
            raise MessageError("the prompt has no tokens", "give at least one message")
        if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < vocabulary:
            raise MessageError(
                f"the prompt has a token outside the vocabulary of {vocabulary}", "render it for this very model"
            )
        if num_tokens >= self.parts.context:
            visual = sum(span.num_tokens for span in prompt.spans)
            raise ContextOverflow(
                f"the prompt has {num_tokens} tokens ({visual} of them visual), and the model's context holds"
                f" {self.parts.context} with the answer",
                "shorten the text, or lower max_pixels (for a video also fps, or total_pixels)",
                needed=num_tokens + 1,
                available=self.parts.context,
                unit="tokens",
            )
        given = sum(t * h * w for patches in media for t, h, w in patches.grids)
        expected = sum(t * h * w for t, h, w in (span.grid for span in prompt.spans))
        if given != expected:
            raise MessageError(
                f"the prompt has spans for {expected} patches, and {given} patches of media are given",
                "give the prepared media that the prompt was rendered with",
            )


def check_chat(chat: Any, thinking: Any) -> list[Message]:
    """The chat as messages (mappings with role and content are taken too); MessageError says what is wrong with its form."""
    if thinking not in ("auto", "on", "off"):
        raise SettingsError(f"thinking={thinking!r} is unknown", "use 'auto', 'on' or 'off'")
    if isinstance(chat, str | bytes | Message) or not isinstance(chat, Seq):
        raise MessageError(f"a chat is given as a {type(chat).__name__}", 'give a list: [Message("user", ...)]')
    if not chat:
        raise MessageError("the chat has no messages", 'give at least one: [Message("user", "...")]')
    return messages_from_openai(chat)


def usage(prompt: Prompt, media: Seq[Patches]) -> Usage:
    """What the prompt uses; the completion is counted when it is there."""
    videos = [patches for patches in media if patches.kind == "video"]
    return Usage(
        prompt_tokens=len(prompt.tokens),
        image_tokens=sum(span.num_tokens for span in prompt.spans if span.kind == "image"),
        video_tokens=sum(span.num_tokens for span in prompt.spans if span.kind == "video"),
        num_frames=sum(patches.num_frames for patches in videos),
        timestamps=tuple(patches.timestamps or () for patches in videos),
    )
