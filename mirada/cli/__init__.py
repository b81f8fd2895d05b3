"""The command ``mirada``. Each command is a module of this room and is loaded when it is called."""

from mirada.cli.commands import main

__all__ = ["main"]
