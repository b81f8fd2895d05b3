"""What a caller holds of a request under way: the handle that every client gives, over a ``Sequence``."""

from mirada.client.handle import ReplyHandle as EngineHandle

__all__ = ["EngineHandle"]
