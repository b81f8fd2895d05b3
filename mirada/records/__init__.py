"""Records of chats: messages as JSON (``wire``), files of them (``files``), mixtures by weight (``mix``), and the bodies of
OpenAI's API (``request``, ``answer``). No pickles."""

from mirada.records.answer import completion_to_openai, error_to_openai, usage_to_openai
from mirada.records.files import SUFFIXES, JsonlWriter, Record, read, record_from_json, record_to_json, shards, write
from mirada.records.mix import Mix, Source
from mirada.records.request import ChatRequest, RequestOptions, request_from_openai
from mirada.records.wire import message_from_json, message_to_json, messages_from_openai

__all__ = [
    "SUFFIXES",
    "ChatRequest",
    "JsonlWriter",
    "Mix",
    "Record",
    "RequestOptions",
    "Source",
    "completion_to_openai",
    "error_to_openai",
    "message_from_json",
    "message_to_json",
    "messages_from_openai",
    "read",
    "record_from_json",
    "record_to_json",
    "request_from_openai",
    "shards",
    "usage_to_openai",
    "write",
]
