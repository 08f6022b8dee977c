from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from scheduler_support import Cluster


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A pool that leads, with its first worker."""
    cluster = await Cluster.open(tmp_path)
    cluster.start()
    try:
        yield cluster
    finally:
        await cluster.close()
