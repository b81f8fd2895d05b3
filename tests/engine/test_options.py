"""Settings and chats in the forms in which people give them to the front door: taken, or refused in words that help."""

from __future__ import annotations

import pytest

from mirada import VLM, Message
from mirada.errors import MessageError, SettingsError


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
