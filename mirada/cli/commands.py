"""Options of every command, and how errors reach a person: one message, an exit code, a traceback only on ``--debug``.

Exit codes: 0 done, 1 failed (memory, checkpoint, something absent), 2 wrong usage or input, 130 interrupted.
Nothing heavier than typer is imported here; ``mirada --help`` stays below 0.3 s.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import mirada
from mirada.cli import options
from mirada.cli.options import How, Who
from mirada.errors import InputError, MiradaError, SettingsError

app = typer.Typer(
    name="mirada",
    help="Ask open vision-language models about pictures and videos.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_debug = False
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)
"""A full disk, a full quota, and a reader that has gone."""


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = _debug or value
    return value


def _version(value: bool) -> None:
    if value:
        print(f"mirada {mirada.__version__}")
        raise typer.Exit


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug, is_eager=True)]


@app.callback()
def _mirada(
    debug: Debug = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)] = False,
) -> None:
    pass


@app.command()
def ask(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="MEDIA... QUESTION", help="Paths or addresses, then the question; - reads one of them from a pipe."
        ),
    ],
    model: options.Model = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    thinking: options.Think = None,
    fps: options.Fps = None,
    nframes: options.Nframes = None,
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    quant: options.Quant = None,
    kv: options.Kv = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object once the answer is whole.")] = False,
    debug: Debug = False,
) -> None:
    """Ask one question about pictures and videos. The answer appears as it is made."""
    from mirada.cli.ask import run

    who = Who(model, device, quant, kv, adapter, url, api_key)
    media = {"fps": fps, "nframes": nframes, "min_pixels": min_pixels, "max_pixels": max_pixels}
    run(words, who, How.of(max_tokens, temperature, thinking, **media), json)


@app.command()
def batch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests as JSON lines, in OpenAI's batch format.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Answers, added line by line; what has one is skipped.")],
    model: options.Model = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    in_flight: Annotated[int, typer.Option("--in-flight", help="Requests under way at once.")] = 16,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Longest answer where a line does not say. Default: the context.")
    ] = None,
    media_root: Annotated[Path | None, typer.Option("--media-root", help="Folder whose files the requests may name.")] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask again what has only an error.")] = False,
    thinking: options.Think = None,
    fps: options.Fps = None,
    nframes: options.Nframes = None,
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    quant: options.Quant = None,
    kv: options.Kv = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    debug: Debug = False,
) -> None:
    """Answer a file of requests. Ended early, the same command goes on where it stopped."""
    from mirada.cli.batch import run
    from mirada.cli.batch_answer import Batch

    chosen = Batch(
        source, target, model, url, api_key, device, max_tokens, in_flight, media_root, retry_errors, quant, kv, adapter,
        options.mode(thinking), fps, nframes, min_pixels, max_pixels,
    )  # fmt: skip
    raise typer.Exit(run(chosen))


@app.command()
def chat(
    media: Annotated[
        list[str] | None, typer.Argument(metavar="[MEDIA]...", help="Pictures or videos of the first question.")
    ] = None,
    model: options.Model = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    thinking: options.Think = None,
    fps: options.Fps = None,
    nframes: options.Nframes = None,
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    quant: options.Quant = None,
    kv: options.Kv = None,
    adapter: options.Adapter = None,
    device: options.Device = None,
    url: options.Url = None,
    api_key: options.ApiKey = None,
    debug: Debug = False,
) -> None:
    """Talk in several turns. /image PATH and /video PATH add media, /reset starts anew, /quit ends."""
    from mirada.cli.chat import run

    who = Who(model, device, quant, kv, adapter, url, api_key)
    wanted = {"fps": fps, "nframes": nframes, "min_pixels": min_pixels, "max_pixels": max_pixels}
    run(media or [], who, How.of(max_tokens, temperature, thinking, **wanted))


@app.command()
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="'mini', a folder, org/name, or NAME=one of these; may be given again. Default: mini."
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen at. Others than 127.0.0.1 (default) need an API key.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen at (default 8000); 0: any that is free.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key", help="A key that clients must send; may be given again. Others see this line: prefer a file."
        ),
    ] = None,
    api_key_file: Annotated[str | None, typer.Option("--api-key-file", help="File of such keys, one a line.")] = None,
    media_root: Annotated[str | None, typer.Option("--media-root", help="Folder whose files requests may name.")] = None,
    private_media: Annotated[
        bool,
        typer.Option("--private-media", help="Fetch media from private addresses too. Only where all clients are trusted."),
    ] = False,
    adapter: options.Adapters = None,
    quant: options.Quant = None,
    kv: options.Kv = None,
    thinking: options.Think = None,
    fps: options.Fps = None,
    nframes: options.Nframes = None,
    min_pixels: options.MinPixels = None,
    max_pixels: options.MaxPixels = None,
    device: options.Device = None,
    config: Annotated[
        str | None, typer.Option("--config", help="Yaml file of further server settings, see docs/serve.md.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve models over OpenAI's HTTP API. Settings of media and thinking hold where a request says nothing of them."""
    from mirada.cli.serve import Plan, run

    media = {"fps": fps, "nframes": nframes, "min_pixels": min_pixels, "max_pixels": max_pixels}
    chosen = options.given(host=host, port=port, thinking=options.mode(thinking), **media)
    secrets = (api_key or [], api_key_file)
    run(Plan(model or ["mini"], adapter or [], chosen, *secrets, media_root, private_media, device, quant, kv, config))


@app.command()
def download(
    model: Annotated[str, typer.Argument(metavar="ID", help="A model on a hub, as org/name.")],
    source: Annotated[str, typer.Option("--from", help="hf (Hugging Face) or modelscope.")] = "hf",
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit. Default: main.")] = None,
    cache_dir: Annotated[str | None, typer.Option("--cache-dir", help="Where models are kept. Default: as usual.")] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="Better kept in HF_TOKEN or MODELSCOPE_API_TOKEN: others see this line.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="Address of a mirror of the hub.")] = None,
    debug: Debug = False,
) -> None:
    """Fetch a model; what was cut off goes on where it stopped. Prints the directory, for --model."""
    from mirada.cli.download import run

    run(model, source, revision, cache_dir, token, endpoint)


@app.command()
def doctor(
    file: Annotated[Path | None, typer.Argument(help="With --parity: a recording to compare with.", show_default=False)] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="What a model is and needs, from its config: a folder, or org/name.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check the files of --model, and ask it something.")] = False,
    quant: Annotated[
        str | None, typer.Option("--quant", help="int8 or int4 (int4:64): what rounding does to each matrix of --model.")
    ] = None,
    parity: Annotated[bool, typer.Option("--parity", help="A picture through --model, stage by stage, beside FILE.")] = False,
    record: Annotated[Path | None, typer.Option("--record", help="With --parity: keep the stages in this file.")] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="With --parity: eager, float32 or transformers instead of FILE.")
    ] = None,
    image: Annotated[str | None, typer.Option("--image", help="With --parity: another picture than the drawn one.")] = None,
    question: Annotated[str | None, typer.Option("--question", help="With --parity: another question.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="With --parity: another type than float32.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, devices, decoders, threads and memory, and how to mend what is missing; or what a model needs."""
    if parity:
        if model is None or verify:
            raise SettingsError(
                "--parity needs a model, and no --verify", "add --model FOLDER, and ask for one thing at a time"
            )
        from mirada.cli.doctor_parity import Asked
        from mirada.cli.doctor_parity import run as run_parity

        asked = Asked(model, file, record, against, image, question, quant, dtype)
        raise typer.Exit(run_parity(asked, as_json=json))
    if any(value is not None for value in (file, record, against, image, question, dtype)):
        raise SettingsError("a file, --record, --against, --image, --question and --dtype are for --parity", "add --parity")
    if quant is not None:
        if model is None or verify:
            raise SettingsError("--quant needs a model, and no --verify", "add --model FOLDER, and ask for one thing at a time")
        from mirada.cli.doctor_quant import run as run_quant

        raise typer.Exit(run_quant(model, quant, as_json=json))
    if model is not None:
        from mirada.cli.doctor_model import run as run_model

        raise typer.Exit(run_model(model, verify, as_json=json))
    if verify:
        raise SettingsError("--verify needs a model", "add --model FOLDER")
    from mirada.cli.doctor import run

    raise typer.Exit(run(as_json=json))


def main() -> None:
    """The console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what an old terminal cannot show
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # what cannot be written is known here, and not when the interpreter ends
    except MiradaError as error:
        _fail(
            error, f"{error.problem}\n  {error.fix}" if error.fix else error.problem, 2 if isinstance(error, InputError) else 1
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            with contextlib.suppress(OSError):  # what is left in the buffer is tried again at the very end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _fail(error, f"the output cannot be written: {error.strerror}\n  make room for it, or send it elsewhere", 1)
        # a defect: say so in one line, and where to see more
        _fail(error, f"internal error: {type(error).__name__}: {error}\n  run it again with --debug to see where", 1)


def _fail(error: Exception, message: str, code: int) -> NoReturn:
    if _debug:
        raise error
    print(f"mirada: {message}", file=sys.stderr)
    sys.exit(code)
