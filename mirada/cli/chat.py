"""``mirada chat``: several turns with one model, media added by ``/image`` and ``/video``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirada.cli import show
from mirada.cli.options import How, Who
from mirada.errors import MediaNotFound, MiradaError, nearest
from mirada.media.limits import FetchLimits
from mirada.types import Delta, Image, Message, Text, Video

COMMANDS = {
    "/image": "PATH or address: add a picture to the next question",
    "/video": "PATH or address: add a video to the next question",
    "/drop": "take the media of the next question back",
    "/reset": "forget everything said so far",
    "/help": "list these commands",
    "/quit": "end (also /exit, or Ctrl-D)",
}


@dataclass
class Conversation:
    """The turns so far and the media of the next question. A turn that fails leaves both as they were."""

    client: Any
    """``types.Client``: an engine, or a server's."""
    how: How
    adapter: str | None = None
    messages: list[Message] = field(default_factory=list)
    media: list[Image | Video] = field(default_factory=list)

    def say(self, text: str) -> Iterator[Delta]:
        """Ask; the answer joins the conversation once it is whole. Closing the iterator early cancels it."""
        question = Message("user", (*self.media, Text(text)))
        asked = [*self.messages, question]
        handle = self.client.submit(asked, self.how.sampling, thinking=self.how.thinking, adapter=self.adapter)
        try:
            yield from handle
            output = handle.result()
        except GeneratorExit:
            handle.cancel()
            raise
        if output.error is not None:
            raise output.error
        show.notes(output)
        self.messages += [question, output.message]
        self.media.clear()

    def reset(self) -> None:
        self.messages.clear()
        self.media.clear()


def run(media: list[str], who: Who, how: How) -> None:
    """Read lines until /quit or the end of input."""
    show.check_paths(media, "check the path; questions are typed once the chat has begun")
    client, adapter = who.open()
    with client:
        talk = Conversation(client, how, adapter)
        talk.media += how.parts(media, FetchLimits())
        _loop(talk)


def _loop(talk: Conversation) -> None:
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
            _turn(talk, line)
        except MiradaError as error:
            print(f"mirada: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped; this turn is forgotten)")


def _turn(talk: Conversation, line: str) -> None:
    if not line:
        return
    command, _, argument = line.partition(" ")
    if command.startswith("/"):
        _command(talk, command, argument.strip())
        return
    deltas = talk.say(line)
    try:
        show.stream(deltas)
    finally:
        deltas.close()  # type: ignore[attr-defined]


def _command(talk: Conversation, command: str, argument: str) -> None:
    if command in ("/image", "/video"):
        source = _source(argument)
        show.check_paths([source], "check the path")
        talk.media.append(talk.how.part(Image if command == "/image" else Video, source))
        print(f"({len(talk.media)} added to the next question)")
    elif command == "/drop":
        print(f"({len(talk.media)} taken back)")
        talk.media.clear()
    elif command == "/reset":
        talk.reset()
        print("(everything is forgotten)")
    elif command == "/help":
        for name, what in COMMANDS.items():
            print(f"{name:8} {what}")
    else:
        print(f"(there is no {command}; {nearest(command, COMMANDS)})")


def _source(argument: str) -> str:
    """A path as it is typed or dropped into a terminal: perhaps in quotes, perhaps from ``~``. Raises MediaNotFound."""
    if len(argument) > 1 and argument[0] == argument[-1] in "'\"":
        argument = argument[1:-1]
    if not argument:
        raise MediaNotFound("the command names no file", "write its path or address behind it")
    return str(Path(argument).expanduser()) if argument.startswith("~") else argument
