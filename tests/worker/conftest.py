from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from worker_support import Driver, MemoryBlobs, new_driver


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs()


@pytest.fixture
def make_driver(blobs: MemoryBlobs) -> Callable[..., Driver]:
    """Makes workers that share `blobs`; see new_driver."""
    return partial(new_driver, blobs)


@pytest.fixture
def driver(make_driver: Callable[..., Driver]) -> Driver:
    return make_driver()
