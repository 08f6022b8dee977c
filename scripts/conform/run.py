"""Run every public method and command of the SDK against a fresh server, and write the table.

    scripts/conformance              runs, prints, writes docs/conformance.md
    scripts/conformance --check      changes nothing, exits 1 when a row is worse than the committed table says
    scripts/conformance --only rest  rows whose name contains the text

A row passes when its check read an effect back. Missing are methods that nobody wrote a check for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import tinker

from conform import registry, surface
from conform.world import World
from treadle import __version__
from treadle.demo.own_server import OwnServer

# Deprecated forms are checked like the others.
warnings.filterwarnings("ignore", category=FutureWarning)

for _module in ("checks_training", "checks_sampling", "checks_rest", "checks_cli"):
    importlib.import_module(f"conform.{_module}")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "conformance.md"
DATA = ROOT / "docs" / "conformance.json"
PASS, REFUSED, FAIL, MISSING = "pass", "refused", "fail", "missing"


@dataclass(frozen=True)
class Row:
    """One method or command. evidence: what was read back, the reason of a refusal, or the error."""

    name: str
    verdict: str
    evidence: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    names = [name for name in [*surface.methods(), *surface.commands()] if args.only.lower() in name.lower()]
    if gone := registry.unknown_names([*surface.methods(), *surface.commands()]):
        print(f"checks of what this SDK does not have: {', '.join(gone)}", file=sys.stderr)
    rows = _run(names)
    worse = _worse(rows)
    if not (args.check or args.only):
        DATA.write_text(json.dumps({"sdk": tinker.__version__, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        PAGE.write_text(_page(rows))
    for line in worse:
        print(line, file=sys.stderr)
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in (PASS, REFUSED, FAIL, MISSING)}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if worse or (args.check and counts[FAIL] + counts[MISSING]) else 0


def _run(names: list[str]) -> list[Row]:
    server = OwnServer("treadle/tiny")
    try:
        url = server.wait_until_ready()
        with tempfile.TemporaryDirectory(prefix="treadle-conformance-") as folder:
            world = World(url, Path(folder))
            return [_row(world, name) for name in names]
    finally:
        server.stop()


def _row(world: World, name: str) -> Row:
    check = registry.check_of(name)
    if check is None:
        row = Row(name, MISSING, "no check")
    elif isinstance(check, registry.Refused):
        row = Row(name, REFUSED, check.reason)
    else:
        row = _checked(world, name, check)
    return row


def _checked(world: World, name: str, check: registry.CommandCheck) -> Row:
    began = time.monotonic()
    try:
        row = Row(name, PASS, check(world))
    except Exception as error:
        text = " ".join(str(error).split())[:300] or traceback.format_exc(limit=-1).splitlines()[-2].strip()
        row = Row(name, FAIL, f"{type(error).__name__}: {text}")
    print(f"{row.verdict:7} {time.monotonic() - began:5.1f} s  {name}: {row.evidence}", flush=True)
    return row


def _worse(rows: list[Row]) -> list[str]:
    """Rows that passed, or were refused, in the committed table, and do not now."""
    if not DATA.exists():
        return []
    before = {row["name"]: row["verdict"] for row in json.loads(DATA.read_text())["rows"]}
    good = (PASS, REFUSED)
    return [
        f"worse than committed: {row.name}: {before[row.name]} -> {row.verdict}: {row.evidence}"
        for row in rows
        if before.get(row.name) in good and row.verdict not in good
    ]


def _page(rows: list[Row]) -> str:
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in (PASS, REFUSED, FAIL, MISSING)}
    lines = [
        "<!-- Made by scripts/conformance. Do not edit. -->",
        "# Conformance",
        "",
        f"treadle {__version__} against the official SDK, tinker {tinker.__version__}. Every public method of its five "
        "clients and every command of its command line, found by introspection and run against a fresh server with the "
        "bundled model. A row passes when its check read an effect back, which the last column names.",
        "",
        f"**{counts[PASS]} pass, {counts[REFUSED]} refused with a reason, {counts[FAIL]} fail, "
        f"{counts[MISSING]} missing.**",
        "",
        "| method or command | verdict | read back |",
        "|---|---|---|",
        *(f"| `{row.name}` | {row.verdict} | {_cell(row.evidence)} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    raise SystemExit(main())
