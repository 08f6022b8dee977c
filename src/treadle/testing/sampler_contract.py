"""What every sampler does with a sample request, whatever engine draws the tokens: checks to run against a started one.

Each check is an async function of a `SamplerDriver` and raises AssertionError when the sampler breaks the rule. Checks
use versions of their own, so they may share one sampler and come in any order:

    async with started(make_executor(), subject) as driver:
        for check in CHECKS:
            await check(driver)

They speak with the executor, in payloads and encoded results, because a sampler may live in another environment. They
need a model with a tokenizer, and a reference that gives the true log-probabilities of any tokens under any version.
A sampler may hand a request over (needs_builtin) only in the checks that say so, and then it answers nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from treadle.domain.ids import BlobKey, RequestId, SamplingSessionId, TenantId
from treadle.domain.ops import SampleOp, SamplingParams, TargetTokens
from treadle.domain.outcome import PoolFacts, SampledPart, SampleOutcome
from treadle.domain.plan import SampleWork
from treadle.domain.states import Category, StopReason
from treadle.executor.base import SamplingExecutor
from treadle.sampler.tokenizer import TokenBytes
from treadle.wire.payloads import encode_payload
from treadle.wire.sampled import SampledResult, decode_sample_result
from treadle.wire.sampled import Sequence as Sampled

Floats = NDArray[np.float32]

# What float32 on two engines may differ by.
TOLERANCE = 1e-4
_TIMEOUT_S = 100.0
# A prompt whose greedy continuation by the bundled model is long and varied enough for stops in its middle.
_PROMPT = (56, 276, 620)


class Subject(Protocol):
    """What checks need beside the sampler: versions in its blob store, and the truth about them."""

    eos_ids: frozenset[int]
    token_bytes: TokenBytes
    # A prompt whose greedy continuation by the base model ends with an end-of-sequence id.
    ending_prompt: Sequence[int]

    def new_version(self, *, seed: int, rank: int = 8, is_finite: bool = True, scale: float = 1.0) -> BlobKey:
        """A version with weights drawn from `seed` that change the model clearly, stored under a fresh key.

        scale: of what they add to the model.
        """
        ...

    def damaged_version(self) -> BlobKey:
        """The same, in which a bit is wrong."""
        ...

    def foreign_version(self) -> BlobKey:
        """A version of another base model."""
        ...

    def logprobs(self, key: BlobKey | None, tokens: Sequence[int]) -> Floats:
        """log p(. | tokens[: i + 1]) for each i, float32 [T, V], by an implementation that is not ours."""
        ...


@dataclass(slots=True)
class SamplerDriver:
    """A started executor and what came back from it. hands_over: it may return needs_builtin."""

    executor: SamplingExecutor
    subject: Subject
    facts: PoolFacts
    hands_over: bool
    # Versions that it holds in memory at once.
    num_places: int
    outcomes: dict[RequestId, asyncio.Future[SampleOutcome]] = field(default_factory=dict)
    parts: list[SampledPart] = field(default_factory=list)
    ids: count[int] = field(default_factory=count)

    def submit(self, *ops: SampleOp, tenant: str = "acme") -> list[RequestId]:
        """Hand requests over, together."""
        works = []
        for op in ops:
            request_id = RequestId(f"contract-{next(self.ids)}")
            self.outcomes[request_id] = asyncio.get_running_loop().create_future()
            works.append(SampleWork(request_id, TenantId(tenant), encode_payload(op)))
        self.executor.submit_samples(works)
        return [work.request_id for work in works]

    def on_samples(self, outcomes: Sequence[SampleOutcome]) -> None:
        """The executor's callback: an id ends once, and only what was asked ends."""
        for outcome in outcomes:
            self.outcomes[outcome.request_id].set_result(outcome)

    async def outcome(self, request_id: RequestId) -> SampleOutcome:
        """How a request ended."""
        async with asyncio.timeout(_TIMEOUT_S):
            return await self.outcomes[request_id]

    async def run(self, *ops: SampleOp, tenant: str = "acme") -> list[SampleOutcome]:
        """Submit requests together; their outcomes, in this order."""
        return [await self.outcome(request_id) for request_id in self.submit(*ops, tenant=tenant)]

    async def results(self, *ops: SampleOp, tenant: str = "acme") -> list[SampledResult]:
        """The same for requests that end well."""
        return [result_of(outcome) for outcome in await self.run(*ops, tenant=tenant)]

    async def sequence(self, op: SampleOp) -> Sampled:
        """The one sequence of one request."""
        (result,) = await self.results(op)
        (sequence,) = result.sequences
        return sequence


@asynccontextmanager
async def started(
    make: Callable[[Callable[[Sequence[SampledPart]], None]], SamplingExecutor],
    subject: Subject,
    *,
    hands_over: bool,
    num_places: int,
) -> AsyncIterator[SamplerDriver]:
    """A driver of a started executor, which is stopped in the end. make: from the callback for parts."""
    parts: list[SampledPart] = []
    deaths: list[str] = []
    executor = make(parts.extend)
    driver: SamplerDriver | None = None

    def on_samples(outcomes: Sequence[SampleOutcome]) -> None:
        assert driver is not None
        driver.on_samples(outcomes)

    try:
        facts = await executor.start(on_samples=on_samples, on_death=deaths.append)
        driver = SamplerDriver(executor, subject, facts, hands_over, num_places, parts=parts)
        yield driver
        assert not deaths, deaths
    finally:
        await executor.stop()


def ask(
    prompt: Sequence[int] = _PROMPT, *, key: BlobKey | None = None, num_samples: int = 1, **settings: Any
) -> SampleOp:
    """A request; settings: fields of its params, or else of the op. Greedy, eight tokens, deaf to EOS unless said."""
    of_params = {name: settings.pop(name) for name in list(settings) if name in SamplingParams.__dataclass_fields__}
    params = {"seed": 1, "temperature": 0.0, "max_tokens": 8, "use_eos": False, **of_params}
    return SampleOp(
        sampling_session_id=SamplingSessionId("session"),
        seq_id=1,
        prompt=np.array(prompt, dtype=np.int32),
        num_samples=num_samples,
        params=SamplingParams(**params),
        blob_key=key,
        **settings,
    )


def result_of(outcome: SampleOutcome) -> SampledResult:
    """The numbers of a request that ended well."""
    assert outcome.failure is None, outcome.failure
    assert not outcome.needs_builtin
    assert outcome.encoded is not None
    return decode_sample_result(outcome.encoded.body)


def assert_failed_alone(outcome: SampleOutcome, *, says: str = "") -> None:
    """It ended with its client's fault, in words, and with nothing else."""
    assert outcome.encoded is None
    assert not outcome.needs_builtin
    assert outcome.failure is not None
    assert outcome.failure.category is Category.USER, outcome.failure
    assert says in outcome.failure.message, outcome.failure.message


def assert_true(driver: SamplerDriver, key: BlobKey | None, prompt: Sequence[int], sequence: Sampled) -> None:
    """Its log-probabilities are those of the model with that version, at temperature 1 and untruncated."""
    tokens = sequence.tokens.tolist()
    rows = driver.subject.logprobs(key, [*prompt, *tokens])[len(prompt) - 1 : -1]
    expected = rows[np.arange(len(tokens)), tokens]
    np.testing.assert_allclose(sequence.logprobs, expected, atol=TOLERANCE, rtol=0)


def assert_greedy(driver: SamplerDriver, key: BlobKey | None, prompt: Sequence[int], sequence: Sampled) -> None:
    """Each token is the likeliest one, as far as float32 tells."""
    tokens = sequence.tokens.tolist()
    rows = driver.subject.logprobs(key, [*prompt, *tokens])[len(prompt) - 1 : -1]
    chosen = rows[np.arange(len(tokens)), tokens]
    assert (rows.max(axis=1) - chosen <= TOLERANCE).all()
    assert_true(driver, key, prompt, sequence)


# Numbers.


async def base_logprobs_are_true(driver: SamplerDriver) -> None:
    sequence = await driver.sequence(ask(temperature=1.0, max_tokens=24))
    assert len(sequence.tokens) == 24
    assert_true(driver, None, _PROMPT, sequence)


async def adapter_logprobs_are_true_at_every_rank(driver: SamplerDriver) -> None:
    for rank in (8, 16, 32):
        key = driver.subject.new_version(seed=rank, rank=rank)
        sequence = await driver.sequence(ask(key=key, temperature=1.0, max_tokens=12))
        assert_true(driver, key, _PROMPT, sequence)
        base = driver.subject.logprobs(None, [*_PROMPT, *sequence.tokens.tolist()])
        own = driver.subject.logprobs(key, [*_PROMPT, *sequence.tokens.tolist()])
        assert np.abs(base - own).max() > 0.1, "the version does not change the model enough to tell"


async def temperature_and_truncation_leave_logprobs_alone(driver: SamplerDriver) -> None:
    draws: tuple[dict[str, Any], ...] = (
        {"temperature": 1.7},
        {"temperature": 0.3},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.7},
    )
    for settings in draws:
        assert_true(driver, None, _PROMPT, await driver.sequence(ask(max_tokens=12, **settings)))


async def greedy_takes_the_likeliest(driver: SamplerDriver) -> None:
    key = driver.subject.new_version(seed=101)
    for one in (None, key):
        assert_greedy(driver, one, _PROMPT, await driver.sequence(ask(key=one, max_tokens=16)))


async def top_tokens_are_the_models(driver: SamplerDriver) -> None:
    key = driver.subject.new_version(seed=102)
    sequence = await driver.sequence(ask(key=key, temperature=1.0, top_k=2, topk_sample_logprobs=5))
    rows = driver.subject.logprobs(key, [*_PROMPT, *sequence.tokens.tolist()])[len(_PROMPT) - 1 : -1]
    assert sequence.top is not None
    assert sequence.top.token_ids.shape == (8, 5)
    np.testing.assert_allclose(sequence.top.logprobs, np.sort(rows)[:, :-6:-1], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(
        np.take_along_axis(rows, sequence.top.token_ids.astype(np.int64), axis=1),
        sequence.top.logprobs,
        atol=TOLERANCE,
        rtol=0,
    )


async def truncation_cuts_what_it_says(driver: SamplerDriver) -> None:
    (result,) = await driver.results(ask(num_samples=16, temperature=1.5, top_k=3, max_tokens=6))
    for sequence in result.sequences:
        rows = driver.subject.logprobs(None, [*_PROMPT, *sequence.tokens.tolist()])[len(_PROMPT) - 1 : -1]
        third = np.sort(rows)[:, -3]
        assert (rows[np.arange(6), sequence.tokens] >= third - TOLERANCE).all()
    narrow: tuple[dict[str, Any], ...] = ({"top_k": 1}, {"top_p": 1e-6})
    for settings in narrow:
        assert_greedy(driver, None, _PROMPT, await driver.sequence(ask(temperature=1.0, **settings)))


# Versions.


async def many_versions_in_one_batch_do_not_bleed(driver: SamplerDriver) -> None:
    """More than there are places, and the base model, all at once and twice over."""
    keys = [driver.subject.new_version(seed=200 + i, rank=(8, 16, 32)[i % 3]) for i in range(driver.num_places + 2)]
    asked: list[BlobKey | None] = [None, *keys, None, *keys]
    prompts = [tuple(range(20 + i, 40 + i)) for i in range(len(asked))]
    results = await driver.results(*(ask(prompt, key=key) for prompt, key in zip(prompts, asked, strict=True)))
    for key, prompt, result in zip(asked, prompts, results, strict=True):
        assert_greedy(driver, key, prompt, result.sequences[0])


async def base_never_gets_an_adapter(driver: SamplerDriver) -> None:
    """Its requests join a batch in which every place is taken."""
    keys = [driver.subject.new_version(seed=300 + i) for i in range(driver.num_places)]
    long = driver.submit(*(ask(key=key, max_tokens=96, temperature=1.0) for key in keys))
    for _ in range(3):
        assert_greedy(driver, None, _PROMPT, await driver.sequence(ask(max_tokens=12)))
    for key, request_id in zip(keys, long, strict=True):
        assert_true(driver, key, _PROMPT, result_of(await driver.outcome(request_id)).sequences[0])


async def a_version_is_never_served_stale(driver: SamplerDriver) -> None:
    """The same prompt under one version after the other, some of which had to leave in between."""
    prompt = tuple(range(10, 10 + 150))
    keys = [driver.subject.new_version(seed=400 + i) for i in range(driver.num_places + 1)]
    for key in (*keys, None, *keys):
        assert_greedy(driver, key, prompt, await driver.sequence(ask(prompt, key=key)))


async def weights_that_cannot_be_had_fail_alone(driver: SamplerDriver) -> None:
    subject = driver.subject
    good = subject.new_version(seed=500)
    bad = [BlobKey("contract/none/such"), subject.damaged_version(), subject.foreign_version()]
    outcomes = await driver.run(*(ask(key=key) for key in (*bad, good, None)))
    for outcome in outcomes[:3]:
        assert outcome.encoded is None
        assert outcome.failure is not None
    for key, outcome in zip((good, None), outcomes[3:], strict=True):
        assert_greedy(driver, key, _PROMPT, result_of(outcome).sequences[0])


async def weights_that_are_no_numbers_fail_alone(driver: SamplerDriver) -> None:
    key = driver.subject.new_version(seed=501, is_finite=False)
    good = driver.subject.new_version(seed=502)
    for temperature in (0.0, 1.0):
        outcomes = await driver.run(ask(key=key, temperature=temperature), ask(key=good), ask())
        assert_failed_alone(outcomes[0], says="not finite")
        for one, outcome in zip((good, None), outcomes[1:], strict=True):
            assert_greedy(driver, one, _PROMPT, result_of(outcome).sequences[0])


async def weights_that_overflow_spoil_no_other(driver: SamplerDriver) -> None:
    """Neither its neighbours nor those that come after it, wherever their keys and values lie."""
    good = driver.subject.new_version(seed=510)
    for seed in (511, 512):
        huge = driver.subject.new_version(seed=seed, scale=1e24)
        doomed, *others = await driver.run(ask(key=huge, max_tokens=32), ask(key=good), ask())
        assert doomed.encoded is None
        if not doomed.needs_builtin:
            assert_failed_alone(doomed, says="not finite")
        for first in range(10, 20):
            prompt = tuple(range(first, first + 20))
            others += await driver.run(ask(prompt, key=good, max_tokens=4), ask(prompt, max_tokens=4))
            for key, outcome in zip((good, None), others[-2:], strict=True):
                if not (driver.hands_over and outcome.needs_builtin):
                    assert_greedy(driver, key, prompt, result_of(outcome).sequences[0])


# Draws.


async def a_seed_decides_the_draws(driver: SamplerDriver) -> None:
    one = ask(num_samples=6, temperature=1.0, seed=7, max_tokens=12)
    other = replace(one, params=replace(one.params, seed=8))
    first, second, third = [_texts(result) for result in await driver.results(one, one, other)]
    (again,) = [_texts(result) for result in await driver.results(one)]
    assert first == second == again
    assert len(set(first)) == 6, "the sequences of one request are different draws"
    assert not set(first) & set(third), "requests with neighbouring seeds share no sequence"


async def any_seed_will_do(driver: SamplerDriver) -> None:
    for seed in (0, -1, 2**63, 2**64 - 1, -(2**63)):
        op = ask(temperature=1.0, seed=seed)
        first, second = await driver.results(op, op)
        assert _texts(first) == _texts(second)


def _texts(result: SampledResult) -> list[tuple[int, ...]]:
    return [tuple(sequence.tokens.tolist()) for sequence in result.sequences]


# Ends.


async def max_tokens_ends_with_length(driver: SamplerDriver) -> None:
    for max_tokens in (1, 5):
        sequence = await driver.sequence(ask(max_tokens=max_tokens))
        assert len(sequence.tokens) == len(sequence.logprobs) == max_tokens
        assert sequence.stop_reason is StopReason.LENGTH


async def the_context_ends_with_length(driver: SamplerDriver) -> None:
    context_length = driver.facts.max_context_length
    prompt = [10 + i % 200 for i in range(context_length - 5)]
    for max_tokens in (None, 100, 5):
        sequence = await driver.sequence(ask(prompt, max_tokens=max_tokens))
        assert len(sequence.tokens) == 5
        assert sequence.stop_reason is StopReason.LENGTH
    await _served_or_handed_over(driver, ask([10] * context_length), num_tokens=1)
    (outcome,) = await driver.run(ask([10] * (context_length + 1)))
    assert_failed_alone(outcome, says=f"{context_length + 1} tokens")


async def a_stop_token_is_kept(driver: SamplerDriver) -> None:
    plain = (await driver.sequence(ask(max_tokens=12))).tokens.tolist()
    stop = plain[5]
    first = plain.index(stop)
    sequence = await driver.sequence(ask(max_tokens=12, stop_token_ids=(stop, 1_000)))
    assert sequence.tokens.tolist() == plain[: first + 1]
    assert sequence.stop_reason is StopReason.STOP
    at_the_end = await driver.sequence(ask(max_tokens=first + 1, stop_token_ids=(stop,)))
    assert at_the_end.stop_reason is StopReason.STOP


async def a_stop_string_is_found_across_tokens(driver: SamplerDriver) -> None:
    """The token that completes it is the last one, wherever in the token it ends."""
    plain = (await driver.sequence(ask(max_tokens=12))).tokens.tolist()
    pieces = [driver.subject.token_bytes.token_bytes(token) for token in plain]
    for start in range(3, 8):
        stop = (pieces[start][-1:] + pieces[start + 1][:1]).decode(errors="ignore")
        if not stop:
            continue
        texts = [b"".join(pieces[: i + 1]) for i in range(len(pieces))]
        last = next(i for i, text in enumerate(texts) if stop.encode() in text)
        sequence = await driver.sequence(ask(max_tokens=12, stop_strings=("never in there", stop)))
        assert sequence.tokens.tolist() == plain[: last + 1], stop
        assert sequence.stop_reason is StopReason.STOP
        assert len(sequence.logprobs) == last + 1


async def many_stop_strings_are_no_burden(driver: SamplerDriver) -> None:
    """More than admission lets through: whoever asks gets an answer, and so do the neighbours."""
    stops = tuple(f"stop {i} of many" for i in range(10_000))
    with_stops, without = await driver.results(ask(stop_strings=stops), ask())
    assert _texts(with_stops) == _texts(without)


async def end_of_sequence_ends_unless_stops_are_off(driver: SamplerDriver) -> None:
    prompt = driver.subject.ending_prompt
    ended = await driver.sequence(ask(prompt, max_tokens=64, use_eos=True))
    assert ended.stop_reason is StopReason.STOP
    assert ended.tokens[-1] in driver.subject.eos_ids
    assert not set(ended.tokens[:-1].tolist()) & driver.subject.eos_ids
    # Explicit stops do not take the end of the sequence away; an empty list does.
    same = await driver.sequence(ask(prompt, max_tokens=64, use_eos=True, stop_strings=("never in there",)))
    assert same.tokens.tolist() == ended.tokens.tolist()
    deaf = await driver.sequence(ask(prompt, max_tokens=len(ended.tokens) + 4, use_eos=False))
    assert len(deaf.tokens) == len(ended.tokens) + 4
    assert deaf.tokens[: len(ended.tokens)].tolist() == ended.tokens.tolist()


# Requests.


async def bad_requests_fail_alone(driver: SamplerDriver) -> None:
    vocab_size = driver.facts.vocab_size
    bad = {
        "0 tokens": ask(()),
        f"token {vocab_size}": ask((1, vocab_size)),
        "token -1": ask((-1, 1)),
        "max_tokens is 0": ask(max_tokens=0),
        "temperature is -1": ask(temperature=-1.0),
        "top_k is 0": ask(top_k=0),
        "top_p is 0": ask(top_p=0.0),
        "top_p is 1.5": ask(top_p=1.5),
        "stop string is empty": ask(stop_strings=("",)),
        "num_samples is 0": ask(num_samples=0),
        "topk_sample_logprobs is 129": ask(topk_sample_logprobs=129),
    }
    *outcomes, good = await driver.run(*bad.values(), ask())
    for says, outcome in zip(bad, outcomes, strict=True):
        assert_failed_alone(outcome, says=says)
    assert_greedy(driver, None, _PROMPT, result_of(good).sequences[0])


async def a_top_k_beyond_the_vocabulary_is_off(driver: SamplerDriver) -> None:
    huge = ask(temperature=1.0, top_k=2**40)
    off = ask(temperature=1.0)
    first, second = await driver.results(huge, off)
    assert _texts(first) == _texts(second)


async def a_temperature_that_is_odd_is_not_another_one(driver: SamplerDriver) -> None:
    """Near zero it is all but greedy; far up it is all but uniform. No sampler may take another in its place."""
    await _served_or_handed_over(driver, ask(temperature=1e-4), num_tokens=8)
    await _served_or_handed_over(driver, ask(temperature=50.0), num_tokens=8)


async def what_is_asked_about_the_prompt_is_answered(driver: SamplerDriver) -> None:
    """Several at once, in a batch with versions that change the output layer."""
    keys = [driver.subject.new_version(seed=600 + i) for i in range(2)]
    running = driver.submit(*(ask(key=key, max_tokens=48) for key in keys))
    wishes: list[dict[str, Any]] = [
        {"wants_prompt_logprobs": True},
        {"wants_prompt_logprobs": True, "topk_prompt_logprobs": 3},
        {"prompt_alt_tokens_k": 2},
        {"target_prompt_logprobs": TargetTokens(np.full(len(_PROMPT) - 1, 5, dtype=np.int32), 1)},
        {"wants_prompt_logprobs": True, "prompt_logprobs_last_n": 2},
    ]
    asked = [(key, wish) for wish in wishes for key in (None, *keys)]
    outcomes = await driver.run(*(ask(key=key, max_tokens=2, **wish) for key, wish in asked))
    for (key, wish), outcome in zip(asked, outcomes, strict=True):
        if driver.hands_over:
            assert outcome.needs_builtin
        elif wish == wishes[0]:
            expected = driver.subject.logprobs(key, _PROMPT)[np.arange(len(_PROMPT) - 1), _PROMPT[1:]]
            actual = result_of(outcome).prompt_logprobs
            assert actual is not None
            np.testing.assert_allclose(actual[1:], expected, atol=TOLERANCE, rtol=0)
        else:
            result_of(outcome)
    for key, request_id in zip(keys, running, strict=True):
        assert_greedy(driver, key, _PROMPT, result_of(await driver.outcome(request_id)).sequences[0])


async def a_rank_without_room_is_not_cut(driver: SamplerDriver) -> None:
    key = driver.subject.new_version(seed=610, rank=48)
    (outcome,) = await driver.run(ask(key=key))
    if driver.hands_over:
        assert outcome.needs_builtin
        assert outcome.failure is None
    else:
        assert_greedy(driver, key, _PROMPT, result_of(outcome).sequences[0])


async def what_is_cancelled_does_not_end(driver: SamplerDriver) -> None:
    key = driver.subject.new_version(seed=700)
    doomed = driver.submit(
        ask(num_samples=200, max_tokens=1_000, temperature=1.0),
        ask(key=key, max_tokens=1_000, temperature=1.0),
        ask(key=driver.subject.new_version(seed=701), num_samples=4, max_tokens=1_000),
    )
    kept = driver.submit(ask(key=key, max_tokens=4), tenant="other")
    driver.executor.cancel_samples([doomed[0], RequestId("unknown")])
    result_of(await driver.outcome(kept[0]))
    driver.executor.cancel_samples(doomed)
    driver.executor.cancel_samples(doomed)
    # What was cancelled gives its slots and places back: as many as there are can be had.
    keys = [driver.subject.new_version(seed=710 + i) for i in range(driver.num_places)]
    for key, result in zip(keys, await driver.results(*(ask(key=key) for key in keys)), strict=True):
        assert_greedy(driver, key, _PROMPT, result.sequences[0])
    assert not any(driver.outcomes[request_id].done() for request_id in doomed)


async def nobody_holds_all_slots(driver: SamplerDriver) -> None:
    """A newcomer is served while another tenant's thousand sequences are on their way."""
    many = driver.submit(ask(num_samples=1_000, max_tokens=32, temperature=1.0), tenant="greedy")
    (outcome,) = await driver.run(ask(max_tokens=4), tenant="new")
    result_of(outcome)
    assert not driver.outcomes[many[0]].done()
    driver.executor.cancel_samples(many)


async def watched_samples_grow(driver: SamplerDriver) -> None:
    op = ask(num_samples=2, temperature=1.0, max_tokens=48, streams=True)
    (request_id,) = driver.submit(op)
    (result,) = [result_of(await driver.outcome(request_id))]
    grown: dict[int, list[int]] = {0: [], 1: []}
    for part in driver.parts:
        if part.request_id == request_id:
            assert part.start == len(grown[part.sequence_index])
            assert len(part.tokens) == len(part.logprobs)
            grown[part.sequence_index].extend(part.tokens)
    for index, sequence in enumerate(result.sequences):
        assert grown[index], "nothing was told"
        assert sequence.tokens[: len(grown[index])].tolist() == grown[index]


async def what_is_recorded_is_what_was_sampled(driver: SamplerDriver) -> None:
    (outcome,) = await driver.run(ask(num_samples=3, temperature=1.0, record_stability_info=True))
    result = result_of(outcome)
    assert len(outcome.recorded) == 3
    for record, sequence in zip(outcome.recorded, result.sequences, strict=True):
        assert record.token_ids().tolist() == sequence.tokens.tolist()
        assert record.sampling_logprobs().tobytes() == sequence.logprobs.tobytes()
        assert record.num_prompt_tokens == len(_PROMPT)
    assert (outcome.num_prompt_tokens, outcome.num_sampled_tokens) == (len(_PROMPT), 24)


async def a_prompt_is_read_once_per_tenant_and_version(driver: SamplerDriver) -> None:
    prompt = [10 + (7 * i) % 300 for i in range(300)]
    key = driver.subject.new_version(seed=800)
    (first,) = await driver.run(ask(prompt, key=key), tenant="reader")
    (second,) = await driver.run(ask(prompt, key=key, num_samples=2), tenant="reader")
    (of_other,) = await driver.run(ask(prompt, key=key), tenant="stranger")
    (of_base,) = await driver.run(ask(prompt), tenant="reader")
    assert first.num_cached_tokens == of_other.num_cached_tokens == of_base.num_cached_tokens == 0
    assert 128 <= second.num_cached_tokens < 300
    assert result_of(second).num_cached_tokens == second.num_cached_tokens
    assert_greedy(driver, key, prompt, result_of(second).sequences[0])


async def _served_or_handed_over(driver: SamplerDriver, op: SampleOp, *, num_tokens: int) -> None:
    (outcome,) = await driver.run(op)
    if outcome.needs_builtin:
        assert driver.hands_over
        assert outcome.failure is None
        assert outcome.encoded is None
        return
    (sequence,) = result_of(outcome).sequences
    assert len(sequence.tokens) == num_tokens


CHECKS: tuple[Callable[[SamplerDriver], Awaitable[None]], ...] = (
    base_logprobs_are_true,
    adapter_logprobs_are_true_at_every_rank,
    temperature_and_truncation_leave_logprobs_alone,
    greedy_takes_the_likeliest,
    top_tokens_are_the_models,
    truncation_cuts_what_it_says,
    many_versions_in_one_batch_do_not_bleed,
    base_never_gets_an_adapter,
    a_version_is_never_served_stale,
    weights_that_cannot_be_had_fail_alone,
    weights_that_are_no_numbers_fail_alone,
    weights_that_overflow_spoil_no_other,
    a_seed_decides_the_draws,
    any_seed_will_do,
    max_tokens_ends_with_length,
    the_context_ends_with_length,
    a_stop_token_is_kept,
    a_stop_string_is_found_across_tokens,
    many_stop_strings_are_no_burden,
    end_of_sequence_ends_unless_stops_are_off,
    bad_requests_fail_alone,
    a_top_k_beyond_the_vocabulary_is_off,
    a_temperature_that_is_odd_is_not_another_one,
    what_is_asked_about_the_prompt_is_answered,
    a_rank_without_room_is_not_cut,
    what_is_cancelled_does_not_end,
    nobody_holds_all_slots,
    watched_samples_grow,
    what_is_recorded_is_what_was_sampled,
    a_prompt_is_read_once_per_tenant_and_version,
)
