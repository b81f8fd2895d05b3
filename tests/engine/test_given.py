"""What a caller makes without the renderer (prompts, spans, patches, callbacks) can be wrong in any way: it is refused by a
typed error, and nobody else notices."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from mirada import VLM, Message, Sampling
from mirada.errors import MediaError, MessageError, MiradaError, SettingsError
from mirada.media.grid import Patches
from mirada.types import Prompt, Span

LONG = Sampling(max_tokens=40, ignore_eos=True)
GRID = (1, 4, 4)


@pytest.fixture(scope="module")
def qwen(engines) -> VLM:
    return engines["qwen2_vl"]


def patches(*shape: int, dtype=np.uint8, grids=(GRID,)) -> Patches:
    return Patches("image", np.zeros(shape or (16, 3, 2, 14, 14), dtype), grids, (56, 56), bytes(32))


def span(**changes) -> Span:
    return dataclasses.replace(Span("image", 2, GRID, 0), **changes)


def seen(*spans: Span, tokens=None) -> Prompt:
    return Prompt(tokens or (1, 2, 5, 5, 5, 5, 3), spans or (span(),))


BAD_TOKENS = {
    "letters": ("a", "b"), "fractions": (1.5, 2), "truths": (True, False), "nested": ((1, 2), (3, 4)), "ragged": ((1,), 2),
    "huge": (1, 1 << 70), "negative": (1, -1), "a number": 7, "None": None,
}  # fmt: skip
BAD_SPANS = {
    "no span": 7, "start is a fraction": span(start=2.0), "start before the prompt": span(start=-1), "merge 0": span(merge=0),
    "another merge": span(merge=4), "odd grid": span(grid=(1, 3, 3)), "negative grid": span(grid=(1, -4, -4)),
    "flat grid": span(grid=(4, 4)), "empty grid": span(grid=(0, 4, 4)), "hash is text": span(hash="x" * 32),
    "time step is no number": span(t_step=float("nan")), "time step is endless": span(t_step=float("inf")),
    "frame before the first": span(frame=-1), "frame beyond all": span(frame=1 << 70), "medium of a name": span(media_id="a"),
    "unknown kind": span(kind="sound"),
}  # fmt: skip
BAD_PATCHES = {
    "None": None, "a number": (3,), "fractions": (patches(dtype=np.float32),), "objects": (patches(dtype=object),),
    "too few": (patches(8, 3, 2, 14, 14),), "none": (patches(0, 3, 2, 14, 14),), "one frame": (patches(16, 3, 14, 14),),
    "small patches": (patches(16, 3, 2, 7, 7),), "a list": (dataclasses.replace(patches(), pixels=[1]),),
    "odd grid": (patches(9, 3, 2, 14, 14, grids=((1, 3, 3),)),), "flat grid": (patches(grids=((4, 4),)),),
    "no grids": (patches(grids=()),), "unknown kind": (dataclasses.replace(patches(), kind="sound"),),
}  # fmt: skip


def refused(vlm: VLM, error: type[MiradaError] | tuple[type[MiradaError], ...], *given, **options) -> None:
    """It fails by its own error, and one that runs meanwhile is answered whole."""
    other = vlm.submit(Prompt((1, 2, 3)), LONG)
    output = vlm.submit(*given, **options).result(30)
    assert isinstance(output.error, error), repr(output.error)
    assert output.error.problem and output.error.fix
    assert other.result(30).finish == "length"


def test_the_plain_one_is_answered(qwen):
    assert qwen.submit(seen(), {"max_tokens": 2, "ignore_eos": True}, media=[patches()]).result(30).error is None


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_tokens(qwen, name):
    refused(qwen, MessageError, Prompt(BAD_TOKENS[name]))


@pytest.mark.parametrize("name", BAD_SPANS)
def test_spans(qwen, name):
    refused(qwen, MessageError, seen(BAD_SPANS[name]), media=[patches()])


@pytest.mark.parametrize("name", BAD_PATCHES)
def test_patches(qwen, name):
    refused(qwen, (MessageError, MediaError), seen(), media=BAD_PATCHES[name])


@pytest.mark.parametrize("tools", [3, "tool", [3], {"a": 1}], ids=repr)
def test_tools(qwen, tools):
    refused(qwen, SettingsError, [Message("user", "hi")], tools=tools)


def test_numbers_of_other_kinds_are_numbers(qwen):
    plain = qwen.submit(Prompt((1, 2, 3)), LONG).result(30)
    for tokens in ([1, 2, 3], np.array([1, 2, 3]), tuple(np.array([1, 2, 3], np.int32))):
        assert qwen.submit(Prompt(tokens), LONG).result(30).tokens == plain.tokens


@pytest.mark.parametrize("end", ["by itself", "cancelled"])
def test_a_call_that_fails_disturbs_nobody(qwen, end, caplog):
    other = qwen.submit(Prompt((1, 2, 3)), LONG)
    handle = qwen.submit(Prompt((4, 5)), Sampling(max_tokens=20 if end == "by itself" else 3000, ignore_eos=True))
    handle.when_done(lambda: 1 / 0)
    called: list[int] = []
    handle.when_done(lambda: called.append(1))
    if end == "cancelled":
        handle.cancel()
    assert handle.result(30).finish == ("length" if end == "by itself" else "cancelled")
    assert other.result(30).finish == "length"
    assert qwen._engine.wait_idle(10)
    assert called == [1]
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("name, value", [("max_repeats", 10**30), ("thinking_budget", 10**30), ("seed", -(10**30))])
def test_numbers_beyond_a_machine_word(qwen, name, value):
    output = qwen.submit(Prompt((1, 2, 3)), {"max_tokens": 3, "temperature": 1.0, "ignore_eos": True, name: value}).result(30)
    assert output.error is None and len(output.tokens) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "given",
    [{"logit_bias": {7: 1e12}}, {"logit_bias": {7: 1e12}, "presence_penalty": -2}, {"repetition_penalty": 1e-40}],
    ids=repr,
)
def test_penalties_and_bias_as_large_as_they_may_be(qwen, temperature, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = qwen.submit(Prompt((7, 2, 3)), given | {"max_tokens": 3, "temperature": temperature}).result(30)
    assert output.error is None
    if "logit_bias" in given:
        assert output.tokens == (7, 7, 7)


@pytest.mark.parametrize(
    "bias", [1e13, 1e308, -1e308, 10**400, float("inf"), float("nan")], ids=("1e13", "1e308", "-1e308", "10**400", "inf", "nan")
)
def test_a_bias_beyond_all_use_is_named(qwen, bias):
    output = qwen.submit(Prompt((7, 2, 3)), {"max_tokens": 3, "logit_bias": {7: bias}}).result(30)
    assert isinstance(output.error, SettingsError) and "logit_bias" in str(output.error)


def test_a_cache_that_fails_ends_nothing_but_its_own(engines, monkeypatch):
    """Whatever goes wrong while one request is admitted or leaves, the others are answered and the thread lives on."""
    parts = engines["qwen2_vl"].parts
    with VLM.from_parts(parts.model, parts.renderer, parts.rule, engine={"prefix_cache_bytes": 1 << 20}) as vlm:
        whole = vlm.submit(Prompt((1, 2, 3)), LONG).result(30)
        prefix = vlm._engine.engine.scheduler.prefix
        match, offer = prefix.match, prefix.offer

        def broken(sequence, real):
            if sequence.prompt.tokens[0] == 9:
                raise RuntimeError("can't allocate memory")
            return real(sequence)

        monkeypatch.setattr(prefix, "match", lambda sequence: broken(sequence, match))
        handles = [vlm.submit(Prompt((1, 2, 3)), LONG), vlm.submit(Prompt((9, 2)), LONG), vlm.submit(Prompt((1, 2, 3)), LONG)]
        outputs = [handle.result(30) for handle in handles]
        assert [output.finish for output in outputs] == ["length", "error", "length"]
        assert outputs[0].tokens == outputs[2].tokens == whole.tokens
        monkeypatch.setattr(prefix, "match", match)
        monkeypatch.setattr(prefix, "offer", lambda sequence: broken(sequence, offer))
        # All end in one step, and all are told: those whose blocks could not be kept, too.
        handles = [vlm.submit(Prompt((9, 2)), LONG) for _ in range(3)] + [vlm.submit(Prompt((1, 2, 3)), LONG)]
        outputs = [handle.result(30) for handle in handles]
        assert outputs[3].tokens == whole.tokens
        assert [output.finish for output in outputs] == ["length"] * 4
        assert vlm.submit(Prompt((1, 2, 3)), LONG).result(30).tokens == whole.tokens
        assert vlm._engine.wait_idle(10) and vlm.stats()["kv_bytes"] == 0


@torch.inference_mode()
def test_an_estimate_of_memory_takes_any_media(qwen):
    budget = qwen._engine.engine.scheduler.budget
    sequence = qwen._requests.make(seen(), LONG, "auto", [patches()])
    assert budget.passing([sequence]) > budget.passing([]) == 0
