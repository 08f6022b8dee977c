"""Saves for which there is no room are refused before they run, so that nobody can fill a disk with them.

It judges by what is kept now and what this cycle adds; sizes are only known afterwards. What is exact is decided by the
commit (store/quotas.py). Invariant: whoever is at a limit writes nothing more under a new name.
"""

from __future__ import annotations

from treadle.domain.ids import TenantId, TinkerPath
from treadle.domain.ops import SaveExternalOp, SaveForSamplerOp, SaveWeightsOp, TrainingOp
from treadle.domain.outcome import Failure
from treadle.domain.policy import Policies
from treadle.domain.records import ModelRecord
from treadle.domain.states import Category
from treadle.scheduler.finishing import kind_of_save
from treadle.store import Store
from treadle.store.quotas import Saved, SaveLimits


class SaveGate:
    """Judges the saves of one cycle, in their order."""

    def __init__(self, store: Store, policies: Policies) -> None:
        self._store = store
        self._policies = policies
        self._saved: dict[TenantId, Saved] = {}

    async def refusal(self, run: ModelRecord, op: TrainingOp) -> Failure | None:
        """Why this named save may not run, if it may not; what has no name is not kept for long, and counts nothing."""
        if not isinstance(op, SaveWeightsOp | SaveForSamplerOp | SaveExternalOp) or op.name is None:
            return None
        limits = SaveLimits.of(self._policies, run.tenant_id)
        if limits is None:
            return None
        path = str(TinkerPath(run.model_id, kind_of_save(op), op.name))
        if await self._store.checkpoints.exists(path):
            return None
        before = self._saved.get(run.tenant_id) or await self._store.quotas.saved(run.tenant_id)
        # At least a byte: nothing fits any more where all are taken.
        after = Saved(before.num + 1, before.num_bytes + 1)
        if (reason := limits.refusal(before, after)) is not None:
            return Failure(reason, Category.USER)
        self._saved[run.tenant_id] = after
        return None
