"""Whole steps of N tenants: ours in one pass against PEFT one tenant after another, stock (P0) and at its best (P1).

    python scripts/bench/vs_peft.py MODELS_DIR [--quick] [--sizes 1m 27m] [--json FILE] [--baseline FILE]

A step is forward, loss, backward and AdamW of every tenant, lm_head adapted as the SDK sends it. The three sides take
turns within one process and one thread, and a ratio is formed inside each turn, so that a machine whose speed drifts
slows all three; CPU-seconds. What P0 and P1 do is said in peft_baseline.py.

Curves: over tokens per tenant (8 tenants), over tenants at equal total tokens, and on uneven lengths. Before every
figure the sides start from the same adapters and ours must give P0's losses and gradients to 1e-4, or the run fails.
Peak memory is measured in fresh processes. --baseline compares ratios with an earlier run and fails on a regression.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import engine_side
import peft_baseline
import report
import torch
from ceilings import ceilings, in_turn
from models import make_model
from workload import ModelShape, Workload, even_lengths, uneven_lengths, useful_flops

RTOL = 1e-4
RANK = 16
LONGEST = 128
SIDES = ("ours", "p0", "p1")
# Ratios that may not fall by more than this share of themselves against a baseline. Two noisy cores repeat to 5 %.
MARGIN = 0.10
_TOKENS = (32, 128, 512, 1024, 4096, 16384)
_TENANTS = (1, 8, 64)


def workloads(*, is_quick: bool, most_tokens: int) -> dict[str, list[Workload]]:
    """The points of each curve, up to `most_tokens` in a step of all tenants."""
    tokens = _TOKENS[:3] if is_quick else _TOKENS
    total = 2048 if is_quick else 8192
    curves = {
        "tokens per tenant": [Workload(8, even_lengths(count, LONGEST), RANK) for count in tokens],
        "tenants at equal total": [Workload(count, even_lengths(total // count, LONGEST), RANK) for count in _TENANTS],
        "uneven lengths": [Workload(8, uneven_lengths(4 if is_quick else 8, 16, 240), RANK)],
    }
    return {
        name: [workload for workload in points if workload.num_tokens <= most_tokens] for name, points in curves.items()
    }


class Sides:
    """The three sides of one workload, on copies of one base model and from the same adapters."""

    def __init__(self, model_dir: Path, workload: Workload, pass_tokens: int) -> None:
        self.workload = workload
        self.ours = engine_side.EngineSide(engine_side.load(model_dir), workload, pass_tokens=pass_tokens)
        self.p0 = peft_baseline.StockPeft(peft_baseline.load(model_dir), workload, pass_tokens=pass_tokens)
        self.p1 = peft_baseline.PackedPeft(peft_baseline.load(model_dir), workload, pass_tokens=pass_tokens)
        for side in (self.p0, self.p1):
            side.load_adapters(self.ours.adapters())

    def check(self) -> float:
        """The largest relative error of losses and gradients against P0's. SystemExit above RTOL."""
        worst = 0.0
        reference = self.p0.passes()
        for name, passes in (("ours", [(p.loss, p.gradients) for p in self.ours.passes()]), ("p1", self.p1.passes())):
            error = max(_error(mine, theirs) for mine, theirs in zip(passes, reference, strict=True))
            if not error <= RTOL:
                raise SystemExit(f"{self.workload.label}: {name} is off by {error:.2g} from P0; the figures are void")
            worst = max(worst, error)
        return worst

    def measure(self, repetitions: int) -> dict[str, list[float]]:
        """CPU-seconds per step, the sides in turn."""
        return in_turn({side: getattr(self, side).step for side in SIDES}, repetitions, "cpu")


def _error(mine: tuple[float, Mapping[str, Any]], theirs: tuple[float, Mapping[str, Any]]) -> float:
    """Relative to the loss, and for each gradient to its largest entry."""
    worst = abs(mine[0] - theirs[0]) / abs(theirs[0])
    assert mine[1].keys() == theirs[1].keys()
    for module, pair in theirs[1].items():
        for ours, reference in zip(mine[1][module], pair, strict=True):
            scale = float(reference.abs().max())
            assert scale > 0, f"{module} has no gradient to compare"
            worst = max(worst, float((ours - reference).abs().max()) / scale)
    return worst


def point(
    model_dir: Path, workload: Workload, *, pass_tokens: int, budget_s: float, gemm_tflops: float
) -> dict[str, Any]:
    """One point of a curve: gate, then as many turns as the budget of CPU-seconds allows, 3 to 15."""
    sides = Sides(model_dir, workload, pass_tokens)
    error = sides.check()
    first = sides.measure(1)
    turn_s = sum(values[0] for values in first.values())
    repetitions = max(3, min(15, int(budget_s / turn_s)))
    seconds = sides.measure(repetitions)
    flops = useful_flops(ModelShape.of(sides.ours.base.config), workload)
    median_s = report.spread(seconds["ours"])["median"]
    return {
        **workload.describe(),
        "repetitions": repetitions,
        "largest_error": error,
        "cpu_s": {name: report.spread(values) for name, values in seconds.items()},
        "tokens_per_cpu_s": {
            name: workload.num_tokens / report.spread(values)["median"] for name, values in seconds.items()
        },
        "share_of_gemm_rate": flops.total / median_s / 1e12 / gemm_tflops,
        "ratios": {
            f"{other}_over_ours": report.spread(
                [theirs / ours for theirs, ours in zip(seconds[other], seconds["ours"], strict=True)]
            )
            for other in ("p0", "p1")
        },
    }


def memory(model_dir: Path, workload: Workload, pass_tokens: int) -> dict[str, Any]:
    """Peak resident MB of a fresh process per side, and ours over P0's."""
    here = Path(__file__).parent
    options = ["--tenants", str(workload.num_tenants), "--rank", str(workload.rank), "--steps", "2"]
    options += ["--pass-tokens", str(pass_tokens), "--lengths", *map(str, workload.lengths)]
    commands = {
        "ours": [here / "engine_side.py", model_dir, *options],
        "p0": [here / "peft_baseline.py", model_dir, "--way", "p0", *options],
        "p1": [here / "peft_baseline.py", model_dir, "--way", "p1", *options],
    }
    peaks = {}
    for name, command in commands.items():
        done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])["peak_rss_mb"]
    return {**workload.describe(), "peak_rss_mb": peaks, "ours_over_p0": peaks["ours"] / peaks["p0"]}


def measure_model(model_dir: Path, args: argparse.Namespace, most_tokens: int) -> dict[str, Any]:
    """All curves of one model."""
    found: dict[str, Any] = {"ceilings": ceilings("cpu", torch.float32)}
    report.print_table(f"Ceilings, {model_dir.name}", ["figure", "value"], list(found["ceilings"].items()))
    found["curves"] = {}
    for name, points in workloads(is_quick=args.quick, most_tokens=most_tokens).items():
        found["curves"][name] = [
            point(
                model_dir,
                workload,
                pass_tokens=args.pass_tokens,
                budget_s=args.point_s,
                gemm_tflops=found["ceilings"]["gemm_tflops"],
            )
            for workload in points
        ]
        show(f"{model_dir.name}: {name}", found["curves"][name])
    if args.no_memory:
        return found
    found["memory"] = memory(model_dir, Workload(8, even_lengths(512, LONGEST), RANK), args.pass_tokens)
    peaks = found["memory"]["peak_rss_mb"]
    columns = ["workload", *SIDES, "ours/P0"]
    row = [found["memory"]["label"], *(peaks[side] for side in SIDES), found["memory"]["ours_over_p0"]]
    report.print_table(f"{model_dir.name}: peak RSS of a fresh process, MB", columns, [row])
    return found


def show(title: str, points: Sequence[Mapping[str, Any]]) -> None:
    """One curve as a table."""
    rows = []
    for each in points:
        ratios = each["ratios"]
        cells = [f"{r['median']:.2f} ({r['min']:.2f}..{r['max']:.2f})" for r in ratios.values()]
        rates = [f"{each['tokens_per_cpu_s'][side]:,.0f}" for side in SIDES]
        rows.append([each["label"], *rates, *cells, each["share_of_gemm_rate"], each["largest_error"]])
    columns = ["tenants x sequences x length", "ours tok/CPU-s", "P0", "P1", "x P0 (spread)", "x P1 (spread)"]
    report.print_table(title, [*columns, "of GEMM rate", "error"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="directory of models.py's models; missing ones are made")
    parser.add_argument("--sizes", nargs="+", choices=["1m", "27m", "tiny"], default=None)
    parser.add_argument("--quick", action="store_true", help="two minutes: the 1M model, small points")
    parser.add_argument("--most-tokens", type=int, default=None, help="largest step, all tenants together")
    parser.add_argument("--point-s", type=float, default=None, help="CPU-seconds for the turns of one point")
    parser.add_argument("--pass-tokens", type=int, default=4096, help="tokens per forward, on every side")
    parser.add_argument("--no-memory", action="store_true", help="do not start processes to measure their peak RSS")
    report.add_arguments(parser)
    args = parser.parse_args()
    args.point_s = args.point_s or (6.0 if args.quick else 30.0)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        **report.context(),
        "config": {"rank": RANK, "pass_tokens": args.pass_tokens},
        "models": {},
    }
    for size in args.sizes or (["1m"] if args.quick else ["1m", "27m"]):
        # P0 needs about 30 minutes of CPU for three turns of 131,072 tokens on 27M parameters.
        most_tokens = args.most_tokens or (2048 if size == "27m" and args.quick else 10**6 if size == "1m" else 8192)
        result["models"][size] = measure_model(make_model(args.models, size), args, most_tokens)
        report.write(report.path_of(args, "vs_peft"), result)
    return report.compare(args, result, margin=MARGIN)


if __name__ == "__main__":
    raise SystemExit(main())
