"""Pool, blocks and scratches: who may look at what, and what is held when nobody does."""

from __future__ import annotations

import gc

import pytest
import torch
from arena_builders import CPU, GROUPS, ShapesOnly, add_gradient, assert_same, make_run, numbers, random_gradient

from treadle.domain.ops import AdamParams, LoraSpec
from treadle.engine.adapter import AdapterArena, AdapterLayout, adapter_layout
from treadle.engine.arenas import ArenaPool
from treadle.engine.optim import adamw_step
from treadle.engine.state import commit_scratch, placed_state
from treadle.errors import NonFiniteResult


def layout_of(rank: int) -> AdapterLayout:
    return adapter_layout(GROUPS, LoraSpec(rank=rank, seed=0))


def test_taken_gradient_is_zero_whatever_the_last_taker_left() -> None:
    rank_class = ArenaPool(CPU).rank_class(layout_of(4))
    first = rank_class.take_gradient()
    address = first.flat.data_ptr()
    first.flat.fill_(torch.nan)
    first.release()
    second = rank_class.take_gradient()
    assert second.flat.data_ptr() == address, "memory is used again"
    assert not second.flat.any()


def test_moments_of_a_taken_slot_are_zero() -> None:
    rank_class = ArenaPool(CPU).rank_class(layout_of(4))
    for _ in range(3):
        slot = rank_class.take_slot()
        assert not slot.arenas[1].any()
        assert not slot.arenas[2].any()
        for arena in slot.arenas:
            arena.fill_(torch.nan)
        slot.release()


def test_blocks_of_a_class_are_rows_of_few_pages_and_never_move() -> None:
    rank_class = ArenaPool(CPU).rank_class(layout_of(2))
    slots = []
    for index in range(40):
        slots.append(rank_class.take_slot())
        slots[-1].arenas[0].fill_(index)
    addresses = [slot.arenas[0].data_ptr() for slot in slots]
    assert len(set(addresses)) == 40
    pages = {slot.page_KSN.data_ptr() for slot in slots}
    assert len(pages) < 10
    for index, slot in enumerate(slots):
        assert slot.page_KSN[0, slot.row].data_ptr() == addresses[index]
        assert bool((slot.arenas[0] == index).all())
        assert slot.arenas[0].data_ptr() % 64 == 0, "kernels see aligned operands"


def test_classes_do_not_share_pages_and_equal_layouts_share_a_class() -> None:
    pool = ArenaPool(CPU)
    assert pool.rank_class(layout_of(2)) is pool.rank_class(layout_of(2))
    ours, theirs = (pool.rank_class(layout_of(rank)).take_slot() for rank in (2, 3))
    assert ours.page_KSN.data_ptr() != theirs.page_KSN.data_ptr()


@pytest.mark.parametrize("num_slots", [1, 5, 33])
def test_nothing_is_held_when_nothing_is_taken(num_slots: int) -> None:
    pool = ArenaPool(CPU, max_idle_bytes=0)
    rank_class = pool.rank_class(layout_of(2))
    blocks = [take() for _ in range(num_slots) for take in (rank_class.take_slot, rank_class.take_gradient)]
    assert pool.num_taken_bytes == num_slots * 4 * layout_of(2).num_elements * 4
    assert pool.num_taken_bytes <= pool.num_held_bytes <= 2 * pool.num_taken_bytes
    for block in blocks:
        block.release()
    assert (pool.num_taken_bytes, pool.num_held_bytes) == (0, 0)


def test_idle_pages_are_kept_up_to_their_limit_and_trimmed_on_request() -> None:
    layout = layout_of(2)
    num_bytes = layout.num_elements * 4
    pool = ArenaPool(CPU, max_idle_bytes=2 * num_bytes)
    gradients = [pool.rank_class(layout).take_gradient() for _ in range(8)]
    for gradient in gradients:
        gradient.release()
    assert 0 < pool.num_held_bytes <= 2 * num_bytes
    pool.trim()
    assert pool.num_held_bytes == 0


def test_as_much_may_be_idle_as_is_taken() -> None:
    pool = ArenaPool(CPU, max_idle_bytes=0)
    rank_class = pool.rank_class(layout_of(2))
    slots = [rank_class.take_slot() for _ in range(4)]
    addresses = set()
    for _ in range(3):
        gradients = [rank_class.take_gradient() for _ in range(4)]
        addresses |= {gradient.flat.data_ptr() for gradient in gradients}
        for gradient in gradients:
            gradient.release()
    assert len(addresses) == 4, "gradients of runs that stay use the same memory in every cycle"
    for slot in slots:
        slot.release()
    assert pool.num_held_bytes == 0


def test_other_devices_keep_no_idle_pages_by_default() -> None:
    # The meta device stands in: only where the pool's memory goes is looked at.
    pool = ArenaPool(torch.device("meta"))
    gradient = pool.rank_class(layout_of(2)).take_gradient()
    assert pool.num_held_bytes > 0
    gradient.release()
    assert pool.num_held_bytes == 0


def test_giving_back_twice_is_a_bug() -> None:
    base = ShapesOnly()
    gradient = base.arenas.rank_class(layout_of(2)).take_gradient()
    gradient.release()
    with pytest.raises(AssertionError, match="once"):
        gradient.release()
    state = make_run(base, 2, seed=0)
    state.release()
    with pytest.raises(AssertionError, match="once"):
        state.release()
    with pytest.raises(AssertionError):
        state.new_scratch()
    with pytest.raises(AssertionError):
        adamw_step(state, AdamParams())


def test_dropped_block_is_not_used_again_and_its_memory_goes_with_its_last_view() -> None:
    base = ShapesOnly()
    flat = make_run(base, 2, seed=0).weights.flat
    gc.collect()
    kept = flat.clone()
    others = [make_run(base, 2, seed=seed) for seed in range(1, 6)]
    assert torch.equal(flat, kept), "a view outlives the state that was dropped"
    assert all(other.weights.flat.data_ptr() != flat.data_ptr() for other in others)
    for other in others:
        other.release()
    base.arenas.trim()
    assert (base.arenas.num_taken_bytes, base.arenas.num_held_bytes) == (0, 0)
    assert torch.equal(flat, kept)


def test_released_state_gives_everything_back() -> None:
    base = ShapesOnly()
    state = make_run(base, 4, seed=0)
    add_gradient(state, random_gradient(state, 1))
    assert base.arenas.num_taken_bytes == 4 * state.weights.flat.nbytes
    state.release()
    assert base.arenas.num_taken_bytes == 0


def test_step_gives_the_open_gradient_back() -> None:
    base = ShapesOnly()
    state = make_run(base, 4, seed=0)
    add_gradient(state, random_gradient(state, 1))
    adamw_step(state, AdamParams())
    assert base.arenas.num_taken_bytes == 3 * state.weights.flat.nbytes


def test_first_commit_takes_the_scratch_over_and_later_ones_add_up() -> None:
    base = ShapesOnly()
    state = make_run(base, 4, seed=0)
    gradients = [random_gradient(state, seed) for seed in range(3)]
    gradients[0][0] = -0.0
    scratch = state.new_scratch()
    scratch.flat.copy_(gradients[0])
    commit_scratch(state, scratch)
    assert state.grads is scratch
    assert torch.signbit(scratch.flat[0]), "no zero was added to it"
    add_gradient(state, gradients[1])
    add_gradient(state, gradients[2])
    assert state.num_open_passes == 3
    assert state.grads is not None
    assert torch.equal(state.grads.flat, gradients[0] + gradients[1] + gradients[2])
    assert base.arenas.num_taken_bytes == 4 * state.weights.flat.nbytes


@pytest.mark.parametrize(
    ("poison", "has_open"),
    [(torch.nan, False), (torch.inf, False), (torch.nan, True), (-torch.inf, True), (3e38, True)],
)
def test_refused_commit_changes_nothing_and_gives_the_scratch_back(poison: float, has_open: bool) -> None:
    base = ShapesOnly()
    state = make_run(base, 4, seed=0)
    if has_open:
        add_gradient(state, torch.full((state.layout.num_elements,), 1e15))
    before, taken = numbers(state), base.arenas.num_taken_bytes
    scratch = state.new_scratch()
    scratch.flat[7] = poison
    with pytest.raises(NonFiniteResult, match="gradient"):
        commit_scratch(state, scratch)
    assert_same(numbers(state), before)
    assert base.arenas.num_taken_bytes == taken
    assert scratch.is_released
    clean = state.new_scratch()
    assert not clean.flat.any()


def test_views_of_a_scratch_are_its_own_row() -> None:
    state = make_run(ShapesOnly(), 3, seed=0)
    scratches = [state.new_scratch() for _ in range(5)]
    for index, scratch in enumerate(scratches):
        for module in scratch.modules:
            scratch.a(module).fill_(index)
            scratch.b(module).fill_(-index)
        for places in state.layout.groups:
            group = scratch.group(places.group.name)
            assert group is not None
            assert bool((group.a == index).all())
    for index, scratch in enumerate(scratches):
        plain = AdapterArena(state.layout, scratch.flat)
        for module in scratch.modules:
            assert torch.equal(plain.a(module), scratch.a(module))
            assert bool((plain.b(module) == -index).all())


def test_placed_state_is_a_copy() -> None:
    base = ShapesOnly()
    state = make_run(base, 4, seed=0)
    add_gradient(state, random_gradient(state, 1))
    adamw_step(state, AdamParams())
    add_gradient(state, random_gradient(state, 2))
    assert state.grads is not None
    twin = placed_state(
        base,
        state.spec,
        state.weights.flat,
        exp_avg=state.exp_avg,
        exp_avg_sq=state.exp_avg_sq,
        grads=state.grads.flat,
        step=state.step,
        num_open_passes=state.num_open_passes,
    )
    assert_same(numbers(twin), numbers(state))
    assert (twin.step, twin.num_open_passes) == (1, 1)
    before = numbers(state)
    metrics = adamw_step(twin, AdamParams())
    assert_same(numbers(state), before)
    assert adamw_step(state, AdamParams()) == metrics
    assert_same(numbers(twin), numbers(state))
