"""The leader's book of runs: what the store says of each, and which state its worker holds.

Only the leader of a pool changes these fields of a run, so the book is never stale while the lease is held.
It decides what a run needs before its ops may run: nothing, a restore, or the admission that its state is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from treadle.domain.ids import BlobKey, CheckpointKind, ModelId
from treadle.domain.ops import OpKind
from treadle.domain.plan import RestoreItem, StateTag
from treadle.domain.records import ModelAdvance, ModelRecord, RequestRecord
from treadle.domain.states import ModelState, RequestState
from treadle.store import Store


@dataclass(slots=True)
class Run:
    """One run as the leader knows it.

    tag None: the worker holds no state of it. refused_passes: seq_ids of forward_backward requests that admission
    refused since the last step, for the count that the next step reports.
    """

    record: ModelRecord
    tag: StateTag | None = None
    refused_passes: set[int] = field(default_factory=set)

    @property
    def can_restore(self) -> bool:
        """True when the registered snapshot (or the seed of an untouched run) is exactly the committed state."""
        return self.record.snapshot_seq >= self.record.changed_seq

    def restore_item(self) -> RestoreItem:
        """How a worker rebuilds this run, under a new incarnation."""
        assert self.can_restore
        assert self.tag is None
        record = self.record
        tag = StateTag(record.model_id, incarnation=record.incarnation + 1, applied_seq=record.next_seq_id - 1)
        return RestoreItem(model_id=record.model_id, lora=record.lora, blob_key=record.snapshot_key, tag=tag)

    def snapshot_taken(self, key: BlobKey) -> ModelAdvance:
        """The commit that registers `key` as holding exactly the committed state."""
        next_seq_id = self.record.next_seq_id
        return ModelAdvance(self.record.model_id, next_seq_id, snapshot_key=key, snapshot_seq=next_seq_id - 1)

    def apply(self, advance: ModelAdvance) -> None:
        """Take over what a committed cycle changed."""
        changes = {
            name: value
            for name in ("state", "incarnation", "changed_seq", "snapshot_key", "snapshot_seq")
            if (value := getattr(advance, name)) is not None
        }
        self.record = replace(
            self.record, next_seq_id=advance.next_seq_id, state_message=advance.state_message, **changes
        )

    def note_refused(self, rows: Sequence[RequestRecord]) -> None:
        """Remember the passes among these rows that admission refused."""
        self.refused_passes.update(
            row.seq_id for row in rows if row.state is RequestState.FAILED and row.kind is OpKind.FORWARD_BACKWARD
        )

    def newest_to_step_over(self, rows: Sequence[RequestRecord]) -> int | None:
        """The last of the refused numbers at the front of the line: nothing has to run before they are consumed."""
        next_seq_id = self.record.next_seq_id
        for row in rows:
            if row.state is RequestState.QUEUED or row.seq_id != next_seq_id:
                break
            next_seq_id += 1
        return None if next_seq_id == self.record.next_seq_id else next_seq_id - 1

    def num_refused_before(self, seq_id: int) -> int:
        """Refused passes that a step with this seq_id leaves behind."""
        return sum(refused < seq_id for refused in self.refused_passes)

    def stepped(self, seq_id: int) -> None:
        """A step was taken: what was refused before it is told."""
        self.refused_passes = {refused for refused in self.refused_passes if refused > seq_id}


class RunBook:
    """Runs of one pool by id, read from the store on first use."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._runs: dict[ModelId, Run] = {}

    async def get(self, model_id: ModelId) -> Run:
        """The run; it exists, because its row is written before any of its requests."""
        run = self._runs.get(model_id)
        if run is None:
            record = await self._store.models.get(model_id)
            assert record is not None, f"a request names the run {model_id}, which has no row"
            run = self._runs[model_id] = Run(record)
        return run

    def resident(self) -> list[Run]:
        """Runs that the worker holds."""
        return [run for run in self._runs.values() if run.tag is not None]

    def forget_over(self, model_ids: Iterable[ModelId]) -> None:
        """Drop those of these runs that are over; should an op of one still come, the store knows."""
        for model_id in model_ids:
            run = self._runs.get(model_id)
            if run is not None and is_over(run.record.state):
                assert run.tag is None, f"the worker still holds {model_id}, which is over"
                del self._runs[model_id]

    async def loss_message(self, run: Run, *, why: str = "was lost when its worker ended") -> str:
        """What a client is told when its run's state is gone: the newest checkpoint, if there is one."""
        model_id = run.record.model_id
        newest = await self._store.checkpoints.newest(model_id, CheckpointKind.TRAINING)
        hint = (
            f"its newest checkpoint is {newest.tinker_path}: create a new training client from it"
            if newest is not None
            else "it has no checkpoint"
        )
        return f"the training state of run {model_id} {why}; {hint}"


def is_over(state: ModelState) -> bool:
    """True when no op of the run can ever run again."""
    return state in (ModelState.FAILED, ModelState.LOST, ModelState.UNLOADED)
