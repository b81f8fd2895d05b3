"""A layer of a vision tower on a CPU by its parts: torch's, ours, and layers as they were written, as they run, and in slices.

    python benchmarks/tower.py [--side 448] [--width 1280] [--threads 1] [--rounds 5] [--anyway]

Qwen2-VL's widths unless told otherwise, float32 and bfloat16 weights (``exact``). Times are the least of interleaved rounds, of
process time divided by threads with ``--cpu-time`` (for a machine that is shared). *packed* is oneDNN on weights that were
brought into its own form before, which Mirada does not do: it shows what a second copy of them would save. To see another
set of instructions: ``MIRADA_CPU_KERNELS=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from cpu_kernels import least
from harness import require_quiet

from mirada.engine.pace import Pace
from mirada.layers import fused
from mirada.layers.kernels import library, matrix
from mirada.layers.kernels.matrix import Matrix
from mirada.layers.linear import MatrixLinear, linear
from mirada.layers.mlp import gelu
from mirada.layers.rope import grid_angles, rotate, rotation
from mirada.models.slices import Slices
from mirada.models.vit import VisionConfig, VisionLayer

Runs = dict[str, Callable[[], object]]


def products(patches: int, width: int) -> Runs:
    """Each matrix of a layer: torch's choice (MKL), oneDNN as it lies, packed, and exact."""
    made: Runs = {}
    for name, rows, columns in (("qkv", 3, 1), ("out", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4)):
        weight, x = torch.randn(rows * width, columns * width) * 0.03, torch.randn(patches, columns * width)
        packed, narrow = torch.ops.mkldnn._reorder_linear_weight(weight, patches), Matrix.of(weight.bfloat16())
        made[f"{name}, F.linear"] = lambda x=x, w=weight: F.linear(x, w)
        made[f"{name}, fp32"] = lambda x=x, w=weight: linear(x, w)
        made[f"{name}, packed"] = lambda x=x, w=packed: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
        made[f"{name}, exact"] = lambda x=x, w=narrow: linear(x, w)
    return made


def others(side: int, config: VisionConfig) -> Runs:
    """What lies between products: torch's, and ours where there are compiled kernels."""
    patches, heads = side**2, config.num_attention_heads
    qkv = torch.randn(patches, 3 * heads, config.head_dim)
    qk, (q, k, v) = qkv[:, : 2 * heads], qkv.split(heads, 1)
    turn = rotation(grid_angles([(1, side, side)], config.head_dim, 1e4, qkv.device))
    inner = torch.randn(patches, config.intermediate_size)
    made: Runs = {
        "attention, torch": lambda: F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v))),
        "turning, torch": lambda: rotate(qk, turn),
        "quick GELU, torch": lambda: gelu(inner, "quick"),
        "tanh GELU, torch": lambda: gelu(inner, "tanh"),
    }
    if library.library() is not None:
        made |= {
            "attention, ours": lambda: matrix.attend_seen(q, k, v, (patches,), config.head_dim**-0.5),
            "turning, ours": lambda: matrix.turn_heads(qk, turn),
            "quick GELU, ours": lambda: matrix.gelu(inner, True),
            "tanh GELU, ours": lambda: matrix.gelu(inner, False),
        }
    return made


def layers(side: int, config: VisionConfig) -> Runs:
    """A whole layer: by torch's operations alone, and as it runs."""
    x, layer = torch.randn(side**2, config.hidden_size), VisionLayer(config, "quick")
    narrow = VisionLayer(config, "quick")
    for owner, name in ((narrow.attention, "qkv"), (narrow.attention, "out"), (narrow.mlp, "fc1"), (narrow.mlp, "fc2")):
        plain = getattr(owner, name)
        setattr(owner, name, MatrixLinear(Matrix.of(plain.weight.detach().bfloat16()), plain.bias))
    turn = rotation(grid_angles([(1, side, side)], config.head_dim, 1e4, x.device))

    def written() -> None:
        off = mock.patch.multiple(fused, compiles=lambda x: False)
        with off, mock.patch("mirada.layers.linear.linear", F.linear):
            layer(x, turn, (side**2,))

    return {
        "layer, torch": written,
        "layer, fp32": lambda: layer(x, turn, (side**2,)),
        "layer, exact": lambda: narrow(x, turn, (side**2,)),
    }


def in_slices(side: int, config: VisionConfig, seconds: float, rounds: int, clock: Callable[[], float]) -> str:
    """A layer cut into slices of ``seconds``, beside the whole: both with the least time of the rounds."""
    x, layer, pace = torch.randn(side**2, config.hidden_size), VisionLayer(config, "quick"), Pace(seconds)
    turn = rotation(grid_angles([(1, side, side)], config.head_dim, 1e4, x.device))
    given = (x, turn, (side**2,))
    whole, sliced, parts = float("inf"), float("inf"), [0.0]
    for _ in range(rounds):
        began = clock()
        expected = layer(*given)
        whole = min(whole, clock() - began)
        made, took = cut(layer.slices(*given, pace.room), pace, clock)
        if sum(took) < sliced:
            sliced, parts = sum(took), took
        if (made - expected).abs().max() > 1e-5 * expected.abs().max():
            raise SystemExit("a layer in slices is not the layer")
    return (
        f"layer, whole        {whole * 1e3:10.2f} ms\nlayer, in slices    {sliced * 1e3:10.2f} ms, {len(parts)} of them, "
        f"the longest {max(parts) * 1e3:.0f} ms ({seconds * 1e3:.0f} allowed), equal bit by bit: {torch.equal(made, expected)}"
    )


def cut(slices: Slices[torch.Tensor], pace: Pace, clock: Callable[[], float]) -> tuple[torch.Tensor, list[float]]:
    """What they make, and seconds of each, from which ``pace`` learns."""
    work, took = next(slices), []
    while True:
        began = clock()
        try:
            following = next(slices)
        except StopIteration as end:
            return end.value, [*took, clock() - began]
        took.append(clock() - began)
        pace.computed_slice(work, took[-1])
        work = following


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=448, help="of the picture, in pixels")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, default=0.25, help="of a slice")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine")
    args = parser.parse_args()
    pressure = require_quiet(args.anyway)
    torch.set_num_threads(args.threads)
    side = args.side // 14
    config = VisionConfig(
        hidden_size=args.width, num_hidden_layers=1, num_attention_heads=args.heads, intermediate_size=4 * args.width
    )

    def clock() -> float:
        return time.process_time() / args.threads if args.cpu_time else time.perf_counter()

    print(f"{side**2} patches, kernels {library.status().name}, {args.threads} thread(s), CPU pressure {pressure:.0f} %")
    with torch.no_grad():
        for runs in (products(side**2, args.width), others(side, config), layers(side, config)):
            for name, seconds in least(runs, args.rounds, clock).items():  # pyright: ignore
                print(f"{name:20}{seconds * 1e3:10.2f} ms", flush=True)
        print(in_slices(side, config, args.step_seconds, args.rounds, clock))


if __name__ == "__main__":
    main()
