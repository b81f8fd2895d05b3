"""Training: a small loop over packed batches. Knows models and prompts, never the engine."""
