"""Minutes of mixed clients at a real ``mirada serve`` with mini: is every answer right, is one lost, does memory stay flat?

    python benchmarks/serve_load.py [--minutes 3] [--clients 64] [--csv load.csv] [--peer-python PEERS/bin/python]

Each of ``--clients`` asks one thing after another, without a pause: text, a picture, a video (most of it streamed), a stream
that is cut after a few pieces, or a body that is wrong in one of ten ways. Before the load, every one of the ``--cases`` is
asked once of another server process that does nothing else at that moment; a whole answer under load must be that answer.

Why it must: a step computes all sequences as one packed batch, but attention is per sequence, what is sampled is greedy, and a
row of a float32 product does not depend, beyond its last bits, on which rows stand beside it. So token ids are equal whatever
else is in the batch, unless the two best tokens are closer than those last bits can tell (rule 11 of docs/design.md: 1e-3 in
the logits). An answer that differs is therefore asked again, alone and with logprobs: if the two best were so close where it
turned off, it counts as a tie and is printed; anything else is a crossed or broken answer, and a fault. For the same reason it
does not matter whether a prefix, a picture's features or its pixels came out of a cache. The caches of the engine are small (as
in soak.py), so they are full after the warm-up, most requests miss them, and what grows after that is a leak.

Exit status 1: a fault (a lost, crossed or broken answer; a status 5xx other than 503; a wrong body that was not refused as it
should be; something still held after the last client has gone; a traceback in the log), or resident memory of the server and
its workers that is not flat, as soak.py judges it. The clients run on the same machine: their processor time is printed beside
the server's.

With ``--peer-python`` the same text and pictures, whole or cut, go in turn (ours, theirs, ...) to ``mirada serve`` and to
``transformers serve`` with one checkpoint of mini's sizes and random weights in float32; each whole answer has ``--new``
tokens, ends ignored, so that both sides do the same work. Ratios above 1: ours is better. README.md says what the peer needs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import csv
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import soak
import throughput
from serve_client import Answer, Broken, Connection

ENGINE = {"prefix_cache_bytes": 16 << 20, "encoder_cache_bytes": 8 << 20, "pixel_cache_bytes": 8 << 20}
"""Small enough that the warm-up fills everything."""
KINDS = {"text": 34, "picture": 28, "video": 10, "cut": 14, "bad": 14}
"""What a client asks next, in percent."""
STREAMED = 0.75
NEW = (8, 48)
"""Tokens of an answer, at most."""
TIE = 1e-3
"""Logits that are closer than this may change places (rule 11)."""
START_SECONDS = 180.0


@dataclass(frozen=True)
class Case:
    """A question whose answer is known."""

    kind: str
    body: dict[str, Any]


def cases(count: int, seed: int) -> list[Case]:
    """A third text, a half pictures, the rest videos."""
    draw = random.Random(seed)
    makers = (text, picture, picture, text, picture, video)
    return [makers[i % len(makers)](draw, i) for i in range(count)]


def text(draw: random.Random, number: int) -> Case:
    words = " ".join(
        draw.choice(("what", "does", "the", "sign", "say", "seven", "blue")) for _ in range(draw.choice((8, 8, 80)))
    )
    return _case("text", f"{number} {words}", draw)


def picture(draw: random.Random, number: int) -> Case:
    from PIL import Image

    from mirada import synth

    made = synth.sample(draw.choice(("line", "scene", "chart", "boxes")), 11, number, fonts="builtin")
    out = io.BytesIO()
    Image.fromarray(made.image).save(out, "PNG")
    part = {"type": "image_url", "image_url": {"url": _data("image/png", out.getvalue())}}
    return _case("picture", made.question, draw, part)


def video(draw: random.Random, number: int) -> Case:
    from PIL import Image

    from mirada import synth

    made = synth.video_sample(11, number, num_frames=8)
    frames = [Image.fromarray(frame) for frame in made.frames]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=500)
    part = {"type": "video_url", "video_url": {"url": _data("image/gif", out.getvalue())}}
    return _case("video", made.question, draw, part)


def _case(kind: str, question: str, draw: random.Random, *parts: dict[str, Any]) -> Case:
    content = [*parts, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return Case(kind, {"messages": messages, "temperature": 0, "max_tokens": draw.randint(*NEW)})


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Wrong:
    """A request that must be refused, and with what."""

    status: int
    code: str
    body: bytes
    kind: str = "application/json"
    length: int | None = None


def wrongs() -> list[Wrong]:
    def body(**more: Any) -> bytes:
        return json.dumps({"model": "mini", "messages": [{"role": "user", "content": "hi"}], **more}).encode()

    def shown(url: str) -> bytes:
        return body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])

    return [
        Wrong(400, "not_json", b'{"model": "mini", "messages": [{'),
        Wrong(415, "not_json", body(), kind="text/plain"),
        Wrong(413, "body_too_large", b"{", length=1 << 40),
        Wrong(404, "model_not_found", body(model="none")),
        Wrong(400, "parameter_error", body(temperature="hot")),
        Wrong(400, "parameter_error", body(unheard_of=1)),
        Wrong(400, "context_length_exceeded", body(messages=[{"role": "user", "content": "far too long " * 6000}])),
        Wrong(400, "media_decode_error", shown(_data("image/png", b"\x89PNG\r\n\x1a\n" + bytes(300)))),
        Wrong(400, "media_refused", shown("/etc/passwd")),
        Wrong(400, "media_refused", shown("http://127.0.0.1:9/a.png")),
    ]


@dataclass
class Tally:
    """What happened."""

    ended: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    differing: list[tuple[int, Answer]] = field(default_factory=list)
    """Case and answer of those that are not as they were alone."""
    first: dict[str, list[float]] = field(default_factory=dict)
    """Seconds to the first piece of streams, by kind."""
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_equal: int = 0
    num_pending: int = 0


class Crowd:
    """Clients of one server until a moment comes; ``alone`` are the answers that are right."""

    def __init__(
        self,
        address: tuple[str, int],
        pool: Sequence[Case],
        fields: dict[str, Any],
        options: argparse.Namespace,
        alone: Sequence[Answer] = (),
        kinds: dict[str, int] = KINDS,
    ) -> None:
        self.address, self.pool, self.fields, self.options, self.alone, self.kinds = (
            address,
            pool,
            fields,
            options,
            alone,
            kinds,
        )
        self.tally = Tally()
        self.wrongs = wrongs()
        self.by_kind = {kind: [i for i, case in enumerate(pool) if case.kind == kind] for kind in kinds}
        self.end = 0.0  # fmt: skip

    async def run(self, seconds: float, finish: bool = True) -> float:
        """All clients for ``seconds``; then what is under way ends (``finish``) or is cut. How long it took."""
        began = time.monotonic()
        self.end = began + seconds
        clients = [asyncio.create_task(self._client(number)) for number in range(self.options.clients)]
        if finish:
            await asyncio.gather(*clients)
        else:
            await asyncio.wait(clients, timeout=seconds)
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
        return time.monotonic() - began

    async def _client(self, number: int) -> None:
        draw = random.Random(f"{self.options.seed}/{number}")
        names, weights = list(self.kinds), list(self.kinds.values())
        connection = Connection(*self.address)
        try:
            while time.monotonic() < self.end:
                kind = draw.choices(names, weights)[0]
                await self._turn(connection, kind, draw)
        finally:
            connection.abort()

    async def _turn(self, connection: Connection, kind: str, draw: random.Random) -> None:
        tally = self.tally
        tally.num_pending += 1
        try:
            async with asyncio.timeout(self.options.patience):
                work = {"cut": self._cut, "bad": self._bad}.get(kind)
                await (work(connection, draw) if work else self._whole(connection, kind, draw))
        except TimeoutError:  # an OSError too, so it comes first
            connection.abort()
            tally.faults[f"{kind}: no answer within {self.options.patience:g} s"] += 1
        except (Broken, OSError, ValueError, KeyError) as error:
            connection.abort()
            tally.faults[f"{kind}: {type(error).__name__}: {error}"] += 1
        finally:
            tally.num_pending -= 1

    async def _ask(self, connection: Connection, body: dict[str, Any], **more: Any) -> Answer:
        """The answer once the server does not say 429 any more."""
        data = json.dumps(body | self.fields).encode()
        while True:
            answer = await connection.ask(data, **more)
            if answer.status not in (429, 503):
                return answer
            self.tally.ended[str(answer.status)] += 1
            if answer.retry_after <= 0:
                self.tally.faults[f"{answer.status} without Retry-After"] += 1
            await asyncio.sleep(max(0.1, answer.retry_after))

    async def _whole(self, connection: Connection, kind: str, draw: random.Random) -> None:
        index = draw.choice(self.by_kind[kind])
        stream = draw.random() < STREAMED
        how = {"stream": True, "stream_options": {"include_usage": True}} if stream else {"stream": False}
        answer = await self._ask(connection, self.pool[index].body | how)
        tally = self.tally
        tally.ended[f"{kind}, {'streamed' if stream else 'whole'}"] += 1
        count = answer.usage.get("completion_tokens", 0)
        tally.num_tokens += count
        if answer.status != 200 or answer.error or answer.finish is None:
            tally.faults[f"{kind}: status {answer.status}, {answer.error or 'no end'}"] += 1
            return
        wanted = len(answer.tokens) if self.alone else self.options.new
        if count != wanted:
            tally.faults[f"{kind}: {count} tokens instead of {wanted}"] += 1
        if stream and answer.first is not None:
            tally.first.setdefault(kind, []).append(answer.first)
            tally.gaps += answer.gaps
        if not self.alone:
            return
        if not answer.complete:
            tally.faults[f"{kind}: a stream without its last event"] += 1
            return
        right = self.alone[index]
        if (answer.tokens, answer.text, answer.finish) == (right.tokens, right.text, right.finish):
            tally.num_equal += 1
        else:
            tally.differing.append((index, answer))

    async def _cut(self, connection: Connection, draw: random.Random) -> None:
        """Goes away after a few pieces, or before the first."""
        case = self.pool[draw.randrange(len(self.pool))]
        if case.kind not in self.kinds:
            case = self.pool[draw.choice(self.by_kind["text"])]
        pieces = draw.choice((0, 1, 3, 9))
        await self._ask(connection, case.body | {"stream": True}, cut=pieces)
        connection.abort()
        self.tally.ended["cut"] += 1

    async def _bad(self, connection: Connection, draw: random.Random) -> None:
        wrong = draw.choice(self.wrongs)
        answer = await connection.ask(wrong.body, kind=wrong.kind, length=wrong.length)
        self.tally.ended["bad"] += 1
        if (answer.status, answer.error.get("code")) != (wrong.status, wrong.code):
            self.tally.faults[f"bad: {answer.status} {answer.error} instead of {wrong.status} {wrong.code}"] += 1


class Served:
    """A server process: where it is, and what it holds."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], address: tuple[str, int], log: Path) -> None:
        self.name, self.process, self.address, self.log = name, process, address, log
        self.proc = Path(f"/proc/{process.pid}")

    def get(self, path: str) -> str:
        return asyncio.run(_get(self.address, path)).decode()

    def figures(self) -> dict[str, float]:
        """Of /metrics: what has one label or none."""
        found: dict[str, float] = {}
        for line in self.get("/metrics").splitlines():
            name, _, value = line.rpartition(" ")
            if not line.startswith("#") and name.count("=") < 2:
                found[name.partition("{")[0]] = float(value)
        return found

    def sample(self) -> dict[str, float]:
        own, children = soak.resident(self.proc)
        held = {"threads": len(list((self.proc / "task").iterdir())), "files": len(list((self.proc / "fd").iterdir()))}
        return {"rss_mb": round(own, 2), "children_mb": round(children, 2), **held}

    def cpu(self) -> float:
        """Processor seconds so far, those of workers that have ended included."""
        own = (self.proc / "stat").read_text().rpartition(")")[2].split()
        return sum(map(int, own[11:15])) / os.sysconf("SC_CLK_TCK")


async def _get(address: tuple[str, int], path: str) -> bytes:
    connection = Connection(*address)
    try:
        status, body = await connection.get(path)
    finally:
        connection.abort()
    if status != 200:
        raise Broken(f"{path} answered {status}")
    return body


@contextmanager
def served(
    name: str, command: Sequence[str], folder: Path, port: int, threads: int, ready: str = "/health"
) -> Iterator[Served]:
    """``command`` in a process of its own, once it answers at ``port``; ended with SIGTERM."""
    log = folder / f"{name}.log"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
    made = Served(name, process, ("127.0.0.1", port), log)
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            time.sleep(0.25)
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{name} did not start:\n{log.read_text()[-3000:]}")
            try:
                made.get(ready)
                break
            except (OSError, Broken):
                continue
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def mirada(name: str, folder: Path, threads: int, model: str = "mini") -> Any:
    """``mirada serve`` with small caches."""
    config = folder / "serve.yaml"
    config.write_text(json.dumps({"engine": ENGINE}))  # JSON is yaml
    port = free_port()
    command = [sys.executable, "-m", "mirada.cli", "serve", "--model", model, "--port", str(port), "--config", str(config)]
    return served(name, command, folder, port, threads)


async def answers_alone(address: tuple[str, int], pool: Sequence[Case], fields: dict[str, Any]) -> list[Answer]:
    """Each case asked by itself."""
    connection, made = Connection(*address), []
    for case in pool:
        answer = await connection.ask(json.dumps(case.body | fields).encode())
        if answer.status != 200 or not answer.complete:
            sys.exit(f"alone, a {case.kind} got {answer.status}: {answer.error}")
        made.append(answer)
    connection.abort()
    return made


def judge(tally: Tally, reference: Served, pool: Sequence[Case], alone: Sequence[Answer], fields: dict[str, Any]) -> list[str]:
    """Sorts differing answers into ties, which are returned in words, and faults."""
    ties: list[str] = []
    known: dict[tuple[int, int], float] = {}
    for index, answer in tally.differing:
        right = alone[index]
        at = next((i for i, (a, b) in enumerate(zip(answer.tokens, right.tokens, strict=False)) if a != b), None)
        what = f"case {index} ({pool[index].kind})"
        if at is None:  # an end, or a text that is not that of its tokens
            tally.faults[f"{what}: {answer.text[:60]!r} ({answer.finish}) instead of {right.text[:60]!r} ({right.finish})"] += 1
            continue
        if (index, at) not in known:
            body = pool[index].body | fields | {"logprobs": True, "top_logprobs": 2}
            known[index, at] = asyncio.run(_gap(reference.address, body, at))
        if known[index, at] < TIE:
            ties.append(f"{what}, token {at}: the two best are {known[index, at]:.1e} apart")
        else:
            tally.faults[f"{what}, token {at}: another one, though the two best are {known[index, at]:.1e} apart"] += 1
    return ties


async def _gap(address: tuple[str, int], body: dict[str, Any], at: int) -> float:
    """How far apart the two best are where token ``at`` is chosen, asked alone (a difference of logprobs is one of logits)."""
    connection = Connection(*address)
    answer = await connection.ask(json.dumps(body).encode())
    connection.abort()
    best, second = answer.whole["choices"][0]["logprobs"]["content"][at]["top_logprobs"]
    return best["logprob"] - second["logprob"]


class Recorder:
    """A row a second: time, memory, what ended."""

    def __init__(self, server: Served, tally: Tally) -> None:
        self.server, self.tally = server, tally
        self.rows: list[dict[str, float]] = []
        self._began = time.monotonic()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self.sample()
            await asyncio.sleep(1.0)

    def sample(self) -> None:
        tally = self.tally
        counts = {"ended": sum(tally.ended.values()), "pending": tally.num_pending, "tokens": tally.num_tokens}
        self.rows.append({"seconds": round(time.monotonic() - self._began, 1), **self.server.sample(), **counts})

    @property
    def memory(self) -> soak.Memory:
        return soak.Memory.of(self.rows)

    def write(self, file: Path) -> None:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, self.rows[-1])
            writer.writeheader()
            writer.writerows(self.rows)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    pressure = harness.require_quiet(options.anyway or options.smoke)
    with tempfile.TemporaryDirectory(prefix="mirada-load-") as name:
        status = load(options, Path(name))
        if options.peer_python and not options.smoke:
            compare(options, Path(name))
    if pressure > harness.BUSY:
        print(f"Other programs were busy (CPU pressure {pressure:.0f} %): the times are not to be quoted.")
    return status


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--cases", type=int, default=180, help="questions whose answers are known")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=120, help="seconds after which a request counts as lost")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the server's products")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter that has transformers' server (see README.md)")
    parser.add_argument("--peer-minutes", type=float, default=1, help="of each side in each pair")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer beside the peer")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mirada-benchmarks",
                        help="where made checkpoints are kept")  # fmt: skip
    parser.add_argument("--anyway", action="store_true", help="measure although other programs are busy")
    parser.add_argument("--smoke", action="store_true", help="a few seconds; memory is not judged, answers are")
    options = parser.parse_args(argv)
    if options.smoke:
        options.minutes, options.clients, options.cases = 0.05, 8, 12
    return options


def load(options: argparse.Namespace, folder: Path) -> int:
    """The load on mini; prints, and returns the exit status."""
    pool, fields = cases(options.cases, options.seed), {"model": "mini", "return_token_ids": True}
    with mirada("alone", folder, options.threads) as reference:
        began = time.monotonic()
        alone = asyncio.run(answers_alone(reference.address, pool, fields))
        print(f"{len(pool)} answers alone in {time.monotonic() - began:.0f} s", flush=True)
        with nullcontext(reference) if options.smoke else mirada("loaded", folder, options.threads) as server:
            crowd = Crowd(server.address, pool, fields, options, alone)
            recorder = Recorder(server, crowd.tally)
            before, own = server.cpu(), time.process_time()
            took = asyncio.run(_watched(crowd, recorder, options.minutes * 60))
            busy = server.cpu() - before, time.process_time() - own
            figures = settled(server, crowd.tally)
            recorder.sample()
        ties = judge(crowd.tally, reference, pool, alone, fields)
        if "Traceback" in (log := server.log.read_text()) or '"defect"' in log:
            crowd.tally.faults["the server's log tells of a defect: " + log[max(0, log.find("raceback") - 200) :][:2000]] += 1
        if server.process.returncode:
            crowd.tally.faults[f"the server ended with status {server.process.returncode}"] += 1
    if options.csv:
        recorder.write(options.csv)
    return report(options, crowd.tally, recorder, figures, ties, took, busy)


async def _watched(crowd: Crowd, recorder: Recorder, seconds: float) -> float:
    watching = asyncio.create_task(recorder.run())
    try:
        return await crowd.run(seconds)
    finally:
        watching.cancel()


def settled(server: Served, tally: Tally, seconds: float = 15.0) -> dict[str, float]:
    """Figures of the server once nothing is under way any more; what does not end is a fault."""
    names = ("requests_under_way", "engine_running", "engine_waiting", "engine_preparing", "engine_prepared_bytes")
    end = time.monotonic() + seconds
    while True:
        figures = {name.removeprefix("mirada_"): value for name, value in server.figures().items()}
        held = [f"{name} is {figures[name]:g}" for name in names if figures[name]]
        if not held or time.monotonic() > end:
            break
        time.sleep(0.25)
    for words in held:
        tally.faults[f"after the last client, {words}"] += 1
    return figures


def compare(options: argparse.Namespace, folder: Path) -> None:
    """The same load on both servers in turn, ratios printed."""
    python = harness.peer_python(options, ("transformers", "fastapi", "uvicorn", "openai"))
    made = throughput.make(argparse.Namespace(smoke=False, folder=options.folder))
    pool = [case for case in cases(options.cases, options.seed + 1) if case.kind != "video"]
    both = {
        "mirada": (mirada("ours", folder, options.threads, f"made={made}"),
                   {"model": "made", "max_tokens": options.new, "ignore_eos": True, "max_repeats": 1000}),
        "transformers": (peer(python, made, folder, options.threads),
                         {"model": str(made), "max_tokens": options.new, "generation_config": json.dumps(ENDLESS)}),
    }  # fmt: skip
    sides: dict[str, list[dict[str, float]]] = {name: [] for name in both}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(context) for name, (context, _) in both.items()}
        for name, (_, fields) in both.items():  # first touch, and a peer that cannot do it says so
            answer = asyncio.run(_first(servers[name].address, [case.body | fields for case in pool[:3]]))
            if answer.status != 200 or answer.usage.get("completion_tokens") != options.new:
                print(f"{name} cannot run this load: {answer.status} {answer.usage} {answer.error}")
                print(servers[name].log.read_text()[-1500:])
                return
        for pair in range(options.pairs):
            for name, (_, fields) in both.items():
                sides[name].append(one_side(options, servers[name], pool, fields, pair))
    print(f"\n{options.clients} clients, text and pictures, {options.new} tokens each, {options.pairs} pairs of "
          f"{options.peer_minutes:g} minutes, float32, {options.threads} thread(s); medians")  # fmt: skip
    print(f"  {'':22}{'mirada':>12}{'transformers':>14}{'ratio':>8}")
    for figure, better in (
        ("tokens/s", "more"),
        ("whole answers/s", "more"),
        ("first token p50", "less"),
        ("first token p95", "less"),
    ):
        ours, theirs = ([side[figure] for side in sides[name]] for name in both)
        ratios = [
            (a / b if better == "more" else b / a) if a and b else float("nan") for a, b in zip(ours, theirs, strict=True)
        ]
        print(f"  {figure:22}{statistics.median(ours):12.2f}{statistics.median(theirs):14.2f}{statistics.median(ratios):8.2f}")
    for name, figures in sides.items():
        faults = sum((Counter(side["faults"]) for side in figures), Counter())
        for words, count in faults.most_common(5):
            print(f"  {name}: {words} ({count} times)")


ENDLESS = {"do_sample": False, "eos_token_id": None}
"""transformers' settings of generation for an answer that does not end before its last token."""
PEER_KINDS = {"text": 43, "picture": 43, "cut": 14}


async def _first(address: tuple[str, int], bodies: Sequence[dict[str, Any]]) -> Answer:
    """The last of some whole answers, or the first that is none."""
    connection, answer = Connection(*address), Answer()
    for body in bodies:
        answer = await connection.ask(json.dumps(body).encode())
        if answer.status != 200:
            break
    connection.abort()
    return answer


def one_side(
    options: argparse.Namespace, server: Served, pool: Sequence[Case], fields: dict[str, Any], pair: int
) -> dict[str, Any]:
    """One turn: what is under way at its end is cut, and only what became whole within it counts."""
    own = argparse.Namespace(**vars(options) | {"seed": options.seed + pair, "patience": 600})
    crowd = Crowd(server.address, pool, fields, own, kinds=PEER_KINDS)
    took = asyncio.run(crowd.run(options.peer_minutes * 60, finish=False))
    time.sleep(harness.PAUSE)
    tally = crowd.tally
    first = [one for times in tally.first.values() for one in times]
    whole = sum(count for kind, count in tally.ended.items() if kind.startswith(("text", "picture")))
    return {"tokens/s": tally.num_tokens / took, "whole answers/s": whole / took, "first token p50": _share(first, 50),
            "first token p95": _share(first, 95), "faults": tally.faults}  # fmt: skip


def peer(python: str, model: Path, folder: Path, threads: int) -> Any:
    """``transformers serve`` in float32, pinned to the one model."""
    port = free_port()
    words = [str(model), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    return served("transformers", [python, str(harness.HERE / "peer_serve.py"), *words], folder, port, threads)


def report(
    options: argparse.Namespace, tally: Tally, recorder: Recorder, figures: dict[str, float], ties: list[str], took: float,
    busy: tuple[float, float],
) -> int:  # fmt: skip
    requests = sum(tally.ended.values())
    memory = recorder.memory
    first = [one for times in tally.first.values() for one in times]
    print(f"{options.clients} clients, {took:.0f} s, seed {options.seed}, {options.threads} thread(s)")
    print(f"  {requests} requests ({requests / took:.1f}/s), {tally.num_tokens} tokens in whole answers "
          f"({tally.num_tokens / took:.0f}/s)")  # fmt: skip
    for kind, count in sorted(tally.ended.items()):
        print(f"  {kind:24}{count:8}")
    print(f"  refused as busy: {tally.ended['429']} times 429, {tally.ended['503']} times 503")
    print(f"  {tally.num_equal} answers are those computed alone, {len(ties)} turned off at a tie")
    for kind, times in (*sorted(tally.first.items()), ("all", first)):
        print(f"  first token, {kind:10} p50 {_share(times, 50):.3f} s, p95 {_share(times, 95):.3f} s")
    print(f"  between tokens          p50 {_share(tally.gaps, 50):.3f} s, p95 {_share(tally.gaps, 95):.3f} s")
    for name in ("pixel", "encoder", "prefix"):
        hits, misses = figures[f"engine_{name}_cache_hits_total"], figures[f"engine_{name}_cache_misses_total"]
        print(f"  {name} cache: {hits / max(1, hits + misses):.0%} of look-ups hit")
    print(f"  {memory}; threads {recorder.rows[-1]['threads']}, files {recorder.rows[-1]['files']} at the end")
    print(f"  processor: server {busy[0] / took:.2f} of a core, clients {busy[1] / took:.2f}")
    for words in ties[:10]:
        print(f"TIE: {words}")
    for words, count in tally.faults.most_common(20):
        print(f"FAULT: {words}" + (f" ({count} times)" if count > 1 else ""))
    grown = [] if options.smoke else memory.faults
    for words in grown:
        print(f"GROWN: {words}")
    if options.json:
        made = {"seconds": took, "requests": requests, "tokens": tally.num_tokens, "ended": tally.ended, "ties": ties,
                "faults": tally.faults, "first_p50": _share(first, 50), "first_p95": _share(first, 95),
                "gap_p50": _share(tally.gaps, 50), "gap_p95": _share(tally.gaps, 95), "rss_start_mb": memory.start,
                "rss_end_mb": memory.end, "rss_slope_mb_per_minute": memory.slope, "server_cpu": busy[0],
                "clients_cpu": busy[1]}  # fmt: skip
        options.json.write_text(json.dumps(made, indent=1) + "\n")
    return int(bool(tally.faults) or bool(grown))


def _share(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else sum(values)


if __name__ == "__main__":
    sys.exit(main())
