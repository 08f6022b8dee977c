"""Fetching from ModelScope: only the network is replaced."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from worker_support import MemoryBlobs

from treadle.config import bundled_model_dir
from treadle.errors import ConfigError
from treadle.worker.build import build_worker
from treadle.worker.modelscope_hub import fetch_from_modelscope


def stand_in(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, str | None]]) -> None:
    """A `modelscope` package whose hub holds the bundled model as acme/tiny."""

    def snapshot_download(model_id: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        calls.append((model_id, revision))
        if model_id != "acme/tiny":
            raise RuntimeError("no such model")
        return str(bundled_model_dir())

    module = ModuleType("modelscope")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", module)


def test_a_pool_serves_a_modelscope_model_under_its_stable_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None]] = []
    stand_in(monkeypatch, calls)
    worker = build_worker(
        base_model="acme/tiny",
        source="acme/tiny",
        revision="v1",
        hub="modelscope",
        device="cpu",
        dtype="float32",
        num_threads=1,
        blobs=MemoryBlobs(),
        max_running_samples=4,
        max_cached_tokens=0,
        micro_batch_tokens=0,
    )
    assert calls == [("acme/tiny", "v1")]
    assert worker.facts.base_model == "acme/tiny"
    assert worker.facts.revision


def test_a_missing_model_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [])
    with pytest.raises(ConfigError, match="acme/none"):
        fetch_from_modelscope("acme/none", None)


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match="pip install"):
        fetch_from_modelscope("acme/tiny", None)
