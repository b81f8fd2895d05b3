"""``mirada ask``: answers, streams, JSON, and what a person sees when something is wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from mirada.cli import show
from mirada.engine.llm import VLM
from mirada.types import Delta


def test_an_answer_is_what_the_front_door_gives(mirada, tiny, picture):
    done = mirada("ask", picture, "What is it?", "-m", tiny, "--max-tokens", 8)
    assert (done.code, done.err) == (0, "")
    assert done.out == show.printable(VLM(tiny).ask(str(picture), "What is it?", max_tokens=8)) + "\n"


def test_json_holds_the_answer_and_its_usage(mirada, tiny, picture):
    done = mirada("ask", picture, picture, "What is it?", "-m", tiny, "--max-tokens", 8, "--json")
    answer = json.loads(done.out)
    assert done.code == 0
    assert answer["text"] == VLM(tiny).ask(str(picture), str(picture), "What is it?", max_tokens=8)
    assert answer["usage"]["completion_tokens"] <= 8 and answer["finish"] in ("length", "stop")
    assert answer["usage"]["image_tokens"] == 2 * VLM(tiny).generate([[user(picture)]])[0].usage.image_tokens
    assert answer["model"] == str(tiny) and answer["metrics"]["total"] > 0


def user(picture):
    from mirada import Image, Message

    return Message("user", (Image(str(picture)), "x"))


def test_settings_reach_the_model(mirada, tiny, picture):
    few = json.loads(mirada("ask", picture, "What?", "-m", tiny, "--max-tokens", 1, "--max-pixels", 784, "--json").out)
    more = json.loads(mirada("ask", picture, "What?", "-m", tiny, "--max-tokens", 1, "--json").out)
    assert few["usage"]["image_tokens"] < more["usage"]["image_tokens"]
    assert few["usage"]["completion_tokens"] == 1
    thinking = json.loads(mirada("ask", "What?", "-m", tiny, "--max-tokens", 1, "--thinking", "on", "--json").out)
    without = json.loads(mirada("ask", "What?", "-m", tiny, "--max-tokens", 1, "--thinking", "off", "--json").out)
    auto = json.loads(mirada("ask", "What?", "-m", tiny, "--max-tokens", 1, "--json").out)
    counts = [answer["usage"]["prompt_tokens"] for answer in (thinking, without, auto)]
    assert counts[2] < counts[0] < counts[1]  # suffixes /think and /no_think, and none


def test_a_picture_or_the_question_comes_through_a_pipe(mirada, tiny, picture, monkeypatch):
    def piped(data, *words):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        return mirada("ask", *words, "-m", tiny, "--max-tokens", 8)

    whole = mirada("ask", picture, "What is it?", "-m", tiny, "--max-tokens", 8)
    assert piped(picture.read_bytes(), "-", "What is it?") == whole
    assert piped(b"What is it?\n", picture, "-") == whole
    for data, words, said in (
        (b"", ("-", "What?"), "the data is empty"),
        (b"", (picture, "-"), "question is empty"),
        (b"\xff", (picture, "-"), "not UTF-8"),
        (b"", ("-", "-"), "only once"),
    ):
        done = piped(data, *words)
        assert (done.code, done.out) == (2, "") and said in done.err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "nothing is piped" in mirada("ask", "-", "What?", "-m", tiny).err


def test_an_output_that_cannot_show_every_character(mirada, tiny, monkeypatch):
    asked = ("ask", "What? é", "-m", tiny, "--max-tokens", 16)
    whole = VLM(tiny).ask("What? é", max_tokens=16)
    assert not show.printable(whole).isascii()
    for more, read in (((), lambda said: said), (("--json",), lambda said: json.loads(said)["text"])):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", out)
        assert mirada(*asked, *more).code == 0
        out.flush()
        said = out.buffer.getvalue().decode("ascii")
        expected = whole if more else show.printable(whole).encode("ascii", "backslashreplace").decode() + "\n"
        assert read(said) == expected


def test_a_question_may_be_longer_than_a_path(mirada, tiny, picture):
    done = mirada("ask", picture, "What? " * 60, "-m", tiny, "--max-tokens", 1)
    assert (done.code, done.err) == (0, "")


WRONG = [
    (("ask",), 2, "Missing argument"),
    (("ask", "--max-token", "3", "x"), 2, "No such option"),
    (("ask", "--max-tokens", "x", "y"), 2, "x"),
    (("ask", "--max-tokens", "0", "y"), 2, "max_tokens=0 is out of range"),
    (("ask", "--temperature", "-1", "y"), 2, "temperature=-1.0 is out of range"),
    (("ask", "none.png", "What?"), 2, "nothing lies at 'none.png'"),
    (("ask", "{long}", "What?"), 2, "nothing lies at 'xxx"),
    (("ask", "{picture}"), 2, "is a file, so there is no question"),
    (("ask", "{picture}", " "), 2, "question is empty"),
    (("ask", "{picture}", "What?", "--fps", "2"), 2, "fps is for a video"),
    (("ask", "{picture}", "What?", "--max-pixels", "10"), 2, "max_pixels=10"),
    (("ask", "{broken}", "What?"), 2, "broken.png"),
    (("ask", "http://127.0.0.1:9/a.png", "What?"), 2, "127.0.0.1"),
    (("ask", "What?", "-m", "no/such/folder"), 1, "no/such/folder"),
    (("ask", "What?", "-m", "{tiny}", "--device", "tpu"), 2, "tpu"),
    (("askk", "What?"), 2, "askk"),
]


@pytest.mark.parametrize(("words", "code", "said"), WRONG, ids=[" ".join(row[0]) for row in WRONG])
def test_what_is_wrong_is_said_once_without_a_traceback(mirada, tiny, picture, tmp_path, words, code, said):
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:60])
    names = {"long": "x" * 300, "picture": picture, "broken": broken, "tiny": tiny}
    words = [word.format(**names) for word in words]
    if "-m" not in words:
        words += ["-m", str(tiny)]
    done = mirada(*words)
    assert done.code == code, done.err
    assert said in done.err and "Traceback" not in done.err + done.out
    assert done.out == ""


def test_debug_shows_where(mirada, tiny):
    from mirada.errors import MediaNotFound

    for words in (("--debug", "ask"), ("ask", "--debug")):
        with pytest.raises(MediaNotFound):
            mirada(*words, "none.png", "What?", "-m", tiny)


def test_a_defect_is_one_line(mirada, monkeypatch):
    def broken(*_):
        raise KeyError("x")

    monkeypatch.setattr("mirada.cli.ask.run", broken)
    done = mirada("ask", "What?")
    assert done.code == 1 and "internal error: KeyError: 'x'" in done.err and "--debug" in done.err
    with pytest.raises(KeyError):
        mirada("--debug", "ask", "What?")


def test_ctrl_c_is_quiet(mirada, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mirada.cli.ask.run", stopped)
    done = mirada("ask", "What?")
    assert done.code == 130 and "Traceback" not in done.err


def test_a_reader_that_leaves_is_no_error(mirada, monkeypatch):
    code = (
        "import sys; from mirada.cli import commands\n"
        "def run(*_):\n    while True: print('x' * 1000, flush=True)\n"
        "import mirada.cli.ask; mirada.cli.ask.run = run; sys.argv = ['mirada', 'ask', 'x']; commands.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=120) == 1


def test_text_cannot_steer_the_terminal(capsys):
    show.stream([Delta(text="a\x1b[2Jb\x9b1m\r"), Delta(text="c\n\td\x07\x7f é\u200d")])
    assert capsys.readouterr().out == "a[2Jb1mc\n\td é\u200d\n"


class _Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def test_reasoning_is_for_terminals_only(capsys, monkeypatch):
    deltas = [Delta(reasoning="so "), Delta(reasoning="then"), Delta(text="yes"), Delta(finish="stop")]
    show.stream(deltas)
    assert capsys.readouterr().out == "yes\n"
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    show.stream(deltas)
    assert terminal.text == "\033[2mso then\033[0m\nyes\n"
    terminal.text = ""
    show.stream(deltas[:2])
    assert terminal.text == "\033[2mso then\033[0m\n"


def test_help_is_quick_and_offers_only_what_exists():
    def spent(*words: str) -> tuple[float, subprocess.CompletedProcess[str]]:
        start = os.times()
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        end = os.times()  # seconds on the CPU, not on the clock
        return end.children_user + end.children_system - start.children_user - start.children_system, done

    best = base = 9.0
    text = ""
    for _ in range(3):
        base = min(base, spent("-c", "import typer.main")[0])
        seconds, done = spent("-X", "importtime", "-m", "mirada.cli", "--help")
        best, text = min(best, seconds), done.stdout
        loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
        assert "typer.main" in loaded and not loaded & {"torch", "numpy", "PIL", "av", "tokenizers", "yaml", "httpx"}
    # 0.3 s where typer alone takes 0.1: in proportion, since a busy machine makes every second on its CPU longer.
    assert best < 4.5 * base
    assert all(word in text for word in ("ask", "batch", "chat", "doctor", "serve"))
    assert not any(word in text for word in ("train", "eval", "quantize"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_no_defect():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mirada.cli", "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == (
        "mirada: the output cannot be written: No space left on device\n  make room for it, or send it elsewhere\n"
    )


def test_version(mirada):
    import mirada as package

    assert mirada("--version").out == f"mirada {package.__version__}\n"


def test_a_server_answers_as_the_engine_would(mirada, picture, monkeypatch):
    from misbehaving import reply, serving, stream, words

    monkeypatch.setenv("MIRADA_API_KEY", "sk-key")
    with serving(stream(words("Hel", "lo")), models=["big"]) as server:
        done = mirada(
            "ask", picture, "What is it?", "--url", server.url, "--max-tokens", 8, "--thinking", "on", "--max-pixels", 784
        )
        assert (done.code, done.out, done.err) == (0, "Hello\n", "")
        answer = json.loads(mirada("ask", "What?", "--url", server.url, "--api-key", "sk-2", "--json").out)
    assert answer["text"] == "Hello" and answer["model"] == "big" and answer["usage"]["prompt_tokens"] == 5
    first, second = server.requests
    assert (first.headers["authorization"], second.headers["authorization"]) == ("Bearer sk-key", "Bearer sk-2")
    part = first.body["messages"][0]["content"][0]["image_url"]
    assert part["url"].startswith("data:image/png;base64,") and part["max_pixels"] == 784
    assert first.body["max_tokens"] == 8 and first.body["chat_template_kwargs"] == {"enable_thinking": True}
    for status, code in ((401, 1), (400, 2)):
        with serving(reply(status, {"error": {"message": "no, sk-key"}})) as server:
            done = mirada("ask", "What?", "--url", server.url, "-m", "big")
        assert done.code == code and "no, ***" in done.err and "sk-key" not in done.err and "Traceback" not in done.err
    assert mirada("ask", "What?", "--api-key", "x").code == 2
