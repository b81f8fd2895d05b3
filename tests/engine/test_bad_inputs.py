"""Bad inputs, one table: each is refused by its own error, in words that name the thing and the fix, while a good request
in the same batch is answered."""

from __future__ import annotations

import base64
import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.bad_server import serve
from PIL import Image as pil

from mirada import VLM, Image, Message, Sampling, Text, Video
from mirada.errors import (
    ContextOverflow,
    MediaDecodeError,
    MediaNotFound,
    MediaRefused,
    MediaTimeout,
    MediaTooLarge,
    MediaUnsupported,
    MessageError,
    MiradaError,
    SettingsError,
)
from mirada.media import download
from mirada.media.limits import FetchLimits
from mirada.types import Prompt, Span


def png(height: int = 40, width: int = 50) -> bytes:
    file = io.BytesIO()
    pil.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def jpeg() -> bytes:
    file = io.BytesIO()
    pil.new("RGB", (80, 60), (200, 30, 30)).save(file, "JPEG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60000 x 60000."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")


def clip() -> bytes:
    """Two seconds of MP4."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(8):
            frame = np.full((48, 64, 3), i * 30, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def tone() -> bytes:
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(1600))
    return file.getvalue()


class World:
    """Files, addresses and engines that the table speaks of."""

    def __init__(self, folder: Path, vlm: VLM, port: int) -> None:
        self.folder, self.port = folder, port
        (folder / "root").mkdir()
        for name, data in {
            "ok.png": png(), "empty.png": b"", "text.png": b"just some words", "half.png": png()[:200],
            "half.jpg": jpeg()[:300], "bomb.png": bomb(), "big.png": bytes(300_000), "strip.png": png(1, 5000),
            "a.heic": b"\0\0\0\x18ftypheic\0\0\0\0", "a.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "a.pdf": b"%PDF-1.7\n", "clip.mp4": clip(), "half.mp4": clip()[:600], "tone.wav": tone(), "root/in.png": png(),
        }.items():  # fmt: skip
            (folder / name).write_bytes(data)
        os.mkfifo(folder / "pipe.png")
        (folder / "root" / "link.png").symlink_to("/etc/passwd")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.closed_port = free.getsockname()[1]
        parts = vlm.parts

        def engine(**limits: Any) -> VLM:
            return VLM.from_parts(parts.model, parts.renderer, parts.rule, limits=FetchLimits(**limits))

        small = {"bytes": 200_000, "video_bytes": 400_000, "seconds": 0.3}
        self.engines = {
            "trusting": engine(allow_private=True, **small),
            "default": engine(**small),
            "serving": VLM.from_parts(parts.model, parts.renderer, parts.rule, limits=FetchLimits.serving()),
            "rooted": VLM.from_parts(
                parts.model, parts.renderer, parts.rule, limits=FetchLimits.serving(file_root=folder / "root")
            ),
        }

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"


def picture(source: Any, **options: Any) -> list[Message]:
    return [Message("user", (Image(source, **options), Text("What?")))]


def film(source: Any, **options: Any) -> list[Message]:
    return [Message("user", (Video(source, **options), Text("What?")))]


def data_uri(data: bytes, head: str = "data:image/png;base64,") -> str:
    return head + base64.b64encode(data).decode()


HI = [Message("user", "hi")]
FRAME = np.zeros((56, 56, 3), np.uint8)


@dataclass(frozen=True)
class Bad:
    name: str
    make: Callable[[World], Any]
    error: type[MiradaError]
    words: tuple[str, ...]
    engine: str = "trusting"
    sampling: Any = None
    thinking: Any = "auto"


def setting(name: str, values: Any, *words: str) -> Bad:
    return Bad(f"setting {name}", lambda w: HI, SettingsError, words, sampling=values)


TABLE = [
    # ---- files
    Bad("no such file", lambda w: picture(w.file("nowhere.png")), MediaNotFound, ("nowhere.png", "check the path")),
    Bad("a folder", lambda w: picture(w.file("root")), MediaUnsupported, ("root", "path of a file")),
    Bad("an empty file", lambda w: picture(w.file("empty.png")), MediaDecodeError, ("empty.png", "whole picture")),
    Bad("text named png", lambda w: picture(w.file("text.png")), MediaDecodeError, ("text.png", "JPEG, PNG")),
    Bad("a truncated PNG", lambda w: picture(w.file("half.png")), MediaDecodeError, ("half.png", "save it again")),
    Bad("a truncated JPEG", lambda w: picture(w.file("half.jpg")), MediaDecodeError, ("half.jpg", "save it again")),
    Bad("a decompression bomb", lambda w: picture(w.file("bomb.png")), MediaTooLarge, ("bomb.png", "60000", "shrink")),
    Bad("a file over the limit", lambda w: picture(w.file("big.png")), MediaTooLarge, ("big.png", "300,000", "200,000")),
    Bad("a strip of 1 x 5000", lambda w: picture(w.file("strip.png")), MediaUnsupported, ("strip.png", "200 times", "crop")),
    Bad("HEIC", lambda w: picture(w.file("a.heic")), MediaUnsupported, ("HEIC", "convert")),
    Bad("SVG", lambda w: picture(w.file("a.svg")), MediaUnsupported, ("SVG", "PNG")),
    Bad("PDF", lambda w: picture(w.file("a.pdf")), MediaUnsupported, ("PDF",)),
    Bad("a video as a picture", lambda w: picture(w.file("clip.mp4")), MediaUnsupported, ("clip.mp4", "Video(")),
    Bad("NUL in a path", lambda w: picture("a\0b.png"), MediaNotFound, ("0b.png", "path")),
    Bad("a named pipe", lambda w: picture(w.file("pipe.png")), MediaUnsupported, ("pipe.png", "plain file")),
    Bad("base64 without its head", lambda w: picture("iVBORw0KGgo" * 50), MediaNotFound, ("data:image/png;base64,",)),
    Bad("file:// of a host", lambda w: picture("file://server/a.png"), MediaUnsupported, ("server", "three slashes")),
    Bad("the second of two", lambda w: [Message("user", (Image(w.file("ok.png")), Image(w.file("half.png"))))],
        MediaDecodeError, ("2 of 2", "half.png")),
    # ---- files under serving rules
    Bad("/etc/passwd when serving", lambda w: picture("file:///etc/passwd"), MediaRefused,
        ("/etc/passwd", "base64"), "serving"),
    Bad("a path when serving", lambda w: picture(w.file("ok.png")), MediaRefused, ("not allowed", "base64"), "serving"),
    Bad("outside the root", lambda w: picture("file:///etc/passwd"), MediaRefused, ("outside", "folder"), "rooted"),
    Bad("out of the root by ..", lambda w: picture(w.file("root/../ok.png")), MediaRefused, ("outside",), "rooted"),
    Bad("out of the root by a link", lambda w: picture(w.file("root/link.png")), MediaRefused, ("outside",), "rooted"),
    Bad("a video of the system when serving", lambda w: film("file:///etc/passwd"), MediaRefused, ("not allowed",), "serving"),
    # ---- addresses
    Bad("404", lambda w: picture(w.url("nothing")), MediaNotFound, ("404", "check the address")),
    Bad("says it is too big", lambda w: picture(w.url("big")), MediaTooLarge, ("1,099,511,627,776", "FetchLimits.bytes")),
    Bad("is too big without saying so", lambda w: picture(w.url("endless")), MediaTooLarge, ("200,000",)),
    Bad("too slow", lambda w: picture(w.url("slow")), MediaTimeout, ("0.3 seconds", "FetchLimits.seconds")),
    Bad("cut short", lambda w: picture(w.url("cut")), MediaDecodeError, ("cut", "try again")),
    Bad("a web page", lambda w: picture(w.url("page")), MediaUnsupported, ("HTML", "address of the picture")),
    Bad("an empty answer", lambda w: picture(w.url("empty")), MediaDecodeError, ("empty",)),
    Bad("a loop of redirects", lambda w: picture(w.url("loop")), MediaRefused, ("redirects more than 3", "final address")),
    Bad("a redirect to a file", lambda w: picture(w.url("to-file")), MediaRefused, ("file", "http")),
    Bad("nobody listens", lambda w: picture(f"http://127.0.0.1:{w.closed_port}/"), MediaNotFound, ("reached", "check")),
    Bad("no such host", lambda w: picture("http://no-such-host.invalid/a.png"), MediaNotFound, ("no-such-host.invalid",)),
    Bad("no host", lambda w: picture("http:///a.png"), MediaUnsupported, ("host", "http(s)://host/path")),
    Bad("an unknown scheme", lambda w: picture("ftp://host/a.png"), MediaUnsupported, ("ftp", "http")),
    Bad("a password in the address", lambda w: picture("http://me:secret@127.0.0.1/"), MediaUnsupported, ("user name",)),
    Bad("loopback", lambda w: picture(w.url("ok")), MediaRefused, ("127.0.0.1", "allow_private"), "default"),
    Bad("localhost", lambda w: picture(w.url("ok", "localhost")), MediaRefused, ("localhost", "allow_private"), "default"),
    Bad("a private network", lambda w: picture("http://10.1.2.3/a.png"), MediaRefused, ("10.1.2.3",), "default"),
    Bad("cloud metadata", lambda w: picture("http://169.254.169.254/"), MediaRefused, ("169.254.169.254",), "default"),
    Bad("loopback in IPv6", lambda w: picture(f"http://[::1]:{w.port}/ok"), MediaRefused, ("::1",), "default"),
    Bad("a number for an address", lambda w: picture(f"http://2130706433:{w.port}/ok"), MediaRefused,
        ("127.0.0.1",), "default"),
    Bad("a name that is private", lambda w: picture(w.url("ok", "private.test")), MediaRefused,
        ("private.test", "192.168.0.7", "public"), "default"),
    Bad("a redirect to loopback", lambda w: picture(w.url("to-loopback", "public.test")), MediaRefused,
        ("127.0.0.1", "public"), "default"),
    Bad("a video at a private address", lambda w: film("http://10.1.2.3/a.mp4"), MediaRefused, ("10.1.2.3",), "default"),
    # ---- data URIs, bytes, arrays
    Bad("data that is not base64", lambda w: picture("data:image/png,hello"), MediaUnsupported, ("base64",)),
    Bad("broken base64", lambda w: picture("data:image/png;base64,@@@@"), MediaDecodeError, ("broken base64", "b64encode")),
    Bad("empty base64", lambda w: picture("data:image/png;base64,"), MediaDecodeError, ("empty", "after the comma")),
    Bad("base64 of something else", lambda w: picture(data_uri(b"no picture")), MediaDecodeError, ("known format",)),
    Bad("base64 without a subtype, truncated", lambda w: picture(data_uri(png()[:99], "data:image;base64,")),
        MediaDecodeError, ("broken",)),
    Bad("base64 over the limit", lambda w: picture(data_uri(bytes(300_000))), MediaTooLarge, ("200,000",)),
    Bad("no bytes", lambda w: picture(b""), MediaDecodeError, ("empty", "whole picture")),
    Bad("nothing", lambda w: picture(None), MediaUnsupported, ("NoneType", "path")),
    Bad("a float array", lambda w: picture(FRAME / 255), MediaUnsupported, ("float64", "uint8")),
    Bad("channels first", lambda w: picture(FRAME.transpose(2, 0, 1)), MediaUnsupported, ("(3, 56, 56)", "transpose")),
    Bad("an empty array", lambda w: picture(FRAME[:0]), MediaUnsupported, ("(0, 56, 3)", "one pixel")),
    Bad("a batch of arrays", lambda w: picture(FRAME[None]), MediaUnsupported, ("(1, 56, 56, 3)", "Video(")),
    # ---- settings of pictures
    Bad("max_pixels=0", lambda w: picture(FRAME, max_pixels=0), SettingsError, ("max_pixels=0", "None")),
    Bad("max_pixels as text", lambda w: picture(FRAME, max_pixels="big"), SettingsError, ("max_pixels='big'", "pixels")),
    Bad("min above max", lambda w: picture(FRAME, min_pixels=9000, max_pixels=2000), SettingsError,
        ("min_pixels=9000", "raise")),
    Bad("half a size", lambda w: picture(FRAME, resized_height=56), SettingsError, ("resized_width", "both")),
    # ---- videos
    Bad("a video that is text", lambda w: film(w.file("text.png")), MediaDecodeError, ("text.png", "MP4")),
    Bad("a truncated MP4", lambda w: film(w.file("half.mp4")), MediaDecodeError, ("half.mp4", "again")),
    Bad("sound alone", lambda w: film(w.file("tone.wav")), MediaUnsupported, ("audio", "moving pictures")),
    Bad("a playlist", lambda w: film(b"#EXTM3U\nfile:///etc/passwd\n"), MediaUnsupported, ("playlist", "video file")),
    Bad("no frames", lambda w: film([]), MediaDecodeError, ("empty list", "at least one")),
    Bad("frames of two sizes", lambda w: film([FRAME, np.zeros((56, 112, 3), np.uint8)]), MediaUnsupported, ("one size",)),
    Bad("a broken frame", lambda w: film([FRAME, b"no picture"]), MediaDecodeError, ("picture 1",)),
    Bad("fps and nframes", lambda w: film(w.file("clip.mp4"), fps=1.0, nframes=4), SettingsError, ("fps", "nframes", "one of")),
    Bad("fps=0", lambda w: film(w.file("clip.mp4"), fps=0), SettingsError, ("fps=0", "frames per second")),
    Bad("fps is no number", lambda w: film(w.file("clip.mp4"), fps=float("nan")), SettingsError, ("fps=nan", "finite")),
    Bad("a cut backwards", lambda w: film(w.file("clip.mp4"), video_start=1.5, video_end=1.0), SettingsError,
        ("1.5", "video_start < video_end")),
    Bad("a cut past the end", lambda w: film(w.file("clip.mp4"), video_start=60.0), SettingsError, ("60", "2")),
    # ---- messages
    Bad("a chat that is text", lambda w: "What is this?", MessageError, ("str", 'Message("user"')),
    Bad("a chat that is one message", lambda w: HI[0], MessageError, ("Message", "list")),
    Bad("no messages", lambda w: [], MessageError, ("no messages", "at least one")),
    Bad("a chat of numbers", lambda w: [1, 2], MessageError, ("message 0", "int", "role and content")),
    Bad("an unknown role", lambda w: [{"role": "robot", "content": "hi"}], MessageError, ("robot", "assistant")),
    Bad("an unknown key", lambda w: [{"role": "user", "contents": "hi"}], MessageError, ("contents", "content")),
    Bad("an unknown kind of part", lambda w: [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}],
        MessageError, ("audio", "image")),
    Bad("a part of two kinds", lambda w: [{"role": "user", "content": [{"text": "a", "image": "b"}]}],
        MessageError, ("text and image", "split")),
    Bad("an empty address", lambda w: [{"role": "user", "content": [{"image_url": {"url": ""}}]}], MessageError,
        ("empty", "URL")),
    Bad("no content", lambda w: [{"role": "user"}], MessageError, ("content",)),
    Bad("tool calls of a user", lambda w: [{"role": "user", "content": "hi", "tool_calls": [{}]}],
        MessageError, ("tool_calls", "assistant")),
    Bad("broken arguments of a tool call", lambda w: [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": {"x": {1}}}}]}], MessageError, ("arguments", "JSON")),
    Bad("an unknown thinking mode", lambda w: HI, SettingsError, ("thinking='often'", "'auto'"), thinking="often"),
    Bad("thinking without a question", lambda w: [Message("system", "hi")], MessageError, ("user",), thinking="on"),
    # ---- prompts
    Bad("more than the context", lambda w: [Message("user", "z" * 5000)], ContextOverflow,
        ("5", "4096", "shorten", "max_pixels")),
    Bad("a prompt without tokens", lambda w: Prompt(()), MessageError, ("no tokens",)),
    Bad("a token that does not exist", lambda w: Prompt((1, 99999)), MessageError, ("vocabulary", "render")),
    Bad("a prompt without its media", lambda w: Prompt((1,) * 8, (Span("image", 1, (1, 4, 4), 0),)), MessageError,
        ("16 patches", "media")),
    # ---- settings of sampling
    setting("temperature=-1", {"temperature": -1.0}, "temperature=-1", "between 0 and 100"),
    setting("temperature=nan", {"temperature": float("nan")}, "temperature=nan", "between"),
    setting("temperature as text", {"temperature": "hot"}, "temperature", "'hot'", "number"),
    setting("max_tokens=0", {"max_tokens": 0}, "max_tokens=0", "at least 1"),
    setting("max_tokens as text", {"max_tokens": "many"}, "max_tokens", "'many'", "whole number"),
    setting("top_p=2", {"top_p": 2.0}, "top_p=2", "(0, 1]"),
    setting("top_k=0", {"top_k": 0}, "top_k=0", "None for off"),
    setting("min_p=2", {"min_p": 2.0}, "min_p=2", "[0, 1]"),
    setting("repetition_penalty=0", {"repetition_penalty": 0.0}, "repetition_penalty=0", "1 is off"),
    setting("stop=''", {"stop": ""}, "stop", "non-empty"),
    setting("logprobs=1000", {"logprobs": 1000}, "logprobs=1000", "100"),
    setting("an unknown one", {"temprature": 1.0}, "temprature", "did you mean 'temperature'"),
    setting("of no form", 7, "int", "mapping"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, engines):
    with serve(png()) as (port, asked):
        made = World(tmp_path_factory.mktemp("bad"), engines["KeyeVL1_5"], port)
        made.asked = asked
        yield made


@pytest.fixture
def names(monkeypatch):
    """private.test is a private address; public.test leads to this machine, by an address that is taken for public."""
    real, judge = socket.getaddrinfo, download.is_public
    table = {"private.test": "192.168.0.7", "public.test": "127.0.0.99"}

    def getaddrinfo(host, port, *rest, **more):
        if host == "no-such-host.invalid":
            raise socket.gaierror(-2, "Name or service not known")
        return real(table.get(host, host), port, *rest, **more)

    monkeypatch.setattr(download.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(download, "is_public", lambda address: address == "127.0.0.99" or judge(address))


def test_the_table_is_long_enough():
    assert len(TABLE) >= 40
    assert len({bad.name for bad in TABLE}) == len(TABLE)


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.name)
def test_refused_by_name_and_the_next_one_answers(bad: Bad, world: World, names):
    vlm = world.engines[bad.engine]
    good = Sampling(max_tokens=2, ignore_eos=True)
    inside = bad.make(world)
    # The bad one stands in front of a good one with a picture; both are under way together.
    handles = [
        vlm.submit(inside, bad.sampling, thinking=bad.thinking),
        vlm.submit(picture(FRAME), good),
    ]
    refused, answered = [handle.result() for handle in handles]
    error = refused.error
    assert type(error) is bad.error, repr(error)
    assert error.problem and error.fix
    for word in bad.words:
        assert word in str(error), f"{word!r} is not in: {error}"
    assert refused.finish == "error" and not refused.tokens
    assert answered.error is None and len(answered.tokens) == 2
    with pytest.raises(bad.error):
        list(vlm.stream(inside, bad.sampling, thinking=bad.thinking))


def test_generate_holds_the_place_of_each(world: World):
    vlm = world.engines["trusting"]
    good = picture(FRAME)
    chats = [picture(w) for w in (world.file("half.png"), world.file("ok.png"), world.url("nothing"), world.url("ok"))]
    outputs = vlm.generate([*chats, good], Sampling(max_tokens=2, ignore_eos=True))
    assert [type(output.error) for output in outputs] == [MediaDecodeError, type(None), MediaNotFound, type(None), type(None)]
    assert outputs[1].tokens == outputs[3].tokens


def test_what_is_refused_is_never_asked_for(world: World, names):
    world.asked.clear()
    handle = world.engines["default"].submit(picture(world.url("to-loopback", "public.test")))
    assert isinstance(handle.result().error, MediaRefused)
    assert world.asked == ["/to-loopback"]  # the server was real, and its second address was not called


def test_the_same_sources_answer_where_they_are_allowed(world: World, names):
    """The refusals above are due to the rules, not to broken sources."""
    trusting, rooted = world.engines["trusting"], world.engines["rooted"]
    for vlm, source in (
        (trusting, world.url("ok")),
        (trusting, world.url("to-loopback", "public.test")),
        (trusting, world.url("ok", "localhost")),
        (trusting, world.file("ok.png")),
        (rooted, world.file("root/in.png")),
        (world.engines["serving"], data_uri(png())),
        (world.engines["default"], world.url("ok", "public.test")),
    ):
        assert vlm.generate([picture(source)], Sampling(max_tokens=1))[0].error is None, source
