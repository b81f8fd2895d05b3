"""The engine's thread seen from outside: waiting, giving up, interrupts, closing, and the end of the interpreter."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

from mirada import VLM, Message, Sampling
from mirada.engine import thread as thread_module
from mirada.engine.sequence import Sequence
from mirada.engine.settings import EngineSettings
from mirada.errors import ContextOverflow, NotAvailable, QueueFull, ReplyTimeout, RequestFailed, SettingsError

HI = [Message("user", "hi")]
SHORT = Sampling(max_tokens=4, ignore_eos=True)
ENDLESS = Sampling(max_tokens=3000, ignore_eos=True, max_repeats=None)


@pytest.fixture(scope="module")
def tiny(engines):
    return engines["Keye"]


def another(tiny: VLM, **settings) -> VLM:
    return VLM.from_parts(tiny.parts.model, tiny.parts.renderer, tiny.parts.rule, engine=settings)


def until(what, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@pytest.fixture
def held(monkeypatch):
    """Stops the steps of an engine until it is told to go on."""
    gates = []

    def hold(vlm: VLM) -> threading.Event:
        gate, engine = threading.Event(), vlm._engine.engine
        step = engine.step

        def wait():
            assert gate.wait(20)
            step()

        monkeypatch.setattr(engine, "step", wait)
        gates.append(gate)
        return gate

    yield hold
    for gate in gates:
        gate.set()


def test_a_thread_that_dies_outside_of_a_step_tells_all_who_wait(tiny, held, caplog, monkeypatch):
    vlm = another(tiny)
    assert vlm.state() == "ready"  # before it has a thread too
    gate, scheduler = held(vlm), vlm._engine.engine.scheduler
    running = vlm.submit(HI, ENDLESS)
    until(lambda: vlm._engine.line._step_began is not None)
    monkeypatch.setattr(scheduler, "enter", lambda sequence: 1 / 0)
    waiting = vlm.submit(HI, SHORT)
    gate.set()
    for handle in (running, waiting):
        error = handle.result(20).error
        assert isinstance(error, RequestFailed) and "died" in str(error)
    until(lambda: vlm.state() == "died")
    assert "died" in str(vlm.submit(HI, SHORT).result(20).error)
    assert "ZeroDivisionError" in caplog.text
    vlm.close()
    assert vlm.state() == "closed"


def test_a_step_that_hangs_is_seen(tiny, held):
    vlm = another(tiny)
    gate = held(vlm)
    handle = vlm.submit(HI, SHORT)
    until(lambda: vlm.state(0.05) == "stalled")
    assert vlm.state(60) == "ready"
    gate.set()
    assert handle.result(20).error is None
    until(lambda: vlm.state(0.05) == "ready")
    vlm.close()


def test_a_reply_that_takes_too_long_goes_on(tiny, held):
    with another(tiny) as vlm:
        gate = held(vlm)
        handle = vlm.submit(HI, SHORT)
        with pytest.raises(ReplyTimeout, match=r"0\.01 s"):
            handle.result(timeout=0.01)
        assert issubclass(ReplyTimeout, TimeoutError)
        gate.set()
        assert len(handle.result(timeout=20).tokens) == 4


def test_the_line_has_an_end(tiny, held):
    with another(tiny, max_waiting=3, max_running=1) as vlm:
        gate = held(vlm)
        handles = [vlm.submit(HI, SHORT)]
        while vlm._engine.line._fresh:  # the thread takes it, and stops before its step
            time.sleep(0.001)
        handles += [vlm.submit(HI, SHORT) for _ in range(4)]
        error = handles[-1].result(0).error
        assert isinstance(error, QueueFull) and "max_waiting" in str(error) and (error.needed, error.available) == (4, 3)
        assert vlm.stats()["waiting"] == 3
        gate.set()
        assert [len(handle.result().tokens) for handle in handles[:-2]] == [4] * 3
        assert isinstance(handles[-2].result().error, QueueFull)


def test_an_interrupt_of_a_waiting_caller_leaves_the_engine_healthy(tiny, slowly):
    slowly(tiny)
    handle = tiny.submit(HI, ENDLESS)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        handle.result(60)
    timer.join()
    assert not handle.done
    handle.cancel()
    assert handle.result(20).finish == "cancelled"
    assert len(tiny.generate([HI], SHORT)[0].tokens) == 4


def test_async_readers_take_no_threads(tiny):
    before = threading.active_count()
    seen = []

    async def read(handle):
        deltas = []
        async for delta in handle:
            deltas.append(delta)
            seen.append(threading.active_count())
        return deltas

    async def main():
        handles = [tiny.submit(HI, SHORT) for _ in range(40)]
        return await asyncio.gather(*(read(handle) for handle in handles)), await tiny.submit(HI, SHORT)

    read_all, whole = asyncio.run(main())
    assert {tuple(token for delta in deltas for token in delta.tokens) for deltas in read_all} == {whole.tokens}
    assert max(seen) <= before + 1  # the engine's own


def test_an_async_reader_that_leaves_ends_its_request(tiny, slowly):
    slowly(tiny)

    async def main():
        handle = tiny.submit(HI, ENDLESS)
        async for _ in handle:
            break
        sequence = handle._reply
        del handle
        gc.collect()
        await asyncio.sleep(0)
        return sequence

    sequence = asyncio.run(main())
    assert tiny._engine.wait_idle(20) and sequence.finish == "cancelled"


def test_a_loop_that_is_closed_does_not_disturb_the_engine(tiny):
    async def main():
        handle = tiny.submit(HI, Sampling(max_tokens=200, ignore_eos=True, max_repeats=None))
        reading = handle.__aiter__()
        await reading.__anext__()
        return handle, reading

    loop = asyncio.new_event_loop()
    handle, reading = loop.run_until_complete(main())
    loop.close()
    assert len(handle.result(20).tokens) == 200
    del reading


def test_close_ends_what_runs(tiny, slowly):
    with another(tiny, max_running=1) as vlm:
        slowly(vlm)
        assert not any(
            thread.name == "mirada-engine" and thread is vlm._engine.line._thread for thread in threading.enumerate()
        )
        running, waiting = vlm.submit(HI, ENDLESS), vlm.submit(HI, ENDLESS)
        next(iter(running))
    for handle in (running, waiting):
        error = handle.result(0).error
        assert isinstance(error, RequestFailed) and "closed" in str(error)
    assert isinstance(vlm.submit(HI, SHORT).result(0).error, RequestFailed)
    assert vlm._engine.engine.runner.cache.bytes_held == 0
    assert not vlm._engine.line._thread.is_alive()
    vlm.close()


def test_an_engine_that_nobody_holds_ends(tiny):
    vlm = another(tiny)
    handle = vlm.submit(HI, ENDLESS)
    thread, gone = vlm._engine.line._thread, weakref.ref(vlm)
    stream = iter(handle)
    next(stream)
    del vlm
    gc.collect()
    assert gone() is None
    next(stream)  # a handle keeps its engine
    assert thread.is_alive()
    del stream, handle
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_what_is_not_used_is_given_back_when_nothing_comes(tiny, monkeypatch):
    trimmed, calls = threading.Event(), []
    monkeypatch.setattr(thread_module, "QUIET", 0.05)
    monkeypatch.setattr(thread_module.memory, "trim", lambda: (calls.append(time.monotonic()), trimmed.set()))
    with another(tiny) as vlm:
        assert len(vlm.generate([HI], SHORT)[0].tokens) == 4
        assert trimmed.wait(10) and vlm._engine.wait_idle(0)
        time.sleep(0.2)
        before = len(calls)
        time.sleep(0.3)
        assert len(calls) == before <= 2  # once (and once before the request, if that came late), until there was work again
        trimmed.clear()
        vlm.generate([HI], SHORT)
        assert trimmed.wait(10)


def test_a_request_that_failed_is_let_go(tiny):
    """Its error may know the frames that it passed, and those the handles of others that were asked with it."""

    def num_alive() -> int:
        gc.collect()
        return sum(type(one) is Sequence for one in gc.get_objects())

    def fail_somewhere() -> None:
        assert [output.finish for output in tiny.generate([HI, [], HI], SHORT)] == ["length", "error", "length"]
        handle = tiny.submit([Message("user", "z" * 9999)], SHORT)
        with contextlib.suppress(ContextOverflow):
            list(handle)

    before = num_alive()
    for _ in range(3):
        fail_somewhere()
    assert tiny._engine.wait_idle(10)
    assert num_alive() <= before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_a_fork_the_child_is_told(tiny):
    assert len(tiny.generate([HI], SHORT)[0].tokens) == 4
    read, write = os.pipe()
    child = os.fork()
    if not child:  # nothing but the request: this process has no engine thread
        try:
            error = tiny.submit(HI, SHORT).result(10).error
            tiny.close()
            os.write(write, b"told" if isinstance(error, NotAvailable) and "forked" in str(error) else repr(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == b"told"
    assert os.waitpid(child, 0)[1] == 0
    assert len(tiny.generate([HI], SHORT)[0].tokens) == 4


def test_the_interpreter_ends_in_the_middle_of_a_reply(tiny_directories):
    code = (
        "import sys; from mirada import VLM, Message, Sampling\n"
        "vlm = VLM(sys.argv[1], device='cpu')\n"
        "handle = vlm.submit([Message('user', 'hi')], Sampling(max_tokens=3000, ignore_eos=True, max_repeats=None))\n"
        "next(iter(handle)); print('begun')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_directories["Keye"])], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n", "")


def test_settings(tiny, tiny_directories):
    with pytest.raises(SettingsError, match=r"max_runing.*max_running"):
        VLM(tiny_directories["Keye"], device="cpu", engine={"max_runing": 3})
    with pytest.raises(SettingsError, match="max_length=99999"):
        another(tiny, max_length=99999)
    with VLM(tiny_directories["Keye"], device="cpu", engine=EngineSettings(max_length=60)) as vlm:
        output = vlm.generate([HI], Sampling(max_tokens=50, ignore_eos=True))[0]
        assert output.finish == "length" and output.usage.prompt_tokens + len(output.tokens) == 60
        with pytest.raises(Exception, match="60") as caught:
            vlm.ask("z" * 60)
        assert type(caught.value).__name__ == "ContextOverflow"
