"""The machine's own ceilings, measured in the run that quotes them (GEMM rate, copy bandwidth), and its clock.

    python scripts/bench/ceilings.py [--device cpu] [--dtype float32]

A share of a data sheet's peak says nothing on a shared or throttled machine; a share of what this process reached
with one plain matrix product minutes earlier does. On a CPU, seconds are CPU-seconds of this process (with one
intra-op thread they are those of the calling thread); on an accelerator they are wall seconds around a wait.
Knows no models. Invariant: allocates nothing while the clock runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Square and large enough that a better shape would change little: 2.1 GFLOP on a CPU core, 1.1 TFLOP on a GPU.
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
# Far beyond every cache: bytes read, and as many written.
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
_REPETITIONS = {"cpu": 5, "cuda": 20}


def ceilings(device: torch.device | str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine can do now, in this dtype and with this process's number of threads.

    gemm_tflops: the median rate of a large square matrix product, 2 n^3 FLOPs each; gemm_tflops_max: the best one.
    copy_gb_per_s: bytes read plus bytes written per second of a large copy, decimal gigabytes.
    Takes under a second.
    """
    device = torch.device(device)
    gemm_s = _gemm_seconds(device, dtype)
    copy_s = _copy_seconds(device)
    num_flops = 2 * _GEMM_SIZE[device.type] ** 3
    return {
        "gemm_tflops": num_flops / statistics.median(gemm_s) / 1e12,
        "gemm_tflops_max": num_flops / min(gemm_s) / 1e12,
        "copy_gb_per_s": 2 * _COPY_BYTES[device.type] / statistics.median(copy_s) / 1e9,
    }


def clock(device: torch.device | str) -> Callable[[], float]:
    """The clock that figures of this device are quoted in: CPU-seconds, or wall seconds once the device is idle."""
    if torch.device(device).type == "cpu":
        return time.process_time

    def waited() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return waited


def timed(measured: Callable[[], object], device: torch.device | str) -> float:
    """Seconds of one call, by `clock`."""
    now = clock(device)
    started = now()
    measured()
    return now() - started


def in_turn(
    sides: Mapping[str, Callable[[], object]], repetitions: int, device: torch.device | str
) -> dict[str, list[float]]:
    """Seconds of each call of each side: one of each per turn, each turn beginning with another side.

    What drifts slowly (clock rates, neighbours on the machine) then slows all sides alike; form ratios within a turn.
    Each side runs once before, untimed.
    """
    names = tuple(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        sides[name]()
    for turn in range(repetitions):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            seconds[name].append(timed(sides[name], device))
    return seconds


def _gemm_seconds(device: torch.device, dtype: torch.dtype) -> list[float]:
    size = _GEMM_SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(size, size, device=device, generator=generator).to(dtype)
    right = torch.randn(size, size, device=device, generator=generator).to(dtype)
    product = torch.empty(size, size, device=device, dtype=dtype)
    torch.mm(left, right, out=product)
    return [timed(lambda: torch.mm(left, right, out=product), device) for _ in range(_REPETITIONS[device.type])]


def _copy_seconds(device: torch.device) -> list[float]:
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return [timed(lambda: target.copy_(source), device) for _ in range(_REPETITIONS[device.type])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, value in ceilings(args.device, _DTYPES[args.dtype]).items():
        print(f"{name} {value:.4g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
