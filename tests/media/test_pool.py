"""Processes that prepare large media: they give what is made here, and when one dies or hangs nobody else notices."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import clips
import numpy as np
import pytest
from PIL import Image as pil

from mirada.errors import MediaDecodeError, MediaError, MediaTimeout, RequestFailed, SettingsError
from mirada.media import pool as pool_module
from mirada.media import task as task_module
from mirada.media import wire
from mirada.media.cache import PixelCache
from mirada.media.grid import Patches
from mirada.media.limits import FetchLimits
from mirada.media.pool import Cancel, Pool
from mirada.media.prepare import prepare, prepare_many
from mirada.media.rule import KEYE_15, KEYE_671B, KEYE_PREVIEW, KIMI, QWEN2_VL, QWEN2_VL_LATER
from mirada.media.times import Times
from mirada.types import Image, Video

RULES = (KEYE_PREVIEW, KEYE_15, KEYE_671B, KIMI, QWEN2_VL, QWEN2_VL_LATER)
LIMITS = FetchLimits()
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def png(seed: int, high: int = 60, wide: int = 90) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (high, wide, 3), dtype=np.uint8)
    pil.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(task_module, "LARGE_PIXELS", 0)


@pytest.fixture(scope="module")
def pool():
    made = Pool(1)
    yield made
    made.close()


@pytest.fixture
def fresh():
    made = Pool(1)
    yield made
    made.close()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pids, seconds: float = 10.0) -> bool:
    """Whether all processes end within ``seconds``."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


def same(one: Patches, other: Patches) -> bool:
    return replace(one, pixels=None) == replace(other, pixels=None) and np.array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize("rule", RULES)
def test_settings_survive_the_way(rule):
    limits = FetchLimits(bytes=7, seconds=1.5, file_root=Path("/tmp"))
    for part in (Image(None, max_pixels=9), Video(None, fps=2, video_start=0.1, min_frame_similarity=1 / 3)):
        for content in (b"abc", Path("/tmp/ä b.mp4")):
            head = wire.describe(part, content, rule, limits, 5, "it")
            body = content if isinstance(content, bytes) else b""
            assert wire.understand(head, body) == (replace(part, source=content), rule, limits, 5, "it")


@pytest.mark.parametrize("rule", [KEYE_PREVIEW, KIMI, QWEN2_VL])
def test_pictures_come_back_as_they_are_made_here(pool, rule):
    buffer = io.BytesIO()
    turned = pil.new("RGB", (40, 90), (9, 200, 40))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(buffer, "JPEG", exif=exif)
    parts = [Image(png(1)), Image(buffer.getvalue(), max_pixels=5000), Image(png(2, 300, 20))]
    times = Times()
    made = prepare_many(parts, rule, pool=pool, times=times)
    assert all(same(one, other) for one, other in zip(made, prepare_many(parts, rule), strict=True))
    assert any("upright" in note for note in made[1].notes)
    assert made[0].pixels.flags.writeable and set(times) == {"fetch", "decode_media", "prepare"}
    assert len(pool.pids) == 1


@linux
def test_a_worker_for_pictures_loads_no_torch(fresh):
    prepare_many([Image(png(1))], KEYE_PREVIEW, pool=fresh)
    assert "libtorch" not in Path(f"/proc/{fresh.pids[0]}/maps").read_text()


@pytest.mark.parametrize("rule", [KEYE_15, QWEN2_VL])
def test_videos_come_back_as_they_are_made_here(pool, rule, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clips.encode(12, rate=6))
    for source in (path, path.read_bytes(), path.as_uri()):
        made = prepare_many([Video(source, fps=2, video_end=1.5)], rule, pool=pool)[0]
        assert same(made, prepare(Video(source, fps=2, video_end=1.5), rule))
        assert made.kind == "video" and made.timestamps is not None
    # Frames that are open here stay here.
    before = pool.pids
    prepare_many([Video([np.zeros((56, 56, 3), np.uint8)] * 4)], rule, pool=Pool(0))
    assert pool.pids == before


def test_errors_are_the_same(pool):
    bad = (b"not a picture", png(1)[:200], b"%PDF-1.4 ....", b"GIF89a")
    for source in bad:
        for part in (Image(source), Video(source)):
            errors = []
            for way in (pool, None):
                with pytest.raises(MediaError) as caught:
                    prepare_many([Image(png(3)), part], QWEN2_VL, pool=way)
                problem = re.sub("0x[0-9a-f]+", "", caught.value.problem)  # addresses of objects
                errors.append((type(caught.value), problem, caught.value.fix))
            assert errors[0] == errors[1] and "2 of 2" in errors[0][1]
    with pytest.raises(SettingsError, match="fps"):
        prepare_many([Video(b"x", fps=-1)], QWEN2_VL, pool=pool)


def test_what_has_no_form_as_text_is_prepared_here(fresh):
    odd = replace(KEYE_PREVIEW, fast_ratio=np.float32(0.3))
    assert same(prepare_many([Image(png(1))], odd, pool=fresh)[0], prepare(Image(png(1)), KEYE_PREVIEW))
    assert fresh.pids == ()


def test_nothing_starts_for_small_pictures(fresh, monkeypatch):
    monkeypatch.setattr(task_module, "LARGE_PIXELS", 1 << 21)
    prepare_many([Image(png(1)), Image(png(2))], KEYE_PREVIEW, pool=fresh)
    assert fresh.pids == () and not fresh._state.lanes
    prepare_many([Image(png(3, 1450, 1450))], KEYE_PREVIEW, pool=fresh)
    assert len(fresh.pids) == 1


def stopped(pool: Pool) -> int:
    """The id of the one worker, which does nothing more from now on."""
    prepare_many([Image(png(0))], KEYE_PREVIEW, pool=pool)
    (pid,) = pool.pids
    os.kill(pid, signal.SIGSTOP)
    return pid


def killer(pool: Pool, times: int) -> threading.Thread:
    """Kills every worker of ``pool`` as soon as it is there, ``times`` of them."""

    def kill() -> None:
        killed: set[int] = set()
        deadline = time.monotonic() + 30
        while len(killed) < times and time.monotonic() < deadline:
            for pid in set(pool.pids) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.002)

    made = threading.Thread(target=kill, daemon=True)
    made.start()
    return made


def test_a_job_whose_worker_is_killed_is_done_by_a_fresh_one(fresh):
    pid = stopped(fresh)
    jobs = [fresh.submit(Image(None), png(i), KEYE_PREVIEW, LIMITS, None, f"picture {i}") for i in range(3)]
    threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()
    assert all(same(job.result(), prepare(Image(png(i)), KEYE_PREVIEW)) for i, job in enumerate(jobs))
    assert (fresh.num_lost, fresh.num_retried) == (1, 1) and fresh.pids != (pid,) and len(fresh.pids) == 1


def test_a_worker_that_was_killed_while_it_had_nothing_to_do_costs_nobody_anything(fresh):
    prepare_many([Image(png(0))], KEYE_PREVIEW, pool=fresh)
    os.kill(fresh.pids[0], signal.SIGKILL)
    assert same(prepare_many([Image(png(1))], KEYE_PREVIEW, pool=fresh)[0], prepare(Image(png(1)), KEYE_PREVIEW))
    assert (fresh.num_lost, fresh.num_retried) == (1, 1)


def test_what_kills_two_workers_fails_and_nothing_else_does(fresh):
    killing = killer(fresh, 2)
    jobs = [fresh.submit(Image(None), png(i), KEYE_PREVIEW, LIMITS, None, f"picture {i}") for i in range(3)]
    with pytest.raises(RequestFailed, match=r"picture 0 died \(killed by signal 9\), and so had the one before it"):
        jobs[0].result()
    killing.join()
    assert all(same(jobs[i].result(), prepare(Image(png(i)), KEYE_PREVIEW)) for i in (1, 2))
    assert (fresh.num_lost, fresh.num_retried) == (2, 1)


def test_a_cancelled_job_is_not_done_again(fresh):
    pid = stopped(fresh)
    job = fresh.submit(Image(None), png(1), KEYE_PREVIEW, LIMITS, None, "it")
    while job.process is None:
        time.sleep(0.005)
    job.cancel()  # which ends the worker
    with pytest.raises(RequestFailed, match="cancelled"):
        job.result()
    assert gone([pid]) and prepare_many([Image(png(2))], KEYE_PREVIEW, pool=fresh)
    assert (fresh.num_lost, fresh.num_retried) == (1, 0)


def test_workers_that_rest_are_gone_and_come_back(fresh):
    jobs = [fresh.submit(Image(None), png(i), KEYE_PREVIEW, LIMITS, None, str(i)) for i in range(3)]
    while not (pids := fresh.pids):
        time.sleep(0.005)
    fresh.rest()
    assert all(job.result().kind == "image" for job in jobs)  # they had done what there was
    assert gone(pids) and fresh.pids == () and not fresh._state.lanes
    assert prepare_many([Image(png(1))], KEYE_PREVIEW, pool=fresh) and fresh.pids not in ((), pids)


def test_a_hanging_worker_is_ended(fresh, monkeypatch):
    pid = stopped(fresh)
    monkeypatch.setattr(pool_module, "PICTURE_SECONDS", 0.1)
    monkeypatch.setattr(pool_module, "GRACE", 0.1)
    job = fresh.submit(Image(None), png(1), KEYE_PREVIEW, LIMITS, None, "'slow.png'")
    with pytest.raises(MediaTimeout, match=r"slow\.png.*0\.1 seconds"):
        job.result()
    assert gone([pid])
    monkeypatch.undo()
    assert prepare_many([Image(png(1))], KEYE_PREVIEW, pool=fresh)


def test_cancelling(fresh):
    pid = stopped(fresh)
    cancel = Cancel()
    jobs = [fresh.submit(Image(None), png(i), KEYE_PREVIEW, LIMITS, None, str(i)) for i in range(3)]
    cancel.add(jobs[0])
    cancel.add(jobs[1])
    cancel.now()
    for job in jobs[:2]:  # one was at the worker or about to be, one in line
        with pytest.raises(RequestFailed, match="cancelled"):
            job.result()
    if alive(pid):  # the job had not come to the worker yet
        os.kill(pid, signal.SIGCONT)
    assert jobs[2].result().kind == "image"
    late = fresh.submit(Image(None), png(9), KEYE_PREVIEW, LIMITS, None, "9")
    cancel.add(late)
    with pytest.raises(RequestFailed, match="cancelled"):
        late.result()
    jobs[2].cancel()  # nothing happens to one that is done
    assert jobs[2].result().kind == "image"


@linux
def test_closing_ends_everything(fresh):
    pid = stopped(fresh)
    jobs = [fresh.submit(Image(None), png(i), KEYE_PREVIEW, LIMITS, None, str(i)) for i in range(2)]
    fresh.close()
    assert gone([pid]) and fresh.pids == ()
    for job in jobs:
        with pytest.raises(RequestFailed):
            job.result()
    with pytest.raises(RequestFailed, match="closed"):
        fresh.submit(Image(None), png(1), KEYE_PREVIEW, LIMITS, None, "1")
    assert not [lane for lane in fresh._state.lanes if lane.is_alive()]


def test_a_worker_ends_by_itself_when_nobody_is_there_to_ask():
    state = pool_module._State()
    worker = pool_module._Worker(state)
    worker._socket.close()
    assert worker._process.wait(20) == 0


@linux
def test_a_pool_that_is_let_go_ends_its_workers():
    made = Pool(1)
    prepare_many([Image(png(1))], KEYE_PREVIEW, pool=made)
    pids = made.pids
    del made
    assert gone(pids)


@linux
@pytest.mark.parametrize("at_work", [False, True])
def test_workers_end_with_a_killed_parent(at_work, tmp_path):
    """And a program without a guard around its main part is no trouble, for it is not run again."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, threading, time\n"
        "from mirada.media.pool import Pool\n"
        "from mirada.media import prepare, task\n"
        "from mirada.types import Image\n"
        "from mirada.media.rule import KEYE_PREVIEW\n"
        "task.LARGE_PIXELS = 0\n"
        "pool, data = Pool(1), open(sys.argv[1], 'rb').read()\n"
        "prepare.prepare_many([Image(data)], KEYE_PREVIEW, pool=pool)\n"
        f"if {at_work}:\n"
        "    os.kill(pool.pids[0], signal.SIGSTOP)\n"
        "    threading.Thread(target=prepare.prepare_many, args=([Image(data)], KEYE_PREVIEW), kwargs={'pool': pool}).start()\n"
        "print(*pool.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "a.png").write_bytes(png(1))
    parent = subprocess.Popen([sys.executable, str(program), str(tmp_path / "a.png")], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 1 and alive(pids[0])
        parent.kill()
        parent.wait()
        assert gone(pids)


@linux
def test_nothing_is_left_in_memory_or_open():
    def left() -> tuple[set[str], int]:
        return set(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))

    before = left()
    made = Pool(1)
    kept = [prepare_many([Image(png(i))], KEYE_PREVIEW, pool=made)[0] for i in range(5)]
    os.kill(made.pids[0], signal.SIGKILL)
    killing = killer(made, 2)
    with pytest.raises(RequestFailed):
        made.submit(Image(None), png(1), KEYE_PREVIEW, LIMITS, None, "it").result()
    killing.join()
    made.close()
    assert left() == before and len(kept) == 5


def test_answers_that_make_no_sense_are_refused():
    def told(write) -> Exception:
        here, there = socket.socketpair()
        with here, there:
            write(there)
            there.shutdown(socket.SHUT_WR)
            with pytest.raises((ValueError, EOFError)) as caught:
                wire.receive_pixels(here, time.monotonic() + 5)
            return caught.value

    shape = {"patches": {"shape": [4, 3]}}
    assert "another size" in str(told(lambda link: wire.send_pixels(link, shape, np.zeros(11, np.uint8))))
    assert "without" in str(told(lambda link: wire.send_pixels(link, {}, np.zeros(12, np.uint8))))
    assert "bytes" in str(told(lambda link: link.sendall(wire._HEAD.pack(1 << 30, 0))))
    assert isinstance(told(lambda link: link.sendall(b"\1\2")), EOFError)
    assert isinstance(told(lambda link: None), EOFError)
    assert isinstance(told(lambda link: link.sendall(wire._HEAD.pack(3, 0) + b"{]}")), ValueError)
    assert isinstance(told(lambda link: link.sendall(wire._HEAD.pack(2, 0) + b"[]")), ValueError)


def test_one_content_is_prepared_once(pool, monkeypatch):
    """Several at once wait for the first, and take over should it fail."""
    cache, count = PixelCache(1 << 20), []
    original = Pool.submit
    monkeypatch.setattr(Pool, "submit", lambda self, *rest: count.append(rest[0]) or original(self, *rest))
    made: list[Patches] = []
    threads = [
        threading.Thread(target=lambda: made.extend(prepare_many([Image(png(5))] * 2, KEYE_PREVIEW, cache=cache, pool=pool)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and len(count) == 1 and len({id(one.pixels) for one in made}) == 1
    broken = png(6)[:300]
    for _ in range(2):
        with pytest.raises(MediaDecodeError):
            prepare_many([Image(broken)] * 2, KEYE_PREVIEW, cache=cache, pool=pool)
    assert not cache._claims


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, monkeypatch):
    path, cache = tmp_path / "clip.mp4", PixelCache(1 << 24)
    first, second = clips.encode(8, rate=4), clips.encode([255 - clips.numbered(i) for i in range(8)], rate=4)
    path.write_bytes(first)
    original = task_module._film

    def film(part, *rest):
        path.write_bytes(second)
        return original(part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(task_module, "_film", film)
        changed = prepare(Video(path), QWEN2_VL, cache=cache)
    path.write_bytes(first)
    assert not same(prepare(Video(path), QWEN2_VL, cache=cache), changed)
    assert cache.hits == 0 and len(cache) == 1


def test_times_of_inner_stages_do_not_count_twice():
    times = Times()
    with times.stage("outer"):
        time.sleep(0.02)
        for _ in times.each("inner", iter([1, 2])):
            time.sleep(0.01)
        with times.stage("inner"):
            time.sleep(0.05)
    assert 0.04 <= times["outer"] < 0.05 + 0.04 and 0.05 <= times["inner"] < 0.1
    assert times._inner == [pytest.approx(times["outer"] + times["inner"])]


def test_a_pool_may_be_collected_in_a_thread_that_holds_its_lock():
    """As the garbage collector may do; waiting there for a worker's thread, which needs the lock, would be for ever."""
    made = Pool(1)
    lane = threading.Thread(target=pool_module._drive, args=(made._state,), daemon=True)
    made._state.lanes.append(lane)

    def collect() -> None:
        with made._state.changed:
            lane.start()
            made._closer()

    collector = threading.Thread(target=collect, daemon=True)
    collector.start()
    for thread in (collector, lane):
        thread.join(10)
        assert not thread.is_alive()
