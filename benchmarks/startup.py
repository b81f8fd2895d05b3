"""How long a person waits before anything happens: imports, ``mirada --help``, and a first answer from a cold process.

    python benchmarks/startup.py [--model DIR] [--picture FILE] [--peer PYTHON] [--pairs 7] [--anyway]

Each round runs every row once, in turn; the table shows medians and their ratio to ``import transformers`` in the interpreter
``--peer`` (this one by default; the row is left out where it is not installed). transformers imports most of itself lazily, so
that row is its floor, not what a first answer from it costs. Files are in the page cache ("cold" means a new process).
Refuses to measure while other programs keep the CPU busy, unless ``--anyway``: then only the seconds on the CPU mean much.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import BUSY, require_quiet

LIMITS = {"import mirada": 0.2, "mirada --help": 0.3, "mirada ask": 5.0}
"""Seconds that the project promises on two cores."""


def main() -> None:
    options = parse()
    pressure = require_quiet(options.anyway)
    with tempfile.TemporaryDirectory() as folder:
        rows = commands(options, Path(folder))
        for command in rows.values():  # first touch of every file
            run(command)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for _ in range(options.pairs):
            for name, command in rows.items():
                times[name].append(run(command))
    report(times, options.pairs, pressure)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--anyway", action="store_true")
    return parser.parse_args()


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    picture = options.picture
    if picture is None:
        from PIL import Image

        picture = folder / "a.png"
        Image.new("RGB", (320, 200), "white").save(picture)
    mirada = [sys.executable, "-m", "mirada.cli"]
    rows = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import mirada": [sys.executable, "-c", "import mirada"],
        "mirada --help": [*mirada, "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
        "mirada ask": [*mirada, "ask", str(picture), "What is this?", "--model", options.model, "--max-tokens", "8"],
    }
    if subprocess.run([options.peer, "-c", "import transformers"], capture_output=True, check=False).returncode == 0:
        rows["import transformers"] = [options.peer, "-c", "import transformers"]
    return rows


def run(command: list[str]) -> tuple[float, float]:
    """Seconds on the clock and on the CPU that a new process takes."""
    start, before = time.perf_counter(), os.times()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took, after = time.perf_counter() - start, os.times()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return took, after.children_user + after.children_system - before.children_user - before.children_system


def report(times: dict[str, list[tuple[float, float]]], pairs: int, pressure: float) -> None:
    peer = times.get("import transformers")
    busy = f"; other programs were busy (CPU pressure {pressure:.0f} %)" if pressure > BUSY else ""
    print(f"seconds, median of {pairs} interleaved runs{busy}\n")
    print(f"{'':22}{'clock':>8}{'least':>8}{'limit':>8}{'CPU':>8}   CPU, of import transformers")
    for name, taken in times.items():
        clock, cpu = [one[0] for one in taken], [one[1] for one in taken]
        limit = f"{LIMITS[name]:8.1f}" if name in LIMITS else " " * 8
        ratio = f"{statistics.median(a / b[1] for a, b in zip(cpu, peer, strict=True)):10.2f} x" if peer else ""
        print(f"{name:22}{statistics.median(clock):8.3f}{min(clock):8.3f}{limit}{statistics.median(cpu):8.3f}   {ratio}")
    if not peer:
        print("\n(transformers is not installed here; name an interpreter that has it with --peer)")


if __name__ == "__main__":
    main()
