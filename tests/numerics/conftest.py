"""Base models of every kind the engine knows, for comparisons of numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The builders are the engine tests' own; test directories are not packages.
sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))

from engine_builders import load_tiny, make_model_dir

from treadle.engine.base_model import BaseModel

ModelDir = Callable[[str, bool], Path]


@pytest.fixture(scope="session")
def model_dir_of(tmp_path_factory: pytest.TempPathFactory) -> ModelDir:
    """The directory of a tiny model by architecture and whether its embeddings are tied; each is made once."""
    made: dict[tuple[str, bool], Path] = {}

    def model_dir(architecture: str, tied: bool) -> Path:
        key = (architecture, tied)
        if key not in made:
            made[key] = make_model_dir(tmp_path_factory.mktemp(architecture), architecture, tied=tied)
        return made[key]

    return model_dir


@pytest.fixture(scope="session")
def base(model_dir_of: ModelDir) -> BaseModel:
    return load_tiny(model_dir_of("qwen3", True))
