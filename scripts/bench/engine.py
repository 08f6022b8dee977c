"""The engine alone: what its time goes to, and what tenants, ranks, losses and recomputation cost it.

    python scripts/bench/engine.py MODELS_DIR [--quick] [--sizes 1m 27m] [--json FILE] [--baseline FILE]

One thread; seconds are CPU-seconds. Prints the run's own ceilings first. Variants of one table take turns, and the
"relative" column is formed inside each turn. Shares of the GEMM rate count useful FLOPs only (workload.Flops): "base"
is the frozen model's, "all" has LoRA and attention with it. --baseline compares the ratios with an earlier run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import engine_side
import report
import torch
from ceilings import ceilings, in_turn, timed
from engine_side import EngineSide
from models import make_model
from workload import ModelShape, Workload, even_lengths, useful_flops

from treadle.engine.arenas import GradientArena
from treadle.engine.base_model import BaseModel
from treadle.engine.context import Recompute
from treadle.engine.files import decode_state, encode_state
from treadle.engine.state import new_training_state

LONGEST = 128
TENANTS = (1, 8, 64)
RANKS = (8, 16, 32, 64)
RANK = 16
LOSSES = ("cross_entropy", "importance_sampling", "ppo")
MARGIN = 0.10
_FORWARD, _BACKWARD, _PASSES, _OPTIMIZER = "forward and head", "backward", "forward_backward", "commit and AdamW"


def measure_model(base: BaseModel, *, total: int, repetitions: int, pass_tokens: int) -> dict[str, Any]:
    """Every table of one model."""
    limits = ceilings(base.device, base.dtype)
    report.print_table("Ceilings", ["figure", "value"], list(limits.items()))
    shape = ModelShape.of(base.config)
    reference = Workload(8, even_lengths(total // 8, LONGEST), RANK)

    def side(workload: Workload, **options: Any) -> EngineSide:
        return EngineSide(base, workload, pass_tokens=pass_tokens, **options)

    tables = {
        "tenants": {
            str(count): side(Workload(count, even_lengths(total // count, LONGEST), RANK)) for count in TENANTS
        },
        "tenants of equal sequences": {
            str(count): side(Workload(count, even_lengths(total // count, total // TENANTS[-1]), RANK))
            for count in TENANTS
        },
        "ranks": {str(rank): side(Workload(8, reference.lengths, rank)) for rank in RANKS},
        "losses": {
            **{loss: side(reference, losses=(loss,)) for loss in LOSSES},
            "mixed": side(reference, losses=LOSSES),
        },
        "recompute": {mode.value: side(reference, recompute=mode) for mode in Recompute},
    }
    found: dict[str, Any] = {"ceilings": limits}
    for name, sides in tables.items():
        found[name] = compare(name, sides, shape, limits["gemm_tflops"], repetitions)
    found["parts of a step"] = parts(side(reference), repetitions)
    found["states"] = states(base, repetitions)
    return found


def compare(
    name: str, sides: Mapping[str, EngineSide], shape: ModelShape, gemm_tflops: float, repetitions: int
) -> dict[str, Any]:
    """Steps of variants in turn. ratios: a variant's rate over the first one's."""
    device = next(iter(sides.values())).base.device
    seconds = in_turn({label: each.step for label, each in sides.items()}, repetitions, device)
    first = next(iter(sides))
    found: dict[str, Any] = {"variants": {}, "ratios": {}}
    rows = []
    for label, each in sides.items():
        spread = report.spread(seconds[label])
        flops = useful_flops(shape, each.workload)
        per_flop = 1 / (spread["median"] * gemm_tflops * 1e12)
        relative = report.spread([mine / theirs for mine, theirs in zip(seconds[first], seconds[label], strict=True)])
        figures = {
            "tokens_per_s": each.workload.num_tokens / spread["median"],
            "step_s": spread,
            "base_share_of_gemm_rate": flops.base * per_flop,
            "all_share_of_gemm_rate": flops.total * per_flop,
        }
        found["variants"][label] = {**each.workload.describe(), **figures}
        found["ratios"][f"{label}_over_{first}"] = relative
        shown = f"{relative['median']:.2f} ({relative['min']:.2f}..{relative['max']:.2f})"
        shares = [figures["base_share_of_gemm_rate"], figures["all_share_of_gemm_rate"]]
        rows.append([label, each.workload.label, figures["tokens_per_s"], *shares, shown])
    columns = [name, "tenants x sequences x length", "tokens/s", "base/GEMM", "all/GEMM", "relative (spread)"]
    report.print_table(f"{name} (seconds are CPU-seconds on a CPU)", columns, rows)
    return found


def parts(side: EngineSide, repetitions: int) -> dict[str, Any]:
    """Seconds of the parts of a step and their share of it. The backward is what a training pass has over a forward."""
    turns = [_parts_of_one_step(side) for _ in range(repetitions + 1)][1:]
    seconds = {name: report.spread([turn[name] for turn in turns]) for name in turns[0]}
    shares = {
        name: report.spread([turn[name] / (turn[_PASSES] + turn[_OPTIMIZER]) for turn in turns]) for name in turns[0]
    }
    rows = [[name, *(share[key] for key in ("median", "min", "max"))] for name, share in shares.items()]
    report.print_table(f"Parts of a step, {side.workload.label}", ["part", "share", "min", "max"], rows)
    return {"seconds": seconds, "shares": shares, **side.workload.describe()}


def _parts_of_one_step(side: EngineSide) -> dict[str, float]:
    scratches: list[GradientArena] = []
    device = side.base.device
    forward_s = timed(lambda: side.run_passes(forward_only=True), device)
    passes_s = timed(lambda: scratches.extend(side.run_passes()[1]), device)
    optimizer_s = timed(lambda: side.run_optimizer(scratches), device)
    return {_FORWARD: forward_s, _PASSES: passes_s, _BACKWARD: passes_s - forward_s, _OPTIMIZER: optimizer_s}


def states(base: BaseModel, repetitions: int) -> dict[str, Any]:
    """Milliseconds of what happens to a whole run: fresh, published, encoded, decoded; and its size."""
    side = EngineSide(base, Workload(1, (16,), RANK), pass_tokens=16)
    side.step()
    state = side.states[0]
    data = encode_state(state, base, with_optimizer=True, applied_seq=1)
    calls: dict[str, Callable[[], object]] = {
        "create": lambda: new_training_state(base, state.spec),
        "publish": state.weights.copy,
        "encode": lambda: encode_state(state, base, with_optimizer=True, applied_seq=1),
        "decode": lambda: decode_state(data, base),
    }
    seconds = in_turn(calls, max(5, repetitions), base.device)
    found: dict[str, Any] = {name: report.spread([1e3 * value for value in values]) for name, values in seconds.items()}
    rows = [[f"{name}, ms", found[name]["median"], found[name]["max"]] for name in calls]
    report.print_table(f"A run of rank {RANK}, {len(data) / 2**20:.1f} MiB snapshot", ["what", "median", "max"], rows)
    return {"milliseconds": found, "snapshot_bytes": len(data), "num_parameters": state.layout.num_parameters}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="directory of models.py's models; missing ones are made")
    parser.add_argument("--sizes", nargs="+", choices=["1m", "27m", "tiny"], default=None)
    parser.add_argument("--quick", action="store_true", help="under two minutes: the 1M model, few tokens, few turns")
    parser.add_argument("--total", type=int, default=None, help="tokens of a step, all tenants together")
    parser.add_argument("--repetitions", type=int, default=None)
    parser.add_argument("--pass-tokens", type=int, default=4096, help="tokens per forward")
    report.add_arguments(parser)
    args = parser.parse_args()
    total = args.total or (2048 if args.quick else 8192)
    repetitions = args.repetitions or (5 if args.quick else 9)
    config = {"total_tokens": total, "repetitions": repetitions, "pass_tokens": args.pass_tokens, "threads": 1}
    result: dict[str, Any] = {**report.context(), "config": config, "models": {}}
    torch.set_num_threads(1)
    for size in args.sizes or (["1m"] if args.quick else ["1m", "27m"]):
        print(f"\n== {size}")
        base = engine_side.load(make_model(args.models, size))
        result["models"][size] = measure_model(base, total=total, repetitions=repetitions, pass_tokens=args.pass_tokens)
        report.write(report.path_of(args, "engine"), result)
    return report.compare(args, result, margin=MARGIN)


if __name__ == "__main__":
    raise SystemExit(main())
