"""Bodies of ``/v1/responses`` as ones of chat completions, by themselves: what no client of the package would send."""

from __future__ import annotations

import time

import pytest

from mirada.errors import MessageError
from mirada.records import request_from_openai
from mirada.serve.responses_body import as_chat, own_words


def refused(*items) -> MessageError:
    """The error of a body with these items, in its caller's words."""
    form = as_chat({"model": "mini", "input": [*items]})
    with pytest.raises(MessageError) as caught, own_words(form.places):
        request_from_openai(form.body)
    return caught.value


@pytest.mark.parametrize("role", ["message 99", "part 3 of message 7", "message " + "9" * 5000, "messages[5]"], ids=len)
def test_words_of_a_caller_that_read_like_a_place_are_none(role):
    error = refused({"role": role, "content": "x"})
    assert getattr(error, "param", None) == "input[0]" and role in error.problem


@pytest.mark.parametrize("content", [5, True, 1.5, {"a": 1}], ids=str)
def test_content_of_no_form_is_named_whatever_follows_it(content):
    error = refused({"role": "assistant", "content": content}, {"role": "assistant", "content": "x"})
    assert getattr(error, "param", None) == "input[0]"


def test_very_many_items_of_one_turn_take_no_longer_than_others():
    said, thought = {"role": "assistant", "content": "x"}, {"type": "reasoning", "content": [{"text": "y" * 100}]}
    count = 40_000
    began = time.thread_time()
    (message,) = as_chat({"model": "mini", "input": [thought, said] * count}).body["messages"]
    assert time.thread_time() - began < 3  # copied for each: minutes
    assert len(message["content"]) == count and message["reasoning_content"] == "\n\n".join(["y" * 100] * count)
