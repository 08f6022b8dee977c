"""Base models shared by the engine's tests; passes leave them unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_builders import load_tiny, make_model_dir

from treadle.engine.base_model import BaseModel


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=True)


@pytest.fixture(scope="session")
def base(model_dir: Path) -> BaseModel:
    return load_tiny(model_dir)
