"""Every parameter of a request, from the real ``openai`` client to what the engine is asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from serving import KEY, data_uri, gif, image, png, uncached, user
from tiny import make_tiny

from mirada import VLM, Message, Sampling
from mirada import Image as Picture
from mirada.errors import ParameterError
from mirada.media.limits import FetchLimits
from mirada.serve import ServeSettings, create_app
from mirada.serve.chat import ask_of
from mirada.types import Video

FREE = {"model": "mini", "max_tokens": 12, "temperature": 1.2, "seed": 7}
VIDEO = {"type": "video_url", "video_url": {"url": data_uri(gif(), "image/gif")}}


@pytest.fixture(scope="module")
def mini(server):
    with VLM("mini", engine={"workers": 0}, limits=FetchLimits.serving()) as vlm:
        vlm.load_adapter("loud", server.folder / "loud")
        yield vlm


def tokens(client, extra=None, **more):
    asked = {**FREE, "messages": user("Tell me of the sea."), **more}
    reply = client.chat.completions.create(**asked, extra_body={"return_token_ids": True, **(extra or {})})
    return tuple(reply.choices[0].token_ids)


CASES = [
    # OpenAI's parameters, others beside them, what the engine is asked for
    ({}, {}, {}),
    ({"temperature": 0}, {}, {"temperature": 0}),
    ({"top_p": 0.2}, {}, {"top_p": 0.2}),
    ({"seed": 8}, {}, {"seed": 8}),
    ({"presence_penalty": 2}, {}, {"presence_penalty": 2}),
    ({"frequency_penalty": 2.0}, {}, {"frequency_penalty": 2.0}),
    ({"logit_bias": {"300": 100}}, {}, {"logit_bias": {300: 100}}),
    ({"max_completion_tokens": 5}, {}, {"max_tokens": 5}),
    ({}, {"top_k": 2}, {"top_k": 2}),
    ({}, {"top_k": -1}, {"top_k": None}),
    ({}, {"min_p": 0.3}, {"min_p": 0.3}),
    ({}, {"repetition_penalty": 3.0}, {"repetition_penalty": 3.0}),
    ({}, {"ignore_eos": True}, {"ignore_eos": True}),
    ({}, {"min_tokens": 12}, {"min_tokens": 12}),
    ({"temperature": 0}, {"stop_token_ids": [999]}, {"temperature": 0, "stop_token_ids": (999,)}),
]


@pytest.mark.parametrize(("theirs", "extra", "sampling"), CASES, ids=str)
def test_sampling_is_the_engines(client, mini, theirs, extra, sampling):
    wanted = Sampling(**{"max_tokens": 12, "temperature": 1.2, "seed": 7, **sampling})
    output = mini.submit([Message("user", "Tell me of the sea.")], wanted).result()
    assert tokens(client, extra, **theirs) == output.tokens


def test_sampling_makes_a_difference(client):
    """What the test above compares is not the same whatever is asked (though mini is often sure of its answer)."""
    said = [tokens(client, extra, **theirs) for theirs, extra, _ in CASES]
    assert len(set(said)) >= 7


PARTS = [
    ({"fps": 4}, Video(gif(), fps=4)),
    ({"nframes": 4}, Video(gif(), nframes=4)),
    ({"mm_processor_kwargs": {"fps": 3.0}}, Video(gif(), fps=3)),
    ({"min_pixels": 12_000}, Video(gif(), min_pixels=12_000)),
    ({"max_pixels": 2000}, Video(gif(), max_pixels=2000)),
    ({"max_pixels": 2000}, Picture(png(), max_pixels=2000)),
    ({"min_pixels": 12_000}, Picture(png(), min_pixels=12_000)),
    (
        {"mm_processor_kwargs": {"min_pixels": 12_000, "max_pixels": 14_000}},
        Picture(png(), min_pixels=12_000, max_pixels=14_000),
    ),
]


@pytest.mark.parametrize(("extra", "part"), PARTS, ids=lambda value: str(value)[:40] if isinstance(value, dict) else "")
def test_media_are_prepared_as_asked_and_usage_says_so(client, mini, extra, part):
    shown = VIDEO if isinstance(part, Video) else image(data_uri(png()))
    ask = {"model": "mini", "max_tokens": 2, "messages": user("What?", shown), "extra_body": extra}
    usage = client.chat.completions.create(**ask).usage
    output = mini.submit([Message("user", (part, "What?"))], Sampling(max_tokens=2)).result()
    details = usage.prompt_tokens_details
    assert (details.image_tokens, details.video_tokens) == (output.usage.image_tokens, output.usage.video_tokens)
    assert usage.prompt_tokens == output.usage.prompt_tokens and details.image_tokens + details.video_tokens > 0
    plain = client.chat.completions.create(**{**ask, "extra_body": {}}).usage
    if isinstance(part, Video):
        assert (usage.num_frames, usage.timestamps) == (output.usage.num_frames, [list(output.usage.timestamps[0])])
    is_small = isinstance(part, Video) and ("min_pixels" in extra or "max_pixels" in extra)  # as few tokens as there can be
    assert is_small or uncached(usage) != uncached(plain)
    *_, last = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    assert uncached(last.usage) == uncached(usage)


def test_usage_of_several_media_and_of_responses(client):
    parts = image(data_uri(png())), VIDEO, image(data_uri(png((200, 100))))
    both = client.chat.completions.create(model="mini", max_tokens=1, messages=user("What?", *parts)).usage
    alone = [client.chat.completions.create(model="mini", max_tokens=1, messages=user("What?", p)).usage for p in parts]
    details = [one.prompt_tokens_details for one in alone]
    assert both.prompt_tokens_details.image_tokens == details[0].image_tokens + details[2].image_tokens
    assert both.prompt_tokens_details.video_tokens == details[1].video_tokens > 0 == details[0].video_tokens
    assert both.num_frames == alone[1].num_frames and both.timestamps == alone[1].timestamps
    assert not hasattr(alone[0], "num_frames")
    said = [{"type": "input_image", "image_url": data_uri(png())}, {"type": "input_text", "text": "What?"}]
    told = client.responses.create(model="mini", max_output_tokens=1, input=[{"role": "user", "content": said}]).usage
    assert told.input_tokens == alone[0].prompt_tokens
    assert told.input_tokens_details.image_tokens == details[0].image_tokens


def test_an_adapter_answers(client, mini):
    plain, loud = (
        mini.submit([Message("user", "Tell me of the sea.")], Sampling(max_tokens=12, temperature=1.2, seed=7), adapter=name)
        for name in (None, "loud")
    )
    assert tokens(client) == plain.result().tokens != loud.result().tokens
    assert tokens(client, {"adapter": "loud"}) == loud.result().tokens == tokens(client, model="loud")
    reply = client.responses.create(model="mini", input="hi", max_output_tokens=2, extra_body={"adapter": "loud"})
    assert reply.output_text != "" and reply.model == "mini"


def test_thinking_on_and_off(client):
    """``thinking``, ``chat_template_kwargs`` and ``reasoning_effort`` ask for one thing; of several, our own word counts."""

    def count(effort=None, **extra):
        more = {} if effort is None else {"reasoning_effort": effort}
        reply = client.chat.completions.create(model="mini", max_tokens=1, messages=user("x"), extra_body=extra, **more)
        return reply.usage.prompt_tokens

    on, off, auto = count(thinking="on"), count(thinking="off"), count()
    assert len({on, off, auto}) == 3
    assert count("high") == on == count(thinking=True) == count(chat_template_kwargs={"thinking": "on"})
    assert count("none") == off == count("high", thinking="off")


@pytest.mark.parametrize("stream", [False, True])
def test_async_clients_do_the_same(server, client, stream):
    """Chat and responses, with a picture; reasoning and answer apart."""

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
            messages: Any = user("say:<think>why</think>so", image(data_uri(png())))
            reply = await made.chat.completions.create(model="echo", messages=messages, stream=stream)
            response = await made.responses.create(model="echo", input="say:<think>why</think>so", stream=stream)
            if not stream:
                message = reply.choices[0].message
                return message.reasoning_content, message.content, response.output_text
            deltas = [chunk.choices[0].delta async for chunk in reply]
            thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            said = [event.delta async for event in response if event.type == "response.output_text.delta"]
            return thought, "".join(delta.content or "" for delta in deltas), "".join(said)

    assert asyncio.run(run()) == ("why", "so", "so")


def test_several_stops_and_whichever_comes_first(client):
    made = [
        client.chat.completions.create(model="echo", messages=user("say:one two three"), stop=stop).choices[0]
        for stop in (["three", "tw"], "two", ["never"])
    ]
    assert [(one.message.content, one.finish_reason) for one in made] == [
        ("one ", "stop"), ("one ", "stop"), ("one two three", "stop"),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["chat", "responses"])
def test_an_unknown_parameter_is_named(client, method):
    create = client.chat.completions.create if method == "chat" else client.responses.create
    asked = {"messages": user("x")} if method == "chat" else {"input": "x"}
    with pytest.raises(openai.BadRequestError) as error:
        create(model="mini", **asked, extra_body={"top_q": 1})
    assert error.value.param == "top_q" and "did you mean 'top_" in error.value.message
    assert error.value.type == "invalid_request_error" and error.value.code


@pytest.mark.parametrize("stream", [False, True])
def test_where_it_is_allowed_a_header_says_what_was_left_aside(mini, stream):
    app = create_app({"mini": mini}, ServeSettings(unknown_parameters="warn"))

    async def ask(path, **body):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.post(path, json={"model": "mini", "stream": stream, **body})

    chat = {"messages": user("x"), "max_tokens": 1}
    reply = asyncio.run(ask("/v1/chat/completions", **chat, top_q=1, best_of=2))
    assert reply.status_code == 200 and reply.headers["x-mirada-ignored"] == "top_q, best_of"
    reply = asyncio.run(ask("/v1/responses", input="x", max_output_tokens=1, top_q=1))
    assert reply.status_code == 200 and reply.headers["x-mirada-ignored"] == "top_q"
    assert "x-mirada-ignored" not in asyncio.run(ask("/v1/chat/completions", **chat)).headers
    wrong = asyncio.run(ask("/v1/chat/completions", **chat, temperature="hot", top_q=1))  # a known one is still checked
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "temperature"


def test_a_mode_that_a_model_lacks_is_named_as_it_was_asked_for(tmp_path):
    vlm = VLM(str(make_tiny(tmp_path / "tiny", "qwen2_vl")))
    try:
        for said, param in (
            ({"reasoning_effort": "high"}, "reasoning_effort"), ({"thinking": "on"}, "thinking"),
            ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ):  # fmt: skip
            with pytest.raises(ParameterError) as caught:
                ask_of(vlm, "tiny", {"messages": user("x"), **said}, ServeSettings())
            assert caught.value.param == param and param in str(caught.value)
    finally:
        vlm.close()


def test_an_end_does_not_come_before_the_least_tokens(mini):
    """The engine's own: an end is as unlikely as can be until then, and a token of the caller's choice ends it after."""
    chat = [Message("user", "Tell me of the sea.")]
    free = mini.submit(chat, Sampling(max_tokens=40)).result()
    size = len(free.tokens)
    assert free.finish == "stop" and size < 30
    longer = mini.submit(chat, Sampling(max_tokens=40, min_tokens=size + 3)).result()
    assert len(longer.tokens) >= size + 3 and longer.tokens[: size - 1] == free.tokens[:-1]
    first = free.tokens[0]
    cut = mini.submit(chat, Sampling(max_tokens=40, stop_token_ids=(first,))).result()
    assert (cut.tokens, cut.finish, cut.stop_reason, cut.message.text) == ((first,), "stop", first, "")
    assert mini.submit(chat, Sampling(stop_token_ids=(10**6,))).result().error is not None
