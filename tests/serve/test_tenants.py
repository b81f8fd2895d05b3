"""Callers with different keys share no cache: how soon an answer comes must not say what another has asked."""

from __future__ import annotations

import io

import pytest
from PIL import Image as pil
from serving import data_uri, gif, image, png, user
from starlette.testclient import TestClient

from mirada import VLM
from mirada.media.limits import FetchLimits
from mirada.serve import ServeSettings, create_app

KEYS = ("key-of-anna", "key-of-berta")
CACHES = ("pixel", "encoder", "prefix")
QUESTION = "What do the words on the sign above the door of the station say, and in which colour are they written?"


@pytest.fixture(scope="module")
def vlm():
    with VLM("mini", limits=FetchLimits.serving(), engine={"workers": 0}) as made:
        yield made


@pytest.fixture(scope="module")
def web(vlm):
    with TestClient(create_app({"mini": vlm}, ServeSettings(api_keys=KEYS)), base_url="http://127.0.0.1") as made:
        yield made


@pytest.fixture
def hits(vlm):
    """``hits(call)``: how often each cache had what ``call`` needed."""

    def counted(call):
        before = vlm.stats()
        call()
        after = vlm.stats()
        return [after[f"{name}_cache_hits"] - before[f"{name}_cache_hits"] for name in CACHES]

    return counted


def ask(web, key, header="Authorization", path="/v1/chat/completions", **body):
    sent = {header: f"Bearer {key}" if header == "Authorization" else key}
    reply = web.post(path, json={"model": "mini", **body}, headers=sent)
    assert reply.status_code == 200, reply.text


def chat(web, key, colour, header="Authorization"):
    parts = image(data_uri(png(color=colour)))
    return lambda: ask(web, key, header, messages=user(QUESTION, parts), max_tokens=1)


def test_a_key_finds_what_it_asked_before_and_never_what_another_did(web, hits):
    anna, berta = (chat(web, key, (1, 2, 3)) for key in KEYS)
    assert hits(anna) == [0, 0, 0]
    assert hits(anna) == [1, 0, 1]  # the prefix holds the picture too, so its features are not asked for
    assert hits(berta) == [0, 0, 0]
    assert hits(berta) == [1, 0, 1]
    assert hits(chat(web, KEYS[0], (1, 2, 3), "X-Api-Key")) == [1, 0, 1]  # the same key by the other header


def test_the_frames_of_a_video_are_not_shared(web, hits):
    clip = {"type": "video_url", "video_url": {"url": data_uri(gif(), "image/gif")}}
    anna, berta = (lambda key=key: ask(web, key, messages=user(QUESTION, clip), max_tokens=1) for key in KEYS)
    assert hits(anna) == [0, 0, 0]
    assert hits(berta) == [0, 0, 0]
    assert hits(berta)[0] == 1


def test_features_are_not_shared_either(web, hits, vlm):
    anna, berta = (chat(web, key, (4, 5, 6)) for key in KEYS)

    def forget_beginnings():
        assert vlm._engine.wait_idle(10)  # a reply is out before its beginning is kept
        vlm._prefix.clear()

    anna()
    forget_beginnings()
    assert hits(berta) == [0, 0, 0]
    forget_beginnings()
    assert hits(berta) == [1, 1, 0]
    assert hits(anna) == [1, 1, 0]


def frame(number: int) -> bytes:
    made = io.BytesIO()
    pil.new("RGB", (96, 64), (50 * number, 9, 9)).save(made, "JPEG")
    return (number * 500).to_bytes(8, "big") + made.getvalue()


def test_nor_by_the_other_doors(web, hits):
    def respond(key):
        url = data_uri(png(color=(7, 8, 9)))
        parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": QUESTION}]
        asked = [{"role": "user", "content": parts}]
        return lambda: ask(web, key, path="/v1/responses", input=asked, max_output_tokens=1)

    def live(key):
        def talk():
            sent = {"Authorization": f"Bearer {key}"}
            with web.websocket_connect("/v1/live", headers=sent, subprotocols=["mirada.live"]) as socket:
                socket.send_json({"type": "start", "model": "mini"})
                for number in range(2):
                    socket.send_bytes(frame(number))
                socket.send_json({"type": "question", "id": "1", "text": QUESTION, "max_tokens": 1})
                while (said := socket.receive_json())["type"] != "done":
                    assert said["type"] != "error", said

        return talk

    for door in (respond, live):
        anna, berta = map(door, KEYS)
        assert hits(anna) == [0, 0, 0]
        assert hits(berta) == [0, 0, 0]
        assert hits(berta)[2] == 1


def test_requests_that_run_together_do_not_wait_for_the_features_of_another(vlm):
    from mirada import Image, Message, Text

    data = png((84, 84), (9, 8, 7))
    before = vlm.stats()
    handles = [
        vlm.submit(
            [
                Message("user", (Image(data), Text(f"{n}"))),
            ],
            {"max_tokens": 2},
            salt=f"s{n}",
        )
        for n in range(3)
    ]
    assert [handle.result().error for handle in handles] == [None] * 3
    after = vlm.stats()
    assert after["encoder_cache_misses"] - before["encoder_cache_misses"] == 3
    assert after["pixel_cache_misses"] - before["pixel_cache_misses"] == 3


def test_a_picture_that_was_sent_with_a_name_is_found_by_it_again_by_its_owner_alone(web):
    def said(key, **part):
        body = {"model": "mini", "messages": user(QUESTION, {"type": "image_url", **part}), "max_tokens": 4}
        return web.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})

    whole = said(KEYS[0], image_url={"url": data_uri(png(color=(30, 60, 90)))}, uuid="sign-1").json()
    again = said(KEYS[0], image_url=None, uuid="sign-1").json()
    assert again["choices"] == whole["choices"]
    assert again["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"] > 40
    for key, name in ((KEYS[1], "sign-1"), (KEYS[0], "sign-2")):
        missed = said(key, image_url=None, uuid=name)
        error = missed.json()["error"]
        assert (
            missed.status_code == 400 and error["code"] == "media_not_found" and "send the picture itself" in error["message"]
        )
    for part in ({"image_url": None}, {"image_url": None, "uuid": ""}, {"image_url": None, "uuid": 3}):
        assert said(KEYS[0], **part).status_code == 400
