"""From samples to answers in OpenAI's form, whole or streamed.

It joins text.py, samples.py and openai_form.py, and knows nothing that they know better. Invariant: what a stream says,
put together, is what the whole answer would have said.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from treadle.domain.states import StopReason
from treadle.errors import TreadleError
from treadle.gateway.answers import json_response
from treadle.gateway.auth import Principal
from treadle.gateway.chat.openai_form import DONE, Form, JsonObject, error_of, event, usage_of
from treadle.gateway.chat.samples import Asked, Done, Grown, Samples, StillThere, Watch, admit, sampled_of
from treadle.gateway.chat.serving import KEEP_ALIVE, EventStream, attended
from treadle.gateway.chat.text import Piece, Sampled, SequenceText, ShownToken
from treadle.gateway.chat.tokenizers import ChatTokenizer
from treadle.gateway.chat.weights import Weights
from treadle.gateway.context import Gateway
from treadle.wire.sampled import SampledResult

# Of turning tokens into text, in bytes of a pass that take as long to read.
TOKEN_COST = 1_024


@dataclass(frozen=True, slots=True)
class Answering:
    """A request that is ready to be sampled, and how it wants its answer.

    echoed: the text of each prompt, to be put before what was sampled; only_echo: nothing was to be sampled.
    """

    gateway: Gateway
    principal: Principal
    weights: Weights
    tokenizer: ChatTokenizer
    form: Form
    asked: Asked
    with_logprobs: bool
    streams: bool
    includes_usage: bool = False
    echoed: tuple[str, ...] = ()
    only_echo: bool = False


async def answer(request: Request, answering: Answering) -> Response:
    """The answer, after the sample or along with it. Raises what samples are refused or fail with."""
    samples, watch = await admit(
        answering.gateway, answering.principal, answering.weights, answering.asked, streams=answering.streams
    )
    answering.form.name(samples.request_ids[0])
    if watch is not None:
        return EventStream(_events(answering, samples, watch), close=samples.close)
    results = await attended(request, samples.results())
    num_tokens = sum(len(sequence.tokens) for result in results for sequence in result.sequences)
    body = await answering.gateway.admission.run(lambda: _whole(answering, results), num_bytes=num_tokens * TOKEN_COST)
    return json_response(body)


def _whole(answering: Answering, results: Sequence[SampledResult]) -> JsonObject:
    """The answer as JSON."""
    asked, num_sampled = answering.asked, 0
    choices: list[JsonObject] = []
    for prompt_index, result in enumerate(results):
        echo = _echo(answering, prompt_index, result) if answering.echoed else None
        for sequence, tokens in zip(result.sequences, sampled_of(result), strict=True):
            text = SequenceText(answering.tokenizer, asked.stops)
            reason = StopReason.LENGTH if answering.only_echo else sequence.stop_reason
            piece = Piece("", ()) if answering.only_echo else text.end(tokens, reason)
            if echo is not None:
                piece = _joined(echo, piece)
            num_sampled += text.num_tokens
            choices.append(answering.form.choice(len(choices), piece, reason, with_logprobs=answering.with_logprobs))
    return answering.form.whole(choices, _usage(asked, num_sampled, results))


async def _events(answering: Answering, samples: Samples, watch: Watch) -> AsyncIterator[bytes]:
    """The stream's events. A failure is one of them, since the status has gone out."""
    asked, form, has_usage = answering.asked, answering.form, answering.includes_usage
    num_choices = len(asked.prompts) * asked.num_samples
    texts = [SequenceText(answering.tokenizer, asked.stops) for _ in range(num_choices)]
    results: list[SampledResult] = []

    def more(index: int, piece: Piece) -> list[JsonObject]:
        if not piece.text and not (answering.with_logprobs and piece.tokens):
            return []
        return [form.delta(index, piece, with_logprobs=answering.with_logprobs)]

    try:
        for choice in form.first_deltas(num_choices):
            yield form.event([choice], has_usage=has_usage)
        async with aclosing(samples.events(watch)) as happening:
            async for happened in happening:
                deltas: list[JsonObject] = []
                match happened:
                    case StillThere():
                        yield KEEP_ALIVE
                    case Grown(prompt_index, sequence_index, tokens):
                        index = prompt_index * asked.num_samples + sequence_index
                        deltas += more(index, texts[index].push(tokens))
                    case Done(prompt_index, result, rest):
                        results.append(result)
                        for sequence_index, sequence in enumerate(result.sequences):
                            index = prompt_index * asked.num_samples + sequence_index
                            deltas += more(index, texts[index].end(rest[sequence_index], sequence.stop_reason))
                            deltas.append(form.last_delta(index, sequence.stop_reason))
                for delta in deltas:
                    yield form.event([delta], has_usage=has_usage)
        if has_usage:
            usage = _usage(asked, sum(text.num_tokens for text in texts), results)
            yield form.event([], usage=usage, has_usage=True)
        yield DONE
    except TreadleError as error:
        yield event(error_of(error))


def _usage(asked: Asked, num_sampled: int, results: Sequence[SampledResult]) -> JsonObject:
    return usage_of(
        num_prompt_tokens=sum(map(len, asked.prompts)),
        num_completion_tokens=num_sampled,
        num_cached_tokens=sum(result.num_cached_tokens for result in results),
    )


def _echo(answering: Answering, prompt_index: int, result: SampledResult) -> Piece:
    """A prompt as if it had been sampled. A special token that stands before the text, like a BOS, has no text."""
    prompt, text = answering.asked.prompts[prompt_index], answering.echoed[prompt_index]
    if result.prompt_logprobs is None:
        return Piece(text, ())
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    shown, offset = [], 0
    for place, token_id in enumerate(prompt):
        logprob = float(result.prompt_logprobs[place])
        alternatives = () if result.prompt_top is None or math.isnan(logprob) else result.prompt_top.at(place)
        shown.append(ShownToken(Sampled(token_id, logprob, alternatives), offset))
        characters = decoder.decode(answering.tokenizer.token_bytes(token_id))
        if not answering.tokenizer.is_special(token_id) or text.startswith(characters, offset):
            offset += len(characters)
    return Piece(text, tuple(shown))


def _joined(echo: Piece, piece: Piece) -> Piece:
    moved = (ShownToken(token.sampled, len(echo.text) + token.text_offset) for token in piece.tokens)
    return Piece(echo.text + piece.text, (*echo.tokens, *moved))
