"""What every benchmark writes: where and on what it ran, its numbers as JSON, and a table for people.

Also the regression check: ratios of this run against those of a committed one. Absolute figures are never compared,
because machines differ and drift; a ratio was formed within one run. Needs the standard library alone, so that it
also runs on a bare accelerator machine.
Invariant: whatever stands under a key "ratios" is better when larger.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
_LIBRARIES = ("torch", "transformers", "peft", "tinker", "treadle")


def context(*, accelerator: str | None = None) -> dict[str, Any]:
    """Commit, machine, versions and load: what a number is worth nothing without."""
    machine = {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}
    if accelerator is not None:
        machine["accelerator"] = accelerator
    return {
        "commit": _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain", "src") else ""),
        "machine": machine,
        "load_average_at_start": [round(value, 2) for value in os.getloadavg()],
        "versions": {name: _version(name) for name in _LIBRARIES},
    }


def machine_name(accelerator: str | None = None) -> str:
    """The directory of this kind of machine under benchmarks/results: "cpu-2core", "nvidia-h200"."""
    if accelerator is None:
        return f"cpu-{os.cpu_count()}core"
    return re.sub(r"[^a-z0-9]+", "-", accelerator.lower()).strip("-")


def spread(values: Sequence[float]) -> dict[str, float]:
    """min, median and max of repetitions."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def peak_rss_mb() -> float:
    """The most memory that this process ever held, in MiB (Linux).

    Not getrusage: its maximum survives exec, so a fresh child would report its parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Store the result, pretty enough to read as a diff; a run that is killed while writing leaves the last one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        partial.replace(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has: where results go, and what they are compared with."""
    parser.add_argument("--json", type=Path, default=None, help="write the result to this file")
    parser.add_argument("--save", action="store_true", help="write it to benchmarks/results/MACHINE/ under its name")
    parser.add_argument("--baseline", type=Path, default=None, help="an earlier result: fail when a ratio fell")
    parser.add_argument("--margin", type=float, default=None, help="share by which a ratio may fall")


def path_of(args: argparse.Namespace, name: str, accelerator: str | None = None) -> Path | None:
    """Where the result of the benchmark `name` goes, or None."""
    if args.json is not None:
        path: Path = args.json
        return path
    return RESULTS / machine_name(accelerator) / f"{name}.json" if args.save else None


def compare(args: argparse.Namespace, result: Mapping[str, Any], *, margin: float) -> int:
    """The exit status: 0, or 1 when a ratio fell by more than the margin against --baseline, or none is shared."""
    if args.baseline is None:
        return 0
    margin = margin if args.margin is None else args.margin
    old, new = dict(ratios(json.loads(args.baseline.read_text()))), dict(ratios(result))
    shared = [name for name in old if name in new]
    if not shared:
        print(f"no ratio is in both {args.baseline} and this run")
        return 1
    fallen = [name for name in shared if new[name] < old[name] * (1 - margin)]
    rows = [[name, old[name], new[name], new[name] / old[name], "FELL" if name in fallen else ""] for name in shared]
    print_table(f"Against {args.baseline}, margin {margin:.0%}", ["ratio", "then", "now", "now/then", ""], rows)
    for name in sorted(old.keys() - new.keys()):
        print(f"not measured this time: {name}")
    return 1 if fallen else 0


def ratios(result: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Every ratio of a result by its path; a spread counts as its median. Entries of lists go by their "label"."""
    if isinstance(result, Mapping):
        for key, value in result.items():
            if key == "ratios":
                for name, number in value.items():
                    yield f"{path}{name}", float(number["median"] if isinstance(number, Mapping) else number)
            else:
                yield from ratios(value, f"{path}{key}/")
    elif isinstance(result, list):
        for index, value in enumerate(result):
            label = value.get("label", index) if isinstance(value, Mapping) else index
            yield from ratios(value, f"{path}{label}/")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout, in the form that docs/log.md takes."""
    cells = [[_cell(value) for value in row] for row in (columns, *rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    print(f"\n{title}\n")
    for number, row in enumerate(cells):
        padded = (
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print(f"| {' | '.join(padded)} |")
        if number == 0:
            print(f"|{'|'.join('-' * (width + 1) + (':' if i else '-') for i, width in enumerate(widths))}|")
    print(flush=True)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except OSError:
        return "no git "
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
