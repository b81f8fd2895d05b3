"""``mirada chat``: turns that build on one another, commands, and turns that fail."""

from __future__ import annotations

import io
import sys

import pytest

from mirada import Image, Message, Sampling, Text
from mirada.cli.chat import Conversation
from mirada.cli.options import How
from mirada.engine.llm import VLM
from mirada.errors import MediaNotFound

SHORT = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def vlm(tiny):
    return VLM(tiny)


def said(deltas) -> str:
    return "".join(delta.text for delta in deltas)


def test_a_turn_sees_those_before_it(vlm, picture):
    talk = Conversation(vlm, How(SHORT))
    talk.media.append(Image(str(picture)))
    first = said(talk.say("One?"))
    assert talk.media == []
    second = said(talk.say("Two?"))
    chat = [Message("user", (Image(str(picture)), Text("One?")))]
    (one,) = vlm.generate([chat], SHORT)
    assert first == one.message.text
    (two,) = vlm.generate([[*chat, one.message, Message("user", "Two?")]], SHORT)
    assert second == two.message.text
    assert [message.role for message in talk.messages] == ["user", "assistant"] * 2
    talk.reset()
    assert said(talk.say("Two?")) == vlm.generate([[Message("user", "Two?")]], SHORT)[0].message.text


def test_a_turn_that_fails_leaves_the_rest_as_it_was(vlm, tmp_path):
    talk = Conversation(vlm, How(SHORT))
    said(talk.say("One?"))
    before = list(talk.messages)
    talk.media.append(Image(str(tmp_path / "none.png")))
    with pytest.raises(MediaNotFound):
        said(talk.say("Two?"))
    assert talk.messages == before and len(talk.media) == 1


def test_a_turn_that_is_left_is_forgotten_and_cancelled(vlm):
    talk = Conversation(vlm, How(Sampling(max_tokens=200, ignore_eos=True)))
    deltas = talk.say("One?")
    next(deltas)
    deltas.close()
    assert talk.messages == []
    assert said(Conversation(vlm, How(SHORT)).say("x")) == vlm.ask("x", max_tokens=6)


def run(mirada, monkeypatch, lines, *words):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return mirada("chat", *words)


def test_lines_from_a_pipe(mirada, monkeypatch, tiny, vlm, picture, tmp_path):
    lines = [
        "/image " + str(tmp_path / "none.png"),
        f"/image {picture}",
        "What is it?",
        "",
        "/rest",
        "/help",
        "/reset",
        "Again?",
        "/quit",
        "never asked",
    ]
    done = run(mirada, monkeypatch, lines, "-m", tiny, "--max-tokens", 6)
    from mirada.cli.show import printable

    first = printable(vlm.ask(str(picture), "What is it?", max_tokens=6))
    again = printable(vlm.ask("Again?", max_tokens=6))
    assert done.code == 0
    assert done.err == f"mirada: nothing lies at '{tmp_path / 'none.png'}'. check the path\n"
    assert "(1 added to the next question)\n" + first + "\n(there is no /rest; did you mean '/reset'?" in done.out
    assert "/quit    end" in done.out
    assert done.out.endswith("(everything is forgotten)\n" + again + "\n")


def test_media_of_the_first_question_and_the_end_of_input(mirada, monkeypatch, tiny, vlm, picture):
    done = run(mirada, monkeypatch, ["What is it?"], picture, "-m", tiny, "--max-tokens", 6)
    from mirada.cli.show import printable

    assert (done.code, done.out) == (0, printable(vlm.ask(str(picture), "What is it?", max_tokens=6)) + "\n")


def test_ctrl_c_stops_one_answer_only(mirada, monkeypatch, tiny):
    from mirada.cli import show

    calls = []

    def stopped(deltas):
        calls.append(deltas)
        if len(calls) == 1:
            next(iter(deltas))
            raise KeyboardInterrupt
        print(len(list(deltas)) > 0)

    monkeypatch.setattr(show, "stream", stopped)
    done = run(mirada, monkeypatch, ["One?", "Two?"], "-m", tiny, "--max-tokens", 6)
    assert done.code == 0 and "stopped; this turn is forgotten" in done.out and done.out.endswith("True\n")


def test_media_may_be_taken_back_and_paths_may_be_quoted(mirada, monkeypatch, tiny, vlm, picture, tmp_path):
    from mirada.cli.show import printable

    named = picture.rename(tmp_path / "my photo.png")
    lines = [f'/image "{named}"', "/drop", "What?", "/image", f"/image '{named}'", "What?"]
    done = run(mirada, monkeypatch, lines, "-m", tiny, "--max-tokens", 6)
    plain, seen = printable(vlm.ask("What?", max_tokens=6)), vlm.generate([chat_of(vlm, named)], SHORT)[0].message.text
    assert "(1 added to the next question)\n(1 taken back)\n" + plain in done.out
    assert done.out.endswith("(1 added to the next question)\n" + printable(seen) + "\n")
    assert "the command names no file" in done.err and done.code == 0


def chat_of(vlm, named):
    first = vlm.ask("What?", max_tokens=6)
    return [
        Message("user", "What?"),
        Message("assistant", first),
        Message("user", (Image(str(named)), Text("What?"))),
    ]


def test_a_server_answers_turn_by_turn(mirada, monkeypatch, picture):
    from misbehaving import serving, stream, words

    monkeypatch.setenv("MIRADA_API_KEY", "sk-key")
    with serving(stream(words("Hel", "lo")), models=["big"]) as server:
        lines = [f"/image {picture}", "What is it?", "And now?"]
        done = run(mirada, monkeypatch, lines, "--url", server.url, "--adapter", "loud", "--thinking", "off")
    assert (done.code, done.err) == (0, "") and done.out.endswith("Hello\nHello\n")
    first, second = server.bodies
    assert first["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (first["adapter"], first["chat_template_kwargs"]) == ("loud", {"enable_thinking": False})
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == "Hello"
