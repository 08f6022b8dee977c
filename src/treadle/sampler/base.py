"""The seam between a worker and whatever samples for it.

A sampler is driven, it owns no thread: the worker submits requests and calls `step` whenever it is the sampler's
turn on the device. It knows no payload bytes, no SQL, no HTTP.
Invariant: every submitted request ends in exactly one SampleOutcome, unless it is cancelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from treadle.domain.ids import RequestId, TenantId
from treadle.domain.ops import SampleOp
from treadle.domain.outcome import SampledPart, SampleOutcome
from treadle.engine.adapter import AdapterWeights
from treadle.sampler.prefixes import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One sample with its weights at hand. `adapter` None samples the bare base model.

    The op's blob_key names the adapter: one key, one content, for good. The adapter's memory is read in place until the
    request ends; whoever owns it must not write to it.
    """

    request_id: RequestId
    tenant_id: TenantId
    op: SampleOp
    adapter: AdapterWeights | None = None


@dataclass(frozen=True, slots=True)
class SamplerLimits:
    """What a sampler may hold at once.

    max_running: sequences that decode together; every one is a row of each pass.
    max_cached_tokens: token places of keys and values in use, running sequences and prompts together. One request
    is always let in when nothing else runs, so the bound is exceeded by at most that one; memory grows by doubling
    and shrinks by halving, so up to four times as much is allocated.
    prefill_chunk_tokens: prompt tokens per pass; bounds how long a long prompt delays everybody's next token.
    prefix_share: the part of max_cached_tokens that prompts already read may take beside the running ones, which come
    first; 0 keeps none. Only a CPU keeps any: see prefixes.py.
    max_tenant_share: the part of the decode slots one tenant may hold. It holds for a lone tenant too: nothing
    running is ever thrown out for a newcomer, so slots must be free when one comes.
    """

    max_running: int = 96
    max_cached_tokens: int = 262_144
    prefill_chunk_tokens: int = 512
    max_tenant_share: float = 0.75
    prefix_share: float = 0.25

    def __post_init__(self) -> None:
        assert self.max_running > 0
        assert self.max_cached_tokens > 0
        assert self.prefill_chunk_tokens > 0
        # Blocks are read whole: only the last one of a prompt may be short.
        assert self.prefill_chunk_tokens % BLOCK_TOKENS == 0
        assert 0.0 <= self.prefix_share <= 1.0
        assert 0.0 < self.max_tenant_share <= 1.0


class Sampler(Protocol):
    """Continuous sampling, one bounded piece of work at a time. Owned by one thread."""

    def submit(self, requests: Sequence[SampleRequest]) -> None:
        """Queue requests. Never raises for a bad request: it ends in an outcome with a failure.

        A request id that is already queued or running is ignored.
        """
        ...

    def cancel(self, request_ids: Sequence[RequestId]) -> None:
        """Drop requests without an outcome. Idempotent; unknown ids are ignored."""
        ...

    def step(self, max_seconds: float) -> list[SampleOutcome]:
        """Run passes until something finished, nothing is left, or `max_seconds` are over; what finished.

        At least one pass is run when there is one to run, so time is exceeded by at most one pass.
        """
        ...

    def take_parts(self) -> list[SampledPart]:
        """What the running samples that somebody watches (SampleOp.streams) have got since the last call.

        A part may come again after a sampler was made anew. What a finished sample got last is in its outcome only.
        """
        ...

    @property
    def has_work(self) -> bool:
        """Whether `step` would do or return anything."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests of which no sequence runs yet."""
        ...

    @property
    def num_running(self) -> int:
        """Sequences that decode now."""
        ...
