"""From a chat to an answer: the front door (``llm``), requests, scheduling, running and sampling."""
