"""``/v1/responses`` with the real ``openai`` client."""

from __future__ import annotations

import openai
import pytest
from oracle import judged
from serving import data_uri, image, png, uncached, user

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TOOLS = [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]


@pytest.mark.parametrize("said", ["plain words", f"<think>why</think>I look. {CALL}"])
def test_whole_and_streamed_are_the_same(client, said):
    whole = client.responses.create(model="echo", input=f"say:{said}", tools=TOOLS)
    events = list(client.responses.create(model="echo", input=f"say:{said}", tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert (events[0].type, last.type, whole.status) == ("response.created", "response.completed", "completed")
    assert (
        last.response.output_text
        == whole.output_text
        == "".join(event.delta for event in events if event.type == "response.output_text.delta")
    )
    assert [item.type for item in last.response.output] == [item.type for item in whole.output]
    assert uncached(last.response.usage) == uncached(whole.usage)
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == last.response.output
    if "Oslo" in said:
        assert [item.type for item in done] == ["reasoning", "message", "function_call"]
        assert done[-1].arguments == '{"city": "Oslo"}' and whole.output[0].content[0].text == "why"


def test_pictures_instructions_and_a_conversation(client):
    parts = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": data_uri(png())}]
    seen = client.responses.create(model="mini", input=[{"role": "user", "content": parts}], max_output_tokens=2)
    shown = [{"role": "user", "content": [{"type": "text", "text": "What?"}, image(data_uri(png()))]}]
    chat = client.chat.completions.create(model="mini", max_tokens=2, messages=shown)
    assert seen.output_text == chat.choices[0].message.content
    assert seen.usage.input_tokens == chat.usage.prompt_tokens and seen.usage.input_tokens_details.image_tokens > 0
    longer = client.responses.create(model="echo", input="say:x", instructions="Be brief.")
    assert longer.usage.input_tokens > client.responses.create(model="echo", input="say:x").usage.input_tokens
    call = client.responses.create(model="echo", input=f"say:{CALL}", tools=TOOLS).output[0]
    turns = [*user("weather?"), call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    assert client.responses.create(model="echo", input=[*turns, *user("say:It rains.")], tools=TOOLS).output_text == "It rains."


def test_what_was_asked_comes_back(client):
    made = client.responses.create(
        model="echo", input="say:x", temperature=1.5, metadata={"a": "b"}, instructions="Be brief.", max_output_tokens=9
    )
    assert (made.temperature, made.metadata, made.instructions, made.max_output_tokens) == (1.5, {"a": "b"}, "Be brief.", 9)
    hot = client.responses.create(model="mini", input="x", temperature=50, max_output_tokens=1)
    assert hot.temperature is None  # OpenAI's form has no number above 2


def test_what_is_cut_is_incomplete(client):
    cut = client.responses.create(model="echo", input="say:one two three four", max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert [item.status for item in cut.output] == ["incomplete"]
    said = f"<think>why</think>I look. {CALL}"
    whole = client.responses.create(model="echo", input=f"say:{said}", tools=TOOLS)
    most = whole.usage.output_tokens - 3  # within the call
    cut = client.responses.create(model="echo", input=f"say:{said}", tools=TOOLS, max_output_tokens=most)
    assert cut.status == "incomplete" and [item.status for item in cut.output] == ["completed", "completed", "incomplete"]
    events = list(client.responses.create(model="echo", input=f"say:{said}", tools=TOOLS, max_output_tokens=most, stream=True))
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert events[-1].type == "response.incomplete" and done == events[-1].response.output
    assert [item.status for item in done] == ["completed", "completed", "incomplete"]


def test_an_answer_that_repeats_itself_says_why_it_ended(client):
    words = "on and on " * 400
    made = client.responses.create(model="echo", input=f"say:{words}", extra_body={"max_repeats": 2})
    assert made.status == "incomplete" and made.model_extra["stop_reason"] == "repetition"
    stopped = client.responses.create(model="echo", input="say:one two three", extra_body={"stop": ["two"]})
    assert stopped.status == "completed" and stopped.model_extra["stop_reason"] == "two" and stopped.output_text == "one "


def both(client, chat, **items):
    """(usage of chat completions, usage of responses) of the same conversation."""
    tools = [{"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}} for tool in TOOLS]
    asked = {"model": "echo", "tools": tools}
    one = client.chat.completions.create(messages=chat, **asked).usage
    other = client.responses.create(model="echo", tools=TOOLS, **items).usage
    return one, other


def test_an_earlier_answer_is_read_as_one_turn(client, server):
    """The whole of ``response.output`` goes back in, with two calls at once; the prompt is that of chat completions."""
    said = f"<think>why</think>I look. {CALL}\n{CALL}"
    first = client.responses.create(model="echo", input=f"say:{said}", tools=TOOLS)
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call", "function_call"]
    calls = first.output[2:]
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls]
    asked = [*user("weather?"), *first.output, *results, *user("say:It rains twice over all of the town.")]
    told = [
        {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
    ]
    chat = [
        *user("weather?"),
        {"role": "assistant", "content": "I look. ", "reasoning_content": "why", "tool_calls": told},
        *({"role": "tool", "tool_call_id": call.call_id, "content": "rain"} for call in calls),
        *user("say:It rains twice over all of the town."),
    ]  # fmt: skip
    chat[1]["content"] = first.output[1].content[0].text
    one, other = both(client, chat, input=asked)
    assert one.prompt_tokens == other.input_tokens
    # The tokens are the same ones: what the first left is found by the second.
    size = other.input_tokens // 16 * 16
    assert other.input_tokens_details.cached_tokens >= size - 16 > 0


def test_what_a_tool_gives_back_may_be_a_picture(client):
    picture = {"type": "input_image", "image_url": data_uri(png())}
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "Look"}, picture]}
    made = client.responses.create(model="echo", input=[*user("x"), call, output, *user("say:seen")], tools=TOOLS)
    assert made.output_text == "seen" and made.usage.input_tokens_details.image_tokens > 0
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert client.responses.create(model="echo", input=[*user("x"), refused, *user("say:fine")]).output_text == "fine"


def test_only_some_tools_are_allowed(client):
    other = {"type": "function", "name": "other", "parameters": {"type": "object"}}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    asked = {"model": "echo", "input": "go", "max_output_tokens": 60, "extra_body": {"thinking": "off"}}
    made = client.responses.create(**asked, tools=[*TOOLS, other], tool_choice=allowed)
    assert made.output[-1].name == "weather"


LOGPROBS = ["message.output_text.logprobs"]


def test_logprobs_are_those_of_the_text(client):
    asked = {"model": "echo", "input": f"say:<think>why</think>I look. {CALL}", "tools": TOOLS}
    made = client.responses.create(**asked, include=LOGPROBS, top_logprobs=2)
    part = made.output[1].content[0]
    assert "".join(one.token for one in part.logprobs).strip() == part.text.strip() == "I look."
    assert all(len(one.top_logprobs) == 2 and one.bytes for one in part.logprobs)
    events = list(client.responses.create(**asked, include=LOGPROBS, top_logprobs=2, stream=True))
    told = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    done = next(event for event in events if event.type == "response.output_text.done")
    assert told == [one.token for one in part.logprobs] == [one.token for one in done.logprobs]
    plain = client.responses.create(model="echo", input="say:ab", include=LOGPROBS).output[0].content[0]
    assert "".join(one.token for one in plain.logprobs) == "ab" and plain.logprobs[0].top_logprobs == []
    assert client.responses.create(model="echo", input="say:ab").output[0].content[0].logprobs == []


def test_what_an_earlier_request_computed_is_told(client):
    words = "say:done " + " ".join(f"word{n}" for n in range(60))
    first = client.responses.create(model="echo", input=words).usage
    again = client.responses.create(model="echo", input=words).usage
    chat = client.chat.completions.create(model="echo", messages=user(words)).usage
    assert first.input_tokens_details.cached_tokens < 48 < again.input_tokens_details.cached_tokens
    assert chat.prompt_tokens_details.cached_tokens == again.input_tokens_details.cached_tokens < again.input_tokens


def test_the_clients_own_stream_puts_it_together(client):
    said = f"<think>why</think>I look. {CALL}"
    with client.responses.stream(model="echo", input=f"say:{said}", tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.output[2].arguments == '{"city": "Oslo"}'


TEXT = {"type": "input_text", "text": "x"}
BAD = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"input": None}, "input"),
    ({"inputs": "x"}, "inputs"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"input": [{"type": "file"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"truncation": "middle"}, "truncation"),
    ({"reasoning": 3}, "reasoning"),
    ({"metadata": {"a": 3}}, "metadata"),
    ({"tools": 3}, "tools"),
    ({"tools": False}, "tools"),
    ({"input": [*user("x"), {"role": "robot", "content": "y"}]}, "input[1]"),
    (
        {"instructions": "Be brief.", "input": [{"type": "reasoning", "summary": []}, {"role": "robot", "content": "y"}]},
        "input[1]",
    ),
    ({"input": [{"role": "user", "content": [TEXT, {"type": "input_text", "text": 3}]}]}, "input[0].content[1]"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": [TEXT, 3]}]}, "input[0].output[1]"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]}]}, "input[0].output[0]"),
    ({"input": [{"type": "function_call", "name": 3}]}, "input[0]"),
    ({"input": [{"role": "user", "content": "x", "contents": "y"}]}, "input[0].contents"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input[0].content[0]"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x", "detail": "huge"}]}]},
        "input[0].content[0]",
    ),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}]}, "input"),
    ({"input": "x " * 200000}, "input"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": 3}}, "text.format"),
    ({"text": {"frmat": {}}}, "text.frmat"),
    ({"text": {"verbosity": "loud"}}, "text.verbosity"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"reasoning": {"efort": "low"}}, "reasoning.efort"),
    ({"reasoning": {"summary": "short"}}, "reasoning.summary"),
    ({"reasoning": {"context": "current_turn"}}, "reasoning.context"),
    ({"max_tool_calls": 0}, "max_tool_calls"),
    ({"prediction": {}}, "prediction"),
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "name": "f", "parameters": 3}]}, "tools[0].parameters"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}}, "tool_choice"),
    ({"include": ["reasoning"]}, "include[0]"),
    ({"include": 3}, "include"),
    ({"top_logprobs": 101}, "top_logprobs"),
    ({"store": 1}, "store"),
    ({"stream_options": {"include_usage": True}}, "stream_options.include_usage"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"min_tokens": 9, "max_output_tokens": 3}, "min_tokens"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda given: str(given)[:80])
def test_slips_are_named(post, change, param):
    reply = post({"model": "echo", "input": "say:x", **change}, path="/v1/responses")
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param, reply.text[:400]
    assert "messages[" not in error["message"] and "of message " not in error["message"], error["message"]


def test_a_stream_that_cannot_begin_is_a_plain_error(client):
    with pytest.raises(openai.BadRequestError):
        client.responses.create(
            model="mini",
            input=[{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}],
            stream=True,
        )


def test_openais_document_judges_all_that_is_said_here(client, server):
    """Each kind of answer and event is among those that were judged: a record that stays empty would pass otherwise."""
    test_the_clients_own_stream_puts_it_together(client)
    client.chat.completions.create(model="echo", messages=user("say:x"))
    list(client.chat.completions.create(model="echo", messages=user("say:x"), stream=True))
    client.responses.create(model="echo", input="say:x")
    client.models.list()
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="echo", messages=[])
    before = dict(judged)
    server.judge()
    new = {name for name, count in judged.items() if count > before.get(name, 0)}
    assert new >= {
        "CreateChatCompletionResponse", "CreateChatCompletionStreamResponse", "Response", "ListModelsResponse", "ErrorResponse",
        "ResponseCreatedEvent", "ResponseCompletedEvent", "ResponseOutputItemAddedEvent", "ResponseOutputItemDoneEvent",
        "ResponseTextDeltaEvent", "ResponseTextDoneEvent", "ResponseReasoningTextDeltaEvent",
        "ResponseFunctionCallArgumentsDeltaEvent", "ResponseFunctionCallArgumentsDoneEvent",
    }  # fmt: skip
