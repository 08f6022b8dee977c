"""One gateway per test, over a local blob directory and SQLite unless a test says otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from gateway_support import OTHER_POOL, POOL, Harness, facts

from treadle.blobs import LocalBlobs
from treadle.gateway import GatewaySettings, PoolView, create_app
from treadle.store import Store
from treadle.testing.clock import ManualClock

MODEL_DIR = Path("/models/base")


@pytest.fixture
def settings() -> GatewaySettings:
    """Tests that need other settings override this fixture. A short hold: nothing here may wait for long."""
    return GatewaySettings(is_loopback=True, hold_s=0.1)


@pytest.fixture
def gateway_url(sqlite_url: str) -> str:
    """The database of `gateway`. Tests of what databases refuse override this fixture."""
    return sqlite_url


@pytest.fixture
async def gateway(settings: GatewaySettings, gateway_url: str, tmp_path: Path) -> AsyncIterator[Harness]:
    async with running_gateway(settings, gateway_url, tmp_path, ManualClock()) as harness:
        yield harness


@pytest.fixture
async def other_gateway(gateway: Harness, gateway_url: str, tmp_path: Path) -> AsyncIterator[Harness]:
    """Another gateway of the same database, with a store of its own; the two share their clock."""
    async with running_gateway(gateway.settings, gateway_url, tmp_path, gateway.clock) as harness:
        yield harness


@asynccontextmanager
async def running_gateway(
    settings: GatewaySettings, gateway_url: str, tmp_path: Path, clock: ManualClock
) -> AsyncIterator[Harness]:
    store = await Store.open(gateway_url, clock=clock.now)
    harness = Harness(
        store=store,
        blobs=LocalBlobs(tmp_path / "blobs"),
        clock=clock,
        settings=settings,
        pools=[
            PoolView(POOL, aliases=(str(MODEL_DIR),), facts=facts(), is_ready=True),
            PoolView(OTHER_POOL, facts=facts(OTHER_POOL), is_ready=True),
        ],
    )
    harness.app = create_app(harness.deps())
    transport = httpx.ASGITransport(app=harness.app)
    async with (
        harness.app.router.lifespan_context(harness.app),
        httpx.AsyncClient(transport=transport, base_url="http://gateway") as client,
    ):
        harness.client = client
        yield harness
    await store.close()
