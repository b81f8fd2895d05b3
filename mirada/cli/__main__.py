"""``python -m mirada.cli``."""

from mirada.cli.main import main

main()
