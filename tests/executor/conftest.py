from __future__ import annotations

from pathlib import Path

import pytest

from treadle.blobs import BlobStore
from treadle.blobs.local import LocalBlobs
from treadle.config import bundled_model_dir
from treadle.executor.messages import WorkerConfig


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return LocalBlobs(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> WorkerConfig:
    """A worker of the bundled model, and the place of its blobs, which a server makes."""
    LocalBlobs(tmp_path / "blobs")
    return WorkerConfig(
        base_model="treadle/tiny",
        source=str(bundled_model_dir()),
        revision=None,
        device="cpu",
        dtype="float32",
        num_threads=1,
        blobs_url=str(tmp_path / "blobs"),
        max_running_samples=16,
        max_cached_tokens=0,
    )
