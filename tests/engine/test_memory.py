"""Counting memory: what control groups leave, and refusing what does not fit before it is allocated."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_tiny

from mirada import VLM, Message, Sampling
from mirada.engine import load, memory, thread
from mirada.engine.settings import EngineSettings
from mirada.errors import OutOfMemory
from mirada.layers.kernels import library
from mirada.models.load import load_model, save_model

CPU = torch.device("cpu")


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A made /proc and control-group tree; returns a function that writes files into it."""

    def write(name, text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cg")
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    write("proc/self/cgroup", "0::/a/b\n")
    return write


def test_the_machine_alone(host):
    assert memory.available(CPU) == 8000 * 1024


def test_the_tightest_group_of_all_parents_counts(host):
    host("cg/a/b/memory.max", "max")
    host("cg/a/b/memory.current", "100")
    host("cg/a/memory.max", "5000")
    host("cg/a/memory.current", "4000")
    assert memory.available(CPU) == 1000
    host("cg/a/memory.stat", "anon 1\ninactive_file 300\n")  # page cache that is given back on demand
    assert memory.available(CPU) == 1300
    host("cg/a/b/memory.max", "600")
    assert memory.available(CPU) == 500


def test_a_path_of_the_host_is_not_found_inside_a_container(host):
    host("proc/self/cgroup", "0::/kubepods/pod1\n")
    host("cg/memory.max", "900")
    host("cg/memory.current", "200")
    assert memory.available(CPU) == 700


def test_version_one(host):
    host("proc/self/cgroup", "5:cpu,memory:/docker/x\n3:cpuset:/\n")
    host("cg/memory/docker/x/memory.limit_in_bytes", "4000")
    host("cg/memory/docker/x/memory.usage_in_bytes", "1500")
    assert memory.available(CPU) == 2500


def test_without_proc_all_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    assert memory.available(CPU) > 1 << 28


def test_this_machine():
    assert 1 << 20 < memory.available(CPU) < 1 << 50


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tiny_directories, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    monkeypatch.setattr(load, "load_model", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(OutOfMemory) as caught:
        VLM(tiny_directories["Keye"], device="cpu")
    error = caught.value
    assert error.available == 1000 and error.needed > 100_000 and error.unit == "bytes"
    for word in ("Keye", "1.0 kB", "available", "quantised", "bfloat16"):
        assert word in str(error)


def test_a_request_that_does_not_fit_is_refused_and_the_next_answers(vlm, all_of_it, monkeypatch):
    cache = vlm._engine.engine.runner.cache
    long = Sampling(max_tokens=4000)
    per_token = cache.bytes_per_token
    monkeypatch.setattr(memory, "available", lambda device: per_token * 1500)
    bad, good = vlm.generate([[Message("user", "hi")]] * 2, [long, Sampling(max_tokens=3, ignore_eos=True)])
    assert isinstance(bad.error, OutOfMemory)
    assert bad.error.needed > bad.error.available == per_token * 1500
    for word in ("4000", "max_tokens", "max_pixels", "prefix_cache_bytes", "quantised"):
        assert word in str(bad.error)
    assert good.error is None and len(good.tokens) == 3


class Holder:
    bytes_held = 0


def test_caches_mapped_weights_and_a_share_are_left_out(vlm, host, monkeypatch):
    """What is free, minus the weights that lie in pages which the system counts as free, minus a tenth, minus what caches may
    still take: all of it, as far as a quarter."""
    engine = vlm._engine.engine
    made = memory.Budget(engine.runner.model, engine.runner.cache, engine.settings)
    free = 8000 * 1024
    assert made.free(()) == free - int(free * 0.1)
    cache, other = Holder(), Holder()
    made.bounded(cache, 1_000_000)
    made.bounded(other, 500_000)
    assert made.free(()) == free - int(free * 0.1) - 1_500_000
    cache.bytes_held = 700_000
    assert made.untouched() == 800_000 and made.free(()) == free - int(free * 0.1) - 800_000
    cache.bytes_held = 2_000_000  # one item may be larger than the bound
    assert made.untouched() == 500_000
    made.bounded(keep := Holder(), 1 << 40)
    assert made.free(()) == free - int(free * 0.1) - int(free * 0.25)
    del keep, other
    assert made.untouched() == 0
    monkeypatch.setattr(engine.runner.model, "mapped_bytes", 2_000_000, raising=False)
    mapped = memory.Budget(engine.runner.model, engine.runner.cache, engine.settings)
    assert mapped.free(()) == free - 2_000_000 - int((free - 2_000_000) * 0.1)
    monkeypatch.setattr(engine.runner.model, "mapped_bytes", free + 5, raising=False)
    assert memory.Budget(engine.runner.model, engine.runner.cache, engine.settings).free(()) == -5


@pytest.mark.skipif(library.library() is None, reason="needs the compiled kernels")
def test_what_is_mapped_is_known(tmp_path):
    """Of a bfloat16 checkpoint all but the norms and what is joined."""
    folder = make_tiny(tmp_path, "qwen2_vl")
    save_model(load_model(folder, torch.bfloat16), folder)
    whole = (folder / "model.safetensors").stat().st_size
    with VLM(folder, device="cpu") as vlm:
        assert vlm.precision == "exact" and whole / 2 < vlm._engine.engine.scheduler.budget._mapped < whole


def test_the_caches_of_an_engine_fit_the_machine(tiny_directories, host, caplog):
    host("proc/meminfo", "MemAvailable: 400000 kB\n")
    with caplog.at_level("INFO"), VLM(tiny_directories["Keye"], device="cpu") as small:
        bounds = [getattr(small._settings, name) for name in memory._BOUNDS]
        assert 102_000_000 < sum(bounds) <= 102_400_000 and bounds[0] > bounds[1] > bounds[2] > 0
        assert small._prefix.max_bytes == bounds[0] and "caches may take" in caplog.text
        budget = small._engine.engine.scheduler.budget
        assert budget.untouched() == sum(bounds)
        assert budget.free(()) == pytest.approx(409_600_000 * 0.65, rel=1e-6)
        small.sleep()
        small.wake()
        assert small._engine.engine.scheduler.budget.untouched() == sum(bounds)
        host("proc/meminfo", "MemAvailable: 4000 kB\n")
        output = small.generate([[Message("user", "hi")]], Sampling(max_tokens=4000))[0]
        assert isinstance(output.error, OutOfMemory) and "prefix_cache_bytes" in str(output.error)
    host("proc/meminfo", "MemAvailable: 40000000 kB\n")
    with VLM(tiny_directories["Keye"], device="cpu") as large:
        assert large._settings == EngineSettings()


def test_requests_wait_for_room_instead_of_failing(either, all_of_it, monkeypatch):
    """Room for one at a time: all three are answered, never two at once."""
    engine = either._engine.engine
    cache, budget = engine.runner.cache, engine.scheduler.budget
    chats = [[Message("user", text)] for text in ("one", "two", "three")]
    sampling = Sampling(max_tokens=100, ignore_eos=True, max_repeats=None)
    expected = [output.tokens for output in either.generate(chats, sampling)]
    held = []
    made = [either._requests.make(chat, sampling, "auto") for chat in chats]
    total = budget.alone(made[0]) * 3 // 2 + max(budget.passing((one,)) for one in made)

    def available(device):
        held.append(cache.bytes_held)
        return total - cache.bytes_held

    monkeypatch.setattr(memory, "available", available)
    assert [output.tokens for output in either.generate(chats, sampling)] == expected
    assert max(held) == cache.bytes_for(1)


def test_running_out_in_the_middle_is_the_same_error(either, monkeypatch):
    """The allocator fails for one of two: it gets the typed error, the other its answer."""
    runner = either._engine.engine.runner
    original = runner.run

    def run(chunks):
        if any(chunk.sequence.sampling.max_tokens == 9 for chunk in chunks):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return original(chunks)

    monkeypatch.setattr(runner, "run", run)
    chats = [[Message("user", "hi")]] * 2
    bad, good = either.generate(chats, [Sampling(max_tokens=9, ignore_eos=True), Sampling(max_tokens=4, ignore_eos=True)])
    assert isinstance(bad.error, OutOfMemory) and "max_tokens" in str(bad.error)
    assert good.error is None and len(good.tokens) == 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="needs glibc")
def test_holes_are_given_back():
    """Memory that is free between what is held: the system has it again."""
    held = [bytearray(b"x" * 60_000) for _ in range(1000)]
    del held[:-1]
    full = resident()
    memory.trim()
    assert resident() < full - 40_000_000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_busy_engine_gives_memory_back(engines, monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "trim", lambda: calls.append(1))
    assert thread.TRIM > 1 and thread.QUIET > 0  # seconds: which passes first on a machine with other work is not said
    monkeypatch.setattr(thread, "TRIM", 3600.0)
    monkeypatch.setattr(thread, "QUIET", 3600.0)
    chat, parts = [Message("user", "hi")], engines["Keye"].parts
    with VLM.from_parts(parts.model, parts.renderer, parts.rule) as vlm:  # of its own: another's thread may be about to rest
        vlm.submit(chat, Sampling(max_tokens=5, ignore_eos=True)).result()
        assert not calls, "not with every step"
        monkeypatch.setattr(thread, "TRIM", -1.0)
        vlm.submit(chat, Sampling(max_tokens=5, ignore_eos=True)).result()
        assert len(calls) >= 4


def test_bytes_as_people_write_them():
    assert [memory.say(n) for n in (12, 3_400, 5_600_000, 7_800_000_000)] == ["12 bytes", "3.4 kB", "5.6 MB", "7.8 GB"]
