"""LoRA terms by Triton kernels: one launch per step of the arithmetic, whatever the segments and their ranks.

Weights and gradient arenas are not stacked or copied: programs read their addresses from a table that is built on
the host once per pass, for all projections, and copied in one piece. A program works on up to 32 rows of one
segment, counted from the segment's own first row, in blocks whose sizes are constants of this file; a gradient is
formed by one program per tile of the arena, which walks the arena's segments in order. No atomics, no autotuning.
State: validated with Triton's interpreter on a CPU (tests/numerics/test_kernels_agree.py), and compiled for compute
capability 9.0 by Triton 3.9 (16 to 33 kB of shared memory per program). It has not been run on a GPU yet, and its
block sizes are arithmetic, not measurements; choose.py does not choose it.
Invariant: see base.py.

Legend: T rows of the packed batch, N columns of s (members * rank of the widest adapter), I inputs, O outputs of the
group, Q segments of the pass, G groups of projections.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treadle.engine.kernels.base import LoraSegment
from treadle.engine.kernels.triton_tables import (
    MAX_MEMBERS,
    TILE_ROWS,
    GradientTable,
    GroupSpot,
    PassTable,
    gradient_table,
    pass_table,
)

# Triton comes with CUDA builds of torch and with nothing else that we need, so its absence is ordinary.
try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:
    triton = tl = None

# Columns and inner steps of a program's tile, whose rows are TILE_ROWS. Constants on purpose: with a neighbour's rank
# or with the length of the pass in them, a segment's bits would depend on company. Reading x costs more than 32
# columns of arithmetic, so narrower tiles for small ranks would not pay.
_NARROW = 32
_WIDE = 64
_INNER = 64
_COUNTS = ("num_blocks", "blocks_0", "blocks_1")


def is_available(device: torch.device) -> bool:
    """Whether these kernels can run there: Triton is installed, and the device is a GPU or Triton interprets."""
    return triton is not None and (device.type == "cuda" or _is_interpreted())


class TritonLora:
    """LoraKernel for NVIDIA GPUs. Ask `is_available` before making one."""

    def __init__(self) -> None:
        assert triton is not None, "is_available says when these kernels can be used"
        # Triton decides the order of operations, so its version is part of the numerics profile.
        self.name = f"triton-{triton.__version__}"

    def add(self, x_TI: Tensor, y_TO: Tensor, segments: Sequence[LoraSegment], group: str) -> Tensor | None:
        """See LoraKernel.add; what is kept is s = x A^T, float32 [T, N], of which segments' own columns count."""
        table = pass_table(segments, x_TI.device)
        spot = table.groups.get(group)
        if spot is None:
            return None
        s_TN = torch.empty(x_TI.shape[0], spot.num_columns, dtype=torch.float32, device=x_TI.device)
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device_of(x_TI):  # type: ignore[no-untyped-call]  # torch, untyped
            _narrow(table, spot, source=x_TI, out=s_TN, is_backward=False)
            _widen(table, spot, source=s_TN, onto=y_TO, is_backward=False)
        return s_TN

    def add_grads(
        self,
        dy_TO: Tensor,
        x_TI: Tensor,
        kept: object,
        dx_TI: Tensor | None,
        segments: Sequence[LoraSegment],
        group: str,
    ) -> None:
        """See LoraKernel.add_grads."""
        table = pass_table(segments, x_TI.device)
        spot = table.groups.get(group)
        if spot is None:
            return
        assert isinstance(kept, Tensor)
        grads = gradient_table(segments, table, x_TI.device)
        if dx_TI is None and grads.num_owners == 0:
            return
        dy_TO = dy_TO if dy_TO.stride(1) == 1 else dy_TO.contiguous()
        ds_TN = torch.empty_like(kept)
        with torch.cuda.device_of(x_TI):  # type: ignore[no-untyped-call]  # torch, untyped
            _narrow(table, spot, source=dy_TO, out=ds_TN, is_backward=True)
            if dx_TI is not None:
                _widen(table, spot, source=ds_TN, onto=dx_TI, is_backward=True)
            if grads.num_owners > 0:
                _accumulate(table, grads, spot, narrow=ds_TN, wide=x_TI, of_a=True)
                _accumulate(table, grads, spot, narrow=kept, wide=dy_TO, of_a=False)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 numbers are formed. Exactly for a float32 base model; else by three TF32 products.

    Numbers of a bfloat16 model are exact in TF32, so the three-way split keeps the weights' 24 bits.
    """
    return "ieee" if dtype == torch.float32 else "tf32x3"


def _narrow(table: PassTable, spot: GroupSpot, *, source: Tensor, out: Tensor, is_backward: bool) -> None:
    """out = source A^T (forward) or scale * dy B member by member (backward): from wide to at most N columns."""
    widths = spot.member_widths if is_backward else (spot.in_features, 0, 0)
    num_parts = spot.num_members if is_backward else 1
    num_blocks = _blocks(spot.max_rank if is_backward else spot.num_columns, _NARROW)
    assert source.stride(1) == 1
    _narrow_kernel[(num_blocks * num_parts, table.num_tiles)](
        source,
        out,
        table.tiles,
        table.rows,
        table.ranks,
        table.scales,
        table.addresses[spot.line],
        source.stride(0),
        out.stride(0),
        widths[0],
        widths[1],
        widths[2],
        num_blocks,
        MEMBERS=spot.num_members,
        IS_BACKWARD=is_backward,
        ADDRESSES=1 + MAX_MEMBERS,
        ROWS=TILE_ROWS,
        NARROW=_NARROW,
        INNER=_INNER,
        PRECISION=_precision(source.dtype),
    )


def _widen(table: PassTable, spot: GroupSpot, *, source: Tensor, onto: Tensor, is_backward: bool) -> None:
    """onto += scale * s B member by member (forward) or ds A (backward): from at most N columns to wide."""
    widths = (spot.in_features, 0, 0) if is_backward else spot.member_widths
    blocks = [_blocks(width, _WIDE) for width in widths]
    assert onto.stride(1) == 1
    _widen_kernel[(sum(blocks), table.num_tiles)](
        source,
        onto,
        table.tiles,
        table.rows,
        table.ranks,
        table.scales,
        table.addresses[spot.line],
        source.stride(0),
        onto.stride(0),
        widths[0],
        widths[1],
        widths[2],
        blocks[0],
        blocks[1],
        MEMBERS=spot.num_members,
        IS_BACKWARD=is_backward,
        ADDRESSES=1 + MAX_MEMBERS,
        ROWS=TILE_ROWS,
        WIDE=_WIDE,
        INNER=_NARROW,
        PRECISION=_precision(onto.dtype),
    )


def _accumulate(
    table: PassTable, grads: GradientTable, spot: GroupSpot, *, narrow: Tensor, wide: Tensor, of_a: bool
) -> None:
    """dA += ds^T x, or dB += scale * s^T dy member by member, quantum after quantum."""
    widths = (spot.in_features, 0, 0) if of_a else spot.member_widths
    blocks = [_blocks(width, _WIDE) for width in widths]
    num_narrow = _blocks(spot.num_columns if of_a else spot.max_rank, _NARROW)
    assert wide.stride(1) == 1
    _accumulate_kernel[(sum(blocks), num_narrow, grads.num_owners)](
        narrow,
        wide,
        table.rows,
        table.ranks,
        table.scales,
        grads.starts,
        grads.members,
        grads.addresses[spot.line],
        narrow.stride(0),
        wide.stride(0),
        widths[0],
        widths[1],
        widths[2],
        blocks[0],
        blocks[1],
        MEMBERS=spot.num_members,
        OF_A=of_a,
        ADDRESSES=1 + MAX_MEMBERS,
        ROWS=TILE_ROWS,
        NARROW=_NARROW,
        WIDE=_WIDE,
        PRECISION=_precision(wide.dtype),
    )


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _kernel(function: Any) -> Any:
    """The function as a Triton kernel; as it is, and never called, where there is no Triton."""
    # Code made for particular numbers of blocks would be other code for other company.
    return function if triton is None else triton.jit(function, do_not_specialize=_COUNTS)


@_kernel
def _narrow_kernel(  # type: ignore[no-untyped-def]  # Triton's language has no Python types
    source,
    out,
    tiles,
    rows,
    ranks,
    scales,
    addresses,
    source_stride,
    out_stride,
    width_0,
    width_1,
    width_2,
    num_blocks,
    MEMBERS: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    ADDRESSES: tl.constexpr,
    ROWS: tl.constexpr,
    NARROW: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Column blocks of one tile are neighbours in the grid, so that they find its rows in the L2 cache.
    part = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    segment = tl.load(tiles + 2 * tl.program_id(1))
    first_row = tl.load(tiles + 2 * tl.program_id(1) + 1)
    stop = tl.load(rows + 2 * segment + 1)
    rank = tl.load(ranks + segment)
    width = width_0
    first_column = 0
    count = rank * MEMBERS
    address = tl.load(addresses + segment * ADDRESSES)
    if IS_BACKWARD:
        count = rank
        address = tl.load(addresses + segment * ADDRESSES + 1 + part)
        if part == 1:
            width = width_1
            first_column = width_0
        if part == 2:
            width = width_2
            first_column = width_0 + width_1
    if (address != 0) & (block * NARROW < count):
        weights = tl.multiple_of(address, 64).to(tl.pointer_type(tl.float32))
        row = first_row + tl.arange(0, ROWS)
        narrow = block * NARROW + tl.arange(0, NARROW)
        is_row = row < stop
        is_narrow = narrow < count
        # A row's offset can exceed 31 bits: 16k rows of 151,936 columns do.
        row_start = row.to(tl.int64) * source_stride + first_column
        total = tl.zeros((ROWS, NARROW), dtype=tl.float32)
        for start in range(0, width, INNER):
            inner = start + tl.arange(0, INNER)
            is_inner = inner < width
            mask = is_row[:, None] & is_inner[None, :]
            x = tl.load(source + row_start[:, None] + inner[None, :], mask=mask, other=0.0)
            mask = is_narrow[None, :] & is_inner[:, None]
            w = tl.load(weights + narrow[None, :] * width + inner[:, None], mask=mask, other=0.0)
            total = tl.dot(x.to(tl.float32), w, acc=total, input_precision=PRECISION)
        if IS_BACKWARD:
            total = total * tl.load(scales + segment)
        place = out + row.to(tl.int64)[:, None] * out_stride + (part * rank + narrow)[None, :]
        tl.store(place, total, mask=is_row[:, None] & is_narrow[None, :])


@_kernel
def _widen_kernel(  # type: ignore[no-untyped-def]  # Triton's language has no Python types
    source,
    onto,
    tiles,
    rows,
    ranks,
    scales,
    addresses,
    source_stride,
    onto_stride,
    width_0,
    width_1,
    width_2,
    blocks_0,
    blocks_1,
    MEMBERS: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    ADDRESSES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    member = 0
    width = width_0
    first_column = 0
    if block >= blocks_0:
        block = block - blocks_0
        member = 1
        width = width_1
        first_column = width_0
        if block >= blocks_1:
            block = block - blocks_1
            member = 2
            width = width_2
            first_column = width_0 + width_1
    segment = tl.load(tiles + 2 * tl.program_id(1))
    first_row = tl.load(tiles + 2 * tl.program_id(1) + 1)
    stop = tl.load(rows + 2 * segment + 1)
    count = tl.load(ranks + segment)
    first_narrow = member * count
    scale = tl.load(scales + segment)
    address = tl.load(addresses + segment * ADDRESSES + 1 + member)
    if IS_BACKWARD:
        count = count * MEMBERS
        first_narrow = 0
        scale = 1.0
        address = tl.load(addresses + segment * ADDRESSES)
    if address != 0:
        weights = tl.multiple_of(address, 64).to(tl.pointer_type(tl.float32))
        row = first_row + tl.arange(0, ROWS)
        wide = block * WIDE + tl.arange(0, WIDE)
        is_row = row < stop
        is_wide = wide < width
        row_start = row.to(tl.int64) * source_stride + first_narrow
        total = tl.zeros((ROWS, WIDE), dtype=tl.float32)
        for start in range(0, count, INNER):
            inner = start + tl.arange(0, INNER)
            is_inner = inner < count
            mask = is_row[:, None] & is_inner[None, :]
            s = tl.load(source + row_start[:, None] + inner[None, :], mask=mask, other=0.0)
            mask = is_inner[:, None] & is_wide[None, :]
            w = tl.load(weights + inner[:, None] * width + wide[None, :], mask=mask, other=0.0)
            total = tl.dot(s, w, acc=total, input_precision=PRECISION)
        place = onto + row.to(tl.int64)[:, None] * onto_stride + (first_column + wide)[None, :]
        mask = is_row[:, None] & is_wide[None, :]
        before = tl.load(place, mask=mask, other=0.0)
        tl.store(place, (before.to(tl.float32) + scale * total).to(before.dtype), mask=mask)


@_kernel
def _accumulate_kernel(  # type: ignore[no-untyped-def]  # Triton's language has no Python types
    narrow_rows,
    wide_rows,
    rows,
    ranks,
    scales,
    starts,
    members,
    addresses,
    narrow_stride,
    wide_stride,
    width_0,
    width_1,
    width_2,
    blocks_0,
    blocks_1,
    MEMBERS: tl.constexpr,
    OF_A: tl.constexpr,
    ADDRESSES: tl.constexpr,
    ROWS: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    member = 0
    width = width_0
    first_column = 0
    if block >= blocks_0:
        block = block - blocks_0
        member = 1
        width = width_1
        first_column = width_0
        if block >= blocks_1:
            block = block - blocks_1
            member = 2
            width = width_2
            first_column = width_0 + width_1
    owner = tl.program_id(2)
    first = tl.load(starts + owner)
    last = tl.load(starts + owner + 1)
    # All segments of one gradient arena run under one adapter.
    rank = tl.load(ranks + tl.load(members + first))
    scale = tl.load(scales + tl.load(members + first))
    count = rank
    first_narrow = member * rank
    address = tl.load(addresses + owner * ADDRESSES + 1 + member)
    if OF_A:
        count = rank * MEMBERS
        first_narrow = 0
        scale = 1.0
        address = tl.load(addresses + owner * ADDRESSES)
    if (address != 0) & (tl.program_id(1) * NARROW < count):
        grads = tl.multiple_of(address, 64).to(tl.pointer_type(tl.float32))
        narrow = tl.program_id(1) * NARROW + tl.arange(0, NARROW)
        wide = block * WIDE + tl.arange(0, WIDE)
        is_narrow = narrow < count
        is_wide = wide < width
        place = grads + narrow[:, None] * width + wide[None, :]
        mask = is_narrow[:, None] & is_wide[None, :]
        arena = tl.load(place, mask=mask, other=0.0)
        for index in range(first, last):
            segment = tl.load(members + index)
            stop = tl.load(rows + 2 * segment + 1)
            total = tl.zeros((NARROW, WIDE), dtype=tl.float32)
            for start in range(tl.load(rows + 2 * segment), stop, ROWS):
                row = start + tl.arange(0, ROWS)
                is_row = row < stop
                row_64 = row.to(tl.int64)
                p = tl.load(
                    narrow_rows + row_64[None, :] * narrow_stride + (first_narrow + narrow)[:, None],
                    mask=is_narrow[:, None] & is_row[None, :],
                    other=0.0,
                )
                q = tl.load(
                    wide_rows + row_64[:, None] * wide_stride + (first_column + wide)[None, :],
                    mask=is_row[:, None] & is_wide[None, :],
                    other=0.0,
                )
                total = tl.dot(p, q.to(tl.float32), acc=total, input_precision=PRECISION)
            # A quantum is reduced alone and then added; that is what keeps replays exact.
            arena = arena + scale * total
        tl.store(place, arena, mask=mask)
