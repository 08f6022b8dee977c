"""`treadle demo` end to end: it passes when all is well, and says what failed when it is not."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from treadle.errors import ServerError


def run_demo(*args: str, scratch: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(scratch), "COLUMNS": "200"}
    command = [sys.executable, "-m", "treadle.cli", "demo", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)


@pytest.mark.timeout(300)
def test_the_demo_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run_demo(scratch=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert "7 of 7 phrases are right" in done.stdout
    assert "has the same loss" in done.stdout
    assert "stopped on SIGTERM with exit status 0" in done.stdout
    assert list(tmp_path.glob("treadle-demo-*")) == []


@pytest.mark.timeout(300)
def test_a_demo_that_did_not_learn_fails(tmp_path: Path) -> None:
    done = run_demo("--steps", "1", scratch=tmp_path)
    assert done.returncode == 1
    assert "FAIL the loss per token fell" in done.stdout
    assert "FAIL after training" in done.stdout
    # What does not depend on learning still holds.
    assert "ok   sampler and trainer agree" in done.stdout


def test_a_server_that_cannot_start_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from treadle.demo.own_server import OwnServer

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server = OwnServer(str(tmp_path / "no-model-here"))
    with pytest.raises(ServerError, match="does not exist"):
        server.wait_until_ready()
    assert server.stop() != 0
    assert list(tmp_path.iterdir()) == []
