"""What choosing a token costs: CPU time per step of the sampler, beside the plain argmax and beside transformers' processors.

    python benchmarks/sampling.py [--vocabulary 151936] [--rows 1 32] [--rounds 15] [--peer]

One thread. Each round runs every way once, in turn; the table shows the least CPU time of the rounds in microseconds per step
and its ratio to ``argmax`` over the same logits (what a plain greedy loop does). Logits are random and fresh to no way in
particular; a real model's are peaked, which only helps top-p. State is kept as in the engine: a prompt of 1000 tokens, 200
generated. ``--peer`` adds the LogitsProcessor chain of transformers (extra ``parity``) with its multinomial draw for the ways
that it has; it rebuilds its counts at every step, and cannot differ by row.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable

import torch

from mirada.engine import guide
from mirada.engine.loops import LoopGuard
from mirada.engine.ngram import NGramIndex
from mirada.engine.sample import Chooser, pick
from mirada.types import Sampling

WAYS = {
    "greedy": Sampling(),
    "temperature": Sampling(temperature=0.7, seed=1),
    "top-k 20, top-p 0.8": Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=1),
    "top-p 0.9": Sampling(temperature=0.7, top_p=0.9, seed=1),
    "top-p 0.9, flat": Sampling(temperature=6.0, top_p=0.9, seed=1),
    "repetition penalty 1.05": Sampling(repetition_penalty=1.05),
    "presence and frequency": Sampling(presence_penalty=0.5, frequency_penalty=0.2),
    "logprobs 5": Sampling(logprobs=5),
    "all of these": Sampling(
        temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05, presence_penalty=0.5, logprobs=5, seed=1
    ),
}
PROMPT, ANSWER = 1000, 200


class Half:
    """A guide that allows every second token."""

    def mask(self, out) -> None:
        out[:] = 0x55555555

    def accept(self, token: int) -> None: ...

    finished = False

    def forced(self) -> tuple[int, ...]:
        return ()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    with torch.inference_mode():
        for rows in options.rows:
            logits = torch.randn(rows, options.vocabulary, generator=torch.Generator().manual_seed(0)) * 3
            ways = ours(logits)
            if options.peer:
                ways |= peers(logits)
            report(rows, options.vocabulary, measure(ways, options.rounds))
    per_token()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peer", action="store_true", default=importlib.util.find_spec("transformers") is not None)
    return parser.parse_args()


def ours(logits: torch.Tensor) -> dict[str, Callable[[], object]]:
    ways: dict[str, Callable[[], object]] = {"argmax": lambda: logits.argmax(-1).tolist()}
    for name, sampling in WAYS.items():
        ways[name] = step(logits, [made(sampling, None) for _ in range(len(logits))])
    ways["a guide"] = step(logits, [made(Sampling(), Half()) for _ in range(len(logits))])
    if len(logits) > 1:
        mixed = [made(list(WAYS.values())[-1] if row == 0 else Sampling(), None) for row in range(len(logits))]
        ways["all of these, one row of the batch"] = step(logits, mixed)
    return ways


def made(sampling: Sampling, rules: guide.Guide | None) -> Chooser:
    chooser = Chooser(sampling, range(PROMPT), rules)
    for token in range(PROMPT, PROMPT + ANSWER):
        chooser.note(token)
    return chooser


def step(logits: torch.Tensor, choosers: list[Chooser]) -> Callable[[], object]:
    def run() -> None:
        picked = pick(logits, choosers)
        for chooser, token in zip(choosers, picked.tokens, strict=True):
            chooser.note(token)

    return run


def peers(logits: torch.Tensor) -> dict[str, Callable[[], object]]:
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
    from transformers import TemperatureLogitsWarper as Temperature
    from transformers import TopKLogitsWarper as TopK
    from transformers import TopPLogitsWarper as TopP

    ids = torch.arange(PROMPT + ANSWER).expand(len(logits), -1)

    def chain(*processors: object, draw: bool = True) -> Callable[[], object]:
        made = LogitsProcessorList(processors)

        def run() -> object:
            scores = made(ids, logits.clone())  # as its generate() does: the next step's logits are copied to float32
            if not draw:
                return scores.argmax(-1).tolist()
            return torch.multinomial(scores.softmax(-1), 1)[:, 0].tolist()

        return run

    return {
        "transformers: greedy": chain(draw=False),
        "transformers: temperature": chain(Temperature(0.7)),
        "transformers: top-k 20, top-p 0.8": chain(Temperature(0.7), TopK(20), TopP(0.8)),
        "transformers: top-p 0.9": chain(Temperature(0.7), TopP(0.9)),
        "transformers: top-p 0.9, flat": chain(Temperature(6.0), TopP(0.9)),
        "transformers: repetition penalty 1.05": chain(RepetitionPenaltyLogitsProcessor(1.05), draw=False),
    }


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least CPU seconds of each."""
    least = dict.fromkeys(ways, float("inf"))
    for run in ways.values():
        run()
    for _ in range(rounds):
        for name, run in ways.items():
            began = time.thread_time()
            run()
            least[name] = min(least[name], time.thread_time() - began)
    return least


def report(rows: int, vocabulary: int, least: dict[str, float]) -> None:
    print(f"\n{rows} row(s) of {vocabulary}: CPU microseconds per step, and against argmax")
    for name, seconds in least.items():
        print(f"  {name:40} {seconds * 1e6:10.0f} {seconds / least['argmax']:8.2f}")


def per_token() -> None:
    """What the repetition guard and the index of n-grams cost per token of one reply."""
    tokens = torch.randint(0, 1000, (20_000,), generator=torch.Generator().manual_seed(0)).tolist()

    def guarded() -> None:
        guard, said = LoopGuard(16), []
        for token in tokens:
            said.append(token)
            guard.looping(said)

    def indexed() -> None:
        index = NGramIndex()
        for token in tokens:
            index.append(token)
            index.propose(7)

    print("\nper token of one reply: CPU microseconds")
    for name, seconds in measure({"repetition guard": guarded, "n-gram index and proposal": indexed}, 3).items():
        print(f"  {name:40} {seconds / len(tokens) * 1e6:10.2f}")


if __name__ == "__main__":
    main()
