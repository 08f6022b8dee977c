"""Completions and chat in the form of the OpenAI API, under /oai/api/v1 and /v1.

A request is a sample of the caller's like any other; docs/openai.md says which parameters there are. Errors have
OpenAI's shape. Here text becomes tokens, and the rest is gateway/chat.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.outcome import PoolFacts
from treadle.errors import InvalidRequest
from treadle.gateway.answers import json_response
from treadle.gateway.bodies import room_of
from treadle.gateway.chat.openai_answers import Answering, answer
from treadle.gateway.chat.openai_form import ChatForm, CompletionForm, Form, error_of, model_of
from treadle.gateway.chat.samples import Asked
from treadle.gateway.chat.serving import EVENTS, in_form
from treadle.gateway.chat.templates import RESERVED
from treadle.gateway.chat.tokenizers import TEXT_COST, ChatTokenizer
from treadle.gateway.chat.weights import Weights, find_weights
from treadle.gateway.context import Gateway, gateway_of
from treadle.gateway.intake import read_plain_body
from treadle.gateway.routing import Resource
from treadle.wire.answers_openai import ChatCompletion, Completion, ModelEntry, ModelList, OpenAIErrorAnswer
from treadle.wire.openai_bodies import DEFAULT_COMPLETION_TOKENS, ChatBody, CompletionBody, parse_form

router = Resource()

PREFIXES = ("/oai/api/v1", "/v1")


@in_form(error_of)
async def list_models(request: Request) -> Response:
    """The base models. Checkpoints of the caller are models too, under their paths; they are not listed."""
    gateway = gateway_of(request)
    await gateway.caller(request)
    models = [
        model_of(
            pool.name,
            owner="treadle",
            max_context_length=None if pool.facts is None else pool.facts.max_context_length,
        )
        for pool in gateway.deps.pools.all()
    ]
    return json_response({"object": "list", "data": models})


@in_form(error_of)
async def get_model(request: Request, model: str) -> Response:
    """A base model, or a checkpoint that the caller may sample."""
    gateway = gateway_of(request)
    principal = await gateway.caller(request)
    weights = await find_weights(gateway, principal, model)
    owner = "treadle" if weights.checkpoint is None else weights.pool.name
    return json_response(model_of(model, owner=owner, max_context_length=weights.facts.max_context_length))


@in_form(error_of)
async def chat_completions(request: Request) -> Response:
    """The next message of a chat, through the model's own chat template; with `stream`, as server-sent events."""
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    raw = await read_plain_body(gateway, request)
    body = await gateway.admission.run(lambda: parse_form(ChatBody, raw), num_bytes=len(raw))
    room_of(request.scope).give_back()
    if taken := RESERVED & body.chat_template_kwargs.keys():
        raise InvalidRequest(f"chat_template_kwargs may not have {', '.join(sorted(taken))}")
    weights = await find_weights(gateway, principal, body.model)
    tokenizer = await gateway.tokenizers.of(weights.facts)
    messages = [message.for_template() for message in body.messages]
    prompt = await gateway.admission.run(
        lambda: tokenizer.encode_chat(messages, tools=body.tools, variables=body.chat_template_kwargs),
        num_bytes=len(raw) * TEXT_COST,
    )
    asked = Asked(
        prompts=(prompt,),
        num_samples=body.n,
        max_tokens=body.most_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        seed=body.seed,
        stops=body.stops,
        num_alternatives=body.top_logprobs or 0,
    )
    answering = Answering(
        gateway=gateway,
        principal=principal,
        weights=weights,
        tokenizer=tokenizer,
        form=_form(ChatForm, gateway, weights, tokenizer),
        asked=asked,
        with_logprobs=body.logprobs,
        streams=body.stream,
        includes_usage=body.includes_usage,
    )
    return await answer(request, answering)


@in_form(error_of)
async def completions(request: Request) -> Response:
    """What follows a prompt, or several; with `stream`, as server-sent events."""
    gateway = gateway_of(request)
    principal = await gateway.submitter(request)
    raw = await read_plain_body(gateway, request)
    body = await gateway.admission.run(lambda: parse_form(CompletionBody, raw), num_bytes=len(raw))
    room_of(request.scope).give_back()
    weights = await find_weights(gateway, principal, body.model)
    tokenizer = await gateway.tokenizers.of(weights.facts)

    def read() -> tuple[tuple[list[int], ...], tuple[str, ...]]:
        tokens = tuple(_tokens(tokenizer, prompt) for prompt in body.prompts)
        if not body.echo:
            return tokens, ()
        for ids in tokens:
            _check_known(ids, weights.facts)
        return tokens, tuple(_text(tokenizer, prompt) for prompt in body.prompts)

    prompts, echoed = await gateway.admission.run(read, num_bytes=len(raw) * TEXT_COST)
    _check_number(gateway, len(prompts) * body.n)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    asked = Asked(
        prompts=prompts,
        num_samples=body.n,
        # Prompts are scored by sampling behind them; the token is thrown away.
        max_tokens=max(1, max_tokens),
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        seed=body.seed,
        stops=body.stops,
        num_alternatives=body.logprobs or 0,
        wants_prompt_logprobs=body.echo and body.logprobs is not None,
    )
    answering = Answering(
        gateway=gateway,
        principal=principal,
        weights=weights,
        tokenizer=tokenizer,
        form=_form(CompletionForm, gateway, weights, tokenizer),
        asked=asked,
        with_logprobs=body.logprobs is not None,
        streams=body.stream,
        includes_usage=body.includes_usage,
        echoed=echoed,
        only_echo=max_tokens == 0,
    )
    return await answer(request, answering)


def _form(kind: type[Form], gateway: Gateway, weights: Weights, tokenizer: ChatTokenizer) -> Form:
    return kind(
        created=int(gateway.deps.clock.now()),
        model=weights.name,
        fingerprint=weights.facts.revision,
        vocabulary=tokenizer,
    )


def _tokens(tokenizer: ChatTokenizer, prompt: str | list[int]) -> list[int]:
    return tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt


def _check_known(tokens: list[int], facts: PoolFacts) -> None:
    """Raises InvalidRequest for what has no text. Whether it fits is said where samples are admitted, of any prompt."""
    strange = next((token_id for token_id in tokens if not 0 <= token_id < facts.vocab_size), None)
    if strange is not None:
        raise InvalidRequest(f"prompt has the token {strange}, which is not in the vocabulary of {facts.vocab_size}")


def _text(tokenizer: ChatTokenizer, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    return b"".join(map(tokenizer.token_bytes, prompt)).decode("utf-8", "replace")


def _check_number(gateway: Gateway, num_choices: int) -> None:
    limit = gateway.settings.max_num_samples
    if num_choices > limit:
        raise InvalidRequest(f"{num_choices} choices are asked for; this server's limit is {limit}")


_FACTS = {"error": OpenAIErrorAnswer}
_SAMPLED = {**_FACTS, "answer_type": EVENTS, "others": {410: OpenAIErrorAnswer, 429: OpenAIErrorAnswer}}
for _prefix in PREFIXES:
    router.post(f"{_prefix}/chat/completions", body=ChatBody, answer=ChatCompletion, **_SAMPLED)(chat_completions)
    router.post(f"{_prefix}/completions", body=CompletionBody, answer=Completion, **_SAMPLED)(completions)
    router.get(f"{_prefix}/models", answer=ModelList, **_FACTS)(list_models)
    router.get(f"{_prefix}/models/{{model:path}}", answer=ModelEntry, **_FACTS)(get_model)
