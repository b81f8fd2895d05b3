"""The other side of ``pool``: a process that prepares one medium after another until nobody is there to ask."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

from mirada.errors import MiradaError
from mirada.media import wire
from mirada.media.task import prepare_here
from mirada.media.times import Times


def main(handle: int) -> None:
    """Answer on the socket ``handle``; returns never."""
    _end_with_parent()
    link = socket.socket(fileno=handle)
    jobs: queue.SimpleQueue[tuple[dict[str, Any], bytes]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, jobs), daemon=True).start()
    while True:
        answer(link, *jobs.get())


def answer(link: socket.socket, head: dict[str, Any], body: bytes) -> None:
    """Prepare what one message asks for and send it back, or why not."""
    times = Times()
    try:
        part, rule, limits, cap, name = wire.understand(head, body)
        made = prepare_here(part, rule, limits, cap, name, times)
    except MiradaError as error:
        wire.send(link, {"error": type(error).__name__, "problem": error.problem, "fix": error.fix, "times": times})
    except MemoryError:
        wire.send(link, {"error": "OutOfMemory", "problem": "memory ran out while a picture or video was prepared",
                         "fix": "lower max_pixels, or fps for a video", "times": times})  # fmt: skip
    except Exception as error:
        wire.send(link, {"error": "RequestFailed", "problem": f"preparing a picture or video failed: {error!r}",
                         "fix": "this is a defect, please report it", "times": times})  # fmt: skip
    else:
        wire.send_pixels(link, {"patches": wire.patches_head(made), "times": times}, made.pixels)


def _listen(link: socket.socket, jobs: queue.SimpleQueue) -> None:
    while (message := wire.receive(link)) is not None:
        jobs.put(message)
    os._exit(0)  # whatever is being decoded has nobody to go to


def _end_with_parent() -> None:
    """The end of the socket tells it everywhere, unless a fork of the parent holds the other end too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
