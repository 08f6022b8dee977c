"""Packed lengths: a multiple of a few rows, or on devices whose kernels depend on the length, one of a few buckets.

It knows no devices: who sets buckets, and which, is decided elsewhere (strict.py finds out).
Invariant: padding changes what a pass costs, and where a row's bits do not depend on the packed length nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.domain.limits import PACK_MULTIPLE


def bucket_of(num_tokens: int, buckets: Sequence[int]) -> int:
    """The smallest of the ascending `buckets` that holds the tokens; the largest one's multiple beyond them."""
    assert num_tokens > 0
    assert buckets
    fitting = next((bucket for bucket in buckets if bucket >= num_tokens), None)
    return fitting if fitting is not None else round_up(num_tokens, buckets[-1])


def packed_length(num_tokens: int, buckets: Sequence[int]) -> int:
    """Rows of a pack of that many tokens: its bucket, or the next multiple of PACK_MULTIPLE where there are none."""
    return bucket_of(num_tokens, buckets) if buckets else round_up(num_tokens, PACK_MULTIPLE)


def round_up(num_rows: int, unit: int) -> int:
    """The next multiple of the unit."""
    return -(-num_rows // unit) * unit
