"""A decoder with experts against transformers' DeepseekV3: same weights, float32, CPU.

    python benchmarks/moe.py [--layers 3] [--prompt 512] [--pairs 7] [--threads 1] [--anyway]

Widths are those of Kimi-VL-A3B, layers fewer (the first dense, the others with experts), weights random and held once for both
sides. transformers runs in the setting of its experts (eager, grouped_mm, batched_mm) that is the quickest here, chosen anew
for each row, and with its default attention; both sides decode with a cache of ``--prompt`` tokens. Every pair runs both sides
once, one after the other, on tokens of its own (rows of one token: five times as many pairs). The table shows medians by the
clock, median ratios of the pairs by the clock and in processor time, and the floor: what the machine needs to read the
weights that are used (decode) or to multiply by them (prefill), each as measured in the same minute. The logits' matrix is
left out on both sides.
Refuses to measure while other programs keep the CPU busy, unless ``--anyway``, and then says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import BUSY, require_quiet
from torch import Tensor

from mirada.layers.batch import Batch
from mirada.layers.cache import make_cache
from mirada.layers.linear import linear
from mirada.models.deepseek import DeepseekConfig, DeepseekDecoder, cache_spec, rules

GOAL = 1.2
SHORT = 5
"""Times as many pairs for rows that take little time."""
SETTINGS = ("eager", "grouped_mm", "batched_mm")
SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 11264, "kv_lora_rank": 512,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 1408,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 2.446, "first_k_dense_replace": 1, "rms_norm_eps": 1e-5,
}  # fmt: skip
THETA = 800000.0


@dataclass(frozen=True)
class Row:
    """One line of the table: both sides on the tokens of pair ``i``, and what the machine needs at least."""

    name: str
    ours: Callable[[int], Tensor]
    theirs: Callable[[int], Tensor]
    floor: float
    """Seconds."""


def main() -> None:
    options = parse()
    pressure = require_quiet(options.anyway)
    try:
        import transformers
    except ImportError:
        sys.exit("transformers is not installed: pip install 'mirada[parity]'")
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        pair = Pair(options, transformers)
        speed = machine()
        busy = f"; other programs were busy (CPU pressure {pressure:.0f} %)" if pressure > BUSY else ""
        print(
            f"float32, {options.threads} thread(s), {options.layers} layers, transformers {transformers.__version__}, "
            f"{speed[0] / 1e9:.0f} GB/s, {speed[1] / 1e9:.0f} Gflop/s; median of {options.pairs} pairs{busy}\n"
        )
        print(f"{'':26}{'ours ms':>9}{'theirs ms':>11}{'ratio':>8}{'CPU':>8}{'floor ms':>10}   setting of theirs")
        for row in pair.rows(*speed):
            measure(row, pair, options.pairs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--anyway", action="store_true")
    return parser.parse_args()


class Pair:
    """The same decoder twice, its large weights in the same memory."""

    def __init__(self, options: argparse.Namespace, transformers: Any) -> None:
        self.prompt, self.transformers = options.prompt, transformers
        sizes = SIZES | {"num_hidden_layers": options.layers}
        self.config = DeepseekConfig(**sizes, rope_theta=THETA)
        rope = {"rope_type": "default", "rope_theta": THETA}
        self.their_config = transformers.DeepseekV3Config(
            **sizes, num_key_value_heads=16, rope_parameters=rope, num_mtp_layers=0
        )
        random = torch.Generator().manual_seed(0)
        with torch.device("meta"):
            self.ours = DeepseekDecoder(self.config)
            self.theirs = transformers.DeepseekV3Model(self.their_config)
        self.ours = self.ours.to_empty(device="cpu").eval()
        fill(self.ours, random)
        self.theirs.load_state_dict(self._their_weights(), assign=True)
        self.theirs.rotary_emb = type(self.theirs.rotary_emb)(self.their_config)
        self.theirs.eval()
        self.tokens = torch.randint(0, self.config.vocab_size, (64, options.prompt + 1), generator=random)
        self.hidden = torch.randn(64, options.prompt, self.config.hidden_size, generator=random)
        self.cache = make_cache(cache_spec(self.config), torch.float32, "cpu")
        self.cache.allocate(0)

    def _their_weights(self) -> dict[str, Tensor]:
        """Views of ours under their names; they hold experts stacked, as we do."""
        ours = dict(self.ours.named_parameters(prefix="decoder"))
        made: dict[str, Tensor] = {}
        for rule in rules(self.config):
            if rule.parameter == "lm_head.weight":
                continue
            name, held = rule.tensors[0][0].removeprefix("model."), ours[rule.parameter].detach()
            if rule.how == "stack":
                kind = rule.parameter.rsplit(".", 1)[1]
                made[name.split(".experts.")[0] + f".experts.{kind}_proj"] = held
                continue
            for i, (stored, _) in enumerate(rule.tensors):
                made[stored.removeprefix("model.")] = rule.place(held, i)
        return made

    def rows(self, bandwidth: float, rate: float) -> list[Row]:
        """All lines. The caches of both sides are filled by the prefill, which comes first."""
        c, n = self.config, self.prompt
        expert = 3 * c.hidden_size * c.moe_intermediate_size
        block = expert * (c.num_experts_per_tok + c.n_shared_experts) + c.hidden_size * c.n_routed_experts
        whole = sum(p.numel() for name, p in self.ours.named_parameters() if "experts" not in name and "embed" not in name)
        whole += expert * c.num_experts_per_tok * (c.num_hidden_layers - c.first_k_dense_replace)
        last = len(self.ours.layers) - 1
        mine, other = self.ours.layers[last].mlp, self.theirs.layers[last].mlp
        return [
            Row(f"prefill {n}", self.prefill, self.their_prefill, 2 * n * whole / rate),
            Row(f"decode 1 after {n}", self.decode, self.their_decode, 4 * whole / bandwidth),
            Row(f"experts alone, {n} tokens", lambda i: mine(self.hidden[i]), lambda i: other(self.hidden[i, None])[0],
                2 * n * block / rate),
            Row("experts alone, 1 token", lambda i: mine(self.hidden[i, :1]), lambda i: other(self.hidden[i, None, :1])[0],
                4 * block / bandwidth),
        ]  # fmt: skip

    def _batch(self, n: int, past: int) -> Batch:
        return Batch(torch.zeros(n), torch.arange(past, past + n).expand(3, -1), (n,), (past,))

    def prefill(self, i: int) -> Tensor:
        return self.ours(self.ours.embed(self.tokens[i, :-1]), self._batch(self.prompt, 0), self.cache)

    def decode(self, i: int) -> Tensor:
        return self.ours(self.ours.embed(self.tokens[i, -1:]), self._batch(1, self.prompt), self.cache)

    def their_prefill(self, i: int) -> Tensor:
        self.their_cache = self.transformers.DynamicCache(config=self.their_config)
        return self.theirs(self.tokens[i, None, :-1], past_key_values=self.their_cache).last_hidden_state[0]

    def their_decode(self, i: int) -> Tensor:
        made = self.theirs(self.tokens[i, None, -1:], past_key_values=self.their_cache).last_hidden_state[0]
        self.their_cache.crop(-1)  # only bounds views
        return made


def fill(model: torch.nn.Module, random: torch.Generator) -> None:
    """Noise, drawn once per four million values: repeated weights change no time in float32."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if "norm" in name else 0.0)
            continue
        flat = parameter.view(-1)
        noise = torch.randn(min(len(flat), 1 << 22), generator=random) * parameter.shape[-1] ** -0.5
        for piece in flat.split(len(noise)):
            piece.copy_(noise[: len(piece)])


def measure(row: Row, pair: Pair, pairs: int) -> None:
    """Both sides must agree; then pairs against the quickest of their settings."""
    difference = (row.ours(0) - row.theirs(0)).abs().max().item()
    if difference > 1e-3:
        sys.exit(f"{row.name}: the two sides differ by {difference:.2g}")
    least: dict[str, float] = {}
    for setting in SETTINGS:
        if setting == "batched_mm" and row.floor > 0.1:
            continue  # it copies the weights of every expert for every token: gigabytes for a prompt
        pair.theirs.set_experts_implementation(setting)
        least[setting] = min(seconds(row.theirs, 1 + i)[1] for i in range(3))
    best = min(least, key=lambda setting: least[setting])
    pair.theirs.set_experts_implementation(best)
    count = pairs if row.floor > 0.1 else SHORT * pairs
    taken = [(seconds(row.ours, i % 64), seconds(row.theirs, i % 64)) for i in range(4, 4 + count)]
    ours, theirs = (statistics.median(one[0] for one in side) * 1e3 for side in zip(*taken, strict=True))
    clock, cpu = (statistics.median(b[kind] / a[kind] for a, b in taken) for kind in (0, 1))
    short = "" if min(clock, cpu) >= GOAL else f"   below {GOAL}"
    print(f"{row.name:26}{ours:9.1f}{theirs:11.1f}{clock:8.2f}{cpu:8.2f}{row.floor * 1e3:10.1f}   {best}{short}", flush=True)


def seconds(work: Callable[[int], Tensor], i: int) -> tuple[float, float]:
    """By the clock, and of processor time: the second leaves out what other programs took."""
    clock, cpu = time.perf_counter(), time.process_time()
    work(i)
    return time.perf_counter() - clock, time.process_time() - cpu


def machine() -> tuple[float, float]:
    """Bytes per second that a sum reads, and float32 operations per second of a large product: the best of five."""
    big, side = torch.ones(64 << 20), torch.randn(1536, 1536)
    reading = min(seconds(lambda _: big.sum(), 0)[0] for _ in range(5))
    product = min(seconds(lambda _: linear(side, side), 0)[0] for _ in range(5))
    return big.numel() * 4 / reading, 2 * 1536**3 / product


if __name__ == "__main__":
    main()
