"""One decode step of a small model on a CPU, without an engine around it: compiled, by the modules, and in transformers.

    python benchmarks/decode_ops.py [--threads 2] [--past 256] [--rows 1,4,8,16] [--steps 30] [--only experts] [--anyway]

Random float32 weights in the sizes of the model inside the package, of a middle one (Qwen3 layers: heads are normalised), and
of a middle one with latent attention and experts (DeepSeek-V3 layers, the first dense).

The sides take turns, a step each, with ``--past`` tokens in the cache. Milliseconds are of the wall (smallest, and median) and
of all the process's threads together (smallest), which a busy neighbour changes least. *Calls* are torch operations of a step,
views not counted. The floor is the bytes of all weights and of the past, divided by the speed at which the same number of
threads reads memory; what fits into the processor's cache may pass it. Of experts as many count as the rows choose at most.
transformers (extra ``parity``) runs Qwen3 of the same shape with its dynamic cache and sdpa; its step includes the embedding,
as ours do (``benchmarks/moe.py`` sets a decoder with experts beside theirs).

Refuses to measure while other programs keep the CPU busy, unless ``--anyway``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mirada.layers.batch import Batch
from mirada.layers.cache import make_cache
from mirada.layers.kernels.library import status
from mirada.models import decoder, deepseek
from mirada.models.decoder import Decoder, DecoderConfig
from mirada.models.deepseek import DeepseekConfig, DeepseekDecoder

SIZES: dict[str, DecoderConfig | DeepseekConfig] = {
    "mini": DecoderConfig(
        vocab_size=1024, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=768, rope_theta=10000.0, mrope_section=(8, 12, 12), max_position_embeddings=32768,
    ),
    "512x12": DecoderConfig(
        vocab_size=16384, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        intermediate_size=1408, rope_theta=1e6, mrope_section=(8, 12, 12), max_position_embeddings=32768,
    ),
    "experts": DeepseekConfig(
        vocab_size=16384, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408, kv_lora_rank=256,
        q_lora_rank=None, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, moe_intermediate_size=352,
        n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, routed_scaling_factor=2.446, first_k_dense_replace=1,
    ),
}  # fmt: skip
READ_BYTES = 256 << 20
BUSY = 5.0
"""Percent of the last ten seconds in which something waited for a processor."""


class Calls(TorchDispatchMode):
    """Counts operations that compute or copy."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def ours(config: DecoderConfig | DeepseekConfig, past: int, rows: int) -> dict[str, Callable[[], Any]]:
    kinds: dict[type, Any] = {
        DecoderConfig: (Decoder, decoder.cache_spec),
        DeepseekConfig: (DeepseekDecoder, deepseek.cache_spec),
    }
    kind, spec = kinds[type(config)]
    made, head = kind(config), torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    cache: Any = make_cache(spec(config), torch.float32, "cpu")
    for slot in range(rows):
        cache.allocate(slot)
        cache.grow(slot, past + 1)
        for layer in range(config.num_hidden_layers):
            for plane in cache.planes_of(slot, layer):
                plane.normal_()
    tokens = torch.arange(rows)
    batch = Batch(tokens, torch.full((3, rows), past), (1,) * rows, (past,) * rows, tuple(range(rows)))

    def compiled() -> Any:
        made.steps.on = True
        return made.logits(made.embed(tokens), batch, cache, head)

    def modules() -> Any:
        made.steps.on = False
        return head(made(made.embed(tokens), batch, cache))

    sides: dict[str, Callable[[], Any]] = {"modules": modules}
    if compiled() is not None:
        sides = {"compiled": compiled} | sides
    return sides


def numbers(config: DecoderConfig | DeepseekConfig, past: int, rows: int) -> int:
    """Weights and numbers of the past that a step reads."""
    layers, width = config.num_hidden_layers, config.hidden_size
    if isinstance(config, DecoderConfig):
        heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        weights = layers * width * (heads + 3 * config.intermediate_size)
        row = 2 * config.num_key_value_heads * config.head_dim
    else:
        c, row = config, config.kv_lora_rank + config.qk_rope_head_dim
        heads = c.num_attention_heads * (c.head_dim + c.v_head_dim)
        maps = c.kv_lora_rank * c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
        chosen = min(rows * c.num_experts_per_tok, c.n_routed_experts) + c.n_shared_experts
        dense, experts = 3 * c.intermediate_size, 3 * chosen * c.moe_intermediate_size + c.n_routed_experts
        blocks = c.first_k_dense_replace * dense + (layers - c.first_k_dense_replace) * experts
        weights = layers * (width * (heads + row) + maps) + width * blocks
    return weights + config.vocab_size * width + rows * past * layers * row


def transformers(config: DecoderConfig | DeepseekConfig, past: int, rows: int) -> dict[str, Callable[[], Any]]:
    if isinstance(config, DeepseekConfig):
        return {}
    try:
        from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        return {}
    made = Qwen3Config(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim, attn_implementation="sdpa",
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(made).eval()
    shape = (rows, config.num_key_value_heads, past, config.head_dim)
    cache = DynamicCache(config=made)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)
    tokens = torch.arange(rows)[:, None]

    def step() -> Any:
        made = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return made

    return {"transformers": step}


def read_speed(rounds: int = 5) -> float:
    """Bytes per second at which torch's threads read memory that is in no cache."""
    data = torch.ones(READ_BYTES // 4)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - began)
    return READ_BYTES / min(seconds)


def measure(sides: dict[str, Callable[[], Any]], steps: int) -> dict[str, tuple[float, float, float, int]]:
    """Side -> wall (smallest, median) and processor time (smallest) in ms, torch calls."""
    wall: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    calls = {}
    for name, step in sides.items():
        step()
        with Calls() as counter:
            step()
        calls[name] = counter.count
    for _ in range(steps):
        for name, step in sides.items():
            began, used = time.perf_counter(), time.process_time()
            step()
            wall[name].append(1e3 * (time.perf_counter() - began))
            busy[name].append(1e3 * (time.process_time() - used))
    return {name: (min(wall[name]), median(wall[name]), min(busy[name]), calls[name]) for name in sides}


def refuse_when_busy() -> None:
    pressure = Path("/proc/pressure/cpu")
    if pressure.exists() and float(pressure.read_text().split("avg10=")[1].split()[0]) > BUSY:
        sys.exit("other programs keep the CPU busy; wait, or say --anyway")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--past", type=int, default=256)
    parser.add_argument("--rows", default="1,4,8,16", help="sequences that decode together")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", choices=SIZES, help="one of the models")
    parser.add_argument("--anyway", action="store_true")
    given = parser.parse_args()
    if not given.anyway:
        refuse_when_busy()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    speed = read_speed()
    print(f"kernels {status().name}, {given.threads} threads, {given.past} past tokens, memory {speed / 1e9:.1f} GB/s")
    print(
        f"{'model':8} {'rows':>4} {'side':14} {'wall min':>9} {'median':>8} {'cpu min':>8} {'calls':>6} {'floor':>7} {'x':>6}"
    )
    for name, config in SIZES.items():
        if given.only not in (None, name):
            continue
        for rows in map(int, given.rows.split(",")):
            with torch.inference_mode():
                found = measure(ours(config, given.past, rows) | transformers(config, given.past, rows), given.steps)
            floor = 1e3 * 4 * numbers(config, past=given.past, rows=rows) / speed
            slowest = found.get("transformers", found["modules"])[1]
            for side, (least, middle, busy, calls) in found.items():
                print(
                    f"{name:8} {rows:4} {side:14} {least:9.3f} {middle:8.3f} {busy:8.3f} {calls:6} {floor:7.3f}"
                    f" {slowest / middle:5.2f}x"
                )
    print("x: median of transformers (of the modules, where it is not installed) to that of the side")


if __name__ == "__main__":
    main()
