"""Tokens to text that is never taken back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada.engine.sequence import Reply, Sequence, StopStrings, fold, join
from mirada.errors import RequestFailed
from mirada.prompt.format import PromptFormat
from mirada.prompt.parse import Parser
from mirada.types import Delta, Logprob, Prompt, Sampling, Span, ToolCall


def cut_plainly(text, stops):
    """What stands before the first stop string to be completed, reading letter by letter."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


def fed(pieces, stops):
    made = StopStrings(stops)
    out = [made.feed(piece) for piece in pieces]
    return [*out, made.close()], made.found is not None


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("one two three", ["two"]),
        ("aaab", ["aab"]),
        ("abcabd", ["abd", "xyz"]),
        ("ab", ["abc", "b"]),
        ("abc", ["abc", "bc"]),
        ("no stop here", ["zzz"]),
        ("STOP", ["STOP"]),
        ("ends with STO", ["STOP"]),
        ("", ["x"]),
    ],
)
def test_every_split_of_every_text(text, stops):
    expected = cut_plainly(text, stops)
    for count in range(4):
        for places in itertools.combinations(range(1, max(1, len(text))), min(count, max(0, len(text) - 1))):
            edges = [0, *places, len(text)]
            out, found = fed([text[a:b] for a, b in itertools.pairwise(edges)], stops)
            assert ("".join(out), found) == expected, places


@settings(max_examples=200)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_any_pieces_give_the_same(pieces, stops):
    out, found = fed(pieces, stops)
    assert ("".join(out), found) == cut_plainly("".join(pieces), stops)


def test_text_is_let_go_as_soon_as_it_cannot_be_a_stop():
    stops = StopStrings(["STOP"])
    assert stops.feed("a S") == "a "
    assert stops.feed("T") == ""
    assert stops.feed("Ax") == "STAx"
    assert stops.close() == ""


class Letters:
    """A decoder whose token i is the i-th letter of an alphabet given as text."""

    def __init__(self, pieces):
        self.pieces = pieces

    def feed(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def close(self):
        return ""


def sequence(pieces, stops=(), max_tokens=100, logprobs=None):
    reply = Reply(Letters(pieces), Parser(PromptFormat()), stops)
    sampling = Sampling(max_tokens=max_tokens, stop=stops, logprobs=logprobs)
    return Sequence(Prompt((1, 2, 3)), sampling, reply, limit=max_tokens)


def run(made, count, end=None):
    for token in range(count):
        made.append(token, Logprob(token, -0.5) if made.sampling.logprobs is not None else None, token == end)
        if made.done:
            break
    return made.output()


def test_streamed_text_is_the_output_and_never_shows_the_stop():
    pieces = ["He", "llo ", "S", "TO", "P and more"]
    made = sequence(pieces, ("STOP",))
    output = run(made, 5)
    assert output.message.text == "Hello "
    assert output.finish == "stop"
    assert output.tokens == (0, 1, 2, 3, 4)
    assert "".join(delta.text for delta in made.deltas) == output.message.text
    assert [len(delta.tokens) for delta in made.deltas] == [1] * 5


def test_length_and_end():
    assert run(sequence(["a", "b", "c"], max_tokens=2), 3).finish == "length"
    ended = run(sequence(["a", "b", "<end>"]), 3, end=2)
    assert (ended.finish, ended.message.text, ended.tokens) == ("stop", "ab", (0, 1, 2))
    assert ended.usage.completion_tokens == 3


def test_what_is_held_back_comes_at_the_end():
    output = run(sequence(["x", "ST"], ("STOP",), max_tokens=2), 2)
    assert (output.message.text, output.finish) == ("xST", "length")


def test_reasoning_and_tool_calls():
    pieces = ["<think>", "why", "</think>", "<answer>", "yes", "</answer>", '<tool_call>{"name": "f"', "}</tool_call>", ""]
    output = run(sequence(pieces), 9, end=8)
    assert (output.message.reasoning, output.message.text) == ("why", "yes")
    assert output.message.tool_calls == (ToolCall("f", "{}", "call_0"),)
    assert output.finish == "tool_calls"
    assert output.raw == "".join(pieces)


def test_logprobs_only_when_asked():
    assert run(sequence(["a", "b"], max_tokens=2), 2).logprobs is None
    assert [one.token for one in run(sequence(["a", "b"], max_tokens=2, logprobs=0), 2).logprobs or ()] == [0, 1]


def test_cancelled_and_failed():
    made = sequence(["a", "S"], ("STOP",))
    run_some = [made.append(token, None, False) for token in range(2)]
    assert run_some and not made.done
    made.cancel()
    assert (made.output().message.text, made.output().finish, made.done) == ("aS", "cancelled", True)
    failed = Sequence.failed(RequestFailed("it broke", "try again"))
    assert failed.done and failed.output().finish == "error" and isinstance(failed.output().error, RequestFailed)


STOPPED = [  # text, stop strings, answer, reasoning, the one that was found
    ("<think>Q: what?</think>A Q: B", ("Q:",), "A", "Q: what?", "Q:"),
    ("<think>a\n\nb</think>\n\nanswer\n\nmore", ("\n\n",), "answer", "a\n\nb", "\n\n"),
    ("<think>\nQ</think>\n<answer>\nA Q</answer>", ("\n", "Q"), "A", "Q", "Q"),
    ("<think>axq</think>b", (">x", "aq", "axq"), "b", "axq", None),
    ("plain Q: x", ("Q:",), "plain", "", "Q:"),
    ("a<think>Q:</think>", ("Q:",), "a<think>", "", "Q:"),
    ("<think>Q</think>b", ("<th",), "", "", "<th"),
]


@pytest.mark.parametrize(("text", "stops", "answer", "reasoning", "found"), STOPPED)
def test_stop_strings_end_the_answer_and_no_reasoning_at_any_split(text, stops, answer, reasoning, found):
    for first in range(len(text) + 1):
        for second in {first, min(first + 1, len(text)), len(text)}:
            pieces = [text[:first], text[first:second], text[second:]]
            output = run(sequence(pieces, stops), 3)
            got = output.message.text.rstrip(), output.message.reasoning, output.stop_reason
            assert got == (answer, reasoning, found), pieces


def test_a_stop_string_may_stay_and_counts_after_the_least_tokens():
    pieces = ["a", "Q", "b", "Q", "c"]
    reply = Reply(Letters(pieces), Parser(PromptFormat()), ("Q",), least=2, keep_stop=True)
    output = run(Sequence(Prompt((1,)), Sampling(stop=("Q",)), reply, limit=9), 5)
    assert (output.message.text, output.finish, output.stop_reason) == ("aQbQ", "stop", "Q")


def test_fold_is_the_stream_put_together():
    deltas = [Delta("a", "r", (1,)), Delta("b", "s", (2, 3), finish="length")]
    whole = fold(deltas)
    assert (whole.message.text, whole.message.reasoning, whole.tokens, whole.finish) == ("ab", "rs", (1, 2, 3), "length")
    assert join([]).finish is None


def test_where_a_sequence_stands():
    prompt = Prompt((1, 2, 3, 4), (Span("image", 1, (1, 2, 4), 0),))
    places = np.asarray([[0, 1, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2]])
    made = Sequence(
        prompt, Sampling(), Reply(Letters("ab"), Parser(PromptFormat())), positions=places, first_position=3, limit=9
    )
    assert made.left == 4
    made.computed = 4
    made.append(0, None, False)
    assert (made.num_tokens, made.left) == (5, 1)
    made.append(1, None, False)
    made.draft = [7, 8]
    assert made.ids(0, 8) == [1, 2, 3, 4, 0, 1, 7, 8] and made.ids(2, 5) == [3, 4, 0] and made.ids(5, 8) == [1, 7, 8]
    assert made.places(2, 7).tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [2, 2, 3, 4, 5]]
    assert made.places(5, 6).tolist() == [[4], [4], [4]]
    text = sequence(["a"])
    assert text.positions is None and text.places(1, 5).tolist() == [[1, 2, 3, 4]] * 3
