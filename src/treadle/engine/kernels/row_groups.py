"""LoRA terms of rows that decode: a few rows under each of many adapters, in a few batched products per projection.

The rows of a pass lie densely, so that the frozen weights are multiplied with no more rows than there are; only here
are they gathered into groups of GROUP_ROWS under one adapter, and the terms scattered back. Adapters of few rows are
stacked, one copy while the same ones decode; an adapter of many rows is read in place, by all of its groups.
It has no backward, and knows no sequences: prompts' rows in the same pass are left to the device's own kernel.
Invariant: a row's term is one row of a product of GROUP_ROWS rows, whatever its place there and however many products
are done in the same call, so its bits do not depend on the other rows. On a CPU that was measured for some shapes and
up to two threads; with more threads there is one product per call, and in other shapes one row per product (`_way`).
tests/sampler/test_sampler_row_groups.py.

Legend: T rows of the pass, N rows of a batch, E groups, M = GROUP_ROWS, I inputs, O outputs, C columns of one member,
R rank, G members of a group of projections.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from treadle.engine.adapter import AdapterWeights, GroupTensors
from treadle.engine.kernels.base import LoraKernel, LoraSegment

# Below 8 rows a product's bits depend on the number of rows, so it is always this one. 2 and 8 cost about as much for
# one row each; 4 loses little for 2 rows an adapter (least padding) and for 16 (fewest groups).
GROUP_ROWS = 4
# A copy of all adapters that are stacked together; those beyond it get calls of their own, with the same bits.
MAX_STACK_BYTES = 256 * 2**20
# Products of one call have the bits of products of their own up to this many threads: more divide a single product
# among them, but not one of many (measured with 3 and 4 threads, 24 outputs).
_BATCH_THREADS = 2
# A row has the same bits at any place in a product whose inputs are a multiple of this, and whose outputs are one too
# or many (measured: others for 66 inputs, for 5 to 7 and 9 to 11 outputs, and for 21 and 27 with 3 threads).
_SHAPE_MULTIPLE = 4
_MANY_OUTPUTS = 64


class _Way(Enum):
    """How the products of a batch are done."""

    TOGETHER = auto()
    GROUP_BY_GROUP = auto()
    ROW_BY_ROW = auto()


class Stack:
    """The weights of adapters of one rank class, side by side.

    Each group of projections is copied when first asked for; a single adapter is not copied.
    """

    def __init__(self, adapters: tuple[AdapterWeights, ...]) -> None:
        self.adapters = adapters
        self._groups: dict[str, GroupTensors] = {}

    def group(self, name: str) -> GroupTensors:
        """a [E, G * R, I] and b [E, R, C] of the adapters, in order. For a group that they change."""
        if name not in self._groups:
            self._groups[name] = self._stacked(name)
        return self._groups[name]

    def _stacked(self, name: str) -> GroupTensors:
        found = [tensors for adapter in self.adapters if (tensors := adapter.group(name)) is not None]
        assert len(found) == len(self.adapters), "adapters of one rank class change the same projections"
        first = found[0]
        if len(found) == 1:
            return GroupTensors(_wide(first.a[None]), tuple(b[None] for b in first.b), first.columns)
        members = range(len(first.b))
        return GroupTensors(
            _wide(torch.stack([each.a for each in found])),
            tuple(torch.stack([each.b[member] for each in found]) for member in members),
            first.columns,
        )


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows [first, last) of a pass in num_groups groups, by one call of each product.

    gather [E * M]: the pass row of each place, counted from `first`; places without one repeat a row, and nobody reads
    what comes of them. back [N]: the place of each row. Both None when the rows fill their groups.
    scale [E, 1, 1]: alpha / rank.
    """

    stack: Stack
    first: int
    last: int
    num_groups: int
    gather: Tensor | None
    back: Tensor | None
    scale: Tensor

    def add(self, x_TI: Tensor, y_TO: Tensor, group: str) -> None:
        of_one = self.stack.adapters[0].group(group)
        if of_one is None:
            return
        x_NI = x_TI[self.first : self.last]
        x_PI = x_NI if self.gather is None else x_NI.index_select(0, self.gather)
        y_NO = y_TO[self.first : self.last]
        way = _way(of_one)
        if way == _Way.TOGETHER:
            self._add_together(x_PI, y_NO, group)
        else:
            self._add_apart(x_PI, y_NO, group, GROUP_ROWS if way == _Way.GROUP_BY_GROUP else 1)

    def _add_together(self, x_PI: Tensor, y_NO: Tensor, group: str) -> None:
        weights = self.stack.group(group)
        x_EMI = x_PI.float().reshape(self.num_groups, GROUP_ROWS, -1)
        s_EMR = torch.bmm(x_EMI, self._for_groups(weights.a).transpose(1, 2)).mul_(self.scale)
        parts = torch.split(s_EMR, weights.b[0].shape[1], dim=2)[: len(weights.b)]
        for part_EMR, b_ERC, columns in zip(parts, weights.b, weights.columns, strict=True):
            term_EMC = torch.bmm(part_EMR, self._for_groups(b_ERC))
            self._scatter(term_EMC.view(self.num_groups * GROUP_ROWS, -1), y_NO[:, columns])

    def _add_apart(self, x_PI: Tensor, y_NO: Tensor, group: str, product_rows: int) -> None:
        """As _add_together, but no product sees how many others there are."""
        term_PO = torch.empty(x_PI.shape[0], y_NO.shape[1], dtype=torch.float32, device=x_PI.device)
        for first in range(0, x_PI.shape[0], product_rows):
            adapter = self.stack.adapters[first // GROUP_ROWS if len(self.stack.adapters) > 1 else 0]
            weights = adapter.group(group)
            assert weights is not None
            places = slice(first, first + product_rows)
            # A copy, because the bits may depend on the address of the first row, which is its place among the groups.
            s_MR = torch.mm(x_PI[places].to(torch.float32, copy=True), weights.a.t()).mul_(adapter.scale)
            parts = s_MR.chunk(len(weights.b), dim=1)
            for part_MR, b_RC, columns in zip(parts, weights.b, weights.columns, strict=True):
                term_PO[places, columns] = torch.mm(part_MR, b_RC)
        self._scatter(term_PO, y_NO)

    def _scatter(self, term_PC: Tensor, y_NC: Tensor) -> None:
        # In-place addition promotes to float32 before it rounds to the dtype of the left side.
        y_NC.add_(term_PC if self.back is None else term_PC.index_select(0, self.back))

    def _for_groups(self, weights: Tensor) -> Tensor:
        return weights if weights.shape[0] == self.num_groups else weights.expand(self.num_groups, -1, -1)


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Where decoding rows lie in a pass, and their LoRA terms; made once for a set of rows and used while it lasts.

    rows: for each adapter given, the row of the pass; they are 0 to len - 1, those of one adapter together, those
    without one last. spans: (adapter, start, stop) in row order. stacks: by the adapters' identities.
    """

    adapters: tuple[AdapterWeights | None, ...]
    rows: tuple[int, ...]
    spans: tuple[tuple[AdapterWeights, int, int], ...]
    stacks: Mapping[tuple[int, ...], Stack]
    _batches: tuple[_Batch, ...] = field(repr=False)

    def add(self, x_TI: Tensor, y_TO: Tensor, group: str) -> None:
        """Add each row's term to its row of y in place."""
        for batch in self._batches:
            batch.add(x_TI, y_TO, group)

    def is_for(self, adapters: Sequence[AdapterWeights | None]) -> bool:
        """Whether these very adapters, in this order, have been laid out here."""
        return len(adapters) == len(self.adapters) and all(map(_is, adapters, self.adapters))


def row_groups(
    adapters: Sequence[AdapterWeights | None], device: torch.device, *, before: RowGroups | None = None
) -> RowGroups:
    """A place for each row, named by its adapter (None is the bare base model). before: stacks to use again."""
    members: dict[int, list[int]] = {}
    for index, adapter in enumerate(adapters):
        if adapter is not None:
            members.setdefault(id(adapter), []).append(index)
    sets = list(_batch_sets(adapters, members.values()))
    known = {} if before is None else before.stacks
    stacks: dict[tuple[int, ...], Stack] = {}
    batches: list[_Batch] = []
    rows = [0] * len(adapters)
    spans: list[tuple[AdapterWeights, int, int]] = []
    row = 0
    for of_set in sets:
        chosen = tuple(adapter for indexes in of_set if (adapter := adapters[indexes[0]]) is not None)
        key = tuple(map(id, chosen))
        stacks[key] = known.get(key) or Stack(chosen)
        batches.append(_batch(stacks[key], [len(indexes) for indexes in of_set], row, device))
        for adapter, indexes in zip(chosen, of_set, strict=True):
            spans.append((adapter, row, row + len(indexes)))
            for index in indexes:
                rows[index] = row
                row += 1
    for index, of_row in enumerate(adapters):
        if of_row is None:
            rows[index] = row
            row += 1
    assert row == len(adapters)
    return RowGroups(tuple(adapters), tuple(rows), tuple(spans), stacks, tuple(batches))


class RowGroupsKernel:
    """LoraKernel of a sampling pass: its decoding rows by `groups`, the segments of its prompts by the device's own."""

    name = "row-groups"

    def __init__(self, groups: RowGroups, kernel: LoraKernel, prompts: Sequence[LoraSegment]) -> None:
        self._groups = groups
        self._kernel = kernel
        self._prompts = prompts

    def add(self, x_TI: Tensor, y_TO: Tensor, segments: Sequence[LoraSegment], group: str) -> None:
        """See LoraKernel.add; nothing is kept. `segments` are those of the whole pass, known here already."""
        self._groups.add(x_TI, y_TO, group)
        if self._prompts:
            self._kernel.add(x_TI, y_TO, self._prompts, group)

    def add_grads(
        self,
        dy_TO: Tensor,
        x_TI: Tensor,
        kept: object,
        dx_TI: Tensor | None,
        segments: Sequence[LoraSegment],
        group: str,
    ) -> None:
        """Sampling has no backward."""
        raise AssertionError("a sampling pass records no gradients")


def _batch_sets(adapters: Sequence[AdapterWeights | None], members: Iterable[list[int]]) -> Iterable[list[list[int]]]:
    """Which adapters share calls: one of several groups has its own, those of one group share by rank class."""
    classes: dict[tuple[object, ...], list[list[int]]] = {}
    stacked_bytes: dict[tuple[object, ...], int] = {}
    for indexes in members:
        adapter = adapters[indexes[0]]
        assert adapter is not None
        if len(indexes) > GROUP_ROWS:
            yield [indexes]
            continue
        key = (adapter.layout.rank, *(places.group.name for places in adapter.layout.groups))
        size = adapter.flat.numel() * adapter.flat.element_size()
        if key in classes and sum(stacked_bytes.values()) + size > MAX_STACK_BYTES:
            yield [indexes]
            continue
        classes.setdefault(key, []).append(indexes)
        stacked_bytes[key] = stacked_bytes.get(key, 0) + size
    yield from classes.values()


def _batch(stack: Stack, counts: Sequence[int], first: int, device: torch.device) -> _Batch:
    """The rows from `first` on, counts[i] of them under the stack's i-th adapter."""
    gather: list[int] = []
    back: list[int] = []
    for start, count in zip(accumulate(counts, initial=0), counts, strict=False):
        back += range(len(gather), len(gather) + count)
        gather += range(start, start + count)
        gather += [start] * (-count % GROUP_ROWS)
    is_full = len(gather) == len(back)
    num_groups = len(gather) // GROUP_ROWS
    scales = [adapter.scale for adapter in stack.adapters]
    assert len(scales) in (1, num_groups), "stacked adapters have one group each"
    return _Batch(
        stack=stack,
        first=first,
        last=first + len(back),
        num_groups=num_groups,
        gather=None if is_full else torch.tensor(gather, device=device),
        back=None if is_full else torch.tensor(back, device=device),
        scale=torch.tensor(scales, dtype=torch.float32, device=device)[:, None, None],
    )


def _way(weights: GroupTensors) -> _Way:
    """The fastest way that keeps a row's bits: by shape and number of threads, never by who is there.

    On a GPU nobody has shown which do, and nothing is promised there.
    """
    if weights.a.device.type != "cpu":
        return _Way.TOGETHER
    outputs = (columns.stop - columns.start for columns in weights.columns)
    if weights.a.shape[1] % _SHAPE_MULTIPLE or any(n % _SHAPE_MULTIPLE and n < _MANY_OUTPUTS for n in outputs):
        return _Way.ROW_BY_ROW
    return _Way.TOGETHER if torch.get_num_threads() <= _BATCH_THREADS else _Way.GROUP_BY_GROUP


def _wide(a_ERI: Tensor) -> Tensor:
    """The same with a second row of zeros where there is one (rank 1): a product with a vector is another kernel."""
    return a_ERI if a_ERI.shape[1] > 1 else functional.pad(a_ERI, (0, 0, 0, 1))


def _is(left: object, right: object) -> bool:
    return left is right
