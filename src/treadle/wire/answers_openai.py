"""Answers in OpenAI's form, as models. See answers.py.

A chunk of a stream has the same fields with `delta` in place of `message`; it is not described here.
"""

from __future__ import annotations

from typing import Literal

from treadle.wire.answers import Answer


class OpenAIErrorDetails(Answer):
    message: str
    """What was wrong: the value that was sent, and the limit or the fix."""
    type: str
    """invalid_request_error, rate_limit_error or server_error."""
    param: str | None
    """The field that is to blame."""
    code: str | None
    """model_not_found, context_length_exceeded, invalid_api_key, rate_limit_exceeded and so on, where there is one."""


class OpenAIErrorAnswer(Answer):
    """What every refusal looks like."""

    error: OpenAIErrorDetails


class ModelEntry(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = None
    """Tokens of its context; absent until the model is loaded."""


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelEntry]


class PromptTokensDetails(Answer):
    cached_tokens: int
    """Of the prompt's tokens those that an earlier request had left in the cache."""


class Usage(Answer):
    prompt_tokens: int
    """Each prompt counts once, however many choices it has."""
    completion_tokens: int
    """Every sampled token, the one that ended a choice included."""
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]
    """The most likely tokens at this place, best first."""


class ChatLogprobs(Answer):
    content: list[ChosenToken]
    """Of the tokens of the text. What ended it is not among them."""
    refusal: None


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    """The revision of the base model."""
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Answer):
    index: int
    """The prompt's number times n, plus the number of the choice."""
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    """The revision of the base model."""
    choices: list[CompletionChoice]
    usage: Usage
