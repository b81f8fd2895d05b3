"""From a chat to a sequence that the engine can run: prepare media, render, place, check that it fits the context."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import numpy as np

from mirada.engine.given import check_media, check_prompt, check_salt, check_tools
from mirada.engine.load import Parts
from mirada.engine.sequence import Reply, Sequence
from mirada.engine.thinking import ThinkingBudget
from mirada.engine.together import Outcome, Prepared, Together
from mirada.errors import ContextOverflow, MessageError, MiradaError, RequestFailed, SettingsError
from mirada.media.cache import PixelCache
from mirada.media.coords import View
from mirada.media.grid import Patches, content_key
from mirada.media.limits import FetchLimits
from mirada.media.named import prepare_named
from mirada.media.pool import Cancel, Pool
from mirada.media.prepare import prepare_many
from mirada.media.times import Times
from mirada.models.positions import positions
from mirada.prompt.ground import Grounder
from mirada.prompt.parse import Parser
from mirada.prompt.render import Tools
from mirada.records.wire import messages_from_openai
from mirada.types import ChatLike, Image, MediaUsage, Message, Prompt, Sampling, Thinking, Usage, Video

Finish = Callable[[Cancel | None], None]


class Requests:
    """Makes sequences for one model. Safe to use from several threads."""

    def __init__(self, parts: Parts, limits: FetchLimits, cache: PixelCache | None = None, pool: Pool | None = None) -> None:
        self.parts, self.limits, self.cache, self.pool = parts, limits, cache, pool

    def make(
        self,
        chat: ChatLike | Prompt,
        sampling: Sampling,
        thinking: Thinking,
        media: Seq[Patches] = (),
        tools: Tools | None = None,
    ) -> Sequence:
        """A whole sequence. Raises MediaError, MessageError, SettingsError, ContextOverflow or RequestFailed."""
        sequence, _, finish = self.begin(chat, sampling, thinking, media, tools)
        finish(None)
        return sequence

    def begin(
        self,
        chat: ChatLike | Prompt,
        sampling: Sampling,
        thinking: Thinking,
        media: Seq[Patches] = (),
        tools: Tools | None = None,
        salt: str = "",
        together: Together | None = None,
    ) -> tuple[Sequence, list[Image | Video], Finish]:
        """A sequence without a prompt yet, the media to prepare for it, and what makes it whole: to be called once, in any
        thread. Raises MessageError or SettingsError for a chat of no known form; ``finish`` raises as ``make``. What it makes,
        or fails of, ``together`` is told."""
        check_salt(salt)
        check_tools(tools)
        sequence = Sequence(Prompt(()), sampling, None, salt=salt)
        if isinstance(chat, Prompt):
            check_media(media, self.parts.rule.grid)
            given = [self._keyed(patches) for patches in media]
            return sequence, [], lambda cancel: self._fill(sequence, chat, given)
        messages = check_chat(chat, thinking)
        wanted = [part for message in messages for part in message.parts if isinstance(part, Image | Video)]

        def finish(cancel: Cancel | None) -> None:
            times = Times()
            outcome: Outcome = _unmade()
            try:
                patches = self._patches(wanted, salt, times, cancel)
                with times.stage("render"):
                    prompt = self.parts.renderer.render(messages, patches, thinking=thinking, tools=tools)
                made = Prepared(prompt, patches, (*notes(patches), *warnings(patches, self.parts.untrained)))
                self.fill(sequence, made)
                outcome = made
            except MiradaError as error:
                outcome = error
                raise
            finally:
                for stage, seconds in times.items():
                    sequence.spent(stage, seconds)
                if together is not None:
                    together.settle(outcome)

        return sequence, wanted, finish

    def _patches(self, wanted: list[Image | Video], salt: str, times: Times, cancel: Cancel | None) -> list[Patches]:
        """``wanted`` fetched, decoded and resized, those with names from what was kept under them. Raises MediaError."""

        def prepare(parts: Seq[Image | Video], most: int | None) -> list[Patches]:
            return prepare_many(
                parts, self.parts.rule, self.limits, cache=self.cache, pool=self.pool, cancel=cancel, times=times, salt=salt,
                most_tokens=most,
            )  # fmt: skip

        return prepare_named(wanted, prepare, self.parts.rule, self.cache, salt, self.limits, self.parts.context - 1)

    def fill(self, sequence: Sequence, made: Prepared) -> None:
        """Make ``sequence`` whole with what was prepared for it, or for another one of the same chat. Raises as ``make``."""
        sequence.notes = made.notes
        self._fill(sequence, made.prompt, made.media)

    def _keyed(self, patches: Patches) -> Patches:
        """With the key of its pixels: what a caller hands over may say anything, and caches believe it."""
        return replace(patches, key=content_key(patches.pixels, patches.kind, patches.grids, self.parts.rule.grid))

    def _fill(self, sequence: Sequence, prompt: Prompt, media: Seq[Patches]) -> None:
        self._check(prompt, media)
        self._check_ids(sequence.sampling)
        where, following = positions(len(prompt.tokens), prompt.spans)
        sequence.prompt, sequence.media = prompt, tuple(media)
        sequence.positions = where.astype(np.int32) if prompt.spans else None
        sequence.first_position = following
        sequence.reply = self._reply(sequence, media)
        sequence.thinking = ThinkingBudget(sequence.reply, sequence.sampling.thinking_budget, self._tag)
        sequence.usage = usage(prompt, media, self.parts.rule.grid.patch)
        sequence.limit = min(sequence.sampling.max_tokens, self.parts.context - len(prompt.tokens))

    def _reply(self, sequence: Sequence, media: Seq[Patches]) -> Reply:
        tokenizer, form = self.parts.renderer.tokenizer, self.parts.renderer.format
        views = [View.of(patches, self.parts.rule.grid.patch) for patches in media]
        grounder = Grounder(form, views) if views else None
        parser = Parser(form, kinds=sequence.kinds, most_calls=sequence.most_calls)
        sampling = sequence.sampling
        keep_stop = sampling.include_stop_str_in_output
        decoder = tokenizer.decoder(keep=form.tags)
        return Reply(decoder, parser, sampling.stop, grounder, least=sampling.min_tokens, keep_stop=keep_stop)

    def _tag(self, tag: str) -> list[int]:
        """A tag as the model writes it."""
        return self.parts.renderer.tokenizer.encode_control(tag)

    def _check_ids(self, sampling: Sampling) -> None:
        vocabulary = self.parts.model.config.text.vocab_size
        if sampling.logit_bias and max(sampling.logit_bias) >= vocabulary:
            raise SettingsError(
                f"logit_bias names token {max(sampling.logit_bias)}, and the vocabulary has {vocabulary}",
                "give token ids of this very model",
            )
        if max(sampling.stop_token_ids, default=0) >= vocabulary:
            raise SettingsError(
                f"stop_token_ids names token {max(sampling.stop_token_ids)}, and the vocabulary has {vocabulary}",
                "give token ids of this very model",
            )

    def _check(self, prompt: Prompt, media: Seq[Patches]) -> None:
        config = self.parts.model.config
        check_prompt(prompt, config.text.vocab_size, self.parts.rule.grid.merge)
        num_tokens = len(prompt.tokens)
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


def _unmade() -> RequestFailed:
    return RequestFailed("the chat could not be prepared", "send the request again")


def check_chat(chat: Any, thinking: Any) -> list[Message]:
    """The chat as messages (mappings with role and content are taken too); MessageError says what is wrong with its form."""
    if thinking not in ("auto", "on", "off"):
        raise SettingsError(f"thinking={thinking!r} is unknown", "use 'auto', 'on' or 'off'")
    if isinstance(chat, str | bytes | Message) or not isinstance(chat, Seq):
        raise MessageError(f"a chat is given as a {type(chat).__name__}", 'give a list: [Message("user", ...)]')
    if not chat:
        raise MessageError("the chat has no messages", 'give at least one: [Message("user", "...")]')
    return messages_from_openai(chat)


def notes(media: Seq[Patches]) -> tuple[str, ...]:
    """What was done to media on the caller's behalf, and, of several, to which."""
    if len(media) == 1:
        return media[0].notes
    return tuple(
        f"picture or video {index} of {len(media)}: {note}" for index, item in enumerate(media, 1) for note in item.notes
    )


def warnings(media: Seq[Patches], untrained: Seq[str]) -> tuple[str, ...]:
    """What to expect of a model that was never taught a kind of media that it is shown."""
    shown = dict.fromkeys(patches.kind for patches in media)
    return tuple(f"this model was never trained on a {kind}: its answer is a guess" for kind in shown if kind in untrained)


def usage(prompt: Prompt, media: Seq[Patches], patch: int) -> Usage:
    """What the prompt uses, with patches of ``patch`` pixels a side; the completion is counted when it is there."""
    videos = [patches for patches in media if patches.kind == "video"]
    return Usage(
        prompt_tokens=len(prompt.tokens),
        image_tokens=sum(span.num_tokens for span in prompt.spans if span.kind == "image"),
        video_tokens=sum(span.num_tokens for span in prompt.spans if span.kind == "video"),
        num_frames=sum(patches.num_frames for patches in videos),
        timestamps=tuple(patches.timestamps or () for patches in videos),
        media=tuple(
            _media_usage(item, View.of(item, patch), sum(span.num_tokens for span in prompt.spans if span.media_id == index))
            for index, item in enumerate(media)
        ),
    )


def _media_usage(item: Patches, view: View, tokens: int) -> MediaUsage:
    video = item.kind == "video"
    return MediaUsage(
        kind=item.kind,
        size=(view.size[1], view.size[0]),
        resized=(view.resized[1], view.resized[0]),
        grids=tuple(item.grids),
        tokens=tokens,
        frames=item.num_frames if video else 0,
        fps=item.fps if video else None,
    )
