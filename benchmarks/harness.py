"""What the comparisons share: workers in turn, a machine that must be quiet, medians of ratios, and the floor.

A benchmark starts one worker a side (``Worker``), each in an interpreter of its own, lets them load, and then asks them in turn
(``in_turn``): A B A B. Ratios are taken within a pair, so that what drifts slowly, memory bandwidth above all, falls out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUSY = 5.0
"""Percent of the last ten seconds in which some task waited for a CPU."""
OTHERS = 10.0
"""Percent of one core that other programs may use while we measure (median of the turns)."""
PAUSE = 0.25
"""Seconds between turns: threads of the side before may spin for a while after their last product."""
REPORTED = "A worker's messages are above; --anyway and --pairs do not help with that."


def waiting() -> float:
    """CPU pressure over the last ten seconds, in percent; 0 where the system does not say."""
    path = Path("/proc/pressure/cpu")
    return float(path.read_text().split("avg10=")[1].split()[0]) if path.exists() else 0.0


def require_quiet(anyway: bool) -> float:
    """CPU pressure; exits if other programs are busy, unless ``anyway``."""
    pressure = waiting()
    if pressure > BUSY and not anyway:
        sys.exit(f"other programs are busy (CPU pressure {pressure:.0f} %); wait, or measure all the same with --anyway")
    return pressure


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def require_memory(needed: float, what: str) -> None:
    """Exits before ``what`` would drive the machine out of memory; one gigabyte is left to it."""
    if needed + 1e9 > (free := available_bytes()):
        sys.exit(f"{what} needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; take a smaller --shape")


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every comparison has."""
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter that has the peers (see README.md)")
    parser.add_argument("--pairs", type=int, default=7, help="at least 7 for figures that are quoted")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mirada-benchmarks",
                        help="where made checkpoints are kept")  # fmt: skip
    parser.add_argument("--anyway", action="store_true", help="measure although other programs are busy")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, no peer, no verdict: does everything still run?")


class Worker:
    """A child process with one side of a comparison. Dies with its ``close`` or with us (its standard input ends)."""

    def __init__(self, name: str, script: str, *args: str, python: str | None = None, threads: int = 1) -> None:
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment["HF_HUB_OFFLINE"] = "1"
        command = [python or sys.executable, str(HERE / script), *args]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.cpu = 0.0
        """Processor seconds that it has used so far."""

    def ask(self, do: str, **given: Any) -> Any:
        """Have one order carried out; exits with its message if it fails."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            sys.exit(f"{self.name}: the worker ended with status {self._process.returncode}. {REPORTED}")
        answer = json.loads(line)
        if "error" in answer:
            self.close()
            sys.exit(f"{self.name}: {do}: {answer['error']}. {REPORTED}")
        self.cpu = answer["cpu"]
        return answer["value"]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@contextmanager
def workers(*made: Worker) -> Iterator[tuple[Worker, ...]]:
    try:
        yield made
    finally:
        for worker in made:
            worker.close()


@dataclass
class Turns:
    """What both sides said, pair by pair, and how much of a core other programs used in each turn (percent)."""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    @property
    def disturbed(self) -> float:
        return statistics.median(self.others) if self.others else 0.0

    def side(self, which: int, of: Callable[[Any], float]) -> float:
        """Median over the pairs of one side."""
        return statistics.median(of(pair[which]) for pair in self.pairs)

    def ratio(self, of: Callable[[Any], float]) -> float:
        """Median over the pairs of theirs (second) to ours (first): above 1, ours takes less."""
        return statistics.median(of(theirs) / of(ours) for ours, theirs in self.pairs)

    def spread(self, of: Callable[[Any], float]) -> tuple[float, float]:
        """Smallest and largest ratio of a pair."""
        ratios = [of(theirs) / of(ours) for ours, theirs in self.pairs]
        return min(ratios), max(ratios)


def in_turn(ours: Worker, theirs: Worker, orders: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Turns:
    """Ask ours, theirs, ours, theirs ...; one pair of orders after the other."""
    turns = Turns()
    for mine, other in orders:
        made = []
        for worker, order in ((ours, mine), (theirs, other)):
            time.sleep(PAUSE)
            before, used, began = busy_seconds(), worker.cpu, time.perf_counter()
            made.append(worker.ask(**order))
            took = time.perf_counter() - began
            turns.others.append(max(0.0, busy_seconds() - before - (worker.cpu - used)) / max(took, 0.05) * 100)
        turns.pairs.append((made[0], made[1]))
    return turns


def busy_seconds() -> float:
    """Processor seconds, of all cores, that anything used or that the host took away since the machine started."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Report:
    """Prints lines as they come, keeps figures, and knows in the end whether they may be quoted and reach their goals."""

    def __init__(self, options: argparse.Namespace, pressure: float) -> None:
        self.options, self.pressure = options, pressure
        self.rows: list[dict[str, Any]] = []
        self.missed: list[str] = []
        self.disturbed = 0.0

    def add(self, name: str, turns: Turns, ratio: float, goal: float | None, **figures: Any) -> str:
        """Keep a figure; returns the words that stand after it."""
        self.disturbed = max(self.disturbed, turns.disturbed)
        self.rows.append({"name": name, "ratio": ratio, "goal": goal, "pairs": len(turns.pairs), **figures})
        self.rows[-1]["others_percent"] = round(turns.disturbed, 1)
        if goal is None or self.options.smoke:
            return ""
        if ratio < goal:
            self.missed.append(name)
        return f">= {goal}" if ratio >= goal else f"BELOW {goal}"

    def finish(self) -> int:
        """The exit status: 1 if a goal was missed, 2 if the machine was not quiet enough for a verdict."""
        loud = self.disturbed > OTHERS or self.pressure > BUSY
        if self.options.json:
            facts = {"others_percent": self.disturbed, "pressure": self.pressure, "threads": self.options.threads}
            self.options.json.write_text(json.dumps(facts | {"rows": self.rows}, indent=1) + "\n")
        print()
        if loud:
            print(
                f"Other programs used {self.disturbed:.0f} % of a core in the median turn (CPU pressure {self.pressure:.0f} %)."
            )
        if self.options.pairs < 7:
            print(f"Only {self.options.pairs} pairs: take 7 or more for figures that are quoted.")
        if self.options.smoke:
            return 0
        if loud and not self.options.anyway:
            print("These figures are not to be quoted; measure again on a quiet machine.")
            return 2
        print(f"below their goals: {', '.join(self.missed)}" if self.missed else "every row reaches its goal")
        return int(bool(self.missed))


def peer_python(options: argparse.Namespace, needs: Sequence[str]) -> str:
    """The interpreter with the peers; exits with what to install if one is missing."""
    python = options.peer_python or sys.executable
    for module in needs:
        done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{python} cannot import {module}; benchmarks/README.md says how to install the peers")
    return python
