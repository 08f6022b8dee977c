"""Runs flows.py with one SDK version after the other against one server, and compares what they could do and got.

    scripts/sdk_matrix                      # every version of the table, on a server of its own
    scripts/sdk_matrix 0.16.1 0.36.0        # these
    scripts/sdk_matrix --url URL            # against a server that runs already (in open mode)
    scripts/sdk_matrix --write              # also writes docs/sdk-matrix.md and benchmarks/results/sdk_matrix.json

Exit status: 0 when every version that must pass did, and all of them got the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from environments import ROOT, python_of

HERE = Path(__file__).resolve().parent
TABLE = ROOT / "docs" / "sdk-matrix.md"
RESULTS = ROOT / "benchmarks" / "results" / "sdk_matrix.json"
MODEL = "treadle/tiny"
# Versions that must pass, and those that do as long as nothing stands in the way.
REQUIRED = ("0.16.1", "0.24.1", "0.25.0", "0.36.0")
OTHERS = ("0.6.1", "0.14.0", "0.18.2", "0.30.0")
# The SDK of .venv, which the others are compared with.
CURRENT = "current"
# Twinkle's cookbook pins this one.
TWINKLE_VERSION = "0.16.1"
FLOW_S = 540
READY_S = 120
_PAGE = """# Older SDKs

Written by `scripts/sdk_matrix --write`; do not edit. Each column is one version of the `tinker` SDK, in an environment
of its own, running `scripts/sdks/flows.py` against a server with the bundled model. A check passes only when it has
read back what it did. "-": this version has no such method.

{table}

{same} Compared were: {numbers}.

The last rows are the scripts of Twinkle's cookbook in a shortened form (`scripts/sdks/twinkle_flows.py`), under the
version that it pins. Its DPO script leaves the preference loss to the server (`ref_logps` among the inputs of
importance_sampling, and `dpo_beta`); treadle refuses that by name, and the flow computes the same loss with
forward_backward_custom.
"""
MARKS = {"ok": "yes", "absent": "-", "failed": "**no**"}


class Failed(Exception):
    """A version could not be run at all."""


def run_version(
    version: str, url: str, *, sets: Sequence[str] = ("flows",), key: str | None = None
) -> list[dict[str, Any]]:
    """What one version could do: what run.py prints for each set. Raises Failed."""
    python = Path(sys.executable) if version == CURRENT else python_of(version)
    key = key or f"tml-matrix-{uuid.uuid4().hex}"
    command = [str(python), str(HERE / "run.py"), url, key, MODEL, *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=FLOW_S)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != len(sets):
        raise Failed(f"{' '.join(sets)} under {version} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return [{**json.loads(line), "stderr": done.stderr} for line in lines]


def failures(result: Mapping[str, Any]) -> dict[str, str]:
    """The checks that failed, with their errors."""
    return {name: fact["error"] for name, fact in result["checks"].items() if fact["outcome"] == "failed"}


def differences(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every number that two versions got differently, in words."""
    found = []
    for name in sorted({name for result in results for name in result["numbers"]}):
        values: dict[str, list[str]] = {}
        for result in results:
            if name in result["numbers"]:
                values.setdefault(json.dumps(result["numbers"][name]), []).append(result["version"])
        if len(values) > 1:
            found.append(f"{name}: " + "; ".join(f"{', '.join(who)}: {value}" for value, who in values.items()))
    return found


@contextmanager
def own_server(port: int | None = None) -> Iterator[str]:
    """A server of this tree with the bundled model, for as long as it is needed. Gives its URL."""
    port = port or _free_port()
    with tempfile.TemporaryDirectory(prefix="sdk-matrix-") as data:
        process = subprocess.Popen(
            [sys.executable, "-m", "treadle.cli", "serve", "--port", str(port), "--data", data],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TREADLE_WORKER__SPARE": "false"},
        )
        try:
            assert process.stdout is not None
            ready = process.stdout.readline().strip()
            if not ready.startswith("treadle ready: "):
                raise Failed(f"the server did not start: {ready!r}")
            yield ready.removeprefix("treadle ready: ")
        finally:
            process.terminate()
            process.wait(timeout=READY_S)


def main() -> int:
    args = _arguments()
    versions = args.versions or [*sorted({*REQUIRED, *OTHERS}, key=_as_numbers), CURRENT]
    if args.url:
        results, errors = _run_all(versions, args.url)
    else:
        with own_server() as url:
            results, errors = _run_all(versions, url)
    found = differences([result for result, _ in results.values()])
    print("\n" + _table(results))
    for line in (*errors, *(f"different numbers: {line}" for line in found)):
        print(line)
    if args.write:
        _write(results, found)
    is_bad = any(failures(part) for version in versions if version in results for part in _parts(results[version]))
    return 1 if errors or found or is_bad else 0


def _run_all(
    versions: Sequence[str], url: str
) -> tuple[dict[str, tuple[dict[str, Any], dict[str, Any] | None]], list[str]]:
    """Results by version, Twinkle's flows beside the checks; and what kept a version from running."""
    results: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {}
    errors = []
    for version in versions:
        try:
            sets = ("flows", "twinkle") if version == TWINKLE_VERSION else ("flows",)
            result, twinkle = (*run_version(version, url, sets=sets), None)[:2]
        except (Failed, subprocess.SubprocessError) as error:
            errors.append(f"{version}: {error}")
            continue
        results[version] = (result, twinkle)
        bad = {name: error for part in _parts(results[version]) for name, error in failures(part).items()}
        print(f"{result['version']}: {len(result['checks']) - len(bad)} ok, {len(bad)} failed", flush=True)
        for name, error in bad.items():
            print(f"    {name}: {error}", flush=True)
    return results, errors


def _parts(results: tuple[dict[str, Any], dict[str, Any] | None]) -> list[dict[str, Any]]:
    return [part for part in results if part is not None]


def _table(results: Mapping[str, tuple[dict[str, Any], dict[str, Any] | None]]) -> str:
    shown = [result for result, _ in results.values()]
    lines = [
        "| check | " + " | ".join(result["version"] for result in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for name in shown[0]["checks"] if shown else ():
        marks = [MARKS[result["checks"][name]["outcome"]] for result in shown]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(marks) + " |")
    for name, fact in next((twinkle["checks"] for _, twinkle in results.values() if twinkle), {}).items():
        marks = [MARKS[fact["outcome"]] if twinkle else "" for _, twinkle in results.values()]
        lines.append(f"| Twinkle: {name.replace('_', ' ')} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def _write(results: Mapping[str, tuple[dict[str, Any], dict[str, Any] | None]], found: Sequence[str]) -> None:
    same = "All versions got the same numbers, bit for bit." if not found else "\n".join(["Different:", *found])
    numbers = sorted({name for result, _ in results.values() for name in result["numbers"]})
    TABLE.write_text(_PAGE.format(table=_table(results), same=same, numbers="; ".join(numbers)))
    plain = {
        version: [{key: part[key] for key in ("version", "checks", "numbers")} for part in _parts(parts)]
        for version, parts in results.items()
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(plain, indent=1) + "\n")
    print(f"wrote {TABLE.relative_to(ROOT)} and {RESULTS.relative_to(ROOT)}")


def _as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f'of the SDK, or "{CURRENT}" for that of .venv')
    parser.add_argument("--url", help="a running server instead of one of its own")
    parser.add_argument("--write", action="store_true", help="write the table and the results into the repository")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
