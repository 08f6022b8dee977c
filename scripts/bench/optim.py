"""One optimiser step of many adapters: ours in one call against torch's ways of doing it.

    python scripts/bench/optim.py [--sizes 1m 27m] [--ranks 8 32] [--adapters 1 8 32 64] [--json FILE] [--save]
                                  [--device cpu] [--threads 1] [--baseline FILE]

Sides, all on the same memory and in turn:
- ours: adamw_steps as the worker calls it: it measures the update's norm and refuses what is not finite; the
  gradient's norm is known from the commit of the last pass, which finds it while it looks for what is not finite.
- ours+norm: the same where the gradient's norm is not known.
- fused: torch.optim.AdamW(fused=True) per adapter, over the tensors that PEFT would hold.
- fused+clip: the same after clip_grad_norm_ per adapter, as a loop does it that reports the gradient's norm.
- foreach: one torch.optim.AdamW(foreach=True) over all tensors of all adapters (all with one learning rate).
- stacked: elementwise arithmetic on [adapters, arena] tensors with [adapters, 1] settings; no norms.

A ratio is a side's seconds over ours within a turn, so above 1 ours is faster. GB/s counts 28 bytes per parameter
(four arenas read, three written): what no step can do without. Also measured: a pass's gradient memory (take, write
once, commit, give back) from the pool against fresh memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import report
import torch
from ceilings import ceilings, in_turn
from models import DEVICE_SHAPES, SHAPES, model_config
from torch import Tensor

from treadle.domain.ops import AdamParams, LoraSpec
from treadle.engine.adapter import (
    AdapterArena,
    AdapterLayout,
    AdapterWeights,
    ProjectionGroup,
    ProjectionShape,
    adapter_layout,
)
from treadle.engine.arenas import ArenaPool, GradientArena
from treadle.engine.optim import adamw_steps
from treadle.engine.state import TrainingState, commit_scratch

ADAM = AdamParams(learning_rate=1e-4)
BYTES_PER_PARAMETER = 28
MARGIN = 0.25


def groups_of(size: str) -> list[ProjectionGroup]:
    """The projections of a Qwen3 shape, grouped as the engine groups them."""
    config = model_config(size)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    groups = []
    for layer in range(config.num_hidden_layers):
        for parent, leaves in (
            ("self_attn", (("q_proj", hidden, heads), ("k_proj", hidden, kv_heads), ("v_proj", hidden, kv_heads))),
            ("self_attn", (("o_proj", heads, hidden),)),
            ("mlp", (("gate_proj", hidden, inner), ("up_proj", hidden, inner))),
            ("mlp", (("down_proj", inner, hidden),)),
        ):
            prefix = f"model.layers.{layer}.{parent}"
            members = tuple(ProjectionShape(f"{prefix}.{leaf}", *shape) for leaf, *shape in leaves)
            groups.append(ProjectionGroup(members[0].module, members))
    groups.append(ProjectionGroup("lm_head", (ProjectionShape("lm_head", hidden, config.vocab_size),)))
    return groups


class KeptGradient(GradientArena):
    """A gradient of known norm that a step does not consume."""

    def __init__(self, arena: AdapterArena, norm: float) -> None:
        AdapterArena.__init__(self, arena.layout, arena.flat)
        self.norm = norm

    def release(self) -> None:
        pass


class Adapters:
    """N adapters of one layout as rows of four [N, arena] tensors, which all sides share."""

    def __init__(self, layout: AdapterLayout, rank: int, num_adapters: int, device: torch.device) -> None:
        shape = (num_adapters, layout.num_elements)
        generator = torch.Generator(device).manual_seed(0)
        self.weights = torch.randn(shape, device=device, generator=generator)
        self.grads = torch.randn(shape, device=device, generator=generator)
        self.exp_avg = torch.zeros(shape, device=device)
        self.exp_avg_sq = torch.zeros(shape, device=device)
        self.layout = layout
        self.arenas = [AdapterArena(layout, row) for row in self.grads]
        norms = torch.linalg.vector_norm(self.grads, dim=1).tolist()
        self.measured = [KeptGradient(arena, norm) for arena, norm in zip(self.arenas, norms, strict=True)]
        self.states = [
            TrainingState(LoraSpec(rank=rank, seed=0), AdapterWeights(layout, *row, 1.0), exp_avg, exp_avg_sq)
            for *row, exp_avg, exp_avg_sq in zip(self.weights, self.exp_avg, self.exp_avg_sq, strict=True)
        ]

    def parameters(self, index: int) -> list[torch.nn.Parameter]:
        """One adapter as PEFT holds it: a parameter per A and B, each with its gradient."""
        parameters = []
        for place in self.layout.places:
            window = slice(place.offset, place.offset + place.num_elements)
            parameter = torch.nn.Parameter(self.weights[index, window].view(place.shape))
            parameter.grad = self.grads[index, window].view(place.shape)
            parameters.append(parameter)
        return parameters

    def adamw(self, indices: Sequence[int], **options: bool) -> tuple[torch.optim.AdamW, list[torch.nn.Parameter]]:
        """torch's optimiser over those adapters' tensors, with its moments in our memory."""
        parameters = [parameter for index in indices for parameter in self.parameters(index)]
        optimizer = torch.optim.AdamW(
            parameters, lr=ADAM.learning_rate, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, weight_decay=0, **options
        )
        is_fused = options.get("fused", False)
        step_device = self.weights.device if is_fused else torch.device("cpu")
        cursor = iter(parameters)
        for index in indices:
            for place in self.layout.places:
                window = slice(place.offset, place.offset + place.num_elements)
                optimizer.state[next(cursor)] = {
                    "step": torch.zeros((), device=step_device),
                    "exp_avg": self.exp_avg[index, window].view(place.shape),
                    "exp_avg_sq": self.exp_avg_sq[index, window].view(place.shape),
                }
        return optimizer, parameters


def sides_of(adapters: Adapters) -> Mapping[str, Callable[[], object]]:
    """The sides, each one step of all adapters."""
    indices = range(len(adapters.states))
    each = [adapters.adamw([index], fused=True) for index in indices]
    every, _ = adapters.adamw(indices, foreach=True)

    def fused_with_norms() -> None:
        for optimizer, parameters in each:
            torch.nn.utils.clip_grad_norm_(parameters, 1e9)
            optimizer.step()

    return {
        "ours": lambda: step_ours(adapters.states, adapters.measured),
        "ours+norm": lambda: step_ours(adapters.states, adapters.arenas),
        "fused": lambda: [optimizer.step() for optimizer, _ in each],
        "fused+clip": fused_with_norms,
        "foreach": every.step,
        "stacked": Stacked(adapters).step,
    }


def step_ours(states: Sequence[TrainingState], gradients: Sequence[AdapterArena]) -> None:
    """One call for all, each with a learning rate of its own."""
    due = []
    for index, (state, gradient) in enumerate(zip(states, gradients, strict=True)):
        state.grads = gradient
        due.append((state, replace(ADAM, learning_rate=ADAM.learning_rate * (1 + index))))
    results = adamw_steps(due)
    assert all(isinstance(result, dict) for result in results)


class Stacked:
    """AdamW as elementwise arithmetic on [N, arena] tensors, settings [N, 1]."""

    def __init__(self, adapters: Adapters) -> None:
        num_adapters = len(adapters.states)
        self.adapters = adapters
        self.num_steps = 0
        self.step_size = torch.full((num_adapters, 1), ADAM.learning_rate, device=adapters.weights.device)
        self.beta1 = torch.full_like(self.step_size, ADAM.beta1)
        self.beta2 = torch.full_like(self.step_size, ADAM.beta2)
        self.work = torch.empty_like(adapters.weights)

    @torch.no_grad()
    def step(self) -> None:
        self.num_steps += 1
        adapters, work = self.adapters, self.work
        adapters.exp_avg.lerp_(adapters.grads, 1 - self.beta1)
        torch.mul(adapters.grads, adapters.grads, out=work)
        adapters.exp_avg_sq.lerp_(work, 1 - self.beta2)
        torch.sqrt(adapters.exp_avg_sq, out=work)
        work.mul_(torch.rsqrt(1 - self.beta2**self.num_steps)).add_(ADAM.eps)
        torch.div(adapters.exp_avg, work, out=work)
        adapters.weights.addcmul_(work, self.step_size / (1 - self.beta1**self.num_steps), value=-1)


def gradient_sides(adapters: Adapters) -> Mapping[str, Callable[[], object]]:
    """What an op's gradient memory costs, for one op of each adapter: pooled, and fresh as it was before the pool."""
    # In a worker the runs' own memory is in the pool too, and as much again may wait there for the next pass.
    pool = ArenaPool(adapters.weights.device, max_idle_bytes=3 * adapters.weights.nbytes)
    for state in adapters.states:
        state.rank_class = pool.rank_class(adapters.layout)

    def pooled() -> None:
        for state, grads in zip(adapters.states, adapters.grads, strict=True):
            scratch = state.new_scratch()
            scratch.flat.add_(grads)
            commit_scratch(state, scratch)
        for state in adapters.states:
            state.drop_gradient()

    def fresh() -> None:
        kept: list[AdapterArena] = []
        for state, grads in zip(adapters.states, adapters.grads, strict=True):
            kept.append(AdapterArena(state.layout, torch.zeros_like(state.weights.flat)))
            kept[-1].flat.add_(grads)
            assert torch.stack(torch.aminmax(kept[-1].flat)).isfinite().all()

    return {"pooled": pooled, "fresh": fresh}


def measure(adapters: Adapters, repetitions: int) -> dict[str, Any]:
    """Milliseconds of each side and their ratios to ours."""
    device = adapters.weights.device
    num_parameters = adapters.layout.num_parameters * len(adapters.states)
    steps = in_turn(sides_of(adapters), repetitions, device)
    gradients = in_turn(gradient_sides(adapters), repetitions, device)
    ratios = {f"{name}/ours": ratio(steps[name], steps["ours"]) for name in steps if not name.startswith("ours")}
    ratios["fused+clip/ours+norm"] = ratio(steps["fused+clip"], steps["ours+norm"])
    ratios["gradient memory fresh/pooled"] = ratio(gradients["fresh"], gradients["pooled"])
    return {
        "parameters": num_parameters,
        "step_ms": {name: report.spread([value * 1e3 for value in values]) for name, values in steps.items()},
        "gradient_ms": {name: report.spread([value * 1e3 for value in values]) for name, values in gradients.items()},
        "ours_gb_per_s": BYTES_PER_PARAMETER * num_parameters / statistics.median(steps["ours"]) / 1e9,
        "ratios": ratios,
    }


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """The spread of the turns' ratios."""
    return report.spread([above / below for above, below in zip(numerators, denominators, strict=True)])


def check(layout: AdapterLayout, rank: int, device: torch.device) -> None:
    """Sides that do not compute the same are not worth timing."""
    after: dict[str, Tensor] = {}
    for name in sides_of(Adapters(layout, rank, 1, device)):
        adapters = Adapters(layout, rank, 1, device)
        sides_of(adapters)[name]()
        after[name] = adapters.weights
    for name, weights in after.items():
        difference = float((weights - after["ours"]).abs().max())
        assert difference <= 1e-3 * ADAM.learning_rate + 1e-6, f"{name} differs from ours by {difference}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=[*SHAPES, *DEVICE_SHAPES], default=["1m", "27m"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads on a CPU")
    parser.add_argument("--max-gb", type=float, default=2.0, help="memory of one point; larger ones are left out")
    report.add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    accelerator = None if device.type == "cpu" else torch.cuda.get_device_name(device)
    result: dict[str, Any] = {
        **report.context(accelerator=accelerator),
        "config": {"repetitions": args.repetitions, "threads": args.threads, "adam": "defaults", "warm-up": 1},
        "ceilings": ceilings(device, torch.float32),
        "points": [],
    }
    for size in args.sizes:
        for rank in args.ranks:
            layout = adapter_layout(groups_of(size), LoraSpec(rank=rank, seed=0))
            check(layout, rank, device)
            for count in args.adapters:
                # Weights, gradients, two moments, the stacked side's workspace, one more set of gradients.
                if 6 * 4 * layout.num_elements * count > args.max_gb * 1e9:
                    print(f"left out, over --max-gb: {count} adapters of {size}, rank {rank}")
                    continue
                point = measure(Adapters(layout, rank, count, device), args.repetitions)
                result["points"].append({"label": f"{size} r{rank} x{count}", **point})
                gc.collect()
    show(result)
    report.write(report.path_of(args, "optim", accelerator), result)
    return report.compare(args, result, margin=MARGIN)


def show(result: Mapping[str, Any]) -> None:
    """The tables."""
    report.print_table("Ceilings of this run", ["what", "value"], [list(row) for row in result["ceilings"].items()])
    names = ("ours", "ours+norm", "fused", "fused+clip", "foreach", "stacked")
    rows = [
        [
            point["label"],
            *(point["step_ms"][name]["median"] for name in names),
            point["ratios"]["fused/ours"]["median"],
            point["ratios"]["fused+clip/ours+norm"]["median"],
            point["ours_gb_per_s"],
        ]
        for point in result["points"]
    ]
    columns = ["adapters", *(f"{name} ms" for name in names), "fused/ours", "+clip/+norm", "ours GB/s"]
    report.print_table("One optimiser step of all adapters (medians)", columns, rows)
    rows = [
        [
            point["label"],
            *(point["gradient_ms"][name]["median"] for name in ("pooled", "fresh")),
            point["ratios"]["gradient memory fresh/pooled"]["median"],
        ]
        for point in result["points"]
    ]
    columns = ["adapters", "pooled ms", "fresh ms", "fresh/pooled"]
    report.print_table("Gradient memory of one op of each: take, write, commit, give back", columns, rows)


if __name__ == "__main__":
    raise SystemExit(main())
