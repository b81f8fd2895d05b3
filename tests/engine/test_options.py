"""Settings and chats in the forms in which people give them to the front door: taken, or refused in words that help."""

from __future__ import annotations

import copy
import pickle

import pytest

from mirada import VLM, Message, Sampling
from mirada.engine.options import sampling_of
from mirada.errors import MessageError, NotAvailable, SettingsError


@pytest.fixture(scope="module")
def qwen(engines) -> VLM:
    return engines["qwen2_vl"]


def test_limits_are_taken_as_a_mapping_and_checked_key_by_key(qwen, picture):
    with VLM.from_parts(qwen.parts.model, qwen.parts.renderer, qwen.parts.rule, limits={"pixels": 5}) as small:
        assert small.limits.pixels == 5
        with pytest.raises(SettingsError, match="did you mean 'pixels'"):
            VLM("no model is opened", limits={"pixel": 5})
    for wrong in (5, [], "pixels"):
        with pytest.raises(SettingsError, match="limits is a"):
            VLM("no model is opened", limits=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingsError, match=r"limits\.bytes is '5'"):
        VLM("no model is opened", limits={"bytes": "5"})


def test_what_is_no_list_of_chats_is_refused(qwen):
    chat = [Message("user", "hi")]
    for wrong in (None, 5, "hi", chat[0], {"role": "user", "content": "hi"}):
        with pytest.raises(MessageError, match=r"chats are given as a .*generate\(\[chat\]\)"):
            qwen.generate(wrong)  # pyright: ignore[reportArgumentType]
    for one in (chat, [{"role": "user", "content": "hi"}], iter(chat)):
        with pytest.raises(MessageError, match=r"one chat.*wrap it in a list"):
            qwen.generate(one)  # pyright: ignore[reportArgumentType]
    assert qwen.generate([]) == []
    good, bad = qwen.generate(iter([chat, chat[0]]), {"max_tokens": 1})  # one among chats does not disturb the others
    assert good.error is None and isinstance(bad.error, MessageError)


def test_a_line_says_what_it_is_and_how_it_does(qwen):
    parts = qwen.parts
    with VLM.from_parts(parts.model, parts.renderer, parts.rule) as vlm:
        assert repr(vlm) == "<VLM qwen2_vl, float32 on cpu, running>"
        handle = vlm.submit([Message("user", "hi")], {"max_tokens": 2, "ignore_eos": True})
        assert repr(handle).startswith("<ReplyHandle ")
        handle.result()
        assert repr(handle) == "<ReplyHandle length, 2 tokens>"
        assert repr(vlm.submit([])) == "<ReplyHandle MessageError, 0 tokens>"
        vlm.sleep()
        assert repr(vlm) == "<VLM qwen2_vl, float32 on cpu, asleep>"
    assert repr(vlm).endswith("closed>")
    assert repr(VLM.__new__(VLM)) == "<VLM, not open>"


def test_a_model_is_not_sent_to_another_process(qwen):
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(NotAvailable, match="open it in each process"):
            attempt(qwen)


def test_token_ids_may_be_text_as_in_json():
    assert sampling_of({"logit_bias": {"5": 1, 7: -2}}).logit_bias == {5: 1, 7: -2}
    with pytest.raises(SettingsError, match="keys are each a whole number"):
        sampling_of({"logit_bias": {"five": 1}})
    with pytest.raises(SettingsError, match="token ids"):
        Sampling(logit_bias={"5": 1})  # pyright: ignore[reportArgumentType]


def test_lists_of_sampling_are_kept_as_tuples():
    for made in (
        Sampling(stop=["a"], stop_token_ids=[1], choice=["b"]),
        sampling_of({"stop": ["a"], "stop_token_ids": [1], "choice": ["b"]}),
    ):
        assert (made.stop, made.stop_token_ids, made.choice) == (("a",), (1,), ("b",))
        assert made == Sampling(stop=("a",), stop_token_ids=(1,), choice=("b",))
