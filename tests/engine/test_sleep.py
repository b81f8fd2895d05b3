"""Sleep gives memory back to the system, and who wakes answers as before."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from media.test_pool import gone, png
from tiny import make_tiny
from tiny_adapters import make_adapter

from mirada import VLM, Image, Message, Sampling, Text
from mirada.engine import sleep as sleeping
from mirada.engine.counts import is_moment
from mirada.errors import CheckpointError, EngineAsleep, MiradaError, NotAvailable, OutOfMemory, ReplyTimeout, SettingsError
from mirada.media import task as media_task
from mirada.media.prepare import prepare

MB = 1 << 20
SHORT = Sampling(max_tokens=6, ignore_eos=True)
ENDLESS = Sampling(max_tokens=3000, ignore_eos=True, max_repeats=None)
SEEN = [Message("user", (Image(png(1)), Text("what?")))]
HI = [Message("user", "hi")]
linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


@pytest.fixture
def vlm(tiny_directories):
    with VLM(tiny_directories["KeyeVL1_5"], device="cpu") as made:
        yield made


def resident() -> int:
    """Bytes of this process's own memory: no pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@linux
@pytest.mark.parametrize("level", [1, 2])
def test_memory_comes_back_and_answers_are_the_same(tmp_path, level):
    """A model of 50 MB, mostly vocabulary, and 60 MB in caches."""
    with VLM(make_tiny(tmp_path, "KeyeVL1_5", vocab_size=100_000), device="cpu") as vlm:
        before = [output.tokens for output in vlm.generate([SEEN, HI], SHORT)]
        held = vlm.submit(HI, SHORT)  # whoever keeps a handle keeps no weights
        held.result(20)
        patches = prepare(Image(png(2)), vlm.parts.rule)
        for i in range(60):
            key = i.to_bytes(32, "little")
            vlm._requests.cache.put(key, replace(patches, pixels=np.ones((MB // 588, 588), np.uint8)))
        weights = sum(p.nbytes for p in vlm.parts.model.parameters())
        assert weights > 45 * MB and vlm.stats()["pixel_cache_bytes"] > 58 * MB
        full = resident()
        vlm.sleep(level)
        freed = full - resident()
        least = 50 * MB + (0.9 * weights if level == 2 else 0)
        assert freed > least, f"{freed / MB:.0f} MB"
        assert vlm.stats()["pixel_cache_bytes"] == 0 and vlm.asleep == level
        vlm.wake()
        assert [output.tokens for output in vlm.generate([SEEN, HI], SHORT)] == before
        assert held.result(0).tokens == before[1]


@pytest.mark.parametrize("level", [1, 2])
def test_requests_meanwhile_are_refused_and_counts_go_on(vlm, level):
    vlm.generate([SEEN, SEEN], SHORT)
    assert vlm._engine.wait_idle(20)  # the step that tells the last token counts it afterwards
    before = vlm.stats()
    assert before["asleep"] == vlm.asleep == 0 and before["steps"] and before["encoded_patches"]
    vlm.sleep(level)
    vlm.sleep(1)  # at a level that it sleeps at, nothing happens
    moments = {name for name in before if is_moment(name)}
    assert vlm.stats() == before | dict.fromkeys(moments, 0) | {"asleep": level}
    for chat in (HI, SEEN):
        error = vlm.submit(chat, SHORT).result(5).error
        assert isinstance(error, EngineAsleep) and "wake" in error.fix
    with pytest.raises(EngineAsleep):
        vlm.ask("hi")
    with pytest.raises(EngineAsleep):
        vlm.load_adapter("x", "/nowhere")
    vlm.forget()
    vlm.wake()
    vlm.wake()
    vlm.generate([HI], SHORT)
    assert vlm._engine.wait_idle(20)
    after = vlm.stats()
    assert (
        after["asleep"] == 0
        and after["steps"] > before["steps"]
        and after["generated_tokens"] == 6 + before["generated_tokens"]
    )
    assert all(after[name] >= before[name] for name in set(before) - moments)


def test_no_count_is_ever_said_twice(vlm, monkeypatch):
    vlm.generate([HI], SHORT)
    assert vlm._engine.wait_idle(20)
    steps, said = vlm.stats()["steps"], []
    replace_engine = vlm._engine.replace

    def asked(engine):
        asking = threading.Thread(target=lambda: said.append(vlm.stats()["steps"]))
        asking.start()
        asking.join(0.2)  # it may have to wait for this very moment to pass
        replace_engine(engine)
        threads.append(asking)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(vlm._engine, "replace", asked)
    vlm.sleep()
    vlm.wake()
    for thread in threads:
        thread.join(10)
    assert steps and said == [steps, steps]


def test_from_the_first_level_to_the_second(vlm):
    tokens = vlm.generate([HI], SHORT)[0].tokens
    vlm.sleep(1)
    assert next(vlm.parts.model.parameters()).numel()
    vlm.sleep(2)
    with pytest.raises(EngineAsleep):
        vlm.parts.model.parameters()
    assert vlm.parts.model.config.text.vocab_size and vlm.stats()["asleep"] == 2
    vlm.wake()
    assert vlm.generate([HI], SHORT)[0].tokens == tokens


def test_what_is_under_way_is_answered_first(vlm):
    handles = [vlm.submit(chat, Sampling(max_tokens=40, ignore_eos=True)) for chat in (HI, SEEN, HI)]
    vlm.sleep(2)
    assert all(handle.done and len(handle.result(0).tokens) == 40 for handle in handles)


def test_what_takes_too_long_leaves_it_awake(vlm):
    handle = vlm.submit(HI, ENDLESS)
    next(iter(handle))
    with pytest.raises(ReplyTimeout, match=r"0\.05 s"):
        vlm.sleep(1, timeout=0.05)
    assert vlm.asleep == 0 and not handle.done
    assert len(vlm.submit(HI, SHORT).result(20).tokens) == 6
    sleeper = threading.Thread(target=vlm.sleep)
    sleeper.start()
    while not vlm._engine.line.refusing:
        time.sleep(0.001)
    assert isinstance(vlm.submit(HI, SHORT).result(5).error, EngineAsleep)  # it lies down, and takes nobody
    handle.cancel()
    sleeper.join(20)
    assert vlm.asleep == 1 and handle.result(0).finish == "cancelled"


@linux
def test_media_workers_end(tiny_directories, monkeypatch):
    monkeypatch.setattr(media_task, "LARGE_PIXELS", 0)
    with VLM(tiny_directories["qwen2_vl"], device="cpu", engine={"workers": 1}) as vlm:
        tokens = vlm.generate([SEEN], SHORT)[0].tokens
        pids = vlm._pool.pids
        assert len(pids) == 1
        vlm.sleep()
        assert gone(pids) and vlm.stats()["workers"] == 0
        vlm.wake()
        assert vlm.generate([SEEN], SHORT)[0].tokens == tokens
        assert vlm._pool.pids and vlm._pool.pids != pids


@pytest.mark.parametrize("level", [1, 2])
def test_adapters_come_back(vlm, tmp_path, level):
    path = make_adapter(tmp_path, vlm.parts.model)
    vlm.load_adapter("a", path)
    tokens = [vlm.generate([HI], SHORT, adapter=name)[0].tokens for name in ("a", None)]
    assert tokens[0] != tokens[1]
    vlm.sleep(level)
    assert vlm.adapters == ("a",)
    vlm.wake()
    assert [vlm.generate([HI], SHORT, adapter=name)[0].tokens for name in ("a", None)] == tokens


@pytest.mark.parametrize("level", [1, 2])
def test_an_adapter_can_be_unloaded_in_its_sleep(vlm, tmp_path, level):
    vlm.load_adapter("a", make_adapter(tmp_path, vlm.parts.model))
    vlm.sleep(level)
    with pytest.raises(SettingsError, match="no adapter 'b'"):
        vlm.unload_adapter("b")
    with pytest.raises(SettingsError, match="no adapter \\['a'\\]"):
        vlm.unload_adapter(["a"])
    vlm.unload_adapter("a")
    with pytest.raises(SettingsError, match="no adapter 'a'"):
        vlm.unload_adapter("a")
    vlm.wake()
    assert vlm.adapters == ()
    assert isinstance(vlm.submit(HI, SHORT, adapter="a").result(5).error, SettingsError)


def test_an_adapter_that_is_gone_keeps_it_asleep_until_it_is_unloaded(vlm, tmp_path):
    path = make_adapter(tmp_path, vlm.parts.model)
    tokens = vlm.generate([HI], SHORT)[0].tokens
    vlm.load_adapter("a", path)
    vlm.sleep(2)
    shutil.rmtree(path)
    for _ in range(2):
        with pytest.raises(MiradaError):
            vlm.wake()
        assert vlm.asleep == 2
    vlm.unload_adapter("a")
    vlm.wake()
    assert vlm.generate([HI], SHORT)[0].tokens == tokens


def test_a_checkpoint_that_is_gone_is_said_and_it_sleeps_on(tmp_path):
    directory = make_tiny(tmp_path / "m", "Keye")
    with VLM(directory, device="cpu") as vlm:
        tokens = vlm.generate([HI], SHORT)[0].tokens
        vlm.sleep(2)
        os.rename(directory, tmp_path / "elsewhere")
        with pytest.raises(CheckpointError):
            vlm.wake()
        assert vlm.asleep == 2 and isinstance(vlm.submit(HI).result(5).error, EngineAsleep)
        os.rename(tmp_path / "elsewhere", directory)
        vlm.wake()
        assert vlm.generate([HI], SHORT)[0].tokens == tokens


@pytest.mark.parametrize("level", [1, 2])
def test_who_cannot_wake_keeps_nothing_and_may_try_again(vlm, monkeypatch, level):
    tokens = vlm.generate([SEEN], SHORT)[0].tokens
    vlm.sleep(level)
    made, models = vlm._make_engine, []

    def fails():
        models.append(weakref.ref(vlm.parts.model))
        made()
        raise OutOfMemory("no room for keys", "make some", unit="bytes")

    monkeypatch.setattr(vlm, "_make_engine", fails)
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            vlm.wake()
    gc.collect()
    assert vlm.asleep == level and (level == 1 or [model() for model in models] == [None, None])
    vlm.sleep(2)
    gc.collect()
    assert [model() for model in models] == [None, None]
    monkeypatch.undo()
    vlm.wake()
    assert vlm.generate([SEEN], SHORT)[0].tokens == tokens


def test_what_cannot_be(vlm):
    for level in (0, 3, True, "1"):
        with pytest.raises(SettingsError, match="sleep level"):
            vlm.sleep(level)
    with VLM.from_parts(vlm.parts.model, vlm.parts.renderer, vlm.parts.rule, engine={}) as made:
        with pytest.raises(NotAvailable, match="level 1"):
            made.sleep(2)
        tokens = made.generate([HI], SHORT)[0].tokens
        made.sleep(1)
        made.wake()
        assert made.generate([HI], SHORT)[0].tokens == tokens


def test_closing_asleep(tiny_directories):
    vlm = VLM(tiny_directories["Keye"], device="cpu")
    vlm.generate([HI], SHORT)
    vlm.sleep()
    vlm.close()
    gc.collect()
    assert "closed" in str(vlm._engine.line._refusal()) and not vlm._engine.line._thread.is_alive()


def test_weights_of_another_device_wait_in_the_hosts_memory(monkeypatch):
    """The other device is one that keeps no numbers, so this shows where they are sent, not that they arrive."""
    model = torch.nn.Linear(3, 2, device="meta")
    model.register_buffer("kept", torch.ones(2))
    sent = []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device: sent.append((self.device.type, torch.device(device).type)) or self
    )
    offloaded = sleeping.Offloaded(model)
    assert sent == [("meta", "cpu")] * 2
    offloaded.back()
    assert sent[2:] == [("meta", "meta")] * 2
