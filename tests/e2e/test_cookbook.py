"""tinker-cookbook 0.6.1, as published, against a real server: every recipe of scripts/cookbook for a few steps.

Whether rewards rise is measured by `scripts/cookbook/run`; here the recipes must end well, both sides must compute the
same numbers, and neither may complain. Needs a package index once, for the cookbook's own environment.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# What the cookbook and the SDK say of themselves and of a machine without a network.
EXPECTED_WARNINGS = ("Could not fetch model pricing", "called from async context", "Stack for calling sync", "treadle")
# Sampler and trainer read the same weights; float32 leaves this much between their logprobs.
AGREEMENT = 1e-3


@pytest.fixture(scope="module")
def campaign() -> Iterator[ModuleType]:
    """scripts/cookbook/campaign.py, which finds its neighbours by name."""
    with pytest.MonkeyPatch.context() as patch:
        for directory in (SCRIPTS, SCRIPTS / "bench", SCRIPTS / "cookbook"):
            patch.syspath_prepend(directory)
        yield importlib.import_module("campaign")


@pytest.fixture(scope="module")
def bench(campaign: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The cookbook's Python, local data and one server for all recipes."""
    try:
        python = campaign.cookbook_python()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the cookbook cannot be installed here: {error}")
    directory = tmp_path_factory.mktemp("cookbook") / "cwd"
    model = campaign.material.write(directory, campaign.SMOKE_AMOUNTS, seed=campaign.DATA_SEED)
    data = directory.with_name("data")
    with campaign.OwnServer(data, model=campaign.material.MODEL, directory=model) as server:
        yield campaign.Bench(python, directory, directory.with_name("runs"), server, is_smoke=True)


@pytest.fixture
def measured(campaign: ModuleType, bench: Any, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The curves of the recipe that the test names, and nothing unexpected said by either side."""
    recipe = campaign.BY_NAME[request.param]
    run: dict[str, Any] = campaign.measure(bench, recipe, f"{recipe.name}-0")
    assert all(math.isfinite(value) for curve in run["curves"].values() for value in curve)
    unexpected = [line for line in run["client_warnings"] if not any(known in line for known in EXPECTED_WARNINGS)]
    assert unexpected == []
    assert bench.server.complaints() == []
    return run


@pytest.mark.parametrize("measured", ["sl_loop"], indirect=True)
def test_the_supervised_loop_lowers_the_loss(measured: dict[str, Any]) -> None:
    losses = measured["curves"]["train_mean_nll"]
    assert len(losses) == 6
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("measured", ["chat_sl"], indirect=True)
def test_the_supervised_trainer_learns_for_held_out_data_and_rolls_its_checkpoints(
    measured: dict[str, Any], campaign: ModuleType, bench: Any
) -> None:
    losses = measured["curves"]["test/nll"]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    records = campaign.read_rows(bench.runs / "chat_sl-0" / "checkpoints.jsonl")
    rolling = {record["state_path"] for record in records if record.get("rolling")}
    others = {record["state_path"] for record in records} - rolling
    assert rolling
    headers = {"X-API-Key": "tml-cookbook"}
    with httpx.Client(base_url=f"{bench.server.url}/api/v1/", headers=headers, timeout=60) as client:
        listed = client.get("checkpoints", params={"limit": 100}).json()["checkpoints"]
    paths = {checkpoint["tinker_path"] for checkpoint in listed}
    assert others <= paths
    assert rolling.isdisjoint(paths)


@pytest.mark.parametrize("measured", ["rl_importance_sampling", "rl_default_loss"], indirect=True)
def test_reinforcement_learning_samples_and_trains_on_the_same_policy(measured: dict[str, Any]) -> None:
    curves = measured["curves"]
    assert len(curves["env/all/reward/total"]) == 2
    assert max(map(abs, curves["optim/kl_sample_train_v1"])) < AGREEMENT
    assert max(curves["grad_norm"]) > 0


@pytest.mark.parametrize("measured", ["dpo"], indirect=True)
def test_the_preference_margin_starts_at_nothing_and_grows(measured: dict[str, Any]) -> None:
    first, second = measured["curves"]["margin"]
    assert abs(first) < AGREEMENT
    assert second > 0.05


@pytest.mark.parametrize("measured", ["on_policy_distillation"], indirect=True)
def test_the_student_is_scored_by_the_teacher_checkpoint(measured: dict[str, Any]) -> None:
    assert len(measured["curves"]["teacher_kl"]) == 2
    assert min(measured["curves"]["teacher_kl"]) > 1.0


def test_an_interrupted_recipe_resumes_where_it_was(campaign: ModuleType, bench: Any) -> None:
    recipe = campaign.BY_NAME["rl_default_loss"]
    log_path = bench.runs / "resumed"
    campaign.run_recipe(bench, recipe, log_path)
    longer = dataclasses.replace(recipe, smoke={**recipe.smoke, "max_steps": 4})
    rows = campaign.run_recipe(bench, longer, log_path, "behavior_if_log_dir_exists=resume")
    steps = [(row["step"], row["num_steps"]) for row in rows if "num_steps" in row]
    # The optimiser's count goes on, and no row of the first half was written twice or lost.
    assert steps == [(0, 1), (1, 2), (2, 3), (3, 4)]
