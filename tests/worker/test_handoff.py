"""Sampler versions in shared memory: found at once, durable later, and not lost with any process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from worker_support import Driver, MemoryBlobs, create, datums, hand_off, item, model_id, passed, publish, step

from treadle.blobs import LocalBlobs
from treadle.domain.ids import BlobKey, RequestId, SamplingSessionId, TenantId
from treadle.domain.limits import WEIGHTS_ON_THEIR_WAY_S
from treadle.domain.ops import SampleOp, SamplingParams
from treadle.domain.outcome import BlobResult, SampleOutcome
from treadle.errors import ConfigError, NotFound, StoreUnavailable
from treadle.testing.clock import ManualClock
from treadle.worker import staging
from treadle.worker.handoff import Handoff
from treadle.worker.staging import StagingArea, staging_place
from treadle.worker.work import DecodedSample
from treadle.worker.write_behind import WriteBehind

KEY = "states/s_train_0/a.safetensors"
DATA = bytes(range(256)) * 500
PATIENCE_S = 30.0


class Store(MemoryBlobs):
    """A blob store that can be away, and that holds its writers up until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = False
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.num_tries = 0

    def write(self, key: str, data: bytes) -> int:
        self.num_tries += 1
        assert self.goes_on.wait(PATIENCE_S)
        if self.is_away:
            raise StoreUnavailable("the blob store could not write: no space left on device")
        return super().write(key, data)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def files_in(root: Path) -> list[Path]:
    # Folders may go while they are looked through, which a walk does not mind.
    return sorted(Path(folder, name) for folder, _, names in os.walk(root) for name in names)


@contextmanager
def written_behind(root: Path, store: Store, **options: float) -> Iterator[tuple[StagingArea, WriteBehind]]:
    area = StagingArea(root)
    behind = WriteBehind(area, store, write_after_s=0.0, **options)  # type: ignore[arg-type]
    try:
        yield area, behind
    finally:
        store.goes_on.set()
        store.is_away = False
        behind.close(PATIENCE_S)
        area.close()


def test_a_version_is_readable_by_all_at_once_and_durable_later(tmp_path: Path) -> None:
    store, root = Store(), tmp_path / "staged"
    store.goes_on.clear()
    with written_behind(root, store, keep_durable_s=0.0) as (_, behind):
        assert behind.offer(KEY, DATA)
        other = StagingArea(root)
        assert other.read(KEY) == DATA
        assert other.read("states/s_train_0/b.safetensors") is None
        assert not store.blobs
        for path in [root, *root.rglob("*")]:
            assert path.stat().st_mode & 0o077 == 0, "nobody else may look"
        store.goes_on.set()
        # Gone from memory only when it is durable.
        wait_until(lambda: other.read(KEY) is None)
        assert store.blobs == {KEY: DATA}
        other.close()
    assert not root.exists()


def test_what_is_staged_is_bounded_and_the_rest_is_written_first(tmp_path: Path) -> None:
    store = Store()
    with written_behind(tmp_path / "staged", store, max_bytes=2 * len(DATA), max_files=3) as (area, behind):
        assert behind.offer("a", DATA)
        wait_until(lambda: "a" in store.blobs)
        store.goes_on.clear()
        # What is durable makes way, what is not stays; a file count is a bound of its own.
        assert [behind.offer(key, DATA) for key in "bcd"] == [True, True, False]
        assert [area.read(key) is not None for key in "abcd"] == [False, True, True, False]
        assert len(files_in(tmp_path)) == 2
        store.goes_on.set()
        wait_until(lambda: set(store.blobs) == set("abc"))
        store.goes_on.clear()
        assert [behind.offer(key, b"") for key in "defg"] == [True, True, True, False]
        store.goes_on.set()
        wait_until(lambda: set(store.blobs) == set("abcdef"))
        # One that is larger than the bound waits alone.
        assert behind.offer("h", 3 * DATA)


def test_without_room_in_memory_a_save_is_answered_when_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    handoff = Handoff(store, staging_dir=tmp_path / "staged")
    with monkeypatch.context() as patch:
        patch.setattr(StagingArea, "has_room_for", lambda _self, _num_bytes: False)
        assert handoff.keep("a", DATA) == len(DATA)
        assert store.blobs == {"a": DATA}
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda _fd, _data: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        handoff.keep("b", DATA)
    assert store.blobs.keys() == {"a", "b"}
    # A name that no file can have.
    handoff.keep("k" * 300, DATA)
    assert len(store.blobs) == 3
    assert files_in(tmp_path) == []
    handoff.close(PATIENCE_S)


def test_a_store_that_is_away_is_tried_again_and_at_the_end_named(tmp_path: Path) -> None:
    store, root = Store(), tmp_path / "staged"
    store.is_away = True
    area = StagingArea(root)
    behind = WriteBehind(area, store, write_after_s=0.0)
    assert behind.offer("a", DATA)
    assert behind.offer("b", DATA)
    wait_until(lambda: store.num_tries >= 3)
    assert area.read("a") == area.read("b") == DATA
    assert sorted(behind.close(0.3)) == ["a", "b"]
    area.close()
    # What comes next on this machine takes it over, when the store is there again.
    store.is_away = False
    with written_behind(root, store):
        wait_until(lambda: store.blobs == {"a": DATA, "b": DATA})
    assert not root.exists()


def test_what_belongs_to_the_living_is_left_to_them(tmp_path: Path) -> None:
    store, other = Store(), Store()
    store.goes_on.clear()
    with written_behind(tmp_path / "staged", store) as (area, behind):
        assert behind.offer(KEY, DATA)
        with written_behind(tmp_path / "staged", other) as (_, second):
            assert list(area.take_abandoned()) == []
            wait_until(lambda: second._look_around_at > 0)
        assert not other.blobs
        assert area.read(KEY) == DATA


def test_a_version_survives_the_loss_of_its_name(tmp_path: Path) -> None:
    """Some machines clean shared memory up when a user logs out."""
    store = Store()
    store.goes_on.clear()
    with written_behind(tmp_path / "staged", store) as (_, behind):
        assert behind.offer(KEY, DATA)
        (file,) = files_in(tmp_path)
        file.unlink()
        store.goes_on.set()
        wait_until(lambda: store.blobs == {KEY: DATA})


def test_directories_that_others_can_get_at_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    monkeypatch.setattr(staging, "SHARED_MEMORY", tmp_path)
    assert staging_place("file:///a", open_to_all) != staging_place("file:///b", open_to_all) != open_to_all
    monkeypatch.setattr(staging, "SHARED_MEMORY", tmp_path / "missing")
    assert staging_place("file:///a", tmp_path) == tmp_path
    for root in (open_to_all, link, tmp_path / "missing" / "deep"):
        with pytest.raises(ConfigError):
            StagingArea(root)


def test_places_of_blobs_that_are_gone_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, blobs = tmp_path / "memory", [tmp_path / name for name in ("gone", "there", "young")]
    memory.mkdir()
    monkeypatch.setattr(staging, "SHARED_MEMORY", memory)
    places = []
    for one in blobs:
        one.mkdir()
        place = staging_place(str(one), tmp_path)
        area = StagingArea(place)
        folder = area.new_folder()
        folder.put(KEY, DATA).close()
        # As at a death.
        os.close(folder.descriptor)
        places.append(place)
    blobs.append(tmp_path / "empty")
    blobs[3].mkdir()
    places.append(staging_place(str(blobs[3]), tmp_path))
    for one, place in ((blobs[number], places[number]) for number in (0, 1, 3)):
        for path in (*place.iterdir(), place):
            os.utime(path, (1, 1))
        assert one.exists()
    blobs[0].rmdir()
    blobs[2].rmdir()
    staging_place(str(tmp_path / "other"), tmp_path)
    assert [place.exists() for place in places] == [False, True, True, False]


def test_links_in_a_folder_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    area = StagingArea(tmp_path / "staged")
    folder = area.new_folder()
    (tmp_path / "staged" / folder.name / "a").symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        area.read("a")
    area.give_up(folder)
    area.close()


def test_weights_on_their_way_from_another_machine_are_waited_out(tmp_path: Path) -> None:
    store, clock = Store(), ManualClock()
    handoff = Handoff(store, staging_dir=tmp_path / "staged", clock=clock.monotonic)
    with pytest.raises(StoreUnavailable):
        handoff.read("late")
    clock.advance(WEIGHTS_ON_THEIR_WAY_S - 1)
    with pytest.raises(StoreUnavailable):
        handoff.read("late")
    store.blobs["late"] = DATA
    assert handoff.read("late") == DATA
    with pytest.raises(StoreUnavailable):
        handoff.read("lost")
    clock.advance(WEIGHTS_ON_THEIR_WAY_S + 1)
    with pytest.raises(NotFound, match="save them again"):
        handoff.read("lost")
    handoff.close(PATIENCE_S)
    with pytest.raises(NotFound):
        Handoff(store, clock=clock.monotonic).read("lost")


# What the process says on its way, at which it is held and killed.
MOMENTS = {
    "staged write": "hold(os, 'rename')",
    "answered": "Blocked.write = lambda *_: hold_here()",
    "durable write": "hold(os, 'link')",
    "durable": "",
}
CHILD = """
import os, sys, time
from pathlib import Path
from treadle.blobs import LocalBlobs
from treadle.worker.handoff import Handoff

def hold_here(*_args, **_options):
    print("here", flush=True)
    time.sleep(600)

def hold(module, name):
    Blocked.name = name
    setattr(module, name, hold_here)

class Blocked(LocalBlobs):
    pass

staged, blobs, key, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
store = Blocked(blobs)
handoff = Handoff(store, staging_dir=staged)
{moment}
handoff.keep(key, bytes(size))
print("kept", flush=True)
while not (store.exists(key)):
    time.sleep(0.01)
hold_here()
"""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_that_is_killed_at_any_moment_takes_no_answered_version_along(tmp_path: Path, moment: str) -> None:
    root, place = tmp_path / "staged", tmp_path / "blobs"
    size = 100_000
    LocalBlobs(place)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.replace("{moment}", MOMENTS[moment]), str(root), str(place), KEY, str(size)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    with child:
        # The thread that writes and the one that stages speak in any order.
        lines = {child.stdout.readline().strip() for _ in range(1 if moment == "staged write" else 2)}
        assert lines == ({"here"} if moment == "staged write" else {"here", "kept"})
        child.send_signal(signal.SIGKILL)
    store = LocalBlobs(place)
    assert store.exists(KEY) == (moment == "durable")
    was_answered = moment != "staged write"
    handoff = Handoff(store, staging_dir=root)
    if was_answered:
        assert handoff.read(KEY) == bytes(size), "there is no moment without it"
    wait_until(lambda: not files_in(root))
    assert store.exists(KEY) == was_answered
    if was_answered:
        assert handoff.read(KEY) == store.read(KEY) == bytes(size)
    handoff.close(PATIENCE_S)
    assert not root.exists()


def sampled(driver: Driver, *keys: BlobKey | None) -> list[SampleOutcome]:
    """One greedy sample from each of these weights, all at once."""
    op = SampleOp(
        sampling_session_id=SamplingSessionId("s:sample:0"),
        seq_id=1,
        prompt=np.array([20, 30, 40], np.int32),
        num_samples=1,
        params=SamplingParams(seed=1, max_tokens=4, use_eos=False, temperature=0.0),
    )
    driver.worker.submit_samples(
        [DecodedSample(RequestId(str(i)), TenantId("t"), replace(op, blob_key=key)) for i, key in enumerate(keys)]
    )
    outcomes: dict[str, SampleOutcome] = {}
    while driver.worker.has_samples:
        outcomes |= {outcome.request_id: outcome for outcome in driver.worker.sample_step(1.0)}
    return [outcomes[str(i)] for i in range(len(keys))]


def numbers_of(outcome: SampleOutcome) -> tuple[bytes, bytes]:
    assert outcome.result is not None, outcome.failure
    (sequence,) = outcome.result.sequences
    return sequence.tokens.tobytes(), sequence.logprobs.tobytes()


def test_samples_and_training_go_on_while_the_store_is_away(
    make_driver: Callable[..., Driver], blobs: MemoryBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save without a name needs no blob store, here and in another worker of the machine; one with a name does."""

    def away(_key: str, _data: bytes) -> int:
        raise StoreUnavailable("the blob store could not write")

    trainer, sampler, run = (
        make_driver(staging_dir=tmp_path / "staged"),
        make_driver(staging_dir=tmp_path / "staged"),
        model_id(),
    )
    trainer.run_ops(create(run), passed(run, 1, datums(1, 16)), step(run, 2))
    with monkeypatch.context() as patch:
        patch.setattr(blobs, "write", away)
        (saved,) = trainer.run_ops(hand_off(run, 3))
        assert isinstance(saved.result, BlobResult)
        key = saved.result.blob_key
        trainer.run_ops(passed(run, 4, datums(1, 16)), step(run, 5))
        here, base = sampled(trainer, key, None)
        (there,) = sampled(sampler, key)
        assert numbers_of(here) == numbers_of(there) != numbers_of(base)
        (named,) = trainer.run([item(publish(run, 6))]).outcomes
        assert named.failure is not None
        assert not blobs.blobs
    wait_until(lambda: key in blobs.blobs)
    (again,) = sampled(make_driver(), key)
    assert numbers_of(again) == numbers_of(here)
    trainer.worker.close()
    sampler.worker.close()
    assert files_in(tmp_path) == []


def test_weights_that_cannot_be_loaded_fail_their_own_samples_and_never_fall_back(
    make_driver: Callable[..., Driver], blobs: MemoryBlobs, tmp_path: Path
) -> None:
    """Damaged, of another model, or missing: each says so, and its neighbours have the numbers they have alone."""
    driver, run = make_driver(staging_dir=tmp_path / "staged"), model_id()
    driver.run_ops(create(run), passed(run, 1, datums(1, 16)), step(run, 2))
    (saved,) = driver.run_ops(hand_off(run, 3))
    assert isinstance(saved.result, BlobResult)
    key = saved.result.blob_key
    wait_until(lambda: key in blobs.blobs)
    whole = blobs.blobs[key]
    blobs.blobs["damaged"] = whole[:-8] + bytes(8)
    blobs.blobs["foreign"] = whole.replace(b"treadle/tiny", b"treadle/tinx")
    blobs.blobs["nonsense"] = b"no weights"
    bad = [BlobKey(name) for name in ("damaged", "foreign", "nonsense", "missing")]
    alone = [numbers_of(sampled(driver, weights)[0]) for weights in (key, None)]
    *failed, good, base = sampled(driver, *bad, key, None)
    assert [numbers_of(good), numbers_of(base)] == alone
    for outcome in failed:
        assert outcome.result is None
        assert outcome.failure is not None
    assert [outcome.is_transient for outcome in failed] == [False, False, False, True]
    driver.worker.close()
