"""Device memory for adapters: who has which block, and what is free.

Blocks of one rank class (equal layouts) are rows of a few tensors, its pages; a block is taken, given back and taken
again. Growth adds pages and moves nothing, so views of a taken block stay good. This module knows no training: what
is in a block is its taker's business, except that gradients and moments are zero when it is taken.
Invariant: a row is taken again only after its taker said that nothing refers to it (`release`); one that was merely
dropped is never used again, and its memory goes when the last view of it goes.

Not thread-safe: one compute thread owns a pool. Only dropping a block is allowed anywhere.

Legend: K kinds (arenas per slot), S slots of a page, N numbers of an arena.
"""

from __future__ import annotations

import weakref
from collections import deque
from heapq import heappop, heappush

import torch
from torch import Tensor

from treadle.engine.adapter import AdapterArena, AdapterLayout

# Slots of one page: enough that stacked work has few pages to go over, few enough that a page empties again.
_MAX_PAGE_SLOTS = 16
# Bytes of one page with more than one slot: large adapters gain nothing from neighbours and lose whole pages to them.
_MAX_PAGE_BYTES = 64 * 2**20
# Bytes of empty pages kept for the next taker, over all classes, on a CPU (or as much as is taken, if that is more: the
# gradients of all runs are free between two passes). Fresh memory costs a page fault per 4 KiB, several times what
# clearing a used block costs. On other devices torch's own allocator is that cache, so we keep none.
_MAX_IDLE_BYTES_CPU = 64 * 2**20

# The arenas of a slot, in this order: weights, exp_avg, exp_avg_sq.
_NUM_SLOT_KINDS = 3


class ArenaPool:
    """All adapter memory of one device, but for what others copied out of it.

    max_idle_bytes: what a CPU's pool keeps of empty pages, whatever is taken; other devices' pools keep none.
    """

    def __init__(self, device: torch.device, *, max_idle_bytes: int | None = None) -> None:
        self.device = device
        self._max_idle_bytes = max_idle_bytes if max_idle_bytes is not None else _MAX_IDLE_BYTES_CPU
        self._num_taken_bytes = 0
        self._classes: dict[AdapterLayout, RankClass] = {}
        # Empty pages, the longest empty first.
        self._idle: dict[_Page, None] = {}
        # Rows whose blocks were dropped without release. Finalizers run wherever the last reference dies, possibly
        # amid our own work, so they only leave a note here.
        self._lost: deque[tuple[_Page, int]] = deque()

    def rank_class(self, layout: AdapterLayout) -> RankClass:
        """The class of all adapters of this layout. Equal layouts have one class; hashing one is slow: keep it."""
        known = self._classes.get(layout)
        if known is None:
            known = self._classes[layout] = RankClass(self, layout)
        return known

    @property
    def num_held_bytes(self) -> int:
        """Bytes of all pages, empty ones included."""
        self._reap()
        shelves = [shelf for known in self._classes.values() for shelf in known.shelves]
        return sum(page.num_bytes for shelf in shelves for page in shelf.pages)

    @property
    def num_taken_bytes(self) -> int:
        """Bytes of the blocks that are taken."""
        self._reap()
        return self._num_taken_bytes

    def trim(self) -> None:
        """Give all empty pages back to torch's allocator."""
        self._reap()
        self._drop_idle(0)

    def _take(self, shelf: _Shelf) -> Block:
        self._reap()
        page = next((page for page in shelf.pages if page.free), None)
        if page is None:
            page = _Page(shelf, self.device)
            shelf.pages.append(page)
        self._idle.pop(page, None)
        row = heappop(page.free)
        page.num_taken += 1
        self._num_taken_bytes += page.num_slot_bytes
        return Block(self, page, row)

    def _give(self, page: _Page, row: int) -> None:
        assert row not in page.free
        heappush(page.free, row)
        self._leave(page)
        self._reap()

    def _leave(self, page: _Page) -> None:
        """A row of the page is no longer taken; an empty page becomes idle, or goes."""
        page.num_taken -= 1
        self._num_taken_bytes -= page.num_slot_bytes
        assert page.num_taken >= 0
        if page.num_taken == 0:
            if len(page.free) == page.num_slots:
                self._idle[page] = None
            else:
                # Somebody may still look at a lost row: let the page live for as long as they do, and no longer.
                page.shelf.pages.remove(page)
        self._drop_idle(self._idle_limit())

    def _idle_limit(self) -> int:
        if self.device.type != "cpu":
            return 0
        return max(self._max_idle_bytes, self._num_taken_bytes)

    def _drop_idle(self, max_bytes: int) -> None:
        """Drop empty pages until the rest fits: those that alone are too large, then the longest empty."""
        num_bytes = sum(page.num_bytes for page in self._idle)
        for page in sorted(self._idle, key=lambda page: page.num_bytes <= max_bytes):
            if num_bytes <= max_bytes:
                return
            del self._idle[page]
            page.shelf.pages.remove(page)
            num_bytes -= page.num_bytes

    def _reap(self) -> None:
        while self._lost:
            page, _ = self._lost.popleft()
            self._leave(page)


class RankClass:
    """The blocks of all adapters of one layout."""

    __slots__ = ("_gradients", "_pool", "_slots", "layout")

    def __init__(self, pool: ArenaPool, layout: AdapterLayout) -> None:
        self.layout = layout
        self._pool = pool
        self._slots = _Shelf(layout, _NUM_SLOT_KINDS)
        self._gradients = _Shelf(layout, 1)

    @property
    def shelves(self) -> tuple[_Shelf, _Shelf]:
        return self._slots, self._gradients

    def take_slot(self) -> Block:
        """A slot for a run: weights, exp_avg, exp_avg_sq. Moments are zero; weights hold anything: write them whole."""
        block = self._pool._take(self._slots)
        for moments in block.arenas[1:]:
            moments.zero_()
        return block

    def take_gradient(self) -> GradientArena:
        """A gradient arena, zero everywhere whatever its last taker left in it."""
        block = self._pool._take(self._gradients)
        block.arenas[0].zero_()
        return GradientArena(block)


class Block:
    """One taken row: a flat float32 arena per kind.

    page_KSN and row say where it lies, for work that is stacked over a page. Its memory is its taker's until
    `release`; whoever drops it without has thrown the row away, which is safe and wasteful.
    """

    __slots__ = ("__weakref__", "_finalizer", "_page", "_pool", "arenas", "page_KSN", "row")

    def __init__(self, pool: ArenaPool, page: _Page, row: int) -> None:
        self._pool = pool
        self._page = page
        self.page_KSN = page.page_KSN
        self.row = row
        self.arenas: tuple[Tensor, ...] = page.page_KSN[:, row].unbind()
        self._finalizer = weakref.finalize(self, pool._lost.append, (page, row))
        self._finalizer.atexit = False

    @property
    def is_released(self) -> bool:
        return not self._finalizer.alive

    def views(self) -> AdapterArena:
        """The first arena seen as A and B of each projection; made once per row, since that costs a millisecond."""
        return self._page.views(self.row)

    def release(self) -> None:
        """Give the row back: nothing may look at its memory any more. Once only."""
        assert not self.is_released, "a block is given back once"
        self._finalizer.detach()
        self._pool._give(self._page, self.row)


class GradientArena(AdapterArena):
    """A gradient in a block of a pool. norm: its L2 norm where that is known already, else None."""

    __slots__ = ("_block", "norm")

    def __init__(self, block: Block) -> None:
        views = block.views()
        self.layout = views.layout
        self.flat = views.flat
        self._groups = views._groups
        self._pairs = views._pairs
        self._block = block
        self.norm: float | None = None

    @property
    def is_released(self) -> bool:
        return self._block.is_released

    def release(self) -> None:
        """Give the memory back, whatever is in it; the next taker finds zeros. Once only."""
        self._block.release()


class _Shelf:
    """The pages of one class and number of kinds."""

    __slots__ = ("layout", "num_kinds", "pages")

    def __init__(self, layout: AdapterLayout, num_kinds: int) -> None:
        self.layout = layout
        self.num_kinds = num_kinds
        self.pages: list[_Page] = []


class _Page:
    """One tensor of several slots. free: a heap of its free rows. Rows neither free nor taken are lost."""

    __slots__ = ("_views", "free", "num_slots", "num_taken", "page_KSN", "shelf")

    num_slots: int
    page_KSN: Tensor

    def __init__(self, shelf: _Shelf, device: torch.device) -> None:
        num_elements = shelf.layout.num_elements
        num_slot_bytes = shelf.num_kinds * num_elements * torch.float32.itemsize
        # As many slots as there are, so that a class never holds more than twice its peak.
        num_held = sum(page.num_slots for page in shelf.pages)
        self.num_slots = max(1, min(num_held, _MAX_PAGE_SLOTS, _MAX_PAGE_BYTES // num_slot_bytes))
        self.shelf = shelf
        self.page_KSN = torch.empty((shelf.num_kinds, self.num_slots, num_elements), dtype=torch.float32, device=device)
        self.free = list(range(self.num_slots))
        self.num_taken = 0
        self._views: list[AdapterArena | None] = [None] * self.num_slots

    @property
    def num_slot_bytes(self) -> int:
        return self.num_bytes // self.num_slots

    @property
    def num_bytes(self) -> int:
        return self.page_KSN.nbytes

    def views(self, row: int) -> AdapterArena:
        views = self._views[row]
        if views is None:
            views = self._views[row] = AdapterArena(self.shelf.layout, self.page_KSN[0, row])
        return views
