"""Matrix products of every format at the shapes of Qwen2-VL-2B, beside torch's and the speed of memory.

    python benchmarks/cpu_kernels.py [--threads 1] [--rounds 9] [--anyway]

One row of x reads all of a weight: GB/s, as a share of what a sum over fresh memory reads. Weights are cycled so that together
they are larger than any cache. Many rows (256) are bound by arithmetic: GF/s. Times are the least of interleaved rounds, of
process time divided by threads with ``--cpu-time`` (for a machine that is shared). ``MIRADA_CPU_KERNELS=avx2`` caps the set of
instructions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import require_quiet

from mirada.layers.kernels import library
from mirada.layers.kernels.matrix import Format, Matrix, product
from mirada.layers.linear import linear

SHAPES = {"gate_up": (17920, 1536), "down": (1536, 8960), "qkv": (2048, 1536), "out": (1536, 1536)}
CYCLED = 256 << 20
FORMS = (
    ("int8:128", Format.INT8, 128),
    ("int8:32", Format.INT8, 32),
    ("int4:32", Format.INT4, 32),
    ("int4:64", Format.INT4, 64),
)
FEW = (1, 2, 4, 8)
"""Rows of x that all read a weight once: a few sequences together, or a guess and its check."""
MANY = 256


def least(runs: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each, the least of ``rounds`` in turn, the first round apart."""
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = clock()
            run()
            if turn:
                best[name] = min(best[name], clock() - began)
    return best


def cycled(make: Callable[[], object], size: int) -> list:
    return [make() for _ in range(max(1, -(-CYCLED // size)))]


def copies(matrix: Matrix) -> list[Matrix]:
    """As many as fill ``CYCLED``: copies, since rounding each would take long."""

    def one() -> Matrix:
        scales = None if matrix.scales is None else matrix.scales.clone()
        return Matrix(matrix.format, matrix.rows, matrix.columns, matrix.group, matrix.values.clone(), scales)

    return cycled(one, matrix.nbytes)


def bandwidth(rounds: int, clock: Callable[[], float]) -> float:
    fresh = torch.ones(CYCLED // 4)
    return CYCLED / least({"": lambda: fresh.sum()}, rounds, clock)[""]  # pyright: ignore


def few(name: str, shape: tuple[int, int], rounds: int, clock: Callable[[], float], peak: float) -> None:
    weight, xs = torch.randn(shape) * 0.03, {rows: torch.randn(rows, shape[1]) for rows in FEW}
    held: dict[str, list] = {"fp32, F.linear": cycled(weight.clone, weight.nbytes)}
    held["bf16, F.linear"] = cycled(weight.bfloat16().clone, weight.nbytes // 2)
    held["fp32"] = [Matrix.of(w) for w in held["fp32, F.linear"]]
    held["bf16"] = [Matrix.of(w) for w in held["bf16, F.linear"]]
    for form, format, group in FORMS:
        held[form] = copies(filled(weight, format, group))

    def run(form: str, x: torch.Tensor) -> Callable[[], None]:
        if form.endswith("F.linear"):
            given = x.bfloat16() if form.startswith("bf16") else x
            return lambda: [F.linear(given, w) for w in held[form]] and None
        return lambda: [product(w, x) for w in held[form]] and None

    for form, weights in held.items():
        taken = least({str(rows): run(form, x) for rows, x in xs.items()}, rounds, clock)
        for rows, seconds in taken.items():
            rate = sum(w.nbytes for w in weights) / seconds
            print(
                f"{name:8} {rows:>4} rows  {form:16} {seconds / len(weights) * 1e6:9.0f} us"
                f" {rate / 1e9:7.1f} GB/s {rate / peak:6.0%} {seconds / taken['1']:6.2f} x one row"
            )


def many(name: str, shape: tuple[int, int], rounds: int, clock: Callable[[], float]) -> None:
    weight, x = torch.randn(shape) * 0.03, torch.randn(MANY, shape[1])
    narrow, small = Matrix.of(weight.bfloat16()), x.bfloat16()
    runs: dict[str, Callable[[], object]] = {
        "fp32, F.linear": lambda: F.linear(x, weight),
        "fp32, oneDNN": lambda: linear(x, weight),
        "bf16, F.linear": lambda: F.linear(small, narrow.values),
        "exact (tiles)": lambda: linear(x, narrow),
    }
    for form, format, group in FORMS:
        runs[form] = partial(product, filled(weight, format, group), x)
    exact = x.double() @ weight.double().T
    for form, seconds in least(runs, rounds, clock).items():  # pyright: ignore
        made: torch.Tensor = runs[form]()  # pyright: ignore
        error = (made.double() - exact).norm() / exact.norm()
        rate = 2 * MANY * weight.numel() / seconds / 1e9
        print(f"{name:8} {MANY:4} rows  {form:16} {seconds * 1e6:9.0f} us {rate:7.0f} GF/s   error {error:.1e}")


def filled(weight: torch.Tensor, format: Format, group: int) -> Matrix:
    made = Matrix.empty(format, *weight.shape, group)
    made.fill(0, weight)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine")
    args = parser.parse_args()
    pressure = require_quiet(args.anyway)
    torch.set_num_threads(args.threads)

    def clock() -> float:
        return time.process_time() / args.threads if args.cpu_time else time.perf_counter()

    with torch.no_grad():
        peak = bandwidth(args.rounds, clock)
        print(
            f"kernels {library.status().name}, {args.threads} threads, CPU pressure {pressure:.0f} %, "
            f"memory reads {peak / 1e9:.1f} GB/s"
        )
        for name in args.shapes:
            few(name, SHAPES[name], args.rounds, clock, peak)
            many(name, SHAPES[name], args.rounds, clock)


if __name__ == "__main__":
    main()
