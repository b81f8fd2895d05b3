"""The thinking budget: exact counts, a closing tag that the parser reads, and an answer after it, in every family."""

from __future__ import annotations

import pytest
import torch

from mirada import Message, Sampling
from mirada.engine.sequence import Reply
from mirada.engine.thinking import ThinkingBudget
from mirada.prompt.format import KEYE_PREVIEW, KIMI
from mirada.prompt.parse import Parser

ASK = [Message("user", "Why?")]


class Script:
    """A tokenizer whose tokens are the given pieces of text, and single letters."""

    def __init__(self, *pieces):
        self.names = [*pieces, *map(chr, range(32, 127)), "◁", "▷"]
        self.pieces = pieces

    def encode_control(self, text):
        return [self.names.index(text)] if text in self.pieces else [self.names.index(letter) for letter in text]

    def feed(self, ids):
        return "".join(self.names[token] for token in ids)

    def close(self):
        return ""


def run(form, script, wanted, budget):
    """The model wants to say ``wanted``; the budget may say something else in between."""
    reply = Reply(script, Parser(form))
    watch = ThinkingBudget(reply, budget, script.encode_control)
    deltas, said, forced = [], [], []
    line = [script.names.index(piece) for piece in wanted]
    while line or forced:
        token = forced.pop(0) if forced else line.pop(0)
        said.append(script.names[token])
        deltas += reply.feed(token)
        forced += watch.note()
    assert reply.reasoning is None
    deltas += reply.close()
    return "".join(said), "".join(d.reasoning for d in deltas), "".join(d.text for d in deltas), watch.num_tokens


TAGS = ("<think>", "</think>", "<analysis>", "</analysis>", "<answer>", "</answer>")


@pytest.mark.parametrize("budget", [0, 1, 3, 5, 6, None])
def test_keye_thinks_as_long_as_it_may(budget):
    script = Script(*TAGS)
    thought = "abcdef"[:budget]
    # At the budget the tag is written for the model, which sees it and goes on to its answer.
    wanted = ["<think>", *thought, *(["</think>"] if budget is None else []), "<answer>", "4", "</answer>"]
    said, reasoning, text, counted = run(KEYE_PREVIEW, script, wanted, budget)
    assert said == f"<think>{thought}</think><answer>4</answer>"
    assert (reasoning, text, counted) == (thought, "4", len(thought))


def test_all_blocks_together_count():
    script = Script(*TAGS)
    wanted = ["<analysis>", *"abc", "</analysis>", "<think>", *"de", "<answer>", "4"]
    said, reasoning, text, counted = run(KEYE_PREVIEW, script, wanted, 5)
    assert said == "<analysis>abc</analysis><think>de</think><answer>4"
    assert (reasoning, text, counted) == ("abc\n\nde", "4", 5)
    said, reasoning, text, counted = run(KEYE_PREVIEW, script, ["<analysis>", *"ab", "<think>", "<think>", "4"], 2)
    assert said == "<analysis>ab</analysis><think></think><think></think>4"
    assert (reasoning, text, counted) == ("ab", "4", 2)


def test_kimi_writes_its_tag_letter_by_letter():
    script = Script()
    said, reasoning, text, counted = run(KIMI, script, "◁think▷abc4", 3)
    assert (said, reasoning, text, counted) == ("◁think▷abc◁/think▷4", "abc", "4", 3)
    # What the model has begun of the tag is not written twice.
    said, reasoning, text, counted = run(KIMI, script, "◁think▷a◁/t4", 4)
    assert (said, reasoning, text, counted) == ("◁think▷a◁/think▷4", "a", "4", 4)


THINKERS = ("Keye", "KeyeVL1_5", "KeyeVLMoe", "kimi_vl")


@pytest.mark.parametrize("kind", THINKERS)
@pytest.mark.parametrize("speculate", [0, 4])
def test_an_engine_closes_the_thought(engines, kind, speculate, monkeypatch):
    """A tiny model made to begin with a thought, which it would never leave."""
    vlm = engines[kind]
    renderer, engine = vlm.parts.renderer, vlm._engine.engine
    monkeypatch.setattr(engine, "settings", type(engine.settings)(speculate=speculate))
    opening = renderer.tokenizer.encode_control(renderer.format.think.open)
    closing = renderer.tokenizer.encode_control(renderer.format.think.close)
    letter = renderer.tokenizer.encode("a")[0]
    original = engine.runner._pick

    def pick(sequences, logits, choosers):
        seen = {}
        for sequence, row in zip(sequences, logits, strict=True):
            at = len(sequence.tokens) + seen.setdefault(id(sequence), 0)
            seen[id(sequence)] += 1
            row[:] = torch.nn.functional.one_hot(torch.tensor(opening[at] if at < len(opening) else letter), len(row)) * 9.0
        return original(sequences, logits, choosers)

    monkeypatch.setattr(engine.runner, "_pick", pick)
    handle = vlm.submit(ASK, Sampling(max_tokens=30, thinking_budget=7))
    pieces = list(handle)
    output = handle.result()
    said = list(output.tokens)
    assert said[: len(opening)] == opening
    assert said[len(opening) : len(opening) + 7 + len(closing)] == [letter] * 7 + closing
    assert output.message.reasoning == "a" * 7 == "".join(piece.reasoning for piece in pieces)
    assert output.message.text == "a" * (30 - 7 - len(opening) - len(closing)) == "".join(piece.text for piece in pieces)
    assert (output.usage.reasoning_tokens, output.usage.completion_tokens, output.finish) == (7, 30, "length")
    free = vlm.submit(ASK, Sampling(max_tokens=30)).result()
    assert free.message.text == "" and free.usage.reasoning_tokens == 30 - len(opening)
