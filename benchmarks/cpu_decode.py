"""Prefill and decode on a CPU, at each precision, against transformers and llama.cpp on the same weights.

    python benchmarks/cpu_decode.py --peer-python PEERS/bin/python [--shape 2b|512|mini] [--only int8] [--pairs 7] [--mini 200]

A row is one precision of ours beside one peer: a prompt of random ids (another one each pair, so no cache helps), then tokens
chosen greedily, ends ignored. Seconds of decode are per token, from the first token's arrival to the last one's through the
public face; a peer runs its bare loop. Ratios are theirs to ours, medians over pairs taken in turn (smallest and largest in
brackets); the floor is the bytes of all weights that a token reads, divided by the bandwidth measured just before. A small
shape's weights stay in the processor's cache, so it may pass that floor.

*The head* (as large as five of the layers) has the same precision on both sides: gguf files are written here, and the tied
embedding takes the row's type, but Q8_0 beside our ``int4``, whose head keeps 8 bits (``--head`` sets another).
*Cache*: llama.cpp keeps keys and values in 16 bits, as it does by default.
*Like for like* are rows of one kind of weights; int8 and int4 rows are set against llama.cpp's at 8 and 4 bits alone.

Error stands beside speed: KL divergence (nats, mean over positions) of each side's next-token distribution from float32's on
the same random weights, how often both would choose the same token, and, for our decode steps, how far the log-probability of
each chosen token is from what float32 gives it in one pass. ``--mini N``: held-out figures of the model inside the package at
each precision, N samples a task.
Refuses to measure while other programs keep the CPU busy, unless ``--anyway``. Exit status 1: a row is below its goal.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import numpy as np
import shapes
from harness import Report, Turns, Worker, workers

PROMPT, NEW = 256, 64
CHECKED = (2, 64)
"""Prompts and tokens of each whose distributions are compared."""
STEPS = 32
"""Decode steps whose log-probabilities are compared."""
INT8 = 1.0 + 2 / 128
WIDTH = {"fp32": (4.0, 4.0), "exact": (2.0, 2.0), "int8": (INT8, INT8), "int4": (0.5 + 2 / 32, INT8)}
"""Bytes per weight of the layers and of the head, scales included: what a decoded token must read."""
HEADS = {"Q4_0": "Q8_0"}
"""Type of the head in a gguf file where it is not that of the layers."""


@dataclass(frozen=True)
class Row:
    """One precision of ours, one peer in one type, and the ratios to reach."""

    mode: str
    peer: str
    kind: str
    goals: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.mode} : {PEERS[self.peer]} {self.kind}"


PEERS = {"text": "transformers", "llama": "llama.cpp", "self": "itself"}
SMALL = (
    Row("fp32", "text", "float32", {"decode": 1.8}),
    Row("fp32", "llama", "F32", {"decode": 0.75}),
    Row("exact", "llama", "BF16", {"decode": 0.75}),
    Row("int8", "llama", "Q8_0", {"decode": 0.75}),
    Row("int4", "llama", "Q4_0", {"decode": 0.75}),
)
ROWS: dict[str, tuple[Row, ...]] = {
    "2b": (
        Row("exact", "text", "bfloat16", {"decode": 1.1}),
        Row("exact", "text", "float32", {"prefill": 1.2}),
        Row("exact", "llama", "BF16"),
        Row("int8", "llama", "Q8_0", {"decode": 0.95, "prefill": 1.4}),
        Row("int4", "llama", "Q4_0", {"decode": 0.95, "prefill": 1.0}),
    ),
    "512": SMALL,
    "mini": SMALL,
    "tiny": (Row("fp32", "self", "fp32"),),
}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    pressure = harness.require_quiet(options.anyway or options.smoke)
    report = Report(options, pressure)
    bench = Bench(options, report)
    for shape in options.shape:
        bench.shape(shape)
    if options.mini:
        bench.scores(options.mini)
    return report.finish()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.arguments(parser)
    parser.add_argument("--shape", choices=ROWS, nargs="+", default=["mini", "2b"])
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose name holds this")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--new", type=int, default=NEW)
    parser.add_argument("--head", choices=("F32", "F16", "BF16", "Q8_0", "Q4_0"), help="type of the head in gguf files")
    parser.add_argument("--no-error", action="store_true", help="leave out the comparison of distributions")
    parser.add_argument("--mini", type=int, metavar="N", help="held-out figures of mini at each precision, N samples a task")
    options = parser.parse_args(argv)
    if options.smoke:
        options.shape, options.pairs, options.prompt, options.new = ["tiny"], 2, 24, 6
    return options


class Bench:
    """All rows of one run."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options, self.report = options, report
        self.bandwidth = 0.0

    def shape(self, shape: str) -> None:
        rows = [row for row in ROWS[shape] if self.options.only in row.name]
        if not rows:
            sys.exit(f"no row of {shape} has {self.options.only!r} in its name")
        checkpoint = self.checkpoint(shape)
        numbers = shapes.TEXT[shape]
        self.prompts = [self.prompt(shape, i, self.options.prompt) for i in range(self.options.pairs + 1)]
        print(
            f"\n{shape}: {numbers['num_hidden_layers']} layers of {numbers['hidden_size']}, "
            f"vocabulary {numbers['vocab_size']}, {shapes.weights(shape) / 1e6:.0f} M weights a token; "
            f"prompt {self.options.prompt}, {self.options.new} new, "
            f"{self.options.threads} thread(s), {self.options.pairs} pairs"
        )
        print(f"{'ours : theirs':34}{'':9}{'ours ms':>9}{'theirs':>9}{'ratio':>7}{'':14}{'CPU':>6}{'floor':>8}   goal")
        errors = []
        for row in rows:
            errors.append((row, self.row(shape, checkpoint, row)))
        if not self.options.no_error:
            self.errors(shape, checkpoint, errors)

    def checkpoint(self, shape: str) -> Path:
        """Made in a process of its own, whose memory is then free again."""
        directory = self.options.folder / shape
        done = subprocess.run([sys.executable, str(harness.HERE / "shapes.py"), shape, str(directory)], check=False)
        if done.returncode:
            sys.exit(f"making {directory} failed")
        return directory

    def prompt(self, shape: str, seed: int, size: int) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(shapes.FIRST_PLAIN, shapes.TEXT[shape]["vocab_size"]) for _ in range(size)]

    def peer(self, shape: str, checkpoint: Path, row: Row) -> Worker:
        threads = self.options.threads
        if row.peer == "self":
            return Worker("mirada", "ours.py", threads=threads)
        if row.peer == "text":
            python = harness.peer_python(self.options, ("torch", "transformers"))
            return Worker("transformers", "peers.py", "text", str(checkpoint), row.kind, python=python, threads=threads)
        python = harness.peer_python(self.options, ("llama_cpp", "gguf", "torch"))
        head = self.options.head or HEADS.get(row.kind, row.kind)
        file = checkpoint.parent / f"{shape}-{row.kind}-{head}.gguf"
        if not file.exists() or file.stat().st_mtime < (checkpoint / "made.json").stat().st_mtime:
            command = [python, str(harness.HERE / "gguf_file.py"), str(checkpoint), str(file), row.kind, "--head", head]
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
                sys.exit(f"making {file} failed")
        return Worker("llama.cpp", "peers.py", "llama", str(file), python=python, threads=threads)

    def row(self, shape: str, checkpoint: Path, row: Row) -> dict[str, Any]:
        """Speed of both sides, printed; returns where their distributions were written."""
        # Ours may hold float32 beside what is stored, for prefill; theirs copies once while it loads.
        harness.require_memory(shapes.weights(shape) * (6.0 + 8.0 * (row.kind == "float32")), f"{shape} {row.name}")
        ours = Worker("mirada", "ours.py", threads=self.options.threads)
        with workers(ours, self.peer(shape, checkpoint, row)) as (_, theirs):
            self.bandwidth = ours.ask("bandwidth", **{"side": 1 << 8} if self.options.smoke else {})
            loaded = self.load(ours, checkpoint, row.mode) | {"bandwidth": self.bandwidth}
            told = self.load(theirs, checkpoint, row.mode) if row.peer == "self" else theirs.ask("load")
            orders = [{"do": "run", "ids": ids, "new": self.options.new} for ids in self.prompts]
            harness.in_turn(ours, theirs, [(order, order) for order in orders[:1]])  # first touch of everything
            turns = harness.in_turn(ours, theirs, [(order, order) for order in orders[1:]])
            self.line(shape, row, turns, loaded | {"setting": told.get("setting", "")})
            return {} if self.options.no_error else self.distributions(shape, ours, theirs)

    def load(self, worker: Worker, checkpoint: Path, mode: str) -> dict[str, Any]:
        return worker.ask("load", model=str(checkpoint), mode=mode)

    def line(self, shape: str, row: Row, turns: Turns, facts: dict[str, Any]) -> None:
        for stage, what, unit in (("decode", "decode", 1), ("prefill", "prefill", self.options.prompt)):

            def clock(made: Any, stage: str = stage) -> float:
                return made[stage][0]

            def cpu(made: Any, stage: str = stage) -> float:
                return made[stage][1]

            low, high = turns.spread(clock)
            mine, other = turns.side(0, clock) * 1e3, turns.side(1, clock) * 1e3
            floor = read(shape, row.mode) / self.bandwidth * 1e3 if stage == "decode" else None
            verdict = self.report.add(
                f"{shape} {row.name} {what}", turns, turns.ratio(clock), row.goals.get(stage), ours_ms=mine, theirs_ms=other,
                low=low, high=high, cpu=turns.ratio(cpu), floor_ms=floor, per_second=1e3 * unit / mine, **facts,
            )  # fmt: skip
            said = f"{row.name:34}" if stage == "decode" else f"{'  ' + facts['setting']:34}"
            floor_said = "" if floor is None else f"{floor:.2f}"
            print(
                f"{said}{what:9}{mine:9.2f}{other:9.2f}{turns.ratio(clock):7.2f} [{low:.2f}, {high:.2f}]"
                f"{turns.ratio(cpu):6.2f}{floor_said:>8}   {verdict}",
                flush=True,
            )

    def distributions(self, shape: str, ours: Worker, theirs: Worker) -> dict[str, Any]:
        """Files of logits of both sides, and our decode steps with their log-probabilities."""
        prompts = self.checked(shape)
        made: dict[str, Any] = {}
        for side, worker in (("ours", ours), ("theirs", theirs)):
            made[side] = str(self.options.folder / f"logits-{side}-{ours.name}-{len(self.report.rows)}.npy")
            worker.ask("logits", prompts=prompts, file=made[side])
        made["steps"] = ours.ask("run", ids=prompts[0], new=STEPS, logprobs=0)
        return made

    def checked(self, shape: str) -> list[list[int]]:
        size = min(CHECKED[1], self.options.prompt)
        return [self.prompt(shape, 1000 + i, size) for i in range(CHECKED[0])]

    def errors(self, shape: str, checkpoint: Path, made: list[tuple[Row, dict[str, Any]]]) -> None:
        """Distances from float32, which is loaded last and alone."""
        harness.require_memory(shapes.weights(shape) * 8.0, f"{shape} in float32")
        with reference(self, checkpoint) as worker:
            file = str(self.options.folder / "logits-reference.npy")
            prompts = self.checked(shape)
            worker.ask("logits", prompts=prompts, file=file)
            right = log_softmax(np.load(file))
            print(
                f"\n{'error from float32':34}{'KL ours':>11}{'theirs':>11}{'same choice':>13}{'theirs':>9}{'decode steps':>14}"
            )
            for row, facts in made:
                steps = facts["steps"]
                worker.ask("logits", prompts=[prompts[0] + steps["tokens"][:-1]], file=file)
                whole = log_softmax(np.load(file))[0, len(prompts[0]) - 1 :]
                given = whole[np.arange(STEPS), steps["tokens"]]
                apart = float(np.abs(given - np.asarray(steps["logprobs"])).mean())
                (kl, same), (their_kl, their_same) = (
                    distance(right, log_softmax(np.load(facts[side]))) for side in ("ours", "theirs")
                )
                self.report.rows.append(
                    {"name": f"{shape} {row.name} error", "kl": kl, "theirs_kl": their_kl, "same": same,
                     "theirs_same": their_same, "steps": apart}
                )  # fmt: skip
                print(f"{row.name:34}{kl:11.2e}{their_kl:11.2e}{same:13.3f}{their_same:9.3f}{apart:14.2e}", flush=True)
                for side in ("ours", "theirs"):
                    Path(facts[side]).unlink()

    def scores(self, samples: int) -> None:
        """Held-out figures of mini at each precision."""
        print(f"\nmini, held out, {samples} samples a task (character error rate, or share of right answers)")
        table: dict[str, dict[str, float]] = {}
        for mode in WIDTH:
            with workers(Worker("mirada", "ours.py", threads=self.options.threads)) as (worker,):
                worker.ask("load", model="mini", mode=mode)
                table[mode] = worker.ask("score", samples=samples)
        print(f"{'':44}" + "".join(f"{mode:>9}" for mode in table))
        for task in table["fp32"]:
            print(f"{task:44}" + "".join(f"{table[mode][task]:9.3f}" for mode in table))
        self.report.rows.append({"name": "mini held out", "samples": samples, "figures": table})


@contextmanager
def reference(bench: Bench, checkpoint: Path) -> Iterator[Worker]:
    with workers(Worker("mirada", "ours.py", threads=bench.options.threads)) as (worker,):
        bench.load(worker, checkpoint, "fp32")
        yield worker


def read(shape: str, mode: str) -> float:
    """Bytes of weights that one decoded token reads."""
    head = shapes.TEXT[shape]["hidden_size"] * shapes.TEXT[shape]["vocab_size"]
    return (shapes.weights(shape) - head) * WIDTH[mode][0] + head * WIDTH[mode][1]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def distance(right: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """KL(right || made) in nats, mean over positions, and the share of positions with the same most likely token."""
    return float((np.exp(right) * (right - made)).sum(-1).mean()), float((right.argmax(-1) == made.argmax(-1)).mean())


if __name__ == "__main__":
    sys.exit(main())
