"""One request: its prompt, what has been generated, and how tokens become text that is never taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mirada.client.handle import Listener, fold, join, tell
from mirada.engine.loops import LoopGuard
from mirada.engine.thinking import ThinkingBudget
from mirada.errors import MiradaError
from mirada.prompt.parse import KINDS
from mirada.types import Annotation, Delta, Finish, Logprob, Output, Prompt, Sampling, Usage

if TYPE_CHECKING:
    from mirada.media.grid import Patches


class StopStrings:
    """Finds the first stop string to be completed in a growing text, and holds back what may yet belong to one.

    The result does not depend on how the text is cut into pieces: the match that ends first wins, of those the longest.
    """

    def __init__(self, stops: Seq[str], keep: bool = False) -> None:
        self.stops = tuple(stops)
        self._keep = keep
        """The one that is found stays in the text."""
        self.found: str | None = None
        self.held = ""
        """What may yet belong to one."""
        self._longest = max(map(len, self.stops), default=0)

    def feed(self, text: str) -> str:
        """The text that is now certain to stand before any stop string."""
        if not self.stops or self.found:
            return text if not self.found else ""
        text = self.held + text
        matches = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if matches:
            end, at, self.found = min(matches)
            self.held = ""
            return text[: end if self._keep else at]
        keep = self._overlap(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def close(self) -> str:
        """What was held back, once no more text can come."""
        held, self.held = self.held, ""
        return held

    def _overlap(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        for size in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                return size
        return 0


class Decoder(Protocol):
    """Tokens to text, piece by piece; an unfinished character is held back (``prompt.tokenizer``)."""

    def feed(self, ids: Iterable[int]) -> str: ...

    def close(self) -> str: ...


class Parser(Protocol):
    """Text to answer, reasoning and tool calls, piece by piece (``prompt.parse``)."""

    @property
    def reasoning(self) -> tuple[str, str] | None: ...

    full: bool

    @property
    def opening(self) -> bool:
        """Whether the answer has yet to begin: reasoning may open, is open, or was just closed."""
        ...

    @property
    def tagged(self) -> bool:
        """Whether any tag was read, so that white space before the answer is none of it."""
        ...

    def feed(self, text: str) -> list[Delta]: ...

    def close(self) -> list[Delta]: ...


class Grounder(Protocol):
    """Text of the answer to boxes and points, piece by piece (``prompt.ground``)."""

    def feed(self, text: str) -> tuple[Annotation, ...]: ...


class Reply:
    """Tokens in, deltas out: decode, cut at stop strings, parse, find boxes. ``raw`` is the text before it was parsed.

    Stop strings are those of the answer: reasoning, and white space after it, may hold them (a model that thinks says again
    what it was asked). ``least``: so many tokens may hold them too. ``keep_stop``: the one that is found stays.
    """

    def __init__(
        self,
        decoder: Decoder,
        parser: Parser,
        stops: Seq[str] = (),
        grounder: Grounder | None = None,
        *,
        least: int = 0,
        keep_stop: bool = False,
    ) -> None:
        self._decoder = decoder
        self._parser = parser
        self._grounder = grounder
        self._stops = StopStrings(stops, keep_stop)
        self._least = least
        self._num = 0
        self._raw: list[str] = []
        self.has_calls = False

    @property
    def stop(self) -> str | None:
        """The stop string that is complete."""
        return self._stops.found

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete, or there are as many tool calls as there may be."""
        return self._stops.found is not None or self._parser.full

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    @property
    def reasoning(self) -> tuple[str, str] | None:
        """Inside a block of reasoning: the tag that closes it, and what is there of that tag already."""
        return self._parser.reasoning

    def feed(self, token: int) -> list[Delta]:
        """The pieces that ``token`` makes certain."""
        self._num += 1
        return self._take(self._decoder.feed((token,)))

    def close(self) -> list[Delta]:
        """The pieces that were held back, now that nothing follows."""
        pieces = self._take(self._decoder.close())
        pieces += self._parse(self._stops.close()) + self._grounded(self._parser.close())
        self.has_calls = self.has_calls or any(piece.tool_calls for piece in pieces)
        return pieces

    def _take(self, text: str) -> list[Delta]:
        if not self._stops.stops or self._num <= self._least:
            return self._parse(text)
        pieces: list[Delta] = []
        at = 0
        while at < len(text) and self._parser.opening and not self.stopped:  # one by one: a tag may end anywhere in it
            free = self._parser.reasoning is not None
            if free or (self._parser.tagged and text[at].isspace() and not self._stops.held):
                pieces += self._parse(self._stops.close() + text[at])
            else:
                pieces += self._parse(self._stops.feed(text[at]))
            at += 1
        return pieces + self._parse(self._stops.feed(text[at:]))

    def _parse(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._raw.append(text)
        pieces = self._grounded(self._parser.feed(text))
        self.has_calls = self.has_calls or any(piece.tool_calls for piece in pieces)
        return pieces

    def _grounded(self, pieces: list[Delta]) -> list[Delta]:
        if self._grounder is None:
            return pieces
        return [
            replace(piece, annotations=found) if piece.text and (found := self._grounder.feed(piece.text)) else piece
            for piece in pieces
        ]


@dataclass(eq=False)
class Sequence:
    """A request under way: the one thing in the engine that lives long and changes.

    The engine's thread alone changes it, but for ``cancelled`` and ``listeners``. Where it stands is one number:
    ``computed`` of its tokens (prompt and answer) have keys and values in the cache. All but one computed means that it
    decodes; fewer, that it is prefilled, or recomputed after it was preempted.
    """

    prompt: Prompt
    sampling: Sampling
    reply: Reply | None
    media: tuple[Patches, ...] = ()
    """Prepared pixels; kept to the end, for they are encoded again if the sequence is preempted."""
    positions: np.ndarray | None = None
    """int [3, prompt tokens]; None for text alone, which counts up. Kept as int32."""
    first_position: int = 0
    """Position of the first generated token, on all three axes; media take up fewer positions than tokens, so this is
    the request's own and not the length of its prompt."""
    usage: Usage = field(default_factory=Usage)
    notes: tuple[str, ...] = ()
    """What was done to its media on the caller's behalf."""
    adapter: str = ""
    """Key of the adapter that answers (``adapt.lora.Adapter``); none: the model's own weights."""
    media_adapter: str = ""
    """The same of its pictures; none too if it leaves tower and projector as they are."""
    lora: Any = None
    """The adapter itself: it lasts as long as its last request, whatever is unloaded meanwhile."""
    salt: str = ""
    """Only requests with the same one share what is kept of their beginnings and media (tenants who must not learn of each
    other: what answers sooner says what another has asked)."""
    limit: int = 0
    """Most tokens to generate: what was asked, or what the context leaves."""
    slot: int = -1
    """Of the cache, while it runs."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    cached: int | None = None
    """Of them, those that an earlier request had left when this one was first admitted."""
    room: int = 0
    """Tokens that the cache has promised it room for."""
    draft: list[int] = field(default_factory=list)
    """Tokens proposed to follow the last one; they are checked by the next step and then forgotten."""
    features: Any = None
    """What of its media is encoded and not yet computed (``engine.features``), while it runs."""
    preemptions: int = 0
    tokens: list[int] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    chooser: Any = None
    """How it chooses its tokens, and what it remembers for that (``engine.sample.Chooser``)."""
    guide: Any = None
    """What its tokens must obey (``engine.guide.Guide``)."""
    kinds: Seq[Any] = KINDS
    """The tags that count when its text is read (``prompt.parse``)."""
    most_calls: int | None = None
    """After so many tool calls it ends."""
    thinking: ThinkingBudget | None = None
    ngrams: Any = None
    """Where its tokens stood before (``engine.ngram.NGramIndex``), if drafts are made."""
    finish: Finish | None = None
    error: MiradaError | None = None
    cancelled: bool = False
    """Somebody wants it ended; the next step does so."""
    stop: Callable[[], None] | None = None
    """Tells those who still prepare its media that it is cancelled (``engine.prepare``)."""
    listeners: list[Listener] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    born: float = field(default_factory=time.perf_counter)
    queued: float = 0.0
    """When it was last put in line."""
    done: bool = False

    def __post_init__(self) -> None:
        self._loops = LoopGuard(self.sampling.max_repeats) if self.sampling.max_repeats is not None else None
        if self.positions is not None:
            self.positions = self.positions.astype(np.int32) if self.prompt.spans else None

    @property
    def media_scope(self) -> str:
        """Within which features of the same pixels are shared: one adapter of the tower, and one salt."""
        return f"{self.media_adapter}\0{self.salt}" if self.salt else self.media_adapter

    @classmethod
    def failed(cls, error: MiradaError) -> Sequence:
        """A request that ended before it began."""
        made = cls(Prompt(()), Sampling(), None)
        made.fail(error.with_traceback(None))  # frames would keep what their callers hold alive for as long as the reply
        return made

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt.tokens) + len(self.tokens)

    @property
    def left(self) -> int:
        """Tokens to compute before the next one can be chosen: 1 while it decodes."""
        return self.num_tokens - self.computed

    def ids(self, start: int, end: int) -> list[int]:
        """Tokens ``start`` to ``end`` of prompt, answer and draft, end to end."""
        size = len(self.prompt.tokens)
        if start >= size:
            rest = self.tokens if end <= self.num_tokens else self.tokens + self.draft
            return rest[start - size : end - size]
        head = list(self.prompt.tokens[start:end])
        return head if end <= size else head + self.ids(size, end)

    def places(self, start: int, end: int) -> np.ndarray:
        """int64 [3, end - start]: positions of these tokens."""
        size = len(self.prompt.tokens)
        if self.positions is None:
            return np.broadcast_to(np.arange(start, end), (3, end - start))
        after = np.arange(max(start, size), max(end, size)) + (self.first_position - size)
        return np.concatenate((self.positions[:, start:end], np.broadcast_to(after, (3, len(after)))), 1)

    def spent(self, stage: str, seconds: float) -> None:
        self.metrics[stage] = self.metrics.get(stage, 0.0) + seconds

    def append(self, token: int, logprob: Logprob | None, is_end: bool) -> None:
        """Take in one generated token and publish what it makes certain. Sets ``finish`` when it is the last. Raises
        RequestFailed if its guide fails."""
        assert self.reply is not None
        if not self.tokens:
            self.metrics["first_token"] = time.perf_counter() - self.born
        self.tokens.append(token)
        pieces = [] if is_end else self.reply.feed(token)
        if self.thinking is not None and not is_end and (tag := self.thinking.note()):
            self.chooser.forced.extend(tag)
        finish: Finish | None = None
        if is_end or self.reply.stopped or (self.chooser is not None and self.chooser.finished):
            finish = "stop"
        elif self._loops is not None and self._loops.looping(self.tokens):
            finish = "repetition"
        elif len(self.tokens) >= self.limit:
            finish = "length"
        if finish is not None:
            pieces = pieces + self.reply.close()
            finish = "stop" if self.reply.stopped else finish  # what was held back may complete a stop string
            finish = "tool_calls" if finish == "stop" and self.reply.has_calls else finish
        made = replace(join(pieces), tokens=(token,), logprobs=() if logprob is None else (logprob,), finish=finish)
        if finish is not None:
            named = token if is_end and token in self.sampling.stop_token_ids else self.reply.stop
            made = replace(made, stop_reason=named, notes=self.notes)
        self._publish(made)

    def cancel(self) -> None:
        """End early, keeping what there is."""
        pieces = join(self.reply.close() if self.reply is not None else [])
        self._publish(replace(pieces, finish="cancelled", notes=self.notes))

    def fail(self, error: MiradaError) -> None:
        self.error = error
        self._publish(Delta(finish="error"))

    def listen(self, listener: Listener) -> None:
        """Have ``listener`` called at every delta from now on; at once if there is none to come. Any thread may."""
        self.listeners.append(listener)
        if self.done:
            listener(True)

    def _publish(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finish is not None:
            self.finish = delta.finish
            self.metrics["total"] = time.perf_counter() - self.born
            self.media, self.positions, self.chooser, self.features, self.ngrams = (), None, None, None, None
            self.lora = None
            self.done = True  # last: whoever sees it may read all the rest
        tell(self.listeners, self.done)

    def output(self) -> Output:
        """The whole reply: the fold of the deltas, with what was used."""
        if self.error is not None:
            return Output(finish="error", error=self.error, metrics=dict(self.metrics), notes=self.notes)
        raw = self.reply.raw if self.reply is not None else ""
        thought = 0 if self.thinking is None else self.thinking.num_tokens
        usage = replace(
            self.usage, completion_tokens=len(self.tokens), reasoning_tokens=thought, cached_tokens=self.cached or 0
        )
        logprobs = self.sampling.logprobs is not None
        return fold(self.deltas, usage=usage, metrics=dict(self.metrics), raw=raw, logprobs=logprobs)
