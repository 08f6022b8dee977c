"""A sample request while it is being worked on, and each of its sequences.

Mutable bookkeeping without any tensor maths; the built-in sampler is its only user. It refuses what cannot be
sampled, in words for the client. Invariant: a job restarted from nothing samples the same tokens again.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from treadle.domain.limits import MAX_NUM_SAMPLES, MAX_TOPK_LOGPROBS
from treadle.domain.ops import SampleOp, TargetTokens
from treadle.domain.outcome import (
    Failure,
    SampledPart,
    SampledSequence,
    SampleOutcome,
    TopkLogprobs,
)
from treadle.domain.stability import recorded
from treadle.domain.states import Category, StopReason
from treadle.errors import InvalidRequest, TreadleError
from treadle.sampler.base import SampleRequest
from treadle.sampler.cache import Bucket, PromptCache
from treadle.sampler.draw import UniformStream
from treadle.sampler.prefixes import BLOCK_TOKENS, BlockKey
from treadle.sampler.prompt import PromptScores
from treadle.sampler.stops import StopRule, StopWatch

# The k most likely tokens of one position, best first: ids int32 [k], logprobs float32 [k].
TopRow: TypeAlias = tuple[NDArray[np.int32], NDArray[np.float32]]


class SampledTokens:
    """One sequence: what it has sampled, and where its keys and values lie while it runs."""

    __slots__ = (
        "bucket",
        "index",
        "job",
        "logprobs",
        "num_told",
        "reason",
        "row",
        "tokens",
        "top",
        "uniforms",
        "watch",
    )

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self.index = index
        # Tokens that whoever watches has been told of; a restart draws the same ones again.
        self.num_told = 0
        self.restart()

    def restart(self) -> None:
        """Forget everything sampled; the same will be sampled again."""
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[TopRow] = []
        self.uniforms = UniformStream(self.job.op.params.seed, self.index)
        self.watch: StopWatch = self.job.stop_rule.start()
        self.reason: StopReason | None = None
        self.bucket: Bucket[SampledTokens] | None = None
        self.row = -1

    def push(self, token: int, logprob: float, top: TopRow | None = None) -> bool:
        """Take the next token, with the most likely ones in its place if they are wanted; whether it is the last."""
        assert self.reason is None, "a finished sequence takes no tokens"
        assert (top is not None) == (self.job.op.topk_sample_logprobs > 0)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if top is not None:
            self.top.append(top)
        self.reason = self.watch.push(token)
        return self.reason is not None

    def news(self) -> SampledPart | None:
        """The tokens that it has got since it was last asked, if any."""
        start, stop = self.num_told, len(self.tokens)
        if start >= stop:
            return None
        self.num_told = stop
        request_id = self.job.request.request_id
        return SampledPart(request_id, self.index, start, tuple(self.tokens[start:]), tuple(self.logprobs[start:]))

    @property
    def num_cached(self) -> int:
        """Places of its cache in use: the prompt and all sampled tokens but the last, which was not yet fed."""
        return len(self.job.op.prompt) + len(self.tokens) - 1

    def result(self) -> SampledSequence:
        assert self.reason is not None
        return SampledSequence(
            tokens=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            stop_reason=self.reason,
            topk_logprobs=_table(self.top) if self.top else None,
        )


class Job:
    """One request. `prompt_cache` is there from the start of its prefill until its last sequence has started.

    unstarted: sequences that wait for a decode slot; before the prefill has ended these are all of them.
    places_wanted: cache that must be free before it starts over, when it had to yield once.
    block_keys: names of the prompt's whole blocks in the cache of prefixes, empty when they have none there.
    num_cached_tokens: of the prompt, served from that cache; each place counts as what it was when first come to.
    """

    def __init__(self, request: SampleRequest, stop_rule: StopRule, block_keys: tuple[BlockKey, ...] = ()) -> None:
        self.request = request
        self.op = request.op
        self.tenant_id = request.tenant_id
        self.adapter = request.adapter
        self.stop_rule = stop_rule
        self.sequences = [SampledTokens(self, index) for index in range(request.op.num_samples)]
        self.unstarted = list(self.sequences)
        self.num_unfinished = len(self.sequences)
        self.prompt_cache: PromptCache | None = None
        self.is_prefilled = False
        self.places_wanted = 0
        self.block_keys = block_keys
        self.num_cached_tokens = 0
        # Places of the prompt that were read or served before, in this attempt or one that had to start over.
        self._num_reached = 0
        self.scores = PromptScores(request.op)

    def restart(self) -> None:
        """Back to an untouched request, but for the sequences that have ended and prompt scores already made."""
        self.unstarted = [sequence for sequence in self.sequences if sequence.reason is None]
        for sequence in self.unstarted:
            sequence.restart()
        self.prompt_cache = None
        self.is_prefilled = False

    @property
    def num_reusable_blocks(self) -> int:
        """Blocks of the prompt that need not be read: nothing is wanted of their rows, nor of the prompt's last one."""
        return min(len(self.block_keys), self.scores.next_row // BLOCK_TOKENS)

    def reached(self, num_places: int, *, from_cache: bool) -> None:
        """The prompt's keys and values are there up to this place; the newest of them were read, or served."""
        if from_cache:
            self.num_cached_tokens += max(0, num_places - self._num_reached)
        self._num_reached = max(self._num_reached, num_places)

    def outcome(self) -> SampleOutcome:
        """The result of a job of which every sequence has ended."""
        assert self.num_unfinished == 0
        sequences = tuple(sequence.result() for sequence in self.sequences)
        return SampleOutcome(
            request_id=self.request.request_id,
            result=self.scores.result(sequences, num_cached_tokens=self.num_cached_tokens),
            num_prompt_tokens=len(self.op.prompt),
            num_sampled_tokens=sum(len(sequence.tokens) for sequence in sequences),
            num_cached_tokens=self.num_cached_tokens,
            recorded=recorded(((s.tokens, s.logprobs) for s in sequences), len(self.op.prompt))
            if self.op.record_stability_info
            else (),
        )


def _table(rows: list[TopRow]) -> TopkLogprobs:
    return TopkLogprobs(
        token_ids=np.stack([token_ids for token_ids, _ in rows]), logprobs=np.stack([logprobs for _, logprobs in rows])
    )


def failed_outcome(request: SampleRequest, error: TreadleError) -> SampleOutcome:
    """The outcome of a request that ends with an error raised on purpose."""
    return SampleOutcome(
        request_id=request.request_id,
        failure=Failure(message=error.message, category=Category(error.category)),
        num_prompt_tokens=len(request.op.prompt),
    )


def check_sample(op: SampleOp, *, vocab_size: int, max_context_length: int) -> None:
    """Raises InvalidRequest, naming value and limit, for what cannot be sampled on this model.

    A prompt may fill the context whole: the one token sampled behind it is never fed back.
    """
    num_tokens = len(op.prompt)
    if not 1 <= num_tokens <= max_context_length:
        raise InvalidRequest(f"the prompt has {num_tokens} tokens; this model takes 1 to {max_context_length}")
    lowest, highest = int(op.prompt.min()), int(op.prompt.max())
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise InvalidRequest(f"prompt token {bad} is outside the vocabulary of {vocab_size}")
    _check_count("num_samples", op.num_samples, 1, MAX_NUM_SAMPLES)
    _check_count("topk_prompt_logprobs", op.topk_prompt_logprobs, 0, min(MAX_TOPK_LOGPROBS, vocab_size))
    _check_count("topk_sample_logprobs", op.topk_sample_logprobs, 0, min(MAX_TOPK_LOGPROBS, vocab_size))
    _check_count("prompt_alt_tokens_k", op.prompt_alt_tokens_k, 0, MAX_TOPK_LOGPROBS)
    if op.prompt_logprobs_last_n is not None:
        _check_count("prompt_logprobs_last_n", op.prompt_logprobs_last_n, 1, num_tokens - 1)
    if op.target_prompt_logprobs is not None:
        _check_targets(op.target_prompt_logprobs, num_rows=num_tokens - 1, vocab_size=vocab_size)
    params = op.params
    if params.max_tokens is not None and params.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {params.max_tokens}; it must be at least 1")
    if not (math.isfinite(params.temperature) and params.temperature >= 0.0):
        raise InvalidRequest(f"temperature is {params.temperature}; it must be finite and at least 0")
    if params.top_k != -1 and params.top_k < 1:
        raise InvalidRequest(f"top_k is {params.top_k}; it must be at least 1, or -1 for off")
    if not 0.0 < params.top_p <= 1.0:
        raise InvalidRequest(f"top_p is {params.top_p}; it must be over 0 and at most 1")


def num_free_places(op: SampleOp, max_context_length: int) -> int:
    """Tokens that fit behind the prompt; at least the one that is never fed back."""
    return max(1, max_context_length - len(op.prompt))


def _check_targets(targets: TargetTokens, *, num_rows: int, vocab_size: int) -> None:
    if len(targets.starts) != num_rows + 1:
        raise InvalidRequest(f"target_prompt_logprobs has {len(targets.starts) - 1} rows; due are {num_rows}")
    lowest, highest = int(targets.token_ids.min(initial=0)), int(targets.token_ids.max(initial=0))
    if lowest < -1 or highest >= vocab_size:
        bad = lowest if lowest < -1 else highest
        raise InvalidRequest(f"target_prompt_logprobs has token {bad}, outside the vocabulary of {vocab_size}")


def _check_count(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; allowed: {low} to {high}")
