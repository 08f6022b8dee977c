"""Quanta: how a request's datums are cut into the units that budget, packing and reduction move.

A quantum is whole datums, in order, up to QUANTUM_TOKENS together; a longer datum stands alone. The cut
depends on the request alone, so a tenant's numbers do not depend on its neighbours or on the load.
"""

from __future__ import annotations

from collections.abc import Sequence

from treadle.domain.limits import QUANTUM_TOKENS


def cut_quanta(datum_tokens: Sequence[int], *, limit: int = QUANTUM_TOKENS) -> tuple[tuple[int, int], ...]:
    """Half-open datum ranges [start, stop), in order and without holes, one per quantum."""
    assert limit > 0
    quanta: list[tuple[int, int]] = []
    start = tokens = 0
    for index, num_tokens in enumerate(datum_tokens):
        if index > start and tokens + num_tokens > limit:
            quanta.append((start, index))
            start, tokens = index, 0
        tokens += num_tokens
    if start < len(datum_tokens):
        quanta.append((start, len(datum_tokens)))
    assert [i for a, b in quanta for i in range(a, b)] == list(range(len(datum_tokens)))
    return tuple(quanta)


def quantum_tokens(datum_tokens: Sequence[int], quanta: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Tokens of each quantum."""
    return tuple(sum(datum_tokens[start:stop]) for start, stop in quanta)
