"""Every Triton kernel on the card: first against its reference, then its time against the bytes that it must move.

    python benchmarks/gpu_kernels.py [--json FOLDER] [--skip-checks]

Checks are ``tests/layers/triton_cases.py``, which the test suite runs in Triton's interpreter, here compiled; then the same
kernels at real sizes against the modules' code. A failure makes the exit status 1. *share*: bytes over time, over the measured
read bandwidth, of operands that are too large to stay in the cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_common as common
import torch
from torch import Tensor

CASES = Path(__file__).parents[1] / "tests" / "layers" / "triton_cases.py"
BF16 = torch.bfloat16
MATRIX = (18944, 3584)


def main(argv: list[str] | None = None) -> int:
    parser = common.arguments(__doc__)
    parser.add_argument("--skip-checks", action="store_true")
    options = parser.parse_args(argv)
    report = common.Report("gpu_kernels", options)
    if not options.skip_checks and not options.smoke:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "default", str(CASES)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parents[2])
        print(done.stdout[-3000:])
        report.row("kernels against their references", done.returncode == 0, said=done.stdout.strip().splitlines()[-1:])
    if options.smoke:
        report.row("kernels", said="compiled for CUDA only; the test suite runs them in Triton's interpreter")
        return report.finish()
    ceiling = common.bandwidth(report.device)
    report.row("read bandwidth", bytes_per_s=ceiling)
    with torch.inference_mode():
        for part in (norms, attention, segments, latents, products, experts, packed_experts):
            try:
                part(report, ceiling)
            except Exception as error:  # one that does not run must not hide the others
                report.row(part.__name__, False, error=repr(error)[:300])
    return report.finish()


def noise(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def timed(
    report: common.Report,
    ceiling: float,
    what: str,
    size: int,
    kernel: Callable[[], Any],
    plain: Callable[[], Any] | None = None,
) -> None:
    values: dict[str, Any] = {"us": common.seconds(kernel, report.device, 50) * 1e6}
    values["share"] = size / (values["us"] / 1e6) / ceiling
    if plain is not None:
        values["plain_us"] = common.seconds(plain, report.device, 20) * 1e6
        values["relative"] = common.off(kernel(), plain())
    report.row(what, None if plain is None else values["relative"] < 2e-2, **values)


def norms(report: common.Report, ceiling: float) -> None:
    import torch.nn.functional as F

    from mirada.layers.kernels import triton_norm

    x, w = noise(32768, 4096), noise(4096)

    def plain() -> Tensor:
        return F.rms_norm(x.float(), (4096,), None, 1e-6).to(BF16) * w

    timed(report, ceiling, "rms_norm 32768x4096", 2 * x.nbytes, lambda: triton_norm.rms_norm(x, w, 1e-6), plain)
    g = noise(8192, 2 * 18944)

    def silu() -> Tensor:
        gate, up = g.chunk(2, -1)
        return F.silu(gate) * up

    timed(report, ceiling, "swiglu 8192x18944", g.nbytes * 3 // 2, lambda: triton_norm.swiglu(g), silu)


def attention(report: common.Report, ceiling: float) -> None:
    from mirada.layers.kernels import triton_paged
    from mirada.layers.past import attend_one

    for count, length, heads, kv_heads in ((1, 32768, 28, 4), (1, 131072, 32, 8), (64, 4096, 28, 4)):
        each = length // 32
        keys, values = (noise(count * each, 32, kv_heads, 128) for _ in range(2))
        tables = torch.randperm(count * each, device="cuda").view(count, each).int()
        lengths = torch.full((count,), length, dtype=torch.int32, device="cuda")
        q = noise(count, heads, 128)

        def kernel(q=q, pools=(keys, values), tables=tables, lengths=lengths) -> Tensor:
            return triton_paged.paged_decode(q, pools, tables, lengths, 0.09)

        def plain(q=q, pools=(keys, values), tables=tables, length=length) -> Tensor:
            out = []
            for b in range(len(q)):
                k, v = (pool[tables[b].long()].flatten(0, 1)[:length].transpose(0, 1) for pool in pools)
                out.append(attend_one(q[b : b + 1], k, v, 0.09))
            return torch.cat(out)

        timed(report, ceiling, f"paged decode {count} x {length}, {heads}/{kv_heads}", 2 * keys.nbytes, kernel, plain)
    heads, kv_heads, length = 28, 4, 8192
    keys, values = (noise(length // 32, 32, kv_heads, 128) for _ in range(2))
    tables = torch.randperm(length // 32, device="cuda").view(1, -1).int()
    lengths = torch.full((1,), length, dtype=torch.int32, device="cuda")
    q = noise(2048, heads, 128)
    places = triton_paged.tiles((2048,), triton_paged.queries(heads, kv_heads), q.device)
    k, v = (pool[tables[0].long()].flatten(0, 1).transpose(0, 1) for pool in (keys, values))
    timed(report, ceiling, "paged prefill 2048 after 6144", 2 * keys.nbytes + 2 * q.nbytes,
          lambda: triton_paged.paged_prefill(q, (keys, values), tables, lengths, places, 0.09),
          lambda: attend_one(q, k, v, 0.09))  # fmt: skip


def segments(report: common.Report, ceiling: float) -> None:
    """Pictures of a tower end to end; bytes are not what bounds it, so the share says little."""
    from mirada.layers.kernels import triton_varlen
    from mirada.layers.kinds import KINDS

    lengths = (1024, 4096, 256, 2048)
    q, k, v = noise(sum(lengths), 48, 80).split(16, 1)
    places = triton_varlen.tiles(lengths, q.device)

    def plain() -> Tensor:
        made = []
        for sides in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            one = [side.transpose(0, 1)[None] for side in sides]
            made.append(KINDS["sdpa"](*one, False, 0.1)[0].transpose(0, 1))
        return torch.cat(made)

    timed(report, ceiling, f"segments {lengths}, 16 heads of 80", 4 * q.nbytes,
          lambda: triton_varlen.varlen(q, k, v, places, False, 0.1), plain)  # fmt: skip


def latents(report: common.Report, ceiling: float) -> None:
    from mirada.layers.kernels import triton_mla
    from mirada.layers.mla import attend_latents

    for count, length in ((1, 65536), (64, 4096)):
        each = length // 32
        pages = noise(count * each, 32, 1, 576)
        tables = torch.randperm(count * each, device="cuda").view(count, each).int()
        lengths = torch.full((count,), length, dtype=torch.int32, device="cuda")
        q = noise(count, 16, 576)

        def kernel(q=q, pages=pages, tables=tables, lengths=lengths) -> Tensor:
            return triton_mla.latent_decode(q, (pages,), tables, lengths, 512, 0.07)

        def plain(q=q, pages=pages, tables=tables) -> Tensor:
            rows = [pages[tables[b].long()].flatten(0, 2) for b in range(len(q))]
            return torch.cat([attend_latents(q[b : b + 1], rows[b], 512, 0.07) for b in range(len(q))])

        timed(report, ceiling, f"latent decode {count} x {length}", pages.nbytes, kernel, plain)


def products(report: common.Report, ceiling: float) -> None:
    from mirada.adapt.packed import Packed
    from mirada.layers.kernels import triton_packed

    rows, columns = MATRIX
    for bits, group in ((8, columns), (4, 128), (4, 64), (4, 32)):
        # Several matrices in turn: one alone would stay in the cache of the card.
        forms = [
            Packed(torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, device="cuda"),
                   torch.rand(rows, columns // group, device="cuda").half() * 0.01, columns, bits, group)
            for _ in range(4)
        ]  # fmt: skip
        size = sum(form.values.nbytes + form.scales.nbytes for form in forms)
        for tokens in (1, 8, 32):
            x = noise(tokens, columns)

            def kernel(forms=forms, x=x, bits=bits) -> Tensor:
                made = [triton_packed.packed_linear(x, f.values, f.scales, None, columns, bits) for f in forms]
                return made[0]

            wide = forms[0].widen()
            exact = (x.float() @ wide.T).to(BF16)
            timed(report, ceiling, f"int{bits} group {group}, {tokens} tokens", size, kernel, lambda exact=exact: exact)
            del wide


def experts(report: common.Report, ceiling: float) -> None:
    from mirada.layers.kernels import triton_moe
    from mirada.layers.moe import Experts

    module = Experts(64, 2048, 1408).to("cuda", BF16)
    one = (module.gate_up.nbytes + module.down.nbytes) // 64
    for tokens in (1, 8, 64, 512, 2048):
        x = noise(tokens, 2048)
        chosen = torch.rand(tokens, 64, device="cuda").topk(6, -1).indices
        weights = torch.rand(tokens, 6, device="cuda")
        order = chosen.flatten().argsort(stable=True)
        shares, counts = weights.flatten()[order].to(BF16), module._counts(chosen.flatten())
        used = int((counts > 0).sum())
        timed(report, ceiling, f"experts, {tokens} tokens, {used} experts", used * one,
              lambda x=x, o=order, s=shares, c=counts: triton_moe.grouped_experts(
                  x, module.gate_up, module.down, o // 6, s, o, c),
              lambda x=x, o=order, s=shares, c=counts: module._grouped(x, o // 6, s[:, None], o, c))  # fmt: skip


def packed_experts(report: common.Report, ceiling: float) -> None:
    """Kimi's experts as integers: what one token, and many, make of the bandwidth. The reference is widened once."""
    from mirada.adapt.packed import Packed
    from mirada.layers.kernels import triton_moe, triton_moe_packed
    from mirada.layers.moe import Experts

    module = Experts(64, 2048, 1408).to("cuda", BF16)
    for bits, group in ((4, 32), (8, 128)):
        forms = [
            Packed(torch.randint(0, 256, (64 * rows, columns * bits // 8), dtype=torch.uint8, device="cuda"),
                   torch.rand(64 * rows, columns // group, device="cuda").half() * 0.01, columns, bits, group)
            for rows, columns in ((2816, 2048), (2048, 1408))
        ]  # fmt: skip
        wide = [form.widen().to(BF16).view(64, -1, form.columns) for form in forms]
        one = sum(form.values.nbytes + form.scales.nbytes for form in forms) // 64
        for tokens in (1, 8, 64, 1024):
            x = noise(tokens, 2048)
            chosen = torch.rand(tokens, 64, device="cuda").topk(6, -1).indices
            order = chosen.flatten().argsort(stable=True)
            shares, counts = torch.rand(tokens * 6, device="cuda").to(BF16), module._counts(chosen.flatten())
            used = int((counts > 0).sum())
            timed(report, ceiling, f"int{bits} experts, {tokens} tokens, {used} experts", used * one,
                  lambda x=x, o=order, s=shares, c=counts, f=forms: triton_moe_packed.grouped_packed_experts(
                      x, *f, o // 6, s, o, c),
                  lambda x=x, o=order, s=shares, c=counts, w=wide: triton_moe.grouped_experts(
                      x, *w, o // 6, s, o, c))  # fmt: skip
        del forms, wide


if __name__ == "__main__":
    sys.exit(main())
