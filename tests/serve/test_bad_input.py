"""Every slip is a 400 (or its own status) in OpenAI's form that names the parameter; nothing else dies of it."""

from __future__ import annotations

import json

import openai
import pytest
from serving import PLANTED, data_uri, image, png, user

BASE = {"model": "mini", "messages": user("hi"), "max_tokens": 1}
TOOL = {"type": "function", "function": {"name": "f"}}
VIDEO = {"type": "video_url", "video_url": {"url": "x"}}

BAD = [
    # what is changed, status, param, words of the message
    ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
    ({"model": None}, 400, "model", "names no model"),
    ({"model": "mimi"}, 404, "model", "did you mean 'mini'"),
    ({"messages": None}, 400, "messages", "no messages"),
    ({"messages": []}, 400, "messages", "empty"),
    ({"messages": "hi"}, 400, "messages", "str"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0]", "robot"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0]", "no content"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "messages[0].content[0]", "audio"),
    ({"messages": [*user("a"), {"role": "user", "content": [{"txt": "a"}]}]}, 400, "messages[1].content[0]", "text"),
    ({"messages": user("x", image(""))}, 400, "messages[0].content[0]", "empty"),
    ({"messages": user("x", image("data:image/png;base64,AAAA"))}, 400, "messages", "picture"),
    ({"messages": user("x", image("data:image/png;base64,!!"))}, 400, "messages", "base64"),
    ({"messages": user("x", image("file:///etc/passwd"))}, 400, "messages", "outside"),
    ({"messages": user("x", image("/etc/passwd"))}, 400, "messages", "outside"),
    ({"messages": user("x", image("ftp://a/b.png"))}, 400, "messages", "scheme"),
    ({"messages": user("x", image(data_uri(png())), VIDEO), "fps": 1, "nframes": 4}, 400, "nframes", "both"),
    ({"messages": user("x", image(data_uri(png()))), "max_pixels": 10}, 400, "max_pixels", "10"),
    ({"messages": user("x" * 30000)}, 400, "messages", "context"),
    ({"temperature": 101}, 400, "temperature", "between"),
    ({"temperature": "hot"}, 400, "temperature", "str"),
    ({"top_p": 0}, 400, "top_p", "top_p"),
    ({"top_k": -3}, 400, "top_k", "top_k"),
    ({"min_p": 2}, 400, "min_p", "min_p"),
    ({"presence_penalty": 3}, 400, "presence_penalty", "between"),
    ({"frequency_penalty": -3}, 400, "frequency_penalty", "between"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", ""),
    ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
    ({"max_completion_tokens": 1.5}, 400, "max_completion_tokens", "whole"),
    ({"n": 0}, 400, "n", "1 to"),
    ({"n": True}, 400, "n", "whole"),
    ({"seed": "a"}, 400, "seed", "whole"),
    ({"stop": [""]}, 400, "stop", "non-empty"),
    ({"stop": 3}, 400, "stop", ""),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias", ""),
    ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "vocabulary"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs"),
    ({"logprobs": 3}, 400, "logprobs", "true or false"),
    ({"logprobs": True, "top_logprobs": 200}, 400, "top_logprobs", ""),
    ({"stream": "yes"}, 400, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"usage": True}}, 400, "stream_options.usage", "include_usage"),
    ({"tools": {}}, 400, "tools", "list"),
    ({"tools": [{"type": "function"}]}, 400, "tools[0].function", ""),
    ({"tools": [TOOL]}, 400, "tools", "template"),
    ({"tool_choice": "maybe"}, 400, "tool_choice", "auto"),
    ({"tool_choice": "required"}, 400, "tool_choice", "no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "tool_choice", "no tool"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, 400, "response_format.json_schema.schema", "schema"),
    ({"guided_choice": []}, 400, "guided_choice", ""),
    ({"guided_json": "{", "guided_regex": "a"}, 400, "guided_json", "JSON"),
    ({"thinking": "perhaps"}, 400, "thinking", "auto"),
    ({"thinking_budget": -1}, 400, "thinking_budget", ""),
    ({"reasoning_effort": "huge"}, 400, "reasoning_effort", ""),
    ({"chat_template_kwargs": {"enable_thinkin": True}}, 400, "chat_template_kwargs.enable_thinkin", "enable_thinking"),
    ({"mm_processor_kwargs": {"fp": 1}}, 400, "mm_processor_kwargs.fp", "fps"),
    ({"fps": 0}, 400, "fps", "positive"),
    ({"adapter": "none"}, 400, "adapter", "no adapter"),
    ({"functions": []}, 400, "functions", "unknown"),
]  # fmt: skip


def check(reply, status, param, words):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert words in error["message"], error
    assert error["code"]


@pytest.mark.parametrize(("change", "status", "param", "words"), BAD, ids=lambda value: str(value)[:40])
def test_a_slip_is_named(post, change, status, param, words):
    check(post({**BASE, **change}), status, param, words)


@pytest.mark.parametrize("change", [BAD[0], BAD[11], BAD[18]], ids=str)
def test_a_stream_that_cannot_begin_is_a_plain_error(post, change):
    check(post({**BASE, **change[0], "stream": True}), *change[1:])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"[]", "send an object"), (b"\xff", "not valid JSON"),
        (b'{"model": NaN}', "NaN"), (b'{"model": "mini", "model": "mini"}', "given twice"), (b"[" * 100_000, "nested"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "too large"), (b'{"n": -1e400}', "too large"),
        (b'{"n": 18446744073709551616}', "too large"),
        (b'{"user": ' + b"[" * 65 + b"]" * 65 + b"}", "nested more than 64 deep"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_bodies_that_are_no_json(post, data, words):
    reply = post(data)
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]


def test_other_forms_of_wrong(post, server):
    assert post(BASE, **{"Content-Type": "text/plain"}).status_code == 415
    assert post(BASE, path="/v1/nothing").json()["error"]["code"] == "not_found"
    assert server.get("/v1/chat/completions").status_code == 405
    half = post(json.dumps({**BASE, "messages": user("\ud800")}).encode())
    assert half.status_code == 400 and "surrogate" in half.json()["error"]["message"]
    half = post(json.dumps({**BASE, "guided_json": {"const": "\ud800"}}).encode())
    assert half.status_code == 400 and half.json()["error"]["param"] == "guided_json" and "surrogate" in half.text


def test_typed_errors_of_the_client(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="mini", messages=user("hi"), temperature=101)
    assert error.value.param == "temperature" and error.value.type == "invalid_request_error"


def test_what_is_null_is_absent(post):
    assert post({**BASE, "temperature": None, "tools": None, "unheard_of": None}).status_code == 200


def test_nothing_died(post, server):
    assert post(BASE).status_code == 200
    defects = [line["traceback"].splitlines()[-1] for line in server.logged() if line["event"] == "defect"]
    assert not [said for said in defects if not said.startswith(f"RuntimeError: {PLANTED}")]
