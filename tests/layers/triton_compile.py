"""Compiles what the launchers launch, from tensors without memory: ``test_triton_compiles.py`` runs this as a program."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mirada.adapt.packed import Packed
from mirada.layers.kernels import (
    triton_mla,
    triton_moe,
    triton_moe_packed,
    triton_norm,
    triton_packed,
    triton_paged,
    triton_rope,
    triton_varlen,
)

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
         torch.uint8: "u8", torch.int8: "i8"}  # fmt: skip
BF16, F16, F32, I32, I64, U8, I8 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
)


def compile_launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """In place of ``triton_launch.launch``."""
    options: dict[str, Any] = {key: meta.pop(key) for key in ("num_warps", "num_stages") if key in meta}
    options["enable_fp_fusion"] = True
    values = dict(zip(kernel.arg_names, args, strict=False)) | meta
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, place = values[parameter.name], (i,)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[place] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[place] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[place] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    print(kernel.__name__, *found.groups(), flush=True)


def t(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(rows: int, columns: int, bits: int, group: int, zeros: bool) -> Packed:
    scales = t(rows, columns // group, dtype=F16)
    zero = t(rows, columns // group, dtype=U8) if zeros else None
    return Packed(t(rows, columns * bits // 8, dtype=U8), scales, columns, bits, group, zero)


def main() -> None:
    for module in (
        triton_varlen,
        triton_mla,
        triton_moe,
        triton_moe_packed,
        triton_norm,
        triton_packed,
        triton_paged,
        triton_rope,
    ):
        module.launch = compile_launch
    triton_paged.processors = triton_packed.processors = lambda x: 132
    triton_norm.rms_norm(t(1, 3584), t(3584), 1e-6)
    triton_norm.add_norm(t(4, 4096), t(4, 4096), t(4096), 1e-6)
    triton_norm.swiglu(t(4, 2 * 18944))
    turn = (t(4, 1, 128, dtype=F32), t(4, 1, 128, dtype=F32))
    for heads, kv_heads, norms in ((28, 4, None), (32, 8, (t(128), t(128), 1e-6))):
        pool = t(99, 32, kv_heads, 128)
        triton_rope.rope_write(t(4, (heads + 2 * kv_heads) * 128), heads, turn, norms, t(4, dtype=I64), pool, pool)
        places = (t(40, dtype=I32), t(40, dtype=I32), t(2, dtype=I32), t(2, dtype=I32))
        tables, lengths = t(2, 1024, dtype=I32), t(2, dtype=I32)
        triton_paged.paged_prefill(t(1000, heads, 128), (pool, pool), tables, lengths, places, 0.1)
        for count in (1, 64):
            tables, lengths = t(count, 1024, dtype=I32), t(count, dtype=I32)
            triton_paged.paged_decode(t(count, heads, 128), (pool, pool), tables, lengths, 0.1)
    for heads, width, kind in ((16, 80, BF16), (16, 72, BF16), (16, 72, F32)):
        q, k, v = t(4096, 3 * heads, width, dtype=kind).split(heads, 1)
        triton_varlen.varlen(q, k, v, t(3, 70, dtype=I32), False, 0.1)
    triton_rope.write(t(99, 32, 1, 576), t(4, dtype=I64), t(4, 1, 576))
    planes = (t(99, 32, 4, 128, dtype=I8), t(99, 32, 4, 1, dtype=F32)) * 2
    triton_paged.paged_decode(t(4, 28, 128), planes, t(4, 1024, dtype=I32), t(4, dtype=I32), 0.1)
    places = (t(40, dtype=I32), t(40, dtype=I32), t(2, dtype=I32), t(2, dtype=I32))
    triton_paged.paged_prefill(t(1000, 28, 128), planes, t(2, 1024, dtype=I32), t(2, dtype=I32), places, 0.1)
    latents = (t(99, 32, 1, 576),), (t(99, 32, 1, 576, dtype=I8), t(99, 32, 1, 2, dtype=F32))
    for pools in latents:
        triton_mla.latent_prefill(t(1000, 16, 576), pools, t(2, 1024, dtype=I32), t(2, dtype=I32), places, 512, 0.1)
    triton_mla.latent_decode(t(4, 16, 576), latents[1], t(4, 1024, dtype=I32), t(4, dtype=I32), 512, 0.1)
    for count in (1, 64):
        tables, lengths = t(count, 1024, dtype=I32), t(count, dtype=I32)
        triton_mla.latent_decode(t(count, 16, 576), (t(99, 32, 1, 576),), tables, lengths, 512, 0.1)
    for tokens in (1, 8, 48):
        for bits, group in ((4, 128), (4, 32), (8, 3584)):
            scales = t(4608, 3584 // group, dtype=F16)
            zeros = t(4608, 3584 // group, dtype=U8) if bits == 4 else None
            triton_packed.packed_linear(t(tokens, 3584), t(4608, 448 * bits, dtype=U8), scales, zeros, 3584, bits)
    triton_packed.widen(t(4608, 1792, dtype=U8), t(4608, 28, dtype=F16), None, 3584, 4, BF16)
    for bits, group, zeros in ((4, 32, True), (4, 128, False), (8, 128, False)):
        forms = [packed(64 * rows, columns, bits, group, zeros) for rows, columns in ((2816, 2048), (2048, 1408))]
        for tokens in (1, 1024):
            rows = t(tokens * 6, dtype=I64)
            triton_moe_packed.grouped_packed_experts(t(tokens, 2048), *forms, rows, t(tokens * 6), rows, t(64, dtype=I64))
    for tokens in (1, 64, 1024):
        rows = t(tokens * 6, dtype=I64)
        triton_moe.grouped_experts(
            t(tokens, 2048), t(64, 2816, 2048), t(64, 2048, 1408), rows, t(tokens * 6), rows, t(64, dtype=I64)
        )


if __name__ == "__main__":
    main()
