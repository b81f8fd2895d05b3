"""Families of vision-language models: config, modules, layout of their checkpoints."""
