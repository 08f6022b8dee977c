"""Time the LoRA kernels against each other, cell by cell; the table in engine/kernels/choose.py is made from this.

    python scripts/bench/kernel_race.py --save
    python scripts/bench/kernel_race.py --device cuda --dtype bfloat16 --save

One cell is one projection hidden -> hidden with one adapter per segment: the forward's term, then the whole backward
(dx, dA, dB). On a CPU one thread and CPU-seconds; on a GPU seconds between synchronisations. Kernels take turns.

Predictions, written before the first run. CPU: grouped-mm wins where calls outweigh arithmetic (8 or more segments of
fewer than 32 rows at hidden 128), by at most 1.3x, and loses everywhere else, because it copies the adapters and adds
full-size temporaries. H200: the loop costs about 10 launches of 5 us per segment and direction, so Triton wins from 2
segments on, 10x at 64; at one segment of 512 rows and hidden 2,048 the two are within 1.5x; grouped-mm loses
everywhere on the GPU, because in float32 it waits for the device at each call.

Outcome on the CPU: right about who wins, wrong about by how much. At 64 segments of 8 rows grouped-mm is up to 1.8x
faster, up to hidden 512; at one segment it is 2.1x slower. The GPU has not been measured.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

import report
import torch
from ceilings import ceilings, clock
from torch import Tensor

from treadle.domain.ops import LoraSpec
from treadle.engine.adapter import (
    AdapterArena,
    AdapterLayout,
    AdapterWeights,
    ProjectionGroup,
    ProjectionShape,
    adapter_layout,
)
from treadle.engine.kernels import choose
from treadle.engine.kernels.base import LoraKernel, LoraSegment, PassSegments

RANKS = (1, 4, 8, 16, 32, 64)
NUM_SEGMENTS = (1, 8, 64)
SEGMENT_ROWS = (8, 32, 128, 512)
HIDDEN_SIZES = (128, 512, 2_048)
QUICK = ((8, 32), (1, 8), (32, 128), (128, 512))
# Larger passes are cut by the budget of tokens, and would only repeat the same segments.
MAX_ROWS = 8_192
# Cells of microseconds on a shared machine: geometric means over ranks moved by up to 7 % between two runs.
MARGIN = 0.15
MODULE = "model.layers.0.self_attn.o_proj"


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid; rows are those of one segment."""

    rank: int
    num_segments: int
    rows: int
    hidden: int


class Workload:
    """A cell's tensors and segments."""

    def __init__(self, cell: Cell, device: torch.device, dtype: torch.dtype) -> None:
        group = ProjectionGroup(MODULE, (ProjectionShape(MODULE, cell.hidden, cell.hidden),))
        layout = adapter_layout([group], LoraSpec(rank=cell.rank, seed=0))
        generator = torch.Generator(device=device).manual_seed(0)
        self.segments = PassSegments(
            _segment(layout, index * cell.rows, cell.rows, generator) for index in range(cell.num_segments)
        )
        shape = (cell.num_segments * cell.rows, cell.hidden)
        self.x, self.y, self.dy, self.dx = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(4)
        )

    def run(self, kernel: LoraKernel) -> None:
        """Forward's term and the whole backward, as a pass does them."""
        kept = kernel.add(self.x, self.y, self.segments, MODULE)
        kernel.add_grads(self.dy, self.x, kept, self.dx, self.segments, MODULE)


def _segment(layout: AdapterLayout, start: int, rows: int, generator: torch.Generator) -> LoraSegment:
    def noise() -> Tensor:
        return torch.randn(layout.num_elements, generator=generator, device=generator.device) * 1e-3

    return LoraSegment(AdapterWeights(layout, noise(), 1.0), start, start + rows, AdapterArena(layout, noise()))


def measure(cell: Cell, kernels: Sequence[LoraKernel], args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds per kernel: min, median and max of the repetitions, which alternate between the kernels."""
    device = torch.device(args.device)
    workload = Workload(cell, device, getattr(torch, args.dtype))
    now = clock(device)
    counts: dict[str, int] = {}
    for kernel in kernels:
        workload.run(kernel)
        start = now()
        workload.run(kernel)
        # A cell of microseconds is repeated until a clock of microseconds can see it.
        counts[kernel.name] = max(1, min(200, int(args.seconds / max(now() - start, 1e-6))))
    times: dict[str, list[float]] = {kernel.name: [] for kernel in kernels}
    for _ in range(args.repetitions):
        for kernel in kernels:
            start = now()
            for _ in range(counts[kernel.name]):
                workload.run(kernel)
            times[kernel.name].append((now() - start) / counts[kernel.name] * 1e6)
    row: dict[str, Any] = {"rank": cell.rank, "segments": cell.num_segments, "rows": cell.rows, "hidden": cell.hidden}
    return row | {"microseconds": {name: report.spread(values) for name, values in times.items()}}


def cells(*, quick: bool) -> list[Cell]:
    """The grid, without passes above MAX_ROWS."""
    grid = QUICK if quick else (RANKS, NUM_SEGMENTS, SEGMENT_ROWS, HIDDEN_SIZES)
    every = [Cell(*values) for values in itertools.product(*grid)]
    return [cell for cell in every if cell.num_segments * cell.rows <= MAX_ROWS]


def summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Per rank: in how many cells each kernel is fastest, and the geometric mean of its speed over the loop's."""
    lines = []
    for rank in sorted({row["rank"] for row in rows}):
        mine = [row["microseconds"] for row in rows if row["rank"] == rank]
        medians = [{name: cell[name]["median"] for name in names} for cell in mine]
        fastest = [min(cell, key=cell.__getitem__) for cell in medians]
        ratios = {name: geometric_mean(cell[names[0]] / cell[name] for cell in medians) for name in names}
        wins = {name: fastest.count(name) for name in names}
        lines.append({"label": f"rank {rank}", "cells": len(mine), "wins": wins, "ratios": ratios})
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="16 cells instead of about 200")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.02, help="least time of one repetition")
    report.add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    about = report.context(accelerator=accelerator) | {"device": args.device, "dtype": args.dtype, "threads": 1}
    about["ceilings"] = ceilings(device, getattr(torch, args.dtype))
    kernels = [choose.kernel_named(name, device) for name in choose.available_kernels(device)]
    names = [kernel.name for kernel in kernels]
    rows = [measure(cell, kernels, args) for cell in cells(quick=args.quick)]
    result = {"context": about, "cells": rows, "summary": summary(rows, names)}
    report.write(report.path_of(args, "kernels", accelerator), result)
    print_result(result, names)
    return report.compare(args, result, margin=MARGIN)


def print_result(result: dict[str, Any], names: Sequence[str]) -> None:
    """Both tables."""
    report.print_table(
        "LoRA term of one projection, forward and backward, microseconds (median)",
        ["rank x segments x rows x hidden", *names],
        [
            (
                f"{row['rank']} x {row['segments']} x {row['rows']} x {row['hidden']}",
                *(row["microseconds"][name]["median"] for name in names),
            )
            for row in result["cells"]
        ],
    )
    report.print_table(
        f"Geometric mean of speed over {names[0]}, and cells won",
        ["", *(f"{name} speed" for name in names), *(f"{name} wins" for name in names)],
        [
            (line["label"], *line["ratios"].values(), *(line["wins"][name] for name in names))
            for line in result["summary"]
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main())
