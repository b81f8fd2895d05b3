"""Every parameter of both APIs with a value of every type: what it does not take is a 4xx that names it, never a 500.

The tables say what each parameter takes, so a parameter that nobody listed, or one that takes more than it says, is found too.
"""

from __future__ import annotations

import json

import pytest
from serving import user

from mirada.records.request import KNOWN, LABELS
from mirada.serve import responses_body

DEEP = 300
MOST_TAKEN = 3
"""Of the values that a parameter takes, so many are sent: these run the model."""
VALUES = {
    # name -> the value as it stands in JSON
    "null": "null", "true": "true", "false": "false", "one": "1", "three": "3", "zero": "0", "minus three": "-3",
    "fraction": "1.5", "large": str(2**63), "huge": "9" * 400, "tiny": "1e-320", "most": "1.7e308",
    "infinite": "1e999", "minus infinite": "-1e999", "text": '"x"', "number as text": '"3"', "inf": '"inf"', "no text": '""',
    "list": "[]", "texts": '["x"]', "object": "{}", "text object": '{"x": "y"}',
    "deep list": "[" * DEEP + "]" * DEEP, "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
}  # fmt: skip
FEW = ("null", "true", "three", "huge", "infinite", "text", "texts", "object", "deep list")
FLAG = {"true", "false"}
POSITIVE = {"one", "three"}
LENGTH = {*POSITIVE, "large"}
COUNT = {*POSITIVE, "zero"}
WHOLE = {*COUNT, "minus three", "large"}
SMALL = {"one", "zero", "fraction", "tiny"}
TEXT = {"text", "number as text", "inf", "no text"}
NONEMPTY = TEXT - {"no text"}
STOP = {*NONEMPTY, "texts", "list"}
OBJECTS = {"object", "text object"}
ANY = set(VALUES) - {"huge", "infinite", "minus infinite", "deep list", "deep object"}
TAKES = {
    # sampling
    "temperature": {*SMALL, "three"}, "top_p": {"one", "tiny"}, "top_k": {*COUNT, "large"}, "min_p": {"one", "zero", "tiny"},
    "repetition_penalty": {"one", "three", "fraction", "tiny"}, "presence_penalty": SMALL, "frequency_penalty": SMALL,
    "logit_bias": {"object"}, "seed": WHOLE, "stop": STOP, "stop_token_ids": {"list"}, "min_tokens": {"zero", "one"},
    "include_stop_str_in_output": FLAG, "ignore_eos": FLAG, "max_repeats": {"zero", "three", "large"},
    "thinking_budget": {*COUNT, "large"}, "n": POSITIVE, "logprobs": FLAG, "top_logprobs": {"zero"},
    "max_tokens": LENGTH, "max_completion_tokens": LENGTH, "max_output_tokens": LENGTH,
    # media and modes
    "fps": {*POSITIVE, "fraction", "tiny"}, "nframes": POSITIVE, "min_pixels": POSITIVE, "max_pixels": POSITIVE,
    "thinking": FLAG, "reasoning_effort": set(), "adapter": set(), "include_reasoning": FLAG,
    "chat_template_kwargs": {"object"}, "mm_processor_kwargs": {"object"}, "media_io_kwargs": {"object"},
    # forms and tools
    "response_format": set(), "structured_outputs": {"object"}, "guided_json": OBJECTS | {"true"}, "guided_regex": NONEMPTY,
    "guided_choice": {"texts"}, "guided_grammar": set(), "guided_whitespace_pattern": set(), "tools": {"list"},
    "tool_choice": set(), "parallel_tool_calls": FLAG,
    # what is asked, and how it is answered
    "model": set(), "messages": set(), "input": NONEMPTY, "instructions": TEXT, "stream": FLAG, "stream_options": {"object"},
    "return_token_ids": FLAG, "request_id": NONEMPTY, "reasoning": {"object"}, "text": {"object"}, "truncation": set(),
    "background": {"false"}, "include": {"list"},
    # of one value or none
    "store": FLAG, "max_tool_calls": LENGTH, "verbosity": set(), "modalities": set(),
    "priority": {"zero"}, "skip_special_tokens": {"true"},
    "service_tier": set(), "prompt_cache_retention": set(), "guided_decoding_backend": set(),
    **dict.fromkeys(LABELS, ANY),
}  # fmt: skip
NEEDED = {"model", "messages", "input"}
ALSO = {("responses", "metadata"): OBJECTS, ("responses", "top_logprobs"): COUNT}
"""Where one API takes something else."""
APIS = {"chat/completions": KNOWN, "responses": frozenset(responses_body.KNOWN)}


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
    few = path == "responses" and name in KNOWN  # the reader is the same
    for label, value in VALUES.items():
        if few and label not in FEW:
            continue
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


def test_every_parameter_is_in_the_table():
    assert set(TAKES) == KNOWN | set(responses_body.KNOWN)


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, known in APIS.items() for name in sorted(known)])
def test_a_parameter(post, path, name):
    takes = ALSO.get((path, name), TAKES[name]) | (set() if name in NEEDED else {"null"})
    assert not wrongs(post, path, name, takes, lambda value: body_of(path, **{name: value}))
