"""Snapshots are written beside training: which states are taken, and what a slow or broken disk does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest
from worker_support import Driver, MemoryBlobs, create, datums, item, model_id, new_driver, passed, step

from treadle.domain.outcome import SnapshotWritten
from treadle.domain.plan import StateTag
from treadle.executor.messages import CallDone, Progress, Snapshot, Stop
from treadle.executor.serving import WorkerService
from treadle.worker.compute import ComputeLoop
from treadle.worker.snapshots import SnapshotCall, Snapshots, SnapshotsDone
from treadle.worker.work import DecodedCycle

PATIENCE_S = 20.0


class SlowDisk(MemoryBlobs):
    """Writes one blob for each time that `let` is called."""

    def __init__(self) -> None:
        super().__init__()
        self._turns = threading.Semaphore(0)
        self.full: set[str] = set()

    def let(self, num_blobs: int = 1) -> None:
        self._turns.release(num_blobs)

    def write(self, key: str, data: bytes) -> int:
        assert self._turns.acquire(timeout=PATIENCE_S)
        if key in self.full:
            raise OSError(28, "No space left on device")
        return super().write(key, data)


class Bell:
    """Counts how often it is rung, and waits for it."""

    def __init__(self) -> None:
        self._rung = threading.Semaphore(0)

    def ring(self) -> None:
        self._rung.release()

    def wait(self) -> None:
        assert self._rung.acquire(timeout=PATIENCE_S)


@pytest.fixture
def disk() -> Iterator[SlowDisk]:
    disk = SlowDisk()
    yield disk
    disk.let(100)


@pytest.fixture
def bell() -> Bell:
    return Bell()


def tag(index: int, seq_id: int = 0) -> StateTag:
    return StateTag(model_id(index), 1, seq_id)


def snapshots_of(disk: SlowDisk, bell: Bell, *, max_bytes: int) -> Snapshots:
    """Every run's file is ten bytes long."""
    return Snapshots(
        encode=lambda one, _: f"{one.model_id[-2:]:>10}".encode(), write=disk.write, wake=bell.ring, max_bytes=max_bytes
    )


def test_a_call_is_answered_when_all_of_it_is_durable(disk: SlowDisk, bell: Bell) -> None:
    snapshots = snapshots_of(disk, bell, max_bytes=1_000)
    snapshots.ask(SnapshotCall(7, ((tag(0), "a"), (tag(1), "b"))))
    snapshots.ask(SnapshotCall(8, ((tag(2), "c"),)))
    for _ in range(3):
        assert snapshots.has_work
        assert not snapshots.run_one()
    assert not snapshots.has_work
    for key in ("a", "b", "c"):
        disk.let()
        bell.wait()
        assert snapshots.has_work
        done = snapshots.run_one()
        assert key in disk.blobs
        if key == "a":
            assert not done
        elif key == "b":
            (first,) = done
            assert first.call_id == 7
            assert first.written.keys() == {model_id(0), model_id(1)}
            assert all(one.num_bytes == 10 and one.compute_s >= 0 for one in first.written.values())
        else:
            assert [one.call_id for one in done] == [8]
    assert not snapshots.is_open


def test_what_waits_for_the_disk_is_bounded(disk: SlowDisk, bell: Bell) -> None:
    encoded: list[StateTag] = []

    def encode(one: StateTag, _with_open_gradient: bool) -> bytes:
        encoded.append(one)
        return b"0123456789"

    snapshots = Snapshots(encode=encode, write=disk.write, wake=bell.ring, max_bytes=15)
    snapshots.ask(SnapshotCall(1, tuple((tag(index), str(index)) for index in range(4))))
    for _ in range(5):
        snapshots.run_one()
    # One more than fits: what a state needs is known only when it is encoded.
    assert encoded == [tag(0), tag(1)]
    assert not snapshots.has_work
    disk.let()
    bell.wait()
    snapshots.run_one()
    assert encoded == [tag(0), tag(1), tag(2)]
    disk.let(3)
    done: list[SnapshotsDone] = []
    while not done:
        bell.wait()
        done += snapshots.run_one()
    assert done[0].written.keys() == {model_id(index) for index in range(4)}


def test_an_empty_call_is_answered_at_once(disk: SlowDisk, bell: Bell) -> None:
    snapshots = snapshots_of(disk, bell, max_bytes=10)
    snapshots.ask(SnapshotCall(3, ()))
    assert snapshots.has_work
    assert snapshots.run_one() == [SnapshotsDone(3, {})]


def test_a_run_that_cannot_be_written_costs_the_others_nothing(disk: SlowDisk, bell: Bell) -> None:
    disk.full = {"full"}
    snapshots = snapshots_of(disk, bell, max_bytes=1_000)
    snapshots.ask(SnapshotCall(1, ((tag(0), "first"), (tag(1), "full"), (tag(2), "last"))))
    disk.let(3)
    done: list[SnapshotsDone] = []
    while not done:
        done += snapshots.run_one()
        if not snapshots.has_work and not done:
            bell.wait()
    assert done[0].written.keys() == {model_id(0), model_id(2)}


def test_only_states_at_that_tag_and_without_open_passes_are_taken(driver: Driver) -> None:
    driver.run_ops(create(model_id(0)), create(model_id(1)), passed(model_id(1), 1, datums(1, 8)), create(model_id(2)))
    two_quanta = passed(model_id(2), 1, datums(2, 1_500))
    driver.run([item(two_quanta, quanta=(0, 1))])

    def is_taken(one: StateTag, *, with_open_gradient: bool) -> bool:
        return driver.worker.encode_snapshot(one, with_open_gradient) is not None

    assert [is_taken(tag(0, seq_id), with_open_gradient=False) for seq_id in (0, 1)] == [True, False]
    assert not is_taken(StateTag(model_id(0), 2, 0), with_open_gradient=True)
    assert not is_taken(tag(9), with_open_gradient=True)
    for open_run in (tag(1, 1), tag(2)):
        assert not is_taken(open_run, with_open_gradient=False)
        assert is_taken(open_run, with_open_gradient=True)
    driver.run_ops(step(model_id(1), 2))
    assert is_taken(tag(1, 2), with_open_gradient=False)


def test_a_parked_run_with_an_open_gradient_stays_where_it_is(
    make_driver: Callable[..., Driver], tmp_path: Path
) -> None:
    driver = make_driver(parking_dir=tmp_path)
    driver.run_ops(create(model_id(0)), passed(model_id(0), 1, datums(1, 8)))
    driver.worker._slots.park_all(busy=())
    assert driver.worker.encode_snapshot(tag(0, 1), with_open_gradient=False) is None
    assert driver.worker._slots.is_parked(model_id(0))


def test_a_worker_that_only_waits_for_a_disk_says_that_it_is_alive(disk: SlowDisk) -> None:
    """Or it would count as hung, and what it holds would be lost because a disk is slow."""
    driver = new_driver(disk)
    driver.run_ops(create(model_id(0)))
    ours, theirs = Pipe(duplex=True)
    child = WorkerService(theirs.send)
    child.put(Snapshot(5, ((tag(0), "a"),), with_open_gradient=False))
    serving = threading.Thread(target=child.serve, args=(driver.worker,))
    serving.start()
    try:
        for _ in range(2):
            assert ours.poll(PATIENCE_S)
            assert isinstance(ours.recv(), Progress)
        disk.let()
        while isinstance(message := ours.recv(), Progress):
            pass
        assert isinstance(message, CallDone)
        assert message.written.keys() == {model_id(0)}
    finally:
        child.put(Stop())
        serving.join()
        ours.close()
        theirs.close()


def test_training_goes_on_while_the_disk_is_busy(disk: SlowDisk, bell: Bell) -> None:
    driver = new_driver(disk)
    driver.run_ops(create(model_id(0)), create(model_id(1)))
    before = driver.worker.encode_snapshot(tag(0), with_open_gradient=False)
    loop = ComputeLoop(driver.worker, wake=bell.ring)
    loop.ask_snapshots(SnapshotCall(1, ((tag(0), "a"),)))
    items = [item(passed(model_id(0), 1, datums(1, 8))), item(step(model_id(0), 2))]
    loop.begin_cycle(DecodedCycle(1, 2, tuple(items)))
    while (finished := loop.run_unit()).cycle is None:
        assert not finished.snapshots
    assert [one.failure for one in finished.cycle.outcomes] == [None, None]
    assert loop.is_writing
    assert not loop.has_work
    assert loop.idle_s is not None
    disk.let()
    bell.wait()
    assert loop.has_work
    (done,) = loop.run_unit().snapshots
    assert done.written.keys() == {model_id(0)}
    assert isinstance(done.written[model_id(0)], SnapshotWritten)
    assert disk.blobs["a"] == before, "the state of when it was asked for"
