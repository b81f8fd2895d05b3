"""Structured output and tools, asked for by the real ``openai`` client of a real server."""

from __future__ import annotations

import json
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field
from serving import user

OFF = {"thinking": "off"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CITY = {
    "type": "object", "required": ["city", "days"], "additionalProperties": False,
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
}  # fmt: skip


def tool(name, parameters=None):
    return {"type": "function", "function": {"name": name, **({} if parameters is None else {"parameters": parameters})}}


TOOLS = [tool("weather", CITY), tool("now")]
ARGUMENTS = {"weather": CITY, "now": {"const": {}}}


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["shop", "house"]
    floor: int = Field(ge=0, le=9)


class Sign(BaseModel):
    model_config = ConfigDict(extra="forbid")
    word: str = Field(max_length=6)
    code: str = Field(pattern="^[A-Z]{2}[0-9]$")
    places: list[Place] = Field(max_length=2)


def create(client, text="What is it?", model="echo", extra=OFF, **more):
    options = {"max_tokens": 300, "temperature": 0, **more}
    return client.chat.completions.create(model=model, messages=user(text), extra_body=extra, **options)


@pytest.mark.parametrize("way", [{"temperature": 0}, {"temperature": 1.5, "seed": 3}], ids=str)
def test_parse_gives_back_the_caller_s_own_type(client, way):
    reply = client.chat.completions.parse(
        model="mini", messages=user("Read the sign."), response_format=Sign, max_tokens=400, extra_body=OFF, **way
    )
    assert isinstance(reply.choices[0].message.parsed, Sign) and reply.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(
        model="mini", messages=user("Read the sign."), response_format=Sign, max_tokens=400, extra_body=OFF, **way
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.parsed == reply.choices[0].message.parsed


def test_several_answers_are_all_of_the_form(client):
    reply = create(client, response_format={"type": "json_object"}, n=3, seed=1, temperature=1.0, max_tokens=60)
    texts = [choice.message.content for choice in reply.choices]
    assert all(text.startswith("{") for text in texts) and len(set(texts)) > 1
    for choice in reply.choices:
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("extra", "good"),
    [
        ({"guided_json": {"enum": [17]}}, ["17"]),
        ({"guided_json": '{"const": "é"}'}, ['"é"']),
        ({"guided_regex": "[0-9]{3}x"}, None),
        ({"guided_choice": ["left", "right"]}, ["left", "right"]),
        ({"guided_grammar": 'start: "a" | "b"'}, ["a", "b"]),
        ({"structured_outputs": {"regex": "ab{2}"}}, ["abb"]),
        ({"structured_outputs": {"json": {"const": [1, 2]}, "disable_any_whitespace": True}}, ["[1,2]"]),
        ({"structured_outputs": {"choice": ["<answer>no</answer>"]}}, ["<answer>no</answer>"]),
    ],
    ids=str,
)
def test_what_users_of_vllm_send(client, extra, good):
    said = create(client, extra={**OFF, **extra}).choices[0]
    assert said.finish_reason == "stop"
    assert said.message.content in good if good else said.message.content[3:] == "x"
    chunks = list(create(client, extra={**OFF, **extra}, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said.message.content


def test_an_answer_that_is_cut_off_says_so(client):
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY, "strict": True}}
    whole = create(client, response_format=schema, logprobs=True, top_logprobs=1)
    cut = create(client, response_format=schema, max_tokens=5)
    assert (whole.choices[0].finish_reason, cut.choices[0].finish_reason) == ("stop", "length")
    jsonschema.validate(json.loads(whole.choices[0].message.content), CITY)
    assert whole.choices[0].message.content.startswith(cut.choices[0].message.content)
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens


def test_reasoning_comes_before_the_form(client):
    extra = {"thinking": "on", "thinking_budget": 6, "guided_json": CITY}
    reply = create(client, extra=extra, temperature=1.0, seed=4)
    message = reply.choices[0].message
    jsonschema.validate(json.loads(message.content), CITY)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens_details.reasoning_tokens <= 6


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_that_must_be(client, choice, parallel):
    options = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel, "max_tokens": 200}
    whole = create(client, **options).choices[0]
    calls = whole.message.tool_calls
    named = choice != "required"
    assert calls and (len(calls) == 1 or (parallel and not named)), whole
    if not parallel or named:
        assert whole.finish_reason == "tool_calls" and whole.message.content is None
    for call in calls if whole.finish_reason == "tool_calls" else calls[:-1]:
        jsonschema.validate(json.loads(call.function.arguments), ARGUMENTS[call.function.name])
    assert not named or calls[0].function.name == "weather"
    pieces = [p for chunk in create(client, **options, stream=True) for p in chunk.choices[0].delta.tool_calls or []]
    for index, call in enumerate(calls):
        told = [piece.function for piece in pieces if piece.index == index]
        assert told[0].name == call.function.name and not any(piece.name for piece in told[1:])
        assert "".join(piece.arguments or "" for piece in told) == call.function.arguments


def test_tools_of_a_pydantic_model(client):
    reply = client.chat.completions.parse(
        model="echo", messages=user("Where?"), tools=[openai.pydantic_function_tool(Place)], tool_choice="required",
        parallel_tool_calls=False, max_tokens=200, temperature=0, extra_body=OFF,
    )  # fmt: skip
    call = reply.choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Place)


@pytest.mark.parametrize("said", [CALL + CALL, f"Let me see. {CALL}\n{CALL} on", CALL])
def test_no_more_than_one_call_where_a_request_says_so(client, said):
    one = create(client, f"say:{said}", tools=TOOLS, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1 and one.choices[0].finish_reason == "tool_calls"
    both = create(client, f"say:{said}", tools=TOOLS)
    assert len(both.choices[0].message.tool_calls) == said.count("weather")
    assert (one.usage.completion_tokens < both.usage.completion_tokens) == (said != CALL)


def test_a_call_is_no_call_where_there_are_to_be_none(client):
    said = create(client, f"say:{CALL}", tools=TOOLS, tool_choice="none").choices[0]
    assert said.message.content == CALL and not said.message.tool_calls and said.finish_reason == "stop"


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


BAD = [
    (schema({"type": "objekt"}), "response_format", "response_format cannot be kept to: Invalid type"),
    (schema({"not": {}}), "response_format", "not"),
    ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
    ({"guided_regex": "("}, "guided_regex", "guided_regex cannot be kept to: unclosed group"),
    ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
    ({"guided_grammar": "start: <|im_start|>"}, "guided_grammar", "special token"),
    ({"guided_choice": ["\ud800"]}, "guided_choice", "surrogate"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed"),
    ({"structured_outputs": {"json": {"const": 1}, "whitespace_pattern": "("}}, "structured_outputs.json", ""),
    ({"tools": [TOOLS[1], tool("f", {"type": "nope"})], "tool_choice": "required"}, "tools[1].function.parameters",
     "Invalid type"),
    ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "tool_choice", "both say"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "words"), BAD, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_kept_to_is_named(post, change, param, words, stream):
    body = {"model": "echo", "messages": user("hi"), "max_tokens": 3, "stream": stream, **change}
    reply = post(json.dumps(body).encode())
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["type"] == "invalid_request_error", reply.text
    assert error["param"] == param and words in error["message"], error
    assert post({"model": "echo", "messages": user("say:alive")}).json()["choices"][0]["message"]["content"] == "alive"


def test_responses_with_a_form(client):
    reply = client.responses.parse(
        model="mini", input="Read the sign.", text_format=Sign, max_output_tokens=400, temperature=0, extra_body=OFF
    )
    assert isinstance(reply.output_parsed, Sign) and reply.status == "completed"
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "objekt"}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="mini", input="x", text=form)
    assert error.value.param == "text.format" and "text.format cannot be kept to: Invalid type" in error.value.message
    odd = {"type": "function", "name": "f", "parameters": {"type": "nope"}}
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="echo", input="x", tools=[odd], tool_choice="required")
    assert error.value.param == "tools[0].parameters"
    form = {"format": {"type": "json_object"}}
    cut = client.responses.create(model="mini", input="x", text=form, max_output_tokens=16, temperature=0, extra_body=OFF)
    assert cut.output_text.startswith("{")


def test_responses_with_a_call(client):
    function = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    options = {"model": "echo", "input": "Where?", "tools": [function], "tool_choice": {"type": "function", "name": "weather"},
               "temperature": 0, "max_output_tokens": 200, "parallel_tool_calls": False, "extra_body": OFF}  # fmt: skip
    whole = client.responses.create(**options)
    assert [item.type for item in whole.output] == ["function_call"] and whole.parallel_tool_calls is False
    jsonschema.validate(json.loads(whole.output[0].arguments), CITY)
    events = list(client.responses.create(**options, stream=True))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == whole.output[0].arguments and len(pieces) > 3
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.arguments for item in done] == [whole.output[0].arguments] and done[0].call_id
    added = next(event.item for event in events if event.type == "response.output_item.added")
    assert (added.name, added.arguments, added.id, added.call_id) == ("weather", "", done[0].id, done[0].call_id)
