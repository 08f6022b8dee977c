"""What the Triton kernels are told about a pass: tiles of rows, and addresses of adapters and gradients.

Built on the host once per pass for all projections, and copied to the device in one piece; no Triton here.
Invariant: a tile lies within one segment and is counted from its first row, so tiles do not depend on company.

Legend: Q segments of the pass, G groups of projections, N columns of s = x A^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treadle.engine.adapter import AdapterArena
from treadle.engine.kernels.base import LoraSegment, PassSegments

# Rows of a program's tile: a constant, see triton_lora.py.
TILE_ROWS = 32
# Members of a group: q, k and v are the most.
MAX_MEMBERS = 3
_BYTES = 4


@dataclass(frozen=True, slots=True)
class GroupSpot:
    """One group in a pass's tables: its line, and what is the same for all adapters.

    member_widths: outputs of each member, 0 where there is none. num_columns: N.
    """

    line: int
    in_features: int
    num_members: int
    member_widths: tuple[int, int, int]
    max_rank: int

    @property
    def num_columns(self) -> int:
        # A multiple of 16, so that Triton compiles the same code whatever the widest rank of the pass is.
        return -(-self.num_members * self.max_rank // 16) * 16


@dataclass(frozen=True, slots=True)
class PassTable:
    """One pass on the device.

    tiles: int32 [num_tiles, 2], segment and first row. rows: int32 [Q, 2], where segments stop (and start).
    ranks: int32 [Q]. scales: float32 [Q]. addresses: int64 [G, Q, 1 + members], of A and each B; 0 without.
    """

    groups: dict[str, GroupSpot]
    num_tiles: int
    tiles: Tensor
    rows: Tensor
    ranks: Tensor
    scales: Tensor
    addresses: Tensor


@dataclass(frozen=True, slots=True)
class GradientTable:
    """Where gradients go. An owner is one gradient arena of the pass.

    starts: int32 [num_owners + 1] into members: int32, the segments of each owner, in order.
    addresses: like PassTable's, into the gradient arenas, per owner.
    """

    arenas: tuple[AdapterArena | None, ...]
    num_owners: int
    starts: Tensor
    members: Tensor
    addresses: Tensor


def pass_table(segments: Sequence[LoraSegment], device: torch.device) -> PassTable:
    """The pass's tables; built at its first projection when `segments` are PassSegments, else at each."""
    if not isinstance(segments, PassSegments):
        return _new_pass_table(segments, device)
    found = segments.prepared.get("triton")
    if found is None:
        found = segments.prepared["triton"] = _new_pass_table(segments, device)
    assert isinstance(found, PassTable)
    return found


def gradient_table(segments: Sequence[LoraSegment], table: PassTable, device: torch.device) -> GradientTable:
    """Where the pass's gradients go; built at the first projection of its backward."""
    arenas = tuple(segment.grads for segment in segments)
    found = segments.prepared.get("triton-gradients") if isinstance(segments, PassSegments) else None
    # Gradients can be given up between forward and backward, and segments can be run again.
    if isinstance(found, GradientTable) and all(a is b for a, b in zip(found.arenas, arenas, strict=True)):
        return found
    made = _new_gradient_table(arenas, table, device)
    if isinstance(segments, PassSegments):
        segments.prepared["triton-gradients"] = made
    return made


def _new_pass_table(segments: Sequence[LoraSegment], device: torch.device) -> PassTable:
    groups = _group_spots(segments)
    tiles = [(q, row) for q, segment in enumerate(segments) for row in range(segment.start, segment.stop, TILE_ROWS)]
    parts = (
        np.array(tiles, dtype=np.int32).reshape(-1, 2),
        np.array([(segment.start, segment.stop) for segment in segments], dtype=np.int32).reshape(-1, 2),
        np.array([segment.adapter.layout.rank for segment in segments], dtype=np.int32),
        np.array([segment.adapter.scale for segment in segments], dtype=np.float32),
        _addresses([segment.adapter for segment in segments], groups),
    )
    return PassTable(groups, len(tiles), *_to_device(parts, device))


def _new_gradient_table(
    arenas: tuple[AdapterArena | None, ...], table: PassTable, device: torch.device
) -> GradientTable:
    owners = {id(arena): arena for arena in arenas if arena is not None}
    owned = {key: [q for q, arena in enumerate(arenas) if arena is not None and id(arena) == key] for key in owners}
    starts = list(accumulate((len(members) for members in owned.values()), initial=0))
    parts = (
        np.array(starts, dtype=np.int32),
        np.array([q for members in owned.values() for q in members], dtype=np.int32),
        _addresses(list(owners.values()), table.groups),
    )
    return GradientTable(arenas, len(owners), *_to_device(parts, device))


def _group_spots(segments: Sequence[LoraSegment]) -> dict[str, GroupSpot]:
    """The groups that any segment's adapter changes, with the widest rank of the pass among those that do."""
    spots: dict[str, GroupSpot] = {}
    layouts = {id(segment.adapter.layout): segment.adapter.layout for segment in segments}
    for layout in layouts.values():
        for places in layout.groups:
            if places.group.num_experts:
                continue
            widths = [place.shape[1] for place in places.b]
            assert len(widths) <= MAX_MEMBERS
            known = spots.get(places.group.name)
            spots[places.group.name] = GroupSpot(
                line=len(spots) if known is None else known.line,
                in_features=places.a[0].shape[1],
                num_members=len(widths),
                member_widths=(widths[0], *(widths[1:] + [0] * (MAX_MEMBERS - len(widths)))),  # type: ignore[arg-type]
                max_rank=max(layout.rank, 0 if known is None else known.max_rank),
            )
    return spots


def _addresses(arenas: Sequence[AdapterArena], groups: dict[str, GroupSpot]) -> NDArray[np.int64]:
    """int64 [G, arenas, 1 + members]: where each group's A and B's lie, 0 for an arena without the group."""
    by_layout: dict[int, NDArray[np.int64]] = {}
    table = np.zeros((len(groups), len(arenas), 1 + MAX_MEMBERS), dtype=np.int64)
    for column, arena in enumerate(arenas):
        offsets = by_layout.get(id(arena.layout))
        if offsets is None:
            offsets = by_layout[id(arena.layout)] = _offsets(arena, groups)
        base = arena.flat.data_ptr()
        table[:, column] = np.where(offsets >= 0, base + _BYTES * offsets, 0)
    return table


def _offsets(arena: AdapterArena, groups: dict[str, GroupSpot]) -> NDArray[np.int64]:
    """Offsets in numbers, [G, 1 + members]; -1 for what the layout does not have. Once per layout, not per run."""
    offsets = np.full((len(groups), 1 + MAX_MEMBERS), -1, dtype=np.int64)
    for places in arena.layout.groups:
        spot = groups.get(places.group.name)
        if spot is not None:
            own = [places.a[0].offset, *(place.offset for place in places.b)]
            offsets[spot.line, : len(own)] = own
    return offsets


def _to_device(parts: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """All arrays in one copy: each starts at a multiple of 8 bytes of one buffer."""
    starts = list(accumulate((-(-part.nbytes // 8) * 8 for part in parts), initial=0))
    host = np.zeros(max(starts[-1], 8), dtype=np.uint8)
    for part, start in zip(parts, starts, strict=False):
        host[start : start + part.nbytes] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    # From pinned memory the copy would not wait for the device, but the buffer would have to outlive it.
    buffer = torch.from_numpy(host).to(device)
    dtypes = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32}
    return [
        buffer[start : start + part.nbytes].view(dtypes[part.dtype.name]).view(part.shape)
        for part, start in zip(parts, starts, strict=False)
    ]
