"""Boxes and points in answers come back in pixels of the pictures that were sent: whole, streamed, and from Python."""

from __future__ import annotations

import io

import pytest
from PIL import Image as pil
from serving import KEY, data_uri, gif, image, png, user

from mirada import VLM, Message, Sampling
from mirada import Image as Picture
from mirada.client import HttpClient
from mirada.records.answer import annotation_to_openai, media_to_openai

BOX = "<|object_ref_start|>the sign<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|>"
SAID = f"Look: {BOX}, there."
WIDE = data_uri(png((300, 200)))
KINDS = {"box", "point", "polygon"}


def chat(client, text, *parts, **more):
    return client.chat.completions.create(model="echo", messages=user(f"say:{text}", *parts), **more)


def test_a_box_in_pixels_of_the_picture_that_was_sent(client):
    choice = chat(client, SAID, image(WIDE)).choices[0]
    (one,) = choice.annotations
    assert one | {"resized": None} == {
        "type": "box", "label": "the sign", "box": [30, 50, 150, 150], "image": 0, "chosen": "only",
        "size": [300, 200], "resized": None, "start": SAID.index("<|box"), "end": SAID.index(", there"),
    }  # fmt: skip
    assert choice.message.content == SAID  # as it was said, so that it can be sent back
    assert not hasattr(chat(client, SAID).choices[0], "annotations")  # without a picture there is nothing to point at


def test_it_does_not_matter_how_small_the_model_saw_it(client):
    small, large = (
        chat(client, SAID, image(WIDE), extra_body={"max_pixels": pixels}).choices[0].annotations[0]
        for pixels in (4000, 80_000)
    )
    assert small["resized"] != large["resized"] and small | {"resized": 0} == large | {"resized": 0}


def test_a_picture_turned_by_exif_is_told_upright(client):
    out, exif = io.BytesIO(), pil.Exif()
    exif[0x0112] = 6
    pil.new("RGB", (300, 200)).save(out, "JPEG", exif=exif)
    (one,) = chat(client, SAID, image(data_uri(out.getvalue(), "image/jpeg"))).choices[0].annotations
    assert one["size"] == [200, 300] and one["box"] == [20, 75, 100, 225]


def test_of_several_pictures_the_one_that_was_named(client):
    parts = (
        image(WIDE),
        image(data_uri(png((90, 60)))),
        {"type": "video_url", "video_url": {"url": data_uri(gif(), "image/gif")}},
    )
    made = chat(client, f"Picture 1: {BOX} Picture 2: {BOX} Video 1: {BOX}", *parts).choices[0].annotations
    assert [(one.get("image"), one.get("video"), one["size"]) for one in made] == [
        (0, None, [300, 200]), (1, None, [90, 60]), (None, 0, [90, 60]),
    ]  # fmt: skip
    assert {one["chosen"] for one in made} == {"named"} and made[1]["box"] == [9, 15, 45, 45]
    (last,) = chat(client, BOX, *parts[:2]).choices[0].annotations
    assert (last["image"], last["chosen"]) == (1, "last")


def test_pictures_count_over_all_turns(client):
    turns = [*user("What is this?", image(WIDE)), {"role": "assistant", "content": "A sign."}]
    ask = {"model": "echo", "messages": [*turns, *user(f"say:{BOX}", image(data_uri(png((90, 60)))))]}
    (one,) = client.chat.completions.create(**ask).choices[0].annotations
    assert (one["image"], one["size"]) == (1, [90, 60])


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_tells_each_as_soon_as_it_is_whole(client, n):
    said = f"{SAID} and a <|point_start|>(500,500)<|point_end|>."
    whole = chat(client, said, image(WIDE), n=n)
    chunks = [chunk.choices[0] for chunk in chat(client, said, image(WIDE), n=n, stream=True)]
    for index in range(n):
        mine = [choice for choice in chunks if choice.index == index]
        told, text = [], ""
        for choice in mine:
            text += choice.delta.content or ""
            for one in getattr(choice, "annotations", None) or ():
                told.append(one)
                assert len(text) >= one["end"]
                assert said[one["start"] : one["end"]].endswith("_end|>")
        assert told == whole.choices[index].annotations and {one["type"] for one in told} == {"box", "point"}
        first = next(at for at, choice in enumerate(mine) if getattr(choice, "annotations", None))
        assert first < len(mine) - 3  # not all at the end


def test_responses_tell_them_beside_the_message(client):
    parts = [{"type": "input_image", "image_url": WIDE}, {"type": "input_text", "text": f"say:<think>hm</think>{SAID}"}]
    ask = {"model": "echo", "input": [{"role": "user", "content": parts}]}
    whole = client.responses.create(**ask).output[-1]
    assert whole.content[0].text == SAID and whole.content[0].annotations == []  # those are citations
    assert whole.annotations == chat(client, SAID, image(WIDE)).choices[0].annotations
    with client.responses.create(**ask, stream=True) as stream:
        done = [event.item for event in stream if event.type == "response.output_item.done"]
    assert done[-1].annotations == whole.annotations


def test_places_count_within_each_message_of_a_response(client):
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    tools = [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]
    parts = [{"type": "input_image", "image_url": WIDE}, {"type": "input_text", "text": f"say:First.{call}Then {BOX}"}]
    output = client.responses.create(model="echo", input=[{"role": "user", "content": parts}], tools=tools).output
    message = output[-1]
    (one,) = message.annotations
    assert message.content[0].text[one["start"] : one["end"]].startswith("<|box_start|>")


def test_from_python():
    from mirada.records.answer import annotation_to_openai
    from mirada.types import Annotation, Delta

    with VLM("mini", engine={"workers": 0}) as vlm:
        tokens = vlm.parts.renderer.tokenizer.encode_control(SAID)
        handle = vlm.submit([Message("user", (Picture(png((300, 200))), "Where?"))], guide=Forced(tokens))
        output = handle.result()
        (one,) = output.annotations
        assert isinstance(one, Annotation) and one.points == ((30, 50), (150, 150)) and one.size == (300, 200)
        assert tuple(a for delta in handle for a in delta.annotations) == output.annotations
        assert annotation_to_openai(one)["box"] == [30, 50, 150, 150] and isinstance(Delta().annotations, tuple)


class Forced:
    """A guide that says given tokens and ends."""

    def __init__(self, tokens):
        self.left = list(tokens)

    def mask(self, out):
        from mirada.engine.guide import allow

        allow(out, self.left[:1])

    def accept(self, token):
        assert token == self.left.pop(0)

    @property
    def finished(self):
        return not self.left

    def forced(self):
        return self.left[:1]


@pytest.mark.parametrize("stream", [True, False])
def test_the_client_of_this_package_has_all_that_the_server_says(client, server, stream):
    told = chat(client, SAID, image(WIDE), stop=["there"])
    with HttpClient(server.url, KEY, "echo", stream=stream) as asking:
        chosen = Sampling(max_tokens=200, stop=("there",))
        output = asking.submit([Message("user", (Picture(png((300, 200))), f"say:{SAID}"))], chosen).result(60)
    assert output.error is None and output.annotations
    assert [annotation_to_openai(one) for one in output.annotations] == told.choices[0].annotations
    assert [media_to_openai(one) for one in output.usage.media] == told.usage.media
    assert output.stop_reason == told.choices[0].stop_reason == "there"


@pytest.mark.parametrize("stream", [True, False])
def test_the_client_of_this_package_has_the_notes(server, stream):
    out, exif = io.BytesIO(), pil.Exif()
    exif[0x0112] = 6
    pil.new("RGB", (90, 60)).save(out, "JPEG", exif=exif)
    with HttpClient(server.url, KEY, "echo", stream=stream) as asking:
        output = asking.submit([Message("user", (Picture(out.getvalue()), "say:x"))]).result(60)
    assert len(output.notes) == 1 and "turned" in output.notes[0]
