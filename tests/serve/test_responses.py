"""``/v1/responses`` with the real ``openai`` client."""

from __future__ import annotations

import openai
import pytest
from serving import data_uri, image, png, user

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
    assert last.response.usage == whole.usage
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


BAD = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"input": None}, "input"),
    ({"inputs": "x"}, "inputs"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"input": [{"type": "file"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"truncation": "auto"}, "truncation"),
    ({"reasoning": 3}, "reasoning"),
    ({"metadata": {"a": 3}}, "metadata"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=str)
def test_slips_are_named(post, change, param):
    reply = post({"model": "echo", "input": "say:x", **change}, path="/v1/responses")
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text


def test_a_stream_that_cannot_begin_is_a_plain_error(client):
    with pytest.raises(openai.BadRequestError):
        client.responses.create(
            model="mini",
            input=[{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}],
            stream=True,
        )
