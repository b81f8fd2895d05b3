"""Every Triton kernel compiles for sm_90 at the sizes of released models, in few enough registers: that needs no GPU."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]


def test_kernels_compile_for_hopper():
    """In a process of its own, without the interpreter. Each line: kernel, registers, bytes of stack (spilled values)."""
    file = Path(__file__).with_name("triton_compile.py")
    command = [sys.executable, "-W", "error", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    names = {name for name, *_ in lines}
    expected = (
        "_norm _swiglu _rope_write _write _decode _merge _prefill _one _few _widen _gate_up _down"
        " _gate_up_packed _down_packed _latent_prefill _varlen"
    )
    assert names == set(expected.split())
    assert all(int(registers) <= 255 and int(stack) == 0 for _, registers, stack in lines), done.stdout
