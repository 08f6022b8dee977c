"""Where rows lie in a pass: grouped by adapter, padded so that nobody's company changes anybody's bits.

A pass is made of blocks: some rows under one adapter. It knows neither tokens nor sequences.
Invariant: a GEMM over rows gives each row the same bits from 8 rows up, so every group of an adapter is padded to a
multiple of GROUP_MULTIPLE rows, and the whole pass to a multiple of PACK_MULTIPLE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.domain.limits import PACK_MULTIPLE
from treadle.engine.adapter import AdapterWeights
from treadle.engine.kernels.base import LoraSegment

# Measured on CPU: a row of a GEMM has the same bits in any number of rows from 8 up, and other bits below.
GROUP_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Block:
    """`num_rows` neighbouring rows under one adapter (None is the bare base model)."""

    adapter: AdapterWeights | None
    num_rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """starts[i] is the first row of block i; segments cover each adapter's group with its padding rows."""

    starts: tuple[int, ...]
    segments: tuple[LoraSegment, ...]
    num_rows: int


def lay_out(blocks: Sequence[Block]) -> Layout:
    """A place for each block: groups in order of first appearance, blocks in order within their group."""
    groups: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        assert block.num_rows > 0
        groups.setdefault(id(block.adapter), []).append(index)
    starts = [0] * len(blocks)
    segments: list[LoraSegment] = []
    row = 0
    for members in groups.values():
        first_row = row
        for index in members:
            starts[index] = row
            row += blocks[index].num_rows
        row = round_up(row, GROUP_MULTIPLE)
        adapter = blocks[members[0]].adapter
        if adapter is not None:
            segments.append(LoraSegment(adapter=adapter, start=first_row, stop=row))
    return Layout(tuple(starts), tuple(segments), round_up(row, PACK_MULTIPLE))


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is at least `number`."""
    return -(-number // multiple) * multiple
