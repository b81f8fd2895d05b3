"""How well mini reads: held-out samples per task, one table.

    python recipes/mini_eval.py --model mirada/assets/mini --samples 500

Fonts, words, question phrasings and seeds are all held out. ``line`` and ``paragraph`` are scored by character error
rate (edits over reference characters), the rest by exact answers (case and final punctuation set aside); intervals are
95 % bootstrap over samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from mirada import VLM, Image, Message, Sampling, Text, synth

HELD_SEED = 990_001


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the table. ``max_chars`` bounds a line's length, ``kinds`` what it says; ``errors``: less is better."""

    name: str
    task: str
    errors: bool
    max_chars: int | None = None
    kinds: tuple[str, ...] = ()


TASKS = (
    Task("words and numbers of up to 12 characters", "line", True, 12, ("word", "number")),
    Task("line, up to 12 characters, of any kind", "line", True, 12),
    Task("line, up to 40 characters", "line", True, 40),
    Task("paragraph", "paragraph", True),
    Task("scene", "scene", False),
    Task("boxes", "boxes", False),
    Task("chart", "chart", False),
)


def normalise(answer: str) -> str:
    return " ".join(answer.lower().strip().rstrip(".!").split())


def score(task: Task, truth: str, answer: str) -> tuple[float, float]:
    """(numerator, denominator) of one sample: edits over characters, or 1 of 1 for a right answer."""
    if task.errors:
        return float(Levenshtein.distance(truth, answer)), float(len(truth))
    return float(normalise(truth) == normalise(answer)), 1.0


def interval(pairs: np.ndarray, rounds: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of sum(numerators) / sum(denominators)."""
    rows = np.random.default_rng(0).integers(len(pairs), size=(rounds, len(pairs)))
    ratios = pairs[rows, 0].sum(1) / pairs[rows, 1].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def evaluate(vlm: VLM, task: Task, samples: int, batch: int, log: Path | None) -> dict[str, float]:
    """Ask ``samples`` held-out questions; an error counts as its own figure, never as an answer."""
    pairs, failed = [], 0
    stream = itertools.islice(draw(task), samples)
    while drawn := list(itertools.islice(stream, batch)):
        chats = [[Message("user", (Image(s.image), Text(s.question)))] for s in drawn]
        for sample, output in zip(drawn, vlm.generate(chats, Sampling(max_tokens=96)), strict=True):
            if output.error is not None:
                failed += 1
                continue
            pairs.append(score(task, sample.answer, output.message.text))
            if log is not None:
                with log.open("a") as file:
                    row = {
                        "task": task.name,
                        "question": sample.question,
                        "truth": sample.answer,
                        "answer": output.message.text,
                    }
                    file.write(json.dumps(row) + "\n")
    made = np.asarray(pairs)
    low, high = interval(made)
    return {"value": float(made[:, 0].sum() / made[:, 1].sum()), "low": low, "high": high, "asked": samples, "failed": failed}


def draw(task: Task) -> Iterator[synth.Sample]:
    """Held-out samples without end; those of another kind than the task's are passed over."""
    extra = {} if task.max_chars is None else {"max_chars": task.max_chars}
    for index in itertools.count():
        sample = synth.sample(task.task, HELD_SEED, index, split="held", level=1.0, **extra)
        if not task.kinds or sample.facts["kind"] in task.kinds:
            yield sample


def table(rows: Sequence[tuple[Task, dict[str, float]]]) -> str:
    lines = ["| held-out task | figure | value | 95 % interval | asked | failed |", "|---|---|---|---|---|---|"]
    for task, row in rows:
        figure = "character error rate" if task.errors else "right answers"
        lines.append(
            f"| {task.name} | {figure} | {row['value']:.3f} | {row['low']:.3f} to {row['high']:.3f} "
            f"| {row['asked']:.0f} | {row['failed']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--log", type=Path, help="append every question and answer to this JSONL file")
    parser.add_argument("--card", type=Path, help="write the figures into this card.json")
    args = parser.parse_args()
    vlm, rows = VLM(args.model), []
    for task in TASKS:
        clock = time.perf_counter()
        rows.append((task, evaluate(vlm, task, args.samples, args.batch, args.log)))
        print(f"{task.name}: {rows[-1][1]['value']:.3f} ({time.perf_counter() - clock:.0f} s)", flush=True)
    print(table(rows))
    if args.card is not None:
        card = json.loads(args.card.read_text())
        card["held_out"] = {task.name: {k: round(v, 4) for k, v in row.items()} for task, row in rows}
        args.card.write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
