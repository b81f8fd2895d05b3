"""The compiled kernels: found, checked and loaded, or the reason why not."""

from __future__ import annotations

import ctypes
import importlib.machinery
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mirada import config
from mirada.errors import SettingsError

VERSION = 9
"""What ``mr_version`` of gemm.c must say; counted up with every change of packed forms or of structures."""
SETTING = "MIRADA_CPU_KERNELS"
"""Environment: auto (the best that the processor has), scalar, avx2, avx512, or off."""
_ISAS = ("scalar", "avx2", "avx512")
_HERE = Path(__file__).parent
AGAIN = "in Mirada's checkout: pip install --force-reinstall --no-deps ."
"""How the package is installed anew: not by its name, which would ask a package index."""


class Matrix(ctypes.Structure):
    """``mr_matrix`` of cpu.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("wide", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class Seen(ctypes.Structure):
    """``mr_seen`` of tower.c."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("strides", ctypes.c_int64 * 6),
        ("heads", ctypes.c_int32),
        ("d", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("segments", ctypes.c_int32),
        ("lengths", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Status:
    """``name``: scalar, avx2, avx512, or none; ``why`` says how that came, ``fix`` what would change it (if anything)."""

    name: str
    why: str
    fix: str = ""


@cache
def _loaded() -> tuple[ctypes.CDLL | None, Status]:
    wanted = config.env(SETTING, "auto") or "auto"
    if wanted not in ("auto", "off", *_ISAS):
        raise SettingsError(f"{SETTING}={wanted!r} is unknown", f"use auto, off, {', '.join(_ISAS)}")
    if wanted == "off":
        return None, Status("none", f"{SETTING}=off", f"unset {SETTING}")
    again = f"with a C compiler (gcc or clang) on the path, {AGAIN}"
    file = next((path for path in map(_file, importlib.machinery.EXTENSION_SUFFIXES) if path.is_file()), None)
    if file is None:
        return None, Status("none", "they were not compiled when Mirada was installed", again)
    try:
        library = ctypes.CDLL(str(file))
        version = library.mr_version()
        if version == VERSION:
            _declare(library)
    except (OSError, AttributeError) as error:
        return None, Status("none", f"{file.name} cannot be loaded: {error}", again)
    if version != VERSION:
        return None, Status("none", f"{file.name} is of version {version}, this is version {VERSION}", again)
    best = _ISAS[library.mr_best_isa()]
    if wanted == "auto":
        return library, Status(best, "the best that this processor has")
    used = _ISAS[library.mr_set_isa(_ISAS.index(wanted))]
    if used != wanted:
        raise SettingsError(f"{SETTING}={wanted!r}, but this processor has {best}", f"unset {SETTING}, or use {best}")
    return library, Status(used, f"{SETTING}={wanted}; this processor has {best}")


def _file(suffix: str) -> Path:
    return _HERE / f"_cpu{suffix}"


def _declare(library: ctypes.CDLL) -> None:
    matrix, pointer, whole, long = ctypes.POINTER(Matrix), ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    for name, result, arguments in (
        ("mr_set_isa", whole, (whole,)),
        ("mr_threads", whole, ()),
        ("mr_set_threads", None, (whole,)),
        ("mr_linear", whole, (matrix, pointer, whole, whole, pointer)),
        ("mr_experts", whole, (pointer, whole, pointer, pointer, pointer, whole, pointer, whole, pointer)),
        ("mr_block_pair_bytes", ctypes.c_size_t, (pointer, whole, pointer)),
        ("mr_swiglu_rows", None, (pointer, whole, whole, pointer)),
        ("mr_norm_heads", None, (pointer, whole, long, whole, long, whole, pointer, ctypes.c_float)),
        ("mr_turn_heads", whole, (pointer, whole, long, whole, long, whole, pointer, pointer, whole)),
        ("mr_gelu", None, (pointer, long, whole)),
        ("mr_attend_seen", whole, (ctypes.POINTER(Seen),)),
        ("mr_attend_some", whole, (ctypes.POINTER(Seen), ctypes.c_int32)),
        ("mr_packed_bytes", None, (whole, whole, whole, whole, whole, ctypes.POINTER(ctypes.c_size_t))),
        ("mr_pack", None, (matrix, whole, whole, pointer, pointer, pointer)),
        ("mr_unpack", None, (matrix, whole, whole, pointer, pointer, pointer)),
        ("mr_widen", None, (matrix, whole, whole, pointer)),
        ("mr_quantise", whole, (whole, whole, pointer, whole, whole, pointer, pointer)),
        ("mr_fill", whole, (matrix, whole, whole, whole, pointer)),
        ("mr_step", ctypes.c_size_t, (pointer, pointer)),
        ("mr_large_pages", None, (pointer, ctypes.c_size_t)),
        ("mr_largest", None, (pointer, whole, ctypes.c_int64, pointer)),
        ("mr_checksum", ctypes.c_uint64, (pointer, ctypes.c_size_t)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (``status`` says why). SettingsError for a bad ``MIRADA_CPU_KERNELS``."""
    return _loaded()[0]


def status() -> Status:
    """Which kernels are used, and why those."""
    return _loaded()[1]
