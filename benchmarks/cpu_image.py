"""Time to the first token of a question about a picture, and ten questions about one: against transformers, same weights, CPU.

    python benchmarks/cpu_image.py --peer-python PEERS/bin/python [--sizes 448 1344] [--answers 1 4 8] [--pairs 7]

The model is Qwen2-VL-2B scaled down in depth alone: all its widths, 4 of the 32 layers of its tower and 4 of the 28 of its
decoder, random weights, float32 on both sides (``--mode`` takes another of ours; then it is no longer like for like). A
448x448 picture is 1,024 patches and 256 tokens, a 1344x1344 one 9,216 patches and 2,304 tokens.

Both sides start from the same pixels in memory and end with a token: preparing, prompt, tower, prefill. Every pair has a
picture of its own, so no cache of ours helps. transformers runs its PIL image processor, ``generate`` and the attention that is
the quicker for each size, tried before.
*Ten questions* are asked one after the other about one 448x448 picture, ``--answers`` tokens each: ours keep what they computed
of the picture, transformers' ``generate`` starts anew, which is what it offers. Every token after an answer's first reads all
weights once on both sides, so the longer the answers, the less the picture counts. *Ten at once* are asked together: ours in
one ``generate`` of ten chats, which encodes the picture once and decodes all ten in each step; theirs in a padded batch of ten
copies or one after the other, whichever is the quicker, tried before.
Refuses to measure while other programs keep the CPU busy, unless ``--anyway``. Exit status 1: a row is below its goal.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import Report, Worker, workers

WORDS = ("what", "where", "which", "colour", "shape", "number", "left", "above", "below", "large", "small", "stands", "behind")
QUESTIONS = 10


@dataclass(frozen=True)
class Row:
    """``make(i)`` gives the order of pair i; ``key`` is the stage of its answer that is compared."""

    name: str
    make: Callable[[int], dict[str, Any]]
    size: int
    key: str
    goal: float
    padded: bool = False
    """Whether theirs may be asked in one padded batch or one by one (``together`` of the order)."""


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    pressure = harness.require_quiet(options.anyway or options.smoke)
    report = Report(options, pressure)
    checkpoint = make(options)
    harness.require_memory(0.0 if options.smoke else 8e9, "this shape on both sides")
    ours = Worker("mirada", "ours.py", threads=options.threads)
    with workers(ours, peer(options, checkpoint)) as (_, theirs):
        load(ours, checkpoint, options.mode)
        if options.smoke:
            load(theirs, checkpoint, options.mode)
        print(
            f"Qwen2-VL-2B's widths, {options.tower_layers} of 32 layers of the tower, {options.text_layers} of 28 of the "
            f"decoder, {options.mode} : {options.dtype}, {options.threads} thread(s), "
            f"{options.pairs} pairs"
        )
        print(f"{'':34}{'ours s':>9}{'theirs':>9}{'ratio':>7}{'':14}{'CPU':>6}   goal")
        for row in rows(options):
            attention = None if options.smoke else theirs.ask("load", size=row.size)["setting"]
            together = quickest(theirs, row, options.smoke) if row.padded else None
            measure(ours, theirs, row, report, attention, together)
    return report.finish()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.arguments(parser)
    parser.add_argument("--tower-layers", type=int, default=4)
    parser.add_argument("--text-layers", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="*", default=[448, 1344], help="sides of the pictures, in pixels")
    parser.add_argument("--asked", type=int, default=448, help="side of the picture of which all ten are")
    parser.add_argument("--answers", type=int, nargs="*", default=[1, 4, 8], help="tokens of each answer, a row each")
    parser.add_argument("--mode", choices=("fp32", "exact", "int8", "int4"), default="fp32")
    parser.add_argument("--dtype", default="float32", help="of transformers")
    options = parser.parse_args(argv)
    if options.smoke:
        options.pairs, options.sizes, options.asked, options.answers = 1, [112], 112, [2]
        options.tower_layers = options.text_layers = 2
    return options


def make(options: argparse.Namespace) -> Path:
    shape, vision = ("tiny", "tiny") if options.smoke else ("2b", "full")
    directory = options.folder / f"picture-{shape}-{options.tower_layers}-{options.text_layers}"
    layers = ["--vision-layers", str(options.tower_layers), "--text-layers", str(options.text_layers)]
    command = [sys.executable, str(harness.HERE / "shapes.py"), shape, str(directory), "--vision", vision, *layers]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"making {directory} failed")
    return directory


def peer(options: argparse.Namespace, checkpoint: Path) -> Worker:
    if options.smoke:
        return Worker("mirada", "ours.py", threads=options.threads)
    python = harness.peer_python(options, ("torch", "transformers", "PIL"))
    return Worker("transformers", "peers.py", "vision", str(checkpoint), options.dtype, python=python, threads=options.threads)


def load(worker: Worker, checkpoint: Path, mode: str) -> dict[str, Any]:
    # The checkpoint's own bound on pixels is far above these sizes.
    return worker.ask("load", model=str(checkpoint), mode=mode)


def question(number: int) -> str:
    """Another one for every number."""
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(8)) + f" {number}?"


def rows(options: argparse.Namespace) -> list[Row]:
    def first(size: int) -> Callable[[int], dict[str, Any]]:
        return lambda i: {"do": "ask", "size": size, "seed": size + i, "question": question(i)}

    def ten(new: int) -> Callable[[int], dict[str, Any]]:
        def make(i: int) -> dict[str, Any]:
            asked = [question(i * QUESTIONS + j) for j in range(QUESTIONS)]
            return {"do": "ask_all", "size": options.asked, "seed": 10**6 * new + i, "questions": asked, "new": new}

        return make

    def at_once(new: int) -> Callable[[int], dict[str, Any]]:
        def make(i: int) -> dict[str, Any]:
            seed = 10**8 * new + i
            asked = [{"size": options.asked, "seed": seed, "text": question(i * QUESTIONS + j)} for j in range(QUESTIONS)]
            return {"do": "batch", "requests": asked, "new": new}

        return make

    made = [Row(f"first token, {size}x{size}", first(size), size, "first", 1.15) for size in options.sizes]
    for new in options.answers:
        made.append(Row(f"ten questions, {new} token(s) each", ten(new), options.asked, "all", 5.0))
        made.append(Row(f"ten at once, {new} token(s) each", at_once(new), options.asked, "all", 5.0, padded=True))
    return made


def quickest(theirs: Worker, row: Row, smoke: bool) -> int:
    """How many of the questions their padded batch holds: all or one. (Ours, standing in for them, take no other number.)"""
    if smoke:
        return 1
    taken: dict[int, float] = {}
    for size in (QUESTIONS, 1):
        taken[size] = theirs.ask(**row.make(10**6), together=size)[row.key][0]
    return min(taken, key=lambda size: taken[size])


def measure(ours: Worker, theirs: Worker, row: Row, report: Report, attention: str | None, together: int | None = None) -> None:
    """``together``: of theirs."""
    other = {} if together is None else {"together": together}
    orders = [(order, order | other) for order in map(row.make, range(report.options.pairs + 1))]
    harness.in_turn(ours, theirs, orders[:1])  # first touch of everything
    turns = harness.in_turn(ours, theirs, orders[1:])
    for mine, other in turns.pairs:
        if mine["prompt"] != other["prompt"]:
            sys.exit(f"{row.name}: {mine['prompt']} prompt tokens on our side, {other['prompt']} on theirs")

    def clock(made: Any) -> float:
        return made[row.key][0]

    def cpu(made: Any) -> float:
        return made[row.key][1]

    low, high = turns.spread(clock)
    verdict = report.add(
        row.name, turns, turns.ratio(clock), row.goal, ours_s=turns.side(0, clock), theirs_s=turns.side(1, clock),
        low=low, high=high, cpu=turns.ratio(cpu), prompt=turns.pairs[0][0]["prompt"], together=together,
    )  # fmt: skip
    print(
        f"{row.name:34}{turns.side(0, clock):9.3f}{turns.side(1, clock):9.3f}{turns.ratio(clock):7.2f} [{low:.2f}, {high:.2f}]"
        f"{turns.ratio(cpu):6.2f}   {verdict}"
        + (f"   (theirs: {attention}" + ("" if together is None else f", batches of {together}") + ")" if attention else ""),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
