"""Lookup of n-grams against its definition, and greedy replies that a draft must not change."""

from __future__ import annotations

import pytest
from engine.conftest import MODEL_TYPES, TWO_TYPES
from engine.mixes import free, mix
from hypothesis import given, settings
from hypothesis import strategies as st

from mirada import VLM, Sampling
from mirada.engine.ngram import LONGEST, SHORTEST, NGramIndex, accept, propose
from mirada.engine.settings import EngineSettings

TOKENS = st.lists(st.integers(0, 3), max_size=60)


def proposed_plainly(tokens, count):
    """Search backwards for the longest run at the end; read on from there, over the end into what was read."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        run = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if len(run) == size and tokens[start : start + size] == run:
                told = list(tokens)
                for i in range(count):
                    told.append(told[start + size + i])
                return told[len(tokens) :]
    return []


@settings(max_examples=100)
@given(tokens=TOKENS, more=TOKENS, count=st.integers(0, 12))
def test_the_longest_run_at_its_last_place(tokens, more, count):
    index = NGramIndex(tokens)
    assert index.propose(count) == propose(tokens, count) == proposed_plainly(tokens, count)
    for token in more:
        index.append(token)
    assert index.propose(count) == proposed_plainly(tokens + more, count)


@given(draft=TOKENS, chosen=TOKENS)
def test_accepted_is_the_longest_equal_beginning(draft, chosen):
    right = accept(draft, chosen)
    assert draft[:right] == chosen[:right]
    assert right == min(len(draft), len(chosen)) or draft[right] != chosen[right]


@pytest.fixture(scope="module")
def drafting(tiny_directories):
    """The same tiny models with drafts."""
    made = {kind: VLM(folder, device="cpu", engine=EngineSettings(speculate=7)) for kind, folder in tiny_directories.items()}
    yield made
    for vlm in made.values():
        vlm.close()


WAYS = [
    Sampling(max_tokens=40, ignore_eos=True),
    Sampling(max_tokens=40),
    Sampling(max_tokens=23, ignore_eos=True, logprobs=1),
    Sampling(max_tokens=40, ignore_eos=True, stop=("e",)),
    Sampling(max_tokens=30, temperature=1.0, seed=3),
    Sampling(max_tokens=40, ignore_eos=True, max_repeats=2),
]


@pytest.mark.parametrize(
    ("vlm", "weighed"),
    [*((kind, False) for kind in MODEL_TYPES), *((kind, True) for kind in TWO_TYPES)],
    indirect=["vlm"],
)
def test_drafts_change_no_reply(vlm, drafting, weighed, request, monkeypatch):
    """Token for token, and how each ended, for prompts with pictures, one by one and together; and drafts were right. Also
    where the clock decides which are sent."""
    kind = request.node.callspec.params["vlm"]
    asked = mix(vlm, seed=5, count=4)
    with_drafts = drafting[kind]
    if not weighed:
        monkeypatch.setattr(with_drafts._engine.engine.drafts, "costs", free())
    before = with_drafts.stats()["accepted_tokens"]
    for step in (1, 4):
        for start in range(0, 4, step):
            pairs = [(asked[i], WAYS[(i + step) % len(WAYS)]) for i in range(start, start + step)]
            plain = [vlm.submit(prompt, way, media=media) for (prompt, media), way in pairs]
            fast = [with_drafts.submit(prompt, way, media=media) for (prompt, media), way in pairs]
            for one, other in zip(plain, fast, strict=True):
                one, other = one.result(), other.result()
                assert one.error is None and other.error is None
                assert (other.tokens, other.finish, other.raw) == (one.tokens, one.finish, one.raw)
    assert weighed or with_drafts.stats()["accepted_tokens"] > before
