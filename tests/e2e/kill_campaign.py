"""The kill campaign: a real server under ten tenants, killed at named moments; nobody may notice more than a pause.

    scripts/kill_campaign --save [--per-cell 10] [--resume FILE]

First an undisturbed round of every tenant is written down. Then the same rounds run again and again while workers and
servers are killed with SIGKILL, behind the log line of a phase (`treadle/telemetry/phases.py`) or at any time. Every
answer is compared with the undisturbed one while it comes in: losses, logprobs, metrics, step numbers, samples, bit for
bit; at the end also the tensors of every run's last save. It refuses to know how recovery works.
Invariant: what it reports as passed was compared; a phase that did not come counts for nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import sqlite3
import statistics
import tarfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil
import safetensors.numpy
from e2e_support import ServerProcess
from kill_campaign_crowd import CampaignFailed, Crowd, Diary, Reference

from treadle.telemetry.phases import EVENT, Phase

NUM_TENANTS = 10
# A phase that has not come for this long does not come in this leg: its moment is left to another one.
PATIENCE_S = 60.0
# Half of the kills come at once, the other half up to this long after their phase.
MAX_DELAY_S = 0.020
# The worker in reserve is killed with its worker this often; the next one then starts from nothing.
SPARE_SHARE = 0.1
# Phases that only come behind a death: one is provoked.
AFTER_A_DEATH = (Phase.RESTORED, Phase.REPLAYED)
# Small cycles split the large passes over several, and small packs split what is in one.
ENVIRONMENT = {
    "TREADLE_ENGINE__MICRO_BATCH_TOKENS": "256",
    "TREADLE_SCHEDULER__CYCLE_BUDGET_TOKENS": "2048",
    "TREADLE_WORKER__SPARE": "true",
    "TREADLE_LOG__LEVEL": "debug",
    "TREADLE_LOG__FORMAT": "json",
}


class Victim(StrEnum):
    WORKER = "worker"
    SERVER = "server"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Aim:
    """Whom to kill, and behind which phase; None: at any time."""

    phase: Phase | None
    victim: Victim

    @property
    def cell(self) -> str:
        return f"{self.phase.value if self.phase is not None else 'any time'} / {self.victim.value}"


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill that was done. `cell` is what it counts for; pauses_s: until each tenant's next answer."""

    cell: str
    delay_s: float
    restart_s: float
    pauses_s: tuple[float, ...]


class Watch:
    """The log of a server and its workers, line by line: which phases came, and the last lines for a report."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._seen: Counter[str] = Counter()
        self._condition = threading.Condition()
        self.worker_pid: int | None = None
        self.serious: deque[str] = deque(maxlen=20)

    def close(self) -> None:
        self._file.close()

    def on_log(self, line: str) -> None:
        """Called by the reader's thread."""
        try:
            event = json.loads(line)
        except ValueError:
            # A traceback, a line that a kill has torn, or the empty one at the end.
            event = {"event": "", "level": "error" if line else ""}
        with self._condition:
            print(line, file=self._file)
            if event["event"] == EVENT:
                self._seen[event["phase"]] += 1
                self._condition.notify_all()
            elif event["event"] == "worker launched":
                self.worker_pid = event["pid"]
            elif event["level"] in ("warning", "error"):
                self.serious.append(line[:2000])

    def wait(self, phase: Phase, timeout_s: float) -> bool:
        """Return at the next line of this phase; False when none came."""
        with self._condition:
            before = self._seen[phase.value]
            return self._condition.wait_for(lambda: self._seen[phase.value] > before, timeout_s)


class Campaign:
    """Legs of kills against one undisturbed reference. Everything random follows from the seed, save the machine."""

    def __init__(self, folder: Path, *, seed: int, num_tenants: int = NUM_TENANTS) -> None:
        self._folder = folder
        self._seed = seed
        self._num_tenants = num_tenants
        self._reference: Reference | None = None
        self._num_legs = 0
        self.kills: list[Kill] = []
        self.num_answers = 0
        self.num_rounds = 0
        self.num_states = 0

    def write_reference(self) -> None:
        """An undisturbed round of every tenant."""
        with self._leg() as (server, _, crowd):
            crowd.stop()
            assert server.terminate() == 0
            diaries = tuple(rounds[0] for rounds in crowd.rounds)
            states = tuple(tuple(state_digest(server.data_dir, path) for path in diary.ends) for diary in diaries)
        self._reference = Reference(diaries, states)

    def run_leg(self, aims: Iterable[Aim], *, on_kill: Callable[[Kill], None] = lambda kill: None) -> None:
        """Kill at each aim under load, on a data directory of its own; then compare what is left of every round."""
        assert self._reference is not None
        with self._leg() as (server, watch, crowd):
            rng = random.Random(self._seed * 1000 + self._num_legs)
            crowd.wait_for_answers(time.monotonic())
            for aim in aims:
                on_kill(self._kill(aim, server, watch, crowd, rng))
            crowd.stop()
            assert server.terminate() == 0, "the server did not end cleanly"
            self._compare_states(server.data_dir, crowd.rounds)
            self.num_answers += crowd.num_answers
            self.num_rounds += sum(len(rounds) for rounds in crowd.rounds)

    @contextmanager
    def _leg(self) -> Iterator[tuple[ServerProcess, Watch, Crowd]]:
        """A server and its tenants. Its folder stays when something went wrong, and the error names it."""
        self._num_legs += 1
        folder = self._folder / f"leg-{self._num_legs}"
        folder.mkdir(parents=True)
        watch = Watch(folder / "server.log")
        try:
            with (
                ServerProcess(folder / "data", env=ENVIRONMENT, on_log=watch.on_log) as server,
                Crowd(
                    server.url,
                    seed=self._seed,
                    num_tenants=self._num_tenants,
                    reference=self._reference,
                    log=folder / "tenants.log",
                ) as crowd,
            ):
                yield server, watch, crowd
        except Exception as error:
            cells = [kill.cell for kill in self.kills[-5:]]
            serious = "\n".join(watch.serious)
            raise CampaignFailed(f"seed {self._seed}, {folder}, last kills {cells}: {error}\n{serious}") from error
        finally:
            watch.close()
        shutil.rmtree(folder)

    def _kill(self, aim: Aim, server: ServerProcess, watch: Watch, crowd: Crowd, rng: random.Random) -> Kill:
        """One kill, and the way back until every tenant has its next answer."""
        cell, delay_s = aim.cell, rng.choice((0.0, rng.uniform(0.0, MAX_DELAY_S)))
        if aim.phase is None:
            delay_s = rng.uniform(0.0, 2.0)
        else:
            if aim.phase in AFTER_A_DEATH:
                strike(server, Victim.WORKER, watch.worker_pid)
            if not watch.wait(aim.phase, PATIENCE_S):
                cell = Aim(None, aim.victim).cell
        time.sleep(delay_s)
        struck_at = time.monotonic()
        strike(server, aim.victim, watch.worker_pid, with_spare=rng.random() < SPARE_SHARE)
        if aim.victim is not Victim.WORKER:
            server.start()
        restart_s = time.monotonic() - struck_at
        kill = Kill(cell, delay_s, restart_s, crowd.wait_for_answers(struck_at))
        self.kills.append(kill)
        return kill

    def _compare_states(self, data_dir: Path, rounds: Sequence[Sequence[Diary]]) -> None:
        assert self._reference is not None
        for tenant, diaries in enumerate(rounds):
            for number, diary in enumerate(diaries):
                for path, expected in zip(diary.ends, self._reference.states[tenant], strict=True):
                    assert state_digest(data_dir, path) == expected, (
                        f"tenant {tenant}, round {number}: the state of {path} is not the undisturbed one"
                    )
                    self.num_states += 1


def strike(server: ServerProcess, victim: Victim, worker_pid: int | None, *, with_spare: bool = False) -> None:
    """SIGKILL. A process that is already gone is left in peace; with_spare: the worker in reserve goes as well."""
    assert server.process is not None
    assert worker_pid is not None, "the log does not say which process the worker is"
    children = psutil.Process(server.process.pid).children()
    if victim is not Victim.SERVER:
        for child in children:
            if with_spare or child.pid == worker_pid:
                child.kill()
    if victim is not Victim.WORKER:
        server.kill()


def state_digest(data_dir: Path, path: str) -> str:
    """Digest of everything in a checkpoint's file: weights, moments, open gradient, and its header."""
    with closing(sqlite3.connect(data_dir / "treadle.db")) as database:
        (key,) = database.execute("SELECT blob_key FROM checkpoints WHERE tinker_path = ?", (path,)).fetchone()
    data = (data_dir / "blobs" / key).read_bytes()
    if "/external_weights/" in path:
        return _archive_digest(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(safetensors.numpy.load(data).items()):
        digest.update(name.encode() + tensor.tobytes())
    return digest.hexdigest()


def _archive_digest(data: bytes) -> str:
    """Of the names and bytes of external weights, not of the archive, which has times."""
    digest = hashlib.sha256()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive.getmembers():
            file = archive.extractfile(member)
            digest.update(member.name.encode() + (b"" if file is None else file.read()))
    return digest.hexdigest()


def plan(per_cell: int, done: Counter[str]) -> list[Aim]:
    """What is left of a whole campaign: every phase with worker and server, fewer with both, and any time."""
    wanted = {Aim(phase, victim): per_cell for phase in (*Phase, None) for victim in (Victim.WORKER, Victim.SERVER)}
    wanted |= {Aim(phase, Victim.BOTH): max(1, per_cell // 3) for phase in (*Phase, None)}
    return [aim for aim, count in wanted.items() for _ in range(count - done[aim.cell])]


def summary(kills: Sequence[Kill]) -> dict[str, Any]:
    """Counts by cell, and what clients felt, in seconds."""
    found: dict[str, Any] = {
        "num_kills": len(kills),
        "cells": dict(sorted(Counter(kill.cell for kill in kills).items())),
    }
    for victim in Victim:
        pauses = sorted(pause for kill in kills if kill.cell.endswith(f"/ {victim}") for pause in kill.pauses_s)
        if pauses:
            found[f"pause_s_after_{victim}"] = {
                "p50": statistics.median(pauses),
                "p95": pauses[min(len(pauses) - 1, len(pauses) * 95 // 100)],
                "max": pauses[-1],
            }
    return found
