"""The structures of ``kernels/step.h``."""

from __future__ import annotations

import ctypes

from mirada.layers.experts import Expert
from mirada.layers.kernels.library import Matrix


class Latent(ctypes.Structure):
    """``mr_latent``."""

    _fields_ = (
        *((name, Matrix) for name in ("low", "q", "latent", "heads")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "norm")),
    )


class Routed(ctypes.Structure):
    """``mr_routed``."""

    _fields_ = (
        ("experts", ctypes.POINTER(Expert)),
        ("shared", ctypes.POINTER(Expert)),
        ("router", Matrix),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("count", "top", "groups", "kept", "normalise")),
        ("scale", ctypes.c_float),
        ("pair_bytes", ctypes.c_size_t),
    )


class Layer(ctypes.Structure):
    """``mr_layer``."""

    _fields_ = (
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm1", "norm2", "q_norm", "k_norm")),
        ("latent", ctypes.POINTER(Latent)),
        ("routed", ctypes.POINTER(Routed)),
    )


class Wide(ctypes.Structure):
    """``mr_wide``."""

    _fields_ = (("from_", ctypes.c_void_p), ("to", ctypes.c_void_p), ("count", ctypes.c_int64))


class Decoder(ctypes.Structure):
    """``mr_decoder``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "width", "heads", "kv_heads", "head_width", "inner")),
        *((name, ctypes.c_int32) for name in ("rank", "low_rank", "nope", "value")),
        *((name, ctypes.c_float) for name in ("eps", "head_eps", "scale", "turn_scale")),
        ("layer", ctypes.POINTER(Layer)),
        *((name, ctypes.c_void_p) for name in ("norm", "frequency", "axis")),
        *((name, Matrix) for name in ("head", "table")),
        ("wide", ctypes.POINTER(Wide)),
        ("wides", ctypes.c_int32),
    )


class Call(ctypes.Structure):
    """``mr_call``."""

    _fields_ = (
        ("sequences", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("lengths", "past", "slabs")),
        ("kv", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("positions", ctypes.c_void_p),
        ("position_strides", ctypes.c_int64 * 2),
        *((name, ctypes.c_void_p) for name in ("x", "tokens", "hidden", "logits", "scratch")),
        ("room", ctypes.c_size_t),
    )
