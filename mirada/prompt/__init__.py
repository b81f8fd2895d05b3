"""Text in, token ids out: tokenizer, chat template, the one renderer, and the parser of replies. No torch."""
