"""Runs recipes of tinker-cookbook against a server of this work tree, one at a time, and writes their curves.

    scripts/cookbook/run [RECIPE ...] [--repetitions 3] [--out benchmarks/results/cookbook]

Every recipe is a process of the cookbook's own environment, with the published code; it is told the server, a key and
directories, by its own options and by environment variables. A recipe that ends with an error ends the campaign.
Invariant: a result file holds curves of completed runs only, with the command, the seeds and the versions behind them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import material
import report
from environment import COOKBOOK, cookbook_python
from own_server import OwnServer
from recipes import BY_NAME, FULL_AMOUNTS, RECIPES, SMOKE_AMOUNTS, Recipe

DATA_SEED = 0
# Beyond this a run on two shared cores has stopped, not slowed down.
RECIPE_TIMEOUT_S = 3 * 3600
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


class RecipeFailed(Exception):
    """A recipe ended with an error; the text is the end of what it printed."""


@dataclass(frozen=True)
class Bench:
    """Where recipes run: the cookbook's Python, the working directory with local data, runs beside it, the server."""

    python: Path
    directory: Path
    runs: Path
    server: OwnServer
    is_smoke: bool = False

    def environment(self) -> dict[str, str]:
        """Offline, and with caches of its own, so that nothing downloaded before can take part."""
        return {
            **os.environ,
            "TINKER_BASE_URL": self.server.url,
            "TINKER_API_KEY": "tml-cookbook",
            "TINKER_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.runs / "hf"),
            "PYTHONPATH": "",
        }


def run_recipe(bench: Bench, recipe: Recipe, log_path: Path, *more: str) -> list[dict[str, Any]]:
    """Run it with its log in `log_path`; the rows of its metrics, in order. Raises RecipeFailed."""
    command = [str(bench.python), "-m", recipe.module, *recipe.arguments(is_smoke=bench.is_smoke), *more]
    printed = log_path.with_suffix(".out")
    printed.parent.mkdir(parents=True, exist_ok=True)
    with printed.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            [*command, f"log_path={log_path}"],
            cwd=bench.directory,
            env=bench.environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=RECIPE_TIMEOUT_S,
            check=False,
        )
    if done.returncode != 0:
        raise RecipeFailed(f"{recipe.name}: exit {done.returncode}\n{printed.read_text(errors='replace')[-6000:]}")
    return read_rows(log_path / "metrics.jsonl")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_checkpoint(log_path: Path) -> dict[str, Any]:
    """The record of the last checkpoint that a recipe saved: its `state_path` and `sampler_path`."""
    return read_rows(log_path / "checkpoints.jsonl")[-1]


def warnings_in(printed: Path) -> list[str]:
    """What the cookbook and the SDK warned of; how often is left out, as are escape codes."""
    lines = (_COLOR.sub("", line).strip() for line in printed.read_text(errors="replace").splitlines())
    return sorted({line for line in lines if re.search(r"\b(WARNING|ERROR)\b", line)})


def measure(bench: Bench, recipe: Recipe, name: str) -> dict[str, Any]:
    """One repetition: curves, seeds, times, and what anybody complained of."""
    log_path = bench.runs / name
    started, load = time.monotonic(), os.getloadavg()
    rows = run_recipe(bench, recipe, log_path, *_teacher(bench, recipe, name))
    curves = {metric: [row[metric] for row in rows if metric in row] for metric in (recipe.aim.metric, *recipe.curves)}
    run_id = re.match("tinker://([^/]+)/", last_checkpoint(log_path)["state_path"])
    assert run_id is not None
    return {
        "curves": curves,
        "verdict": recipe.aim.judge(curves[recipe.aim.metric]),
        "adapter_seed": bench.server.adapter_seed(run_id[1]),
        "wall_s": round(time.monotonic() - started, 1),
        "load_average": {"start": round(load[0], 1), "end": round(os.getloadavg()[0], 1)},
        "client_warnings": warnings_in(log_path.with_suffix(".out")),
    }


def _teacher(bench: Bench, recipe: Recipe, name: str) -> list[str]:
    if recipe.teacher is None:
        return []
    teacher = bench.runs / name.replace(recipe.name, recipe.teacher)
    if not teacher.is_dir():
        run_recipe(bench, BY_NAME[recipe.teacher], teacher)
    return [f"teacher_checkpoint={last_checkpoint(teacher)['sampler_path']}"]


def main(arguments: Sequence[str]) -> int:
    """0 when every run met its aim, which is not asked of a smoke run."""
    args = _parse(arguments)
    python = cookbook_python()
    chosen = [recipe for recipe in RECIPES if not args.recipes or recipe.name in args.recipes]
    all_met = True
    with tempfile.TemporaryDirectory(prefix="treadle-cookbook-") as scratch:
        directory = Path(args.work or scratch) / "cwd"
        model = material.write(directory, SMOKE_AMOUNTS if args.smoke else FULL_AMOUNTS, seed=DATA_SEED)
        with OwnServer(directory.with_name("data"), model=material.MODEL, directory=model) as server:
            bench = Bench(python, directory, directory.with_name("runs"), server, args.smoke)
            for recipe in chosen:
                result = _repeat(bench, recipe, args.repetitions)
                all_met &= all(run["verdict"]["is_met"] for run in result["runs"])
                report.write(args.out / f"{recipe.name}.json" if args.out else None, result)
    if args.out:
        subprocess.run([str(python), str(Path(__file__).with_name("plot.py")), str(args.out)], check=True)
    return 0 if all_met or args.smoke else 1


def _repeat(bench: Bench, recipe: Recipe, repetitions: int) -> Mapping[str, Any]:
    context = report.context()
    runs = []
    for repetition in range(repetitions):
        run = measure(bench, recipe, f"{recipe.name}-{repetition}")
        verdict = run["verdict"]
        met = "met" if verdict["is_met"] else "NOT MET"
        print(
            f"{recipe.name} {repetition}: {verdict['metric']} {verdict['start']:.3f} -> {verdict['end']:.3f}"
            f" ({verdict['aim']}: {met}), {run['wall_s']:.0f} s",
            flush=True,
        )
        runs.append(run)
    return {
        **context,
        "cookbook": COOKBOOK,
        "command": ["python", "-m", recipe.module, *recipe.arguments(is_smoke=bench.is_smoke)],
        "data_seed": DATA_SEED,
        "teacher": recipe.teacher,
        "runs": runs,
        "server_complaints": bench.server.complaints(),
    }


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=f"some of {', '.join(BY_NAME)}; all by default")
    parser.add_argument("--repetitions", type=int, default=1, help="how often each recipe runs")
    parser.add_argument("--out", type=Path, default=None, help="directory for one JSON file per recipe")
    parser.add_argument("--work", type=Path, default=None, help="an empty directory to keep logs and checkpoints in")
    parser.add_argument("--smoke", action="store_true", help="a few steps on little data; aims mean nothing then")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.recipes) - BY_NAME.keys())
    if unknown:
        parser.error(f"unknown recipes: {', '.join(unknown)}")
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
