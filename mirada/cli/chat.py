"""``mirada chat``: several turns with one model, media added by ``/image`` and ``/video``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import mirada
from mirada.cli import show
from mirada.engine import inputs
from mirada.errors import MiradaError, nearest
from mirada.types import Delta, Image, Message, Sampling, Text, Thinking, Video

COMMANDS = {
    "/image": "PATH or address: add a picture to the next question",
    "/video": "PATH or address: add a video to the next question",
    "/reset": "forget everything said so far",
    "/help": "list these commands",
    "/quit": "end (also /exit, or Ctrl-D)",
}


@dataclass
class Conversation:
    """The turns so far and the media of the next question. A turn that fails leaves both as they were."""

    vlm: mirada.VLM
    sampling: Sampling
    thinking: Thinking = "auto"
    messages: list[Message] = field(default_factory=list)
    media: list[Image | Video] = field(default_factory=list)

    def say(self, text: str) -> Iterator[Delta]:
        """Ask; the answer joins the conversation once it is whole. Closing the iterator early cancels it."""
        question = Message("user", (*self.media, Text(text)))
        handle = self.vlm.submit([*self.messages, question], self.sampling, thinking=self.thinking)
        try:
            yield from handle
            output = handle.result()
        except GeneratorExit:
            handle.cancel()
            raise
        if output.error is not None:
            raise output.error
        self.messages += [question, output.message]
        self.media.clear()

    def reset(self) -> None:
        self.messages.clear()
        self.media.clear()


def run(
    media: list[str],
    model: str,
    sampling: Sampling,
    think: bool | None,
    fps: float | None,
    max_pixels: int | None,
    device: str | None,
) -> None:
    """Read lines until /quit or the end of input."""
    show.check_paths(media)
    talk = Conversation(show.open_model(model, device), sampling, show.thinking(think))
    parts = [inputs.as_part(source, talk.vlm.limits) for source in media]
    talk.media += inputs.with_settings(parts, show.media_options(fps, max_pixels))  # type: ignore[arg-type]
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())

        print("Ask away; /help lists the commands.")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:  # drop the line, as shells do
            print()
            continue
        if line in ("/quit", "/exit"):
            return
        try:
            _turn(talk, line, fps, max_pixels)
        except MiradaError as error:
            print(f"mirada: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped; this turn is forgotten)")


def _turn(talk: Conversation, line: str, fps: float | None, max_pixels: int | None) -> None:
    if not line:
        return
    command, _, argument = line.partition(" ")
    if command.startswith("/"):
        _command(talk, command, argument.strip(), fps, max_pixels)
        return
    deltas = talk.say(line)
    try:
        show.stream(deltas)
    finally:
        deltas.close()  # type: ignore[attr-defined]


def _command(talk: Conversation, command: str, argument: str, fps: float | None, max_pixels: int | None) -> None:
    if command in ("/image", "/video"):
        show.check_paths([argument])
        talk.media.append(
            Image(argument, max_pixels=max_pixels) if command == "/image" else Video(argument, fps=fps, max_pixels=max_pixels)
        )
        print(f"({len(talk.media)} added to the next question)")
    elif command == "/reset":
        talk.reset()
        print("(everything is forgotten)")
    elif command == "/help":
        for name, what in COMMANDS.items():
            print(f"{name:8} {what}")
    else:
        print(f"(there is no {command}; {nearest(command, COMMANDS)})")
