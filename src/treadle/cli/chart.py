"""A line chart in braille characters: two dots per column and four per row. Pure: numbers in, lines of text out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

# Bit of each dot in a braille cell, by (row from the top, column).
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800


def line_chart(values: Sequence[float], *, width: int = 72, height: int = 12) -> list[str]:
    """`height` lines of at most `width` columns, with the range on the left; [] without a finite value.

    More values than dots are averaged in equal groups, fewer are joined by straight lines: a run fills the width.
    """
    assert width >= 16
    assert height >= 2
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return []
    low, high = min(finite), max(finite)
    labels = [f"{high:.4g}", f"{low:.4g}"]
    margin = max(len(label) for label in labels)
    points = _resampled(finite, (width - margin - 1) * 2)
    cells = _drawn([_row_of(point, low, high, height * 4) for point in points], height)
    edges = {0: labels[0], height - 1: labels[1]}
    return [f"{edges.get(row, ''):>{margin}} {line}" for row, line in enumerate(cells)]


def _resampled(values: Sequence[float], count: int) -> list[float]:
    if len(values) >= count:
        bounds = [index * len(values) // count for index in range(count + 1)]
        return [sum(values[start:stop]) / (stop - start) for start, stop in itertools.pairwise(bounds)]
    points = []
    for index in range(count):
        left, share = divmod(index * (len(values) - 1), count - 1)
        right = min(left + 1, len(values) - 1)
        points.append(values[left] + (values[right] - values[left]) * share / (count - 1))
    return points


def _row_of(value: float, low: float, high: float, num_rows: int) -> int:
    if high == low:
        return num_rows // 2
    return round((high - value) / (high - low) * (num_rows - 1))


def _drawn(rows: Sequence[int], height: int) -> list[str]:
    """The lines, with dots of neighbouring points joined by a vertical stroke."""
    grid = [[_BLANK] * ((len(rows) + 1) // 2) for _ in range(height)]
    previous = rows[0]
    for column, row in enumerate(rows):
        start, stop = sorted((row, previous + (row > previous) - (row < previous)))
        for dot in range(start, stop + 1):
            grid[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
        previous = row
    return ["".join(chr(cell) for cell in line) for line in grid]
