"""Mirada runs, serves, evaluates, curates and trains open vision-language models.

    from mirada import VLM
    VLM("mini").ask("receipt.png", "What is the total?")

Everything public is listed in ``__all__`` and is imported on first use, so that ``import mirada`` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# First of all, and on purpose: it chooses how OpenMP waits before torch can load.
from mirada import config as _config  # noqa: F401

if TYPE_CHECKING:
    from mirada.engine.llm import VLM
    from mirada.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        ContextOverflow,
        EngineAsleep,
        HubError,
        HubNotFound,
        HubRefused,
        InputError,
        MediaDecodeError,
        MediaError,
        MediaNotFound,
        MediaRefused,
        MediaTimeout,
        MediaTooLarge,
        MediaUnsupported,
        MessageError,
        MiradaError,
        NotAvailable,
        NotRecorded,
        OutOfMemory,
        ParameterError,
        QueueFull,
        RemoteBusy,
        RemoteError,
        RemoteNotFound,
        RemoteRefused,
        RemoteRejected,
        RemoteTimeout,
        RemoteUnreachable,
        ReplyTimeout,
        RequestFailed,
        SettingsError,
        TensorError,
        UnknownName,
    )
    from mirada.types import Delta, Image, Logprob, Message, Output, Sampling, Text, ToolCall, Usage, Video

__version__ = "0.1.0"

_WHERE = {
    "mirada.engine.llm": ("VLM",),
    "mirada.types": ("Message", "Text", "Image", "Video", "ToolCall", "Sampling", "Delta", "Output", "Usage", "Logprob"),
    "mirada.errors": (
        "MiradaError",
        "InputError",
        "SettingsError",
        "ParameterError",
        "UnknownName",
        "MessageError",
        "MediaError",
        "MediaNotFound",
        "MediaRefused",
        "MediaTooLarge",
        "MediaTimeout",
        "MediaDecodeError",
        "MediaUnsupported",
        "CapacityError",
        "ContextOverflow",
        "OutOfMemory",
        "QueueFull",
        "CheckpointError",
        "ConfigError",
        "TensorError",
        "HubError",
        "HubNotFound",
        "HubRefused",
        "RemoteError",
        "RemoteUnreachable",
        "RemoteTimeout",
        "RemoteBusy",
        "RemoteRefused",
        "RemoteRejected",
        "RemoteNotFound",
        "NotRecorded",
        "NotAvailable",
        "EngineAsleep",
        "ReplyTimeout",
        "RequestFailed",
    ),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "ContextOverflow",
    "EngineAsleep",
    "Delta",
    "HubError",
    "HubNotFound",
    "HubRefused",
    "Image",
    "InputError",
    "Logprob",
    "MediaDecodeError",
    "MediaError",
    "MediaNotFound",
    "MediaRefused",
    "MediaTimeout",
    "MediaTooLarge",
    "MediaUnsupported",
    "Message",
    "MessageError",
    "MiradaError",
    "NotAvailable",
    "NotRecorded",
    "Output",
    "OutOfMemory",
    "ParameterError",
    "QueueFull",
    "RemoteBusy",
    "RemoteError",
    "RemoteNotFound",
    "RemoteRefused",
    "RemoteRejected",
    "RemoteTimeout",
    "RemoteUnreachable",
    "ReplyTimeout",
    "RequestFailed",
    "Sampling",
    "SettingsError",
    "TensorError",
    "Text",
    "ToolCall",
    "UnknownName",
    "Usage",
    "VLM",
    "Video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mirada' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
