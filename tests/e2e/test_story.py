"""The operator's story, as scripts/story tells it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

STORY = Path(__file__).parents[2] / "scripts" / "story"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_story_comes_out_as_told() -> None:
    done = subprocess.run([STORY], capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "came out as told" in done.stdout
