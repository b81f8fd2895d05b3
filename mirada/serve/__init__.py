"""An OpenAI-compatible server around models that are open: ``create_app`` makes it, ``run.serve`` runs it.

    from mirada import VLM
    from mirada.serve import ServeSettings, create_app
    app = create_app({"mini": VLM("mini", limits=FetchLimits.serving())}, ServeSettings())

Nothing here loads torch: models are handed in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mirada.serve.app import create_app
    from mirada.serve.run import serve
    from mirada.serve.settings import ServeSettings

_HOME = {
    "create_app": "mirada.serve.app",
    "serve": "mirada.serve.run",
    "ServeSettings": "mirada.serve.settings",
}
__all__ = ["ServeSettings", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mirada.serve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
