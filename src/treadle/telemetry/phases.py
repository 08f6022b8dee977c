"""The named moments of a request's life at which a process may be killed, as debug events that a test can wait for.

    phase(Phase.CYCLE_BEGUN, pool=pool, cycle=cycle)

A kill campaign reads these lines and kills right behind one; nothing else depends on them.
Invariant: what a phase's name says is true, in this process, when its line is written.
"""

from __future__ import annotations

from enum import StrEnum

from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

EVENT = "phase"


class Phase(StrEnum):
    """In the order of one request's life, then what happens beside it."""

    # Gateway: the row is committed, the client has its answer or is about to get it.
    QUEUED = "queued"
    # Scheduler: the cycle is booked as in flight, the worker has not been told.
    CYCLE_BEGUN = "cycle begun"
    # Worker: a micro-batch of a pass is done, others of the cycle are left.
    MID_PASS = "mid pass"
    # Worker: due steps were taken, the cycle's outcome is not sent.
    STEPPED = "stepped"
    # Scheduler: the outcome is here and not committed.
    OUTCOME_RECEIVED = "outcome received"
    # Worker: a blob is about to be written.
    SNAPSHOT = "snapshot"
    SAVE = "save"
    SAVE_FOR_SAMPLER = "save for sampler"
    SAVE_EXTERNAL = "save external"
    # Worker: a version that its save was answered for from memory is about to be written durably.
    WRITE_BEHIND = "write behind"
    LOAD = "load"
    # Worker: a run's state was read back, the ops behind it are to come.
    RESTORED = "restored"
    # Scheduler: an op that was committed before runs again.
    REPLAYED = "replayed"
    # Worker: a unit of sampling is done, sequences are open.
    SAMPLING = "sampling"


def phase(name: Phase, **fields: object) -> None:
    """Say that this moment has come."""
    log.debug(EVENT, phase=name.value, **fields)
