"""Every error that Mirada raises on purpose, drawn as a tree.

MiradaError
├── InputError (ValueError)          the caller can fix it
│   ├── SettingsError                a setting, option or sampling value is unknown or out of range
│   │   └── ParameterError           a parameter of a request as JSON; ``param`` names it
│   ├── UnknownName                  a table has no entry of that name; the nearest are listed
│   ├── MessageError                 a chat or message does not have the stated form
│   └── MediaError                   one picture or video cannot be used
│       ├── MediaNotFound            nothing lies at that path or address
│       ├── MediaRefused             a safety rule forbids it (private address, file outside the root, redirect)
│       ├── MediaTooLarge            more bytes, pixels, frames or seconds than the limit
│       ├── MediaTimeout             the fetch took longer than the limit
│       ├── MediaDecodeError         the bytes are not a whole, valid picture or video
│       └── MediaUnsupported         a form (type, shape, scheme) that is not handled
├── CapacityError                    it is well formed but does not fit
│   ├── ContextOverflow              prompt (plus answer) longer than the model's context
│   ├── OutOfMemory                  memory does not suffice
│   └── QueueFull                    as many requests wait as may
├── CheckpointError                  files of a model are missing, broken or do not match their config
│   ├── ConfigError                  config.json (or a sibling) has a key or value that is not understood
│   ├── TensorError                  a tensor is missing, unexpected or misshapen
│   └── HubError                     a hub did not deliver a model
│       ├── HubNotFound              it has no such model or revision, or nothing is cached while offline
│       └── HubRefused               the token is wrong, or the model is gated or private
├── RemoteError                      a model behind an address did not answer: it broke off, failed, or sent no answer
│   ├── RemoteUnreachable            nothing could be connected to
│   ├── RemoteTimeout (TimeoutError) it took longer than it may
│   ├── RemoteBusy                   it has no room, and had none at each further attempt
│   ├── RemoteRefused                the key is missing, wrong, or lacks a right
│   ├── RemoteRejected (InputError)  it finds fault with the request
│   ├── RemoteNotFound (InputError)  it has no such model or address
│   └── NotRecorded                  a log holds no answer to this request
├── NotAvailable                     an optional dependency, device or later capability is absent
├── EngineAsleep                     the engine was put to sleep, and takes no requests until it is woken
├── ReplyTimeout (TimeoutError)      a reply was not there in the time that its reader gave; the request goes on
└── RequestFailed                    a request that was accepted died (cancelled, worker lost)

Each carries ``problem`` (what is wrong, naming the thing) and ``fix`` (what to change); ``str()`` shows both.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from typing import Any


class MiradaError(Exception):
    """Base of the tree. ``problem`` says what is wrong, ``fix`` what to change."""

    def __init__(self, problem: str, fix: str = "") -> None:
        self.problem = problem
        self.fix = fix
        super().__init__(problem, fix)

    def __str__(self) -> str:
        return f"{self.problem}. {self.fix}" if self.fix else self.problem

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and sent between processes as it is: a kind whose constructor takes more is not made by calling it again."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class InputError(MiradaError, ValueError):
    """The caller's input is at fault."""


class SettingsError(InputError):
    """A setting, option or sampling value is unknown or out of range."""


class ParameterError(SettingsError):
    """A parameter of a request as JSON is unknown, or its value does not do. ``param`` is its path: ``stream_options``."""

    def __init__(self, problem: str, fix: str = "", *, param: str) -> None:
        super().__init__(problem, fix)
        self.param = param


class UnknownName(InputError):
    """A table has no entry of that name."""


class MessageError(InputError):
    """A chat or message does not have the stated form."""


class MediaError(InputError):
    """One picture or video cannot be used."""


class MediaNotFound(MediaError):
    """Nothing lies at that path or address."""


class MediaRefused(MediaError):
    """A safety rule forbids this source."""


class MediaTooLarge(MediaError):
    """More bytes, pixels, frames or seconds than the limit allows."""


class MediaTimeout(MediaError):
    """The fetch took longer than the limit."""


class MediaDecodeError(MediaError):
    """The bytes are not a whole, valid picture or video."""


class MediaUnsupported(MediaError):
    """A type, shape or scheme that is not handled."""


class CapacityError(MiradaError):
    """Well formed, but does not fit. ``needed`` and ``available`` are in ``unit``."""

    def __init__(self, problem: str, fix: str = "", *, needed: int = 0, available: int = 0, unit: str = "") -> None:
        super().__init__(problem, fix)
        self.needed = needed
        self.available = available
        self.unit = unit


class ContextOverflow(CapacityError):
    """Prompt plus answer is longer than the model's context (unit: tokens)."""


class OutOfMemory(CapacityError):
    """Memory does not suffice (unit: bytes)."""


class QueueFull(CapacityError):
    """As many requests wait as may (unit: requests)."""


class CheckpointError(MiradaError):
    """Files of a model are missing, broken or do not match their config."""


class ConfigError(CheckpointError):
    """A key or value of a model's config files is not understood."""


class TensorError(CheckpointError):
    """A tensor is missing, unexpected or misshapen."""


class HubError(CheckpointError):
    """A hub did not deliver a model: it cannot be reached, broke off, or sent something else."""


class HubNotFound(HubError):
    """The hub has no such model or revision, or nothing of it is cached while offline."""


class HubRefused(HubError):
    """The token is wrong, or the model is gated or private."""


class RemoteError(MiradaError):
    """A model behind an address did not answer: it broke off, failed, or sent what is no answer.

    ``status`` is what the server answered over HTTP, if it answered at all.
    """

    def __init__(self, problem: str, fix: str = "", *, status: int | None = None) -> None:
        super().__init__(problem, fix)
        self.status = status


class RemoteUnreachable(RemoteError):
    """Nothing could be connected to."""


class RemoteTimeout(RemoteError, TimeoutError):
    """It took longer than it may: to connect, to the first token, between two tokens, or in all."""


class RemoteBusy(RemoteError):
    """It has no room for the request, and had none at each further attempt."""


class RemoteRefused(RemoteError):
    """The key is missing, wrong, or lacks a right."""


class RemoteRejected(RemoteError, InputError):
    """It finds fault with the request, and says what."""


class RemoteNotFound(RemoteError, InputError):
    """It has no such model, or nothing lies at that address."""


class NotRecorded(RemoteError):
    """A log of exchanges holds no answer to this request."""


class NotAvailable(MiradaError):
    """An optional dependency, device or capability is absent; ``fix`` says how to get it."""


class EngineAsleep(MiradaError):
    """The engine was put to sleep, and takes no requests until it is woken."""


class ReplyTimeout(MiradaError, TimeoutError):
    """A reply was not there in the time that its reader gave; the request goes on."""


class RequestFailed(MiradaError):
    """An accepted request died: cancelled, or its worker was lost."""


MOST_LISTED = 200
"""Names that ``nearest`` looks at and lists."""
LONGEST_LISTED = 100
"""Characters of a name that it compares: that takes their square."""


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence that suggests what ``name`` may have meant, and lists what exists."""
    import difflib  # only on the way to an error

    known = sorted(names)
    shown = known[:MOST_LISTED]
    fit = [one for one in shown if len(one) <= LONGEST_LISTED] if len(name) <= LONGEST_LISTED else []
    close = difflib.get_close_matches(name, fit, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return f"{hint}known: {', '.join(one[:LONGEST_LISTED] for one in shown) or 'none'}{more}"
