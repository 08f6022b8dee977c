"""Older SDKs against a real server: each in an environment of its own, which is made once and kept in a cache.

The default run has 0.16.1, the version that Twinkle's cookbook pins, and compares every number with 0.38's; the others
are slow. scripts/sdk_matrix runs the same for a person to read.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
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
    return run(matrix, matrix.CURRENT, server)


def run(matrix: ModuleType, version: str, server: ServerProcess, **options: Any) -> dict[str, Any]:
    if version != matrix.CURRENT:
        try:
            matrix.python_of(version)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no environment with tinker {version}: {error}")
    result = matrix.run_version(version, server.url, **options)
    assert isinstance(result, dict)
    assert not matrix.failures(result), (matrix.failures(result), result["stderr"][-4000:])
    return result


def test_0_16_1_does_everything_with_the_numbers_of_the_newest(
    matrix: ModuleType, server: ServerProcess, newest: dict[str, Any]
) -> None:
    result = run(matrix, "0.16.1", server)
    assert result["version"] == "0.16.1"
    assert matrix.differences([newest, result]) == []
    # It has everything but what came later, and the comparison compared something.
    assert {name for name, fact in result["checks"].items() if fact["outcome"] != "ok"} == set()
    assert len(result["numbers"]) >= 15


def test_twinkles_scripts_run_under_the_version_that_they_pin(matrix: ModuleType, server: ServerProcess) -> None:
    result = run(matrix, matrix.TWINKLE_VERSION, server, script="twinkle_flows.py")
    assert {name for name, fact in result["checks"].items() if fact["outcome"] == "ok"} == {
        "lora",
        "self_cognition",
        "sample",
        "grpo",
        "dpo",
    }


def test_an_old_client_lists_the_runs_of_a_newer_one(matrix: ModuleType, server: ServerProcess) -> None:
    """One list with an external checkpoint in it would be refused whole."""
    key = new_key()
    training = server.training_client(key)
    training.save_state("a").result(timeout=60)
    training.save_weights_external("b").result(timeout=60)
    code = (
        "import sys, tinker\n"
        "rest = tinker.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2]).create_rest_client()\n"
        "for found in (rest.list_user_checkpoints(), rest.list_checkpoints(sys.argv[3])):\n"
        "    print(*[checkpoint.checkpoint_id for checkpoint in found.result(timeout=60).checkpoints])\n"
    )
    command = [str(matrix.python_of("0.16.1")), "-c", code, server.url, key, training.model_id]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout.split("\n") == ["weights/a", "weights/a", ""], done.stderr
    newer = server.rest_client(key).list_user_checkpoints().result(timeout=60)
    assert {checkpoint.checkpoint_type for checkpoint in newer.checkpoints} == {"training", "external"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", OTHER_VERSIONS)
def test_other_versions(matrix: ModuleType, server: ServerProcess, newest: dict[str, Any], version: str) -> None:
    result = run(matrix, version, server)
    assert matrix.differences([newest, result]) == []


def test_different_numbers_are_found(matrix: ModuleType) -> None:
    results = [{"version": "1", "numbers": {"a": 1, "b": 2}}, {"version": "2", "numbers": {"a": 1, "b": 3}}]
    assert matrix.differences(results) == ["b: 1: 2; 2: 3"]
    assert matrix.differences([results[0], {"version": "2", "numbers": {"a": 1}}]) == []
