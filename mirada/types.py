"""Frozen values that cross rooms. Nothing here imports numpy, torch or Pillow.

Shapes and units are said beside each field. Media stay references (``Image.source``) until room ``media`` opens them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from numbers import Integral, Real
from typing import Any, Literal, Protocol

from mirada.errors import MessageError, MiradaError, SettingsError

Role = Literal["system", "user", "assistant", "tool"]
ROLES = ("system", "user", "assistant", "tool")
Finish = Literal["stop", "length", "repetition", "tool_calls", "cancelled", "error"]
Thinking = Literal["auto", "on", "off"]
Grid = tuple[int, int, int]
"""(frames, rows, columns) of patches."""


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """A picture: path, ``file://``, ``http(s)://``, ``data:`` URI, bytes (also those of a ``BytesIO``, wherever it stands), PIL
    image or uint8 array [H, W] / [H, W, 3|4].

    ``min_pixels`` / ``max_pixels`` bound the resized area (pixels); ``resized_height`` / ``resized_width`` ask for an
    exact size, snapped to the model's factor.

    ``id``: what the caller calls it. One that was sent with its id before may come again by ``Image(id=...)`` alone, with the
    same sizes, for as long as its pixels are kept; nobody else's picture is ever found by an id (``media.named``).
    """

    source: Any = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, BytesIO):
            object.__setattr__(self, "source", self.source.getvalue())


@dataclass(frozen=True, slots=True)
class Video:
    """A video: path, URL, bytes (or a ``BytesIO``), or a list of pictures (then ``fps`` is the rate at which they were taken).

    ``fps`` frames per second to sample, or ``nframes`` in all, not both; ``video_start`` / ``video_end`` seconds;
    ``total_pixels`` bounds the sum over frames. ``None`` takes the model's own default.
    """

    source: Any
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    video_start: float | None = None
    video_end: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    min_frame_similarity: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.source, BytesIO):
            object.__setattr__(self, "source", self.source.getvalue())


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; ``arguments`` is JSON text."""

    name: str
    arguments: str
    id: str = ""


def joined_calls(pieces: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    """Tool calls, or pieces of them in order, with every piece that has no name added to the call before it (the first may
    go on with one of an earlier list, and is then left as it is)."""
    calls: list[tuple[ToolCall, list[str]]] = []
    for piece in pieces:
        if calls and not piece.name:
            calls[-1][1].append(piece.arguments)
        else:
            calls.append((piece, [piece.arguments]))
    return tuple(call if len(arguments) == 1 else ToolCall(call.name, "".join(arguments), call.id) for call, arguments in calls)


Part = Text | Image | Video | ToolCall


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``parts`` may be given as a string, one part, or a sequence of parts and strings."""

    role: Role
    parts: tuple[Part, ...]
    reasoning: str = ""
    """What an assistant thought before it answered (without its tags)."""
    tool_call_id: str | None = None

    def __init__(
        self,
        role: Role,
        parts: str | Part | Sequence[str | Part] = (),
        reasoning: str = "",
        tool_call_id: str | None = None,
    ) -> None:
        if role not in ROLES:
            raise MessageError(f"message role {role!r} is unknown", f"use one of {', '.join(ROLES)}")
        object.__setattr__(self, "role", role)
        object.__setattr__(self, "parts", _parts(parts))
        object.__setattr__(self, "reasoning", reasoning)
        object.__setattr__(self, "tool_call_id", tool_call_id)

    @property
    def text(self) -> str:
        """All text parts, joined without a separator."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return tuple(part for part in self.parts if isinstance(part, ToolCall))


def _parts(parts: str | Part | Sequence[str | Part]) -> tuple[Part, ...]:
    if isinstance(parts, str | Text | Image | Video | ToolCall):
        parts = (parts,)
    if not isinstance(parts, Sequence):
        raise MessageError(
            f"message parts are a {type(parts).__name__}",
            "give a string, a part, or a sequence of Text, Image, Video, ToolCall",
        )
    made = tuple(Text(part) if isinstance(part, str) else part for part in parts)
    for index, part in enumerate(made):
        if not isinstance(part, Text | Image | Video | ToolCall):
            raise MessageError(
                f"part {index} of the message is a {type(part).__name__}", "wrap it in Text(...), Image(...) or Video(...)"
            )
    return made


Chat = Sequence[Message]
ChatLike = Sequence[Message | Mapping[str, Any]]
"""A chat as the engine takes it: also messages as OpenAI's API has them, ``{"role": ..., "content": ...}``."""


@dataclass(frozen=True, slots=True)
class Span:
    """A run of placeholder tokens that one block of visual features replaces.

    A picture is one span. A video is one span (all frames share time steps) or one span per frame, as the family says.
    """

    kind: Literal["image", "video"]
    start: int
    """Index of its first placeholder among the prompt's tokens."""
    grid: Grid
    """(t, h, w) in patches, before merging."""
    media_id: int
    """Which picture or video of the chat (both counted together, in order)."""
    frame: int = 0
    """Index of the (first) frame inside its video."""
    t_step: float = 0.0
    """Position units between two frames; time index = trunc(float32(frame) * t_step)."""
    merge: int = 2
    """Side of the square of patches that becomes one token."""
    hash: bytes = b""
    """Content key of the pixels."""
    flat: bool = False
    """Its tokens count on one by one like text, instead of by time, row and column."""
    advance: Literal["block", "plane"] = "block"
    """Text goes on one past the highest position of the span on any axis, or (plane) on rows and columns alone."""

    @property
    def num_tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w // (self.merge * self.merge)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered chat. ``learn[i]`` says that a loss is taken on predicting token i; same length as ``tokens``."""

    tokens: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    learn: tuple[bool, ...] = ()


FORMS = ("json_schema", "regex", "choice", "grammar")
"""Settings of ``Sampling`` that say what an answer must look like."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. ``None`` switches a filter off; temperature 0 is greedy. Sequences are kept as tuples."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    """Divides (or, below zero, multiplies) the logits of tokens that prompt or answer hold; 1 is off."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for each time that the answer holds it."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids."""
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    """How many alternatives to report per token (0: the chosen token alone)."""
    include_stop_str_in_output: bool = False
    """A stop string that ended the answer stays at its end."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the answer like the model's own ends; their text is no part of it."""
    min_tokens: int = 0
    """Before so many tokens neither an end nor a stop string ends the answer (a promised form may)."""
    ignore_eos: bool = False
    max_repeats: int | None = 16
    """Times k that the answer may end with one piece of at most 256 tokens said over and over, once these copies fill 32 k
    tokens; then it finishes with ``repetition`` (``engine.loops``)."""
    thinking_budget: int | None = None
    """Most tokens of reasoning; then its closing tag is written for the model, and the answer follows."""
    json_schema: Any = None
    """The answer is JSON of this schema: a mapping, ``True`` for any JSON, or a pydantic model."""
    regex: str | None = None
    """The whole answer matches this regular expression."""
    choice: Sequence[str] | None = None
    """The answer is one of these texts."""
    grammar: str | None = None
    """The answer is a text of this Lark grammar."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if hasattr(self.json_schema, "model_json_schema"):
            object.__setattr__(self, "json_schema", self.json_schema.model_json_schema())
        self._check_kinds()
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for name, ok, allowed in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None for off"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1], or None for off"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1], or None for off"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 10, "in (0, 10]; 1 is off"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2; 0 is off"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2; 0 is off"),
            (
                "logit_bias",
                _is_bias(self.logit_bias),
                f"a mapping of token ids to numbers of at most {LARGEST:g}, or None for off",
            ),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 100, "between 0 and 100, or None for off"),
            (
                "stop",
                len(self.stop) <= MOST_STOPS and all(isinstance(s, str) and s for s in self.stop),
                f"at most {MOST_STOPS} non-empty strings",
            ),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= MOST_STOPS and _are_ids(self.stop_token_ids),
                f"at most {MOST_STOPS} token ids: whole numbers of at least 0",
            ),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "at least 0 and not above max_tokens"),
            ("max_repeats", self.max_repeats is None or self.max_repeats >= 2, "at least 2, or None for off"),
            ("thinking_budget", self.thinking_budget is None or self.thinking_budget >= 0, "at least 0, or None for off"),
            ("choice", self.choice is None or _are_texts(self.choice), "at least one text, and no empty one"),
        ):
            if not ok:
                raise SettingsError(f"sampling setting {name}={getattr(self, name)!r} is out of range", f"it must be {allowed}")
        forms = [name for name in FORMS if getattr(self, name) is not None]
        if len(forms) > 1:
            raise SettingsError(f"{' and '.join(forms)} ask for two forms of the answer", "give one of them")

    @property
    def form(self) -> str | None:
        """Which of ``FORMS`` the answer must have."""
        return next((name for name in FORMS if getattr(self, name) is not None), None)

    def _check_kinds(self) -> None:
        for name, kind, said in (
            ("max_tokens", Integral, "a whole number"),
            ("temperature", Real, "a number"),
            ("top_k", Integral, "a whole number or None"),
            ("top_p", Real, "a number or None"),
            ("min_p", Real, "a number or None"),
            ("repetition_penalty", Real, "a number"),
            ("presence_penalty", Real, "a number"),
            ("frequency_penalty", Real, "a number"),
            ("logit_bias", Mapping, "a mapping of token ids to numbers, or None"),
            ("seed", Integral, "a whole number or None"),
            ("stop", Sequence, "a string or a sequence of strings"),
            ("logprobs", Integral, "a whole number or None"),
            ("include_stop_str_in_output", bool, "True or False"),
            ("stop_token_ids", list | tuple, "a list of token ids"),
            ("min_tokens", Integral, "a whole number"),
            ("ignore_eos", bool, "True or False"),
            ("max_repeats", Integral, "a whole number or None"),
            ("thinking_budget", Integral, "a whole number or None"),
            ("json_schema", Mapping | bool, "a JSON schema: a mapping, or None"),
            ("regex", str, "a string or None"),
            ("choice", list | tuple, "a list of strings, or None"),
            ("grammar", str, "a string or None"),
        ):
            value = getattr(self, name)
            if value is None and said.endswith("None"):
                continue
            if not isinstance(value, kind) or (kind in (Integral, Real) and isinstance(value, bool)):
                raise SettingsError(f"sampling setting {name}={value!r} is a {type(value).__name__}", f"give {said}")


def _are_ids(given: Sequence[Any]) -> bool:
    return all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= LARGEST for one in given)


def _are_texts(given: Sequence[str]) -> bool:
    return len(given) > 0 and all(isinstance(one, str) and one for one in given)


MOST_STOPS = 256
"""Each is looked for after every token, on the thread that serves all requests."""
LARGEST = 10**12
"""Beyond this no number of a request means anything, and arithmetic on it would overflow somewhere."""


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number that can be calculated with: no truth value, not infinite, at most ``LARGEST``."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    size: Any = abs(value)
    return bool(size <= LARGEST)  # False for NaN


def _is_bias(given: Mapping[int, float] | None) -> bool:
    return all(
        isinstance(token, int) and not isinstance(token, bool) and token >= 0
        and is_number(bias)
        for token, bias in (given or {}).items()
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of the chosen token and of the most likely alternatives (token id, logprob)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    texts: tuple[str, ...] = ()
    """The chosen token and each of ``top`` as text, where a server names tokens so; ids that it does not say are -1."""


@dataclass(frozen=True, slots=True)
class MediaUsage:
    """How one picture or video of a chat came before the model. Sizes are (width, height) in pixels."""

    kind: Literal["image", "video"]
    size: tuple[int, int]
    """Of the original, upright."""
    resized: tuple[int, int]
    """After the model's own resize: what coordinates in pixels of its answer are counted in."""
    grids: tuple[Grid, ...]
    """In patches, before merging; a video whose frames have several sizes has one for each run of equal ones."""
    tokens: int
    """Placeholder tokens in the prompt."""
    frames: int = 0
    """Of a video, with those that were repeated to fill a patch."""
    fps: float | None = None
    """Rate of a video's frames that were used."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of what a request used. ``timestamps``: seconds of the frames used, per video."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Those of the completion between the tags of reasoning."""
    image_tokens: int = 0
    video_tokens: int = 0
    num_frames: int = 0
    timestamps: tuple[tuple[float, ...], ...] = ()
    media: tuple[MediaUsage, ...] = ()
    """Every picture and video, in the order of the chat."""
    cached_tokens: int = 0
    """Those of the prompt whose keys and values an earlier request had left."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """A box, a point or an outline that an answer names, in pixels of the original, upright picture and never outside it.

    ``points``: (x, y) from the top left corner; of a box its top left and bottom right, of a polygon its corners in order.
    """

    kind: Literal["box", "point", "polygon"]
    points: tuple[tuple[float, float], ...]
    label: str = ""
    media: Literal["image", "video"] = "image"
    index: int = 0
    """Which picture (or which video, counted apart) of the chat, from 0, all turns together."""
    size: tuple[int, int] = (0, 0)
    """(width, height) of the original picture, or of the video's frames."""
    resized: tuple[int, int] = (0, 0)
    """(width, height) to which the model's own rule resized it."""
    time: tuple[float, float] | None = None
    """Seconds of the video, from and to, where the answer says any."""
    chosen: Literal["only", "named", "last"] = "only"
    """Why this picture: there was no other, the answer named it, or it was the last of several."""
    start: int = 0
    end: int = 0
    """Characters ``start`` to ``end`` of the answer's text say it."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a reply. Concatenated ``text`` is the answer, ``reasoning`` what came before it.

    A tool call may come in pieces: one with its name and perhaps the beginning of its arguments, then some without a name that
    hold what follows; ``joined_calls`` puts them together.
    """

    text: str = ""
    reasoning: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    finish: Finish | None = None
    annotations: tuple[Annotation, ...] = ()
    """Boxes and points that this piece of the answer completes."""
    stop_reason: str | int | None = None
    """Of the last piece: the stop string or the id of ``stop_token_ids`` that ended the answer."""
    notes: tuple[str, ...] = ()
    """Of the last piece: as those of ``Output``."""


@dataclass(frozen=True, slots=True)
class Output:
    """A whole reply, or an error; never both. ``metrics``: seconds per stage by name."""

    message: Message = field(default_factory=lambda: Message("assistant"))
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] | None = None
    finish: Finish = "stop"
    usage: Usage = Usage()
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: MiradaError | None = None
    raw: str = ""
    """The generated text before it was parsed into reasoning, answer and tool calls."""
    notes: tuple[str, ...] = ()
    """What was done to the media on the caller's behalf: turned upright, clamped, shrunk, corrected."""
    annotations: tuple[Annotation, ...] = ()
    """Boxes and points that the answer names."""
    stop_reason: str | int | None = None
    """The stop string or the id of ``stop_token_ids`` that ended the answer."""


class Handle(Protocol):
    """A request under way: iterate its deltas (sync or async), await its result, or cancel it."""

    def __iter__(self) -> Iterator[Delta]: ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def result(self, timeout: float | None = None) -> Output: ...

    def cancel(self) -> None: ...


class Client(Protocol):
    """All that evaluation, agents, data and serving know of a model."""

    def submit(self, chat: Chat | Prompt, sampling: Sampling | None = None) -> Handle: ...
