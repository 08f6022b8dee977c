"""The braille chart: pure, so every property is checked on its text."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from treadle.cli.chart import line_chart

FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=32)


def rows_of(lines: list[str]) -> list[int]:
    """The dot row, counted from the top, of the highest dot in every dot column."""
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    cells = [[ord(c) - 0x2800 for c in line if 0x2800 <= ord(c) <= 0x28FF] for line in lines]
    tops = []
    for column in range(len(cells[0]) * 2):
        rows = [
            4 * y + dot for y, row in enumerate(cells) for dot in range(4) if row[column // 2] & bits[dot][column % 2]
        ]
        tops += rows[:1]
    return tops


@given(st.lists(FLOATS, max_size=400), st.integers(16, 100), st.integers(2, 20))
def test_a_chart_fits_its_box(values: list[float], width: int, height: int) -> None:
    lines = line_chart(values, width=width, height=height)
    if any(math.isfinite(value) for value in values):
        assert len(lines) == height
        assert max(map(len, lines)) <= width
    else:
        assert lines == []


def test_a_falling_loss_falls_in_the_chart() -> None:
    lines = line_chart([8.0 * 0.9**step for step in range(60)])
    rows = rows_of(lines)
    assert rows == sorted(rows)
    assert rows[0] == 0
    assert rows[-1] == 4 * len(lines) - 1
    assert lines[0].split()[0] == "8"


def test_one_value_and_a_flat_line_are_drawn() -> None:
    assert len(set(rows_of(line_chart([3.0])))) == 1
    assert len(set(rows_of(line_chart([3.0] * 20)))) == 1


def test_a_long_run_is_drawn_whole() -> None:
    rows = rows_of(line_chart([float(-step) for step in range(10_000)], width=40))
    assert rows == sorted(rows)
    assert (rows[0], rows[-1]) == (0, 47)
