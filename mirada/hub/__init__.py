"""Where weights come from: a directory, the Hugging Face Hub, or ModelScope. No torch, and no code of a release.

Over plain HTTP for both hubs, so that one transfer, one cache and one set of errors serve them: a file that was cut off
goes on where it stopped, in this process or the next, and every byte is checked against the size and hash that the hub states.
"""

from mirada.hub.resolve import HubOptions, is_id, resolve, resolve_with
from mirada.hub.transfer import Progress

__all__ = ["HubOptions", "Progress", "is_id", "resolve", "resolve_with"]
