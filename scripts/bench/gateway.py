"""How many small training requests one server takes from 1,000 connected tenants, and what each costs it.

    python scripts/bench/gateway.py [--store postgresql] [--rates 500 1000 1500] [--json FILE] [--save]

Open loop: steps start at a fixed rate, whatever the server does, and every latency counts from the scheduled time. A
step is forward_backward (zstd protobuf, 1 x 16 tokens) and optim_step sent together, each followed by its
retrieve_future: 4 requests. Every tenant has a key, a session with a heartbeat every 10 s, a run, and a long poll of
its sampling session that is held all the time; heartbeats and polls come on top of the rate.

The server is the real one with a worker that computes almost nothing (fake_server.py), so the server is what is
measured. The load generator, the worker and the server share the machine, and so does PostgreSQL, a throw-away cluster
that flushes every commit; CPU seconds are given for the server, the worker and the generator.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import report
import uvloop
import zstandard
from http_load import Answer, Connection, ConnectionPool, request_bytes

from treadle.domain.ids import ModelId
from treadle.domain.keys import key_digest
from treadle.domain.losses import resolve_loss
from treadle.domain.ops import Datum, PassOp
from treadle.store import Store
from treadle.wire.passes import encode_pass

SERVE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))
VOCAB = 1_280
HEARTBEAT_S = 10.0
REQUESTS_PER_STEP = 4
WARMUP_S = 3.0
# The SDK's chunks end at 1,024 datums or 5 MB; the fake model's context is 2,048.
LARGE_DATUMS, LARGE_TOKENS = 16, 1_024


@dataclass
class Times:
    """Seconds from the scheduled time to the answer, by kind of request."""

    submit: list[float] = field(default_factory=list)
    result: list[float] = field(default_factory=list)
    heartbeat: list[float] = field(default_factory=list)
    num_requests: int = 0
    num_errors: int = 0


class ServerProcess:
    """A server and its worker."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline().rpartition(":")[2])
        self._root = psutil.Process(self._process.pid)

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds so far of the server, and of its worker."""
        workers = sum(sum(child.cpu_times()[:2]) for child in self._root.children(recursive=True))
        return sum(self._root.cpu_times()[:2]), workers

    def rss_mb(self) -> float:
        return float(self._root.memory_info().rss) / 2**20

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)


class Tenant:
    """One client: its session, run, connections, and where it is in its sequence."""

    def __init__(self, index: int, port: int, key: str) -> None:
        self.key = key
        self.pool = ConnectionPool(port)
        self.next_seq_id = 1
        self._rng = np.random.default_rng(index)
        self.session_id = ""
        self.model_id = ""
        self.sampler_id = ""

    async def set_up(self) -> None:
        self.session_id = (await self._json("create_session", {"sdk_version": "0.38.0"}))["session_id"]
        body = {"session_id": self.session_id, "model_seq_id": 0, "base_model": "treadle/tiny"}
        created = await self._json("create_model", body | {"lora_config": {"rank": 8}})
        while (answer := await self.pool.send(self._retrieve(created["request_id"]))).status == 408:
            pass
        self.model_id = json.loads(answer.body)["model_id"]
        body = {"session_id": self.session_id, "sampling_session_seq_id": 0, "base_model": "treadle/tiny"}
        self.sampler_id = (await self._json("create_sampling_session", body))["sampling_session_id"]

    def pass_request(self, seq_id: int, *, num_datums: int = 1, num_tokens: int = 16) -> bytes:
        datums = []
        for _ in range(num_datums):
            tokens = self._rng.integers(3, VOCAB, num_tokens + 1)
            inputs = {"target_tokens": tokens[1:], "weights": np.ones(num_tokens, np.float32)}
            datums.append(Datum(tokens=tokens[:-1].astype(np.int32), inputs=inputs))
        loss = resolve_loss("cross_entropy", {})
        body = encode_pass(PassOp(ModelId(self.model_id), seq_id, tuple(datums), loss, forward_only=False))
        return request_bytes(
            "/api/v1/forward_backward",
            zstandard.ZstdCompressor().compress(body),
            key=self.key,
            content_type="application/x-protobuf",
            encoding="zstd",
        )

    def step_request(self, seq_id: int) -> bytes:
        adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0}
        return self._request("optim_step", {"model_id": self.model_id, "seq_id": seq_id, "adam_params": adam})

    async def step(self, scheduled: float, times: Times) -> None:
        """A pass and its step, sent together, and their results."""
        seq_id, self.next_seq_id = self.next_seq_id, self.next_seq_id + 2
        requests = (self.pass_request(seq_id), self.step_request(seq_id + 1))
        await asyncio.gather(*(self._submit_and_retrieve(request, scheduled, times) for request in requests))

    async def heartbeat(self, scheduled: float, times: Times) -> None:
        answer = await self.pool.send(self._request("session_heartbeat", {"session_id": self.session_id}))
        self._count(answer, times)
        times.heartbeat.append(answer.at - scheduled)

    async def poll_forever(self) -> None:
        """The sampling client's poller: always one call that the server holds."""
        target = {"type": "sampling_session", "sampling_session_id": self.sampler_id}
        request = self._request("retrieve_futures", {"target": target, "prev_cursor": 0})
        while (await self.pool.send(request)).status == 200:
            pass

    async def _submit_and_retrieve(self, request: bytes, scheduled: float, times: Times) -> None:
        answer = await self.pool.send(request)
        self._count(answer, times)
        times.submit.append(answer.at - scheduled)
        if answer.status != 200:
            return
        retrieve = self._retrieve(json.loads(answer.body)["request_id"])
        while (answer := await self.pool.send(retrieve)).status == 408:
            times.num_requests += 1
        self._count(answer, times)
        times.result.append(answer.at - scheduled)

    def _count(self, answer: Answer, times: Times) -> None:
        times.num_requests += 1
        # A failed op is answered with 200 and an error body.
        times.num_errors += answer.status != 200 or b'"error"' in answer.body

    def _retrieve(self, request_id: str) -> bytes:
        return self._request("retrieve_future", {"request_id": request_id})

    def _request(self, path: str, body: object) -> bytes:
        return request_bytes(f"/api/v1/{path}", json.dumps(body).encode(), key=self.key)

    async def _json(self, path: str, body: object) -> dict[str, str]:
        answer = await self.pool.send(self._request(path, body))
        assert answer.status == 200, (path, answer)
        parsed: dict[str, str] = json.loads(answer.body)
        return parsed


async def at_rate(per_s: float, duration_s: float, start: Callable[[int, float], Awaitable[None]]) -> None:
    """Start `start(i, scheduled time)` every 1/per_s seconds, whatever becomes of them, and wait for all."""
    loop = asyncio.get_running_loop()
    began, tasks = loop.time(), []
    for index in range(int(per_s * duration_s)):
        scheduled = began + index / per_s
        if (ahead := scheduled - loop.time()) > 0:
            await asyncio.sleep(ahead)
        tasks.append(asyncio.ensure_future(start(index, scheduled)))
    await asyncio.gather(*tasks)


async def open_loop(
    server: ServerProcess, tenants: Sequence[Tenant], rate: float, duration_s: float
) -> dict[str, float | dict[str, float]]:
    """Latencies and costs at `rate` training requests per second."""
    order = random.Random(0).sample(range(len(tenants)), len(tenants))

    async def run(duration_s: float) -> Times:
        times = Times()
        await asyncio.gather(
            at_rate(rate / REQUESTS_PER_STEP, duration_s, lambda i, t: tenants[order[i % len(order)]].step(t, times)),
            at_rate(len(tenants) / HEARTBEAT_S, duration_s, lambda i, t: tenants[i % len(tenants)].heartbeat(t, times)),
        )
        return times

    await run(WARMUP_S)
    gc.collect()
    gc.freeze()
    started, server_cpu, own_cpu = time.monotonic(), server.cpu_s(), time.process_time()
    times = await run(duration_s)
    wall_s = time.monotonic() - started
    server_s, worker_s = (now - then for now, then in zip(server.cpu_s(), server_cpu, strict=True))
    return {
        "offered_per_s": rate + len(tenants) / HEARTBEAT_S,
        "done_per_s": times.num_requests / wall_s,
        "errors": times.num_errors,
        "submit_s": percentiles(times.submit),
        "heartbeat_s": percentiles(times.heartbeat),
        "result_s": percentiles(times.result),
        "server_cores": server_s / wall_s,
        "worker_cores": worker_s / wall_s,
        "generator_cores": (time.process_time() - own_cpu) / wall_s,
        "server_cpu_ms_per_request": server_s / times.num_requests * 1e3,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    p50, p90, p99, longest = np.percentile(values, [50, 90, 99, 100])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(longest)}


async def admission_cost(place: Place) -> dict[str, float]:
    """Server CPU of admission alone, on a server whose scheduler waits for company all the time."""
    (key,) = await add_keys(place, 1)
    server = ServerProcess([*place.command, "scheduler.gather_window_ms=1e9", "server.drain_s=0"])
    try:
        (tenant,) = await set_up(server.port, [key])
        small = [tenant.pass_request(seq_id) for seq_id in range(1, 2_001)]
        await _cpu_s(server, tenant, small[:100])
        small_ms = await _cpu_s(server, tenant, small[100:]) / len(small[100:]) * 1e3
        num_tokens = LARGE_DATUMS * LARGE_TOKENS
        large = [
            tenant.pass_request(seq_id, num_datums=LARGE_DATUMS, num_tokens=LARGE_TOKENS)
            for seq_id in range(2_001, 2_201)
        ]
        large_s = await _cpu_s(server, tenant, large)
        tenant.pool.close()
    finally:
        server.stop()
    return {
        "cpu_ms_per_small_request": small_ms,
        "cpu_s_per_million_tokens": large_s / (len(large) * num_tokens / 1e6),
        "tokens_per_large_request": num_tokens,
        "body_bytes_of_large_request": len(large[0]),
    }


async def _cpu_s(server: ServerProcess, tenant: Tenant, requests: Sequence[bytes]) -> float:
    started, _ = server.cpu_s()
    pending = iter(requests)

    async def send_all() -> None:
        for request in pending:
            answer = await tenant.pool.send(request)
            assert answer.status == 200, answer

    await asyncio.gather(*(send_all() for _ in range(8)))
    return server.cpu_s()[0] - started


async def set_up(port: int, keys: Sequence[str]) -> list[Tenant]:
    """The tenants, with their long polls held."""
    tenants = [Tenant(index, port, key) for index, key in enumerate(keys)]
    pending = iter(tenants)

    async def some() -> None:
        for tenant in pending:
            await tenant.set_up()

    await asyncio.gather(*(some() for _ in range(32)))
    return tenants


@dataclass(frozen=True)
class Place:
    """Where a server keeps its data. url: of its database."""

    data: Path
    url: str

    @property
    def command(self) -> list[str]:
        return [*SERVE, str(self.data), f"store.url={self.url}"]


@contextmanager
def places(store: str, folder: Path) -> Iterator[Callable[[str], Place]]:
    """Makes a new place for each name, on the database that was asked for."""
    if store == "sqlite":
        yield lambda name: Place(folder / name, f"sqlite:///{folder / name / 'treadle.db'}")
        return
    from treadle.testing.postgres import ThrowAwayPostgres

    with ThrowAwayPostgres(is_durable=True) as postgres:
        yield lambda name: Place(folder / name, postgres.create(name))


async def add_keys(place: Place, count: int) -> list[str]:
    """Keys in the store of a server that does not run yet."""
    keys = [f"tml-bench-{index:04d}-{'0' * 32}" for index in range(count)]
    await asyncio.to_thread(place.data.mkdir, parents=True)
    store = await Store.open(place.url)
    await asyncio.gather(*(store.keys.add(f"user-{i}", key_digest(key), is_admin=False) for i, key in enumerate(keys)))
    await store.close()
    return keys


ECHO = """
import socket, sys, uvicorn
from fastapi import FastAPI, Request
from starlette.responses import Response
app = FastAPI()

@app.post("/echo")
async def echo(request: Request) -> Response:
    return Response(await request.body())

listener = socket.create_server(("127.0.0.1", 0))
print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listener])
"""


async def echo_ceiling(num_requests: int = 5_000) -> dict[str, float]:
    """The same HTTP server and framework, doing nothing, under the same client: closed loop, 16 connections."""
    server = ServerProcess([sys.executable, "-c", ECHO])
    request = request_bytes("/echo", b"x" * 200, key="tml-echo")
    pending = iter(range(num_requests))

    async def send_all() -> None:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", server.port)
        for _ in pending:
            await connection.send(request)

    try:
        own_cpu, (cpu_s, _), started = time.process_time(), server.cpu_s(), time.monotonic()
        await asyncio.gather(*(send_all() for _ in range(16)))
        wall_s = time.monotonic() - started
        return {
            "requests_per_s": num_requests / wall_s,
            "server_cpu_ms_per_request": (server.cpu_s()[0] - cpu_s) / num_requests * 1e3,
            "generator_cpu_ms_per_request": (time.process_time() - own_cpu) / num_requests * 1e3,
        }
    finally:
        server.stop()


def commit_ceiling(folder: Path, num_commits: int = 500) -> float:
    """Commits of one small row per second, SQLite in WAL mode with a flush each, from one thread."""
    with sqlite3.connect(folder / "ceiling.db", isolation_level=None) as conn:
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            conn.execute(f"PRAGMA {pragma}")
        conn.execute("CREATE TABLE t (x)")
        started = time.monotonic()
        for _ in range(num_commits):
            conn.execute("INSERT INTO t VALUES ('0123456789')")
        return num_commits / (time.monotonic() - started)


async def measure(folder: Path, new_place: Callable[[str], Place], args: argparse.Namespace) -> dict[str, Any]:
    ceilings = {"echo": await echo_ceiling(), "commits_per_s": commit_ceiling(folder)}
    show_ceilings(ceilings)
    admission = await admission_cost(new_place("admission"))
    place = new_place("load")
    keys = await add_keys(place, args.tenants)
    server = ServerProcess(place.command)
    rates = {}
    try:
        tenants = await set_up(server.port, keys)
        polls = [asyncio.ensure_future(tenant.poll_forever()) for tenant in tenants]
        await asyncio.sleep(1.0)
        (idle_cpu, _), idle_started = server.cpu_s(), time.monotonic()
        await asyncio.sleep(5.0)
        idle_cores = (server.cpu_s()[0] - idle_cpu) / (time.monotonic() - idle_started)
        for rate in args.rates:
            rates[str(rate)] = await open_loop(server, tenants, rate, args.seconds)
            await asyncio.sleep(1.0)
        rss_mb = server.rss_mb()
        for poll in polls:
            poll.cancel()
        for tenant in tenants:
            tenant.pool.close()
    finally:
        server.stop()
    return {
        "ceilings": ceilings,
        "admission": admission,
        "rates": rates,
        "idle_server_cores": idle_cores,
        "server_rss_mb": rss_mb,
    }


def show_ceilings(ceilings: dict[str, Any]) -> None:
    echo = ceilings["echo"]
    rows = [
        ["bare FastAPI echo, requests/s", echo["requests_per_s"]],
        ["bare FastAPI echo, server CPU-ms per request", echo["server_cpu_ms_per_request"]],
        ["this load generator, CPU-ms per request", echo["generator_cpu_ms_per_request"]],
        ["SQLite commits/s, one thread", ceilings["commits_per_s"]],
    ]
    report.print_table("Ceilings of this run", ["figure", "value"], rows)


def show(result: dict[str, Any]) -> None:
    """The tables."""
    columns = ["rate", "done/s", "errors", "submit p50 ms", "p99", "max", "beat p99", "result p50", "p99"]
    columns += ["server cores", "worker", "generator", "CPU-ms/request"]
    rows = []
    for rate, figures in result["rates"].items():
        submit, beat, done = figures["submit_s"], figures["heartbeat_s"], figures["result_s"]
        seconds = [submit["p50"], submit["p99"], submit["max"], beat["p99"], done["p50"], done["p99"]]
        cores = [figures[f"{name}_cores"] for name in ("server", "worker", "generator")]
        cells = [rate, figures["done_per_s"], figures["errors"], *(value * 1e3 for value in seconds), *cores]
        rows.append([*cells, figures["server_cpu_ms_per_request"]])
    report.print_table(f"{result['config']['tenants']} connected tenants, open loop", columns, rows)
    rows = [[name.replace("_", " "), value] for name, value in result["admission"].items()]
    rows.append(["idle server with everybody connected, cores", result["idle_server_cores"]])
    rows.append(["server RSS, MB", result["server_rss_mb"]])
    report.print_table("Admission alone, and idling", ["figure", "value"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rates", type=int, nargs="+", default=[500, 1_000, 1_500], help="training requests per second"
    )
    parser.add_argument("--tenants", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=15.0, help="timed seconds per rate")
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--save", action="store_true", help="write it to benchmarks/results/MACHINE/ under its name")
    args = parser.parse_args()
    config = {"tenants": args.tenants, "seconds": args.seconds, "heartbeat_s": HEARTBEAT_S, "store": args.store}
    result: dict[str, Any] = {**report.context(), "config": config}
    with tempfile.TemporaryDirectory() as folder, places(args.store, Path(folder)) as new_place:
        result |= uvloop.run(measure(Path(folder), new_place, args))
    show(result)
    report.write(report.path_of(args, "gateway" if args.store == "sqlite" else f"gateway-{args.store}"), result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
