"""Models behind a ``types.Client``: any OpenAI-compatible server (``http``), a script (``fake``), a log (``replay``).

All are asked as ``VLM`` is: ``submit(chat, sampling)`` gives a handle to iterate, to await, or to cancel. No torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirada.client.fake import FakeClient
    from mirada.client.http import HttpClient, Timeouts
    from mirada.client.replay import ReplayClient
    from mirada.client.retry import Retry

_HOME = {
    "FakeClient": "mirada.client.fake",
    "HttpClient": "mirada.client.http",
    "ReplayClient": "mirada.client.replay",
    "Retry": "mirada.client.retry",
    "Timeouts": "mirada.client.http",
}

__all__ = ["FakeClient", "HttpClient", "ReplayClient", "Retry", "Timeouts"]


def __getattr__(name: str) -> Any:
    # On first use: the engine takes its handle from this room, and httpx takes a tenth of a second to load.
    if name not in _HOME:
        raise AttributeError(f"module 'mirada.client' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
