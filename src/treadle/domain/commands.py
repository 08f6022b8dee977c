"""What operators ask the leader of a pool to do with one run, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from treadle.domain.ids import ModelId, PoolName


class CommandKind(StrEnum):
    """SNAPSHOT: register a snapshot of the committed state. EVICT: that, and the worker forgets the run."""

    SNAPSHOT = "snapshot"
    EVICT = "evict"


@dataclass(frozen=True, slots=True)
class CommandOutcome:
    """How a command ended, in words for the operator."""

    is_done: bool
    message: str


@dataclass(frozen=True, slots=True)
class OperatorCommand:
    """One command. outcome None: no leader has carried it out yet. done_at: when one had."""

    command_id: int
    pool: PoolName
    kind: CommandKind
    model_id: ModelId
    created_by: str
    created_at: float
    done_at: float | None = None
    outcome: CommandOutcome | None = None
