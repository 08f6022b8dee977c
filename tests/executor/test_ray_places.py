"""Where a worker on another machine than its server's keeps files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from treadle.executor.messages import WorkerConfig
from treadle.executor.ray_actor import on_this_host
from treadle.worker import staging


def test_staged_bytes_of_different_blobs_never_share_a_place(
    config: WorkerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when two servers on machines of their own call their directories the same."""
    monkeypatch.setattr(staging, "SHARED_MEMORY", tmp_path)
    here = replace(config, staging_dir=str(tmp_path / "staging"))
    assert on_this_host(here) == here
    elsewhere = replace(config, staging_dir=str(tmp_path / "not-here" / "staging"))
    places = [on_this_host(replace(elsewhere, blobs_url=url)).staging_dir for url in ("s3://a", "s3://b", "s3://a")]
    assert places[0] == places[2] != places[1]
    assert places[0] == str(staging.staging_place("s3://a", tmp_path / "otherwise")), "what a server here would take"
