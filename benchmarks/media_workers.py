"""What preparing large pictures beside the engine costs others: text is answered while photos of 12 megapixels come in.

    python benchmarks/media_workers.py [--rounds 7] [--photos 8]

Each round asks the same text question alone, then beside photos prepared by threads, then beside photos prepared by workers
(in turn, so that a busy machine harms all alike), and prints medians: seconds of the answer, the longest that ``submit`` took,
seconds until the last photo was answered. The floor of the first is the answer alone. Also the processor time of a worker that
prepares one photo.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import time

import numpy as np
from PIL import Image as pil

from mirada import VLM, Image, Message, Sampling
from mirada.media.pool import default_workers

TEXT = [Message("user", "Count from one to twenty.")]
LONG, SHORT = Sampling(max_tokens=64, ignore_eos=True), Sampling(max_tokens=1)


def photo(seed: int) -> bytes:
    """A JPEG of 4000 x 3000 pixels."""
    ground = np.random.default_rng(seed).integers(0, 256, (75, 100, 3), np.uint8)
    buffer = io.BytesIO()
    pil.fromarray(ground).resize((4000, 3000), pil.Resampling.BILINEAR).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure(vlm: VLM, photos: list[bytes]) -> dict[str, float]:
    began, slowest, handles = time.perf_counter(), 0.0, []
    for data in photos:
        before = time.perf_counter()
        handles.append(vlm.submit([Message("user", (Image(data),))], SHORT))
        slowest = max(slowest, time.perf_counter() - before)
    asked = time.perf_counter()
    output = vlm.submit(TEXT, LONG).result()
    answered = time.perf_counter()
    for handle in handles:
        assert handle.result().error is None
    assert output.error is None
    return {"text": answered - asked, "submit": slowest, "all": time.perf_counter() - began}


def start_seconds(data: bytes) -> float:
    """Processor time of a worker's life with one photo."""
    settings = {"pixel_cache_bytes": 0, "encoder_cache_bytes": 0}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with VLM("mini", engine={"workers": 1, **settings}) as vlm:
        vlm.submit([Message("user", (Image(data),))], SHORT).result()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--photos", type=int, default=8)
    options = parser.parse_args()
    photos = [photo(seed) for seed in range(options.photos)]
    settings = {"pixel_cache_bytes": 0, "encoder_cache_bytes": 0, "prefix_cache_bytes": 0}
    more = {"workers": max(1, default_workers()), **settings}
    with VLM("mini", engine={"workers": 0, **settings}) as threads, VLM("mini", engine=more) as workers:
        ways = {"alone": (threads, []), "threads": (threads, photos), "workers": (workers, photos)}
        for vlm, some in ways.values():
            measure(vlm, some)  # starts and warms everything
        rounds = [{name: measure(*way) for name, way in ways.items()} for _ in range(options.rounds)]
    made = {
        name: {what: round(statistics.median(r[name][what] for r in rounds), 4) for what in rounds[0][name]} for name in ways
    }
    print(json.dumps(made | {"worker_cpu_seconds": round(start_seconds(photos[0]), 2)}, indent=1))


if __name__ == "__main__":
    main()
