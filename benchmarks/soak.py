"""Minutes of random traffic through one engine with mini: does memory stay flat, and does every request get its answer?

    python benchmarks/soak.py [--minutes 15] [--clients 4] [--csv soak.csv] [--plot docs/soak.png] [--seed 0]

Clients on threads of their own ask at random: text, pictures (new ones, and some again and again), replies read piece by piece,
requests given up half-way, bad input of several kinds, bursts of many at once; some greedy, some sampled. The engine's budgets
are small, so caches are full after the warm-up, sequences are preempted, and what grows after that is a leak.

Every second: resident memory of this process and its children, objects that Python's garbage collector knows, and the
engine's counts, into ``--csv``. Exit status 1 if memory is not flat, or if a request was lost: it got no answer within
``--patience`` seconds, good input failed, bad input did not, or it is still held by the engine when all clients are through.

Memory is flat if it grew by no more than 10 % from the end of the warm-up (a fifth of the time) to the end (medians of a tenth
of the time each), and if the line through the second half (Theil and Sen: the median of all slopes between two moments, which a
burst does not turn) rises over that half by no more than 3 % of what is held, or 8 MB where that is more: what the holes in the
heap of the C library come and go by. A leak that small is seen by running longer. Of objects no more than 5 a request may be
left, by the same slope: requests that are never let go are found so, however small they are.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GROWTH = 1.10
WARM = 0.2
WINDOW = 0.1
HALF = 0.5
"""Shares of the whole time."""
SWING = 15
"""Rows of a second each in which memory goes up and down once or more: what is freed goes back to the system now and then."""
RISE = 0.03
LEAST_RISE = 8.0
"""Of what is held, and in megabytes: the rise over the second half that counts as flat."""
OBJECTS = 5.0
"""Objects of Python that a request may leave behind, by the slope over the second half: caches that are not full yet, and
letters that are drawn for the first time, make about one; a request that is never let go some forty."""
MB = 1 << 20
ENGINE = {
    "cache_bytes": 12 * MB, "prefix_cache_bytes": 16 * MB, "encoder_cache_bytes": 8 * MB, "pixel_cache_bytes": 8 * MB,
    "max_waiting": 256,
}  # fmt: skip
"""Small enough that a minute fills everything: mini keeps 4 kB a token."""
KINDS = {"text": 30, "picture": 30, "stream": 12, "cancel": 12, "bad": 12, "burst": 4}
BURST = 24
AGAIN = 12
"""Pictures that are shown again and again; half of all."""


@dataclass
class Tally:
    """What happened so far; clients write under its lock."""

    ended: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Seconds to the first token."""
    tokens: int = 0
    pending: dict[int, tuple[float, str]] = field(default_factory=dict)
    """Number of a request -> when it was handed over, and its kind."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    _number: int = 0

    def began(self, kind: str) -> int:
        with self.lock:
            self._number += 1
            self.pending[self._number] = (time.monotonic(), kind)
            return self._number

    def done(self, number: int, output: Any, allowed: Sequence[str]) -> None:
        """``allowed``: the ways in which it may have ended."""
        with self.lock:
            _, kind = self.pending.pop(number)
            self.ended[f"{kind}: {output.finish}"] += 1
            self.tokens += len(output.tokens)
            if "first_token" in output.metrics:
                self.first.append(output.metrics["first_token"])
            if output.finish not in allowed or (output.error is not None) != (output.finish == "error"):
                self.faults.append(f"a request ({kind}) ended with {output.finish}: {output.error!r}")

    def fault(self, words: str) -> None:
        with self.lock:
            self.faults.append(words)

    def overdue(self, patience: float) -> list[str]:
        with self.lock:
            now = time.monotonic()
            return [f"a request ({kind}) has no answer" for at, kind in self.pending.values() if now - at > patience]


WHOLE = ("stop", "length", "repetition")


class Client:
    """One thread of traffic."""

    def __init__(self, vlm: Any, tally: Tally, seed: int, stop: threading.Event) -> None:
        self.vlm, self.tally, self.stop = vlm, tally, stop
        self.draw = random.Random(seed)

    def run(self) -> None:
        kinds, weights = list(KINDS), list(KINDS.values())
        while not self.stop.is_set():
            kind = self.draw.choices(kinds, weights)[0]
            try:
                getattr(self, kind)()
            except BaseException as error:  # a client that dies would hide every loss after it
                self.tally.fault(f"a client's {kind} raised {error!r}")
            self.stop.wait(self.draw.expovariate(20))

    def sampling(self) -> Any:
        from mirada import Sampling

        warm, long = self.draw.random() < 0.3, self.draw.random() < 0.05
        return Sampling(
            max_tokens=self.draw.randint(100, 320) if long else self.draw.randint(1, 48), ignore_eos=long,
            temperature=0.8 if warm else 0.0, top_p=0.9 if warm else None,
            seed=self.draw.randrange(1000) if warm else None, logprobs=self.draw.choice((None, None, None, 2)),
            repetition_penalty=self.draw.choice((1.0, 1.0, 1.2)),
        )  # fmt: skip

    def words(self) -> str:
        text = " ".join(self.draw.choice(("what", "does", "the", "sign", "say", "seven", "blue")) for _ in range(12))
        return text * self.draw.choice((1, 1, 1, 4, 12))

    def chat(self, picture: bool) -> list[Any]:
        from mirada import Image, Message, Text, synth

        if not picture:
            return [Message("user", self.words())]
        task = self.draw.choice(("line", "scene", "chart"))
        index = self.draw.randrange(AGAIN) if self.draw.random() < 0.5 else self.draw.randrange(AGAIN, 1 << 30)
        made = synth.sample(task, 7, index, fonts="builtin")
        return [Message("user", (Image(made.image), Text(made.question)))]

    def ask(self, kind: str, chat: Any, sampling: Any, allowed: Sequence[str]) -> None:
        number = self.tally.began(kind)
        self.tally.done(number, self.vlm.submit(chat, sampling).result(), allowed)

    def text(self) -> None:
        self.ask("text", self.chat(False), self.sampling(), WHOLE)

    def picture(self) -> None:
        self.ask("picture", self.chat(True), self.sampling(), WHOLE)

    def stream(self) -> None:
        """Pieces add up to the answer."""
        number = self.tally.began("stream")
        handle = self.vlm.submit(self.chat(self.draw.random() < 0.3), self.sampling())
        heard = "".join(delta.text for delta in handle)
        output = handle.result()
        self.tally.done(number, output, WHOLE)
        if heard != output.message.text:
            self.tally.fault(f"pieces {heard!r} are not the answer {output.message.text!r}")

    def cancel(self) -> None:
        number = self.tally.began("cancel")
        handle = self.vlm.submit(self.chat(self.draw.random() < 0.5), self.sampling())
        pieces = iter(handle)
        for _ in range(self.draw.choice((0, 0, 1, 3, 9))):
            next(pieces, None)
        handle.cancel()
        self.tally.done(number, handle.result(), (*WHOLE, "cancelled"))

    def bad(self) -> None:
        from mirada import Image, Message, Text

        chat: Any = self.draw.choice(
            (
                [Message("user", (Image("/nowhere/at/all.png"), Text("?")))],
                [Message("user", (Image(self.draw.randbytes(400)), Text("?")))],
                [Message("user", "far too long " * 4000)],
                [],
                "no chat",
            )
        )
        sampling: Any = {"no_such_setting": 1} if self.draw.random() < 0.2 else self.sampling()
        self.ask("bad", chat, sampling, ("error",))

    def burst(self) -> None:
        """Many at once; one of them is bad, and only that one fails."""
        chats: list[Any] = [self.chat(self.draw.random() < 0.25) for _ in range(BURST)]
        wrong = self.draw.randrange(BURST)
        chats[wrong] = []
        numbers = [self.tally.began("burst") for _ in chats]
        for i, output in enumerate(self.vlm.generate(chats, [self.sampling() for _ in chats])):
            self.tally.done(numbers[i], output, ("error",) if i == wrong else WHOLE)


@dataclass(frozen=True)
class Memory:
    """What rows of ``seconds``, ``rss_mb`` and ``children_mb`` say of resident memory, with children."""

    start: float
    """Megabytes after the warm-up."""
    end: float
    slope: float
    """Megabytes a minute over the second half, by all rows or by the highest of every ``SWING``, whichever is less: what leaks
    raises both, and traffic one or the other."""
    minutes: float
    """Of the second half."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, float]]) -> Memory:
        held = [row["rss_mb"] + row["children_mb"] for row in rows]
        half = int(HALF * len(rows))
        minutes = [row["seconds"] / 60 for row in rows[half:]]
        window = max(1, round(WINDOW * len(rows)))
        warm = held[int(WARM * len(rows)) :]
        return cls(
            statistics.median(warm[:window]), statistics.median(warm[-window:]),
            min(slope(minutes, held[half:]), slope(*_highs(minutes, held[half:]))),
            (rows[-1]["seconds"] - rows[half]["seconds"]) / 60,
        )  # fmt: skip

    @property
    def rise(self) -> float:
        """Megabytes over the second half, by its slope."""
        return self.slope * self.minutes

    @property
    def faults(self) -> list[str]:
        """Why it is not flat."""
        made = []
        if self.end > GROWTH * self.start:
            made.append(f"memory grew by {self.end / self.start - 1:.1%} after the warm-up, more than {GROWTH - 1:.0%}")
        if self.rise > (most := max(RISE * self.end, LEAST_RISE)):
            made.append(f"memory rises over the second half by {self.rise:.0f} MB, more than {most:.0f}")
        return made

    def __str__(self) -> str:
        change = f"{self.end / self.start - 1:+.1%}"
        return (f"memory: {self.start:.0f} MB after the warm-up, {self.end:.0f} MB at the end ({change}), "
                f"{self.slope:+.2f} MB/min over the second half")  # fmt: skip


def _highs(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Of every ``SWING`` points the place of the first and the highest; what is left over at the end is left out."""
    size = min(SWING, max(1, len(x) // 4))
    starts = range(0, len(x) - size + 1, size)
    return [x[at] for at in starts], [max(y[at : at + size]) for at in starts]


def slope(x: Sequence[float], y: Sequence[float], most: int = 400) -> float:
    """The median of the slopes between any two points (Theil 1950, Sen 1968), of ``most`` of them evenly taken."""
    step = max(1, -(-len(x) // most))
    points = list(zip(x, y, strict=True))[::step]
    found = [(b - a) / (v - u) for i, (u, a) in enumerate(points) for v, b in points[i + 1 :] if v > u]
    return statistics.median(found) if found else 0.0


class Recorder:
    """A row a second: time, memory, counts."""

    def __init__(self, vlm: Any, tally: Tally) -> None:
        self.vlm, self.tally = vlm, tally
        self.rows: list[dict[str, float]] = []
        self._began = time.monotonic()

    def sample(self) -> None:
        own, children = resident()
        with self.tally.lock:
            facts: dict[str, float] = {
                "ended": sum(self.tally.ended.values()),
                "pending": len(self.tally.pending),
                "tokens": self.tally.tokens,
            }
            facts["first_token_ms"] = round(1e3 * statistics.median(self.tally.first[-200:] or [0.0]), 1)
        row = {"seconds": round(time.monotonic() - self._began, 1), "rss_mb": own, "children_mb": children, **facts}
        row["objects"] = len(gc.get_objects())
        self.rows.append(row | self.vlm.stats())

    @property
    def memory(self) -> Memory:
        return Memory.of(self.rows)

    def write(self, file: Path) -> None:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, self.rows[-1])
            writer.writeheader()
            writer.writerows(self.rows)


def resident(process: Path = Path("/proc/self")) -> tuple[float, float]:
    """Resident megabytes of a process (this one) and of its children, those shared with it counted again."""
    own = _resident(process)
    found: set[str] = set()
    for task in (process / "task").iterdir():
        try:
            found.update((task / "children").read_text().split())
        except OSError:  # a thread that has just ended
            continue
    return own, sum(_resident(Path("/proc") / number) for number in found)


def _resident(process: Path) -> float:
    try:
        lines = (process / "status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.only_plot:
        with options.csv.open(newline="") as file:
            plot([{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)], options.plot)
        return 0
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        sys.exit("matplotlib is not installed: pip install 'mirada[eval]', or leave --plot out and use --only-plot later")
    from mirada import VLM

    with VLM(options.model, engine=ENGINE) as vlm:
        tally, stop = Tally(), threading.Event()
        clients = [Client(vlm, tally, options.seed * 1000 + i, stop) for i in range(options.clients)]
        recorder = Recorder(vlm, tally)
        threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        watch(recorder, tally, options)
        stop.set()
        for thread in threads:
            thread.join(options.patience)
        recorder.sample()
        left = settled(vlm)
    for name in ("running", "waiting"):
        if left[name]:
            tally.faults.append(f"{left[name]} requests are still {name}")
    tally.faults += tally.overdue(0.0)
    if options.csv:
        recorder.write(options.csv)
    if options.plot:
        plot(recorder.rows, options.plot)
    return report(recorder, tally, options)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=120, help="seconds after which a request counts as lost")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture (matplotlib)")
    parser.add_argument("--only-plot", action="store_true", help="of the --csv of an earlier run")
    parser.add_argument("--smoke", action="store_true", help="a few seconds; memory is not judged, lost requests are")
    options = parser.parse_args(argv)
    if options.smoke:
        options.minutes, options.clients = 0.05, 3
    return options


def settled(vlm: Any, seconds: float = 10.0) -> dict[str, int]:
    """Counts once the engine has let go of what has ended, which it does after the step that ended it."""
    end = time.monotonic() + seconds
    while True:
        counts = vlm.stats()
        if counts["running"] + counts["waiting"] == 0 or time.monotonic() > end:
            return counts
        time.sleep(0.1)


def watch(recorder: Recorder, tally: Tally, options: argparse.Namespace) -> None:
    """Until the time is over, or a request is overdue."""
    end = time.monotonic() + options.minutes * 60
    while (left := end - time.monotonic()) > 0 and not tally.overdue(options.patience):
        recorder.sample()
        time.sleep(min(1.0, left))


def report(recorder: Recorder, tally: Tally, options: argparse.Namespace) -> int:
    last = recorder.rows[-1]
    memory = recorder.memory
    print(f"{options.minutes:g} minutes, {options.clients} clients, seed {options.seed}: {last['ended']} requests, "
          f"{last['tokens']} tokens, {last['preemptions']} preemptions")  # fmt: skip
    for kind, count in sorted(tally.ended.items()):
        print(f"  {kind:24}{count:8}")
    for name in ("pixel", "encoder", "prefix"):
        hits, held = last[f"{name}_cache_hits"], last[f"{name}_cache_bytes"] / MB
        print(f"  {name} cache: {hits} hits ({share(last, name):.0%} of look-ups), {held:.1f} MB")
    if tally.first:
        tenths = statistics.quantiles(tally.first, n=20) if len(tally.first) > 1 else tally.first
        print(f"  first token: median {statistics.median(tally.first):.3f} s, 95 % within {tenths[-1]:.3f} s")
    print(f"  {memory}")
    half = recorder.rows[int(HALF * len(recorder.rows)) :]
    more = slope([row["ended"] for row in half], [row["objects"] for row in half])
    print(f"  objects: {last['objects']:,} at the end, {more:+.2f} a request over the second half")
    for words, count in Counter(tally.faults).most_common(20):
        print(f"LOST: {words}" + (f" ({count} times)" if count > 1 else ""))
    grown = [] if options.smoke else memory.faults + ([f"objects leak, {more:.1f} a request"] if more > OBJECTS else [])
    for words in grown:
        print(f"GROWN: {words}")
    return int(bool(tally.faults) or bool(grown))


def plot(rows: Sequence[dict[str, float]], file: Path) -> None:
    """Memory, what ends a second, and hit rates over time."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    minutes = [row["seconds"] / 60 for row in rows]
    figure, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(8, 7), constrained_layout=True)
    top.plot(minutes, [row["rss_mb"] + row["children_mb"] for row in rows], label="resident, with children")
    top.plot(minutes, [row["kv_bytes"] / MB for row in rows], label="keys and values")
    top.set_ylabel("MB")
    top.set_ylim(bottom=0)
    middle.plot(minutes, rate(rows, "ended"), label="requests")
    middle.plot(minutes, [one / 10 for one in rate(rows, "tokens")], label="tokens / 10")
    middle.set_ylabel("ended a second")
    for name in ("pixel", "encoder", "prefix"):
        bottom.plot(minutes, [share(row, name) for row in rows], label=f"{name} cache")
    bottom.set_ylabel("hits so far")
    bottom.set_ylim(0, 1)
    bottom.set_xlabel("minutes")
    for axis in (top, middle, bottom):
        axis.legend(loc="lower right", fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def share(row: dict[str, float], name: str) -> float:
    """Hits of a cache, of all look-ups so far."""
    hits, misses = row[f"{name}_cache_hits"], row[f"{name}_cache_misses"]
    return hits / max(1, hits + misses)


def rate(rows: Sequence[dict[str, float]], name: str, over: int = 15) -> list[float]:
    """Per second, over the last ``over`` rows."""
    made = []
    for i, row in enumerate(rows):
        old = rows[max(0, i - over)]
        made.append((row[name] - old[name]) / max(1e-9, row["seconds"] - old["seconds"]) if i else 0.0)
    return made


if __name__ == "__main__":
    sys.exit(main())
