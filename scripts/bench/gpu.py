"""Everything that is measured on an accelerator, in one call of under ten minutes.

    PYTHONPATH=src python scripts/bench/gpu.py --save [--budget-s 540]
    python scripts/bench/gpu.py --device cpu --tiny        # the same code on a small CPU model, in under a minute

Needs torch, transformers, peft, safetensors and this repository's src. Models are Qwen3's shapes with random weights,
drawn on the device. What is expected was written down before the first run (predictions.py) and is printed beside what
was measured. PEFT's loops (P0, P1; peft_baseline.py) handle tenants one after another, so at most two tenants are
measured and the time is multiplied; ours runs all of them.

The budget is wall time from the start. What does not fit is dropped before its turn, the most expensive points first,
and listed. Results are written after every point. A point that fails or runs out of memory is recorded, and the rest
goes on; the exit status is 1 if anything failed otherwise than for want of memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import predictions
import report
import torch
from ceilings import ceilings, in_turn, timed
from engine_side import EngineSide
from gpu_points import Point, Scale, choose, estimate_s, points_of
from models import model_on_device, twin
from peft_baseline import LOOPS
from workload import ModelShape, Workload, useful_flops

from treadle.domain.outcome import PoolFacts
from treadle.engine.base_model import BaseModel
from treadle.engine.context import Recompute
from treadle.engine.files import decode_state, encode_state
from treadle.engine.state import new_training_state
from treadle.engine.strict import probe

# In bfloat16 both sides round differently: each loss to 1 %, each tenant's gradient to 10 % of its length.
_TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 1e-1)}
_MEASURED_TENANTS = 2
_RESERVED_S = 70.0


@dataclass
class Run:
    """What the run has so far, and how long it may go on."""

    scale: Scale
    device: torch.device
    deadline: float
    path: Path | None
    result: dict[str, Any]

    @property
    def remaining_s(self) -> float:
        return self.deadline - time.monotonic()

    def attempt(self, name: str, measured: Callable[[], Any]) -> Any:
        """The result of one point, written at once; None when it failed, which is recorded."""
        started = time.monotonic()
        try:
            found = measured()
        except torch.OutOfMemoryError as error:
            found = None
            self.result["out_of_memory"][name] = str(error).splitlines()[0]
            print(f"{name}: out of memory", flush=True)
        except subprocess.TimeoutExpired:
            found = None
            self.result["dropped"][name] = "no time was left"
        except Exception:
            # One broken point must not cost the others a machine that is lent for minutes.
            found = None
            self.result["failed"][name] = traceback.format_exc(limit=8)
            print(f"{name}: failed\n{traceback.format_exc(limit=8)}", flush=True)
        else:
            self.result["points"][name] = found
        self.result["wall_s"][name] = time.monotonic() - started
        report.write(self.path, self.result)
        _free(self.device)
        return found


def main() -> int:
    args = _arguments()
    device = torch.device(args.device)
    scale = Scale.tiny() if args.tiny else Scale.full()
    if device.type == "cpu":
        torch.set_num_threads(1)
    if args.strict_of is not None:
        print(json.dumps(strict_probe(args.strict_of, device, scale)))
        return 0
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    about = report.context(accelerator=name) | {"config": {"dtype": str(scale.dtype), "tiny": args.tiny}}
    empty: dict[str, Any] = {"points": {}, "dropped": {}, "out_of_memory": {}, "failed": {}, "wall_s": {}}
    path = report.path_of(args, "gpu", name)
    run = Run(scale, device, time.monotonic() + args.budget_s, path, about | empty)
    run.result["ceilings"] = ceilings(device, scale.dtype)
    report.print_table("Ceilings", ["figure", "value"], list(run.result["ceilings"].items()))
    planned, dropped = choose(points_of(scale), run.remaining_s - _RESERVED_S, run.result["ceilings"]["gemm_tflops"])
    run.result["dropped"] = {point.name: "over the budget at the start" for point in dropped}
    for size in scale.sizes:
        run.attempt(f"{size}: all", lambda size=size: measure_size(run, size, [p for p in planned if p.size == size]))
    for size in scale.strict_sizes:
        run.attempt(f"{size}: strict", lambda size=size: in_child(run, ["--strict-of", size]))
    run.attempt("kernel race", lambda: kernel_race(run))
    finish(run)
    return 1 if run.result["failed"] else report.compare(args, run.result, margin=0.10)


def measure_size(run: Run, size: str, points: Sequence[Point]) -> dict[str, Any]:
    """All points of one model, which lives as long as this call."""
    started = time.monotonic()
    model = model_on_device(size, run.device, run.scale.dtype)
    # Before the engine takes its layers out; PEFT's sides wrap copies of it that share its weights.
    pristine = twin(model)
    base = base_of(model, size, run.device)
    made_s = time.monotonic() - started
    for point in points:
        if estimate_s(point, run.result["ceilings"]["gemm_tflops"]) > run.remaining_s - _RESERVED_S:
            run.result["dropped"][point.name] = "no time was left"
            continue
        found = run.attempt(point.name, lambda point=point: measure_point(run, base, pristine, point))
        if found is not None:
            show(point, found)
    run.attempt(f"{size}: states", lambda: states(base, run.scale.rank))
    return {"made_s": made_s, "num_matrix_parameters": ModelShape.of(base.config).num_matrix_parameters}


def base_of(model: Any, size: str, device: torch.device) -> BaseModel:
    """The engine over a model that was never on a disk."""
    facts = PoolFacts(
        base_model=f"bench/qwen3-{size}",
        revision="random",
        architecture=type(model).__name__,
        vocab_size=int(model.config.vocab_size),
        max_context_length=int(model.config.max_position_embeddings),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        numerics_profile="bench",
    )
    return BaseModel(model, device=device, facts=facts)


def measure_point(run: Run, base: BaseModel, pristine: Any, point: Point) -> dict[str, Any]:
    """Our whole step, and where the point asks for it PEFT's, in turn."""
    mode = Recompute(point.recompute)
    ours = EngineSide(base, point.workload, pass_tokens=run.scale.pass_tokens, recompute=mode)
    optimizer_s: list[float] = []

    def step() -> None:
        _, scratches = ours.run_passes()
        optimizer_s.append(timed(lambda: ours.run_optimizer(scratches), run.device))

    sides: dict[str, Callable[[], object]] = {"ours": step}
    few = replace(point.workload, num_tenants=min(_MEASURED_TENANTS, point.workload.num_tenants))
    found: dict[str, Any] = {**point.workload.describe(), "recompute": point.recompute}
    if point.with_peft:
        loops = {
            name: LOOPS[name](_for_peft(pristine), few, pass_tokens=run.scale.peft_pass_tokens)  # type: ignore[call-arg]
            for name in LOOPS
        }
        found["gate"] = gate(ours, loops["p0"], run.scale.dtype)
        sides |= {name: loop.step for name, loop in loops.items()}
        found["measured_tenants"] = few.num_tenants
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    seconds = in_turn(sides, point.repetitions, run.device)
    if run.device.type == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated(run.device) / 1e9
    for name in LOOPS:
        if name in seconds:
            scaled = point.workload.num_tenants / few.num_tenants
            seconds[name] = [value * scaled for value in seconds[name]]
    # The first call was the untimed one.
    found["optimizer_s"] = report.spread(optimizer_s[1:])
    found["optimizer_share"] = found["optimizer_s"]["median"] / report.spread(seconds["ours"])["median"]
    return found | figures(base, point.workload, seconds, run.result["ceilings"]["gemm_tflops"])


def figures(
    base: BaseModel, workload: Workload, seconds: Mapping[str, Sequence[float]], gemm_tflops: float
) -> dict[str, Any]:
    """What is quoted of a point."""
    flops = useful_flops(ModelShape.of(base.config), workload)
    step_s = report.spread(seconds["ours"])["median"]
    return {
        "step_s": {name: report.spread(values) for name, values in seconds.items()},
        "tokens_per_s": workload.num_tokens / step_s,
        "useful_tflops": asdict(flops),
        "useful_tflop_per_s": flops.total / step_s / 1e12,
        "base_share_of_gemm_rate": flops.base / step_s / 1e12 / gemm_tflops,
        "all_share_of_gemm_rate": flops.total / step_s / 1e12 / gemm_tflops,
        "ratios": {
            f"{name}_over_ours": report.spread(
                [theirs / ours for theirs, ours in zip(seconds[name], seconds["ours"], strict=True)]
            )
            for name in LOOPS
            if name in seconds
        },
    }


def gate(ours: EngineSide, p0: Any, dtype: torch.dtype) -> dict[str, float]:
    """How far our losses and gradients are from P0's, of the tenants that P0 has. Raises when that is too far."""
    p0.load_adapters(ours.adapters()[: p0.workload.num_tenants])
    loss_error = gradient_error = 0.0
    for mine, (loss, grads) in zip(ours.passes(), p0.passes(), strict=False):
        loss_error = max(loss_error, abs(mine.loss - loss) / abs(loss))
        squares = [
            (float((m.float() - t.float()).square().sum()), float(t.float().square().sum()))
            for module, pair in grads.items()
            for m, t in zip(mine.gradients[module], pair, strict=True)
        ]
        apart, length = (sum(values) for values in zip(*squares, strict=True))
        gradient_error = max(gradient_error, (apart / length) ** 0.5)
    loss_limit, gradient_limit = _TOLERANCES[dtype]
    if not (loss_error <= loss_limit and gradient_error <= gradient_limit):
        raise AssertionError(f"ours is off from P0 by {loss_error:.2g} (loss), {gradient_error:.2g} (gradient)")
    return {"loss_error": loss_error, "gradient_error": gradient_error}


def _for_peft(pristine: Any) -> Any:
    model = twin(pristine)
    model.set_attn_implementation("sdpa")
    return model


def states(base: BaseModel, rank: int) -> dict[str, Any]:
    """Milliseconds of what happens to a whole run: created, published, swapped out and in."""
    side = EngineSide(base, Workload(1, (16,), rank), pass_tokens=16)
    side.step()
    state = side.states[0]
    data = encode_state(state, base, with_optimizer=True, applied_seq=1)
    calls: dict[str, Callable[[], object]] = {
        "create": lambda: new_training_state(base, state.spec),
        "publish": state.weights.copy,
        "encode": lambda: encode_state(state, base, with_optimizer=True, applied_seq=1),
        "decode": lambda: decode_state(data, base),
    }
    seconds = in_turn(calls, 3, base.device)
    found = {f"{name}_ms": report.spread([1e3 * value for value in values]) for name, values in seconds.items()}
    rows = [[name, spread["median"], spread["max"]] for name, spread in found.items()]
    report.print_table(f"A run of rank {rank}, {len(data) / 2**20:.0f} MiB snapshot", ["what", "median", "max"], rows)
    return {**found, "snapshot_bytes": len(data)}


def strict_probe(size: str, device: torch.device, scale: Scale) -> dict[str, Any]:
    """Whether bits depend on company there, and what the settings cost. In a process of its own: see in_child."""
    base = base_of(model_on_device(size, device, scale.dtype), size, device)
    found = probe(base, buckets=scale.strict_buckets)
    buckets = [asdict(bucket) | {"price": bucket.price} for bucket in found.buckets]
    return {"holds": found.holds, "usable_buckets": found.usable_buckets, "kernel": found.kernel, "buckets": buckets}


def in_child(run: Run, options: Sequence[str]) -> dict[str, Any]:
    """What this script prints in a fresh process: strict mode's settings must be there before CUDA is first used."""
    command = [sys.executable, __file__, "--device", str(run.device), *options]
    command += ["--tiny"] if run.scale.is_tiny else []
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment, timeout=max(5.0, run.remaining_s)
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"strict: holds {found['holds']}, usable buckets {found['usable_buckets']}", flush=True)
    return found


def kernel_race(run: Run) -> dict[str, Any]:
    """The LoRA kernels against each other on a quick grid (their own script, in a fresh process)."""
    script = Path(__file__).with_name("kernel_race.py")
    out = (run.path or Path("/tmp/treadle-gpu.json")).with_name(f"kernels-{os.getpid()}.json")
    options = ["--device", str(run.device), "--dtype", str(run.scale.dtype).removeprefix("torch."), "--quick"]
    options += ["--repetitions", "1", "--seconds", "0.001"] if run.scale.is_tiny else ["--repetitions", "3"]
    try:
        subprocess.run([sys.executable, script, *options, "--json", out], check=True, timeout=max(5.0, run.remaining_s))
        found: dict[str, Any] = json.loads(out.read_text())
        return found
    finally:
        out.unlink(missing_ok=True)


def show(point: Point, found: Mapping[str, Any]) -> None:
    """One line per point, as it comes."""
    compared = "  ".join(f"{name} {spread['median']:.2f}" for name, spread in found["ratios"].items())
    print(
        f"{point.name:<40} {found['step_s']['ours']['median']:8.3f} s {found['tokens_per_s']:10,.0f} tok/s "
        f"{found['useful_tflop_per_s']:7.1f} TFLOP/s  {found['base_share_of_gemm_rate']:5.0%} base "
        f"{found['all_share_of_gemm_rate']:5.0%} all  AdamW {found['optimizer_share']:4.0%}  {compared}",
        flush=True,
    )


def finish(run: Run) -> None:
    """Predicted against measured, and what is missing."""
    measured = predictions.measured(run.result)
    rows = []
    for prediction in predictions.PREDICTIONS:
        value = measured.get(prediction.figure)
        against = ["not measured", ""] if value is None else [value, value / prediction.value]
        rows.append([prediction.figure, prediction.value, *against, prediction.why])
    run.result["predictions"] = [
        asdict(prediction) | {"measured": measured.get(prediction.figure)} for prediction in predictions.PREDICTIONS
    ]
    for name, reason in run.result["dropped"].items():
        print(f"dropped: {name}: {reason}")
    for name, reason in run.result["out_of_memory"].items():
        print(f"out of memory: {name}: {reason}")
    for name in run.result["failed"]:
        print(f"failed: {name}")
    report.print_table("Predicted and measured", ["figure", "predicted", "measured", "measured/predicted", "why"], rows)
    report.write(run.path, run.result)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model and small points: the test of this script")
    parser.add_argument("--budget-s", type=float, default=540.0, help="wall seconds, models and all")
    parser.add_argument("--strict-of", default=None, help=argparse.SUPPRESS)
    report.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
