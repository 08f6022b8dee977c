"""A real `treadle serve` on the 1M model under the official SDK, and what its own log says of every cycle.

The loads are the simulator's own Habits, so that both sides run the same thing. Times are the server's: "cycle
finished" is logged at debug, with the worker's seconds, behind the commit.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")

import psutil
import tinker
from tinker import types

from treadle.testing.simulation.clients import Habit
from treadle.testing.simulation.scenario import Group

MODEL = "bench/model"
_VOCAB = 4096
_RANK = 8
_RESULT_S = 300
_LOGGING = {"TREADLE_LOG__LEVEL": "debug", "TREADLE_LOG__FORMAT": "json"}


@dataclass(frozen=True, slots=True)
class LoggedCycle:
    """One line of the server's log. ended_s: seconds since the epoch."""

    ended_s: float
    compute_s: float
    num_tokens: int
    num_ops: int


@dataclass(frozen=True, slots=True)
class RealLoad:
    """What a load did in its windows. step_s: by group of clients; server_cpu_s: of all the server's processes.

    worker_cpu_s: of the worker alone. On a busy machine its cycles take longer than that.
    """

    windows: tuple[Sequence[LoggedCycle], ...]
    step_s: Mapping[str, Sequence[float]]
    window_s: float
    server_cpu_s: float
    worker_cpu_s: float
    submit_gaps_s: Sequence[float]

    @property
    def cycles(self) -> list[LoggedCycle]:
        return [cycle for window in self.windows for cycle in window]

    def __add__(self, other: RealLoad) -> RealLoad:
        names = self.step_s.keys() | other.step_s.keys()
        return RealLoad(
            self.windows + other.windows,
            {name: [*self.step_s.get(name, ()), *other.step_s.get(name, ())] for name in sorted(names)},
            self.window_s + other.window_s,
            self.server_cpu_s + other.server_cpu_s,
            self.worker_cpu_s + other.worker_cpu_s,
            [*self.submit_gaps_s, *other.submit_gaps_s],
        )


class RealServer:
    """Start, log, stop. `log_path` holds everything it said; `source` is the src/ of the tree that serves."""

    def __init__(self, model: Path, folder: Path, *, source: Path) -> None:
        command = [sys.executable, "-m", "treadle.cli", "serve", "--port", "0", "--data", str(folder / "data")]
        self._data = folder / "data"
        self.log_path = folder / "server.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--model", f"{MODEL}={model}"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **_LOGGING, "PYTHONPATH": str(source)},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start:\n" + self.log_path.read_text()[-2000:])
        self.url = line.strip().removeprefix("treadle ready: ")

    def cycles(self, since_s: float = 0.0, until_s: float = float("inf")) -> list[LoggedCycle]:
        """What ran between two moments."""
        found = []
        for event in self._events("cycle finished"):
            ended_s = datetime.fromisoformat(event["time"]).timestamp()
            if since_s <= ended_s <= until_s:
                found.append(LoggedCycle(ended_s, event["ms"] / 1000, event["tokens"], event["ops"]))
        return found

    def packed_tokens(self) -> int:
        """The most tokens of a pack, as the worker measured its memory."""
        texts = [str(event["limits"]) for event in self._events("pass limits")]
        found = [match for text in texts if (match := re.search(r"packed=(\d+)", text))]
        return int(found[-1].group(1))

    def _events(self, name: str) -> list[dict[str, Any]]:
        # Others' lines may be no JSON, and the last one may be half written.
        lines = [line for line in self.log_path.read_text().splitlines() if f'"{name}"' in line and line[-1] == "}"]
        return [event for line in lines if (event := json.loads(line))["event"] == name]

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds so far: of all processes, and of the worker."""
        processes = [psutil.Process(self.process.pid), *self._children()]
        return sum(map(_cpu_s, processes)), _cpu_s(self._worker())

    def _children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def _worker(self) -> psutil.Process:
        """The child that has computed the most: a spare waits."""
        return max(self._children(), key=_cpu_s)

    def _database(self) -> closing[sqlite3.Connection]:
        return closing(sqlite3.connect(f"file:{self._data / 'treadle.db'}?mode=ro", uri=True))

    def submit_gaps_s(self, since_s: float, until_s: float) -> list[float]:
        """Seconds between the rows of a pass and of the step behind it."""
        with self._database() as database:
            gaps = database.execute(
                "select b.created_at - a.created_at from requests a join requests b "
                "on b.model_id = a.model_id and b.seq_id = a.seq_id + 1 "
                "where b.kind = 'optim_step' and a.created_at between ? and ?",
                (since_s, until_s),
            )
            return [gap for (gap,) in gaps]

    def storage(self) -> dict[str, dict[str, int]]:
        """Rows and bytes of the database's tables, indexes included, and bytes of the blobs."""
        with self._database() as database:
            tables = [name for (name,) in database.execute("select name from sqlite_schema where type = 'table'")]
            sizes = "select sum(s.pgsize) from dbstat s join sqlite_schema m on m.name = s.name where m.tbl_name = ?"
            found = {
                name: {
                    "rows": database.execute(f'select count(*) from "{name}"').fetchone()[0],
                    "bytes": database.execute(sizes, (name,)).fetchone()[0] or 0,
                }
                for name in sorted(tables)
            }
        blobs = [path.stat().st_size for path in self._data.rglob("*.safetensors")]
        return found | {"blobs": {"rows": len(blobs), "bytes": sum(blobs)}}

    def kill_worker(self) -> None:
        """SIGKILL."""
        self._worker().send_signal(signal.SIGKILL)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=60)


def _cpu_s(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


@dataclass
class _RealClient:
    """One tenant's run, working as its habit says until told to stop."""

    group: str
    habit: Habit
    server: RealServer
    key: str
    # (began, ended), seconds since the epoch.
    steps: list[tuple[float, float]] = field(default_factory=list)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        assert self.habit.pause is None, "a real load does not pause"
        assert self.habit.arrivals is None, "a real load is closed"
        assert not self.habit.publishes, "a real load does not publish"
        self.rng = random.Random(self.key)
        service = tinker.ServiceClient(base_url=self.server.url, api_key=f"tml-{self.key}")
        self.trainer = service.create_lora_training_client(base_model=MODEL, rank=_RANK).result(timeout=_RESULT_S)

    def run(self, stop: threading.Event) -> None:
        try:
            self._run(stop)
        except BaseException as error:
            self.error = error

    def _run(self, stop: threading.Event) -> None:
        in_flight: deque[tuple[float, list[Any]]] = deque()
        # Until nothing is in flight, or the next load would find it in its way.
        while in_flight or not stop.is_set():
            while len(in_flight) < self.habit.depth and not stop.is_set():
                in_flight.append((time.time(), self._send()))
            if not in_flight:
                return
            began, futures = in_flight.popleft()
            for future in futures:
                future.result(timeout=_RESULT_S)
            self.steps.append((began, time.time()))

    def _send(self) -> list[Any]:
        passes = [
            self.trainer.forward_backward([self._datum() for _ in range(self.habit.datums)], "cross_entropy")
            for _ in range(self.habit.passes_per_step)
        ]
        if not self.habit.is_paired:
            for future in passes:
                future.result(timeout=_RESULT_S)
        return [*passes, self.trainer.optim_step(types.AdamParams(learning_rate=1e-4))]

    def _datum(self) -> types.Datum:
        tokens = [self.rng.randrange(10, _VOCAB - 10) for _ in range(self.habit.lengths.draw(self.rng) + 1)]
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )


def run_load(server: RealServer, groups: Sequence[Group], *, warmup_s: float, window_s: float, name: str) -> RealLoad:
    """Have these clients work, and report what happened in the window behind the warm-up."""
    clients = [
        _RealClient(group.name, group.habit, server, f"{name}-{group.name}-{index}")
        for group in groups
        for index in range(group.tenants)
    ]
    stop = threading.Event()
    threads = [threading.Thread(target=client.run, args=(stop,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    time.sleep(warmup_s)
    began, (cpu_s, worker_cpu_s) = time.time(), server.cpu_s()
    time.sleep(window_s)
    ended, (cpu_s_after, worker_cpu_s_after) = time.time(), server.cpu_s()
    stop.set()
    for thread in threads:
        thread.join(timeout=_RESULT_S)
    errors = [client.error for client in clients if client.error is not None]
    if errors:
        raise SystemExit(f"a client failed: {errors}")
    step_s: dict[str, list[float]] = {}
    for client in clients:
        done = [end - start for start, end in client.steps if began <= start and end <= ended]
        step_s.setdefault(client.group, []).extend(done)
    cycles = server.cycles(began, ended)
    assert len(cycles) > 1, "no two cycles ended in the window: make it longer"
    return RealLoad(
        windows=(cycles,),
        step_s=step_s,
        window_s=ended - began,
        server_cpu_s=cpu_s_after - cpu_s,
        worker_cpu_s=worker_cpu_s_after - worker_cpu_s,
        submit_gaps_s=server.submit_gaps_s(began, ended),
    )
