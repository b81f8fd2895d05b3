"""Bodies of ``/v1/chat/completions`` both ways: what is understood, what is refused and how it is named."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest

from mirada import errors
from mirada.errors import MessageError, ParameterError
from mirada.records import completion_to_openai, error_to_openai, request_from_openai
from mirada.records.request import KNOWN, LABELS, RequestOptions
from mirada.types import Image, Logprob, Message, Output, Sampling, Text, ToolCall, Usage, Video

CHAT = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def read(**body):
    return request_from_openai({"messages": CHAT, **body})


def test_a_plain_body_takes_the_defaults():
    made = request_from_openai({"messages": CHAT}, defaults=Sampling(max_tokens=7))
    assert made == ([Message("user", "hi")], Sampling(max_tokens=7), RequestOptions())


SAMPLED = [
    ({"max_tokens": 3}, {"max_tokens": 3}),
    ({"max_tokens": 3, "max_completion_tokens": 4}, {"max_tokens": 4}),
    ({"temperature": 1, "top_p": 0.5, "top_k": 4, "min_p": 0.1}, {"temperature": 1, "top_p": 0.5, "top_k": 4, "min_p": 0.1}),
    ({"top_k": -1}, {"top_k": None}),
    ({"top_k": 0}, {"top_k": None}),
    ({"repetition_penalty": 1.1, "presence_penalty": -1}, {"repetition_penalty": 1.1, "presence_penalty": -1}),
    ({"frequency_penalty": 2}, {"frequency_penalty": 2}),
    ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": {5: -100, 7: 1.5}}),
    ({"seed": 3, "stop": "a"}, {"seed": 3, "stop": ("a",)}),
    ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    ({"logprobs": True}, {"logprobs": 0}),
    ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
    ({"logprobs": False}, {}),
    ({"ignore_eos": True, "thinking_budget": 5}, {"ignore_eos": True, "thinking_budget": 5}),
    ({"max_repeats": 9}, {"max_repeats": 9}),
    ({"temperature": None, "stop": None, "user": "u", "metadata": {}}, {}),
    ({"min_tokens": 3, "stop_token_ids": [5, 7], "include_stop_str_in_output": True},
     {"min_tokens": 3, "stop_token_ids": (5, 7), "include_stop_str_in_output": True}),
    ({"store": False, "service_tier": "default", "priority": 0, "skip_special_tokens": True}, {}),
    ({"prompt_cache_retention": "in_memory", "guided_decoding_backend": "auto"}, {}),
    ({"store": True, "service_tier": "flex", "modalities": ["text"], "prediction": {"type": "content", "content": "x"}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "made"), SAMPLED, ids=str)
def test_sampling(body, made):
    assert read(**body).sampling == Sampling(**made)


CHOSEN = [
    ({"model": "mini", "stream": True, "stream_options": {"include_usage": True}},
     {"model": "mini", "stream": True, "include_usage": True}),
    ({"n": 3, "adapter": "a", "parallel_tool_calls": False}, {"n": 3, "adapter": "a", "parallel_tool_calls": False}),
    ({"thinking": "on"}, {"thinking": "on", "thinking_param": "thinking"}),
    ({"thinking": False}, {"thinking": "off", "thinking_param": "thinking"}),
    ({"chat_template_kwargs": {"enable_thinking": False}},
     {"thinking": "off", "thinking_param": "chat_template_kwargs.enable_thinking"}),
    ({"chat_template_kwargs": {"thinking": "auto"}, "reasoning_effort": "high"},
     {"thinking": "auto", "thinking_param": "chat_template_kwargs.thinking"}),
    ({"reasoning_effort": "none"}, {"thinking": "off", "thinking_param": "reasoning_effort"}),
    ({"reasoning_effort": "low"}, {"thinking": "on", "thinking_param": "reasoning_effort"}),
    ({"include_reasoning": False, "request_id": "r-1"}, {"include_reasoning": False, "request_id": "r-1"}),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True, "include_obfuscation": False}},
     {"stream": True, "continuous_usage": True}),
    ({"response_format": {"type": "text"}}, {}),
    ({"structured_outputs": {"json_object": False}}, {}),
    ({"tools": [TOOL]}, {"tools": (TOOL,)}),
    ({"tools": [TOOL], "tool_choice": "required"}, {"tools": (TOOL,), "tool_choice": "required"}),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
     {"tools": (TOOL,), "tool_choice": "named", "tool_name": "f"}),
    ({"return_token_ids": True}, {"return_token_ids": True}),
]  # fmt: skip


FORMED = [
    ({"response_format": {"type": "json_object"}}, "response_format", {"json_schema": {"type": "object"}}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
     "response_format", {"json_schema": SCHEMA}),
    ({"guided_json": json.dumps(SCHEMA)}, "guided_json", {"json_schema": SCHEMA}),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, "guided_json",
     {"json_schema": {**SCHEMA, "x-guidance": {"whitespace_pattern": " ?"}}}),
    ({"guided_regex": "a+"}, "guided_regex", {"regex": "a+"}),
    ({"guided_choice": ["yes", "no"]}, "guided_choice", {"choice": ("yes", "no")}),
    ({"guided_grammar": "start: /a/"}, "guided_grammar", {"grammar": "start: /a/"}),
    ({"structured_outputs": {"choice": ["a"], "json": None}}, "structured_outputs.choice", {"choice": ("a",)}),
    ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}}, "structured_outputs.json_object",
     {"json_schema": {"type": "object", "x-guidance": {"whitespace_flexible": False}}}),
    ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}}, "structured_outputs.json",
     {"json_schema": {**SCHEMA, "x-guidance": {"whitespace_pattern": " ?"}}}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "made"), FORMED, ids=str)
def test_forms_of_the_answer(body, param, made):
    request = read(**body)
    assert request.options == RequestOptions(form_param=param)
    assert request.sampling == Sampling(**made)


@pytest.mark.parametrize(("body", "made"), CHOSEN, ids=str)
def test_options(body, made):
    assert read(**body).options == RequestOptions(**made)


WRONG = [
    ({"temperature": "hot"}, "temperature", "temperature='hot'"),
    ({"temperature": 101}, "temperature", "between 0 and 100"),
    ({"temperature": math.nan}, "temperature", "out of range"),
    ({"top_p": 0}, "top_p", "top_p=0"),
    ({"top_k": 1.5}, "top_k", "top_k=1.5"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": True}, "max_completion_tokens", "max_completion_tokens=True"),
    ({"stop": [""]}, "stop", "non-empty"),
    ({"stop": 3}, "stop", "a string"),
    ({"stop": [f"s{i}" for i in range(257)]}, "stop", "at most 256"),
    ({"stop_token_ids": list(range(257))}, "stop_token_ids", "at most 256"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": [1]}, "logit_bias", "token ids"),
    ({"logit_bias": {"1": math.inf}}, "logit_bias", "at most"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"min_tokens": -1}, "min_tokens", "at least 0"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "max_tokens"),
    ({"stop_token_ids": [1.5]}, "stop_token_ids", "token ids"),
    ({"stop_token_ids": 3}, "stop_token_ids", "list"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output", "True or False"),
    ({"include_reasoning": "no"}, "include_reasoning", "true or false"),
    ({"request_id": "a b"}, "request_id", "letters"),
    ({"store": 1}, "store", "true, or leave it out"),
    ({"store": 0}, "store", "false"),
    ({"service_tier": "fast"}, "service_tier", "default"),
    ({"prompt_cache_retention": "48h"}, "prompt_cache_retention", "in_memory"),
    ({"verbosity": "loud"}, "verbosity", "medium"),
    ({"modalities": ["text", "audio"]}, "modalities", "text"),
    ({"priority": 3}, "priority", "0"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "true"),
    ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "llguidance"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "JSON"),
    ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "JSON"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "false"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats", "true"),
    ({"media_io_kwargs": {"video": {"num_frames": -1}}}, "media_io_kwargs.video.num_frames", "positive"),
    ({"media_io_kwargs": {"audio": {}}}, "media_io_kwargs.audio", "unknown"),
    ({"media_io_kwargs": {"video": {"frames": 3}}}, "media_io_kwargs.video.frames", "num_frames"),
    ({"mm_processor_kwargs": {"num_frames": 0}}, "mm_processor_kwargs.num_frames", "positive"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice", "names"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
        {"type": "function", "function": {"name": "g"}}]}}}, "tool_choice", "known: f"),
    ({"logprobs": 3}, "logprobs", "true or false"),
    ({"logprobs": True, "top_logprobs": 101}, "top_logprobs", "top_logprobs=101"),
    ({"n": 0}, "n", "1 to 128"),
    ({"n": True}, "n", "whole number"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "for a stream"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "include_usage"),
    ({"model": 3}, "model", "text"),
    ({"thinking": "maybe"}, "thinking", "auto, on or off"),
    ({"chat_template_kwargs": {"enable_think": True}}, "chat_template_kwargs.enable_think", "enable_thinking"),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "minimal"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "JSON schema"),
    ({"guided_json": "{"}, "guided_json", "not JSON"),
    ({"guided_choice": []}, "guided_choice", "at least one"),
    ({"guided_regex": ""}, "guided_regex", "non-empty"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format", "two forms"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object", "true or false"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "unknown"),
    ({"regex": "a"}, "regex", "unknown"),
    ({"guided_regex": "a", "tools": [TOOL], "tool_choice": "required"}, "tool_choice", "both say"),
    ({"tools": [{"type": "web"}]}, "tools[0]", "function"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function", "name"),
    ({"tools": [{"function": {"name": "f", "parameters": 3}}]}, "tools[0].function.parameters", "object"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tool_choice": "perhaps"}, "tool_choice", "auto, none, required"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "known: f"),
    ({"fps": 0}, "fps", "positive"),
    ({"fps": 1, "nframes": 4}, "nframes", "one of them"),
    ({"mm_processor_kwargs": {"max_pixels": 1.5}}, "mm_processor_kwargs.max_pixels", "whole"),
    ({"mm_processor_kwargs": {"size": 3}}, "mm_processor_kwargs.size", "unknown"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": None}, "messages", "no messages"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "said"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_names_its_parameter(body, param, said):
    with pytest.raises(ParameterError, match=said) as caught:
        read(**body)
    assert caught.value.param == param
    status, answer = error_to_openai(caught.value)
    assert status == 400 and answer["error"]["param"] == param and answer["error"]["type"] == "invalid_request_error"
    json.dumps(answer)


def test_a_body_or_messages_of_no_known_form_are_message_errors():
    for body in ([], "x", {"messages": [{"role": "cat", "content": "x"}]}, {"messages": "hi"}):
        with pytest.raises(MessageError):
            request_from_openai(body)


def test_unknown_parameters_may_be_collected():
    body = {"messages": CHAT, "zeal": 3, "best_of": 2, "temperature": 1}
    assert request_from_openai(body, allow_unknown=True).options.unknown == ("zeal", "best_of")
    assert request_from_openai({"messages": CHAT, "zeal": None}).options.unknown == ()


def test_settings_of_media_reach_those_that_have_none_of_their_own():
    parts = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "image": "b.png", "max_pixels": 9},
        {"type": "video_url", "video_url": {"url": "v.mp4"}},
        {"type": "video", "video": "w.mp4", "nframes": 3},
        {"type": "text", "text": "x"},
    ]
    chat = [{"role": "user", "content": parts}]
    made = request_from_openai({"messages": chat, "fps": 2, "mm_processor_kwargs": {"max_pixels": 5}, "max_pixels": 7})
    assert made.messages[0].parts == (
        Image("a.png", max_pixels=7),
        Image("b.png", max_pixels=9),
        Video("v.mp4", fps=2.0, max_pixels=7),
        Video("w.mp4", nframes=3, max_pixels=7),
        Text("x"),
    )


def test_every_known_parameter_is_taken_by_a_case_above_or_has_no_effect():
    used = {key for body, *_ in SAMPLED + CHOSEN + FORMED + WRONG for key in body}
    assert KNOWN - set(LABELS) - used == {"min_pixels", "max_pixels"}  # the test before this one


def test_settings_of_media_under_the_names_of_others():
    chat = [{"role": "user", "content": [{"image": "a.png"}, {"video": "v.mp4"}, {"video": "w.mp4", "fps": 1}]}]
    kwargs = {"num_frames": 6, "max_frames": 9, "min_frames": 2, "total_pixels": 5000, "min_pixels": 3}
    made = request_from_openai({"messages": chat, "mm_processor_kwargs": kwargs})
    sized = {"min_frames": 2, "max_frames": 9, "total_pixels": 5000, "min_pixels": 3}
    wanted = Image("a.png", min_pixels=3), Video("v.mp4", nframes=6, **sized), Video("w.mp4", fps=1, **sized)
    assert made.messages[0].parts == wanted
    io = {"video": {"num_frames": 4}}
    made = request_from_openai({"messages": chat, "media_io_kwargs": io})
    assert made.messages[0].parts[1:] == (Video("v.mp4", nframes=4), Video("w.mp4", fps=1))
    made = request_from_openai({"messages": chat, "media_io_kwargs": io, "mm_processor_kwargs": {"num_frames": 5}})
    assert made.messages[0].parts[1] == Video("v.mp4", nframes=5)


def test_only_tools_that_are_allowed_are_told():
    tools = [{"type": "function", "function": {"name": name}} for name in "fgh"]
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": name}} for name in "hf"]}
    made = read(tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}).options
    assert ([tool["function"]["name"] for tool in made.tools], made.tool_choice) == (["f", "h"], "required")


def test_what_nobody_knows_is_told_wherever_it_stands():
    picture = {"type": "image_url", "image_url": {"url": "a.png", "zoom": 2}, "sharp": True}
    call = {"id": "c", "function": {"name": "f", "arguments": "{}", "strict": True}}
    body: Any = {
        "messages": [{"role": "user", "content": [picture], "mood": "good"}, {"role": "assistant", "tool_calls": [call]}],
        "temprature": 1, "stream": True, "stream_options": {"usage": True}, "chat_template_kwargs": {"enable_think": True},
        "mm_processor_kwargs": {"size": 3}, "structured_outputs": {"xml": 1}, "media_io_kwargs": {"audio": {}},
    }  # fmt: skip
    made = request_from_openai(body, allow_unknown=True)
    assert sorted(made.options.unknown) == sorted((
        "temprature", "messages[0].mood", "messages[0].content[0].sharp", "messages[0].content[0].zoom", "messages[1].strict",
        "structured_outputs.xml", "stream_options.usage", "chat_template_kwargs.enable_think", "media_io_kwargs.audio",
        "mm_processor_kwargs.size",
    ))  # fmt: skip
    assert made.messages[0].parts == (Image("a.png"),)
    for key in body:
        if key not in ("stream", "temprature"):
            with pytest.raises(errors.InputError):
                request_from_openai({"messages": [{"role": "user", "content": "x"}], "stream": True, key: body[key]})


def answer(output, **more):
    made = completion_to_openai(output, model="m", id="c", created=1, **more)
    json.dumps(made, allow_nan=False)
    return made


def test_a_whole_answer():
    calls = (ToolCall("f", '{"a": 1}'), ToolCall("g", "{}", "id7"))
    usage = Usage(10, 3, 1, image_tokens=4, video_tokens=2, num_frames=2, timestamps=((0.0, 0.5),), cached_tokens=5)
    output = Output(Message("assistant", (Text("hi"), *calls), reasoning="hm"), (1, 2, 3), finish="tool_calls", usage=usage)
    made = answer(output, return_token_ids=True)
    (choice,) = made["choices"]
    assert choice["message"]["content"] == "hi" and choice["message"]["reasoning_content"] == "hm"
    assert [c["id"] for c in choice["message"]["tool_calls"]] == ["call_0", "id7"]
    assert choice["finish_reason"] == "tool_calls" and choice["token_ids"] == [1, 2, 3] and choice["logprobs"] is None
    assert made["usage"]["total_tokens"] == 13 and made["usage"]["completion_tokens_details"] == {"reasoning_tokens": 1}
    assert made["usage"]["prompt_tokens_details"] == {"cached_tokens": 5, "image_tokens": 4, "video_tokens": 2}
    assert made["usage"]["timestamps"] == [[0.0, 0.5]]


def test_calls_without_text_have_null_content_and_repetition_is_said():
    assert answer(Output(Message("assistant", ToolCall("f", "{}"))))["choices"][0]["message"]["content"] is None
    choice = answer(Output(Message("assistant", "la la"), finish="repetition"))["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "repetition")


def test_logprobs_hold_text_and_bytes_and_no_infinity():
    output = Output(Message("assistant", "é"), (1,), (Logprob(1, -0.5, ((1, -0.5), (2, -math.inf))),))
    (entry,) = answer(output, token_bytes=lambda t: b"\xc3")["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "�" and entry["bytes"] == [0xC3] and entry["top_logprobs"][1]["logprob"] == -9999.0
    (entry,) = answer(output)["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "token_id:1" and entry["bytes"] is None


def test_several_choices_count_their_prompt_once():
    one = Output(Message("assistant", "a"), usage=Usage(10, 3))
    made = answer([one, one])
    assert [c["index"] for c in made["choices"]] == [0, 1]
    assert made["usage"] == {**made["usage"], "prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}


def test_a_failure_is_no_completion():
    with pytest.raises(errors.OutOfMemory):
        answer([Output(), Output(finish="error", error=errors.OutOfMemory("no room"))])


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (errors.ContextOverflow("long"), 400, "context_length_exceeded", "messages"),
        (errors.MediaNotFound("none"), 400, "media_not_found", "messages"),
        (errors.QueueFull("full"), 429, "queue_full", None),
        (errors.OutOfMemory("no"), 503, "out_of_memory", None),
        (errors.RemoteRejected("no", status=400), 400, "remote_rejected", None),
        (errors.RemoteBusy("no", status=429), 503, "remote_busy", None),
        (errors.RequestFailed("died"), 500, "request_failed", None),
    ],
)
def test_errors_in_the_shape_of_openai(error, status, code, param):
    got, body = error_to_openai(error)
    assert (got, body["error"]["code"], body["error"]["param"]) == (status, code, param)
    assert body["error"]["message"] == str(error)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"guided_json": "[" * 100_000}, "guided_json is not JSON"),
        ({"structured_outputs": {"json": '{"items":' * 100_000}}, "structured_outputs.json is not JSON"),
        ({"x" * 3_000_000: 1}, "unknown"),
        ({"mm_processor_kwargs": {"x" * 3_000_000: 1}}, "unknown"),
        ({"tools": [{"function": {"name": "a" * 190 + f"{n:06d}"}} for n in range(2000)],
          "tool_choice": {"type": "function", "function": {"name": "a" * 196}}}, "no tool"),
    ],
    ids=range(5),
)  # fmt: skip
def test_what_is_very_deep_or_very_long_is_refused_soon(body, said):
    began = time.thread_time()
    with pytest.raises(ParameterError, match=said) as caught:
        read(**body)
    assert time.thread_time() - began < 2
    assert len(caught.value.param) < 500 and len(str(caught.value)) < 50_000


def test_very_many_tools_are_chosen_among_soon():
    names = [f"f{number}" for number in range(20_000)]
    tools, allowed = ([{"type": "function", "function": {"name": name}} for name in found] for found in (names, names[::-1]))
    began = time.thread_time()
    made = read(tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": allowed}})
    assert len(made.options.tools) == len(names) and time.thread_time() - began < 3  # each with each: half a minute


def test_a_schema_that_nothing_fulfils_has_no_white_space():
    made = read(structured_outputs={"json": False, "whitespace_pattern": " "})
    assert made.sampling.json_schema is False
