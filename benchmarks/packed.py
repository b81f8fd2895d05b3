"""Products with matrices as checkpoints pack them: the compiled kernels beside torch's widening of tiles, and plain float32.

    python benchmarks/packed.py [--threads 1] [--rounds 9] [--rows 8960] [--columns 1536] [--anyway]

Milliseconds of one product, the least of interleaved rounds, of process time divided by threads with ``--cpu-time`` (for a
machine that is shared); and the largest difference from the product in float64, over the mean magnitude of its results.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial

import torch
from cpu_kernels import least
from harness import require_quiet

from mirada.adapt.packed import Packed, PackedRows
from mirada.layers.kernels import library
from mirada.layers.linear import linear

TOKENS = (1, 8, 64, 256)


def forms(rows: int, columns: int, random: torch.Generator) -> Iterator[tuple[str, Packed]]:
    """Random numbers in the forms of releases."""

    def integers(bits: int, group: int) -> Packed:
        groups, width = -(-columns // group), columns if bits == 8 else -(-columns // 2)
        values = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=random)
        zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8, generator=random)
        scales = (torch.rand(rows, groups, generator=random) * 0.01 + 1e-3).half()
        return Packed(values, scales, columns, bits, group, zeros)

    yield "4 bits, groups of 128, zeros", integers(4, 128)
    yield "4 bits, groups of 24, zeros", integers(4, 24)
    yield "8 bits, groups of 128, zeros", integers(8, 128)
    floats = (torch.randn(rows, columns, generator=random) * 100).to(torch.float8_e4m3fn)
    blocks = torch.rand(-(-rows // 128), -(-columns // 128), generator=random) * 1e-3
    yield "e4m3, blocks of 128 x 128", Packed(floats, blocks, columns, group_size=128, row_block=128)
    yield "e4m3, a scale for a row", Packed(floats, torch.rand(rows, 1, generator=random), columns)


def by_torch(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    """What computes where no kernels are compiled."""
    return torch.cat([linear(x, packed.widen(a, b)) for a, b in packed.tiles()], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 1), ("rounds", 9), ("rows", 8960), ("columns", 1536)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--anyway", action="store_true")
    given = parser.parse_args()
    require_quiet(given.anyway or given.cpu_time)
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    clock = (lambda: time.process_time() / given.threads) if given.cpu_time else time.perf_counter
    random = torch.Generator().manual_seed(0)
    plain = torch.randn(given.rows, given.columns, generator=random)
    print(f"{given.rows} x {given.columns}, {given.threads} threads, kernels {library.status().name}")
    print(f"{'':30} tokens  by torch    kernels     ratio   float32  error")
    for name, packed in forms(given.rows, given.columns, random):
        held = PackedRows(given.rows, given.columns)
        held.fill(packed, "cpu")
        for tokens in TOKENS:
            x = torch.randn(tokens, given.columns, generator=random)
            runs = {"torch": partial(by_torch, packed, x), "ours": partial(held, x), "plain": partial(linear, x, plain)}
            spent = least(runs, given.rounds, clock)
            exact = x.double() @ packed.widen().double().T
            error = float((held(x) - exact).abs().max() / exact.abs().mean())
            print(
                f"{name:30} {tokens:6} {spent['torch'] * 1e3:7.2f} ms {spent['ours'] * 1e3:7.2f} ms"
                f" {spent['torch'] / spent['ours']:8.1f} {spent['plain'] * 1e3:7.2f} ms {error:.0e}"
            )


if __name__ == "__main__":
    main()
