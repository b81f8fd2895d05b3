"""One linear product for everybody: what it keeps in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_products_of_ever_new_lengths_do_not_fill_the_memory():
    code = (
        "import mirada.config, random, torch\n"
        "from mirada.layers.linear import linear\n"
        "def rss(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "torch.set_num_threads(1)\n"
        "weights = [torch.randn(512, 256), torch.randn(256, 768)]\n"
        "lengths = random.Random(0).sample(range(9, 400), 380)\n"
        "torch.set_grad_enabled(False)\n"
        "def run(part): [linear(torch.randn(n, w.shape[1]), w) for n in part for w in weights]\n"
        "run(lengths[:80]); before = rss(); run(lengths[80:]); print(rss() - before)\n"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(made.stdout) < 250e6  # without bounds: 510e6, and more with more lengths
