"""Answers in Anthropic's form, as models. See answers.py. Streams are events of their own and not described here."""

from __future__ import annotations

from typing import Literal

from treadle.wire.answers import Answer


class AnthropicErrorDetails(Answer):
    type: str
    """invalid_request_error, not_found_error, rate_limit_error, overloaded_error and so on."""
    message: str
    """What was wrong: the value that was sent, and the limit or the fix."""


class AnthropicErrorAnswer(Answer):
    """What every refusal looks like."""

    type: Literal["error"]
    error: AnthropicErrorDetails


class TextBlock(Answer):
    type: Literal["text"]
    text: str


class MessageUsage(Answer):
    input_tokens: int
    """Of the prompt those that had to be read; with cache_read_input_tokens all of it."""
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    """Of the prompt's tokens those that an earlier request had left in the cache."""
    output_tokens: int
    """Every sampled token, the one that ended the message included."""


class MessageAnswer(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Answer):
    input_tokens: int
