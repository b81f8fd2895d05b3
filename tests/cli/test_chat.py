"""``mirada chat``: turns that build on one another, commands, and turns that fail."""

from __future__ import annotations

import io
import sys

import pytest

from mirada import Image, Message, Sampling, Text
from mirada.cli.chat import Conversation
from mirada.engine.llm import VLM
from mirada.errors import MediaNotFound

SHORT = Sampling(max_tokens=6)


@pytest.fixture(scope="module")
def vlm(tiny):
    return VLM(tiny)


def said(deltas) -> str:
    return "".join(delta.text for delta in deltas)


def test_a_turn_sees_those_before_it(vlm, picture):
    talk = Conversation(vlm, SHORT)
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
    talk = Conversation(vlm, SHORT)
    said(talk.say("One?"))
    before = list(talk.messages)
    talk.media.append(Image(str(tmp_path / "none.png")))
    with pytest.raises(MediaNotFound):
        said(talk.say("Two?"))
    assert talk.messages == before and len(talk.media) == 1


def test_a_turn_that_is_left_is_forgotten_and_cancelled(vlm):
    talk = Conversation(vlm, Sampling(max_tokens=200, ignore_eos=True))
    deltas = talk.say("One?")
    next(deltas)
    deltas.close()
    assert talk.messages == []
    assert said(Conversation(vlm, SHORT).say("x")) == vlm.ask("x", max_tokens=6)


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
    assert (
        done.err == f"mirada: nothing lies at '{tmp_path / 'none.png'}'. check the path; the question comes last, in quotes\n"
    )
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
