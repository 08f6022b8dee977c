"""A worker process that does as its test says: `python scripted_worker.py PLAN FD`.

PLAN is what it does with a cycle: "silent" keeps it and says nothing, "slow" says N times that it makes progress, each
time a tenth of a second later, before it answers; "late" answers after as long without having said anything.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Connection

from treadle.domain.outcome import CycleOutcome
from treadle.domain.plan import CycleWork
from treadle.executor.fake import DEFAULT_FACTS
from treadle.executor.messages import CycleDone, Loaded, Progress, RunCycle, Stop

NUM_TENTHS = 15


def main(plan: str, connection: Connection) -> None:
    connection.recv()
    connection.send(Loaded(DEFAULT_FACTS))
    while not isinstance(message := connection.recv(), Stop):
        if isinstance(message, RunCycle) and plan != "silent":
            run(message.work, plan, connection)


def run(work: CycleWork, plan: str, connection: Connection) -> None:
    for _ in range(NUM_TENTHS):
        time.sleep(0.1)
        if plan == "slow":
            connection.send(Progress())
    connection.send(CycleDone(CycleOutcome(work.token, work.cycle, (), compute_s=0.0, num_forwards=0)))


if __name__ == "__main__":
    main(sys.argv[1], Connection(int(sys.argv[2])))
