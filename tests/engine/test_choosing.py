"""How tokens are chosen, through whole engines: guides, loops, bias, and replies that depend on nothing but their request."""

from __future__ import annotations

import re

import pytest

from mirada import Message, Sampling
from mirada.engine import guide as guides
from mirada.errors import RequestFailed, SettingsError

ASK = [Message("user", "How many?")]


class Matches:
    """A reply that matches digits, at least one and at most ``most``; the end is allowed after the first."""

    def __init__(self, vlm, most=6):
        tokenizer = vlm.parts.renderer.tokenizer
        texts = {token: tokenizer.decode((token,)) for token in range(tokenizer.vocab_size)}
        control = set(tokenizer.control.values())
        self.digits = [token for token, text in texts.items() if re.fullmatch("[0-9]+", text) and token not in control]
        self.ends = sorted(vlm.parts.eos)
        self.left = most
        self.started = False

    def mask(self, out):
        guides.allow(out, self.digits)
        if self.started:
            guides.allow(out, self.ends)

    def accept(self, token):
        assert token in self.digits or (self.started and token in self.ends)
        self.started = True
        self.left -= 1

    @property
    def finished(self):
        return self.left <= 0

    def forced(self):
        return ()


class Broken(Matches):
    def accept(self, token):
        raise KeyError("no such state")


WAYS = [
    Sampling(max_tokens=16),
    Sampling(max_tokens=16, temperature=1.5, seed=2),
    Sampling(max_tokens=16, temperature=1.0, top_k=3, logprobs=2),
]


@pytest.mark.parametrize("way", WAYS)
def test_a_guide_through_the_engine(vlm, way):
    handles = [
        vlm.submit(ASK, way, guide=Matches(vlm)),
        vlm.submit(ASK, way, guide=Broken(vlm)),
        vlm.submit(ASK, way),
        vlm.submit(ASK, way, guide="no guide"),
    ]
    guided, broken, free, wrong = [handle.result() for handle in handles]
    assert re.fullmatch("[0-9]{1,6}", guided.message.text) and guided.finish == "stop"
    assert "".join(piece.text for piece in handles[0]) == guided.message.text
    for failed in (broken, wrong):
        assert isinstance(failed.error, RequestFailed) and "guide" in str(failed.error)
    alone = vlm.submit(ASK, way).result()
    if way.temperature == 0 or way.seed is not None:
        assert free.error is None and free.tokens == alone.tokens
        assert vlm.submit(ASK, way, guide=Matches(vlm)).result().tokens == guided.tokens


def test_seeded_replies_are_the_same_alone_and_together(vlm):
    ways = [
        Sampling(max_tokens=12, temperature=1.0, seed=1, presence_penalty=1.0, ignore_eos=True),
        Sampling(max_tokens=12, temperature=0.8, seed=2, top_k=20, top_p=0.9, frequency_penalty=0.5, ignore_eos=True),
        Sampling(max_tokens=12, repetition_penalty=1.4, logprobs=1, ignore_eos=True),
        Sampling(max_tokens=12, ignore_eos=True),
        Sampling(max_tokens=12, temperature=1.3, seed=3, min_p=0.01, ignore_eos=True),
    ]
    together = [handle.result().tokens for handle in [vlm.submit(ASK, way) for way in ways]]
    assert together == [vlm.submit(ASK, way).result().tokens for way in ways]
    assert len(set(together)) > 3


def test_penalties_change_what_a_loop_would_say(vlm):
    token = vlm.parts.renderer.tokenizer.encode("x")[0]
    said = vlm.submit(ASK, Sampling(max_tokens=40, logit_bias={token: 30.0})).result().tokens
    assert set(said) == {token}
    said = vlm.submit(ASK, Sampling(max_tokens=40, logit_bias={token: 30.0}, frequency_penalty=2.0)).result().tokens
    assert 5 < said.count(token) < 25


def test_bias_names_tokens_of_this_vocabulary(vlm):
    output = vlm.submit(ASK, Sampling(logit_bias={10**6: 1.0})).result()
    assert isinstance(output.error, SettingsError) and "1000000" in str(output.error)


def test_a_reply_that_loops_ends_and_keeps_what_was_said(vlm):
    tokenizer = vlm.parts.renderer.tokenizer
    token = tokenizer.encode("x")[0]
    handle = vlm.submit(ASK, Sampling(max_tokens=80, max_repeats=2, logit_bias={token: 50.0}))
    pieces = list(handle)
    output = handle.result()
    assert output.finish == pieces[-1].finish == "repetition"
    assert len(output.tokens) == 64
    assert output.message.text == "x" * 64 == "".join(piece.text for piece in pieces)
    off = vlm.submit(ASK, Sampling(max_tokens=80, max_repeats=None, logit_bias={token: 50.0})).result()
    assert (off.finish, len(off.tokens)) == ("length", 80)
    cut = vlm.submit(ASK, Sampling(max_tokens=80, max_repeats=2, logit_bias={token: 50.0}, stop=("x" * 64,))).result()
    assert (cut.finish, cut.message.text) == ("stop", "")
