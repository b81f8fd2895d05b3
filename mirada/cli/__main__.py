"""``python -m mirada.cli``."""

from mirada.cli.commands import main

main()
