"""What it costs the server to take a pass, and what everybody else notices of it.

    python scripts/bench/admission.py [--store postgresql] [--json FILE] [--save]

A full body of the SDK is 5 MB of protobuf (its chunks end there), sent as zstd. Measured are the server's CPU seconds
per such body, per small request and per million tokens, gateway and store included, on a server whose scheduler waits
for company all the time; and how long heartbeats take while full bodies come in one behind the other, compared with
the same heartbeats alone. The heartbeats are sent by a process of their own, so that the sender of the bodies does not
delay them. Delays need an idle machine: the load average at the start is in the result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import uvloop
from gateway import (
    LARGE_TOKENS,
    Place,
    ServerProcess,
    Tenant,
    add_keys,
    admission_cost,
    at_rate,
    percentiles,
    places,
    set_up,
)
from http_load import ConnectionPool, request_bytes

FULL_BYTES = 5_000_000
# Tokens, targets (int64) and weights (float32) of a datum, in the protobuf.
BYTES_PER_TOKEN = 16
NUM_FULL = 40
HEARTBEATS_PER_S = 100.0
# What each figure may be at most.
GOALS = {
    "cpu_ms_per_full_body": 60.0,
    "heartbeat_delay_ms": 20.0,
    "cpu_s_per_million_tokens": 0.5,
    "cpu_ms_per_small_request": 1.0,
}


def full_bodies(tenant: Tenant, count: int, *, first_seq_id: int) -> list[bytes]:
    """Requests of as many datums as the SDK puts into one."""
    num_datums = FULL_BYTES // (LARGE_TOKENS * BYTES_PER_TOKEN)
    return [
        tenant.pass_request(seq_id, num_datums=num_datums, num_tokens=LARGE_TOKENS)
        for seq_id in range(first_seq_id, first_seq_id + count)
    ]


async def send_all(tenant: Tenant, requests: Sequence[bytes]) -> float:
    """Send one after the other; the wall seconds."""
    started = time.monotonic()
    for request in requests:
        answer = await tenant.pool.send(request)
        assert answer.status == 200, answer
    return time.monotonic() - started


async def full_body_cost(place: Place) -> dict[str, Any]:
    """CPU per full body, and heartbeats alone and beside full bodies."""
    (key,) = await add_keys(place, 1)
    server = ServerProcess([*place.command, "scheduler.gather_window_ms=1e9", "server.drain_s=0"])
    try:
        (tenant,) = await set_up(server.port, [key])
        bodies = full_bodies(tenant, 2 * NUM_FULL + 2, first_seq_id=1)
        await send_all(tenant, bodies[:2])
        before, _ = server.cpu_s()
        alone_s = await send_all(tenant, bodies[2 : NUM_FULL + 2])
        cpu_s = server.cpu_s()[0] - before
        quiet = await heartbeats(server.port, tenant, duration_s=5.0)
        beats = asyncio.ensure_future(heartbeats(server.port, tenant, duration_s=max(2.0, 1.2 * alone_s)))
        await asyncio.sleep(1.0)
        beside_s = await send_all(tenant, bodies[NUM_FULL + 2 :])
        busy = await beats
        tenant.pool.close()
    finally:
        server.stop()
    return {
        "body_bytes": len(bodies[0]),
        "num_tokens": FULL_BYTES // BYTES_PER_TOKEN,
        "cpu_ms_per_full_body": cpu_s / NUM_FULL * 1e3,
        "full_body_ms": alone_s / NUM_FULL * 1e3,
        "full_body_beside_heartbeats_ms": beside_s / NUM_FULL * 1e3,
        "heartbeat_alone_s": quiet,
        "heartbeat_beside_full_bodies_s": busy,
        "heartbeat_delay_ms": (busy["p99"] - quiet["p99"]) * 1e3,
    }


async def heartbeats(port: int, tenant: Tenant, *, duration_s: float) -> dict[str, float]:
    """Latencies of heartbeats at a steady rate, from another process."""
    arguments = ["--heartbeats", str(port), tenant.key, tenant.session_id, str(duration_s)]
    process = await asyncio.create_subprocess_exec(sys.executable, __file__, *arguments, stdout=asyncio.subprocess.PIPE)
    written, _ = await process.communicate()
    assert process.returncode == 0, "the heartbeats ended"
    latencies: dict[str, float] = json.loads(written)
    return latencies


async def send_heartbeats(port: int, key: str, session_id: str, duration_s: float) -> dict[str, float]:
    """`heartbeats`, in the process that sends them."""
    pool = ConnectionPool(port)
    request = request_bytes("/api/v1/session_heartbeat", json.dumps({"session_id": session_id}).encode(), key=key)
    latencies: list[float] = []

    async def beat(_index: int, scheduled: float) -> None:
        answer = await pool.send(request)
        assert answer.status == 200, answer
        latencies.append(answer.at - scheduled)

    await at_rate(HEARTBEATS_PER_S, duration_s, beat)
    pool.close()
    return percentiles(latencies)


def show(result: dict[str, Any]) -> None:
    """A figure per line, beside its goal."""
    figures = {**result["full_body"], **result["admission"]}
    rows = [[name.replace("_", " "), figures[name], goal] for name, goal in GOALS.items()]
    report.print_table("Admission", ["figure", "measured", "goal"], rows)
    rows = [
        [name, *(figures[f"heartbeat_{name}_s"][part] * 1e3 for part in ("p50", "p90", "p99", "max"))]
        for name in ("alone", "beside_full_bodies")
    ]
    report.print_table("Heartbeats, ms", ["", "p50", "p90", "p99", "max"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--save", action="store_true", help="write it to benchmarks/results/MACHINE/ under its name")
    parser.add_argument("--heartbeats", nargs=4, metavar=("PORT", "KEY", "SESSION", "SECONDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.heartbeats:
        port, key, session_id, duration_s = args.heartbeats
        print(json.dumps(uvloop.run(send_heartbeats(int(port), key, session_id, float(duration_s)))))
        return 0
    result: dict[str, Any] = {**report.context(), "config": {"store": args.store, "bodies": NUM_FULL}, "goals": GOALS}
    with tempfile.TemporaryDirectory() as folder, places(args.store, Path(folder)) as new_place:
        result["full_body"] = uvloop.run(full_body_cost(new_place("full")))
        result["admission"] = uvloop.run(admission_cost(new_place("admission")))
    show(result)
    name = "admission" if args.store == "sqlite" else f"admission-{args.store}"
    report.write(report.path_of(args, name), result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
