"""Runs without work leave memory and come back, bit for bit; whatever the disk does, no run is lost by it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from worker_support import Driver, MemoryBlobs, create, datums, item, metrics_of, model_id, passed, publish, save, step

from treadle.config import bundled_model_dir
from treadle.domain.ids import BlobKey, ModelId
from treadle.domain.limits import PARK_AFTER_S
from treadle.domain.ops import LoadWeightsOp, LoraSpec, UnloadModelOp
from treadle.domain.plan import RestoreItem, StateTag
from treadle.engine.base_model import BaseModel, load_base_model
from treadle.engine.state import TrainingState, commit_scratch, new_training_state
from treadle.errors import StaleTag
from treadle.testing.clock import ManualClock
from treadle.worker import micro_batches, parking
from treadle.worker.compute import ComputeLoop
from treadle.worker.parking import FileShelf, ParkedRun, PinnedShelf, park, unpark
from treadle.worker.slots import ParkingRules, Slots


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base_model(str(bundled_model_dir()), name="treadle/tiny", device="cpu", dtype="float32", num_threads=1)


def trained_state(base: BaseModel, *, seed: int, rank: int = 4, has_grads: bool = False) -> TrainingState:
    """A run with random numbers everywhere, as if trained."""
    state = new_training_state(base, LoraSpec(rank=rank, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for vector in (state.weights.flat, state.exp_avg, state.exp_avg_sq):
        vector.normal_(generator=generator)
    state.magnitudes = None
    if has_grads:
        scratch = state.new_scratch()
        scratch.flat.normal_(generator=generator)
        commit_scratch(state, scratch)
    state.step = 7
    return state


def bits(state: TrainingState) -> tuple[object, ...]:
    grads = None if state.grads is None else state.grads.flat.numpy().tobytes()
    vectors = (state.weights.flat, state.exp_avg, state.exp_avg_sq)
    return (
        *(vector.numpy().tobytes() for vector in vectors),
        grads,
        state.step,
        state.num_open_passes,
        state.spec,
        state.weights.scale,
        state.magnitudes,
    )


@pytest.mark.parametrize("has_grads", [False, True])
def test_a_parked_run_comes_back_bit_for_bit(base: BaseModel, tmp_path: Path, has_grads: bool) -> None:
    shelf = FileShelf(tmp_path)
    states = [trained_state(base, seed=seed, rank=rank, has_grads=has_grads) for seed, rank in ((1, 4), (2, 8), (3, 4))]
    expected = [bits(state) for state in states]
    parked = [park(state, [shelf]) for state in states]
    assert all(state.is_released for state in states)
    for run, numbers in reversed(list(zip(parked, expected, strict=True))):
        assert run is not None
        assert bits(unpark(run, base)) == numbers
    assert shelf.num_bytes == 0, "an empty file takes no disk"


def test_the_file_has_no_name_and_freed_places_are_used_again(base: BaseModel, tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path / "parked")
    keeper = park(trained_state(base, seed=0), [shelf])
    size = shelf.num_bytes
    for seed in range(5):
        state = trained_state(base, seed=seed)
        expected = bits(state)
        run = park(state, [shelf])
        assert run is not None
        assert shelf.num_bytes == 2 * size
        assert bits(unpark(run, base)) == expected
    assert keeper is not None
    assert list((tmp_path / "parked").iterdir()) == []


def test_writes_and_reads_in_bits_and_pieces_are_put_together(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write, real_read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real_write(fd, data[:100_003], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_read(fd, [buffers[0][:70_001]], offset))
    state = trained_state(base, seed=1, has_grads=True)
    expected = bits(state)
    run = park(state, [FileShelf(tmp_path)])
    assert run is not None
    assert bits(unpark(run, base)) == expected


class FullDisk:
    """os.pwrite on a disk that fills up after so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._real = os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, descriptor: int, data: Any, offset: int) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return self._real(descriptor, data, offset)


def slots_with(base: BaseModel, shelves: Sequence[Any], clock: ManualClock, *, max_bytes: int = 0) -> Slots:
    rules = ParkingRules(shelves=tuple(shelves), after_s=60.0, max_resident_bytes=max_bytes)
    return Slots(base, rules, clock=clock.monotonic)


def tag(index: int) -> StateTag:
    return StateTag(model_id(index), 1, 0)


def test_a_full_disk_keeps_the_run_in_memory_and_is_tried_again_later(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, shelf = ManualClock(), FileShelf(tmp_path)
    slots = slots_with(base, [shelf], clock)
    state = trained_state(base, seed=1)
    expected = bits(state)
    slots.put(state, tag(0))
    clock.advance(60)
    disk = FullDisk(monkeypatch, room=state.weights.flat.nbytes + 100)
    assert not slots.park_one_due(busy=())
    assert slots.seconds_until_due(busy=()) == 60.0
    assert slots.resident_bytes > 0
    assert bits(slots.state(model_id(0))) == expected
    assert shelf.num_bytes == 0
    clock.advance(60)
    disk.room = 2**40
    assert slots.park_one_due(busy=())
    assert bits(slots.state(model_id(0))) == expected


def test_a_run_that_cannot_be_read_back_is_given_up_for_a_restore(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, shelf = ManualClock(), FileShelf(tmp_path)
    slots = slots_with(base, [shelf], clock)
    slots.put(trained_state(base, seed=1), tag(0))
    slots.park_all(busy=())
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(StaleTag, match="parked"):
            slots.state(model_id(0))
    assert slots.tag(model_id(0)) is None
    assert shelf.num_bytes == 0


def test_only_runs_idle_for_long_enough_are_parked_the_longest_idle_first(base: BaseModel, tmp_path: Path) -> None:
    clock = ManualClock()
    slots = slots_with(base, [FileShelf(tmp_path)], clock)
    for index in range(3):
        slots.put(trained_state(base, seed=index), tag(index))
        clock.advance(10)
    slots.state(model_id(0))
    assert slots.seconds_until_due(busy=()) == 40.0
    assert slots.seconds_until_due(busy={model_id(1)}) == 50.0
    assert not slots.park_one_due(busy=())
    clock.advance(40)
    assert slots.park_one_due(busy=())
    assert set(slots._parked) == {model_id(1)}
    assert not slots.park_one_due(busy=())
    clock.advance(3_600)
    assert slots.park_one_due(busy={model_id(2)})
    assert set(slots._parked) == {model_id(0), model_id(1)}
    assert not slots.park_one_due(busy={model_id(2)})


def test_without_a_shelf_nothing_is_ever_due(base: BaseModel) -> None:
    clock = ManualClock()
    slots = slots_with(base, [], clock)
    slots.put(trained_state(base, seed=1), tag(0))
    clock.advance(3_600)
    assert slots.seconds_until_due(busy=()) is None
    assert not slots.park_one_due(busy=())
    assert not slots.park_all(busy=())


def test_bytes_over_the_limit_leave_at_once(base: BaseModel, tmp_path: Path) -> None:
    clock = ManualClock()
    size = 3 * trained_state(base, seed=0).weights.flat.nbytes
    slots = slots_with(base, [FileShelf(tmp_path)], clock, max_bytes=2 * size)
    for index in range(5):
        slots.put(trained_state(base, seed=index), tag(index))
    slots.state(model_id(0))
    slots.park_over_limit(busy={model_id(2)})
    assert slots.resident_bytes == 2 * size
    assert set(slots._states) == {model_id(0), model_id(2)}


def test_a_shelf_without_room_hands_on_to_the_next(base: BaseModel, tmp_path: Path) -> None:
    state = trained_state(base, seed=1)
    expected = bits(state)
    run = park(state, [PinnedShelf(max_bytes=1_000), FileShelf(tmp_path)])
    assert isinstance(run, ParkedRun)
    assert isinstance(run.shelf, FileShelf)
    assert bits(unpark(run, base)) == expected


def test_host_memory_counts_what_it_holds(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pageable memory stands in for page-locked, which needs a GPU."""
    real = torch.empty

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", unpinned)
    state = trained_state(base, seed=1, has_grads=True)
    expected = bits(state)
    shelf = PinnedShelf(max_bytes=4 * state.weights.flat.nbytes)
    run = park(state, [shelf])
    assert run is not None
    second = trained_state(base, seed=2)
    assert park(second, [shelf]) is None
    assert not second.is_released
    assert bits(unpark(run, base)) == expected
    assert park(second, [shelf]) is not None


def test_dropped_runs_free_their_place(base: BaseModel, tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path)
    slots = slots_with(base, [shelf], ManualClock())
    for index in range(2):
        slots.put(trained_state(base, seed=index), tag(index))
    slots.park_all(busy=())
    slots.drop(model_id(0))
    slots.put(trained_state(base, seed=9), tag(1))
    assert shelf.num_bytes == 0
    assert slots.tag(model_id(0)) is None


# ---- through a worker


def weights_of(driver: Driver, run: ModelId) -> bytes:
    return driver.worker._slots.state(run).weights.flat.numpy().tobytes()


def park_everything(driver: Driver, clock: ManualClock) -> None:
    clock.advance(PARK_AFTER_S)
    for _ in range(1_000):
        if driver.worker.seconds_until_parking is None:
            break
        driver.worker.park_idle()
    assert driver.worker._slots.resident_bytes == 0


def test_training_goes_on_from_wherever_it_was_parked(make_driver: Callable[..., Driver], tmp_path: Path) -> None:
    run, clock = model_id(), ManualClock()
    parked, plain = make_driver(parking_dir=tmp_path, clock=clock), make_driver()
    ops = (
        create(run),
        passed(run, 1, datums(2, 12, seed=1)),
        passed(run, 2, datums(1, 9, seed=2)),
        step(run, 3),
        passed(run, 4, datums(1, 9, seed=3)),
        step(run, 5),
    )
    for op in ops:
        parked_outcome, plain_outcome = parked.run_ops(op)[0], plain.run_ops(op)[0]
        assert str(parked_outcome.result) == str(plain_outcome.result)
        park_everything(parked, clock)
    assert parked.snapshot(StateTag(run, 1, 5), "snapshot") == plain.snapshot(StateTag(run, 1, 5), "plain")
    park_everything(parked, clock)
    parked.run_ops(save(run, 6))
    park_everything(parked, clock)
    parked.run_ops(publish(run, 7))
    park_everything(parked, clock)
    assert weights_of(parked, run) == weights_of(plain, run)
    assert parked.run_ops(UnloadModelOp(run, 8))[0].tag_after is None


def test_a_run_with_a_pass_on_its_way_stays(make_driver: Callable[..., Driver], tmp_path: Path) -> None:
    run, clock = model_id(), ManualClock()
    driver = make_driver(parking_dir=tmp_path, clock=clock)
    op = passed(run, 1, datums(2, 1_500))
    driver.run_ops(create(run))
    driver.run([item(op, quanta=(0, 1))])
    clock.advance(3_600)
    driver.worker.park_idle()
    assert driver.worker.seconds_until_parking is None
    last, stepped = driver.run([item(op, quanta=(1, 2)), item(step(run, 2))]).outcomes
    assert last.failure is None
    assert metrics_of(stepped)["num_steps"] == 1


def test_two_hundred_idle_runs_hold_no_memory(
    make_driver: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    driver = make_driver(parking_dir=tmp_path, clock=clock)
    loop = ComputeLoop(driver.worker, wake=lambda: None)
    for start in range(0, 200, 50):
        runs = [model_id(index) for index in range(start, start + 50)]
        driver.run_ops(*(create(run, rank=1, seed=index) for index, run in enumerate(runs)))
        clock.advance(PARK_AFTER_S)
        while loop.idle_s is not None:
            assert loop.idle_s == 0.0
            loop.run_unit()
        assert driver.worker._slots.resident_bytes == 0
    states = driver.worker._slots
    assert len(states._parked) == 200
    # What an idle run still costs: its tag, and where it lies. No tensor, no layout.
    assert not any(isinstance(getattr(run, name), Tensor) for run in states._parked.values() for name in run.__slots__)
    fresh = make_driver()
    fresh.run_ops(create(model_id(3), rank=1, seed=3))
    assert weights_of(driver, model_id(153)) == weights_of(fresh, model_id(3))


def test_a_limit_in_bytes_holds_within_a_cycle(make_driver: Callable[..., Driver], tmp_path: Path) -> None:
    plain = make_driver()
    runs = [model_id(index) for index in range(6)]
    plain.run_ops(*(create(run, seed=index) for index, run in enumerate(runs)))
    size = plain.worker._slots.resident_bytes // 6
    driver = make_driver(parking_dir=tmp_path, max_resident_bytes=2 * size)
    driver.run_ops(*(create(run, seed=index) for index, run in enumerate(runs)))
    assert driver.worker._slots.resident_bytes <= 2 * size
    for driver_of in (plain, driver):
        driver_of.run_ops(*(passed(run, 1, datums(1, 8)) for run in runs), *(step(run, 2) for run in runs))
        driver_of.worker.park_idle()
    assert driver.worker._slots.resident_bytes <= 2 * size
    assert [weights_of(driver, run) for run in runs] == [weights_of(plain, run) for run in runs]


def test_idle_runs_make_room_for_one_that_does_not_fit(
    make_driver: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from treadle.worker import cycle

    driver = make_driver(parking_dir=tmp_path)
    driver.run_ops(create(model_id(0)), create(model_id(1)))
    real = cycle.new_training_state

    def tight(*args: Any) -> TrainingState:
        if driver.worker._slots.resident_bytes > 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(cycle, "new_training_state", tight)
    driver.run_ops(create(model_id(2)))
    driver.run_ops(*(passed(model_id(index), 1, datums(1, 8)) for index in range(3)))


def test_a_pass_longer_than_runs_may_idle_does_not_park_its_own_run(
    make_driver: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, run = ManualClock(), model_id()
    driver = make_driver(parking_dir=tmp_path, clock=clock)
    driver.run_ops(create(run))
    real = micro_batches.run_micro_batch

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock.advance(2 * PARK_AFTER_S)
        return real(*args, **kwargs)

    monkeypatch.setattr(micro_batches, "run_micro_batch", slow)
    driver.run_ops(passed(run, 1, datums(1, 8)))
    driver.worker.park_idle()
    assert not driver.worker._slots.is_parked(run)
    assert driver.worker.seconds_until_parking == PARK_AFTER_S


def test_runs_are_parked_between_samples_that_never_end(
    make_driver: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ManualClock()
    driver = make_driver(parking_dir=tmp_path, clock=clock)
    driver.run_ops(create(model_id()))
    monkeypatch.setattr(driver.worker, "_sampler", EndlessSampler())
    loop = ComputeLoop(driver.worker, wake=lambda: None)
    loop.run_unit()
    assert not driver.worker._slots.is_parked(model_id())
    clock.advance(PARK_AFTER_S)
    loop.run_unit()
    assert driver.worker._slots.is_parked(model_id())


class EndlessSampler:
    has_work = True

    def step(self, _max_s: float) -> list[Any]:
        return []

    def take_parts(self) -> list[Any]:
        return []


def test_a_drain_snapshots_parked_runs_without_bringing_them_all_back(
    make_driver: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory holds one run; the one that is there makes room for those that are read back."""
    driver, plain = make_driver(parking_dir=tmp_path), make_driver()
    runs = [model_id(index) for index in range(3)]
    for one in (driver, plain):
        one.run_ops(*(create(run, seed=index) for index, run in enumerate(runs)), passed(runs[1], 1, datums(1, 8)))
    slots, real = driver.worker._slots, parking.placed_state
    slots.park_all(busy=())
    driver.run_ops(passed(runs[1], 2, datums(1, 8, seed=1)))
    plain.run_ops(passed(runs[1], 2, datums(1, 8, seed=1)))

    def crowded(*args: Any, **kwargs: Any) -> TrainingState:
        if slots._states:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(parking, "placed_state", crowded)
    tags = [StateTag(runs[0], 1, 0), StateTag(runs[1], 1, 2), StateTag(runs[2], 1, 0)]
    crowded_files = [driver.worker.encode_snapshot(tag, with_open_gradient=True) for tag in tags]
    assert slots.is_parked(runs[0])
    assert slots.is_parked(runs[2])
    assert None not in crowded_files
    assert crowded_files == [plain.worker.encode_snapshot(tag, with_open_gradient=True) for tag in tags]


def test_restored_runs_stay_within_the_limit_in_bytes(make_driver: Callable[..., Driver], tmp_path: Path) -> None:
    driver = make_driver(parking_dir=tmp_path, max_resident_bytes=1)
    runs = [model_id(index) for index in range(3)]
    driver.run([], restores=[RestoreItem(run, LoraSpec(4, 1), None, StateTag(run, 2, 0)) for run in runs])
    assert all(driver.worker._slots.is_parked(run) for run in runs)


def test_published_versions_make_room_and_one_without_room_is_read_from_its_blob(
    make_driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    from treadle.engine.adapter import AdapterWeights

    driver, run = make_driver(), model_id()
    versions, real = driver.worker._versions, AdapterWeights.copy
    driver.run_ops(create(run))
    (first,) = driver.run_ops(publish(run, 1))

    def crowded(weights: AdapterWeights) -> AdapterWeights:
        if len(versions._by_key) >= room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(weights)

    monkeypatch.setattr(AdapterWeights, "copy", crowded)
    room = 1
    (second,) = driver.run_ops(publish(run, 2))
    assert list(versions._by_key) == [second.result.blob_key]  # type: ignore[union-attr]
    room = 0
    (third,) = driver.run_ops(publish(run, 3))
    assert not versions._by_key
    for outcome in (first, third):
        version = versions.get(outcome.result.blob_key)  # type: ignore[union-attr]
        assert version.flat.numpy().tobytes() == weights_of(driver, run)


def test_a_driver_without_page_locked_memory_left_hands_on_to_the_file(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.empty

    def refusing(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if pin_memory:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refusing)
    state = trained_state(base, seed=1)
    expected = bits(state)
    run = park(state, [PinnedShelf(max_bytes=2**40), FileShelf(tmp_path)])
    assert run is not None
    assert isinstance(run.shelf, FileShelf)
    assert bits(unpark(run, base)) == expected


def test_nobody_else_may_read_the_file(base: BaseModel, tmp_path: Path) -> None:
    shelf = FileShelf(tmp_path / "parked")
    assert park(trained_state(base, seed=1), [shelf]) is not None
    assert shelf._file is not None
    status = os.fstat(shelf._file.fileno())
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0, "a name would outlive a killed worker"
    assert status.st_size > 0


def test_restored_and_loaded_runs_lie_where_all_others_do(
    make_driver: Callable[..., Driver], blobs: MemoryBlobs, tmp_path: Path
) -> None:
    """Memory of their own would stay with the process when they are parked."""
    clock, run = ManualClock(), model_id()
    driver = make_driver(parking_dir=tmp_path, clock=clock)
    driver.run_ops(create(run), passed(run, 1, datums(1, 8)), save(run, 2))
    key = next(iter(blobs.blobs))
    driver.worker.evict([run])
    pool = driver.worker._base.arenas
    assert pool.num_taken_bytes == 0
    restore = RestoreItem(run, LoraSpec(8, 1), BlobKey(key), StateTag(run, 2, 2))
    load = LoadWeightsOp(model_id(1), 0, "tinker://x", BlobKey(key), LoraSpec(8, 1), True, True)
    driver.run([item(load)], restores=[restore])
    for one in (run, model_id(1)):
        assert driver.worker._slots.state(one).slot is not None
    assert pool.num_taken_bytes == driver.worker._slots.resident_bytes > 0
    park_everything(driver, clock)
    assert pool.num_taken_bytes == 0
