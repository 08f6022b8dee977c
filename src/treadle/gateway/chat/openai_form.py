"""Answers in OpenAI's form: completions, chat completions, their chunks, models and errors.

Only the shapes: plain JSON objects out of texts and tokens (wire/answers_openai.py describes them). It refuses to know
where those come from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from treadle.domain.states import StopReason
from treadle.errors import (
    BadParameter,
    BodyTooLarge,
    Forbidden,
    NotFound,
    QueueFull,
    TreadleError,
    Unauthenticated,
    UserError,
)
from treadle.gateway.chat.text import Piece, ShownToken, Vocabulary

JsonObject = dict[str, Any]

DONE = b"data: [DONE]\n\n"
# What OpenAI writes for minus infinity, which JSON lacks.
_NEVER = -9999.0
_CONTEXT_WORDS = "exceeds the model's context window"


class Form(ABC):
    """One of the two forms: its objects for one request."""

    kind: str
    chunk_kind: str
    id_prefix: str

    def __init__(self, *, created: int, model: str, fingerprint: str, vocabulary: Vocabulary) -> None:
        self._head = {"id": "", "created": created, "model": model, "system_fingerprint": fingerprint}
        self._vocabulary = vocabulary

    def name(self, answer_id: str) -> None:
        """Once it is known: what the answer is called."""
        self._head["id"] = f"{self.id_prefix}-{answer_id}"

    def whole(self, choices: Sequence[JsonObject], usage: JsonObject) -> JsonObject:
        """The answer without streaming."""
        return {**self._head, "object": self.kind, "choices": list(choices), "usage": usage}

    def event(self, choices: Sequence[JsonObject], *, usage: JsonObject | None = None, has_usage: bool) -> bytes:
        """A chunk of a stream. has_usage: the client asked for usage, so every chunk has the field."""
        body = {**self._head, "object": self.chunk_kind, "choices": list(choices)}
        if has_usage:
            body["usage"] = usage
        return event(body)

    @abstractmethod
    def choice(self, index: int, piece: Piece, reason: StopReason, *, with_logprobs: bool) -> JsonObject:
        """A choice of a whole answer."""

    @abstractmethod
    def first_deltas(self, num_choices: int) -> list[JsonObject]:
        """The choices of a stream's first chunks, before any text."""

    @abstractmethod
    def delta(self, index: int, piece: Piece, *, with_logprobs: bool) -> JsonObject:
        """The choice of a chunk with more text."""

    @abstractmethod
    def last_delta(self, index: int, reason: StopReason) -> JsonObject:
        """The choice of the chunk that ends a sequence."""


class ChatForm(Form):
    """chat.completion"""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def choice(self, index: int, piece: Piece, reason: StopReason, *, with_logprobs: bool) -> JsonObject:
        return {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece.tokens) if with_logprobs else None,
            "finish_reason": reason.value,
        }

    def first_deltas(self, num_choices: int) -> list[JsonObject]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for index in range(num_choices)
        ]

    def delta(self, index: int, piece: Piece, *, with_logprobs: bool) -> JsonObject:
        return {
            "index": index,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs(piece.tokens) if with_logprobs else None,
            "finish_reason": None,
        }

    def last_delta(self, index: int, reason: StopReason) -> JsonObject:
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason.value}

    def _logprobs(self, tokens: Sequence[ShownToken]) -> JsonObject:
        entries = [
            {
                **self._entry(token.sampled.token_id, token.sampled.logprob),
                "top_logprobs": [self._entry(*alternative) for alternative in token.sampled.alternatives],
            }
            for token in tokens
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> JsonObject:
        raw = self._vocabulary.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


class CompletionForm(Form):
    """text_completion"""

    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def choice(self, index: int, piece: Piece, reason: StopReason, *, with_logprobs: bool) -> JsonObject:
        return {**self.delta(index, piece, with_logprobs=with_logprobs), "finish_reason": reason.value}

    def first_deltas(self, num_choices: int) -> list[JsonObject]:
        return []

    def delta(self, index: int, piece: Piece, *, with_logprobs: bool) -> JsonObject:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self.logprobs(piece.tokens) if with_logprobs else None,
            "finish_reason": None,
        }

    def last_delta(self, index: int, reason: StopReason) -> JsonObject:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": reason.value}

    def logprobs(self, tokens: Sequence[ShownToken]) -> JsonObject:
        """The four lists, one entry per token. A token that cannot be predicted (NaN) has null."""
        tops: list[JsonObject | None] = []
        for token in tokens:
            alternatives = (*token.sampled.alternatives, (token.sampled.token_id, token.sampled.logprob))
            is_known = token.sampled.alternatives and not math.isnan(token.sampled.logprob)
            # The sampled token comes last and is already there if it is one of the best.
            top = {self._name(token_id): _finite(logprob) for token_id, logprob in alternatives}
            tops.append(top if is_known else None)
        return {
            "tokens": [self._name(token.sampled.token_id) for token in tokens],
            "token_logprobs": [_known(token.sampled.logprob) for token in tokens],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": [token.text_offset for token in tokens],
        }

    def _name(self, token_id: int) -> str:
        """A token as text, or as its bytes when it is only a part of a character."""
        raw = self._vocabulary.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage_of(*, num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int) -> JsonObject:
    """Tokens of a request; a prompt counts once, however many choices it has."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def model_of(name: str, *, owner: str, max_context_length: int | None) -> JsonObject:
    """One model; max_model_len is an extension that others have as well."""
    body: JsonObject = {"id": name, "object": "model", "created": 0, "owned_by": owner}
    if max_context_length is not None:
        body["max_model_len"] = max_context_length
    return body


def error_of(error: TreadleError) -> JsonObject:
    """An error as OpenAI's clients expect it."""
    kind, code, param = "invalid_request_error", None, None
    match error:
        case BadParameter():
            param = error.param
        case Unauthenticated():
            code = "invalid_api_key"
        case NotFound():
            # The only names in these requests are models.
            code, param = "model_not_found", "model"
        case Forbidden():
            code = "forbidden"
        case BodyTooLarge():
            code = "request_too_large"
        case QueueFull():
            kind, code = "rate_limit_error", "rate_limit_exceeded"
        case UserError():
            code = "context_length_exceeded" if _CONTEXT_WORDS in error.message else None
        case _:
            kind = "server_error"
    return {"error": {"message": error.message, "type": kind, "param": param, "code": code}}


def event(body: Mapping[str, Any]) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _finite(logprob: float) -> float:
    return max(logprob, _NEVER)


def _known(logprob: float) -> float | None:
    return None if math.isnan(logprob) else _finite(logprob)
