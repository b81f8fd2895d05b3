"""What the caches of keys and values cost and give: python benchmarks/kv_cache.py [int8 | past | prefix]

int8    mini with keys and values as int8 beside its own type: bytes a token, answers to pictures it was never shown, and how
        far the distributions of the answers' tokens move (KL, teacher-forced).
past    attention of a chunk of 512 after 16k tokens and of one token, one layer of Qwen2-VL-2B's shape: with a mask, in
        pieces, and as int8. Processor time, the least of several interleaved rounds.
prefix  mini: processor time to the first token of two questions about one picture, with and without what is there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from mirada import VLM, Image, Message, Sampling, Text, synth
from mirada.engine.settings import EngineSettings
from mirada.engine.vision import encode
from mirada.layers.batch import Batch
from mirada.layers.cache import make_cache
from mirada.layers.kinds import KINDS
from mirada.layers.kv_int8 import Quantised, quantise
from mirada.layers.past import attend_one
from mirada.media.limits import FetchLimits
from mirada.media.prepare import prepare_many
from mirada.models.positions import positions

TASKS = ("line", "scene", "chart", "boxes")
PICTURES = 40
HEADS, KV_HEADS, WIDTH, CHUNK, PAST = 12, 2, 128, 512, 16384
ROUNDS = 5


def drawn() -> list[Any]:
    return [synth.sample(TASKS[i % len(TASKS)], 4, i, split="held", level=0.5, fonts="builtin") for i in range(PICTURES)]


def chat(one: Any) -> list[Message]:
    return [Message("user", (Image(one.image), Text(one.question)))]


def answers(kv: str, samples: list[Any]) -> list[Any]:
    with VLM("mini", device="cpu", engine=EngineSettings(kv=kv)) as vlm:  # pyright: ignore[reportArgumentType]
        return vlm.generate([chat(one) for one in samples], Sampling(max_tokens=48))


@torch.inference_mode()
def logits(parts: Any, one: Any, tokens: tuple[int, ...], kv: str) -> torch.Tensor:
    """Of each token of an answer, after the prompt and the tokens before it: [n, V]."""
    messages = chat(one)
    media = prepare_many([Image(one.image)], parts.rule, FetchLimits())
    prompt = parts.renderer.render(messages, media)
    where, following = positions(len(prompt.tokens), prompt.spans)
    more = torch.arange(following, following + len(tokens)).expand(3, -1)
    span = prompt.spans[0]
    batch = Batch(
        torch.tensor(prompt.tokens + tokens), torch.cat((torch.from_numpy(where), more), 1),
        (len(prompt.tokens) + len(tokens),), feature_rows=torch.arange(span.start, span.end),
    )  # fmt: skip
    cache = make_cache(parts.cache_spec, torch.float32, "cpu", kv=kv)
    cache.allocate(0)
    features = encode(parts.model, media, parts.rule.grid, torch.device("cpu"), torch.float32)
    hidden = parts.model.forward(batch, features, cache)
    return parts.model.logits(hidden[len(prompt.tokens) - 1 : -1])


def int8() -> None:
    samples = drawn()
    plain, small = (answers(kv, samples) for kv in ("auto", "int8"))
    right = [sum(o.message.text == s.answer for o, s in zip(made, samples, strict=True)) for made in (plain, small)]
    equal = sum(a.tokens == b.tokens for a, b in zip(plain, small, strict=True))
    with VLM("mini", device="cpu") as vlm:
        parts = vlm.parts
        bytes_per_token = [make_cache(parts.cache_spec, torch.float32, "cpu", kv=kv).bytes_per_token for kv in ("auto", "int8")]
        rows = [[logits(parts, s, o.tokens, kv) for s, o in zip(samples, plain, strict=True)] for kv in ("auto", "int8")]
    print(f"bytes a token: {bytes_per_token[0]} -> {bytes_per_token[1]} ({bytes_per_token[1] / bytes_per_token[0]:.3f})")
    print(f"{PICTURES} held-out pictures, answers right: {right[0]} -> {right[1]}; answers alike: {equal}")
    report(*(torch.cat(part) for part in rows))


def report(exact: torch.Tensor, near: torch.Tensor) -> None:
    """Distances between two tables of logits [n, V]."""
    a, b = exact.log_softmax(-1), near.log_softmax(-1)
    kl = (a.exp() * (a - b)).sum(-1)
    alike = (a.argmax(-1) == b.argmax(-1)).float().mean()
    print(f"{len(kl)} tokens: KL mean {kl.mean():.1e}, most {kl.max():.1e}; best token alike {alike:.4f}")
    print(f"logits: relative error {(exact - near).norm() / exact.norm():.1e}")


def past() -> None:
    random = torch.Generator().manual_seed(0)
    total = PAST + CHUNK
    q = torch.randn(CHUNK, HEADS, WIDTH, generator=random)
    k, v = (torch.randn(KV_HEADS, total, WIDTH, generator=random) for _ in range(2))
    k8, v8 = (Quantised(*quantise(x, (WIDTH,)), (WIDTH,)) for x in (k, v))
    scale = WIDTH**-0.5

    def masked() -> torch.Tensor:
        group = HEADS // KV_HEADS
        by_group = q.view(CHUNK, KV_HEADS, group, WIDTH).permute(2, 1, 0, 3)
        shape = (group, KV_HEADS, total, WIDTH)
        return KINDS["sdpa"](by_group, k.expand(shape), v.expand(shape), True, scale)

    work: dict[str, Callable[[], Any]] = {
        "chunk, mask": masked,
        "chunk, pieces": lambda: attend_one(q, k, v, scale),
        "chunk, int8": lambda: attend_one(q, k8, v8, scale),
        "token": lambda: attend_one(q[:1], k, v, scale),
        "token, int8": lambda: attend_one(q[:1], k8, v8, scale),
    }
    for name, seconds in least(work).items():
        print(f"{name:14} {seconds * 1e3:8.1f} ms")


def least(work: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of processor time of each, the least over interleaved rounds."""
    found = dict.fromkeys(work, float("inf"))
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, run in work.items():
                began = time.process_time()
                run()
                found[name] = min(found[name], time.process_time() - began)
    return found


def prefix() -> None:
    samples = drawn()[:12]
    seconds: dict[str, list[float]] = {}
    settings = {
        "kept": EngineSettings(),
        "off": EngineSettings(prefix_cache_bytes=0, encoder_cache_bytes=0, pixel_cache_bytes=0),
    }
    engines = {name: VLM("mini", device="cpu", engine=one) for name, one in settings.items()}
    for one in samples:
        for name, vlm in engines.items():
            for text in (one.question, "What is to be seen here?"):
                began = time.process_time()
                vlm.generate([[Message("user", (Image(one.image), Text(text)))]], Sampling(max_tokens=1))
                turn = "first" if text == one.question else "second"
                seconds.setdefault(f"{name}, {turn}", []).append(time.process_time() - began)
    for name, found in seconds.items():
        print(f"{name:14} {sorted(found)[len(found) // 2] * 1e3:8.1f} ms to the first token (median of {len(found)})")
    print({name: count for name, count in engines["kept"].stats().items() if name.startswith("prefix")})
    for vlm in engines.values():
        vlm.close()


def main() -> None:
    modes = {"int8": int8, "past": past, "prefix": prefix}
    for name in sys.argv[1:] or modes:
        if name not in modes:
            sys.exit(f"unknown part {name!r}; one of {', '.join(modes)}")
        print(f"## {name} ({torch.get_num_threads()} threads)")
        modes[name]()


if __name__ == "__main__":
    main()
