"""Where bounds are as small as they may be, and where one request meets another at a bad moment."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine.test_step import ENDLESS, finish, line_up_tokens, small, step, tokens


@pytest.mark.parametrize("vlm", ["Keye"], indirect=True)
def test_a_reply_that_is_computed_again_token_by_token(vlm):
    """Beside one that decodes a step has one token for it: each time its next one, not its last."""
    engine = small(vlm, step_tokens=2)
    made = [
        line_up_tokens(engine, tokens(4, seed), max_tokens=length, temperature=1.0, seed=seed)
        for seed, length in ((1, 30), (2, 12))
    ]
    alone = [vlm.generate([one.prompt], replace(one.sampling, **ENDLESS))[0].tokens for one in made]
    while len(made[1].tokens) < 8:
        step(engine)
    engine._engine.engine.scheduler._preempt(made[1])
    finish(engine)
    assert [sequence.output().tokens for sequence in made] == alone
