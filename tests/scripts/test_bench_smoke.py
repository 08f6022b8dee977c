"""The benchmarks run, at the smallest size: all in one process, since importing torch costs more than they do.

Nothing here looks at a speed. Also what decides without a device: regressions, and what a short budget drops.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
# Runs each script as __main__, then says what gpu.py would do on a real device.
_CHILD = """
import json, runpy, sys
bench, out = sys.argv[1], sys.argv[2]
sys.path.insert(0, bench)
runs = {
    "vs_peft": ["models", "--quick", "--sizes", "tiny", "--most-tokens", "300", "--point-s", "0.1", "--no-memory"],
    "engine": ["models", "--sizes", "tiny", "--total", "512", "--repetitions", "1"],
    "gpu": ["--device", "cpu", "--tiny"],
}
for name, options in runs.items():
    sys.argv = [name, *options, "--json", f"{out}/{name}.json"]
    try:
        runpy.run_path(f"{bench}/{name}.py", run_name="__main__")
    except SystemExit as done:
        assert not done.code, (name, done.code)
import gpu_points, predictions
points = gpu_points.points_of(gpu_points.Scale.full())
kept, dropped = gpu_points.choose(points, 200.0, 700.0)
cost = {p.name: gpu_points.estimate_s(p, 700.0) for p in points}
facts = {
    "points": [p.name for p in points], "cost": cost,
    "kept": [p.name for p in kept], "dropped": [p.name for p in dropped],
    "figures": [p.figure for p in predictions.PREDICTIONS],
}
json.dump(facts, open(f"{out}/facts.json", "w"))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every benchmark wrote, by name."""
    out = tmp_path_factory.mktemp("bench")
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(BENCH), str(out)], capture_output=True, text=True, check=False, cwd=out
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def test_vs_peft_gates_and_compares(results: dict[str, Any]) -> None:
    found = results["vs_peft"]
    (point,) = found["models"]["tiny"]["curves"]["tokens per tenant"]
    assert point["label"] == "8 x 1 x 32"
    assert 0 < point["largest_error"] <= 1e-4
    assert point["ratios"].keys() == {"p0_over_ours", "p1_over_ours"}
    assert {"commit", "machine", "versions", "load_average_at_start", "config"} <= found.keys()
    assert found["models"]["tiny"]["ceilings"]["gemm_tflops"] > 0


def test_engine_measures_every_table(results: dict[str, Any]) -> None:
    found = results["engine"]["models"]["tiny"]
    assert found["tenants"]["variants"].keys() == {"1", "8", "64"}
    assert found["recompute"]["ratios"].keys() == {"none_over_none", "selective_over_none", "full_over_none"}
    assert found["losses"]["variants"].keys() >= {"cross_entropy", "ppo", "mixed"}
    assert found["states"]["milliseconds"].keys() == {"create", "publish", "encode", "decode"}


def test_gpu_script_runs_whole_on_a_cpu(results: dict[str, Any]) -> None:
    found = results["gpu"]
    assert found["failed"] == {}
    assert found["dropped"] == {}
    assert found["points"]["tiny: strict"]["holds"] is True
    assert found["points"]["tiny: 8 x 1 x 16 r8"]["gate"]["gradient_error"] < 1e-3
    assert found["points"]["kernel race"]["cells"]


def test_every_prediction_is_of_something_that_is_measured(results: dict[str, Any]) -> None:
    facts = results["facts"]
    sizes = {name.partition(":")[0] for name in facts["points"]}
    for figure in facts["figures"]:
        point, _, what = figure.rpartition(": ")
        known = what in ("base / GEMM", "AdamW share", "p0 / ours", "p1 / ours")
        assert (known and point in facts["points"]) or figure == "gemm TFLOP/s" or point in sizes, figure


def test_short_budget_drops_the_most_expensive_first(results: dict[str, Any]) -> None:
    facts = results["facts"]
    cost = facts["cost"]
    assert facts["dropped"]
    assert sum(cost[name] for name in facts["kept"]) <= 200.0
    assert min(cost[name] for name in facts["dropped"]) >= max(cost[name] for name in facts["kept"])
    assert sum(cost.values()) < 470, "the whole plan no longer fits in the budget of one call"


def test_fallen_ratio_fails_and_an_absolute_figure_does_not(tmp_path: Path) -> None:
    report = _report()
    old = {"points": [{"label": "a", "ratios": {"x": {"median": 2.0}, "y": 1.0}, "tokens_per_s": 100.0}]}
    baseline = tmp_path / "old.json"
    report.write(baseline, old)

    def status(x: float, y: float, label: str = "a", margin: float | None = None) -> int:
        new = {"points": [{"label": label, "ratios": {"x": {"median": x}, "y": y}, "tokens_per_s": 1.0}]}
        return int(report.compare(argparse.Namespace(baseline=baseline, margin=margin), new, margin=0.1))

    assert status(2.0, 1.0) == 0
    assert status(1.81, 0.91) == 0
    assert status(1.79, 1.0) == 1
    assert status(1.79, 1.0, margin=0.2) == 0
    assert status(2.0, 0.5) == 1
    # Nothing in common is a mistake, not a pass.
    assert status(2.0, 1.0, label="b") == 1


def _report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_report", BENCH / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
