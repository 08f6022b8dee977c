"""What snapshots cost: training throughput with and without them, in turn, on two servers side by side.

    python scripts/bench/snapshots.py [--save] [--blocks 6] [--steps 40]

Both servers hold eight runs of the 1M model (4 x 128 tokens per step, rank 8) under the official SDK. One takes
snapshots as it always does; the other was told never to, for which there is no setting. Blocks of steps run on one and
then on the other, so that the machine's mood meets both; a ratio is formed within a pair of blocks, from tokens per
CPU-second of all of a server's processes. The outstanding replay is the server's own metric, read twice a second: the
worker's seconds to replay the run that has the most. Losses must be equal bit for bit on both sides, or all is void.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
from models import make_model
from service import SERVE, Service, Shape, Trainer

NUM_CLIENTS = 8
GOAL_COST = 0.03
MARGIN = 0.03
DEBT, SNAPSHOTS, SECONDS = (
    "treadle_replay_debt_seconds",
    "treadle_snapshots_total",
    "treadle_snapshot_seconds_sum",
)
_NEVER = (
    "import sys; from treadle.scheduler.snapshots import SnapshotBudget as budget; "
    "budget.allows = budget.is_forced = lambda *_: False; "
    "from treadle.cli import main; sys.exit(main())"
)
WITHOUT = (sys.executable, "-c", _NEVER)


class Side:
    """One server and its eight runs, which train only inside `block`."""

    def __init__(self, name: str, service: Service, num_steps: int) -> None:
        service.start()
        self.name = name
        self.service = service
        self._shape = Shape()
        self._num_steps = num_steps
        self.trainers = [Trainer(index, service.url, self._shape) for index in range(NUM_CLIENTS)]
        self.debts: list[float] = []

    def block(self) -> float:
        """So many steps of every client at once; trained tokens per CPU-second."""
        is_over = threading.Event()
        watching = threading.Thread(target=self._watch, args=(is_over,))
        cpu_s = self.service.cpu_s()
        watching.start()
        with ThreadPoolExecutor(NUM_CLIENTS) as threads:
            list(threads.map(self._train, self.trainers))
        cpu_s = self.service.cpu_s() - cpu_s
        is_over.set()
        watching.join()
        return NUM_CLIENTS * self._num_steps * self._shape.num_tokens / cpu_s

    def _train(self, trainer: Trainer) -> None:
        for _ in range(self._num_steps):
            trainer.step()

    def _watch(self, is_over: threading.Event) -> None:
        while not is_over.wait(0.5):
            self.debts.append(self.service.metric(DEBT))


def measure(sides: Sequence[Side], num_blocks: int) -> dict[str, Any]:
    """Blocks in turn, the order changing from pair to pair; the first pair warms up."""
    blocks: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(num_blocks + 1):
        for side in sides if number % 2 else reversed(sides):
            blocks[side.name].append(side.block())
    losses = [[trainer.losses for trainer in side.trainers] for side in sides]
    assert losses[0] == losses[1], "snapshots changed a number: the figures are void"
    taking, other = sides
    assert other.service.metric(SNAPSHOTS) == 0, "the side without snapshots took some"
    pairs = list(zip(blocks[taking.name][1:], blocks[other.name][1:], strict=True))
    return {
        "config": asdict(Shape()) | {"clients": NUM_CLIENTS, "blocks": num_blocks},
        "tokens_per_cpu_s": {name: report.spread(values[1:]) for name, values in blocks.items()},
        "ratios": {"with_over_without": report.spread([one / another for one, another in pairs])},
        "snapshots": taking.service.metric(SNAPSHOTS),
        "snapshot_device_s": taking.service.metric(SECONDS),
        "outstanding_replay_s": {"median": statistics.median(taking.debts), "max": max(taking.debts)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6, help="pairs of blocks that are timed, behind one that is not")
    parser.add_argument("--steps", type=int, default=40, help="of every client in a block")
    parser.add_argument("--size", choices=["tiny", "1m", "27m"], default="1m")
    report.add_arguments(parser)
    args = parser.parse_args()
    result: dict[str, Any] = report.context()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder), args.size)
        services = {
            name: Service(model, Path(folder) / name, command=command)
            for name, command in (("with", SERVE), ("without", WITHOUT))
        }
        try:
            result |= measure([Side(name, service, args.steps) for name, service in services.items()], args.blocks)
        finally:
            for service in services.values():
                service.kill()
    show(result)
    report.write(report.path_of(args, "snapshots"), result)
    return report.compare(args, result, margin=MARGIN)


def show(result: dict[str, Any]) -> None:
    """The table."""
    ratio = result["ratios"]["with_over_without"]
    rates = result["tokens_per_cpu_s"]
    rows = [[name, *(rates[name][part] for part in ("median", "min", "max"))] for name in rates]
    rows.append(["with over without", *(ratio[part] for part in ("median", "min", "max"))])
    report.print_table("Trained tokens per CPU-second, eight clients", ["snapshots", "median", "min", "max"], rows)
    debt = result["outstanding_replay_s"]
    print(f"cost {1 - ratio['median']:.1%} (goal under {GOAL_COST:.0%}); load {result['load_average_at_start']}")
    print(f"{result['snapshots']:.0f} snapshots, {result['snapshot_device_s']:.2f} s of the device")
    print(f"outstanding replay: median {debt['median']:.2f} s, at most {debt['max']:.2f} s")


if __name__ == "__main__":
    raise SystemExit(main())
