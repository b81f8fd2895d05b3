"""Memory that preparing a long video takes: makes one, prepares it in a fresh process, prints growth, peak and time.

    python benchmarks/video_memory.py [--minutes 60] [--rule slowfast|uniform] [--limit-mb 600]

The floor is the patches that are returned, three bytes a pixel: at most the budget of 154 MB for Keye-VL-1.5, and for Preview
twice its budget of 271 MB (keye-vl-utils 1.0.0 counts two frames to a patch, which the model does not).
Exits with 1 if the growth over the process's size after its imports is above the limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 854, 480
PALETTE = np.array([(200, 40, 40), (40, 160, 60), (40, 60, 200), (220, 200, 40), (30, 30, 30), (230, 230, 230)], np.uint8)


def make_video(path: Path, minutes: float, rate: int = 5) -> Path:
    """A 480p H.264 file: every 10 seconds another ground, over which a box moves."""
    texture = np.random.default_rng(0).integers(0, 24, (HEIGHT, WIDTH, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "g": "50", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(int(minutes * 60 * rate)):
            frame = texture + PALETTE[(index // (10 * rate)) % len(PALETTE)]
            left = index * 7 % (WIDTH - 80)
            frame[200:280, left : left + 80] = PALETTE[(index // rate) % len(PALETTE)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def peak_mb() -> float:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss survives exec on Linux and would show the parent's
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def measure(path: str, rule_name: str) -> dict[str, float]:
    """Prepare one video in this process and say what it took."""
    import torch  # noqa: F401  (its own size is not the video's)

    from mirada.media.rule import KEYE_15, KEYE_PREVIEW
    from mirada.media.video import prepare_video
    from mirada.types import Video

    before, started = peak_mb(), time.perf_counter()
    made = prepare_video(Video(path), KEYE_15 if rule_name == "slowfast" else KEYE_PREVIEW)
    return {
        "before_mb": round(before, 1),
        "peak_mb": round(peak_mb(), 1),
        "growth_mb": round(peak_mb() - before, 1),
        "patches_mb": round(made.pixels.nbytes / (1 << 20), 1),
        "seconds": round(time.perf_counter() - started, 2),
        "frames": made.num_frames,
        "slow": made.num_frames - sum(made.fast or ()),
    }


def in_fresh_process(path: Path, rule_name: str) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(path), "--rule", rule_name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {path} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=int, default=5, help="frames per second of the made video")
    parser.add_argument("--rule", choices=("slowfast", "uniform"), default="slowfast")
    parser.add_argument("--limit-mb", type=float, default=600)
    parser.add_argument("--measure", metavar="FILE", help="measure this file in this process")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.rule)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path = make_video(Path(folder) / "long.mp4", options.minutes, options.rate)
        megabytes = path.stat().st_size / (1 << 20)
        print(f"made {options.minutes:g} minutes of 480p, {megabytes:.1f} MB, in {time.perf_counter() - started:.1f} s")
        facts = in_fresh_process(path, options.rule)
    floor = facts["patches_mb"]
    print(f"growth {facts['growth_mb']:.0f} MB = {facts['growth_mb'] / floor:.2f} x the patches ({floor:.0f} MB, the floor)")
    print(f"peak {facts['peak_mb']:.0f} MB (before: {facts['before_mb']:.0f} MB), {facts['seconds']:.1f} s")
    print(f"{facts['frames']} frames" + (f", {facts['slow']} of them slow" if options.rule == "slowfast" else ""))
    return int(facts["growth_mb"] > options.limit_mb)


if __name__ == "__main__":
    sys.exit(main())
