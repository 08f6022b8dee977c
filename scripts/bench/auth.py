"""What it costs to know who calls, and how soon a revoked key is refused by another server.

    python scripts/bench/auth.py [--store postgresql] [--json FILE] [--save]

Cost: CPU time of the process (event loop and database threads) per call of `Authenticator.principal` while everything
is cached, which is all that authentication adds to a request; 1,000 callers take turns. "confirm all": one read that
confirms all of them, at most two of which come in a second; "at 1,000/s" has its share in each request at that rate.
Kinds: created keys, tokens (JWT) of keys, ModelScope tokens as they are and behind `tml-` (their verdicts are there;
nobody asks ModelScope), tokens of those.

Revocation: this process revokes, another one with a store and an authenticator of its own presents the key every
millisecond; from the commit to the first refusal, at random phases of that one's caches. The same for a suspended
tenant, and for a key whose end is moved to now.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import report
from gateway import Place, places
from starlette.datastructures import Headers

from treadle.config import ModelScopeSettings
from treadle.domain.ids import TenantId
from treadle.domain.keys import key_digest, new_key
from treadle.domain.tenants import TenantChange
from treadle.errors import Forbidden, Unauthenticated
from treadle.gateway.auth import Authenticator
from treadle.gateway.deps import GatewaySettings
from treadle.gateway.signing import Signer
from treadle.server import Clock
from treadle.store import Store
from treadle.store.keys import COMMAND_LINE
from treadle.store.policy_watch import PolicyWatch
from treadle.store.token_verdicts import TokenVerdict

NUM_CALLERS = 1_000
NUM_CALLS = 60_000
REPETITIONS = 5
NUM_REVOCATIONS = 20
MODELSCOPE = ModelScopeSettings(organization="bench", endpoint="http://127.0.0.1:9")
GOALS = {"cpu_ms_per_request": 0.3, "revocation_s": 1.0}


class Gateway:
    """An authenticator as a gateway has it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        clock = Clock()
        self.policies = PolicyWatch(store)
        self.auth = Authenticator(
            store=store,
            settings=GatewaySettings(
                is_loopback=True, auth_methods=("keys", "modelscope"), modelscope=MODELSCOPE, has_jwt=True
            ),
            clock=clock,
            signer=Signer(store=store, clock=clock),
            policies=self.policies,
        )

    async def __aenter__(self) -> Gateway:
        await self.policies.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.auth.close()
        await self.policies.stop()
        await self.store.close()


async def new_verdict(store: Store, index: int) -> str:
    """A token that ModelScope was asked about just now."""
    token = f"ms-{secrets.token_hex(18)}"
    now = time.time()
    verdict = TokenVerdict(
        digest=key_digest(token),
        method=f"modelscope:{MODELSCOPE.endpoint}:{MODELSCOPE.organization}",
        tenant_id=TenantId(f"ms:user-{index}"),
        user=f"user-{index}",
        is_member=True,
        checked_at=now,
        good_until=now + MODELSCOPE.verdict_age_s,
    )
    await store.token_verdicts.put(verdict, source="modelscope", organization="bench", forget_before=0)
    return token


async def cost_of(gateway: Gateway, credentials: list[str]) -> dict[str, Any]:
    """CPU milliseconds per call, and wall milliseconds, over repetitions."""
    headers = [Headers(raw=[(b"host", b"localhost"), (b"x-api-key", each.encode())]) for each in credentials]
    for each in headers:
        await gateway.auth.principal(each, "127.0.0.1")
    cpu_ms, wall_ms = [], []
    for _ in range(REPETITIONS):
        cpu, wall = time.process_time(), time.perf_counter()
        for number in range(NUM_CALLS):
            await gateway.auth.principal(headers[number % len(headers)], "127.0.0.1")
            if number % 100 == 0:
                # As between requests: what runs in the background gets its turn.
                await asyncio.sleep(0)
        cpu_ms.append((time.process_time() - cpu) / NUM_CALLS * 1e3)
        wall_ms.append((time.perf_counter() - wall) / NUM_CALLS * 1e3)
    confirm_ms = []
    for _ in range(REPETITIONS):
        await asyncio.sleep(1.1)
        cpu = time.process_time()
        await gateway.auth.principal(headers[0], "127.0.0.1")
        confirm_ms.append((time.process_time() - cpu) * 1e3)
    return {
        "cpu_ms": report.spread(cpu_ms),
        "wall_ms": report.spread(wall_ms),
        "confirm_all_cpu_ms": report.spread(confirm_ms),
        "cpu_ms_at_1000_requests_per_s": statistics.median(cpu_ms) + 2 * statistics.median(confirm_ms) / 1_000,
    }


async def costs(place: Place) -> dict[str, Any]:
    place.data.mkdir(parents=True)
    async with Gateway(await Store.open(place.url)) as gateway:
        keys = [new_key() for _ in range(NUM_CALLERS)]
        await asyncio.gather(
            *(gateway.store.keys.add(f"user-{i}", key_digest(key), False) for i, key in enumerate(keys))
        )
        tokens = await asyncio.gather(*(new_verdict(gateway.store, i) for i in range(NUM_CALLERS)))
        jwts, token_jwts = [
            [await gateway.auth.token_for(Headers({"x-api-key": each})) for each in credentials]
            for credentials in (keys, tokens)
        ]
        kinds = {
            "keys": keys,
            "tokens (JWT) of keys": jwts,
            "ModelScope tokens": list(tokens),
            "ModelScope tokens behind tml-": [f"tml-{token}" for token in tokens],
            "tokens (JWT) of ModelScope tokens": token_jwts,
        }
        return {kind: await cost_of(gateway, credentials) for kind, credentials in kinds.items()}


async def watch(url: str) -> None:
    """The other server: say when each key that comes in on stdin is refused."""
    async with Gateway(await Store.open(url, migrate=False)) as gateway:
        while line := await asyncio.to_thread(sys.stdin.readline):
            headers = Headers({"x-api-key": line.strip()})
            await gateway.auth.principal(headers, "127.0.0.1")
            print("ready", flush=True)
            while True:
                try:
                    await gateway.auth.principal(headers, "127.0.0.1")
                except (Unauthenticated, Forbidden):
                    print(time.time(), flush=True)
                    break
                await asyncio.sleep(0.001)


async def revocations(place: Place) -> dict[str, Any]:
    """Seconds from a commit here to the first refusal there."""
    store = await Store.open(place.url)

    async def suspend(user: str, _key_id: int) -> None:
        change = TenantChange(is_suspended=True, suspended_reason="bench")
        await store.tenants.change(TenantId(f"user:{user}"), change, author=COMMAND_LINE)

    async def end(_user: str, key_id: int) -> None:
        await store.keys.change(key_id, name=None, expires_at=time.time(), author=COMMAND_LINE)

    async def revoke(_user: str, key_id: int) -> None:
        await store.keys.revoke(key_id)

    ways: dict[str, Callable[[str, int], Awaitable[None]]] = {
        "key revoked": revoke,
        "end of a key moved to now": end,
        "tenant suspended": suspend,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--watch", place.url, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(NUM_REVOCATIONS):
        for way, act in ways.items():
            key, user = new_key(), f"gone-{number}-{len(way)}"
            record = await store.keys.add(user, key_digest(key), False)
            process.stdin.write(f"{key}\n".encode())
            assert (await process.stdout.readline()).strip() == b"ready"
            await asyncio.sleep(0.5 + random.random())
            await act(user, record.key_id)
            committed_at = time.time()
            found[way].append(float(await process.stdout.readline()) - committed_at)
    process.stdin.close()
    assert await process.wait() == 0, "the other server ended"
    await store.close()
    return {way: {**report.spread(times), "mean": statistics.fmean(times)} for way, times in found.items()}


def show(result: dict[str, Any]) -> None:
    rows = [
        [
            kind,
            cost["cpu_ms"]["median"],
            cost["cpu_ms"]["max"],
            cost["confirm_all_cpu_ms"]["median"],
            cost["cpu_ms_at_1000_requests_per_s"],
            GOALS["cpu_ms_per_request"],
        ]
        for kind, cost in result["cost"].items()
    ]
    report.print_table(
        "Authentication, CPU ms per request", ["", "median", "max", "confirm all", "at 1,000/s", "goal"], rows
    )
    rows = [
        [way, times["min"], times["median"], times["max"], GOALS["revocation_s"]]
        for way, times in result["revocation_s"].items()
    ]
    report.print_table("From commit to refusal elsewhere, s", ["", "min", "median", "max", "goal"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--watch", metavar="URL", help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.watch:
        asyncio.run(watch(args.watch))
        return 0
    config = {"store": args.store, "callers": NUM_CALLERS, "calls": NUM_CALLS, "revocations": NUM_REVOCATIONS}
    result: dict[str, Any] = {**report.context(), "config": config, "goals": GOALS}
    with tempfile.TemporaryDirectory() as folder, places(args.store, Path(folder)) as new_place:
        place = new_place("auth")
        result["cost"] = asyncio.run(costs(place))
        result["revocation_s"] = asyncio.run(revocations(place))
    show(result)
    report.write(report.path_of(args, "auth" if args.store == "sqlite" else f"auth-{args.store}"), result)
    print(json.dumps({"load_average_at_start": result["load_average_at_start"]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
