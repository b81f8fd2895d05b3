"""A process that waits for orders: lines of JSON in, one line of JSON out for each. Nothing but the standard library.

``serve`` is one end (``ours.py``, ``peers.py``), ``harness.Worker`` the other. While it waits for a line it uses no processor,
so several such processes can hold their models and only the one that was asked works.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any


class Stage:
    """Seconds from its making to each ``mark``, by the clock and of processor time of the whole process."""

    def __init__(self) -> None:
        self._last = (time.perf_counter(), time.process_time())
        self.spent: dict[str, tuple[float, float]] = {}

    def mark(self, name: str, share: int = 1) -> None:
        """What passed since the mark before, divided by ``share``."""
        now = (time.perf_counter(), time.process_time())
        self.spent[name] = tuple((a - b) / share for a, b in zip(now, self._last, strict=True))  # type: ignore[assignment]
        self._last = now


def serve(orders: Mapping[str, Callable[..., Any]]) -> None:
    """Carry out ``{"do": name, ...}`` until standard input ends; whatever an order prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        given = json.loads(line)
        try:
            answer: dict[str, Any] = {"value": orders[given.pop("do")](**given)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        used = os.times()
        answer["cpu"] = used.user + used.system + used.children_user + used.children_system
        answers.write(json.dumps(answer) + "\n")
