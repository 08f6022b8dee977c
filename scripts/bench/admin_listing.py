"""How long operators' listings take with 10,000 tenants and 100,000 checkpoints, through HTTP.

    python scripts/bench/admin_listing.py [--store postgresql] [--requests 300] [--json FILE] [--save]

The database is filled with rows, not with work: tenants with keys, each with sessions, runs and checkpoints; 100,000
audit events; and usage per hour, of tokens of a tenth of the tenants each day for 30 days, and of storage of every run
each hour for the last two days. The app runs under uvicorn in a process of its own, on one connection that asks for
one page after another; pages begin at random places of the listing, which cursors of a walk through all of it say.
"CPU" is the server's own processor time per request, without PostgreSQL's: what other work on the machine cannot add
to. "first" is the first page after the start of the server: sums of hours over all tenants are remembered from then on.
The goal is a p99 below 100 ms for pages of 100.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import report
import sqlalchemy as sa
import uvicorn
import uvloop
from gateway import Place, places
from prometheus_client import CollectorRegistry

from treadle.blobs import LocalBlobs
from treadle.domain.ids import PoolName
from treadle.domain.keys import key_digest
from treadle.domain.usage import HOUR_S, UsageKind, hour_of
from treadle.gateway import GatewayDeps, GatewaySettings, PoolDirectory, PoolView, Readiness, create_app
from treadle.server import Clock
from treadle.store import Store
from treadle.store.tables import audit_log, checkpoints, keys, models, sessions, tenants, usage_events
from treadle.telemetry.metrics import Metrics

NUM_TENANTS, NUM_CHECKPOINTS, NUM_EVENTS = 10_000, 100_000, 100_000
NUM_RUNS = NUM_CHECKPOINTS // 5
NUM_DAYS, SHARE_ACTIVE, HOURS_ACTIVE = 30, 0.1, 3
STORAGE_HOURS = 48
GOAL_MS = 100.0
KEY = "tml-bench"
TOKEN_KINDS = (UsageKind.TRAINING, UsageKind.PREFILL, UsageKind.PREFILL_CACHED, UsageKind.SAMPLED)
# Rows of one statement.
BATCH = 5_000


def tenant_of(number: int) -> str:
    return f"user:tenant-{number:05}"


def rows_of(now: float, drawn: random.Random) -> Iterator[tuple[sa.Table, dict[str, Any]]]:
    """Everything in the database, tables in the order in which they refer to each other."""
    for number in range(NUM_TENANTS):
        tenant, came = tenant_of(number), now - drawn.random() * 1e7
        digest = key_digest(f"tml-{number}")
        yield (
            tenants,
            {
                "tenant_id": tenant,
                "weight_class": "bulk" if number % 100 == 0 else "standard",
                "updated_at": came,
                "organization": f"org-{number % 50}" if number % 2 else None,
                "source": "keys",
                "is_suspended": False,
                "created_at": came,
            },
        )
        key = {"tenant_id": tenant, "user": tenant[5:], "digest": digest, "is_admin": False, "created_at": came}
        yield keys, key
        session = {"session_id": f"s{number:05}", "tenant_id": tenant, "state": "active", "sdk_version": "0.38.0"}
        times = {"created_at": came, "last_heartbeat_at": came}
        yield sessions, session | times | {"project_id": f"p{number % 7}", "user_metadata": {}}
    for number in range(NUM_RUNS):
        yield models, _model(number, now)
    for number in range(NUM_CHECKPOINTS):
        yield checkpoints, _checkpoint(number, now - drawn.random() * 1e7)
    for _ in range(NUM_EVENTS):
        yield audit_log, _event(now - drawn.random() * 1e6, drawn.randrange(NUM_TENANTS))
    yield from _usage(hour_of(now), drawn)


def _model(number: int, now: float) -> dict[str, Any]:
    owner = number % NUM_TENANTS
    return {
        "model_id": f"s{owner:05}:train:{number // NUM_TENANTS}",
        "session_id": f"s{owner:05}",
        "tenant_id": tenant_of(owner),
        "pool": "m",
        "base_model": "m",
        "revision": "",
        "lora": {"rank": 8, "seed": 1},
        "state": "ready",
        "state_message": "",
        "next_seq_id": 5,
        "incarnation": 0,
        "changed_seq": 4,
        "user_metadata": {},
        "created_at": now,
        "last_request_at": now,
        "create_request_id": f"r{number}",
    }


def _checkpoint(number: int, came: float) -> dict[str, Any]:
    owner = number % NUM_RUNS % NUM_TENANTS
    model_id = f"s{owner:05}:train:{number % NUM_RUNS // NUM_TENANTS}"
    name = f"c{number}"
    lora = {"rank": 8, "seed": 1, "train_attn": True, "train_mlp": True, "train_unembed": True}
    return {
        "tinker_path": f"tinker://{model_id}/weights/{name}",
        "model_id": model_id,
        "tenant_id": tenant_of(owner),
        "kind": "weights",
        "name": name,
        "blob_key": f"b/{number}",
        "size_bytes": 1_000_000,
        "seq_id": 1,
        "created_at": came,
        "base_model": "m",
        "lora": lora,
        "public": number % 50 == 0,
        "user_metadata": {},
    }


def _event(at: float, owner: int) -> dict[str, Any]:
    return {
        "tenant_id": "user:ops",
        "created_at": at,
        "event_type": "admin",
        "event": "tenant.changed" if owner % 10 else "quota.set",
        "details": {"before": None, "after": {"weight_class": "bulk"}},
        "actor": "user:ops (key 1)",
        "subject": f"tenant:{tenant_of(owner)}",
    }


def _usage(this_hour: int, drawn: random.Random) -> Iterator[tuple[sa.Table, dict[str, Any]]]:
    for hours_ago in range(NUM_DAYS * 24, -1, -1):
        hour = this_hour - hours_ago * HOUR_S
        for owner in drawn.sample(range(NUM_TENANTS), int(NUM_TENANTS * SHARE_ACTIVE * HOURS_ACTIVE / 24)):
            for kind in TOKEN_KINDS:
                yield usage_events, _used(owner, 0, hour, kind, drawn.randrange(10_000))
        for number in range(NUM_RUNS if 0 < hours_ago <= STORAGE_HOURS else 0):
            run = number // NUM_TENANTS
            yield usage_events, _used(number % NUM_TENANTS, run, hour, UsageKind.STORAGE, 5e6 * HOUR_S)


def _used(owner: int, run: int, hour: int, kind: UsageKind, amount: float) -> dict[str, Any]:
    return {
        "tenant_id": tenant_of(owner),
        "bucket_start": hour,
        "session_id": f"s{owner:05}",
        "model_id": f"s{owner:05}:train:{run}",
        "base_model": "m",
        "kind": kind.value,
        "amount": float(amount),
    }


async def fill(url: str) -> dict[str, int]:
    """How many rows each table got."""
    store = await Store.open(url)
    await store.keys.add("ops", key_digest(KEY), is_admin=True)
    await store.close()
    counts: dict[str, int] = {}
    engine = sa.create_engine(url)
    with engine.begin() as conn:
        table: sa.Table | None = None
        batch: list[dict[str, Any]] = []
        for owner, row in rows_of(time.time(), random.Random(7)):
            counts[owner.name] = counts.get(owner.name, 0) + 1
            if owner is not table or len(batch) == BATCH:
                if table is not None and batch:
                    conn.execute(table.insert(), batch)
                table, batch = owner, []
            batch.append(row)
        assert table is not None
        conn.execute(table.insert(), batch)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        if engine.dialect.name == "postgresql":
            # What autovacuum does within a minute of such a day.
            conn.exec_driver_sql("VACUUM ANALYZE")
    engine.dispose()
    return counts


async def serve(url: str, directory: str) -> None:
    """The app, until the process is ended."""
    store = await Store.open(url)

    async def readiness() -> Readiness:
        return Readiness(is_ready=True)

    deps = GatewayDeps(
        store=store,
        blobs=LocalBlobs(Path(directory) / "blobs"),
        clock=Clock(),
        pools=PoolDirectory(lambda: [PoolView(PoolName("m"), is_ready=True)]),
        settings=GatewaySettings(is_loopback=True, auth_methods=("keys",)),
        readiness=readiness,
        is_draining=lambda: False,
        draw_seed=lambda: 1,
        metrics=Metrics(CollectorRegistry()),
    )
    server = uvicorn.Server(uvicorn.Config(create_app(deps), port=0, log_level="error", access_log=False))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


LISTINGS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("tenants", "tenants", "tenants", {"limit": 100}),
    ("tenants of an organisation", "tenants", "tenants", {"limit": 100, "organization": "org-7"}),
    ("tenants by a part of the name", "tenants", "tenants", {"limit": 100, "q": "-0099"}),
    ("organisations", "organizations", "organizations", {"limit": 100}),
    ("checkpoints", "checkpoints", "checkpoints", {"limit": 100}),
    ("checkpoints of a tenant", "checkpoints", "checkpoints", {"limit": 100, "tenant": tenant_of(77)}),
    ("published checkpoints", "checkpoints", "checkpoints", {"limit": 100, "public": "true"}),
    ("audit", "audit", "events", {"limit": 100}),
    ("audit of a subject", "audit", "events", {"limit": 100, "subject": f"tenant:{tenant_of(77)}"}),
    ("audit of an event", "audit", "events", {"limit": 100, "event": "quota.set"}),
    ("usage by day, 7 days", "usage", "data", {"group_by": "day"}),
    ("usage by day of a tenant", "usage", "data", {"group_by": "day", "tenant": tenant_of(77)}),
    ("usage by hour, 7 days", "usage", "data", {"group_by": "hour", "limit": 100}),
    ("usage by tenant, 7 days", "usage", "data", {"group_by": "tenant", "limit": 100}),
)


def measure(
    client: httpx.Client, server: psutil.Process, path: str, rows: str, query: dict[str, Any], num_requests: int
) -> dict[str, Any]:
    """Milliseconds of pages at random places, and of the very first one, for which nothing is remembered."""
    drawn = random.Random(7)
    began = time.perf_counter()
    client.get(path, params=query)
    first_ms = (time.perf_counter() - began) * 1e3
    cursors: list[str | None] = [None]
    num_rows = 0
    while len(cursors) < 200:
        answer = client.get(path, params=query | ({} if cursors[-1] is None else {"after": cursors[-1]})).json()
        num_rows += len(answer[rows])
        if answer["next"] is None:
            break
        cursors.append(answer["next"])
    times, sizes = [], []
    cpu_before = sum(server.cpu_times()[:2])
    for _ in range(num_requests):
        cursor = drawn.choice(cursors)
        asked = query if cursor is None else query | {"after": cursor}
        began = time.perf_counter()
        answer = client.get(path, params=asked)
        times.append((time.perf_counter() - began) * 1e3)
        assert answer.status_code == 200, answer.text
        sizes.append(len(answer.content))
    times.sort()
    cpu_s = sum(server.cpu_times()[:2]) - cpu_before
    return {
        "cpu_ms": cpu_s / num_requests * 1e3,
        "pages": len(cursors),
        "first_ms": first_ms,
        "p50_ms": statistics.median(times),
        "p99_ms": times[min(len(times) - 1, int(0.99 * len(times)))],
        "max_ms": times[-1],
        "bytes": statistics.mean(sizes),
    }


def run(place: Place, directory: str, num_requests: int) -> dict[str, Any]:
    """All listings on one database."""
    began = time.perf_counter()
    counts = asyncio.run(fill(place.url))
    print(f"filled in {time.perf_counter() - began:.0f} s: {counts}", flush=True)
    command = [sys.executable, __file__, "--serve", place.url, "--directory", directory]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        found = {}
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}/admin/v1/", headers={"X-API-Key": KEY}, timeout=60
        ) as client:
            for label, path, rows, query in LISTINGS:
                found[label] = measure(client, psutil.Process(server.pid), path, rows, query, num_requests)
                print(label, json.dumps(found[label]), flush=True)
        return {"rows": counts, "listings": found}
    finally:
        server.terminate()
        server.wait(30)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--serve", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--directory", default="", help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.serve is not None:
        uvloop.run(serve(args.serve, args.directory))
        return 0
    result: dict[str, Any] = {"benchmark": "admin_listing", "store": args.store, **report.context()}
    with tempfile.TemporaryDirectory() as directory, places(args.store, Path(directory)) as new_place:
        place = new_place("listing")
        place.data.mkdir(parents=True)
        result |= run(place, directory, args.requests)
    report.write(report.path_of(args, f"admin-listing-{args.store}"), result)
    rows = [
        [
            label,
            one["pages"],
            one["first_ms"],
            one["cpu_ms"],
            one["p50_ms"],
            one["p99_ms"],
            one["max_ms"],
            "" if one["p99_ms"] < GOAL_MS else "OVER",
        ]
        for label, one in result["listings"].items()
    ]
    title = f"Pages of operators' listings, {args.store}, ms"
    report.print_table(title, ["listing", "pages", "first", "CPU", "p50", "p99", "max", f"goal {GOAL_MS:.0f}"], rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
