"""Where rows lie in a pass: decoding rows densely, prompts' chunks by adapter in padded groups.

A pass is made of decoding rows and of blocks: some rows of a prompt under one adapter. It knows neither tokens nor
sequences.
Invariant: nobody's company changes anybody's bits. A GEMM over rows gives each row the same bits from 8 rows up, so the
decoding rows together, every block group of an adapter and the whole pass are padded to multiples; the adapters' terms
of decoding rows are computed in groups of their own (engine/kernels/row_groups.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.domain.limits import PACK_MULTIPLE
from treadle.engine.adapter import AdapterWeights
from treadle.engine.kernels.base import LoraKernel, LoraSegment
from treadle.engine.kernels.row_groups import RowGroups, RowGroupsKernel

# Measured on CPU: a row of a GEMM has the same bits in any number of rows from 8 up, and other bits below.
GROUP_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Block:
    """`num_rows` neighbouring rows of a prompt under one adapter (None is the bare base model)."""

    adapter: AdapterWeights | None
    num_rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """groups: the decoding rows, from row 0 on. starts[i] is the first row of block i.

    prompts: a segment for each adapter's group of blocks, with its padding rows.
    """

    groups: RowGroups
    starts: tuple[int, ...]
    prompts: tuple[LoraSegment, ...]
    num_rows: int

    @property
    def segments(self) -> tuple[LoraSegment, ...]:
        """All rows under an adapter, in row order."""
        decoding = (LoraSegment(adapter=adapter, start=start, stop=stop) for adapter, start, stop in self.groups.spans)
        return (*decoding, *self.prompts)

    def kernel(self, of_device: LoraKernel) -> LoraKernel:
        """What computes the adapters' terms in this pass."""
        return RowGroupsKernel(self.groups, of_device, self.prompts)


def lay_out(rows: RowGroups, blocks: Sequence[Block] = ()) -> Layout:
    """A place for each block: groups in order of first appearance, blocks in order within their group."""
    groups: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        assert block.num_rows > 0
        groups.setdefault(id(block.adapter), []).append(index)
    starts = [0] * len(blocks)
    segments: list[LoraSegment] = []
    row = round_up(len(rows.rows), GROUP_MULTIPLE)
    for members in groups.values():
        first_row = row
        for index in members:
            starts[index] = row
            row += blocks[index].num_rows
        row = round_up(row, GROUP_MULTIPLE)
        adapter = blocks[members[0]].adapter
        if adapter is not None:
            segments.append(LoraSegment(adapter=adapter, start=first_row, stop=row))
    return Layout(rows, tuple(starts), tuple(segments), round_up(row, PACK_MULTIPLE))


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is at least `number`."""
    return -(-number // multiple) * multiple
