"""The language-model head with its losses: memory and time of the chunked head against full logits.

    python scripts/bench/head.py [--tokens 4096] [--vocabulary 151936] [--hidden 256] [--dtype float32]
                                 [--losses cross_entropy ppo gspo] [--repetitions 3] [--device cpu] [--threads 1]
                                 [--group-rows N] [--json FILE] [--save] [--baseline FILE]

Sides, each in a process of its own, in turn:
- chunked: the engine's head. Logits of one group of rows at a time.
- full: logits of all rows, log_softmax, gather, autograd; the losses' own derivatives, so that only the head differs.

Both give log-probabilities, the loss and the gradient of the hidden states, and with "unembed" those of a LoRA adapter
on the head. Every token has a gradient: the worst case for the chunked head, which skips those without.
logits %: the most memory held above what was there before the call, as a share of the float32 logits of all tokens.
The must is under 5 % at the defaults. GEMM %: the GEMMs that are due (two of tokens x vocabulary x hidden, three for a
loss over whole datums, which has to visit the vocabulary twice) at the run's own GEMM rate, over the time taken.
A ratio is full over chunked within a turn, so above 1 the chunked head is better. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import report
import torch
from ceilings import ceilings, timed
from torch import Tensor

from treadle.domain.losses import LOSSES, resolve_loss
from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import (
    HEAD_MODULE,
    AdapterArena,
    AdapterWeights,
    ProjectionGroup,
    ProjectionShape,
    adapter_layout,
)
from treadle.engine.head import HeadTask, run_head
from treadle.engine.losses import SEQUENCE_LOSSES, TOKEN_LOSSES, LossTerms, rows_with_gradient, sequence_lengths

SIDES = ("chunked", "full")
RANK = 16
DATUM_TOKENS = 512
MARGIN = 0.25
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Matrix:
    """What the head wants of a base model."""

    head_weight_VD: Tensor


def make_task(args: argparse.Namespace, loss_name: str, num_tokens: int, *, unembed: bool) -> HeadTask:
    """One tenant's datums, as one task; without `unembed` its adapter leaves the head alone."""
    rng = np.random.default_rng(0)
    loss = resolve_loss(loss_name, {})
    shape = (num_tokens, 1)
    signal = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    inputs = {
        "weights": signal,
        "advantages": signal,
        "logprobs": rng.normal(-np.log(args.vocabulary), 0.1, shape).astype(np.float32),
        "sequence_ratio_mask": np.ones(shape, np.float32),
        "clip_low_threshold": np.full(shape, 0.0, np.float32),
        "clip_high_threshold": np.full(shape, 1e6, np.float32),
        "sampling_logprobs": np.full(shape, -np.log(args.vocabulary), np.float32),
        "sampled_runs": np.ones(shape, np.float32),
    }
    module = HEAD_MODULE if unembed else "model.layers.0.mlp.gate_proj"
    projection = ProjectionShape(module, args.hidden, args.vocabulary if unembed else 1)
    layout = adapter_layout([ProjectionGroup(module, (projection,))], LoraSpec(rank=RANK, seed=0))
    flat = torch.randn(layout.num_elements, device=args.device) * 0.05
    lengths = [min(DATUM_TOKENS, num_tokens - start) for start in range(0, num_tokens, DATUM_TOKENS)]
    return HeadTask(
        start=0,
        stop=num_tokens,
        targets=torch.from_numpy(rng.integers(0, args.vocabulary, shape)).to(args.device),
        inputs={name: torch.from_numpy(value).to(args.device) for name, value in inputs.items()},
        has_gradient=rows_with_gradient(loss, inputs),
        sequence_lengths=sequence_lengths(loss, inputs, lengths),
        loss=loss,
        adapter=AdapterWeights(layout, flat, 2.0),
        grads=AdapterArena(layout, torch.zeros_like(flat)),
    )


def run_chunked(args: argparse.Namespace, base: Matrix, hidden_TD: Tensor, task: HeadTask) -> tuple[Tensor, Tensor]:
    """Log-probabilities and d loss / d hidden."""
    d_hidden_TD = torch.zeros_like(hidden_TD)
    (result,) = run_head(base, hidden_TD, [task], d_hidden_TD, group_rows=args.group_rows)
    return result.logprobs, d_hidden_TD


def run_full(args: argparse.Namespace, base: Matrix, hidden_TD: Tensor, task: HeadTask) -> tuple[Tensor, Tensor]:
    """The same by autograd over the logits of all rows."""
    hidden = hidden_TD.detach().requires_grad_()
    logits = torch.mm(hidden, base.head_weight_VD.t()).float()
    tensors = task.adapter.group(HEAD_MODULE)
    if tensors is not None:
        a, b = tensors.a.detach().requires_grad_(), tensors.b[0].detach().requires_grad_()
        logits = logits + task.adapter.scale * torch.mm(torch.mm(hidden.float(), a.t()), b)
    logprobs = logits.log_softmax(dim=1).gather(1, task.targets)
    del logits
    logprobs.backward(loss_terms(task, logprobs.detach()).grad)
    assert hidden.grad is not None
    return logprobs.detach(), hidden.grad


def loss_terms(task: HeadTask, logprobs: Tensor) -> LossTerms:
    if task.loss.name in SEQUENCE_LOSSES:
        return SEQUENCE_LOSSES[task.loss.name](logprobs, task.inputs, task.loss.config, task.sequence_lengths)
    return TOKEN_LOSSES[task.loss.name](logprobs, task.inputs, task.loss.config)


RUN: Mapping[str, Callable[[argparse.Namespace, Matrix, Tensor, HeadTask], tuple[Tensor, Tensor]]] = {
    "chunked": run_chunked,
    "full": run_full,
}


def measure_here(args: argparse.Namespace, side: str, loss_name: str, *, unembed: bool) -> dict[str, float]:
    """Seconds and peak bytes of one call, in this process; the first of a few rows is not measured."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = _DTYPES[args.dtype]
    base = Matrix((torch.randn(args.vocabulary, args.hidden, device=args.device) * 0.02).to(dtype))
    hidden_TD = torch.randn(args.tokens, args.hidden, device=args.device).to(dtype)
    few = make_task(args, loss_name, 16, unembed=unembed)
    RUN[side](args, base, hidden_TD[:16].contiguous(), few)
    task = make_task(args, loss_name, args.tokens, unembed=unembed)
    before = reset_peak(args.device)
    kept: list[tuple[Tensor, Tensor]] = []
    seconds = timed(lambda: kept.append(RUN[side](args, base, hidden_TD, task)), args.device)
    peak = peak_bytes(args.device) - before
    logprobs, d_hidden = kept[0]
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        # So that the parent sees that both sides computed the same.
        "logprobs_sum": logprobs.double().sum().item(),
        "d_hidden_norm": d_hidden.double().norm().item(),
    }


def reset_peak(device: str) -> float:
    """Bytes held now; the peak starts from them."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def peak_bytes(device: str) -> float:
    if torch.device(device).type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return report.peak_rss_mb() * 2**20


def measure(args: argparse.Namespace, loss_name: str, *, unembed: bool) -> dict[str, Any]:
    """Both sides in turn, each call in a fresh process."""
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for turn in range(args.repetitions):
        for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
            runs[side].append(in_child(args, side, loss_name, unembed=unembed))
    for side in SIDES:
        for name in ("logprobs_sum", "d_hidden_norm"):
            ours, other = runs["chunked"][0][name], runs[side][0][name]
            tolerance = 1e-4 if args.dtype == "float32" else 2e-2
            assert abs(ours - other) <= tolerance * abs(other), (loss_name, name, ours, other)
    full_bytes = args.tokens * args.vocabulary * 4
    return {
        "seconds": {side: report.spread([run["seconds"] for run in runs[side]]) for side in SIDES},
        "logits_share": {side: max(run["peak_bytes"] for run in runs[side]) / full_bytes for side in SIDES},
        "ratios": {
            "seconds full/chunked": report.spread(
                [full["seconds"] / ours["seconds"] for ours, full in zip(runs["chunked"], runs["full"], strict=True)]
            ),
            "memory full/chunked": statistics.median(
                full["peak_bytes"] / ours["peak_bytes"]
                for ours, full in zip(runs["chunked"], runs["full"], strict=True)
            ),
        },
    }


def in_child(args: argparse.Namespace, side: str, loss_name: str, *, unembed: bool) -> dict[str, float]:
    child = [*sys.argv[1:], "--child", side, loss_name, "unembed" if unembed else "base"]
    done = subprocess.run([sys.executable, __file__, *child], stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--losses", nargs="+", choices=sorted(LOSSES), default=["cross_entropy", "ppo", "gspo"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads on a CPU")
    parser.add_argument("--group-rows", type=int, default=None, help="most rows whose logits exist at one time")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.child is not None:
        side, loss_name, adapter = args.child
        print(json.dumps(measure_here(args, side, loss_name, unembed=adapter == "unembed")))
        return 0
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    accelerator = None if device.type == "cpu" else torch.cuda.get_device_name(device)
    names = ("tokens", "vocabulary", "hidden", "dtype", "threads", "repetitions", "group_rows")
    result: dict[str, Any] = {
        **report.context(accelerator=accelerator),
        "config": {**{name: getattr(args, name) for name in names}, "rank": RANK, "warm-up": "16 rows"},
        "ceilings": ceilings(device, _DTYPES[args.dtype]),
        "points": [],
    }
    report.print_table("Ceilings of this run", ["what", "value"], [list(row) for row in result["ceilings"].items()])
    for loss_name in args.losses:
        for unembed in (False, True):
            label = f"{loss_name}{' unembed' if unembed else ''}"
            point = {"label": label, **measure(args, loss_name, unembed=unembed)}
            num_gemms = 3 if loss_name in SEQUENCE_LOSSES else 2
            due_s = num_gemms * 2e-12 * args.tokens * args.vocabulary * args.hidden / result["ceilings"]["gemm_tflops"]
            point["gemm_share"] = due_s / point["seconds"]["chunked"]["median"]
            result["points"].append(point)
    show(result)
    report.write(report.path_of(args, "head", accelerator), result)
    return report.compare(args, result, margin=MARGIN)


def show(result: Mapping[str, Any]) -> None:
    """The table."""
    rows = [
        [
            point["label"],
            *(point["seconds"][side]["median"] for side in SIDES),
            point["ratios"]["seconds full/chunked"]["median"],
            100 * point["gemm_share"],
            *(100 * point["logits_share"][side] for side in SIDES),
        ]
        for point in result["points"]
    ]
    columns = ["loss", "chunked s", "full s", "full/chunked", "GEMM %", "chunked logits %", "full logits %"]
    config = result["config"]
    shape = f"{config['tokens']} tokens, vocabulary {config['vocabulary']}, hidden {config['hidden']}"
    report.print_table(f"Head and loss, forward and backward, {shape}, {config['dtype']}", columns, rows)


if __name__ == "__main__":
    raise SystemExit(main())
