"""Planned quanta in packs, as a worker runs them: in plan order, up to `packed_tokens` together, a larger one alone.

The worker's own packing (worker/micro_batches.py) retries what breaks and needs torch; this is its undisturbed course,
and a test holds the two together. Invariant: every quantum is in exactly one pack, in order.
"""

from __future__ import annotations

from collections.abc import Iterable


def packs_of(quanta: Iterable[int], *, packed_tokens: int) -> list[int]:
    """Tokens of each pack."""
    packs: list[int] = []
    room = 0
    for tokens in quanta:
        if tokens <= room:
            packs[-1] += tokens
        else:
            packs.append(tokens)
            room = packed_tokens
        room = max(0, room - tokens)
    return packs
