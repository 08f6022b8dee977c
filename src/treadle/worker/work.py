"""What a worker is handed: the scheduler's plan with every payload decoded."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.domain.ids import ModelId, RequestId, TenantId
from treadle.domain.ops import SampleOp, TrainingOp
from treadle.domain.outcome import Failure
from treadle.domain.plan import RestoreItem, WorkItem


@dataclass(frozen=True, slots=True)
class DecodedItem:
    """A work item and its op, or why its payload could not be read."""

    item: WorkItem
    op: TrainingOp | Failure


@dataclass(frozen=True, slots=True)
class DecodedCycle:
    token: int
    cycle: int
    items: tuple[DecodedItem, ...]
    restores: tuple[RestoreItem, ...] = ()

    @property
    def model_ids(self) -> frozenset[ModelId]:
        """All runs named in it."""
        return frozenset(
            [item.item.planned.model_id for item in self.items] + [restore.model_id for restore in self.restores]
        )


@dataclass(frozen=True, slots=True)
class DecodedSample:
    request_id: RequestId
    tenant_id: TenantId
    op: SampleOp
