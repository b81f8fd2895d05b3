"""The front door, as written in the README: ask, generate, stream, submit."""

from __future__ import annotations

import asyncio
import io
import threading

import numpy as np
import pytest
import torch
from engine.conftest import VIDEO_TYPES
from engine.mixes import plain_logits
from PIL import Image as pil

import mirada
from mirada import VLM, Delta, Image, Message, Sampling, Text, Video
from mirada.engine.guide import allow
from mirada.engine.sequence import fold
from mirada.errors import (
    ContextOverflow,
    MediaNotFound,
    MediaUnsupported,
    MessageError,
    MiradaError,
    RequestFailed,
    SettingsError,
)

HI = [Message("user", "hi")]
LONG = Sampling(max_tokens=12, ignore_eos=True)


def frames(count):
    return [np.random.default_rng(i).integers(0, 256, (56, 84, 3), dtype=np.uint8) for i in range(count)]


@pytest.fixture
def chat(picture):
    return [Message("user", (Image(picture), Text("What does the text say?")))]


def test_the_snippet(vlm, picture, tmp_path):
    path = tmp_path / "receipt.png"
    pil.fromarray(picture).save(path)
    answer = vlm.ask(str(path), "What is the total?", max_tokens=8)
    assert isinstance(answer, str)
    chat = [Message("user", (Image(str(path)), Text("What does the text say?")))]
    outputs = list(vlm.generate([chat, chat], Sampling(max_tokens=8, temperature=0.0)))
    assert len(outputs) == 2
    for output in outputs:
        assert output.error is None and output.finish in ("stop", "length")
        assert 1 <= len(output.tokens) == output.usage.completion_tokens <= 8
    assert outputs[0].tokens == outputs[1].tokens
    assert "".join(delta.text for delta in vlm.stream(chat, Sampling(max_tokens=8))) == outputs[0].message.text


def test_ask_takes_media_of_every_kind_and_gives_the_same_answer(either, picture, tmp_path):
    path = tmp_path / "a.png"
    pil.fromarray(picture).save(path)
    data = path.read_bytes()
    kinds = [
        path,
        str(path),
        path.as_uri(),
        data,
        io.BytesIO(data).getbuffer(),
        pil.fromarray(picture),
        picture,
        Image(picture),
    ]
    answers = {either.ask(kind, "What?", max_tokens=6, ignore_eos=True) for kind in kinds}
    assert len(answers) == 1
    assert either.ask([path, picture], "What?", max_tokens=4) == either.ask(path, picture, text="What?", max_tokens=4)
    assert isinstance(either.ask("no media at all", max_tokens=2), str)


@pytest.mark.parametrize("vlm", VIDEO_TYPES, indirect=True)
def test_ask_passes_settings_on(vlm, picture):
    used = []
    original = type(vlm._requests).begin

    def begin(self, chat, *rest):
        made = original(self, chat, *rest)
        used.append((chat, made[0]))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(vlm._requests), "begin", begin)
        vlm.ask(
            np.stack(frames(4)), picture, "What?", fps=2.0, max_pixels=50_000, max_tokens=2, system="Be brief.", thinking="off"
        )
    chat, sequence = used[0]
    assert [message.role for message in chat] == ["system", "user"]
    video, image, text = chat[1].parts
    assert (video.fps, video.max_pixels, image.max_pixels, text.text) == (2.0, 50_000, 50_000, "What?")
    assert sequence.sampling.max_tokens == 2
    renderer = vlm.parts.renderer
    assert f"What?{dict(renderer.format.thinking_suffix)['off']}<|im_end|>" in renderer.tokenizer.decode(sequence.prompt.tokens)


@pytest.mark.parametrize("vlm", VIDEO_TYPES, indirect=True)
def test_a_video_file_is_known_by_its_bytes(vlm, tmp_path):
    import av

    path = tmp_path / "clip.bin"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        for frame in frames(8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    for source in (path, path.read_bytes()):
        assert isinstance(vlm.ask(source, "What happens?", max_tokens=2), str)
    output = vlm.generate([[Message("user", (Video(str(path), fps=2.0), Text("?")))]], Sampling(max_tokens=2))[0]
    assert output.error is None
    assert output.usage.num_frames == len(output.usage.timestamps[0]) == 4
    assert output.usage.timestamps[0][0] == 0


def test_ask_and_stream_raise(either):
    with pytest.raises(MediaNotFound, match="nowhere"):
        either.ask("/nowhere.png", "What?")
    with pytest.raises(MediaNotFound, match="nowhere"):
        next(either.stream([Message("user", Image("/nowhere.png"))]))
    with pytest.raises(MessageError, match="question"):
        either.ask()
    with pytest.raises(MessageError, match="question"):
        either.ask(b"bytes alone")
    with pytest.raises(SettingsError, match="max_tokens"):
        either.ask("What?", max_token=4)
    with pytest.raises(SettingsError, match="fps is for a video"):
        either.ask("What?", fps=4)


@pytest.mark.parametrize("vlm", ["kimi_vl"], indirect=True)
def test_a_family_without_videos_says_what_to_do(vlm, picture, chat):
    film = Video(frames(4), fps=2.0)
    outputs = vlm.generate([[Message("user", (film, Text("?")))], [Message("user", (Image(picture), Text("?")))]], LONG)
    assert isinstance(outputs[0].error, MediaUnsupported) and "Image(frame)" in outputs[0].error.fix
    assert outputs[1].error is None
    as_pictures = Message("user", [*(Image(frame) for frame in frames(4)), Text("?")])
    output = vlm.generate([[as_pictures]], LONG)[0]
    high, wide = vlm.parts.rule.grid.fit(*frames(1)[0].shape[:2])
    assert output.error is None and output.usage.image_tokens == 4 * (high // 28) * (wide // 28)


@pytest.mark.parametrize("vlm", VIDEO_TYPES, indirect=True)
def test_usage_counts(vlm, picture):
    picture = picture[::-1]  # one that no test before has asked about, so that it is encoded
    video = Video(frames(4), fps=2.0)
    output = vlm.generate([[Message("user", (Image(picture), video, Text("?")))]], Sampling(max_tokens=3, ignore_eos=True))[0]
    assert output.error is None, output.error
    pads = vlm.parts.model.config
    sequence = vlm._requests.make([Message("user", (Image(picture), video, Text("?")))], Sampling(), "auto")
    assert output.usage.prompt_tokens == len(sequence.prompt.tokens)
    assert output.usage.image_tokens == sequence.prompt.tokens.count(pads.image_token_id) > 0
    assert output.usage.video_tokens == sequence.prompt.tokens.count(pads.video_token_id) > 0
    assert output.usage.num_frames == 4
    assert output.usage.timestamps == ((0.0, 0.5, 1.0, 1.5),)
    assert output.usage.completion_tokens == 3
    assert {"prepare", "render", "encode", "prefill", "decode", "first_token", "total"} <= set(output.metrics)
    assert output.metrics["first_token"] <= output.metrics["total"]
    text = vlm.generate([HI], Sampling(max_tokens=1))[0]
    assert "encode" not in text.metrics and text.usage.image_tokens == 0


def test_bad_ones_do_not_disturb_good_ones_and_order_is_kept(either, chat):
    bad = [Message("user", Image("/nowhere.png"))]
    outputs = either.generate([chat, bad, HI, bad, chat], LONG)
    assert [output.error is None for output in outputs] == [True, False, True, False, True]
    assert isinstance(outputs[1].error, MediaNotFound) and outputs[1].finish == "error"
    assert outputs[0].tokens == outputs[4].tokens != outputs[2].tokens


def test_more_requests_than_can_run_at_once(either):
    most = either._engine.engine.settings.max_running
    chats = [[Message("user", f"number {i}")] for i in range(most + 5)]
    sampling = Sampling(max_tokens=2, ignore_eos=True)
    together = either.generate(chats, sampling)
    assert [o.tokens for o in together] == [either.generate([one], sampling)[0].tokens for one in chats]


def test_each_chat_may_have_its_own_settings(either):
    short, long = either.generate([HI, HI], [Sampling(max_tokens=2, ignore_eos=True), {"max_tokens": 5, "ignore_eos": True}])
    assert (len(short.tokens), len(long.tokens)) == (2, 5)
    assert long.tokens[:2] == short.tokens
    with pytest.raises(MessageError, match="2 sampling settings for 1"):
        either.generate([HI], [Sampling(), Sampling()])


class Only:
    """A guide that says given tokens and ends."""

    def __init__(self, *tokens: int) -> None:
        self.left = list(tokens)

    def mask(self, out) -> None:
        allow(out, self.left[:1])

    def accept(self, token: int) -> None:
        assert token == self.left.pop(0)

    @property
    def finished(self) -> bool:
        return not self.left

    def forced(self) -> list[int]:
        return self.left[:1]


def test_every_way_of_asking_takes_the_same(either, chat):
    """``guide``, ``salt``, prepared ``media`` and ``parallel_tool_calls``, as ``submit`` does."""
    outputs = either.generate([HI, HI, HI], LONG, guide=[Only(5, 6), None, Only(7)])
    assert [output.tokens for output in outputs[::2]] == [(5, 6), (7,)] and len(outputs[1].tokens) == 12
    assert [delta.tokens for delta in either.stream(HI, LONG, guide=Only(8, 9))] == [(8,), (9,)]
    assert either.ask("hi", guide=Only(65), salt="me") == either.parts.renderer.tokenizer.decode([65])
    made = either._requests.make(chat, Sampling(), "auto")
    plain = either.generate([chat, HI], LONG)
    again = either.generate([made.prompt, HI], LONG, media=[made.media, ()])
    assert [output.tokens for output in again] == [output.tokens for output in plain]
    pieces = either.stream(made.prompt, LONG, media=made.media, salt="other")
    assert tuple(token for delta in pieces for token in delta.tokens) == plain[0].tokens


def test_a_salt_shares_nothing_with_another(either, picture):
    chat = [Message("user", (Image(picture), Text("salted")))]
    hits = []
    for salt in (["one", "two"], "one", "one", "three"):
        before = either.stats()["pixel_cache_hits"]
        either.generate([chat] * len(salt) if isinstance(salt, list) else [chat], LONG, salt=salt)
        hits.append(either.stats()["pixel_cache_hits"] - before)
    assert hits == [0, 1, 1, 0]


def test_parallel_tool_calls_reach_the_request(vlm, monkeypatch):
    seen = []
    monkeypatch.setattr(vlm._structures, "guide", lambda *given: seen.append(given[-1]))
    vlm.generate([HI], LONG, parallel_tool_calls=False)
    list(vlm.stream(HI, LONG, parallel_tool_calls=False))
    vlm.generate([HI], LONG)
    assert seen == [False, False, True]


def test_lists_that_are_not_one_per_chat(either, chat):
    for wrong, said in (
        ({"sampling": [{}, {}]}, "2 sampling settings for 1 chats"), ({"salt": ["a", "b"]}, "2 salts for 1 chats"),
        ({"adapter": []}, "0 adapters for 1 chats"), ({"guide": [None, None]}, "2 guides for 1 chats"),
        ({"guide": Only(5)}, "guides are given as a Only"), ({"media": [(), ()]}, "2 lists of prepared media for 1 chats"),
        ({"salt": 7}, "salts are given as a int"),
    ):  # fmt: skip
        with pytest.raises(MessageError, match=said):
            either.generate([HI], **wrong)
    made = either._requests.make(chat, Sampling(), "auto")
    assert "a Patches" in str(either.generate([made.prompt], media=list(made.media))[0].error)
    assert "beside messages" in str(either.generate([chat], media=[made.media])[0].error)


def test_chats_as_other_programs_write_them(vlm, picture):
    ours = vlm.generate([[Message("user", (Image(picture), Text("What?")))]], LONG)[0]
    theirs = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    assert vlm.generate([theirs], LONG)[0].tokens == ours.tokens


def test_seeds(either):
    def sample(seed, company=()):
        settings = Sampling(max_tokens=12, temperature=1.5, seed=seed, ignore_eos=True)
        others = [Sampling(max_tokens=12, temperature=2.0, seed=99 + i) for i in range(len(company))]
        return either.generate([*company, HI], [*others, settings])[-1].tokens

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, company=[HI, [Message("user", "someone else")]]) == sample(1)
    free = {either.generate([HI], Sampling(max_tokens=12, temperature=1.5, ignore_eos=True))[0].tokens for _ in range(3)}
    assert len(free) > 1


def test_top_k_of_one_is_greedy(either):
    hot = Sampling(max_tokens=12, temperature=5.0, top_k=1, ignore_eos=True)
    assert either.generate([HI], hot)[0].tokens == either.generate([HI], LONG)[0].tokens


def test_repetition_penalty_counts_prompt_and_answer(either):
    plain = either.generate([HI], LONG)[0].tokens
    punished = either.generate([HI, HI], [Sampling(max_tokens=40, repetition_penalty=10.0, ignore_eos=True), LONG])
    assert punished[1].tokens == plain
    assert len(set(punished[0].tokens)) == len(punished[0].tokens) == 40
    prompt = either._requests.make(HI, Sampling(), "auto").prompt.tokens
    assert not set(punished[0].tokens) & set(prompt)


def test_stop_strings_across_tokens(either):
    """Every stretch of the answer, as a stop string: the text ends before it, whatever the tokens' borders."""
    whole = either.generate([HI], LONG)[0].message.text
    assert len(whole) >= 6
    for size in (1, 3):
        for at in range(len(whole) - size + 1):
            stop = whole[at : at + size]
            sampling = Sampling(max_tokens=12, stop=stop, ignore_eos=True)
            shown, finish = "", None
            for delta in either.stream(HI, sampling):
                shown, finish = shown + delta.text, delta.finish
                assert whole.startswith(shown)
            assert (shown, finish) == (whole[: whole.find(stop)], "stop")


def test_end_tokens_end_the_reply_and_are_no_text(either, monkeypatch):
    tokens = either.generate([HI], LONG)[0].tokens
    monkeypatch.setattr(either._engine.engine.runner, "eos", frozenset({tokens[3]}))
    output = either.generate([HI], Sampling(max_tokens=12))[0]
    first = tokens.index(tokens[3])
    assert output.tokens == tokens[: first + 1] and output.finish == "stop"
    assert output.raw == either.parts.renderer.tokenizer.decode(tokens[:first], skip_special=True)
    assert len(either.generate([HI], LONG)[0].tokens) == 12


def test_logprobs(either):
    output, silent = either.generate([HI, HI], [Sampling(max_tokens=4, logprobs=3, ignore_eos=True), LONG])
    assert silent.logprobs is None and output.logprobs is not None
    for token, report in zip(output.tokens, output.logprobs, strict=True):
        assert report.token == token == report.top[0][0]
        assert report.logprob == report.top[0][1] <= 0
        assert [p for _, p in report.top] == sorted((p for _, p in report.top), reverse=True)
        assert len(report.top) == 3
    hot = Sampling(max_tokens=4, logprobs=0, temperature=3.0, seed=1, ignore_eos=True)
    drawn = either.generate([HI], hot)[0]
    assert drawn.logprobs is not None and drawn.logprobs[0].top == ()


def test_logprobs_are_the_models_own_whatever_steers_the_choice(either):
    steered = Sampling(max_tokens=5, temperature=2.0, repetition_penalty=3.0, top_k=20, seed=3, logprobs=2, ignore_eos=True)
    output = either.generate([HI], steered)[0]
    prompt = either._requests.make(HI, Sampling(), "auto").prompt
    plain = plain_logits(either, [(prompt, [])], [output.tokens])[0].log_softmax(-1)
    for row, token, report in zip(plain, output.tokens, output.logprobs or (), strict=True):
        assert report.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [p for _, p in report.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_a_stream_is_the_reply(vlm, chat):
    deltas = list(vlm.stream(chat, LONG))
    output = vlm.generate([chat], LONG)[0]
    assert fold(deltas).message == output.message
    assert fold(deltas).tokens == output.tokens
    assert [delta.finish for delta in deltas] == [None] * 11 + ["length"]
    assert all(isinstance(delta, Delta) and len(delta.tokens) == 1 for delta in deltas)


def test_handles(either, chat):
    handles = [either.submit(chat, LONG), either.submit(HI, LONG)]
    second = handles[1].result()
    assert handles[0].result().tokens and handles[0].done
    assert fold(handles[1]).tokens == fold(handles[1]).tokens == second.tokens
    failed = either.submit([Message("user", Image("/nowhere.png"))])
    assert isinstance(failed.result().error, MediaNotFound)
    with pytest.raises(MediaNotFound):
        list(failed)


ENDLESS = Sampling(max_tokens=2000, ignore_eos=True, max_repeats=None)


def test_cancel(either, slowly):
    slowly(either)
    handle, other = either.submit(HI, ENDLESS), either.submit(HI, LONG)
    stream = iter(handle)
    read = [next(stream) for _ in range(3)]
    handle.cancel()
    deltas = [*read, *stream]
    assert deltas[-1].finish == "cancelled" and handle.done
    output = handle.result()
    assert output.finish == "cancelled" and output.error is None
    assert output.tokens == tuple(token for delta in deltas for token in delta.tokens)
    assert 3 <= len(output.tokens) < 2000
    assert len(other.result().tokens) == 12
    other.cancel()
    assert other.result().finish == "length"


def test_leaving_a_stream_early_ends_the_request(either, slowly):
    slowly(either)
    for _ in either.stream(HI, ENDLESS):
        break
    assert either._engine.wait_idle(10)
    assert either._engine.engine.num_generated and either._engine.engine.runner.cache.bytes_held == 0


def test_a_handle_that_is_dropped_ends_its_request(either, slowly):
    slowly(either)
    handle = either.submit(HI, ENDLESS)
    sequence = handle._reply
    deltas = iter(handle)
    next(deltas)
    del handle
    assert not sequence.cancelled  # its iterator still reads
    next(deltas)
    del deltas
    assert sequence.cancelled and either._engine.wait_idle(10)
    assert sequence.finish == "cancelled" and len(sequence.tokens) < 2000


def test_async(either):
    async def main():
        one, two = either.submit(HI, LONG), either.submit([Message("user", "ho")], LONG)

        async def read(handle):
            return [delta async for delta in handle]

        return await asyncio.gather(read(one), read(two))

    one, two = asyncio.run(main())
    assert fold(one).tokens == either.generate([HI], LONG)[0].tokens
    assert len(fold(two).tokens) == 12


def test_threads(either, chat):
    chats = [chat, HI, [Message("user", "someone else")], [Message("user", Image("/nowhere.png"))]] * 2
    expected = [either.generate([one], LONG)[0] for one in chats]
    found: list = [None] * len(chats)

    def work(index):
        if index % 2:
            found[index] = either.generate([chats[index]], LONG)[0]
        else:
            found[index] = fold(either.stream(chats[index], LONG))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(chats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for got, want in zip(found, expected, strict=True):
        assert got.tokens == want.tokens and type(got.error) is type(want.error)


def test_context(either):
    context = either.parts.context
    chat = [Message("user", "z " * context)]
    with pytest.raises(ContextOverflow) as caught:
        next(either.stream(chat))
    assert caught.value.available == context and caught.value.needed > context and caught.value.unit == "tokens"
    for word in (str(context), "shorten", "max_pixels"):
        assert word in str(caught.value)
    room = 5
    length = context - room - len(either._requests.make(HI, Sampling(), "auto").prompt.tokens) + 1
    fitting = [Message("user", "z" * (length + 1))]
    assert len(either._requests.make(fitting, Sampling(), "auto").prompt.tokens) == context - room
    output = either.generate([fitting], Sampling(max_tokens=100, ignore_eos=True))[0]
    assert (len(output.tokens), output.finish) == (room, "length")


def test_broken_weights_are_said_so(either):
    weight = either.parts.model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3] = float("nan")
    try:
        output = either.generate([HI], LONG)[0]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert isinstance(output.error, RequestFailed) and "finite" in str(output.error) and "float32" in str(output.error)


def test_a_defect_fails_its_request_and_the_engine_goes_on(either, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(either._engine.engine.runner, "_forward", lambda *_: 1 // 0)
        output = either.submit(HI, LONG).result()
    assert isinstance(output.error, RequestFailed) and "ZeroDivisionError" in str(output.error)
    assert "_forward" in output.error.__notes__[0] and output.error.__traceback__ is None
    assert len(either.generate([HI], LONG)[0].tokens) == 12


def test_thinking(vlm):
    tokenizer = vlm.parts.renderer.tokenizer

    def rendered(mode):
        return tokenizer.decode(vlm._requests.make(HI, Sampling(), mode).prompt.tokens)

    assert "think" not in rendered("auto")
    modes = dict(vlm.parts.renderer.format.thinking_suffix)
    assert ("on" in modes) == (vlm.parts.model.config.model_type not in ("qwen2_vl", "kimi_vl"))
    if "on" in modes:
        assert "/think" in rendered("on") and "/no_think" in rendered("off")
    else:  # it never thinks first, so asking it not to changes nothing; or the release alone decides
        assert "off" not in modes or rendered("off") == rendered("auto")
        assert isinstance(vlm.generate([HI], LONG, thinking="on")[0].error, MessageError)
    assert isinstance(vlm.generate([HI], LONG, thinking="often")[0].error, SettingsError)  # pyright: ignore[reportArgumentType]


def test_prompts_are_taken_as_they_are(either, chat):
    made = either._requests.make(chat, Sampling(), "auto")
    handle = either.submit(made.prompt, LONG, media=made.media)
    assert handle.result().tokens == either.generate([chat], LONG)[0].tokens
    without = either.submit(made.prompt, LONG).result()
    assert isinstance(without.error, MessageError) and "patches" in str(without.error)


def test_from_parts_answers_with_the_weights_of_the_moment(vlm):
    made = VLM.from_parts(vlm.parts.model, vlm.parts.renderer, vlm.parts.rule)
    before = made.generate([HI], LONG)[0].tokens
    assert before == vlm.generate([HI], LONG)[0].tokens
    weight = vlm.parts.model.lm_head.weight
    with torch.no_grad():
        weight.neg_()
        try:
            assert made.generate([HI], LONG)[0].tokens != before
        finally:
            weight.neg_()


def test_min_and_max_pixels_of_the_model(tiny_directories, picture):
    big = np.zeros((600, 600, 3), np.uint8)
    small = VLM(tiny_directories["Keye"], device="cpu", max_pixels=28 * 28 * 10)
    plain = VLM(tiny_directories["Keye"], device="cpu")
    chat = [Message("user", Image(big))]
    tokens = [engine.generate([chat], Sampling(max_tokens=1))[0].usage.image_tokens for engine in (small, plain)]
    assert tokens[0] <= 10 < tokens[1]
    with pytest.raises(SettingsError, match="max_pixels"):
        VLM(tiny_directories["Keye"], device="cpu", max_pixels=3)


def test_it_is_a_client(either):
    client: mirada.types.Client = either  # pyright checks the shape
    assert isinstance(client.submit(HI, Sampling(max_tokens=1)).result(), mirada.Output)
    assert issubclass(MiradaError, Exception)
