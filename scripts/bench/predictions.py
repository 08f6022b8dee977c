"""What gpu.py is expected to measure on an H200, written before the first run there.

Arithmetic: 4 FLOPs per multiplying weight and token (8B 7.6e9 weights, 4B 4.0e9, 0.6B 0.6e9, heads included), a GEMM
rate of 700 TFLOP/s in bfloat16. Rank 32 adds 2 to 6 % of FLOPs, but in float32 arithmetic (tf32x3 in Triton): those
cost several times their share, and full-size float32 temporaries if the segment loop runs, which would halve "base /
GEMM". A PEFT step of one tenant launches about 700 kernels per layer, forward and backward together, at 5 us of Python
and driver each: a floor of 0.13 s on 36 layers. Ours launches about 150 per layer and pass, 25 ms, and with the
segment loop 2 ms per tenant more (a tenth of that with Triton). A value here is changed with a line in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Prediction:
    """figure: as `measured` names it."""

    figure: str
    value: float
    why: str


PREDICTIONS: tuple[Prediction, ...] = (
    Prediction("gemm TFLOP/s", 700.0, "71 % of the sheet's 989, what square products usually reach"),
    Prediction("4b: 8 x 1 x 256 r32: p0 / ours", 8.0, "8 floors of 0.13 s over 2,048 tokens: 0.08 s busy + 0.04"),
    Prediction("4b: 8 x 1 x 1024 r32: p0 / ours", 3.5, "PEFT: 0.14 s each, busy; ours 1.3e14 FLOPs at 58 %: 0.32 s"),
    Prediction("4b: 8 x 2 x 2048 r32: p0 / ours", 1.8, "PEFT at 33 % of the rate (norms, rope, fp32 LoRA), ours at 58"),
    Prediction("4b: 8 x 8 x 2048 r32: p0 / ours", 1.7, "as before: nothing left to amortise, only leaner layers"),
    Prediction("4b: 8 x 1 x 256 r32: p1 / ours", 7.0, "P1 saves switching and logits, not launches"),
    Prediction("4b: 8 x 1 x 1024 r32: p1 / ours", 3.0, "still at its floor of launches"),
    Prediction("4b: 8 x 2 x 2048 r32: p1 / ours", 1.4, "bf16 adapters and no float32 logits: 40 % of the rate"),
    Prediction("4b: 8 x 8 x 2048 r32: p1 / ours", 1.35, "the same, at its limit"),
    Prediction("8b: 8 x 1 x 256 r32: p0 / ours", 6.0, "floor as for 4B (36 layers), twice the FLOPs for ours"),
    Prediction("8b: 8 x 2 x 2048 r32: p0 / ours", 1.5, "wider layers leave less of the time to norms"),
    Prediction("0.6b: 8 x 1 x 256 r32: p0 / ours", 8.0, "28 layers, all launches: 8 x 0.11 s over 0.03 + 0.016 x 5"),
    Prediction("8b: 8 x 2 x 2048 r32: base / GEMM", 0.58, "the aim: bandwidth-bound norms and SwiGLU are a third"),
    Prediction("4b: 8 x 2 x 2048 r32: base / GEMM", 0.52, "narrower layers: relatively more elementwise work"),
    Prediction("0.6b: 8 x 2 x 2048 r32: base / GEMM", 0.32, "hidden 1,024: elementwise work and small products"),
    Prediction("8b: 8 x 1 x 256 r32: base / GEMM", 0.40, "2,048 tokens: 0.09 s busy and 0.04 of launches"),
    Prediction("4b: 64 / 1 tenants", 0.85, "16,384 tokens in one pass both ways; 63 x 2 ms of segments in 0.65 s"),
    Prediction("8b: 64 / 1 tenants", 0.90, "the same launches beside twice the work"),
    Prediction("0.6b: 64 / 1 tenants", 0.60, "launches of 64 segments x 113 groups outweigh 0.1 s of work"),
    Prediction("4b: rank 64 / rank 8", 0.88, "LoRA grows from 0.7 to 5.3 % of the base's FLOPs, at half its rate"),
    Prediction("4b: 8 x 1 x 1024 r32: AdamW share", 0.02, "8 x 71M numbers x 40 bytes: 23 GB at 4 TB/s is 6 ms"),
    Prediction("4b: selective / none", 0.96, "norms and SwiGLU again: bandwidth, 4 %"),
    Prediction("4b: full / none", 0.70, "the forward once more: 1.45 x"),
    Prediction("4b: publish ms", 0.3, "284 MB copied on the device at 4 TB/s is 0.13 ms, and an allocation"),
    Prediction("4b: encode ms", 900.0, "0.8 GB to the host from pageable memory, then two copies"),
    Prediction("4b: decode ms", 700.0, "0.8 GB back, with one copy on the host"),
    Prediction("4b: strict price at 16384", 0.04, "a deterministic flash backward, 15 % more of attention's share"),
)


def measured(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a result of gpu.py by the names that predictions use; those that are there."""
    points = result["points"]
    found = {"gemm TFLOP/s": float(result["ceilings"]["gemm_tflops"])}
    for name, point in points.items():
        if "base_share_of_gemm_rate" in point:
            found[f"{name}: base / GEMM"] = point["base_share_of_gemm_rate"]
            found[f"{name}: AdamW share"] = point["optimizer_share"]
            for side, spread in point["ratios"].items():
                found[f"{name}: {side.partition('_')[0]} / ours"] = spread["median"]
        size, _, what = name.partition(": ")
        if what == "states":
            found |= {f"{size}: {key[:-3]} ms": value["median"] for key, value in point.items() if key.endswith("_ms")}
        if what == "strict":
            found |= {f"{size}: strict price at {bucket['bucket']}": bucket["price"] for bucket in point["buckets"]}
    return found | _rate_ratios(points)


def _rate_ratios(points: Mapping[str, Any]) -> dict[str, float]:
    """Ratios of two points of one model: many tenants over one, high rank over low, recomputed over kept."""
    rates = {name: point["tokens_per_s"] for name, point in points.items() if "tokens_per_s" in point}
    found: dict[str, float] = {}
    for size in {name.partition(":")[0] for name in rates}:
        mine = {name.partition(": ")[2]: rate for name, rate in rates.items() if name.startswith(f"{size}: ")}
        for figure, over, under in (
            ("64 / 1 tenants", "64 x 1 x 256 r32", "1 x 64 x 256 r32"),
            ("rank 64 / rank 8", "8 x 1 x 1024 r64", "8 x 1 x 1024 r8"),
            ("selective / none", "8 x 2 x 2048 r32 selective", "8 x 2 x 2048 r32"),
            ("full / none", "8 x 2 x 2048 r32 full", "8 x 2 x 2048 r32"),
        ):
            if over in mine and under in mine:
                found[f"{size}: {figure}"] = mine[over] / mine[under]
    return found
