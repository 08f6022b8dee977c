"""The cut depends on the request alone, keeps its order, and never exceeds the limit but for one long datum."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from treadle.domain.limits import QUANTUM_TOKENS
from treadle.domain.quanta import cut_quanta, quantum_tokens


@given(st.lists(st.integers(0, 3_000), max_size=60), st.integers(1, 3_000))
def test_quanta_cover_all_datums_in_order_within_the_limit(datum_tokens: list[int], limit: int) -> None:
    quanta = cut_quanta(datum_tokens, limit=limit)
    sizes = quantum_tokens(datum_tokens, quanta)
    assert [index for start, stop in quanta for index in range(start, stop)] == list(range(len(datum_tokens)))
    assert sum(sizes) == sum(datum_tokens)
    for (start, stop), size in zip(quanta, sizes, strict=True):
        assert stop > start
        assert size <= limit or stop == start + 1
    # Greedy: a quantum ends only where the next datum does not fit.
    for (_, stop), size in zip(quanta[:-1], sizes, strict=False):
        assert size + datum_tokens[stop] > limit


@given(st.lists(st.integers(1, 500), min_size=1, max_size=30), st.lists(st.integers(1, 500), max_size=30))
def test_what_follows_does_not_move_the_quanta_before_it(head: list[int], tail: list[int]) -> None:
    assert (
        cut_quanta(head + tail, limit=1_000)[: len(cut_quanta(head, limit=1_000)) - 1]
        == cut_quanta(head, limit=1_000)[:-1]
    )


def test_the_default_limit_is_the_protocols() -> None:
    assert cut_quanta([QUANTUM_TOKENS, 1, QUANTUM_TOKENS + 1, 1, 1]) == ((0, 1), (1, 2), (2, 3), (3, 5))
