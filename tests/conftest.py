"""What every test shares: quiet threads, examples that are the same in every run, an order that keeps two processes busy, and
at the end the seconds that each room took beside its budget."""

from __future__ import annotations

import signal
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import mirada  # noqa: F401  (chooses how OpenMP waits, before any test imports torch)

TESTS = Path(__file__).parent
BUDGET = {  # seconds of two processes on two idle cores, with a third of room
    "house": 80,
    "records": 10,
    "media": 40,
    "prompt": 25,
    "layers": 40,
    "adapt": 10,
    "hub": 20,
    "parallel": 15,
    "models": 30,
    "engine": 165,
    "parity": 35,
    "synth": 15,
    "train": 40,
    "recipes": 30,
    "assets": 10,
    "client": 20,
    "cli": 30,
    "compat": 20,
    "serve": 155,
}
LONG = (
    "test_benchmarks.py", "serve/test_faults_limits.py", "serve/test_faults.py", "engine/test_stateful.py",
    "engine/test_sleep.py", "engine/test_step.py", "serve/test_live.py", "engine/test_structure.py",
    "serve/test_every_parameter.py", "engine/test_llm.py", "engine/test_invariance.py", "serve/test_responses.py",
    "test_serve_load.py", "serve/test_sleep.py", "serve/test_openapi.py", "engine/test_ngram.py", "engine/test_op_counts.py",
    "engine/test_products.py", "engine/test_adapters.py", "serve/test_chat.py", "engine/test_choosing.py",
)  # fmt: skip
"""Files that take longest, from the longest: with one of them last, the other process would wait for it."""
_seconds: dict[str, float] = defaultdict(float)

# A shell that starts tests in the background has them ignore interrupts, and some tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A clock is no judge on a machine with other work, and a new draw of examples in each run would fail what nobody has changed:
# `make test` draws the same ones always, `make test-slow` others each time.
_CLOCKS = (HealthCheck.too_slow,)
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=_CLOCKS)
settings.register_profile("random", deadline=None, suppress_health_check=_CLOCKS, print_blob=True)
settings.load_profile("same")


def pytest_collection_modifyitems(items) -> None:
    if missing := [name for name in LONG if not (TESTS / name).exists()]:
        raise pytest.UsageError(f"tests/conftest.py names files that are not there: {', '.join(missing)}")
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0].removeprefix("tests/"), len(LONG)))


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
