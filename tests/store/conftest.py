"""One store per test, on a real database file. A second backend is one more parameter of `database_url`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from treadle.store import Store
from treadle.testing.clock import ManualClock


@pytest.fixture(params=["sqlite"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    assert request.param == "sqlite"
    return f"sqlite+aiosqlite:///{tmp_path}/treadle.db"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def store(database_url: str, clock: ManualClock) -> AsyncIterator[Store]:
    store = await Store.open(database_url, clock=clock.now)
    yield store
    await store.close()
