"""GPTQ: 4 or 8 bits, symmetric or with zero points, columns in any order (Frantar et al., arXiv 2210.17323).

Ported facts: AutoGPTQ ``auto_gptq/nn_modules/qlinear/qlinear_cuda.py`` (packing; zeros stored less one) and GPTQModel's
``checkpoint_format`` "gptq_v2" (zeros as they are).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mirada.adapt.method import (
    FLOATS,
    Field,
    Shape,
    as_bytes,
    ceil_div,
    group_size,
    halves,
    in_blocks,
    module_of,
    named,
    skipped,
)
from mirada.adapt.packed import Packed
from mirada.errors import ConfigError, TensorError
from mirada.keys import Keys

# How the numbers were found, and how other software is to run them: the stored numbers say it all.
_IGNORED = (
    "true_sequential", "static_groups", "damp_percent", "damp_auto_increment", "model_name_or_path", "model_file_base_name",
    "dataset", "tokenizer", "model_seqlen", "max_input_length", "module_name_preceding_first_block", "batch_size",
    "block_name_to_quantize", "modules_in_block_to_quantize", "cache_block_outputs", "pad_token_id", "use_cuda_fp16",
    "use_exllama", "disable_exllama", "exllama_config", "backend", "meta", "quantizer", "mse", "awq_gemm_checkpoint",
    "autoround_version", "iters", "lr", "hf_device_map", "act_group_aware",
)  # fmt: skip


@dataclass(frozen=True)
class GPTQ:
    """See ``method.Scheme``."""

    bits: int
    group_size: int
    act_order: bool
    zeros_less_one: bool
    skipped: tuple[str, ...]
    method: str = "gptq"
    widens: bool = False

    def covers(self, name: str, shape: Shape) -> bool:
        return in_blocks(name) and len(shape) == 2 and not named(module_of(name), self.skipped)

    def fields(self, name: str, shape: Shape) -> Mapping[str, Field]:
        rows, columns = shape
        x, groups = module_of(name), ceil_div(columns, self.group_size or columns)
        return {
            f"{x}.qweight": Field(((ceil_div(columns * self.bits, 32), rows),), ("I32",)),
            f"{x}.qzeros": Field(((groups, ceil_div(rows * self.bits, 32)),), ("I32",)),
            f"{x}.scales": Field(((groups, rows),), FLOATS),
            f"{x}.g_idx": Field(((columns,),), ("I32", "I64"), optional=not self.act_order),
        }

    def unpack(self, name: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Packed:
        rows, columns = shape
        x = module_of(name)
        # Words run along the inputs, lowest bits first: turned, their bytes are the canonical form.
        values = as_bytes(tensors[f"{x}.qweight"].T)[:, : ceil_div(columns * self.bits, 8)].contiguous()
        stored = as_bytes(tensors[f"{x}.qzeros"])
        zeros = (halves(stored) if self.bits == 4 else stored)[:, :rows].T.contiguous()
        if self.zeros_less_one:
            zeros = zeros + 1 & (1 << self.bits) - 1  # uint8 wraps at 256, the mask at 16
        scales = tensors[f"{x}.scales"].T.contiguous()
        groups = tensors.get(f"{x}.g_idx")
        if groups is not None:
            groups = _checked(groups, scales.shape[1], f"{x}.g_idx")
            if torch.equal(groups, torch.arange(columns, dtype=torch.int32) // (self.group_size or columns)):
                groups = None
        return Packed(values, scales, columns, self.bits, self.group_size, zeros, groups)


def _checked(groups: Tensor, count: int, name: str) -> Tensor:
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= count:
        raise TensorError(f"{name!r} holds groups {low} to {high}, but there are {count}", "download the file again")
    return groups.to(torch.int32)


def read(keys: Keys) -> GPTQ:
    """``quantization_config`` of a GPTQ checkpoint; ConfigError names bits or a layout that is not read."""
    keys.ignore(*_IGNORED)
    bits = keys.take("bits", int)
    if bits not in (4, 8):
        raise ConfigError(f"{keys.where}: GPTQ with {bits} bits is not supported", "supported: 4 and 8 bits")
    keys.expect("is_marlin_format", False)
    form = keys.take("checkpoint_format", (str, type(None)), None) or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise ConfigError(f"{keys.where}: checkpoint_format {form!r} is not supported", "supported: 'gptq' and 'gptq_v2'")
    keys.expect("pack_dtype", "int32")
    keys.expect("lm_head", False)
    _check_rules(keys)
    keys.take("sym", bool, True)  # zeros are stored either way, and read
    return GPTQ(
        bits=bits,
        group_size=group_size(keys.take("group_size", int), keys.where),
        act_order=keys.take("desc_act", bool, False),
        zeros_less_one=form == "gptq",
        skipped=skipped(keys, "modules_to_not_convert"),
    )


def _check_rules(keys: Keys) -> None:
    """GPTQModel's per-module rules may leave modules out (``-:``; they are stored plain), but not change bits or groups."""
    rules = keys.take("dynamic", (dict, type(None)), None) or {}
    for pattern in rules:
        if not pattern.startswith("-:"):
            raise ConfigError(
                f"{keys.where}: dynamic rule {pattern!r} is not supported", "supported: rules that leave modules out ('-:')"
            )
