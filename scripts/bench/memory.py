"""Memory: what a pass costs per token, the limits chosen from that, peak memory beside P0, and parked runs.

    python scripts/bench/memory.py [--sizes 1m 27m] [--models DIR] [--json FILE] [--save] [--baseline FILE]

- cost: bytes per token of a recorded pass in each recompute mode, as a worker measures them when it starts, how long
  that takes, and the same counted on a pass of 512 tokens (the margin taken off, so the two should agree).
- limits: tokens of one pass that the worker would choose on this machine now.
- peak: resident memory of fresh processes that train 8 tenants of 512 tokens each: the stock PEFT loop (P0, one tenant
  after another) and the engine with the limits above. "Above loading" is what each holds over its loaded base model.
- parking: bytes of one run on the device before and after, seconds to park it and to bring it back, and the resident
  memory of this process with 200 idle runs.

A ratio is P0's bytes over ours, so above 1 ours needs less; the figure to meet is 1 / 1.5 = 0.67 in all.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import torch
from engine_side import EngineSide, load
from models import make_model
from workload import Workload, even_lengths

from treadle.domain.ids import ModelId
from treadle.domain.ops import LoraSpec
from treadle.domain.plan import StateTag
from treadle.engine import memory
from treadle.engine.adapter import AdapterArena, AdapterWeights, adapter_layout
from treadle.engine.base_model import BaseModel
from treadle.engine.context import Recompute
from treadle.engine.kernels.base import LoraSegment
from treadle.engine.memory import measure_pass_cost, pass_limits
from treadle.engine.state import new_training_state
from treadle.worker.parking import FileShelf, park, unpark
from treadle.worker.slots import ParkingRules, Slots

MARGIN = 0.1
RANK = 16
NUM_TENANTS = 8
TENANT_TOKENS = 512
NUM_IDLE = 200
STEPS = 3
REPETITIONS = 5
MIB = 2**20


def measured_cost(base: BaseModel) -> dict[str, Any]:
    """Bytes per token as a worker foretells them and as a longer pass takes them; the limits chosen from them."""
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        cost = measure_pass_cost(base)
        seconds.append(time.perf_counter() - started)
    modes = {
        mode.value: {
            "foretold_bytes_per_token": cost.bytes_per_token[mode] / memory._MARGIN,
            "counted_bytes_per_token": _counted_bytes(base, mode) / TENANT_TOKENS,
        }
        for mode in Recompute
    }
    limits = pass_limits(base, cost)
    return {
        "modes": modes,
        "head_bytes": cost.fixed_bytes,
        "measuring_s": report.spread(seconds),
        "limits": {name: getattr(limits, name) for name in ("packed", "none", "selective", "full")},
    }


def _counted_bytes(base: BaseModel, mode: Recompute) -> int:
    layout = adapter_layout(base.groups, LoraSpec(rank=8, seed=0))
    flat = torch.zeros(layout.num_elements, device=base.device)
    grads = AdapterArena(layout, torch.zeros_like(flat))
    with memory._peak_bytes(base.device) as peak:
        memory._run_trunk(base, LoraSegment(AdapterWeights(layout, flat, 1.0), 0, TENANT_TOKENS, grads), mode)
    return peak.num_bytes


def parking(base: BaseModel, directory: Path) -> dict[str, Any]:
    """One run parked and brought back, and many that stay parked."""
    shelf = FileShelf(directory)
    state = new_training_state(base, LoraSpec(rank=RANK, seed=1))
    resident = 3 * state.weights.flat.nbytes
    park_s, unpark_s = [], []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        parked = park(state, [shelf])
        park_s.append(time.perf_counter() - started)
        assert parked is not None
        started = time.perf_counter()
        state = unpark(parked, base)
        unpark_s.append(time.perf_counter() - started)
    slots = Slots(base, ParkingRules(shelves=[shelf], after_s=0.0))
    rss = []
    for index in range(NUM_IDLE):
        spec = LoraSpec(rank=RANK, seed=index)
        slots.put(new_training_state(base, spec), StateTag(ModelId(f"session:train:{index}"), 1, 0))
        slots.park_all(busy=())
        if index in (NUM_IDLE // 4, NUM_IDLE - 1):
            gc.collect()
            rss.append(_rss_bytes())
    return {
        "run_bytes": resident,
        "device_bytes_of_idle_runs": slots.resident_bytes,
        "park_s": report.spread(park_s),
        "unpark_s": report.spread(unpark_s),
        "idle_runs": NUM_IDLE,
        "file_bytes": shelf.num_bytes,
        "rss_growth_per_idle_run_bytes": (rss[1] - rss[0]) / (NUM_IDLE - 1 - NUM_IDLE // 4),
    }


def peaks(model_dir: Path) -> dict[str, Any]:
    """Peak resident memory of fresh processes, in MiB."""
    here = Path(__file__)
    lengths = [str(length) for length in even_lengths(TENANT_TOKENS, 128)]
    common = ["--tenants", str(NUM_TENANTS), "--lengths", *lengths, "--rank", str(RANK), "--steps", str(STEPS)]
    found = {
        "p0": _child([str(here.with_name("peft_baseline.py")), str(model_dir), "--way", "p0", *common])["peak_rss_mb"],
        "p0_loaded": _child([str(here), "--side", "p0-loaded", str(model_dir)])["peak_rss_mb"],
        "ours": _child([str(here), "--side", "ours", str(model_dir)])["peak_rss_mb"],
        "ours_loaded": _child([str(here), "--side", "ours-loaded", str(model_dir)])["peak_rss_mb"],
    }
    above = {side: found[side] - found[f"{side}_loaded"] for side in ("p0", "ours")}
    return {
        "peak_rss_mb": found,
        "above_loading_mb": above,
        "ratios": {"p0 over ours, total": found["p0"] / found["ours"]},
    }


def run_side(side: str, model_dir: Path) -> None:
    """What a child does: one side alone, then its peak on stdout."""
    torch.set_num_threads(1)
    if side == "p0-loaded":
        import peft_baseline  # its imports belong to this side's memory alone

        kept: object = peft_baseline.load(model_dir)
    else:
        base = load(model_dir)
        limits = pass_limits(base, measure_pass_cost(base))
        kept = base
        if side == "ours":
            workload = Workload(NUM_TENANTS, even_lengths(TENANT_TOKENS, 128), RANK)
            engine = EngineSide(base, workload, pass_tokens=limits.packed)
            for _ in range(STEPS):
                engine.step()
    print(json.dumps({"peak_rss_mb": report.peak_rss_mb(), "kept": type(kept).__name__}))


def _child(command: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _rss_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def print_result(size: str, found: dict[str, Any]) -> None:
    """The tables of one model."""
    cost, peak, idle = found["cost"], found["peak"], found["parking"]
    modes = [
        [mode, numbers["foretold_bytes_per_token"] / 1024, numbers["counted_bytes_per_token"] / 1024]
        for mode, numbers in cost["modes"].items()
    ]
    report.print_table(f"{size}: KiB per token of a recorded pass", ["recompute", "foretold", "of 512 tokens"], modes)
    limits = cost["limits"]
    report.print_table(f"{size}: tokens of one pass", list(limits), [list(limits.values())])
    rss, above = peak["peak_rss_mb"], peak["above_loading_mb"]
    rows = [
        ["P0", rss["p0"], above["p0"]],
        ["ours", rss["ours"], above["ours"]],
        ["ours / P0", rss["ours"] / rss["p0"], above["ours"] / above["p0"]],
    ]
    report.print_table(
        f"{size}: peak RSS, {NUM_TENANTS} tenants x {TENANT_TOKENS} tokens, MiB", ["", "total", "above loading"], rows
    )
    rows = [
        ["device bytes of a run", idle["run_bytes"]],
        [f"device bytes of {NUM_IDLE} idle runs", idle["device_bytes_of_idle_runs"]],
        ["RSS per further idle run, KiB", idle["rss_growth_per_idle_run_bytes"] / 1024],
        ["park, ms", 1e3 * idle["park_s"]["median"]],
        ["unpark, ms", 1e3 * idle["unpark_s"]["median"]],
        ["measuring at start-up, ms", 1e3 * cost["measuring_s"]["median"]],
    ]
    report.print_table(f"{size}: idle runs (rank {RANK}), start-up", ["", "value"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1m", "27m"])
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "treadle-bench-models")
    parser.add_argument("--side", nargs=2, default=None, help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.side is not None:
        run_side(args.side[0], Path(args.side[1]))
        return 0
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "context": report.context(),
        "available_bytes": memory.available_host_bytes(),
        "models": {},
    }
    for size in args.sizes:
        model_dir = make_model(args.models, size)
        base = load(model_dir)
        with tempfile.TemporaryDirectory() as directory:
            idle = parking(base, Path(directory))
        found = {"cost": measured_cost(base), "peak": peaks(model_dir), "parking": idle}
        del base
        result["models"][size] = found
        print_result(size, found)
    report.write(report.path_of(args, "memory"), result)
    return report.compare(args, result, margin=MARGIN)


if __name__ == "__main__":
    raise SystemExit(main())
