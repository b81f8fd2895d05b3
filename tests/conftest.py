"""What every test shares: quiet threads, and at the end the seconds that each room took beside its budget."""

from __future__ import annotations

import signal
from collections import defaultdict
from pathlib import Path

import mirada  # noqa: F401  (chooses how OpenMP waits, before any test imports torch)

TESTS = Path(__file__).parent
BUDGET = {  # seconds on two idle cores; together about six minutes
    "house": 50,
    "records": 10,
    "media": 60,
    "prompt": 30,
    "layers": 45,
    "adapt": 10,
    "hub": 20,
    "parallel": 15,
    "models": 70,
    "engine": 60,
    "parity": 50,
    "synth": 15,
    "train": 40,
    "recipes": 30,
    "assets": 10,
    "client": 20,
    "cli": 45,
    "compat": 20,
    "serve": 25,
}
_seconds: dict[str, float] = defaultdict(float)

# A shell that starts tests in the background has them ignore interrupts, and some tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_logreport(report) -> None:
    folder, _, rest = report.nodeid.partition("::")[0].removeprefix("tests/").partition("/")
    _seconds[folder if rest else "house"] += report.duration


def pytest_terminal_summary(terminalreporter) -> None:
    if not _seconds:
        return
    terminalreporter.section("seconds per room")
    for room, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        budget = BUDGET.get(room)
        over = "" if budget is not None and seconds <= budget else "  OVER BUDGET" if budget is not None else "  no budget yet"
        terminalreporter.write_line(f"{room:10} {seconds:7.1f} s of {budget or 0:3d} s{over}")
