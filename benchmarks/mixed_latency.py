"""What a reader of text notices of others' pictures and long prompts: seconds between tokens with ``step_seconds`` on and off.

    python benchmarks/mixed_latency.py [--tower-layers 4] [--text-layers 4] [--pairs 7] [--threads 1]

One request decodes text. Beside it come a picture, or a prompt of 2,048 tokens, each answered with one token; a little later
somebody asks a short question. Measured, from the moment the others come until all of them are answered: the gaps between the
tokens of the first request (half of them are below p50, nineteen in twenty below p95, and the longest), and the first token of
the question. *alone*: nothing else comes. Both sides are ours: *on* is the engine as it is, *off* has ``step_seconds=None``;
the ratio is of the longest gaps (off / on, median over the pairs).

Models: mini as it is in the package, and Qwen2-VL-2B scaled down in depth alone (all its widths, 4 of the 32 layers of its
tower and 4 of the 28 of its decoder, random weights), in float32. A 448x448 picture is 1,024 patches, a 1344x1344 one 9,216
(mini takes none larger than the first). Without the bound a step holds a whole pass or a whole prompt, so in full depth its
longest gap beside a picture is eight times as long as here; with it a gap is as here. Every pair has
pictures and prompts of its own, so no cache helps.
Refuses to measure while other programs keep the CPU busy, unless ``--anyway``; the ratio of processor seconds of the longest
gaps stands beside that of the clock. Exit status 1: a row is below its goal.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from typing import Any

import cpu_image
import harness
from harness import Report, Turns, Worker, workers

NEW = 1500
"""Tokens that the first request may make: more than are needed."""
STEPS = 32
"""Tokens that are waited for where nothing else comes."""
LONG = 2048
PLAIN = range(300, 500)
"""Ids that are no control tokens in any of the models."""


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    report = Report(options, harness.require_quiet(options.anyway or options.smoke))
    checkpoint = str(cpu_image.make(options))
    harness.require_memory(0.0 if options.smoke else 8e9, "this shape on both sides")
    on, off = (Worker("mirada", "ours.py", threads=options.threads) for _ in range(2))
    with workers(on, off):
        print(f"{options.threads} thread(s), {options.pairs} pairs; milliseconds, with step_seconds / without")
        print(f"{'':38}{'p50':>13}{'p95':>13}{'longest gap':>15}{'first token':>15}{'ratio':>7}{'':15}{'CPU':>5}   goal")
        for name, model, loads in rows(options, checkpoint):
            settings = {"prefix_cache_bytes": 0, "encoder_cache_bytes": 0, "workers": 0}
            on.ask("load", model=model, engine=settings)
            off.ask("load", model=model, engine=settings | {"step_seconds": None})
            for what, load, goal in loads:
                measure(options, on, off, f"{name}: {what}", load, goal, report)
    return report.finish()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.arguments(parser)
    parser.add_argument("--tower-layers", type=int, default=4)
    parser.add_argument("--text-layers", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=[448, 1344], help="sides of the pictures, in pixels")
    parser.add_argument("--long", type=int, default=LONG, help="tokens of the long prompt")
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens that are waited for where nothing else comes")
    options = parser.parse_args(argv)
    if options.smoke:
        options.pairs, options.sizes, options.long, options.tower_layers, options.text_layers = 1, [112], 300, 2, 2
        options.steps = 4
    return options


Load = Callable[[int], list[dict[str, Any]]]
"""Number of a pair -> what comes beside the text: {"size", "seed", "text"} or {"ids"}."""


def rows(options: argparse.Namespace, checkpoint: str) -> list[tuple[str, str, list[tuple[str, Load, float | None]]]]:
    """(name, checkpoint, its rows with their goals); mini's steps are short enough without a bound, so it has none."""

    def shown(size: int) -> Load:
        return lambda i: [{"size": size, "seed": size + i, "text": "What is it?"}]

    def long(i: int) -> list[dict[str, Any]]:
        draw = random.Random(i)
        return [{"ids": [draw.choice(PLAIN) for _ in range(options.long)]}]

    def of(sizes: list[int], goal: float | None) -> list[tuple[str, Load, float | None]]:
        pictures = [(f"{size}x{size}", shown(size), goal) for size in sizes]
        return [("alone", lambda i: [], None), *pictures, (f"{options.long} tokens", long, goal)]

    return [("mini", "mini", of(options.sizes[:1], None)), ("Qwen2-VL's widths", checkpoint, of(options.sizes, 2.0))]


def measure(
    options: argparse.Namespace, on: Worker, off: Worker, name: str, load: Load, goal: float | None, report: Report
) -> None:
    orders = []
    for i in range(options.pairs + 1):
        order = {"do": "beside", "load": load(i), "question": cpu_image.question(i), "new": NEW, "steps": options.steps}
        orders.append((order, order))
    harness.in_turn(on, off, orders[:1])  # first touch of everything, and what a step costs is known
    turns = harness.in_turn(on, off, orders[1:])
    low, high = turns.spread(longest)
    figures = {side: summary(turns, which) for which, side in enumerate(("on", "off"))}
    verdict = report.add(name, turns, turns.ratio(longest), goal, low=low, high=high, cpu=turns.ratio(longest_cpu), **figures)
    pair = [(figures["on"][key] * 1e3, figures["off"][key] * 1e3) for key in ("p50", "p95", "longest", "first")]
    print(
        f"{name:38}{_two(*pair[0]):>13}{_two(*pair[1]):>13}{_two(*pair[2]):>15}{_two(*pair[3]):>15}"
        f"{turns.ratio(longest):7.2f} [{low:5.2f}, {high:5.2f}]{turns.ratio(longest_cpu):6.2f}   {verdict}",
        flush=True,
    )


def longest(made: Any) -> float:
    return max(clock for clock, _ in made["gaps"])


def longest_cpu(made: Any) -> float:
    return max(cpu for _, cpu in made["gaps"])


def summary(turns: Turns, which: int) -> dict[str, float]:
    """Seconds, by the clock and of processor: gaps of all pairs together, medians over the pairs of the longest and of the
    first token of the question."""
    made = [pair[which] for pair in turns.pairs]
    facts: dict[str, float] = {}
    for index, suffix in enumerate(("", "_cpu")):
        gaps = sorted(gap[index] for one in made for gap in one["gaps"])
        facts[f"p50{suffix}"] = statistics.median(gaps)
        facts[f"p95{suffix}"] = gaps[min(len(gaps) - 1, len(gaps) * 95 // 100)]
        facts[f"longest{suffix}"] = statistics.median(max(gap[index] for gap in one["gaps"]) for one in made)
        facts[f"first{suffix}"] = statistics.median(one["first"][index] for one in made)
        facts[f"all{suffix}"] = statistics.median(one["all"][index] for one in made)
    return facts


def _two(a: float, b: float) -> str:
    return f"{a:.0f} / {b:.0f}"


if __name__ == "__main__":
    sys.exit(main())
