"""From sample requests to vLLM's terms and back, without vLLM: what it is asked, and what it is not asked.

Every field of a SampleOp is either honoured by vLLM with the built-in sampler's meaning, or the whole request is handed
to the built-in sampler. When a sequence ends is decided here, by stops.py, for both samplers alike.
Invariant: a token is part of a sequence when the built-in sampler would have kept it: the one that stops is the last.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from treadle.domain.ids import BlobKey, RequestId, TenantId
from treadle.domain.ops import SampleOp
from treadle.domain.outcome import SampledPart, SampledSequence, SampleOutcome, SampleResult, TopkLogprobs
from treadle.domain.stability import recorded
from treadle.domain.states import StopReason
from treadle.errors import NonFiniteResult
from treadle.sampler.stops import StopRule

# vLLM raises temperatures below the first to it, silently, and refuses those above the second (SamplingParams, 0.32).
LOWEST_TEMPERATURE = 0.01
HIGHEST_TEMPERATURE = 2.0


def why_not(op: SampleOp, rule: StopRule, *, context_length: int) -> str | None:
    """Why this request is not for vLLM, or None when it is. context_length: vLLM's own bound, in tokens.

    Everything about the prompt's log-probabilities goes: for several requests in one batch with adapters on the output
    layer they end vLLM's engine (0.32 on a CPU), and named tokens and draws it does not have at all.
    """
    if op.wants_prompt_logprobs or op.topk_prompt_logprobs or op.target_prompt_logprobs is not None:
        return "log-probabilities of the prompt"
    if op.prompt_alt_tokens_k:
        return "tokens drawn at positions of the prompt"
    temperature = op.params.temperature
    if temperature != 0.0 and not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        return f"temperature {temperature}"
    if len(op.prompt) + rule.max_tokens > context_length:
        return f"{len(op.prompt)} + {rule.max_tokens} tokens"
    return None


def sequence_seed(seed: int, index: int) -> int:
    """The seed of one sequence of a request, in [0, 2**63): those of two requests or sequences have nothing in common.

    vLLM itself counts up from the request's seed, so that requests with neighbouring seeds would share sequences.
    """
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def engine_settings(op: SampleOp, rule: StopRule, index: int, *, vocab_size: int) -> dict[str, Any]:
    """Keywords of vLLM's SamplingParams for one sequence of a request.

    Stop ids hold the end-of-sequence ids as far as the request wants them, so vLLM's own are off. Stop strings are
    matched on the bytes of the tokens here, not on vLLM's text.
    """
    params = op.params
    return {
        "n": 1,
        "temperature": params.temperature,
        "top_k": 0 if params.top_k == -1 else min(params.top_k, vocab_size),
        "top_p": params.top_p,
        "seed": sequence_seed(params.seed, index),
        "max_tokens": rule.max_tokens,
        "stop_token_ids": sorted(rule.token_ids),
        "ignore_eos": True,
        "logprobs": op.topk_sample_logprobs,
        "flat_logprobs": True,
        "detokenize": False,
    }


def cache_salt(tenant_id: TenantId, key: BlobKey | None) -> str:
    """Keys and values are shared within one tenant and one version of the weights only."""
    return f"{tenant_id}/{'' if key is None else key}"


class VllmSequence:
    """One sequence of a request: what it has sampled."""

    __slots__ = ("index", "job", "logprobs", "num_cached_tokens", "num_told", "reason", "tokens", "top", "watch")

    def __init__(self, job: VllmJob, index: int) -> None:
        self.job = job
        self.index = index
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        # Per token the k most likely ones, best first: ids and log-probabilities.
        self.top: list[tuple[Sequence[int], Sequence[float]]] = []
        self.watch = job.rule.start()
        self.reason: StopReason | None = None
        self.num_told = 0
        self.num_cached_tokens = 0

    def push(self, token: int, ids: Sequence[int], logprobs: Sequence[float]) -> bool:
        """Take the next token; whether it is the last.

        ids, logprobs: of this position, the sampled token's first, the k most likely behind it, best first. Raises
        NonFiniteResult when the model's numbers are no numbers.
        """
        assert self.reason is None, "a finished sequence takes no tokens"
        k = self.job.op.topk_sample_logprobs
        assert ids[0] == token, (token, ids)
        assert len(ids) == len(logprobs) == k + 1, (len(ids), k)
        if not math.isfinite(logprobs[0]):
            raise NonFiniteResult("the model's logits are not finite for this sample")
        self.tokens.append(token)
        self.logprobs.append(logprobs[0])
        if k:
            self.top.append((ids[1:], logprobs[1:]))
        self.reason = self.watch.push(token)
        return self.reason is not None

    def news(self) -> SampledPart | None:
        """The tokens that it has got since it was last asked, if any."""
        start = self.num_told
        if start >= len(self.tokens):
            return None
        self.num_told = len(self.tokens)
        return SampledPart(
            self.job.request_id, self.index, start, tuple(self.tokens[start:]), tuple(self.logprobs[start:])
        )

    def result(self) -> SampledSequence:
        """The finished sequence."""
        assert self.reason is not None
        top = None
        if self.top:
            top = TopkLogprobs(
                token_ids=np.array([ids for ids, _ in self.top], dtype=np.int32),
                logprobs=np.array([logprobs for _, logprobs in self.top], dtype=np.float32),
            )
        return SampledSequence(
            tokens=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            stop_reason=self.reason,
            topk_logprobs=top,
        )


class VllmJob:
    """One request. unstarted: sequences that wait for their turn. key: of its weights, None for the base model."""

    def __init__(self, request_id: RequestId, tenant_id: TenantId, op: SampleOp, rule: StopRule) -> None:
        self.request_id = request_id
        self.tenant_id = tenant_id
        self.op = op
        self.rule = rule
        self.sequences = [VllmSequence(self, index) for index in range(op.num_samples)]
        self.unstarted = deque(self.sequences)

    @property
    def key(self) -> BlobKey | None:
        return self.op.blob_key

    @property
    def is_finished(self) -> bool:
        return all(sequence.reason is not None for sequence in self.sequences)

    def outcome(self) -> SampleOutcome:
        """The result of a job of which every sequence has ended."""
        num_prompt_tokens = len(self.op.prompt)
        # Those behind the first find what it read itself; that is no hit on an earlier request.
        num_cached = self.sequences[0].num_cached_tokens
        sequences = tuple(sequence.result() for sequence in self.sequences)
        return SampleOutcome(
            request_id=self.request_id,
            result=SampleResult(sequences=sequences, prompt_cache_hit_tokens=num_cached),
            num_prompt_tokens=num_prompt_tokens,
            num_sampled_tokens=sum(len(sequence.tokens) for sequence in self.sequences),
            num_cached_tokens=num_cached,
            recorded=recorded(((one.tokens, one.logprobs) for one in sequences), num_prompt_tokens)
            if self.op.record_stability_info
            else (),
        )
