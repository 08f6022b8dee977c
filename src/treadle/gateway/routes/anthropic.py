"""Messages in the form of the Anthropic API, under /anthropic/api/v1 and /v1. Text only; see docs/openai.md.

A request is a sample of the caller's like any other. Errors have Anthropic's shape; its version header says nothing to
this server.
"""

from __future__ import annotations

from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from treadle.gateway.answers import json_response
from treadle.gateway.bodies import room_of
from treadle.gateway.chat.anthropic_answers import Answering, answer, error_of
from treadle.gateway.chat.samples import Asked
from treadle.gateway.chat.serving import EVENTS, in_form
from treadle.gateway.chat.tokenizers import TEXT_COST
from treadle.gateway.chat.weights import find_weights
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.intake import read_plain_body
from treadle.gateway.routing import Resource
from treadle.wire.answers_anthropic import AnthropicErrorAnswer, MessageAnswer, TokenCount
from treadle.wire.anthropic_bodies import CountTokensBody, MessagesBody
from treadle.wire.bodies import Body
from treadle.wire.openai_bodies import parse_form

router = Resource()

PREFIXES = ("/anthropic/api/v1", "/v1")

B = TypeVar("B", bound=Body)


@in_form(error_of)
async def messages(request: Request) -> Response:
    """The assistant's next message, through the model's own chat template; with `stream`, as server-sent events."""
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    body, num_bytes = await _body(gateway, request, MessagesBody)
    weights = await find_weights(gateway, principal, body.model)
    tokenizer = await gateway.tokenizers.of(weights.facts)
    turns = body.for_template()
    prompt = await gateway.admission.run(lambda: tokenizer.encode_chat(turns), num_bytes=num_bytes * TEXT_COST)
    asked = Asked(
        prompts=(prompt,),
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_k=-1 if body.top_k is None else body.top_k,
        top_p=body.top_p,
        stops=tuple(body.stop_sequences),
    )
    return await answer(request, Answering(gateway, principal, weights, tokenizer, asked, streams=body.stream))


@in_form(error_of)
async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of these messages has."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    body, num_bytes = await _body(gateway, request, CountTokensBody)
    weights = await find_weights(gateway, principal, body.model)
    tokenizer = await gateway.tokenizers.of(weights.facts)
    turns = body.for_template()
    prompt = await gateway.admission.run(lambda: tokenizer.encode_chat(turns), num_bytes=num_bytes * TEXT_COST)
    return json_response({"input_tokens": len(prompt)})


async def _body(gateway: Gateway, request: Request, model: type[B]) -> tuple[B, int]:
    """The body, and how many bytes it has."""
    raw = await read_plain_body(gateway, request)
    body = await gateway.admission.run(lambda: parse_form(model, raw), num_bytes=len(raw))
    room_of(request.scope).give_back()
    return body, len(raw)


_FACTS = {"error": AnthropicErrorAnswer}
_SAMPLED = {**_FACTS, "answer_type": EVENTS, "others": {410: AnthropicErrorAnswer, 429: AnthropicErrorAnswer}}
for _prefix in PREFIXES:
    router.post(f"{_prefix}/messages", body=MessagesBody, answer=MessageAnswer, **_SAMPLED)(messages)
    router.post(f"{_prefix}/messages/count_tokens", body=CountTokensBody, answer=TokenCount, **_FACTS)(count_tokens)
