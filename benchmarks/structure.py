"""CPU time that a promised form costs a step: its mask, its forced tokens, and taking the token that was chosen.

    python benchmarks/structure.py

For vocabularies of 4,096 and 151,936 tokens (random words of up to nine letters, all bytes, and what JSON is made of) and four
forms. A choice among all that is allowed stands for the model; the first step, which compiles, and what is made once per model
are told apart. Times are this thread's CPU time, so that a busy neighbour does not count; of equal rounds, the least.
"""

from __future__ import annotations

import random
import time

import numpy as np

from mirada.engine.structure import Structures
from mirada.prompt.format import QWEN2_VL
from mirada.prompt.spelling import BYTE_TO_CHAR
from mirada.prompt.tokenizer import Tokenizer
from mirada.types import Sampling

WORD = {"type": "string", "maxLength": 40}
PLACE = {"type": "object", "required": ["name", "at"], "properties": {"name": WORD, "at": {"type": "integer"}}}
FORMS = {
    "schema, tight": {"json_schema": {"type": "array", "items": {**PLACE, "additionalProperties": False}, "minItems": 9}},
    "any JSON object": {"json_schema": {"type": "object"}},
    "regex": {"regex": r"[A-Z][a-z ]{20,60}\\. [0-9]{4}-[0-9]{2}"},
    "any text": {"regex": r"(?s:.*)"},
}
STEPS, ROUNDS = 120, 5


def tokenizer(size: int) -> Tokenizer:
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words: dict[str, None] = dict.fromkeys(BYTE_TO_CHAR.values())
    words |= dict.fromkeys(('":', '",', '{"', '"}', "},", "[{", "}]", '"}]', "Ġ{", 'Ġ"', "ĊĊ", "ĠĠ", "ĠĠĠĠ"))
    while len(words) < size - 1:
        words["Ġ" * draw.randint(0, 1) + "".join(draw.choices(letters, k=draw.randint(2, 9)))] = None
    end = {"id": size - 1, "content": "<|im_end|>", "special": True}
    model = {"type": "BPE", "vocab": {word: index for index, word in enumerate(words)}, "merges": []}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return Tokenizer({"model": model, "pre_tokenizer": level, "decoder": level, "added_tokens": [end]})


def steps(made: Structures, form: dict, size: int, seed: int) -> np.ndarray:
    """Seconds [steps, 3] of mask, forced and accept."""
    draw, guide = np.random.default_rng(seed), made.guide(Sampling(**form), "off")
    assert guide is not None
    times = []
    while len(times) < STEPS and not guide.finished:
        words = np.zeros(-(-size // 32), np.int32)
        stamps = [time.thread_time()]
        guide.mask(words)
        stamps.append(time.thread_time())
        guide.forced()
        stamps.append(time.thread_time())
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        token = int(draw.choice(allowed))
        if token == size - 1:
            break
        began = time.thread_time()
        guide.accept(token)
        times.append([*np.diff(stamps), time.thread_time() - began])
    return np.asarray(times)


def main() -> None:
    print(f"{'vocabulary':>10}  {'form':16} {'compile':>9} {'step 1':>9} {'median':>9} {'p95':>9} {'most':>9}   (CPU time, µs)")
    for size in (4096, 151_936):
        made_of = tokenizer(size)
        began = time.thread_time()
        made = Structures(made_of, QWEN2_VL, [size - 1])
        made.guide(Sampling(regex="a"))
        print(f"{size:10,}  once per model: {(time.thread_time() - began) * 1e3:.0f} ms")
        for name, form in FORMS.items():
            began = time.thread_time()
            made.guide(Sampling(**form))
            compiled = time.thread_time() - began
            rounds = [steps(made, form, size, seed=1) for _ in range(ROUNDS)]
            least = np.min([one.sum(1) for one in rounds], 0) * 1e6
            first, rest = least[0], least[1:]
            p50, p95, most = np.percentile(rest, 50), np.percentile(rest, 95), rest.max()
            row = "".join(f" {value:9.0f}" for value in (compiled * 1e6, first, p50, p95, most))
            print(f"{size:10,}  {name:16}{row}   {len(least)} steps")


if __name__ == "__main__":
    main()
