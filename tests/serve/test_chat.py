"""The real ``openai`` client against a real server."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import openai
import pytest
from PIL import Image
from pydantic import BaseModel, Field, create_model
from serving import KEY, data_uri, gif, image, png, uncached, user

from mirada import VLM, Message, Sampling
from mirada import Image as Picture

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
STRICT: Any = [openai.pydantic_function_tool(create_model("weather", city=(str, ...)), name="weather")]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def mini():
    with VLM("mini", engine={"workers": 0}) as vlm:
        yield vlm


def create(client, text, model="echo", **more):
    return client.chat.completions.create(model=model, messages=user(text), **more)


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["mini", "echo", "loud"]
    assert client.models.retrieve("mini").max_model_len == 4096
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("mimi")
    assert error.value.code == "model_not_found" and "did you mean 'mini'" in error.value.message


def test_an_answer_is_what_the_front_door_gives(client, mini):
    reply = client.chat.completions.create(
        model="mini", messages=user("What is this?", image(data_uri(png()))), max_tokens=8, temperature=0
    )
    chat = [Message("user", (Picture(png()), "What is this?"))]
    output = mini.submit(chat, Sampling(max_tokens=8)).result()
    assert reply.choices[0].message.content == output.message.text
    assert reply.usage.prompt_tokens == output.usage.prompt_tokens
    assert reply.usage.completion_tokens == output.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.image_tokens == output.usage.image_tokens > 0
    assert reply.id.startswith("chatcmpl-") and reply.object == "chat.completion" and reply.model == "mini"


def test_pictures_come_as_data_from_an_address_and_from_the_root(client, server, site):
    (server.folder / "a.png").write_bytes(png())
    sources = [data_uri(png()), f"{site}/a.png", f"file://{server.folder}/a.png"]
    replies = [
        client.chat.completions.create(model="mini", messages=user("What is this?", image(url)), max_tokens=4)
        for url in sources
    ]
    assert len({reply.choices[0].message.content for reply in replies}) == 1
    two = client.chat.completions.create(model="mini", messages=user("What?", *map(image, sources[:2])), max_tokens=1)
    assert two.usage.prompt_tokens_details.image_tokens == 2 * replies[0].usage.prompt_tokens_details.image_tokens


def test_video_settings_reach_the_model_and_usage_says_what_was_used(client):
    def ask(**extra):
        video = {"type": "video_url", "video_url": {"url": data_uri(gif(), "image/gif")}}
        reply = client.chat.completions.create(
            model="mini", messages=user("What happens?", video), max_tokens=1, extra_body=extra
        )
        return reply.usage

    few, many = ask(nframes=4), ask(mm_processor_kwargs={"nframes": 6})
    assert (few.num_frames, many.num_frames) == (4, 6)
    assert len(few.timestamps[0]) == 4 and few.timestamps[0] == sorted(few.timestamps[0])
    assert 0 < few.prompt_tokens_details.video_tokens < many.prompt_tokens_details.video_tokens


@pytest.mark.parametrize(
    "said", ["plain words", "<think>why</think>because", f"I look. {CALL}", CALL + CALL, "<tool_call>{broken</tool_call>"]
)
def test_a_stream_is_the_whole_reply(client, said):
    whole = create(client, f"say:{said}", tools=TOOLS).choices[0]
    chunks = list(create(client, f"say:{said}", tools=TOOLS, stream=True))
    assert all(chunk.object == "chat.completion.chunk" and chunk.id == chunks[0].id for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and not any(delta.role for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == (whole.message.content or "")
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert reasoning == (getattr(whole.message, "reasoning_content", None) or "")
    pieces = [piece for delta in deltas for piece in delta.tool_calls or []]
    begun = [piece for piece in pieces if piece.function.name]
    told = whole.message.tool_calls or []
    assert [piece.index for piece in begun] == list(range(len(told)))  # a name, then its arguments
    assert [piece.index for piece in pieces] == sorted(piece.index for piece in pieces)
    assert [piece.function.name for piece in begun] == [call.function.name for call in told]
    for call, first in zip(told, begun, strict=True):
        arguments = [piece.function.arguments or "" for piece in pieces if piece.index == first.index]
        assert "".join(arguments) == call.function.arguments and len(arguments) > 2
    assert len({call.id for call in (*begun, *told)}) == 2 * len(told)  # no name comes twice
    assert all(not (piece.id or piece.type) for piece in pieces if not piece.function.name)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.finish_reason
    assert whole.finish_reason == ("tool_calls" if told else "stop")
    assert len(told) == said.count('"weather"')


def test_a_conversation_with_a_tool_goes_on(client):
    call = create(client, f"say:{CALL}", tools=TOOLS).choices[0].message
    messages = [
        *user("weather?"), call.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "rain"}, *user("say:It rains."),
    ]  # fmt: skip
    reply = client.chat.completions.create(model="echo", messages=messages, tools=TOOLS)
    assert reply.choices[0].message.content == "It rains."
    bare = create(client, "say:x", tools=TOOLS, tool_choice="none")
    assert bare.usage.prompt_tokens == create(client, "say:x").usage.prompt_tokens  # the tools are not shown


def test_usage_comes_last_where_it_is_asked_for(client):
    chunks = list(create(client, "say:one two", stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1]) and chunks[-1].choices == []
    assert uncached(chunks[-1].usage) == uncached(create(client, "say:one two").usage)
    assert all(chunk.usage is None for chunk in create(client, "say:one two", stream=True))


def test_reasoning_is_counted(client):
    reply = create(client, "say:<think>long thought</think>yes")
    assert reply.choices[0].message.reasoning_content == "long thought" and reply.choices[0].message.content == "yes"
    assert 0 < reply.usage.completion_tokens_details.reasoning_tokens < reply.usage.completion_tokens


def test_lengths_stops_and_choices(client):
    cut = create(client, "say:one two three four five six", max_completion_tokens=3)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    stopped = create(client, "say:one two three", stop=["two"])
    assert (stopped.choices[0].finish_reason, stopped.choices[0].message.content) == ("stop", "one ")
    many = create(client, "tell", model="mini", n=3, temperature=1.5, seed=1, max_tokens=8)
    again = create(client, "tell", model="mini", n=3, temperature=1.5, seed=1, max_tokens=8)
    texts = [choice.message.content for choice in many.choices]
    assert [choice.index for choice in many.choices] == [0, 1, 2] and len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]
    chunks = list(create(client, "tell", model="mini", n=3, temperature=1.5, seed=1, max_tokens=8, stream=True))
    for index in range(3):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == texts[index]
        assert [choice.finish_reason for choice in mine if choice.finish_reason]


def test_an_endless_answer_ends_and_says_why(client):
    reply = create(client, "say:" + "ab" * 80, extra_body={"max_repeats": 2})
    assert (reply.choices[0].finish_reason, reply.choices[0].stop_reason) == ("length", "repetition")


def test_logprobs_whole_and_streamed(client):
    ask = {"model": "mini", "logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    whole = create(client, "hello", **ask).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in create(client, "hello", stream=True, **ask)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert whole == streamed and whole
    for entry in whole:
        assert len(entry.top_logprobs) == 2 and entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


def test_sampling_reaches_the_engine(client):
    free = create(client, "hello", model="mini", max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
    token = create(client, "hello", model="mini", max_tokens=1, extra_body={"return_token_ids": True}).choices[0].token_ids[0]
    barred = create(client, "hello", model="mini", max_tokens=1, logit_bias={token: -100}, logprobs=True)
    assert barred.choices[0].logprobs.content[0].token != free.token


def test_thinking_is_switched(client):
    def count(**extra):
        return create(client, "say:x", extra_body=extra).usage.prompt_tokens

    assert count() < count(thinking="on") < count(thinking="off")  # /think and /no_think
    assert count(chat_template_kwargs={"enable_thinking": True}) == count(thinking="on")
    assert count(chat_template_kwargs={"enable_thinking": False}) == count(thinking="off")


def test_async_clients_stream_beside_each_other(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def one(number):
                stream = await client.chat.completions.create(model="echo", messages=user(f"say:number {number}"), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, range(8)))

    assert asyncio.run(run()) == [f"number {number}" for number in range(8)]


def test_events_have_the_form_of_server_sent_events(post):
    reply = post({"model": "echo", "messages": user("say:a"), "stream": True}, **{"X-Request-Id": "my-own.1"})
    assert reply.headers["content-type"].startswith("text/event-stream") and reply.headers["x-request-id"] == "my-own.1"
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_usage_in_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(create(client, "say:one two", stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] <= 1 < counts[-2] == counts[-1] == chunks[-1].usage.completion_tokens
    prompts = {chunk.usage.prompt_tokens for chunk in chunks if chunk.usage.completion_tokens}
    assert prompts == {chunks[-1].usage.prompt_tokens}


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_may_be_left_out(client, stream):
    made = create(client, "say:<think>why</think>so", stream=stream, extra_body={"include_reasoning": False})
    said = [chunk.choices[0].delta for chunk in made if chunk.choices] if stream else [made.choices[0].message]
    assert "".join(one.content or "" for one in said) == "so"
    assert not any(getattr(one, "reasoning_content", None) for one in said)


def test_a_request_may_name_its_answer(client):
    assert create(client, "say:x", extra_body={"request_id": "mine-1"}).id == "chatcmpl-mine-1"


def test_what_ended_an_answer_is_told(client):
    assert create(client, "say:a b c", stop=["b"]).choices[0].model_extra["stop_reason"] == "b"
    *_, last = create(client, "say:a b c", stop=["b"], stream=True)
    assert last.choices[0].model_extra["stop_reason"] == "b"
    assert "stop_reason" not in create(client, "say:a b c").choices[0].model_extra
    kept = create(client, "say:a b c", stop=["b"], extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == "a b"
    thought = create(client, "say:<think>b</think>a b c", stop=["b"]).choices[0].message
    assert (thought.content.strip(), thought.reasoning_content) == ("a", "b")


def turned() -> bytes:
    """A picture as a phone has it that was held upright."""
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60), (10, 200, 10)).save(out, "JPEG", exif=exif)
    return out.getvalue()


def test_notes_come_with_a_stream_too(client):
    shown = user("What?", image(data_uri(turned(), "image/jpeg")))
    ask: Any = {"model": "mini", "max_tokens": 2, "messages": shown}
    notes = client.chat.completions.create(**ask, n=2).model_extra["notes"]
    assert len(notes) == 1 and "turned" in notes[0]
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert [chunk.model_extra["notes"] for chunk in chunks if "notes" in chunk.model_extra] == [notes]
    part = {"type": "input_image", "image_url": data_uri(turned(), "image/jpeg")}
    asked = [{"role": "user", "content": [part, {"type": "input_text", "text": "What?"}]}]
    made = client.responses.create(model="mini", input=asked, max_output_tokens=2)
    assert made.model_extra["notes"] == notes
    assert "notes" not in create(client, "say:x").model_extra


def test_how_pictures_came_before_the_model_is_told(client):
    """What a model says in pixels of what it sees can be taken back to the original with ``size`` and ``resized``."""
    clip = {"type": "video_url", "video_url": {"url": data_uri(gif(), "image/gif")}}
    shown = user("What?", image(data_uri(png((300, 90)))), clip)
    made = client.chat.completions.create(model="mini", max_tokens=2, messages=shown).usage
    picture, video = made.media
    assert (picture["type"], picture["size"], video["type"], video["size"]) == ("image", [300, 90], "video", [90, 60])
    for one in (picture, video):
        t, rows, columns = one["grid"]
        assert one["tokens"] == t * rows * columns // 4 and columns * 14 == one["resized"][0] and rows * 14 == one["resized"][1]
    details = made.prompt_tokens_details
    assert (picture["tokens"], video["tokens"]) == (details.image_tokens, details.video_tokens)
    assert video["frames"] == made.num_frames and video["fps"] > 0
    *_, last = client.chat.completions.create(
        model="mini", max_tokens=2, messages=shown, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage.media == made.media


def test_the_clients_own_stream_puts_calls_together(client):
    with client.chat.completions.stream(model="echo", messages=user(f"say:I look. {CALL}"), tools=STRICT) as stream:
        kinds = {event.type for event in stream}
        final: Any = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds and "content.done" in kinds
    (call,) = final.choices[0].message.tool_calls
    assert (call.function.name, call.function.parsed_arguments.city) == ("weather", "Oslo")


class City(BaseModel):
    city: str = Field(max_length=20)  # mini does not always find the end of a word of its own


def test_the_asynchronous_client_parses_and_calls(server):
    said: Any = user('say:{"city": "Oslo"}')
    called: Any = user(f"say:{CALL}")
    tools: Any = TOOLS

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as there:
            return await asyncio.gather(
                there.chat.completions.parse(model="echo", messages=said, response_format=City, n=2),
                there.chat.completions.parse(model="echo", messages=called, tools=STRICT),
                there.responses.parse(model="echo", input='say:{"city": "Oslo"}', text_format=City),
                there.chat.completions.create(model="echo", messages=called, tools=tools),
            )

    answers: Any = asyncio.run(ask())
    parsed, made, response, plain = answers
    # What a form was asked for is mini's own, as the form has it.
    assert [type(choice.message.parsed) for choice in parsed.choices] == [City, City]
    assert made.choices[0].message.tool_calls[0].function.parsed_arguments.city == "Oslo"
    assert isinstance(response.output_parsed, City)
    assert plain.choices[0].message.tool_calls[0].function.name == "weather"
