"""scripts/loss_compare: it finds what differs, and only that; a commit of its own runs beside the working tree."""

from __future__ import annotations

import importlib.util
import subprocess
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "loss_compare"


def test_company_and_pass_size_keep_every_bit() -> None:
    done = _run(
        "--a-set", "company=alone", "--b-set", "company=reversed", "--b-set", "pass_tokens=64", "--assert-equal"
    )
    assert done.returncode == 0, done.stderr
    assert "losses: identical in all 2 steps" in done.stdout
    assert done.stdout.count("same bits") == 2
    assert "falls: 2 of 2 losses (a), 2 of 2 losses (b)" in done.stdout


def test_unknown_setting_is_refused_not_ignored() -> None:
    done = _run("--a-set", "recomputation=full")
    assert done.returncode == 2
    assert "['recomputation'] are not known; known: company, dtype" in done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_a_commit_runs_from_a_worktree_and_another_seed_is_a_difference() -> None:
    done = _run("--a", "HEAD", "--b-set", "seed=1", "--rtol", "1e-3")
    assert done.returncode == 1, done.stderr
    assert "a: HEAD with threads=1" in done.stdout
    assert "losses: first differ at step 0, tenant 0 (cross_entropy r8)" in done.stdout
    assert done.stdout.count("different bits") == 2
    left = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "loss-compare-" not in left.stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_commit_that_does_not_exist_is_named() -> None:
    done = _run("--a", "no-such-commit")
    assert done.returncode == 2
    assert "no-such-commit" in done.stderr


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [(1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (2.0, 1.0, 0.5), (-1.0, 1.0, 2.0), (1.0, float("nan"), float("inf"))],
)
def test_relative_difference(mine: float, theirs: float, expected: float) -> None:
    script = _module()
    assert script.compare({"losses": [[3.0, mine]]}, {"losses": [[3.0, theirs]]}) == [expected]


def test_equality_looks_at_logprobs_and_weights_too() -> None:
    script = _module()
    side = {"losses": [[1.0]], "logprobs_digest": "x", "weights_digest": "y"}
    assert script._is_equal(side, dict(side))
    assert not script._is_equal(side, side | {"logprobs_digest": "z"})
    assert not script._is_equal(side, side | {"weights_digest": "z"})
    assert not script._is_equal(side, side | {"losses": [[1.0000001]]})


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), "--steps", "2", "--tenants", "2", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)


def _module() -> ModuleType:
    loader = SourceFileLoader("loss_compare", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
