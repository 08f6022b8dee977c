"""From samples to answers in Anthropic's form, whole or streamed. One message each, text only.

It joins text.py and samples.py, and knows no tokenizer files and no queue. Invariant: what a stream says, put together,
is what the whole answer would have said.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.states import StopReason
from treadle.errors import TreadleError
from treadle.gateway.answers import json_response
from treadle.gateway.auth import Principal
from treadle.gateway.chat.samples import Asked, Done, Grown, Samples, StillThere, Watch, admit, sampled_of
from treadle.gateway.chat.serving import EventStream, attended
from treadle.gateway.chat.text import Sampled, SequenceText
from treadle.gateway.chat.tokenizers import ChatTokenizer
from treadle.gateway.chat.weights import Weights
from treadle.gateway.context import Gateway
from treadle.wire.sampled import SampledResult

JsonObject = dict[str, Any]

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class Answering:
    """A request that is ready to be sampled: one prompt, one sequence."""

    gateway: Gateway
    principal: Principal
    weights: Weights
    tokenizer: ChatTokenizer
    asked: Asked
    streams: bool


async def answer(request: Request, answering: Answering) -> Response:
    """The answer, after the sample or along with it. Raises what samples are refused or fail with."""
    samples, watch = await admit(
        answering.gateway, answering.principal, answering.weights, answering.asked, streams=answering.streams
    )
    if watch is not None:
        return EventStream(_events(answering, samples, watch), close=samples.close)
    (result,) = await attended(request, samples.results())
    text = _text(answering)
    (tokens,) = sampled_of(result)
    piece = text.end(tokens, result.sequences[0].stop_reason)
    body = {
        **_head(answering, samples),
        "content": [{"type": "text", "text": piece.text}],
        **_stop(text, result),
        "usage": _usage(answering.asked, result, text.num_tokens),
    }
    return json_response(body)


def error_of(error: TreadleError) -> JsonObject:
    """An error as Anthropic's clients expect it."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


async def _events(answering: Answering, samples: Samples, watch: Watch) -> AsyncIterator[bytes]:
    """The stream's events. A failure is one of them, since the status has gone out."""
    text = _text(answering)
    start = {
        **_head(answering, samples),
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(answering.asked, None, 0),
    }
    try:
        yield _event("message_start", message=start)
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        async with aclosing(samples.events(watch)) as happening:
            async for happened in happening:
                match happened:
                    case StillThere():
                        yield _event("ping")
                    case Grown(tokens=tokens):
                        for event in _deltas(text.push(tokens).text):
                            yield event
                    case Done(result=result, rest=(rest,)):
                        for event in _last_events(answering, text, result, rest):
                            yield event
    except TreadleError as error:
        yield _event("error", **error_of(error))


def _last_events(
    answering: Answering, text: SequenceText, result: SampledResult, rest: Sequence[Sampled]
) -> list[bytes]:
    piece = text.end(rest, result.sequences[0].stop_reason)
    usage = _usage(answering.asked, result, text.num_tokens)
    return [
        *_deltas(piece.text),
        _event("content_block_stop", index=0),
        _event("message_delta", delta=_stop(text, result), usage=usage),
        _event("message_stop"),
    ]


def _deltas(text: str) -> list[bytes]:
    return [_event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})] if text else []


def _text(answering: Answering) -> SequenceText:
    return SequenceText(answering.tokenizer, answering.asked.stops)


def _head(answering: Answering, samples: Samples) -> JsonObject:
    message_id = f"msg_{samples.request_ids[0]}"
    return {"id": message_id, "type": "message", "role": "assistant", "model": answering.weights.name}


def _stop(text: SequenceText, result: SampledResult) -> JsonObject:
    is_length = result.sequences[0].stop_reason is StopReason.LENGTH
    reason = "max_tokens" if is_length else "end_turn" if text.stopped_by is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": text.stopped_by}


def _usage(asked: Asked, result: SampledResult | None, num_sampled: int) -> JsonObject:
    """Of a message that has begun (no result yet) nothing is known of the cache."""
    num_cached = 0 if result is None else result.num_cached_tokens
    return {
        "input_tokens": len(asked.prompts[0]) - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": num_sampled,
    }


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"
