"""Drafts on and off, in turn, in one process around one model: what speculation gains where replies copy, and what it costs
where they do not.

    python benchmarks/speculate.py [--shape mini 512 2b] [--mode int4] [--right 1 0.8 0.5 0] [--new 96] [--json rows.json]

Three kinds of reply, each greedy and the same with and without drafts (that is checked):

- *reads again*: the model inside the package reads a sign, and is asked the same once more, its answer in the chat before.
  What a user would see: short replies that copy.
- *goes round*: it is made to write on past its end and repeats itself. Nothing flatters lookup more.
- *made drafts*: random weights of a shape copy nothing, so drafts come from a made source that knows the reply, and each of
  their tokens is right with the probability that is named. This measures the engine and the kernels, not the lookup.

Columns: milliseconds per token without and with drafts, the ratio of the two (median of the pairs; above 1: drafts are
quicker), the same with every draft sent whatever it costs, tokens per step, and the share of what was sent that was right.
Below stand the times of steps by their rows that the engine learnt. Both sides share weights and everything else.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import harness
import shapes
import torch
from ours import MODES

from mirada import VLM, Image, Message, Sampling, Text
from mirada.types import Prompt

LOOKED_UP = 7
COUNTED = ("steps", "proposed_tokens", "accepted_tokens")
NOT_SLOWER = 0.95
"""Goal of every row: nothing is lost where drafts are wrong or their rows dear."""
SIGN = shapes.HERE.parent / "examples" / "sign.png"
QUESTION = "What does the sign say?"


class Free:
    """In place of ``engine.drafts.StepCost``: every draft is sent."""

    def note(self, rows: int, seconds: float) -> None:
        pass

    def __call__(self, rows: int) -> float:
        return 1.0


class Side:
    """One engine, asked as ``harness.Worker`` is."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm, self.drafts = vlm, vlm._engine.engine.drafts

    @property
    def cpu(self) -> float:
        return time.process_time()

    def ask(self, chat: Any, sampling: Sampling) -> dict[str, Any]:
        """Of one reply: seconds per token after the first, tokens per step, and what was sent."""
        before = self.vlm.stats()
        output = self.vlm.submit(chat, sampling).result()
        if output.error is not None:
            raise output.error
        made = {name: count - before[name] for name, count in self.vlm.stats().items() if name in COUNTED}
        seconds = output.metrics["total"] - output.metrics["first_token"]
        new = len(output.tokens)
        return made | {"seconds": seconds / max(1, new - 1), "per_step": new / made["steps"], "tokens": output.tokens}


class Made:
    """A source of drafts that knows the reply, and errs."""

    def __init__(self, sequence: Any, reply: tuple[int, ...], right: float) -> None:
        self.sequence, self.reply, self.right = sequence, reply, right

    def propose(self, count: int) -> list[int]:
        start = len(self.sequence.tokens)
        drafted = enumerate(self.reply[start : start + count], start)
        return [token if random.Random(at).random() < self.right else token ^ 1 for at, token in drafted]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.arguments(parser)
    parser.add_argument("--shape", nargs="+", choices=list(shapes.TEXT), default=["mini", "512", "2b"])
    parser.add_argument("--mode", nargs="+", choices=list(MODES), default=["int4"])
    parser.add_argument("--right", nargs="+", type=float, default=[1.0, 0.8, 0.5, 0.0])
    parser.add_argument("--new", type=int, default=96, help="tokens of a reply")
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.mode, options.right, options.pairs, options.new = ["tiny"], ["fp32"], [1.0, 0.0], 1, 12
    report = harness.Report(options, harness.require_quiet(options.anyway or options.smoke))
    torch.set_num_threads(options.threads)
    print(f"{'':34} {'off':>8} {'on':>8} {'ratio':>6} {'spread':>13} {'all':>6} {'a step':>7} {'right':>6}")
    inside(report)
    for shape in options.shape:
        for mode in options.mode:
            made_drafts(report, shape, mode)
    return report.finish()


def inside(report: harness.Report) -> None:
    """The model in the package, and its own lookup."""
    with VLM("mini") as off, drafting(off) as on:
        asked = Message("user", (Image(str(SIGN)), Text(QUESTION)))
        said = off.generate([[asked]], Sampling(max_tokens=32))[0].message
        row(report, "mini, reads again", off, on, [asked, said, asked], Sampling(max_tokens=32))
        endless = Sampling(max_tokens=4 * report.options.new, ignore_eos=True, max_repeats=None)
        row(report, "mini, goes round", off, on, [Message("user", "Say one two three again and again.")], endless)
        costs(on)


def made_drafts(report: harness.Report, shape: str, mode: str) -> None:
    options = report.options
    if not options.smoke:
        harness.require_memory(shapes.weights(shape) * 4.0, f"shape {shape}")
    directory = shapes.make(options.folder / shape, shape)
    settings = {"prefix_cache_bytes": 0, "workers": 0}
    with VLM(directory, device="cpu", engine=settings, **MODES[mode]) as off, drafting(off) as on:
        draw = random.Random(0)
        prompt = Prompt(tuple(draw.randrange(shapes.FIRST_PLAIN, shapes.TEXT[shape]["vocab_size"]) for _ in range(64)))
        sampling = Sampling(max_tokens=options.new, ignore_eos=True, max_repeats=None)
        reply = off.submit(prompt, sampling).result().tokens
        drafts: Any = on._engine.engine.drafts
        for right in options.right:
            drafts.lookup = lambda sequence, right=right: Made(sequence, reply, right)
            row(report, f"{shape} {mode}, {right:.0%} of drafts right", off, on, prompt, sampling)
        costs(on)


@contextmanager
def drafting(off: VLM) -> Iterator[VLM]:
    """An engine of its own around the same model, with drafts."""
    parts = off.parts
    settings = {"prefix_cache_bytes": 0, "workers": 0, "speculate": LOOKED_UP}
    with VLM.from_parts(parts.model, parts.renderer, parts.rule, eos=parts.eos, engine=settings) as on:
        yield on


def row(report: harness.Report, name: str, off: VLM, on: VLM, chat: Any, sampling: Sampling) -> None:
    order = {"chat": chat, "sampling": sampling}
    with_drafts, without = Side(on), Side(off)
    for side in (with_drafts, without):
        side.ask(**order)
    turns = harness.in_turn(with_drafts, without, [(order, order)] * report.options.pairs)
    with every_draft(on):
        all_sent = harness.in_turn(with_drafts, without, [(order, order)] * max(1, report.options.pairs // 2))
    for ours, theirs in (*turns.pairs, *all_sent.pairs):
        if ours["tokens"] != theirs["tokens"]:
            sys.exit(f"{name}: drafts changed the reply: {ours['tokens']} instead of {theirs['tokens']}")
    ratio, always = turns.ratio(seconds), all_sent.ratio(seconds)
    low, high = turns.spread(seconds)
    sent, right = (sum(pair[0][key] for pair in turns.pairs) for key in ("proposed_tokens", "accepted_tokens"))
    per_step = turns.side(0, lambda said: said["per_step"])
    ms = [1000 * turns.side(which, seconds) for which in (1, 0)]
    word = report.add(name, turns, ratio, NOT_SLOWER, always=always, off_ms=ms[0], on_ms=ms[1], tokens_per_step=per_step)
    share = f"{right / sent:6.0%}" if sent else "  none"
    print(
        f"{name:34} {ms[0]:8.2f} {ms[1]:8.2f} {ratio:6.2f} {low:6.2f}-{high:6.2f} {always:6.2f} {per_step:7.2f} {share} {word}"
    )


def seconds(said: dict[str, Any]) -> float:
    return said["seconds"]


@contextmanager
def every_draft(on: VLM) -> Iterator[None]:
    drafts: Any = on._engine.engine.drafts
    kept, drafts.costs = drafts.costs, {False: Free(), True: Free()}
    try:
        yield
    finally:
        drafts.costs = kept


def costs(on: VLM) -> None:
    """Milliseconds of a step by its rows, as they were learnt."""
    cost: Callable[[int], float] = on._engine.engine.drafts.costs[False]
    known = {rows: cost(rows) for rows in (1, 2, 4, 8)}
    print("    a step of 1, 2, 4, 8 rows: " + ", ".join(f"{1000 * one:.2f}" for one in known.values()) + " ms")


if __name__ == "__main__":
    sys.exit(main())
