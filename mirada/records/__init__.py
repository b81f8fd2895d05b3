"""Records of chats: messages as JSON (``wire``), files of them (``files``), mixtures by weight (``mix``). No pickles."""

from mirada.records.files import SUFFIXES, JsonlWriter, Record, read, record_from_json, record_to_json, shards, write
from mirada.records.mix import Mix, Source
from mirada.records.wire import message_from_json, message_to_json, messages_from_openai

__all__ = [
    "SUFFIXES",
    "JsonlWriter",
    "Mix",
    "Record",
    "Source",
    "message_from_json",
    "message_to_json",
    "messages_from_openai",
    "read",
    "record_from_json",
    "record_to_json",
    "shards",
    "write",
]
