"""Quantises matrices and packs them as the tools that release checkpoints do: plain loops over bits, apart from the package.

Each packer takes a float matrix [R, C] and returns the stored tensors by suffix and the matrix that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Made = tuple[dict[str, Tensor], Tensor]


def words(rows: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Unsigned [n, m] -> int32 [n, ceil(m * bits / 32)], m along the words; ``order``: which value is at place i of a word."""
    each = 32 // bits
    order = order or tuple(range(each))
    padded = np.zeros((len(rows), -(-rows.shape[1] // each) * each), np.uint64)
    padded[:, : rows.shape[1]] = rows
    made = np.zeros((len(rows), padded.shape[1] // each), np.uint64)
    for word in range(made.shape[1]):
        for place, value in enumerate(order):
            made[:, word] |= padded[:, word * each + value] << np.uint64(bits * place)
    return torch.from_numpy(made.astype(np.uint32).view(np.int32).copy())


def quantise(weight: Tensor, groups: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers [R, C], zeros [R, G], float16 scales [R, G]; column c belongs to ``groups[c]``."""
    w = weight.double().numpy()
    top = 2**bits - 1
    integers = np.zeros(w.shape, np.int64)
    zeros, scales = (np.zeros((len(w), groups.max() + 1), t) for t in (np.int64, np.float16))
    for group in range(groups.max() + 1):
        part = w[:, groups == group]
        if symmetric:
            scale = np.abs(part).max(1) / (top // 2)
            zero = np.full(len(w), (top + 1) // 2)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / top
            zero = np.clip(np.round(-low / scale), 1, top).astype(np.int64)  # 0 cannot be stored less one
        scales[:, group], zeros[:, group] = scale, zero
        rounded = np.round(part / scales[:, group].astype(np.float64)[:, None]) + zero[:, None]
        integers[:, groups == group] = np.clip(rounded, 0, top)
    return integers, zeros, scales


def meant(integers: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> Tensor:
    return torch.from_numpy(((integers - zeros[:, groups]) * scales.astype(np.float64)[:, groups]).astype(np.float32))


def plain_groups(columns: int, size: int) -> np.ndarray:
    return np.arange(columns) // (columns if size == -1 else size)


def awq(weight: Tensor, size: int) -> Made:
    groups = plain_groups(weight.shape[1], size)
    q, z, s = quantise(weight, groups, 4, False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {"qweight": words(q.T, 4, order), "qzeros": words(z.T, 4, order), "scales": torch.from_numpy(s.T.copy())}
    return stored, meant(q, z, s, groups)


def gptq(weight: Tensor, size: int, bits: int = 4, symmetric: bool = True, shuffled: int | None = None, less: int = 1) -> Made:
    """``shuffled``: seed of an order of the columns, as act-order makes; ``less``: what zeros are stored less by."""
    groups = plain_groups(weight.shape[1], size)
    if shuffled is not None:
        groups = np.random.default_rng(shuffled).permutation(groups)
    q, z, s = quantise(weight, groups, bits, symmetric)
    stored = {
        "qweight": words(q, bits).T.contiguous(),
        "qzeros": words(z.T - less, bits),
        "scales": torch.from_numpy(s.T.copy()),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return stored, meant(q, z, s, groups)


def compressed(weight: Tensor, size: int, bits: int = 4, symmetric: bool = True, shuffled: int | None = None) -> Made:
    groups = plain_groups(weight.shape[1], size)
    if shuffled is not None:
        groups = np.random.default_rng(shuffled).permutation(groups)
    q, z, s = quantise(weight, groups, bits, symmetric)
    stored = {
        "weight_packed": words(q, bits),
        "weight_scale": torch.from_numpy(s),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = words(z.T, bits).T.contiguous()
    if shuffled is not None:
        stored["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    return stored, meant(q, z, s, groups)


def fp8(weight: Tensor, size: int) -> Made:
    rows, columns = weight.shape
    values = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(-(-rows // size), -(-columns // size))
    wide = torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            scales[i, j] = weight[at].abs().max() / 448
            values[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
            wide[at] = values[at].float() * scales[i, j]
    return {"weight": values, "weight_scale_inv": scales}, wide


def fp8_rows(weight: Tensor, whole: bool, name: str = "weight_scale") -> Made:
    """A scale for each row, or for the ``whole`` matrix; and one for activations, as tools write it."""
    scales = weight.abs().amax() / 448 if whole else weight.abs().amax(1, keepdim=True) / 448
    values = (weight / scales).to(torch.float8_e4m3fn)
    stored = {"weight": values, name: scales.bfloat16() if not whole else scales, "input_scale": torch.ones(1)}
    return stored, values.float() * stored[name].float()


def awq_config(size: int, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["visual"],
    } | changes  # fmt: skip


def gptq_config(size: int, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": 4, "group_size": size, "damp_percent": 0.1, "desc_act": False, "static_groups": False,
        "sym": True, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
    } | changes  # fmt: skip


def fp8_config(size: int, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [size, size],
    } | changes  # fmt: skip


def compressed_config(size: int, bits: int = 4, weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    settings = {
        "num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel" if size == -1 else "group",
        "group_size": None if size == -1 else size, "block_structure": None, "dynamic": False, "actorder": None,
        "observer": "minmax", "observer_kwargs": {},
    } | (weights or {})  # fmt: skip
    group = {"targets": ["Linear"], "weights": settings, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": 1.5, "ignore": ["lm_head", "re:visual.*"], "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    } | changes  # fmt: skip


def compressed_float_config(strategy: str, block: list[int] | None = None) -> dict[str, Any]:
    weights = {"type": "float", "strategy": strategy, "block_structure": block, "group_size": None}
    made = compressed_config(-1, 8, weights, format="float-quantized")
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    made["config_groups"]["group_0"]["input_activations"] = activations
    return made


def renamed(made: Made, old: str, new: str) -> Made:
    stored, meant = made
    return {new if name == old else name: tensor for name, tensor in stored.items()}, meant


Packer = Callable[[Tensor], Made]
FORMS: dict[str, tuple[dict[str, Any], Packer]] = {
    "awq": (awq_config(32), lambda w: awq(w, 32)),
    "awq ragged": (awq_config(48), lambda w: awq(w, 48)),
    "gptq 4": (gptq_config(32), lambda w: gptq(w, 32)),
    "gptq 8": (gptq_config(32, bits=8), lambda w: gptq(w, 32, 8)),
    "gptq asymmetric": (gptq_config(32, sym=False), lambda w: gptq(w, 32, symmetric=False)),
    "gptq 8 asymmetric": (gptq_config(48, sym=False, bits=8), lambda w: gptq(w, 48, 8, symmetric=False)),
    "gptq act-order": (gptq_config(32, desc_act=True), lambda w: gptq(w, 32, shuffled=len(w))),
    "gptq one group": (gptq_config(-1), lambda w: gptq(w, -1)),
    "gptq v2": (gptq_config(32, sym=False, checkpoint_format="gptq_v2"), lambda w: gptq(w, 32, symmetric=False, less=0)),
    "fp8": (fp8_config(128), lambda w: fp8(w, 128)),
    "fp8 small blocks": (fp8_config(48), lambda w: fp8(w, 48)),
    "fp8 by row": (fp8_config(0, weight_block_size=None), lambda w: fp8_rows(w, False)),
    "fp8 in one": (fp8_config(0, weight_block_size=None), lambda w: fp8_rows(w, True, "weight_scale_inv")),
    "compressed float by row": (compressed_float_config("channel"), lambda w: fp8_rows(w, False)),
    "compressed float in one": (compressed_float_config("tensor"), lambda w: fp8_rows(w, True)),
    "compressed float in blocks": (
        compressed_float_config("block", [48, 48]), lambda w: renamed(fp8(w, 48), "weight_scale_inv", "weight_scale")
    ),
    "compressed 4": (compressed_config(32), lambda w: compressed(w, 32)),
    "compressed 8": (compressed_config(-1, 8), lambda w: compressed(w, -1, 8)),
    "compressed asymmetric": (
        compressed_config(48, weights={"symmetric": False}), lambda w: compressed(w, 48, symmetric=False)
    ),
    "compressed 8 asymmetric": (
        compressed_config(32, 8, {"symmetric": False}), lambda w: compressed(w, 32, 8, symmetric=False)
    ),
    "compressed act-order": (
        compressed_config(32, weights={"actorder": "group"}), lambda w: compressed(w, 32, shuffled=len(w))
    ),
}  # fmt: skip
"""Name -> (quantization_config, packer of one matrix)."""
