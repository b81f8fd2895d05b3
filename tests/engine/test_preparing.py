"""Media are prepared beside the engine: nobody who submits waits, what fails or is cancelled ends alone, memory is bounded."""

from __future__ import annotations

import gc
import io
import os
import signal
import threading
import time

import clips
import numpy as np
import pytest
from media.test_pool import gone, killer, png

from mirada import VLM, Image, Message, Sampling, Text, Video
from mirada.engine import prepare as preparing
from mirada.engine import request
from mirada.engine.prepare import most_bytes
from mirada.engine.scheduler import Scheduler
from mirada.engine.sequence import Sequence
from mirada.errors import MediaDecodeError, MediaNotFound, QueueFull, RequestFailed
from mirada.media import task as media_task
from mirada.media.rule import KEYE_15, QWEN2_VL
from mirada.types import Prompt

SHORT = Sampling(max_tokens=3, ignore_eos=True)
STAGES = {"queue", "fetch", "decode_media", "prepare", "render", "encode", "prefill", "decode", "first_token", "total"}


def ask(*media, text: str = "?") -> list[Message]:
    return [Message("user", (*media, Text(text)))]


@pytest.fixture
def opened(tiny_directories):
    """Opens engines over the tiny Qwen2-VL with settings of their own, and closes them."""
    made: list[VLM] = []

    def open_one(**settings) -> VLM:
        made.append(VLM(tiny_directories["qwen2_vl"], device="cpu", engine={"workers": 0, **settings}))
        return made[-1]

    yield open_one
    for vlm in made:
        vlm.close()


@pytest.fixture
def gate(monkeypatch):
    """Preparation of pictures named in ``gate.held`` waits for ``gate.open``; ``gate.began`` says which have begun. Nothing
    ends it early, so what is cancelled meanwhile becomes whole all the same."""

    class Gate:
        open, held, began = threading.Event(), set(), []

    original = request.prepare_many

    def prepare_many(parts, *rest, **more):
        name = parts[0].source if parts else None
        Gate.began += [name] if parts else []
        if name in Gate.held:
            assert Gate.open.wait(30)
        return original(
            [Image(png(1)) if isinstance(part.source, str) else part for part in parts], *rest, **more | {"cancel": None}
        )

    Gate.open.clear()
    Gate.held.clear()
    Gate.began.clear()
    monkeypatch.setattr(request, "prepare_many", prepare_many)
    yield Gate
    Gate.open.set()


def until(said, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def test_nobody_waits_for_another_ones_media(opened, gate):
    vlm = opened()
    gate.held.add("slow")
    slow = vlm.submit(ask(Image("slow")), SHORT)
    assert not slow.done and vlm.stats()["preparing"] == 1
    assert vlm.submit(ask(Image("quick")), SHORT).result(60).error is None
    assert vlm.submit(ask(), SHORT).result(60).error is None
    assert not slow.done
    gate.open.set()
    output = slow.result(60)
    assert output.error is None and len(output.tokens) == 3
    assert vlm.stats()["preparing"] == 0 and vlm.stats()["prepared_bytes"] == 0


def test_the_line_is_by_arrival():
    line = Scheduler.__new__(Scheduler)
    line.waiting = preparing.deque()
    made = [Sequence(Prompt(()), Sampling(), None, born=float(i)) for i in range(6)]
    for i in (1, 3, 0, 5, 2, 4):
        line.enter(made[i])
    assert list(line.waiting) == made
    preempted = Sequence(Prompt(()), Sampling(), None, born=9.0, preemptions=1)
    line.waiting.appendleft(preempted)
    first = Sequence(Prompt(()), Sampling(), None, born=-1.0)
    line.enter(first)
    assert list(line.waiting) == [preempted, first, *made]


def test_frames_are_let_go_of_where_errors_are_each_others_cause():
    made = []
    for problem in ("one", "two"):
        try:
            raise RequestFailed(problem)
        except RequestFailed as error:
            made.append(error)
    made[0].__cause__, made[1].__cause__ = made[1], made[0]
    assert preparing._without_frames(made[0]) is made[0]
    assert [error.__traceback__ for error in made] == [None, None]


def test_one_that_waits_and_cannot_be_cancelled_fails_alone():
    class Broken:
        def close(self):
            raise ZeroDivisionError("planted")

    line = Scheduler.__new__(Scheduler)
    bad, good, cancelled = (Sequence(Prompt(()), Sampling(), reply) for reply in (Broken(), None, None))
    line.running, line.waiting = [], preparing.deque((bad, good, cancelled))
    bad.cancelled = cancelled.cancelled = True
    line.reap()
    assert list(line.waiting) == [good] and cancelled.finish == "cancelled"
    assert isinstance(bad.error, RequestFailed) and "planted" in bad.error.problem


def test_cancelling_what_is_not_ready(opened, gate):
    others = set(threading.enumerate())
    vlm = opened()
    names = [f"slow{i}" for i in range(preparing.THREADS + 3)]
    gate.held.update(names)
    handles = [vlm.submit(ask(Image(name)), SHORT) for name in names]
    until(lambda: len(gate.began) == preparing.THREADS)
    fresh = set(threading.enumerate()) - others
    assert len([one for one in fresh if one.name == "mirada-prepare"]) == preparing.THREADS
    handles[-1].cancel()  # in line: ends at once
    assert handles[-1].result(10).finish == "cancelled"
    handles[0].cancel()  # at the gate: ends when that opens
    del handles[-2]  # nobody will read it
    gc.collect()
    gate.open.set()
    assert handles[0].result(60).finish == "cancelled"
    assert all(handle.result(60).error is None for handle in handles[1:-1])
    until(lambda: vlm.stats()["preparing"] == 0)
    assert names[-1] not in gate.began and names[-2] not in gate.began
    assert vlm.stats()["prepared_bytes"] == 0 and vlm._engine.wait_idle(10)


def test_media_from_other_machines_hold_up_nobody(opened, gate, monkeypatch):
    """More of them than may be under way at once hang; what is here passes, and they come to no harm."""
    monkeypatch.setattr(preparing, "FETCHING", 10)
    vlm = opened()
    names = [f"http://other/{i}.png" for i in range(preparing.FETCHING + 2)]
    gate.held.update(names)
    handles = [vlm.submit(ask(Image(name)), SHORT) for name in names]
    until(lambda: len(gate.began) == preparing.FETCHING)
    for i in range(3):
        assert vlm.submit(ask(Image(f"quick{i}")), SHORT).result(60).error is None
    assert not set(names[preparing.FETCHING :]) & set(gate.began) and not any(handle.done for handle in handles)
    gate.open.set()
    assert all(handle.result(60).error is None for handle in handles)
    assert vlm.stats()["preparing"] == 0 and vlm.stats()["prepared_bytes"] == 0


def test_media_from_other_machines_take_half_of_the_room(opened, gate):
    size = most_bytes([Image(b"")], QWEN2_VL.bounded(max_pixels=100352))
    vlm = opened(prepared_bytes=4 * size)
    names = [f"https://other/{i}.png" for i in range(4)]
    gate.held.update(names)
    handles = [vlm.submit(ask(Image(name)), SHORT) for name in names]
    until(lambda: len(gate.began) == 2)
    assert vlm.submit(ask(Image("quick")), SHORT).result(60).error is None
    assert gate.began == [*names[:2], "quick"]
    gate.open.set()
    assert all(handle.result(60).error is None for handle in handles)


def test_which_media_lie_on_other_machines():
    for source, remote in (
        ("http://a/b", True), ("HTTPS://a/b", True), ("httpx.png", False), (b"http://", False),
        ("data:image/png;base64,aHR0cA==", False),
        (["a.png", "http://a/b"], True),
    ):  # fmt: skip
        assert preparing.are_remote([Video(source) if isinstance(source, list) else Image(source)]) == remote


def test_what_is_prepared_counts_as_waiting(opened, gate):
    vlm = opened(max_waiting=2)
    gate.held.update(("a", "b"))
    handles = [vlm.submit(ask(Image(name)), SHORT) for name in ("a", "b", "c")]
    assert isinstance(handles[2].result(10).error, QueueFull)
    assert isinstance(vlm.submit(ask(), SHORT).result(10).error, QueueFull)
    assert not vlm._engine.wait_idle(0.05)
    gate.open.set()
    assert [handle.result(60).error for handle in handles[:2]] == [None, None]
    assert vlm.submit(ask(), SHORT).result(60).error is None


def test_closing_while_media_are_prepared(opened, gate):
    vlm = opened()
    gate.held.add("slow")
    handle = vlm.submit(ask(Image("slow")), SHORT)
    until(lambda: gate.began)
    vlm.close()
    gate.open.set()
    assert isinstance(handle.result(20).error, RequestFailed) and "closed" in str(handle.result().error)
    assert isinstance(vlm.submit(ask(Image("late")), SHORT).result(10).error, RequestFailed)


def test_bytes_of_prepared_pixels_are_bounded(opened, gate, monkeypatch):
    """As many are prepared as there is room for, one always; and what is held is what lies in memory."""
    vlm = opened(prepared_bytes=2 * most_bytes([Image(b"")], QWEN2_VL.bounded(max_pixels=100352)) + 1)
    names = [f"p{i}" for i in range(6)]
    gate.held.update(names)
    handles = [vlm.submit(ask(Image(name)), SHORT) for name in names]
    until(lambda: len(gate.began) == 2)
    time.sleep(0.1)
    assert len(gate.began) == 2 and vlm.stats()["prepared_bytes"] < vlm._engine.engine.settings.prepared_bytes
    gate.open.set()
    assert all(handle.result(60).error is None for handle in handles)
    assert vlm.stats()["prepared_bytes"] == 0
    tight = opened(prepared_bytes=1)
    assert all(output.error is None for output in tight.generate([ask(Image(png(i))) for i in range(3)], SHORT))


def test_a_defect_in_preparation_is_a_typed_error(opened, monkeypatch, caplog):
    vlm = opened()
    for thrown in (ZeroDivisionError("x"), MemoryError()):

        def fail(*_, thrown=thrown, **__):
            raise thrown

        with monkeypatch.context() as patch:
            patch.setattr(request, "prepare_many", fail)
            error = vlm.submit(ask(Image(png(1))), SHORT).result(20).error
        assert type(error).__name__ == ("OutOfMemory" if isinstance(thrown, MemoryError) else "RequestFailed")
        while error is not None:  # frames would live for as long as the reply
            assert error.__traceback__ is None
            error = error.__cause__ or error.__context__
    assert "in fail" in caplog.text  # where the defect lies
    assert vlm.submit(ask(Image(png(1))), SHORT).result(60).error is None


def test_one_that_cannot_be_ended_keeps_nobody_from_being_ended(opened, caplog):
    def fail():
        raise ZeroDivisionError("planted")

    ended, vlm = threading.Event(), opened()
    watch = vlm._preparing.watch
    first, second = (Sequence(Prompt(()), Sampling(), None) for _ in range(2))
    watch(first, fail)
    watch(second, ended.set)
    first.stop()
    second.stop()
    assert ended.wait(20) and "planted" in caplog.text


def test_estimates():
    assert most_bytes([Image(b""), Image(b"", max_pixels=1000)], QWEN2_VL) == 6 * (1 << 21) + 6000
    assert most_bytes([Video(b"")], KEYE_15) == 3 * KEYE_15.total_pixels


def test_stages_and_notes_reach_the_caller(opened):
    from PIL import Image as pil

    vlm = opened()
    buffer = io.BytesIO()
    turned = pil.new("RGB", (60, 120), (9, 200, 40))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(buffer, "JPEG", exif=exif)
    output = vlm.submit(ask(Image(buffer.getvalue()), Video(clips.encode(8, rate=4))), SHORT).result(60)
    assert output.error is None and set(output.metrics) == STAGES
    assert all(seconds >= 0 for seconds in output.metrics.values())
    assert sum(output.metrics[name] for name in ("fetch", "decode_media", "prepare", "render")) <= output.metrics["total"]
    assert output.notes[0].startswith("picture or video 1 of 2: turned upright")
    one = vlm.submit(ask(Image(buffer.getvalue())), SHORT).result(60)
    assert one.notes[0].startswith("turned upright")
    text = vlm.submit(ask(), SHORT).result(60)
    assert text.notes == () and not {"fetch", "decode_media", "encode"} & set(text.metrics)
    failed = vlm.submit(ask(Image(b"no picture")), SHORT).result(60)
    assert isinstance(failed.error, MediaDecodeError) and {"queue", "decode_media", "total"} <= set(failed.metrics)


def test_workers_in_the_engine(opened, monkeypatch):
    """Forty requests of all kinds, a bad file among them and a worker killed: the bad one fails, and nothing else."""
    monkeypatch.setattr(media_task, "LARGE_PIXELS", 70 * 90)
    plain, vlm = opened(), opened(workers=1)
    kinds = [
        lambda i: ask(text=f"number {i}"),
        lambda i: ask(Image(png(i)), text="small"),
        lambda i: ask(Image(png(i, 80, 100)), text="large"),
        lambda i: ask(Image(np.full((60, 60, 3), i, np.uint8)), Image(png(i, 90, 90)), text="both"),
    ]
    chats = [kinds[i % 4](i) for i in range(40)]
    chats[5] = ask(Image("/nowhere.png"))
    expected = plain.generate(chats, SHORT)
    assert vlm.submit(ask(Image(png(99, 80, 100))), SHORT).result(60).error is None
    (pid,) = vlm._pool.pids
    os.kill(pid, signal.SIGSTOP)
    killed = vlm.submit(ask(Image(png(98, 80, 100))), SHORT)
    until(
        lambda: (
            any(lane.is_alive() for lane in vlm._pool._state.lanes) and not vlm._pool._state.line and vlm.stats()["preparing"]
        )
    )
    handles = [vlm.submit(chat, SHORT) for chat in chats]
    os.kill(pid, signal.SIGKILL)
    assert killed.result(60).tokens == plain.submit(ask(Image(png(98, 80, 100))), SHORT).result(60).tokens
    outputs = [handle.result(120) for handle in handles]
    assert isinstance(outputs[5].error, MediaNotFound)
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.tokens == wanted.tokens and type(output.error) is type(wanted.error)
    assert [vlm.stats()[name] for name in ("workers", "workers_lost", "media_retried")] == [1, 1, 1]
    pids = vlm._pool.pids
    vlm.close()
    assert gone(pids)


def test_a_picture_that_kills_two_workers_fails_its_request_by_name(opened, monkeypatch):
    monkeypatch.setattr(media_task, "LARGE_PIXELS", 70 * 90)
    vlm = opened(workers=1)
    killing = killer(vlm._pool, 2)
    handle = vlm.submit(ask(Image(png(1)), Image(png(2, 80, 100))), SHORT)
    error = handle.result(60).error
    killing.join()
    assert isinstance(error, RequestFailed) and "picture or video 2 of 2" in str(error) and "the one before it" in str(error)
    assert vlm.stats()["workers_lost"] == 2 and vlm.stats()["media_retried"] == 1
    assert vlm.submit(ask(Image(png(2, 80, 100))), SHORT).result(60).error is None


def test_cancelling_ends_the_worker_that_is_at_it(opened, monkeypatch):
    monkeypatch.setattr(media_task, "LARGE_PIXELS", 0)
    vlm = opened(workers=1)
    vlm.submit(ask(Image(png(1))), SHORT).result(60)
    (pid,) = vlm._pool.pids
    os.kill(pid, signal.SIGSTOP)
    handle = vlm.submit(ask(Image(png(2))), SHORT)
    state = vlm._pool._state
    until(lambda: vlm.stats()["preparing"] == 1 and state.lanes and not state.idle and not state.line)
    time.sleep(0.2)  # from the line to the worker
    handle.cancel()
    assert handle.result(20).finish == "cancelled" and gone([pid])
    assert vlm.submit(ask(Image(png(3))), SHORT).result(60).error is None


def test_pixels_are_found_by_content_alone(opened, tmp_path):
    vlm = opened()
    path = tmp_path / "a.png"

    def answer():
        return vlm.submit(ask(Image(path)), Sampling(max_tokens=6, ignore_eos=True)).result(60)

    path.write_bytes(png(1))
    first, again = answer(), answer()
    assert vlm.stats()["pixel_cache_hits"] == 1 and first.tokens == again.tokens
    path.write_bytes(png(2))
    other = answer()
    assert vlm.stats()["pixel_cache_hits"] == 1 and vlm.stats()["pixel_cache_misses"] == 2
    alone = opened(pixel_cache_bytes=0, encoder_cache_bytes=0, prefix_cache_bytes=0)
    assert other.tokens == alone.submit(ask(Image(png(2))), Sampling(max_tokens=6, ignore_eos=True)).result(60).tokens
    assert alone.stats()["pixel_cache_misses"] == alone.stats()["encoder_cache_misses"] == 0
