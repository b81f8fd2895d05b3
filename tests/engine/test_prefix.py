"""Beginnings of prompts are found again exactly when all that decides their keys and values is the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from weakref import ref

import numpy as np
import pytest
import torch
from engine.conftest import MODEL_TYPES, VIDEO_TYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import pack

from mirada import VLM
from mirada.engine.load import load
from mirada.engine.prefix import BLOCK, PrefixCache, Weights, root_key
from mirada.engine.sequence import Sequence
from mirada.engine.vision import encode
from mirada.layers.batch import Batch
from mirada.layers.cache import SlabCache, make_cache
from mirada.layers.kernels.matrix import Matrix
from mirada.layers.linear import MatrixLinear
from mirada.layers.paged import PagedCache
from mirada.media.grid import Patches
from mirada.media.limits import FetchLimits
from mirada.media.prepare import prepare_many
from mirada.models.positions import positions
from mirada.types import Image, Message, Prompt, Sampling, Span, Text, Video

QUIET = [HealthCheck.function_scoped_fixture]
WORDS = "Say at some length and in plain words what is to be seen there, from left to right and top to bottom. "


@pytest.fixture(scope="session")
def models(tiny_directories):
    return {kind: load(directory, "cpu") for kind, directory in tiny_directories.items()}


@pytest.fixture(params=MODEL_TYPES)
def parts(request, models):
    return models[request.param]


def asked(parts, *content, rule=None) -> Sequence:
    """A sequence for one user turn."""
    messages = [Message("user", tuple(Text(part) if isinstance(part, str) else part for part in content))]
    media = [part for part in messages[0].parts if isinstance(part, Image | Video)]
    patches = tuple(prepare_many(media, rule or parts.rule, FetchLimits()))
    return sequence(parts.renderer.render(messages, patches), patches)


def sequence(prompt: Prompt, media=()) -> Sequence:
    where, following = positions(len(prompt.tokens), prompt.spans)
    return Sequence(prompt, Sampling(), None, media, where, following, limit=99)


def caches(parts, most=1 << 24, layout="slab", kv="auto"):
    cache = make_cache(parts.cache_spec, torch.float32, "cpu", layout=layout, kv=kv, budget=1 << 25)
    return cache, PrefixCache(cache, most, Weights(parts.model))


@torch.inference_mode()
def compute(parts, cache, one: Sequence, end: int | None = None) -> torch.Tensor:
    """Logits [V] after the tokens up to ``end`` (all of them), from where the sequence stands."""
    start, end = one.computed, end or one.num_tokens
    features = encode(parts.model, one.media, parts.rule.grid, torch.device("cpu"), torch.float32)
    rows = np.concatenate([np.arange(span.start, span.end) for span in one.prompt.spans] or [np.empty(0, np.int64)])
    wanted = (rows >= start) & (rows < end)
    batch = Batch(
        torch.tensor(one.ids(start, end)), torch.from_numpy(np.array(one.places(start, end), np.int64)), (end - start,),
        (start,), (one.slot,), torch.from_numpy(rows[wanted] - start) if wanted.any() else None,
    )  # fmt: skip
    given = None if features is None or not wanted.any() else features[torch.from_numpy(wanted)]
    hidden = parts.model.forward(batch, given, cache)
    one.computed = end
    return parts.model.logits(hidden[-1:])[0]


def keep(parts, cache, prefix, one: Sequence, slot=0, restore=True) -> torch.Tensor:
    """Run a sequence's prompt through the cache, with what is there of it, and leave it to others."""
    one.slot = slot
    cache.allocate(slot)
    one.computed, put = prefix.match(one)
    put(slot)
    logits = compute(parts, cache, one)
    prefix.offer(one)
    cache.free(slot)
    return logits


def found(prefix, one: Sequence) -> int:
    """Tokens of a sequence that are there."""
    return prefix.match(one)[0]


@torch.inference_mode()
def plain(parts, one: Sequence) -> torch.Tensor:
    """Logits [V] after all tokens, by one forward without a cache."""
    features = encode(parts.model, one.media, parts.rule.grid, torch.device("cpu"), torch.float32)
    whole = Prompt((*one.prompt.tokens, *one.tokens), one.prompt.spans)
    return parts.model.logits(parts.model(pack([whole]), features)[-1:])[0]


def drawn(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


# What is found is right.


@pytest.mark.parametrize("layout", ["slab", "paged"])
def test_restored_equals_recomputed(parts, layout):
    cache, prefix = caches(parts, layout=layout)
    picture = Image(drawn(1, 84, 112))
    first = asked(parts, WORDS, picture, WORDS, "one")
    assert torch.allclose(keep(parts, cache, prefix, first), plain(parts, first), atol=1e-5)
    for ending in ("two", "one", WORDS):
        second = asked(parts, WORDS, picture, WORDS, ending)
        count = found(prefix, second)
        assert count > second.prompt.spans[-1].end and 0 < second.num_tokens - count < 32 + len(WORDS) + 16
        assert torch.allclose(keep(parts, cache, prefix, second), plain(parts, second), atol=1e-5)
    assert prefix.hits == 6 and prefix.misses == 1 and prefix.tokens_reused > 0
    assert cache.bytes_held == 0


@pytest.mark.parametrize("kind", ["KeyeVL1_5", "kimi_vl"])
def test_int8_blocks_are_restored_as_they_were(models, kind):
    parts = models[kind]
    cache, prefix = caches(parts, kv="int8")
    exact, other = caches(parts)
    first, second = (asked(parts, Image(drawn(1, 84, 112)), WORDS) for _ in range(2))
    again = keep(parts, cache, prefix, first), keep(parts, cache, prefix, second)
    assert prefix.hits == 1 and torch.allclose(*again, atol=1e-4)
    wide = keep(parts, exact, other, asked(parts, Image(drawn(1, 84, 112)), WORDS))
    assert 1e-6 < (again[1] - wide).norm() / wide.norm() < 0.05


def test_the_answer_is_found_by_the_next_turn(parts):
    """Generated tokens are kept too, at the positions that the next prompt gives them, also when their sequence is over."""
    cache, prefix = caches(parts)
    first = asked(parts, Image(drawn(2, 84, 112)), WORDS)
    first.slot = 0
    cache.allocate(0)
    first.computed, _ = prefix.match(first)
    compute(parts, cache, first)
    first.tokens = [7, 8, 9] * 20
    compute(parts, cache, first, first.num_tokens - 1)
    media, first.positions = first.media, None  # as at its end
    first.media = ()
    prefix.offer(first)
    cache.free(0)
    turn = sequence(Prompt((*first.prompt.tokens, *first.tokens, 1, 2, 3), first.prompt.spans), media)
    assert found(prefix, turn) == (first.num_tokens - 1) // BLOCK * BLOCK > len(first.prompt.tokens)
    assert torch.allclose(keep(parts, cache, prefix, turn), plain(parts, turn), atol=1e-5)


def test_at_least_one_token_is_left(parts):
    cache, prefix = caches(parts)
    for size in (BLOCK, BLOCK + 1, 4 * BLOCK, 4 * BLOCK + 1):
        one = sequence(Prompt(tuple(range(3, 3 + size))))
        keep(parts, cache, prefix, one)
        assert found(prefix, sequence(one.prompt)) == (size - 1) // BLOCK * BLOCK


# Nothing else is found.


@pytest.fixture
def one_picture(models):
    """A cache that holds a prompt which begins with a picture, and what asks the same of others."""
    parts = models["KeyeVL1_5"]
    cache, prefix = caches(parts)
    base = drawn(5, 84, 112)
    keep(parts, cache, prefix, asked(parts, Image(base), WORDS))

    def ask(picture, **settings) -> bool:
        """Whether any block with a visual token is there; all that come after it, if so."""
        one = asked(parts, Image(picture, **settings), WORDS)
        count, span = found(prefix, one), one.prompt.spans[0]
        assert count <= span.start or count == (one.num_tokens - 1) // BLOCK * BLOCK > span.end
        return count > span.start

    return base, ask


@settings(max_examples=8, suppress_health_check=QUIET)
@given(
    row=st.integers(0, 83),
    column=st.integers(0, 111),
    channel=st.integers(0, 2),
    change=st.integers(1, 255),
    seed=st.integers(),
)
def test_another_picture_or_one_pixel_changed_is_never_found(one_picture, row, column, channel, change, seed):
    base, ask = one_picture
    changed = base.copy()
    changed[row, column, channel] = (int(base[row, column, channel]) + change) % 256
    assert ask(base)
    assert not ask(changed)
    assert not ask(drawn(abs(seed) + 6, 84, 112))


def test_other_pixel_settings_are_never_found(one_picture, models):
    base, ask = one_picture
    assert ask(base)
    assert not ask(base, max_pixels=56 * 56) and not ask(base, min_pixels=168 * 168)
    rule = models["KeyeVL1_5"].rule
    other = replace(rule, grid=replace(rule.grid, mean=(0.4, 0.5, 0.5)))  # the same patches, normalised otherwise
    patches = [prepare_many([Image(base)], r, FetchLimits())[0] for r in (rule, other)]
    assert (patches[0].pixels == patches[1].pixels).all() and patches[0].key != patches[1].key


@pytest.mark.parametrize("kind", VIDEO_TYPES)
def test_the_same_frames_at_another_fps_are_never_found(models, kind):
    parts = models[kind]
    cache, prefix = caches(parts)
    frames = [drawn(i, 56, 56) for i in range(8)]
    before = [asked(parts, Video(frames, fps=fps), WORDS) for fps in (2.0, 4.0, 2.0)]
    keep(parts, cache, prefix, before[0])
    same_key = before[0].media[0].key == before[1].media[0].key
    differ = before[0].prompt.tokens != before[1].prompt.tokens or not np.array_equal(
        before[0].places(0, before[0].num_tokens), before[1].places(0, before[1].num_tokens)
    )
    assert found(prefix, before[2]) >= before[2].num_tokens - 33
    if differ:  # time is in the positions or in the text
        first = next(
            i for i in range(before[0].num_tokens)
            if before[0].ids(i, i + 1) != before[1].ids(i, i + 1)
            or not np.array_equal(before[0].places(i, i + 1), before[1].places(i, i + 1))
        )  # fmt: skip
        assert found(prefix, before[1]) <= first // BLOCK * BLOCK < before[1].num_tokens - 33
    else:
        assert not same_key or found(prefix, before[1]) == found(prefix, before[2])


def test_positions_alone_tell_blocks_apart(models):
    """The same tokens and pictures at other positions: time steps of a video that nothing else shows."""
    parts = models["qwen2_vl"]
    cache, prefix = caches(parts)
    span = Span("video", 2, (4, 8, 8), 0, 0, 1.0, hash=bytes(range(32)))
    patches = (Patches("video", np.zeros((256, 3, 2, 14, 14), np.uint8), ((4, 8, 8),), (112, 112), span.hash),)
    pad = parts.model.config.video_token_id
    tokens = (1, 2, *[pad] * span.num_tokens, *range(60))
    keep(parts, cache, prefix, sequence(Prompt(tokens, (span,)), patches))
    assert found(prefix, sequence(Prompt(tokens, (span,)), patches)) == (len(tokens) - 1) // BLOCK * BLOCK
    for other in (replace(span, t_step=2.0), replace(span, t_step=0.5)):  # the first of its frames stands where it did
        assert found(prefix, sequence(Prompt(tokens, (other,)), patches)) <= 18 // BLOCK * BLOCK
    assert found(prefix, sequence(Prompt(tokens, (replace(span, frame=1),)), patches)) == 0


def test_another_adapter_salt_or_format_is_never_found(models):
    parts = models["Keye"]
    cache, prefix = caches(parts)

    def ask(**fields):
        return replace(asked(parts, WORDS), **fields)

    keep(parts, cache, prefix, ask(adapter="a", salt="b"))
    assert found(prefix, ask(adapter="a", salt="b")) > 0
    for fields in ({}, {"adapter": "a"}, {"salt": "b"}, {"adapter": "b", "salt": "a"}, {"adapter": "ab"}, {"salt": "ab"}):
        assert found(prefix, ask(**fields)) == 0
    roots = [root_key(w, a, f, s) for w in (b"", b"1") for a in ("", "1") for f in ("", "1") for s in ("", "1")]
    assert len(set(roots)) == 16
    formats = {caches(parts, kv=kv)[1]._format for kv in ("auto", "int8")}
    assert len(formats) == 2


def test_media_without_a_key_or_with_anothers_are_never_found(models):
    parts = models["KeyeVL1_5"]
    cache, prefix = caches(parts)
    one, other = (asked(parts, Image(drawn(seed, 84, 112)), WORDS) for seed in (1, 2))
    keep(parts, cache, prefix, one)
    start = one.prompt.spans[0].start
    assert found(prefix, sequence(one.prompt, one.media)) > start
    assert found(prefix, sequence(one.prompt, other.media)) <= start  # rendered for one, sent with the other
    bare = replace(one.prompt, spans=tuple(replace(span, hash=b"") for span in one.prompt.spans))
    before = len(prefix)
    keep(parts, cache, prefix, sequence(bare, one.media))
    assert found(prefix, sequence(bare, one.media)) <= start and len(prefix) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: [parameter.add_(1e-3) for parameter in model.decoder.norm.parameters()] and None,
        lambda model: model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()}),
        lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.detach().clone())),
        lambda model: setattr(model.decoder.layers[1], "norm1", copy.deepcopy(model.decoder.layers[1].norm1)),
        lambda model: model.lm_head.weight.data.add_(1) is None or "past the counters",
    ],
)
def test_other_weights_are_never_found(models, change):
    parts = models["Keye"]
    parts = replace(parts, model=copy.deepcopy(parts.model))
    cache = make_cache(parts.cache_spec, torch.float32, "cpu")
    weights = Weights(parts.model)
    prefix = PrefixCache(cache, 1 << 24, weights)
    keep(parts, cache, prefix, asked(parts, WORDS))
    running = asked(parts, WORDS, "begun before")
    running.slot = 1
    cache.allocate(1)
    prefix.match(running)
    compute(parts, cache, running)
    assert found(prefix, asked(parts, WORDS)) > 0
    with torch.no_grad():
        unseen = change(parts.model) == "past the counters"
    if unseen:
        assert found(prefix, asked(parts, WORDS)) > 0  # what cannot be seen must be said
        weights.changed()
    prefix.offer(running)
    assert found(prefix, asked(parts, WORDS)) == 0 and len(prefix) == 0 and prefix.bytes_held == 0
    keep(parts, cache, prefix, asked(parts, WORDS))
    assert found(prefix, asked(parts, WORDS)) > 0


def at(buffer: np.ndarray) -> torch.Tensor:
    """A new tensor on memory that another may have had before."""
    return torch.from_numpy(buffer)


def put_parameter(model, buffer):
    model.lm_head.weight = torch.nn.Parameter(at(buffer))


def put_data(model, buffer):
    model.lm_head.weight.data = at(buffer)


def put_matrix(model, buffer):
    model.lm_head = MatrixLinear(Matrix.of(at(buffer)))


def put_values(model, buffer):
    model.lm_head.matrix = Matrix.of(at(buffer))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (put_parameter, put_parameter),
        (put_parameter, put_data),
        (put_matrix, put_matrix),
        (put_matrix, put_values),
    ],
)
def test_other_weights_at_the_same_address_are_never_found(models, first, then):
    """An allocator gives out again what was freed: the same address, the same size, and no write that torch has counted."""
    parts = models["Keye"]
    parts = replace(parts, model=copy.deepcopy(parts.model))
    buffer = parts.model.lm_head.weight.detach().numpy().copy()
    first(parts.model, buffer)
    address = buffer.ctypes.data
    cache = make_cache(parts.cache_spec, torch.float32, "cpu")
    prefix = PrefixCache(cache, 1 << 24, Weights(parts.model))
    with torch.inference_mode():
        keep(parts, cache, prefix, asked(parts, WORDS))
    assert found(prefix, asked(parts, WORDS)) > 0
    assert found(prefix, asked(parts, WORDS)) > 0, "nothing has changed"
    buffer += 0.01
    then(parts.model, buffer)
    held = parts.model.lm_head
    assert (held.matrix.values if isinstance(held, MatrixLinear) else held.weight).data_ptr() == address
    assert found(prefix, asked(parts, WORDS)) == 0 == len(prefix)


def test_the_id_of_weights_never_comes_back(models):
    """Those of before, put in their place again, may have been written to meanwhile by others than torch."""
    model = copy.deepcopy(models["Keye"].model)
    weights = Weights(model)
    old, seen = model.lm_head.weight, [weights()]
    for parameter in (torch.nn.Parameter(old.detach().clone()), old, torch.nn.Parameter(old.detach()), old):
        model.lm_head.weight = parameter
        assert weights() not in seen
        seen.append(weights())
        assert weights() == seen[-1]
    gone = ref(old)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(old))
    del old, parameter
    assert gone() is None, "it keeps no weights alive"


# Bounds and order.


def whole(prefix, cache) -> None:
    """Every block but a first one follows one that is there, counts are right, and no handle is used twice."""
    blocks = prefix._blocks
    roots = {root_key(b"", "", prefix._format, str(salt)) for salt in ("", 0, 1, 2)}
    for block in blocks.values():
        assert block.parent in blocks or block.parent in roots
        assert block.followers == sum(other.parent == block.key for other in blocks.values())
        assert block.parent not in blocks or blocks[block.parent].used >= block.used
    handles = [block.handle for block in blocks.values()]
    assert len(set(handles)) == len(handles)
    assert prefix.bytes_held == len(handles) * prefix._store.bytes_per_block <= prefix.max_bytes
    if isinstance(cache, PagedCache):
        assert sum(cache._kept) == len(handles) and len(cache._free) == cache.num_pages - len(handles)
    else:
        assert len(prefix._store._free) == prefix._most - len(handles)
    assert {key for _, key in prefix._leaves} >= {b.key for b in blocks.values() if not b.followers}


def rows(tokens):
    """A value for each token that says all that came before it: [n, 1, 1]."""
    made, value = [], 1.0
    for token in tokens:
        value = (value * 31 + token + 1) % 65521
        made.append(value)
    return torch.tensor(made).view(-1, 1, 1)


@st.composite
def prompts(draw):
    """Prompts that begin alike more often than not, with a salt each."""
    made = []
    for _ in range(draw(st.integers(1, 12))):
        tokens = [draw(st.integers(0, 1))] * draw(st.integers(1, 24))
        made.append((tokens + draw(st.lists(st.integers(0, 1), max_size=6)), draw(st.sampled_from([0, 0, 0, 1]))))
    return made


@settings(max_examples=30)
@given(
    prompts=prompts(),
    most=st.integers(0, 9),
    layout=st.sampled_from(["slab", "paged"]),
)
def test_what_is_restored_is_what_was_written_and_no_chain_breaks(prompts, most, layout):
    size, spec = 2 * 4, {"num_layers": 2, "num_kv_heads": 1, "head_dim": 1}
    if layout == "slab":
        cache = SlabCache(**spec)
    else:
        cache = PagedCache(**spec, budget=12 * 4 * 2 * size, page=4)
    prefix = PrefixCache(cache, most * 4 * 2 * size, lambda: b"", block=4)
    for tokens, salt in prompts:
        one = replace(sequence(Prompt(tuple(tokens))), slot=3, salt=str(salt))
        cache.allocate(3)
        one.computed, put = prefix.match(one)
        assert one.computed < len(tokens) and one.computed % 4 == 0
        put(3)
        want = rows([salt, *tokens])[1:]
        for layer in range(2):
            new = want[one.computed :] + layer
            sides = cache.write(layer, 3, one.computed, new, -new)
            assert torch.equal(sides[0][0], want[:, 0] + layer) and torch.equal(sides[1], -sides[0])
        one.computed = len(tokens)
        prefix.offer(one)
        cache.free(3)
        whole(prefix, cache)
    prefix.clear()
    whole(prefix, cache)


def test_the_least_recently_used_goes_first_and_its_end_before_its_beginning():
    cache = SlabCache(1, 1, 1)
    prefix = PrefixCache(cache, 4 * 4 * 8, lambda: b"", block=4)

    def run(*tokens):
        one = replace(sequence(Prompt(tokens)), slot=0)
        cache.allocate(0)
        one.computed, put = prefix.match(one)
        put(0)
        cache.write(0, 0, one.computed, *[torch.zeros(len(tokens) - one.computed, 1, 1)] * 2)
        one.computed = len(tokens)
        prefix.offer(one)
        cache.free(0)

    def there(*tokens):
        return prefix.match(sequence(Prompt((*tokens, 9))))[0]

    a, b, c = (0,) * 8, (1,) * 8, (2,) * 4
    run(*a)
    run(*b)
    assert (there(*a), there(*b)) == (8, 8)  # b was used last
    run(*c)
    assert (there(*a), there(*b), there(*c)) == (4, 8, 4)
    run(*c, *c, *c, *c, *c)  # longer than the whole cache: its beginning is kept
    assert (there(*a), there(*b), there(*c * 5)) == (0, 0, 16)
    assert prefix.evictions == 4 and prefix.stats.blocks == 4 == prefix.bytes_held // (4 * 8)


def test_pages_kept_for_later_give_way_to_a_running_sequence(models):
    parts = models["qwen2_vl"]
    size = 32 * make_cache(parts.cache_spec, torch.float32, "cpu").bytes_per_token
    cache = make_cache(parts.cache_spec, torch.float32, "cpu", layout="paged", budget=6 * size)
    prefix = PrefixCache(cache, 6 * size, Weights(parts.model))
    keep(parts, cache, prefix, sequence(Prompt(tuple(range(5, 165)))))
    assert prefix.bytes_held == 5 * size and cache.bytes_held == 0
    other = sequence(Prompt((*range(5, 69), *range(100, 220))))
    assert torch.allclose(keep(parts, cache, prefix, other), plain(parts, other), atol=1e-5)
    assert prefix.hits == 1 and prefix.evictions >= 3 and prefix.bytes_held <= 6 * size


def test_off_keeps_nothing():
    cache = SlabCache(1, 1, 1)
    prefix = PrefixCache(cache, 0, lambda: b"")
    one = replace(sequence(Prompt(tuple(range(100)))), slot=0)
    cache.allocate(0)
    assert prefix.match(one)[0] == 0
    cache.write(0, 0, 0, *[torch.zeros(100, 1, 1)] * 2)
    one.computed = 100
    prefix.offer(one)
    assert len(prefix) == 0 and found(prefix, sequence(one.prompt)) == 0


def test_the_heap_of_leaves_stays_small():
    cache = SlabCache(1, 1, 1)
    prefix = PrefixCache(cache, 1 << 12, lambda: b"", block=BLOCK)
    one = replace(sequence(Prompt(tuple(range(40)))), slot=0)
    cache.allocate(0)
    prefix.match(one)
    cache.write(0, 0, 0, *[torch.zeros(40, 1, 1)] * 2)
    one.computed = 40
    prefix.offer(one)
    for _ in range(500):
        prefix.match(sequence(one.prompt))
    assert len(prefix._leaves) < 100 and len(prefix._chains) == 1


# Through the engine.


GREEDY = Sampling(max_tokens=40, ignore_eos=True)


def counts(vlm) -> tuple[int, int]:
    assert vlm._engine.wait_idle(10)
    stats = vlm.stats()
    return stats["prefix_cache_hits"], stats["prefix_cache_tokens"]


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_conversation_goes_on_from_what_is_there(tiny_directories, kind):
    """Turn by turn the same tokens as without a cache, while only what is new is computed."""
    chat = [Message("user", (Image(drawn(3, 84, 112)), Text(WORDS)))]
    with VLM(tiny_directories[kind], device="cpu") as vlm:
        off = VLM(tiny_directories[kind], device="cpu", engine={"prefix_cache_bytes": 0, "encoder_cache_bytes": 0})
        for turn in range(3):
            ours, plain = (one.generate([chat], GREEDY)[0] for one in (vlm, off))
            assert ours.error is None and ours.tokens == plain.tokens
            hits, reused = counts(vlm)
            assert hits == turn and (reused > 32) == (turn > 0)
            chat = [*chat, Message("assistant", "So it is. " * 5), Message("user", f"And then? {turn}")]
        stats, without = vlm.stats(), off.stats()
        assert stats["computed_tokens"] == without["computed_tokens"] - reused
        assert stats["encoded_patches"] == 48 < without["encoded_patches"] == 3 * 48
        assert without["prefix_cache_bytes"] == without["prefix_cache_hits"] == 0 < stats["prefix_cache_bytes"]
        off.close()


def test_a_prompt_is_shared_while_its_sequence_still_runs(tiny_directories):
    with VLM(tiny_directories["Keye"], device="cpu") as vlm:
        first = vlm.submit([Message("user", WORDS)], replace(GREEDY, max_tokens=1500))
        next(iter(first))
        second = vlm.generate([[Message("user", WORDS)]], replace(GREEDY, max_tokens=5))[0]
        assert not first.done
        first.cancel()
        assert counts(vlm)[0] == 1
        assert first.result().tokens[:5] == second.tokens


def test_a_model_in_memory_keeps_beginnings_only_when_asked(tiny_directories):
    with VLM(tiny_directories["Keye"], device="cpu") as base:
        parts = replace(base.parts, model=copy.deepcopy(base.parts.model))
    chat = [Message("user", WORDS)]

    def made(**options):
        return VLM.from_parts(parts.model, parts.renderer, parts.rule, eos=parts.eos, **options)

    with made() as plain, made(engine={"prefix_cache_bytes": 1 << 20}) as kept:
        for round in range(3):
            before = counts(kept)[0]
            a, b = (vlm.generate([chat], GREEDY)[0].tokens for vlm in (plain, kept))
            assert a == b and counts(kept)[0] == before
            assert kept.generate([chat], GREEDY)[0].tokens == a and counts(kept)[0] == before + 1
            noise = torch.Generator().manual_seed(round)
            for parameter in parts.model.decoder.parameters():  # training goes on
                with torch.no_grad():
                    change = 0.1 * torch.randn(parameter.shape, generator=noise)
                    parameter.data.add_(change) if round else parameter.add_(change)
            if round:
                kept.forget()
        assert plain.stats()["prefix_cache_bytes"] == 0 == counts(plain)[0]
        assert len({a, *(plain.generate([chat], GREEDY)[0].tokens,)}) == 2


def test_a_sequence_that_goes_on_does_not_push_out_its_own_beginning():
    """Others came and went since it was found; what it adds takes their place."""
    cache = SlabCache(1, 1, 1)
    prefix = PrefixCache(cache, 3 * 4 * 8, lambda: b"", block=4)

    def begin(slot, *tokens) -> Sequence:
        one = replace(sequence(Prompt(tokens)), slot=slot)
        cache.allocate(slot)
        one.computed, put = prefix.match(one)
        put(slot)
        return one

    def end(one) -> None:
        cache.write(0, one.slot, one.computed, *[torch.zeros(one.num_tokens - one.computed, 1, 1)] * 2)
        one.computed = one.num_tokens
        prefix.offer(one)
        whole(prefix, cache)

    end(begin(0, *range(8)))
    long = begin(1, *range(12))
    end(begin(2, 7, 7, 7, 7))
    end(long)
    assert [found(prefix, sequence(Prompt((*tokens, 1)))) for tokens in (range(12), [7] * 4)] == [12, 0]
