"""The committed table of the SDK's methods and commands holds: every row is run again, against a fresh server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_no_method_or_command_is_worse_than_the_table_says() -> None:
    command = [sys.executable, "scripts/conform/run.py", "--check"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "scripts"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_table_has_no_row_that_fails() -> None:
    rows = json.loads((ROOT / "docs" / "conformance.json").read_text())["rows"]
    assert len(rows) > 100
    assert {row["verdict"] for row in rows} <= {"pass", "refused"}
    assert all(row["evidence"] for row in rows)
