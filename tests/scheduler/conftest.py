from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from scheduler_support import Cluster


@pytest.fixture
async def cluster(sqlite_template: Path, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A pool that leads, with its first worker."""
    shutil.copyfile(sqlite_template, tmp_path / "test.db")
    cluster = await Cluster.open(tmp_path)
    cluster.start()
    try:
        yield cluster
    finally:
        await cluster.close()
