"""Every parameter of both APIs with a value of every type: what it does not take is a 4xx that names it, never a 500.

The tables say what each parameter takes, so a parameter that nobody listed, or one that takes more than it says, is found too.
"""

from __future__ import annotations

import json

import pytest
from serving import user

from mirada.records.request import KNOWN
from mirada.serve import responses

DEEP = 300
MOST_TAKEN = 3
"""Of the values that a parameter takes, so many are sent: these run the model."""
VALUES = {
    # name -> the value as it stands in JSON
    "null": "null", "true": "true", "false": "false", "one": "1", "three": "3", "zero": "0", "minus three": "-3",
    "fraction": "1.5", "large": str(2**63), "huge": "9" * 400, "longest": "9" * 4000, "tiny": "1e-320", "most": "1.7e308",
    "infinite": "1e999", "minus infinite": "-1e999", "text": '"x"', "number as text": '"3"', "inf": '"inf"', "no text": '""',
    "list": "[]", "texts": '["x"]', "lists": "[[[]]]", "object": "{}", "text object": '{"x": "y"}',
    "deep list": "[" * DEEP + "]" * DEEP, "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
}  # fmt: skip
FLAG = {"true", "false"}
POSITIVE = {"one", "three"}
COUNT = {*POSITIVE, "zero"}
WHOLE = {*COUNT, "minus three", "large"}
SMALL = {"one", "zero", "fraction", "tiny"}
TEXT = {"text", "number as text", "inf", "no text"}
NONEMPTY = TEXT - {"no text"}
STOP = {*NONEMPTY, "texts", "list"}
OBJECTS = {"object", "text object"}
ANY = set(VALUES) - {"huge", "longest", "infinite", "minus infinite", "deep list", "deep object"}
OPTIONAL = {"null"}
SAMPLING = {
    "temperature": {*SMALL, "three"}, "top_p": {"one", "tiny"}, "top_k": {*COUNT, "large"}, "min_p": {"one", "zero", "tiny"},
    "repetition_penalty": {"one", "three", "fraction", "tiny"}, "presence_penalty": SMALL, "frequency_penalty": SMALL,
    "logit_bias": {"object"}, "seed": WHOLE, "stop": STOP, "ignore_eos": FLAG, "max_repeats": {"zero", "three", "large"},
    "thinking_budget": {*COUNT, "large"},
}  # fmt: skip
MEDIA = {
    "fps": {*POSITIVE, "fraction", "tiny"}, "nframes": POSITIVE, "min_pixels": POSITIVE, "max_pixels": POSITIVE,
}  # fmt: skip
MODES = {"thinking": FLAG, "adapter": set(), "chat_template_kwargs": {"object"}, "mm_processor_kwargs": {"object"}}
CHAT = {
    **SAMPLING, **MEDIA, **MODES, "model": set(), "messages": set(), "stream": FLAG, "stream_options": {"object"},
    "n": POSITIVE, "max_tokens": {*POSITIVE, "large"}, "max_completion_tokens": {*POSITIVE, "large"}, "logprobs": FLAG,
    "top_logprobs": {"zero"}, "response_format": set(), "structured_outputs": {"object"}, "guided_json": OBJECTS | {"true"},
    "guided_regex": NONEMPTY, "guided_choice": {"texts"}, "guided_grammar": set(), "tools": {"list"}, "tool_choice": set(),
    "parallel_tool_calls": FLAG, "reasoning_effort": set(), "return_token_ids": FLAG,
    **dict.fromkeys(
        ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
         "include_reasoning", "priority", "request_id"), ANY
    ),
}  # fmt: skip
RESPONSES = {
    **SAMPLING, **MEDIA, **MODES, "model": set(), "input": NONEMPTY, "instructions": TEXT, "stream": FLAG,
    "max_output_tokens": {*POSITIVE, "large"}, "tools": {"list"}, "tool_choice": set(), "parallel_tool_calls": FLAG,
    "reasoning": OBJECTS, "text": OBJECTS, "truncation": set(), "background": {"false"}, "include": ANY,
    "metadata": OBJECTS, **dict.fromkeys(("user", "store", "service_tier", "safety_identifier", "prompt_cache_key"), ANY),
}  # fmt: skip


def body_of(path, **more):
    """JSON text in which each value of ``more`` is JSON text."""
    base = {"model": '"mini"'} | (
        {"input": '"hi"', "max_output_tokens": "1"}
        if path == "responses"
        else {"messages": json.dumps(user("hi")), "max_completion_tokens": "1"}
    )
    return ("{" + ",".join(f'"{name}":{value}' for name, value in {**base, **more}.items()) + "}").encode()


def wrongs(post, path, name, takes, make):
    """What the server says of each value of a parameter that it should not."""
    found, taken = [], 0
    for label, value in VALUES.items():
        if label in takes and (taken := taken + 1) > MOST_TAKEN:
            continue
        reply = post(make(value), path=f"/v1/{path}")
        if label in takes:
            if reply.status_code != 200:
                found.append(f"{label}: {reply.text[:200]}")
            continue
        error = reply.json().get("error") or {}
        param = error.get("param") or ""
        named = param == name or param.startswith((f"{name}.", f"{name}["))
        if not 400 <= reply.status_code < 500 or set(error) != {"message", "type", "param", "code"} or not named:
            found.append(f"{label}: {reply.status_code} {reply.text[:200]}")
        elif len(error["message"]) > 600:
            found.append(f"{label}: the message has {len(error['message'])} characters")
    return found


def test_every_parameter_is_in_the_tables():
    assert set(CHAT) == KNOWN
    assert set(RESPONSES) == set(responses.KNOWN)


@pytest.mark.parametrize("name", sorted(CHAT))
def test_a_parameter_of_chat(post, name):
    takes = CHAT[name] | (OPTIONAL if name not in ("model", "messages") else set())
    assert not wrongs(post, "chat/completions", name, takes, lambda value: body_of("chat", **{name: value}))


@pytest.mark.parametrize("name", sorted(RESPONSES))
def test_a_parameter_of_responses(post, name):
    takes = RESPONSES[name] | (OPTIONAL if name not in ("model", "input") else set())
    assert not wrongs(post, "responses", name, takes, lambda value: body_of("responses", **{name: value}))
