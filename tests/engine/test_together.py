"""Several replies to one chat: its media are fetched, decoded and rendered once, and all share the fate of the first."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from mirada import VLM, Image, Message, Sampling
from mirada.engine import request as request_module
from mirada.engine.prepare import THREADS
from mirada.engine.together import Together
from mirada.errors import ContextOverflow, MediaNotFound, RequestFailed
from mirada.types import Text

PICTURE = np.full((60, 90, 3), 120, np.uint8)
SHORT = Sampling(max_tokens=4, ignore_eos=True)


def asking(source=PICTURE) -> list[Message]:
    return [Message("user", (Image(source), Text("?")))]


@pytest.fixture
def vlm(engines):
    tiny = engines["Keye"]
    with VLM.from_parts(tiny.parts.model, tiny.parts.renderer, tiny.parts.rule, engine={"workers": 0}) as made:
        yield made


@pytest.fixture
def prepared(monkeypatch):
    """How often media were prepared; ``prepared.gate`` holds it up."""

    class Count:
        def __init__(self) -> None:
            self.calls, self.gate, self.begun = 0, threading.Event(), threading.Event()
            self.gate.set()

    count, known = Count(), request_module.prepare_many

    def counting(*given, **more):
        count.calls += 1
        count.begun.set()
        assert count.gate.wait(20)
        return known(*given, **more)

    monkeypatch.setattr(request_module, "prepare_many", counting)
    return count


def several(vlm: VLM, chat, count: int = 5, sampling=SHORT):
    together = Together()
    return [vlm.submit(chat, sampling, together=together) for _ in range(count)]


def test_one_preparation_serves_all_and_the_answers_are_those_of_one(vlm, prepared):
    alone = vlm.submit(asking(), SHORT).result(30)
    outputs = [handle.result(30) for handle in several(vlm, asking())]
    assert prepared.calls == 2
    assert {output.tokens for output in outputs} == {alone.tokens}
    assert {output.usage.media for output in outputs} == {alone.usage.media} and outputs[-1].notes == alone.notes
    words = [handle.result(30) for handle in several(vlm, [Message("user", "hi")], 3)]
    assert prepared.calls == 3 and len({output.tokens for output in words}) == 1
    assert vlm._engine.wait_idle(20) and vlm.stats()["waiting"] == 0 and vlm.stats()["prepared_bytes"] == 0


@pytest.mark.parametrize(
    ("chat", "kind"),
    [(asking("absent.png"), MediaNotFound), ([Message("user", "x " * 9000)], ContextOverflow)],
    ids=["media", "text"],
)
def test_all_fail_as_the_first_does(vlm, prepared, chat, kind):
    outputs = [handle.result(30) for handle in several(vlm, chat)]
    assert [type(output.error) for output in outputs] == [kind] * 5 and prepared.calls == 1
    assert vlm._engine.wait_idle(20) and vlm.stats()["waiting"] == 0


def test_who_is_cancelled_meanwhile_ends_alone_unless_it_leads(vlm, prepared):
    prepared.gate.clear()
    handles = several(vlm, asking(), 3)
    assert prepared.begun.wait(20)
    handles[1].cancel()
    prepared.gate.set()
    assert [handle.result(30).finish for handle in handles] == ["length", "cancelled", "length"]
    prepared.gate.clear()
    handles = several(vlm, asking(), 3)
    handles[0].cancel()
    prepared.gate.set()
    ends = [handle.result(30) for handle in handles]
    assert ends[0].finish == "cancelled"
    assert all(end.finish == "length" or isinstance(end.error, RequestFailed) for end in ends[1:])
    assert vlm._engine.wait_idle(20) and vlm.stats()["waiting"] == 0


def test_a_follower_that_is_cancelled_ends_at_once(vlm, prepared):
    prepared.gate.clear()
    handles = several(vlm, asking(), 3)
    assert prepared.begun.wait(20)
    gone = weakref.ref(handles[2]._reply)
    handles[1].cancel()
    assert handles[1].result(5).finish == "cancelled"  # while its leader still prepares
    assert vlm.stats()["waiting"] == 2 and not handles[0].done
    del handles[2]  # nobody reads it
    gc.collect()
    assert until(lambda: gone() is None and vlm.stats()["waiting"] == 1)
    prepared.gate.set()
    assert handles[0].result(30).finish == "length" and handles[1].result().finish == "cancelled"
    assert vlm._engine.wait_idle(20) and vlm.stats()["waiting"] == 0


def until(fact, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not (found := fact()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_a_leader_that_is_cancelled_in_line_ends_those_who_wait_for_it(vlm, prepared):
    prepared.gate.clear()
    others = [vlm.submit(asking(np.full((60, 90, 3), i, np.uint8)), SHORT) for i in range(THREADS)]
    handles = several(vlm, asking(), 3)
    handles[0].cancel()
    ends = [handle.result(20) for handle in handles]  # while nothing is prepared
    assert ends[0].finish == "cancelled" and all(isinstance(end.error, RequestFailed) for end in ends[1:])
    prepared.gate.set()
    assert all(other.result(30).error is None for other in others)


def test_nothing_is_kept_of_it_by_handles(vlm):
    together = Together()
    handles = [vlm.submit(asking(), SHORT, together=together) for _ in range(3)]
    assert all(handle.result(30).error is None for handle in handles)
    gone = weakref.ref(together)
    del together
    gc.collect()
    assert gone() is None
