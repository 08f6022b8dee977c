"""The samples behind one request: admitted like the SDK's own, waited for, watched while they grow, given up together.

Each prompt is a row of the tenant's sampling session, so limits, queue, fairness, usage and recovery are those of
asample. It refuses to know text. Invariants: what was admitted here and is not over when its reader goes away is
cancelled; a token is reported once, in order, however often a worker drew it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from treadle.domain.ids import RequestId, sample_request_id
from treadle.domain.ops import OpKind, SampleOp
from treadle.domain.outcome import SampledPart
from treadle.domain.records import NewRequest, SamplingSessionRecord
from treadle.domain.states import Category, RequestState
from treadle.domain.usage import SampleUsage
from treadle.errors import Draining, InvalidRequest, Overloaded, ServerError
from treadle.gateway.admission import Draft, sample_draft
from treadle.gateway.auth import Principal
from treadle.gateway.chat.text import Sampled
from treadle.gateway.chat.weights import Weights, sampling_session_of
from treadle.gateway.context import Gateway
from treadle.gateway.intake import pass_limits
from treadle.telemetry.context import bind_context
from treadle.wire.bodies import SampleBody, SamplingParamsBody
from treadle.wire.ops import sample_op
from treadle.wire.sampled import SampledResult, decode_sample_result

# A stream says something at least this often, since proxies end connections that are silent for a minute.
KEEP_ALIVE_S = 15.0
# Ids are drawn, not counted: several gateways share a sampling session.
_SEQ_ID_BITS = 62


@dataclass(frozen=True, slots=True)
class Asked:
    """What to sample, once texts are tokens. num_alternatives: per sampled token, and per prompt token when those are
    wanted."""

    prompts: tuple[Sequence[int], ...]
    num_samples: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    num_alternatives: int = 0
    wants_prompt_logprobs: bool = False

    @property
    def can_stream(self) -> bool:
        """Whether tokens can be shown before the end: what is reported of them early has no alternatives."""
        return self.num_alternatives == 0


@dataclass(frozen=True, slots=True)
class Grown:
    """Further tokens of one sequence of one prompt."""

    prompt_index: int
    sequence_index: int
    tokens: tuple[Sampled, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """All of a prompt's sequences have ended. rest: of each of them the tokens that were not reported yet."""

    prompt_index: int
    result: SampledResult
    rest: tuple[tuple[Sampled, ...], ...]


@dataclass(frozen=True, slots=True)
class StillThere:
    """Nothing new."""


Event = Grown | Done | StillThere


class Samples:
    """One request's samples, from `admit` to `close`."""

    def __init__(
        self, gateway: Gateway, principal: Principal, rows: Sequence[NewRequest], prompts: Sequence[Sequence[int]]
    ) -> None:
        self._gateway = gateway
        self._tenant_id = principal.tenant_id
        self._num_prompt_tokens = {row.request_id: len(prompt) for row, prompt in zip(rows, prompts, strict=True)}
        self._open = [row.request_id for row in rows]
        self.request_ids = tuple(self._open)

    async def results(self) -> list[SampledResult]:
        """All results, in the order of the prompts. Raises what the first failed one failed with, and cancels all when
        it is itself cancelled."""
        tasks = [asyncio.create_task(self._result(request_id)) for request_id in self.request_ids]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await _cancelled(tasks)
            await self.close()

    async def events(self, watch: Watch) -> AsyncGenerator[Event, None]:
        """What happens, until every prompt is done. Raises like `results`."""
        tasks = [
            asyncio.create_task(self._tell(watch, index, request_id))
            for index, request_id in enumerate(self.request_ids)
        ]
        num_done = 0
        try:
            while num_done < len(tasks):
                event = await watch.next_event()
                num_done += isinstance(event, Done)
                yield event
        finally:
            watch.close()
            await _cancelled(tasks)
            await self.close(watch)

    async def close(self, watch: Watch | None = None) -> None:
        """Cancel what is not over; what a watch has shown of it was used. Idempotent."""
        still_open, self._open = self._open, []
        for request_id in still_open:
            num_shown = 0 if watch is None else watch.num_shown(request_id)
            used = SampleUsage(self._num_prompt_tokens[request_id], num_shown) if num_shown else None
            await self._gateway.cancel_sample(request_id, used=used)

    async def _tell(self, watch: Watch, index: int, request_id: RequestId) -> None:
        try:
            watch.ended(index, await self._result(request_id))
        except Exception as error:  # noqa: BLE001 (whoever reads the events raises it again)
            watch.ended(index, error)

    async def _result(self, request_id: RequestId) -> SampledResult:
        gateway = self._gateway
        while True:
            future = await gateway.hub.future(request_id, self._tenant_id, hold_s=gateway.settings.hold_s)
            if future.state is not RequestState.QUEUED:
                break
            if gateway.deps.is_draining():
                raise Draining("the server is stopping; ask again in a moment")
        self._open.remove(request_id)
        if future.failure is not None:
            if future.is_transient:
                raise Overloaded(future.failure.message)
            is_users = future.failure.category is Category.USER
            raise (InvalidRequest if is_users else ServerError)(future.failure.message)
        if future.result is None:
            raise ServerError(f"the result of {request_id} is no longer kept")
        gateway.hub.delivered(request_id)
        return decode_sample_result(future.result.body)


class Watch:
    """Tokens of some samples as they come. Listens from the moment it is made, which is before they are admitted."""

    def __init__(self, gateway: Gateway, request_ids: Sequence[RequestId], *, num_samples: int) -> None:
        self._gateway = gateway
        self._place = {request_id: index for index, request_id in enumerate(request_ids)}
        self._told: list[list[list[int]]] = [[[] for _ in range(num_samples)] for _ in request_ids]
        self._news: asyncio.Queue[SampledPart | tuple[int, SampledResult | Exception]] = asyncio.Queue()
        for request_id in request_ids:
            gateway.deps.live.listen(request_id, self._news.put_nowait)

    def close(self) -> None:
        """Stop listening. Idempotent."""
        for request_id in self._place:
            self._gateway.deps.live.forget(request_id)

    def num_shown(self, request_id: RequestId) -> int:
        """Tokens of a prompt's sequences that were reported so far."""
        return sum(map(len, self._told[self._place[request_id]]))

    def ended(self, prompt_index: int, result: SampledResult | Exception) -> None:
        """A prompt is done, or has failed."""
        self._news.put_nowait((prompt_index, result))

    async def next_event(self) -> Event:
        """What happens next, or StillThere after a while. Raises the failure of a sample."""
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    news = await self._news.get()
            except TimeoutError:
                return StillThere()
            if isinstance(news, SampledPart):
                grown = self._grown(news)
                if grown is not None:
                    return grown
                continue
            index, result = news
            if isinstance(result, Exception):
                raise result
            return Done(index, result, self._rest(index, result))

    def _grown(self, part: SampledPart) -> Grown | None:
        """What is new in a part: nothing of one that was drawn a second time, or whose predecessor is missing."""
        index = self._place[part.request_id]
        told = self._told[index][part.sequence_index]
        num_known = len(told) - part.start
        if not 0 <= num_known < len(part.tokens):
            return None
        tokens, logprobs = part.tokens[num_known:], part.logprobs[num_known:]
        told.extend(tokens)
        sampled = tuple(Sampled(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True))
        return Grown(index, part.sequence_index, sampled)

    def _rest(self, index: int, result: SampledResult) -> tuple[tuple[Sampled, ...], ...]:
        """Of each sequence what is still to be told. Raises ServerError when something else was told before."""
        rests = []
        for told, whole in zip(self._told[index], sampled_of(result), strict=True):
            if [token.token_id for token in whole[: len(told)]] != told:
                raise ServerError("this sample was drawn again with other tokens than those that were sent")
            rests.append(whole[len(told) :])
        return tuple(rests)


def sampled_of(result: SampledResult) -> list[tuple[Sampled, ...]]:
    """The tokens of every sequence, with their logprobs and alternatives."""
    return [
        tuple(
            Sampled(token, logprob, () if sequence.top is None else sequence.top.at(place))
            for place, (token, logprob) in enumerate(
                zip(sequence.tokens.tolist(), sequence.logprobs.tolist(), strict=True)
            )
        )
        for sequence in result.sequences
    ]


async def _cancelled(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Return when these have ended, one way or another."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def admit(
    gateway: Gateway, principal: Principal, weights: Weights, asked: Asked, *, streams: bool
) -> tuple[Samples, Watch | None]:
    """The samples, once their rows are durable, and a watch over them if `streams`.

    Raises QueueFull when too much of the tenant waits, InvalidRequest or NotSupported for what cannot be sampled;
    nothing is admitted then.
    """
    async with gateway.quotas.entering(principal.tenant_id, len(asked.prompts)):
        return await _admitted(gateway, principal, weights, asked, streams=streams)


async def _admitted(
    gateway: Gateway, principal: Principal, weights: Weights, asked: Asked, *, streams: bool
) -> tuple[Samples, Watch | None]:
    session = await sampling_session_of(gateway, principal, weights)
    num_bytes = 8 * sum(map(len, asked.prompts))
    drafted = await gateway.admission.run(
        lambda: [_drafted(gateway, session, weights, asked, prompt, streams) for prompt in asked.prompts],
        num_bytes=num_bytes,
    )
    samples = Samples(gateway, principal, [place for place, _ in drafted], asked.prompts)
    if len(drafted) == 1:
        bind_context(request_id=drafted[0][0].request_id)
    watch = Watch(gateway, samples.request_ids, num_samples=asked.num_samples) if streams else None
    submitting = [asyncio.create_task(gateway.admission.submit_checked(place, draft)) for place, draft in drafted]
    try:
        await asyncio.gather(*submitting)
    except BaseException:
        await _cancelled(submitting)
        if watch is not None:
            watch.close()
        await samples.close()
        raise
    return samples, watch


def _drafted(
    gateway: Gateway,
    session: SamplingSessionRecord,
    weights: Weights,
    asked: Asked,
    prompt: Sequence[int],
    streams: bool,
) -> tuple[NewRequest, Draft]:
    """One prompt's row and its content. Raises InvalidRequest or NotSupported."""
    seq_id = secrets.randbits(_SEQ_ID_BITS)
    op = _op(gateway, session, weights, asked, prompt, seq_id)
    if streams:
        op = replace(op, streams=asked.can_stream)
    place = NewRequest(
        request_id=sample_request_id(session.sampling_session_id, seq_id),
        tenant_id=session.tenant_id,
        pool=session.pool,
        kind=OpKind.SAMPLE,
        seq_id=seq_id,
        num_tokens=0,
        sampling_session_id=session.sampling_session_id,
    )
    limits = pass_limits(gateway, session.tenant_id, weights.facts)
    return place, sample_draft(op, max_context_length=limits.max_context_length)


def _op(
    gateway: Gateway, session: SamplingSessionRecord, weights: Weights, asked: Asked, prompt: Sequence[int], seq_id: int
) -> SampleOp:
    body = SampleBody(
        sampling_session_id=session.sampling_session_id,
        seq_id=seq_id,
        prompt={"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
        num_samples=asked.num_samples,
        sampling_params=SamplingParamsBody(
            max_tokens=asked.max_tokens,
            seed=asked.seed,
            stop=list(asked.stops) or None,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
        ),
        prompt_logprobs=asked.wants_prompt_logprobs,
        topk_prompt_logprobs=asked.num_alternatives if asked.wants_prompt_logprobs else 0,
        topk_sample_logprobs=asked.num_alternatives,
    )
    limits = pass_limits(gateway, session.tenant_id, weights.facts)
    return sample_op(body, blob_key=session.blob_key, limits=limits, draw_seed=gateway.deps.draw_seed)
