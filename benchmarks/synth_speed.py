"""Milliseconds per drawn sample of each task, one process: ``python benchmarks/synth_speed.py [--fonts builtin]``."""

from __future__ import annotations

import argparse
import time

from mirada import synth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fonts", default="debian")
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    for level in (0.3, 1.0):
        for task in synth.TASKS:
            for index in range(2 * options.count):  # warm: fonts loaded, glyphs drawn
                synth.sample(task, 1, index, level=level, fonts=options.fonts)
            start, cpu = time.perf_counter(), time.process_time()
            for index in range(options.count):
                synth.sample(task, 0, index, level=level, fonts=options.fonts)
            wall = (time.perf_counter() - start) / options.count * 1e3
            cpu = (time.process_time() - cpu) / options.count * 1e3
            print(f"{task:10s} level {level:.1f}: {wall:.3f} ms wall, {cpu:.3f} ms cpu per sample")


if __name__ == "__main__":
    main()
