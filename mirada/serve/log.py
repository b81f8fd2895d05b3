"""One JSON object a line on standard error: what was asked of the server, never what was said in it.

No line holds a body, a query, a header or a key. A line that cannot be written (a full disk) is dropped: no request dies of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from typing import Any

LOGGER = logging.getLogger("mirada.serve")


class Lines(logging.Handler):
    """Writes records to the file descriptor ``fd``, past Python's buffers: those would keep what failed, and try again."""

    def __init__(self, fd: int = 2) -> None:
        super().__init__()
        self.fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            os.write(self.fd, (self._line(record) + "\n").encode())

    @staticmethod
    def _line(record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            said["traceback"] = logging.Formatter().formatException(record.exc_info)
        # ASCII alone: U+0085 and U+2028 end a line for many readers, and a terminal obeys U+009B as it does an escape.
        return json.dumps(said, default=str)


def event(name: str, level: int = logging.INFO, error: BaseException | None = None, **facts: Any) -> None:
    """Say that ``name`` happened, with what is worth knowing of it."""
    LOGGER.log(level, name, exc_info=error, extra={"facts": {k: v for k, v in facts.items() if v is not None}})


def set_up(fd: int = 2) -> None:
    """Have this server, the engine and uvicorn write lines to ``fd``, and nothing else."""
    for name, level in (("mirada", logging.WARNING), ("mirada.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [Lines(fd)]
        logger.setLevel(level)
        logger.propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
