"""scripts/simulate: scenarios in virtual time, their figures as a table and JSON; calibration on a real server.

    scripts/simulate list
    scripts/simulate run flooder --seed 1 [--costs FILE] [--workers N] [--duration S] [--json FILE]
    scripts/simulate figures [--save]      # the figures that docs/log.md quotes
    scripts/simulate scale [--save]        # the runs behind docs/scale.md
    scripts/simulate calibrate --server [--save]

Costs default to benchmarks/results/cpu-2core/simulate-calibration.json. The same command and costs write the same
bytes, except for calibrate, which measures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import report
from figures import figures
from scale import scale

from treadle.testing.simulation.costs import Costs
from treadle.testing.simulation.scenario import SCENARIOS, scenario
from treadle.testing.simulation.simulate import simulate

CALIBRATION = report.RESULTS / "cpu-2core" / "simulate-calibration.json"

GPU_COSTS = Path(__file__).with_name("gpu_costs.json")


def main() -> int:
    args = _arguments()
    if args.command == "list":
        print("\n".join(SCENARIOS))
        return 0
    if args.command == "calibrate":
        return _calibrate(args)
    costs = Costs.from_json(args.costs.read_text())
    gpu = Costs.from_json(GPU_COSTS.read_text())
    started = time.process_time()
    match args.command:
        case "run":
            result = _run(args, costs)
        case "figures":
            result = figures(costs, gpu, seed=args.seed)
        case _:
            result = scale(costs, gpu, seed=args.seed)
    print(f"{time.process_time() - started:.1f} CPU-seconds", file=sys.stderr)
    path = args.json or (report.RESULTS / "cpu-2core" / f"simulate-{args.command}.json" if args.save else None)
    report.write(path, {"command": _command(args), "costs": costs.to_json(), **result})
    return 0


def _run(args: argparse.Namespace, costs: Costs) -> dict[str, Any]:
    chosen = scenario(args.scenario)
    if args.workers:
        chosen = replace(chosen, num_workers=args.workers)
    if args.duration:
        chosen = replace(chosen, duration_s=args.duration, warmup_s=min(chosen.warmup_s, args.duration / 4))
    result = simulate(chosen, costs, seed=args.seed)
    show(chosen.name, result)
    return {"scenario": chosen.name, "figures": result}


def show(title: str, result: Mapping[str, Any]) -> None:
    """The tables of one scenario."""
    plain = [[name, value] for name, value in result.items() if not isinstance(value, Mapping)]
    report.print_table(title, ["figure", "value"], plain)
    columns = ["group", "steps", "step p50 s", "p99 s", "cycles per step", "wait p50 s", "p99 s"]
    rows = [
        [
            name,
            values["steps"],
            values["step_s"]["p50"],
            values["step_s"]["p99"],
            values["cycles_per_step"],
            values["wait_s"]["p50"],
            values["wait_s"]["p99"],
        ]
        for name, values in result["groups"].items()
    ]
    report.print_table("Steps", columns, rows)
    faults = result["faults"]
    if faults["deaths"]:
        pauses = [[f"pause {name} s", value] for name, value in faults["pause_s"].items()]
        counts = [[name, value] for name, value in faults.items() if not isinstance(value, Mapping)]
        report.print_table("Faults", ["figure", "value"], counts + pauses)


def _calibrate(args: argparse.Namespace) -> int:
    if not args.server:
        raise SystemExit("calibrate measures a real server: say --server")
    # Only here, because it imports torch and the SDK, which nothing else needs.
    from calibrate import calibrate

    measured = calibrate(source=args.source, load_s=args.load_s, rounds=args.rounds, deaths=args.deaths)
    result = {**report.context(), "command": _command(args), **measured}
    print(json.dumps({key: result[key] for key in ("costs", "fit")}, indent=1))
    rows = [
        [name, figure, ratio]
        for name, compared in result["held_out"].items()
        for figure, ratio in compared["simulated_over_real"].items()
    ]
    report.print_table("Simulated over real, loads that were not fitted", ["load", "figure", "ratio"], rows)
    report.write(args.json or (CALIBRATION if args.save else None), result)
    return 0


def _command(args: argparse.Namespace) -> str:
    """What to type to get the same: without where the result went."""
    words = ["scripts/simulate", args.command]
    if args.command == "run":
        words += [args.scenario, *(f"--{k} {v:g}" for k in ("workers", "duration") if (v := getattr(args, k)))]
    return " ".join([*words, f"--seed {args.seed}"] if args.command != "calibrate" else [*words, "--server"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the scenarios")
    run = commands.add_parser("run", help="one scenario")
    run.add_argument("scenario", choices=SCENARIOS)
    run.add_argument("--workers", type=int, default=0, help="instead of the scenario's")
    run.add_argument("--duration", type=float, default=0.0, help="virtual seconds, instead of the scenario's")
    others = [
        run,
        commands.add_parser("figures", help="fairness, company, padding"),
        commands.add_parser("scale", help="what docs/scale.md quotes"),
    ]
    for command in others:
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--costs", type=Path, default=CALIBRATION, help="a calibration")
    measure = commands.add_parser("calibrate", help="fit the costs to a real server")
    measure.add_argument("--server", action="store_true", help="start one, with the 1M model")
    measure.add_argument("--load-s", type=float, default=3.0, help="seconds that each of ten loads is measured")
    measure.add_argument("--rounds", type=int, default=3, help="how often, in turn")
    measure.add_argument("--deaths", type=int, default=2, help="how often the worker is killed")
    measure.add_argument("--source", type=Path, default=report.REPOSITORY / "src", help="src/ of the tree that serves")
    for command in (*others, measure):
        command.add_argument("--json", type=Path, default=None, help="write the result to this file")
        command.add_argument("--save", action="store_true", help="write it to benchmarks/results/ under its name")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
