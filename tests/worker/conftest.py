from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from worker_support import Driver, MemoryBlobs

from treadle.config import bundled_model_dir
from treadle.testing.clock import ManualClock
from treadle.worker.build import build_worker


@pytest.fixture
def blobs() -> MemoryBlobs:
    return MemoryBlobs()


@pytest.fixture
def make_driver(blobs: MemoryBlobs) -> Callable[..., Driver]:
    """A fresh worker on the bundled model; several of them share the blobs, as processes do."""

    def make(
        *,
        micro_batch_tokens: int = 0,
        parking_dir: Path | None = None,
        max_resident_bytes: int = 0,
        clock: ManualClock | None = None,
    ) -> Driver:
        worker = build_worker(
            base_model="treadle/tiny",
            source=str(bundled_model_dir()),
            revision=None,
            device="cpu",
            dtype="float32",
            num_threads=1,
            blobs=blobs,
            max_running_samples=8,
            max_cached_tokens=0,
            micro_batch_tokens=micro_batch_tokens,
            parking_dir=parking_dir,
            max_resident_bytes=max_resident_bytes,
            clock=(clock or ManualClock()).monotonic,
        )
        return Driver(worker)

    return make


@pytest.fixture
def driver(make_driver: Callable[..., Driver]) -> Driver:
    return make_driver()
