"""Older SDKs against a real server: each in an environment of its own, which is made once and kept in a cache.

The default run has 0.16.1, the version that Twinkle's cookbook pins, and compares every number with 0.38's; the others
are slow. scripts/sdk_matrix runs the same for a person to read.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from e2e_support import ServerProcess, new_key

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "sdks"
OTHER_VERSIONS = ("0.6.1", "0.14.0", "0.18.2", "0.24.1", "0.25.0", "0.30.0", "0.36.0")


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    """scripts/sdks/matrix.py as a module."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        spec = importlib.util.spec_from_file_location("sdk_matrix", SCRIPTS / "matrix.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(SCRIPTS))
    return module


@pytest.fixture(scope="module")
def newest(matrix: ModuleType, server: ServerProcess) -> dict[str, Any]:
    """What the SDK of this environment can do, and its numbers."""
    [result] = run(matrix, matrix.CURRENT, server)
    return result


def run(
    matrix: ModuleType, version: str, server: ServerProcess, *, sets: Sequence[str] = ("flows",), key: str | None = None
) -> list[dict[str, Any]]:
    """The results of these sets, in all of which nothing has failed."""
    if version != matrix.CURRENT:
        try:
            matrix.python_of(version)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no environment with tinker {version}: {error}")
    results: list[dict[str, Any]] = matrix.run_version(version, server.url, sets=sets, key=key)
    for result in results:
        assert not matrix.failures(result), (matrix.failures(result), result["stderr"][-4000:])
    return results


@pytest.mark.timeout(300)
def test_0_16_1_does_everything_with_the_numbers_of_the_newest(
    matrix: ModuleType, server: ServerProcess, newest: dict[str, Any]
) -> None:
    # Among the checkpoints that it lists there is one of a kind that it does not know, and would refuse the list for.
    key = new_key()
    server.training_client(key).save_weights_external("b").result(timeout=60)

    result, twinkle = run(matrix, "0.16.1", server, sets=("flows", "twinkle"), key=key)

    assert result["version"] == "0.16.1"
    assert matrix.differences([newest, result]) == []
    # It has everything that is checked, and the comparison compared something.
    assert {fact["outcome"] for fact in (*result["checks"].values(), *twinkle["checks"].values())} == {"ok"}
    assert list(twinkle["checks"]) == ["lora", "self_cognition", "sample", "grpo", "dpo"]
    assert len(result["numbers"]) >= 15
    listed = server.rest_client(key).list_user_checkpoints().result(timeout=60).checkpoints
    assert "external" in {checkpoint.checkpoint_type for checkpoint in listed}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", OTHER_VERSIONS)
def test_other_versions(matrix: ModuleType, server: ServerProcess, newest: dict[str, Any], version: str) -> None:
    [result] = run(matrix, version, server)
    assert matrix.differences([newest, result]) == []


def test_different_numbers_are_found(matrix: ModuleType) -> None:
    results = [{"version": "1", "numbers": {"a": 1, "b": 2}}, {"version": "2", "numbers": {"a": 1, "b": 3}}]
    assert matrix.differences(results) == ["b: 1: 2; 2: 3"]
    assert matrix.differences([results[0], {"version": "2", "numbers": {"a": 1}}]) == []
