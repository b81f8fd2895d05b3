"""What programs that people already have send beside OpenAI's barest form, as they were seen to send it (docs/serve.md,
*Works with*)."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from serving import data_uri, image, png, user

from mirada import VLM
from mirada.media.limits import FetchLimits
from mirada.serve import create_app, stream

BRIEF = {"max_tokens": 2, "temperature": 0}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}, "strict": True}}
KINDLY = [
    {"store": True, "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k"},
    {"modalities": ["text"], "verbosity": "medium", "prompt_cache_retention": "24h", "reasoning_effort": "none"},
    {"prediction": {"type": "content", "content": "x"}, "prompt_cache_options": {"mode": "explicit"}},
    {"tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": True},
    {"response_format": {"type": "text"}, "logit_bias": {}, "stop": [], "n": 1, "audio": None, "functions": None},
]


def chat(post, messages=None, **more):
    reply = post({"model": "echo", "messages": messages or user("say:yes"), **BRIEF, **more})
    assert reply.status_code == 200, reply.text
    return reply


@pytest.mark.parametrize("more", KINDLY, ids=lambda value: next(iter(value)))
def test_parameters_that_change_nothing_here(post, more):
    reply = chat(post, **more)
    assert reply.json()["choices"][0]["message"]["content"] == "yes" and "X-Mirada-Ignored" not in reply.headers


def test_an_answer_names_the_one_tier_that_there_is(post):
    assert chat(post, service_tier="flex").json()["service_tier"] == "default"
    assert "service_tier" not in chat(post).json()
    events = chat(post, service_tier="auto", stream=True).text.split("\n\n")
    assert all('"service_tier":"default"' in event for event in events if event.startswith("data: {"))
    asked = {"model": "echo", "input": "say:yes", "service_tier": "priority", "store": True}
    told = post(asked, path="/v1/responses").json()
    assert (told["service_tier"], told["store"]) == ("default", False)


def test_wishes_that_cannot_be_kept_to_are_named(post):
    assert chat(post, verbosity="low").headers["X-Mirada-Ignored"] == "verbosity"
    asked = {"model": "echo", "input": "say:yes", "text": {"verbosity": "high"}, "truncation": "auto"}
    reply = post(asked, path="/v1/responses")
    assert set(reply.headers["X-Mirada-Ignored"].split(", ")) == {"truncation", "text.verbosity"}
    assert (reply.json()["text"]["verbosity"], reply.json()["truncation"]) == ("medium", "disabled")


ECHOES = [
    {"refusal": None, "function_call": None, "audio": None, "annotations": [], "tool_calls": None, "content": "a"},
    {"content": None, "tool_calls": [CALL], "provider_specific_fields": {"refusal": None}},
    {"content": "", "tool_calls": [{**CALL, "provider_specific_fields": {"x": 1}, "index": 0}], "name": "bot"},
    {"content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}]},
]


@pytest.mark.parametrize("said", ECHOES, ids=str)
def test_an_earlier_answer_comes_back_as_programs_keep_it(post, said):
    history = [
        {"role": "developer", "name": "x", "content": [{"type": "text", "text": "Be brief."}]},
        *user("What?", image(data_uri(png()))),
        {"role": "assistant", **said},
        {"role": "tool", "name": "weather", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
        {"role": "user", "name": "bob", "content": "say:yes"},
    ]
    assert chat(post, history).json()["choices"][0]["message"]["content"] == "yes"


def test_responses_as_agents_ask(post):
    asked = {
        "model": "echo", "store": True, "truncation": "auto", "max_tool_calls": 3, "service_tier": "auto",
        "max_output_tokens": 16,
        "include": ["reasoning.encrypted_content", "web_search_call.action.sources"], "prompt_cache_retention": "24h",
        "reasoning": {"effort": "none", "summary": "detailed", "context": "auto"}, "text": {"verbosity": "low"},
        "input": [{"role": "user", "content": [{"type": "text", "text": "say:yes"}]}],
    }  # fmt: skip
    told = post(asked, path="/v1/responses").json()
    assert told["output"][0]["content"][0] == {"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_a_stream_that_has_nothing_to_show_says_that_it_lives(monkeypatch, path):
    """Pieces come and none holds text, as where reasoning is not told. Proxies would take it for dead."""
    monkeypatch.setattr(stream.Silence.__init__, "__defaults__", (0.0,))
    body = {"model": "mini", "stream": True, "ignore_eos": True, "thinking": "off"}
    asked = {"input": "hi", "max_output_tokens": 16} if path == "responses" else {"messages": user("hi"), "max_tokens": 12}

    async def said() -> str:
        body["logit_bias"] = {str(token): 100 for token in vlm.parts.eos}
        transport = httpx.ASGITransport(create_app({"mini": vlm}), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return (await http.post(f"/v1/{path}", json={**body, **asked})).text

    with VLM("mini", engine={"workers": 0}, limits=FetchLimits.serving()) as vlm:
        told = asyncio.run(said())
    assert told.count(stream.BEAT.decode()) >= 4, told
