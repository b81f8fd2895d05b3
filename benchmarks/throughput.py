"""64 requests at once: continuous batching against one by one, and against transformers' padded batches. CPU, small model.

    python benchmarks/throughput.py --peer-python PEERS/bin/python [--requests 64] [--new 64] [--pairs 7]

Every fourth request has a picture of 224x224 (64 tokens), the others text of 20 to 200 tokens; each is answered with ``--new``
tokens, ends ignored, greedily. Requests differ from pair to pair, so no cache of ours helps from one pair to the next.

*one by one*: the same engine, mini as it is in the package, asked for one answer after the other. *transformers*: a Qwen2-VL of
mini's sizes (mini itself is no class of transformers), the same weights on both sides in float32, its ``generate`` over prompts
padded on the left, in the quickest of ``--batches`` and of its attentions; its images are prepared by its PIL processor.
Sizes are those of a model whose time goes into calls rather than into bytes: what is measured is the engine.
Refuses to measure while other programs keep the CPU busy, unless ``--anyway``. Exit status 1: a row is below its goal.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
from harness import Report, Turns, Worker, workers

SIDE = 224
"""Pixels of a picture's side."""
SPAN = (20, 200)
"""Characters of text, least and most: a token each, with the vocabulary of a made checkpoint nearly so."""
ALPHABET = "bcdfghjklmnpqrstvwxyz0123456789"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    report = Report(options, harness.require_quiet(options.anyway or options.smoke))
    print(f"{options.requests} requests, a quarter with a picture, {options.new} new tokens each, {options.threads} thread(s), "
          f"{options.pairs} pairs")  # fmt: skip
    print(f"{'':44}{'ours/s':>9}{'theirs/s':>9}{'ratio':>7}{'':14}{'CPU':>6}   goal")
    ours = Worker("mirada", "ours.py", threads=options.threads)
    with workers(ours):
        alone = Worker("mirada", "ours.py", threads=options.threads)
        with workers(alone):
            one_by_one(options, ours, alone, report)
            if options.smoke:
                padded(options, ours, alone, report)
        if not options.smoke:
            python = harness.peer_python(options, ("torch", "transformers", "PIL"))
            given = ("vision", str(make(options)), "float32")
            with workers(Worker("transformers", "peers.py", *given, python=python, threads=options.threads)) as (theirs,):
                padded(options, ours, theirs, report)
    return report.finish()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.arguments(parser)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--running", type=int, help="sequences of ours that decode together (default: the engine's)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[8, 16, 32, 64], help="sizes that transformers may choose from"
    )
    options = parser.parse_args(argv)
    if options.smoke:
        options.pairs, options.requests, options.new = 1, 8, 4
    return options


def requests(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Those of one pair: every fourth with a picture."""
    draw = random.Random(seed)
    made = []
    for i in range(options.requests):
        text = "".join(draw.choices(ALPHABET, k=draw.randint(*SPAN)))
        made.append({"text": text, "size": SIDE if i % 4 == 0 else 0, "seed": seed * 1000 + i})
    return made


def engine(options: argparse.Namespace) -> dict[str, int]:
    return {"max_running": options.running} if options.running else {}


def one_by_one(options: argparse.Namespace, together: Worker, alone: Worker, report: Report) -> None:
    """Both sides are ours, each with an engine of its own, so that neither finds what the other one left in a cache."""
    for worker in (together, alone):
        worker.ask("load", model="mini", engine=engine(options))
    orders = []
    for i in range(options.pairs + 1):
        order = {"do": "batch", "requests": requests(options, i), "new": options.new}
        orders.append((order, order | {"together": False}))
    harness.in_turn(together, alone, orders[:1])  # first touch of everything
    line("mini : one by one", harness.in_turn(together, alone, orders[1:]), 3.0, report)


def make(options: argparse.Namespace) -> Path:
    """A Qwen2-VL of mini's sizes."""
    shape = "tiny" if options.smoke else "mini"
    directory: Path = options.folder / f"throughput-{shape}"
    command = [sys.executable, str(harness.HERE / "shapes.py"), shape, str(directory), "--vision", shape]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"making {directory} failed")
    return directory


def padded(options: argparse.Namespace, ours: Worker, theirs: Worker, report: Report) -> None:
    checkpoint = str(make(options))
    ours.ask("load", model=checkpoint, engine=engine(options))
    if options.smoke:
        theirs.ask("load", model=checkpoint)
        name, batch = "same sizes : itself, one by one", 0
    else:
        setting = theirs.ask("load")["setting"]
        batch = quickest(options, theirs)
        name = f"same sizes : transformers by {batch}, {setting}"
    orders = []
    for i in range(options.pairs + 1):
        order = {"do": "batch", "requests": requests(options, 500 + i), "new": options.new}
        orders.append((order, order | {"together": batch}))
    harness.in_turn(ours, theirs, orders[:1])
    line(name, harness.in_turn(ours, theirs, orders[1:]), 2.0, report)


def quickest(options: argparse.Namespace, theirs: Worker) -> int:
    """The size of its batches with which transformers is quickest, each tried twice in turn."""
    least: dict[int, float] = {}
    for i in range(2):
        for size in options.batches:
            made = theirs.ask("batch", requests=requests(options, 900 + i), new=options.new, together=size)
            least[size] = min(least.get(size, float("inf")), made["all"][0])
    return min(least, key=lambda size: least[size])


def line(name: str, turns: Turns, goal: float, report: Report) -> None:
    for mine, other in turns.pairs:
        if mine["prompt"] != other["prompt"] or mine["tokens"] != other["tokens"]:
            sys.exit(f"{name}: the two sides had different work: {mine} and {other}")

    def clock(made: Any) -> float:
        return made["all"][0]

    def cpu(made: Any) -> float:
        return made["all"][1]

    tokens, (low, high) = turns.pairs[0][0]["tokens"], turns.spread(clock)
    ours, theirs = tokens / turns.side(0, clock), tokens / turns.side(1, clock)
    verdict = report.add(
        name, turns, turns.ratio(clock), goal, ours_per_second=ours, theirs_per_second=theirs, low=low, high=high,
        cpu=turns.ratio(cpu), prompt=turns.pairs[0][0]["prompt"],
    )  # fmt: skip
    print(
        f"{name:44}{ours:9.0f}{theirs:9.0f}{turns.ratio(clock):7.2f} [{low:.2f}, {high:.2f}]"
        f"{turns.ratio(cpu):6.2f}   {verdict}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
