"""Quotas in words: what each one counts, which values it may have, and what a tenant is told at one.

It refuses to know who has which limit. Invariant: a message at a quota names the quota, the limit, what is used, and
that an operator can raise it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from treadle.domain.policy import Quota

# JSON readers that have doubles only take integers up to here exactly.
MAX_QUOTA: Final = 2**53 - 1


@dataclass(frozen=True, slots=True)
class QuotaFacts:
    """One quota. lowest: the least value that can be set; 0 forbids the thing altogether."""

    unit: str
    lowest: int
    meaning: str


QUOTAS: Final[Mapping[Quota, QuotaFacts]] = {
    Quota.RANK: QuotaFacts("rank", 1, "largest LoRA rank of a new run"),
    Quota.CONTEXT: QuotaFacts("tokens", 1, "longest sequence: of a datum, or of a prompt with what is drawn behind it"),
    Quota.MODELS: QuotaFacts("models", 0, "runs that are created or ready, in sessions whose client is there"),
    Quota.QUEUED_TOKENS: QuotaFacts("tokens", 1, "tokens that wait, samples and training apart"),
    Quota.QUEUED_BYTES: QuotaFacts("bytes", 1, "bytes of requests that wait, samples and training apart"),
    Quota.TRAINED_PER_MINUTE: QuotaFacts("tokens per minute", 1, "tokens of passes, forward-only ones included"),
    Quota.TRAINED_PER_DAY: QuotaFacts("tokens per day", 1, "the same per day of UTC"),
    Quota.SAMPLED_PER_MINUTE: QuotaFacts("tokens per minute", 1, "tokens that were drawn, prompts not counted"),
    Quota.SAMPLED_PER_DAY: QuotaFacts("tokens per day", 1, "the same per day of UTC"),
    Quota.CHECKPOINTS: QuotaFacts("checkpoints", 0, "named checkpoints that are kept, of all kinds, copies included"),
    Quota.CHECKPOINT_BYTES: QuotaFacts("bytes", 0, "their bytes"),
    Quota.SAMPLES: QuotaFacts("samples", 1, "sample requests that wait or run"),
}
assert QUOTAS.keys() == set(Quota)


def at_limit(quota: Quota, what: str, *, advice: str = "") -> str:
    """The message of a refusal. what: the use and the limit in words, advice: what the tenant itself can do."""
    return f"quota {quota}: {what}; {advice + ', or ' if advice else ''}ask an operator to raise it"
