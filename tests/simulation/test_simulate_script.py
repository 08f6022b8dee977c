"""scripts/simulate as it is typed: one seed, the same file; and the committed calibration is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from simulation_support import COSTS

from treadle.testing.simulation.costs import Costs

ROOT = Path(__file__).resolve().parents[2]
CLI = ROOT / "scripts" / "sim" / "cli.py"


def _simulate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(CLI), *words], capture_output=True, text=True, check=False)


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"costs": COSTS.to_json()}))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in files:
        done = _simulate("run", "eight", "--duration", "8", "--seed", "7", "--costs", str(costs), "--json", str(path))
        assert done.returncode == 0, done.stderr
        assert "tokens_per_s" in done.stdout
    assert files[0].read_bytes() == files[1].read_bytes()
    result = json.loads(files[0].read_text())
    assert result["command"] == "scripts/simulate run eight --duration 8 --seed 7"
    assert result["figures"]["groups"]["paired"]["steps"] > 0


def test_the_scenarios_are_listed() -> None:
    done = _simulate("list")
    assert {"flooder", "mix-long", "rack-loss", "service-10000"} <= set(done.stdout.split())


def test_the_committed_calibrations_can_be_read() -> None:
    committed = ROOT / "benchmarks" / "results" / "cpu-2core" / "simulate-calibration.json"
    costs = [Costs.from_json(path.read_text()) for path in (committed, CLI.with_name("gpu_costs.json"))]
    assert all(one.token_s > 0 for one in costs)
