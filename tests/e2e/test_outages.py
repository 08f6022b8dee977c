"""The disk is full or away, files cannot grow, the database is locked: clear errors, nothing lost, and on it goes."""

from __future__ import annotations

import contextlib
import resource
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import psutil
import pytest
import tinker
from e2e_support import ServerProcess, batch, failure_of, new_key, new_run, train_step

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

Outage: TypeAlias = Callable[[ServerProcess], AbstractContextManager[None]]

DISK_MB = 48
NUM_STEPS = 6
# A step that meets the outage waits until the SDK tries again, 8 s after the fourth refusal.
STEP_S = 90.0
# An answer while the medium is away; a lock is waited for first.
PROMPT_S = 3.0
LOCK_PATIENCE_S = 12.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that a test can fill."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def disk_full(server: ServerProcess) -> Iterator[None]:
    """Not a byte is free on the data directory's file system."""
    filler = server.data_dir / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def no_file_can_be_written(server: ServerProcess) -> Iterator[None]:
    """The kernel refuses every write to a file by the server and its workers."""
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    processes = [root, *root.children(recursive=True)]
    before = {process.pid: resource.prlimit(process.pid, resource.RLIMIT_FSIZE) for process in processes}
    for pid, (_, hard) in before.items():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        for pid, limits in before.items():
            if psutil.pid_exists(pid):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def database_locked(server: ServerProcess) -> Iterator[None]:
    """Another process writes to the database, and does not end."""
    with contextlib.closing(sqlite3.connect(server.data_dir / "treadle.db", timeout=30, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


class Loop(threading.Thread):
    """A plain training loop without a single `except`: what it sees is what a user would."""

    def __init__(self, client: tinker.TrainingClient) -> None:
        super().__init__(daemon=True)
        self._client = client
        self.losses: list[float] = []
        self.error: BaseException | None = None
        self._progress = threading.Condition()

    def run(self) -> None:
        try:
            for step in range(NUM_STEPS):
                loss = train_step_of(self._client, step)
                with self._progress:
                    self.losses.append(loss)
                    self._progress.notify_all()
        except BaseException as error:
            self.error = error

    def wait_for(self, num_steps: int) -> None:
        with self._progress:
            assert self._progress.wait_for(lambda: len(self.losses) >= num_steps, timeout=STEP_S), self.error


def train_step_of(client: tinker.TrainingClient, step: int) -> float:
    """Every other batch is too large for a row."""
    data = batch(30, 200, seed=step) if step % 2 else batch(seed=step)
    passed = client.forward_backward(data, "cross_entropy")
    stepped = client.optim_step(tinker.AdamParams(learning_rate=1e-3))
    loss = passed.result(timeout=STEP_S).metrics["loss:sum"]
    stepped.result(timeout=STEP_S)
    return float(loss)


def start_loop(server: ServerProcess) -> Loop:
    loop = Loop(new_run(server.service(), seed=7))
    loop.start()
    return loop


def submit_until_refused(http: httpx.Client, *, patience_s: float) -> tuple[list[str], httpx.Response]:
    """Sessions that were acknowledged, and the refusal. Each answer comes in time."""
    acknowledged = []
    for _ in range(20_000):
        body = {"tags": [], "user_metadata": {"text": "x" * 15_000}, "sdk_version": "0.38.0"}
        started_at = time.monotonic()
        answer = http.post("create_session", json=body)
        assert time.monotonic() - started_at < patience_s
        if answer.status_code != 200:
            return acknowledged, answer
        acknowledged.append(answer.json()["session_id"])
    pytest.fail("the server never noticed")


def check_database(data_dir: Path) -> None:
    """Whole, and every checkpoint that it names is there."""
    with contextlib.closing(sqlite3.connect(data_dir / "treadle.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
        for key, size in database.execute("SELECT blob_key, size_bytes FROM checkpoints"):
            assert (data_dir / "blobs" / key).stat().st_size == size


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess) -> list[float]:
    """The losses of a loop that nothing happens to."""
    loop = start_loop(server)
    loop.join(STEP_S)
    assert len(loop.losses) == NUM_STEPS, loop.error
    return loop.losses


def live_through(
    server: ServerProcess, outage: Outage, expected: list[float], *, patience_s: float, saves_may_fail: bool = True
) -> None:
    """A loop, a save and raw submissions meet the outage; what was acknowledged is there behind it."""
    saver = server.training_client()
    train_step(saver, batch())
    loop = start_loop(server)
    key = new_key()
    with server.http(key) as http:
        loop.wait_for(2)
        with outage(server):
            acknowledged, refusal = submit_until_refused(http, patience_s=patience_s)
            assert refusal.status_code == 503, refusal.text
            assert refusal.json()["category"] == "server"
            assert str(server.data_dir) not in refusal.text
            save = saver.save_state("during")
            # The process is alive, and reads go on.
            assert http.get("healthz").status_code == 200
            # Long enough for the loop to be in the middle of it.
            assert http.post("create_session", json={"tags": [], "sdk_version": "0.38.0"}).status_code == 503
        loop.join(STEP_S)
        assert loop.error is None
        assert loop.losses == expected
        failure = failure_of(save, timeout_s=STEP_S)
        assert failure is None or (saves_may_fail and failure.category.value == "server"), failure
        assert saver.save_state("after").result(timeout=STEP_S).path
        assert train_step(saver, batch()) > 0
        assert [id_ for id_ in acknowledged if http.get(f"sessions/{id_}").status_code != 200] == []
    assert server.terminate() == 0
    check_database(server.data_dir)


def test_full_disk(small_disk: Path, undisturbed: list[float]) -> None:
    with ServerProcess(small_disk) as server:
        live_through(server, disk_full, undisturbed, patience_s=PROMPT_S)
        server.start()
        assert train_step(server.training_client(), batch()) > 0


def test_files_that_cannot_be_written(own_server: ServerProcess, undisturbed: list[float]) -> None:
    live_through(own_server, no_file_can_be_written, undisturbed, patience_s=PROMPT_S)


def test_locked_database(own_server: ServerProcess, undisturbed: list[float]) -> None:
    live_through(own_server, database_locked, undisturbed, patience_s=LOCK_PATIENCE_S, saves_may_fail=False)


def test_blobs_that_are_away_while_a_run_is_restored(server: ServerProcess) -> None:
    """A file system that is not mounted: nobody may take its empty directory for the end of what lay in it."""
    service = server.service()
    client, oracle = new_run(service, seed=11), new_run(service, seed=11)
    losses = [train_step(client, batch(seed=step)) for step in range(2)]
    client.save_state("snapshot").result(timeout=STEP_S)
    path = client.save_weights_for_sampler("n").result(timeout=STEP_S).path
    sampler = service.create_sampling_client(model_path=path).result(timeout=STEP_S)
    drawn = tokens_of(sampled(sampler))
    blobs, elsewhere = server.data_dir / "blobs", server.data_dir / "elsewhere"
    assert server.process is not None
    blobs.rename(elsewhere)
    blobs.mkdir()
    for worker in psutil.Process(server.process.pid).children():
        worker.kill()
    passed = client.forward_backward(batch(seed=2), "cross_entropy")
    client.optim_step(tinker.AdamParams(learning_rate=1e-3))
    again = sampled(sampler)
    # Until the next worker has looked for both.
    with pytest.raises(TimeoutError):
        passed.result(timeout=12)
    blobs.rmdir()
    elsewhere.rename(blobs)
    losses.append(passed.result(timeout=STEP_S).metrics["loss:sum"])
    assert tokens_of(again) == drawn
    assert losses == [train_step(oracle, batch(seed=step)) for step in range(3)]


def sampled(sampler: tinker.SamplingClient) -> Any:
    params = tinker.SamplingParams(max_tokens=4, seed=1)
    return sampler.sample(tinker.ModelInput.from_ints([1, 2, 3]), num_samples=1, sampling_params=params)


def tokens_of(future: Any) -> list[int]:
    return list(future.result(timeout=STEP_S).sequences[0].tokens)
