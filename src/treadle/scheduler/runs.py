"""The leader's book of runs: what the store says of each, and which state its worker holds.

Only the leader of a pool changes these fields of a run, so the book is never stale while the lease is held; what a
commit of unknown end may have changed is forgotten, and read again. It decides nothing: it says what a run needs
before its queued ops may run (nothing, a restore, a replay). Invariant: `tag` is a state that the worker of this moment
holds and of which every op is committed, or None.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import assert_never

from treadle.domain.ids import BlobKey, ModelId, RequestId, TenantId
from treadle.domain.limits import MAX_RUNS_READ_PER_CYCLE
from treadle.domain.ops import OpKind
from treadle.domain.outcome import OpOutcome
from treadle.domain.plan import RestoreItem, StateTag
from treadle.domain.records import FinishedCycle, ModelAdvance, ModelRecord, RequestRecord, SnapshotRecord
from treadle.domain.states import ModelState, RequestState
from treadle.store import Store

# What the store keeps of a run's snapshots: the payloads behind the older one make the newest one dispensable.
NUM_SNAPSHOTS = 2


@dataclass(slots=True)
class Debt:
    """What a restore of a run would have to do again: its ops behind the newest snapshot.

    seconds: of the worker, as measured when they ran. num_bytes: of their payloads. covered_*: the part that a
    snapshot on its way makes unnecessary.
    """

    seconds: float = 0.0
    num_bytes: int = 0
    covered_s: float = 0.0
    covered_bytes: int = 0

    def add(self, seconds: float, num_bytes: int) -> None:
        self.seconds += seconds
        self.num_bytes += num_bytes

    def cover(self) -> None:
        """A snapshot of the present state is on its way."""
        self.covered_s, self.covered_bytes = self.seconds, self.num_bytes

    def settle(self) -> None:
        """It was registered."""
        self.seconds = max(0.0, self.seconds - self.covered_s)
        self.num_bytes = max(0, self.num_bytes - self.covered_bytes)
        self.uncover()

    def uncover(self) -> None:
        """It came to nothing."""
        self.covered_s, self.covered_bytes = 0.0, 0

    def clear(self) -> None:
        """The state is in a snapshot."""
        self.seconds, self.num_bytes = 0.0, 0
        self.uncover()


@dataclass(slots=True)
class Run:
    """One run as the leader knows it.

    snapshots: newest first. tag None: the worker holds no state of it. log: the next ops to replay, as far as they
    were read. part: the pass of which some quanta ran in earlier cycles, and how many. refused_passes: seq_ids of
    failed forward_backward requests since the last step of which the worker knows nothing; the next step reports them.
    knows_refused: these were read from the store since the worker lost the state. has_open_gradient: an op since the
    last step may have left one.
    """

    record: ModelRecord
    snapshots: tuple[SnapshotRecord, ...] = ()
    tag: StateTag | None = None
    log: tuple[RequestRecord, ...] = ()
    knows_refused: bool = False
    part: tuple[RequestId, int] | None = None
    refused_passes: set[int] = field(default_factory=set)
    has_open_gradient: bool = False
    debt: Debt = field(default_factory=Debt)

    @property
    def position(self) -> int:
        """The newest seq_id in the state that the worker holds, or will hold once the newest snapshot is restored."""
        if self.tag is not None:
            return self.tag.applied_seq
        return self.snapshots[0].seq_id if self.snapshots else -1

    @property
    def is_without_state(self) -> bool:
        """It needs a restore before anything of it can run."""
        return self.tag is None and self.record.state is ModelState.READY

    @property
    def needs_replay(self) -> bool:
        """Committed ops are missing from the state at `position`."""
        return self.record.state is ModelState.READY and self.position < self.record.changed_seq

    @property
    def is_covered(self) -> bool:
        """A registered snapshot holds all that is committed."""
        return bool(self.snapshots) and self.snapshots[0].seq_id >= self.record.changed_seq

    @property
    def is_half_done(self) -> bool:
        """A pass of it has run in part, which a move would cost; one that is replayed is no loss."""
        return self.part is not None and not self.needs_replay

    def is_replayed(self, seq_id: int) -> bool:
        """An op with this number was committed before: when it runs, it runs again."""
        return seq_id < self.record.next_seq_id

    def num_quanta_done(self, request_id: RequestId) -> int:
        """Quanta of a pass that ran in earlier cycles."""
        return self.part[1] if self.part is not None and self.part[0] == request_id else 0

    def restore_item(self) -> RestoreItem:
        """How a worker rebuilds this run from its newest snapshot, under a new incarnation."""
        assert self.tag is None, "a state that is held needs no restore"
        assert self.snapshots, "nothing to restore from"
        record, snapshot = self.record, self.snapshots[0]
        return RestoreItem(
            model_id=record.model_id,
            lora=record.lora,
            blob_key=snapshot.blob_key,
            tag=StateTag(record.model_id, incarnation=record.incarnation + 1, applied_seq=snapshot.seq_id),
            with_optimizer=snapshot.with_optimizer,
        )

    def restored(self, tag: StateTag) -> None:
        """The worker holds the state of the newest snapshot, and nothing behind it."""
        self.tag = tag
        self.debt.clear()
        # A file may hold an open gradient; only the seed's state cannot.
        self.has_open_gradient = self.snapshots[0].blob_key is not None

    def take_state(self, outcome: OpOutcome, *, num_quanta_done: int) -> None:
        """One more op of it ended on the worker, as its outcome says; that is public, or was before."""
        if outcome.tag_after is None:
            self.drop_state()
        self.tag = outcome.tag_after
        self.part = (outcome.request_id, num_quanta_done) if outcome.is_partial else None
        if outcome.is_partial or outcome.failure is not None:
            return
        match outcome.kind:
            case OpKind.FORWARD_BACKWARD:
                self.has_open_gradient = True
            case OpKind.OPTIM_STEP:
                self.has_open_gradient = False
                self._forget_refused_before(outcome.seq_id)
            case OpKind.CREATE_MODEL | OpKind.LOAD_WEIGHTS:
                self.has_open_gradient = outcome.kind is OpKind.LOAD_WEIGHTS
                self._forget_refused_before(outcome.seq_id)
                self.debt.clear()
            case OpKind.SAVE_WEIGHTS:
                self.debt.clear()
            case OpKind.FORWARD | OpKind.SAVE_FOR_SAMPLER | OpKind.SAVE_EXTERNAL | OpKind.UNLOAD_MODEL:
                pass
            case OpKind.SAMPLE | OpKind.CREATE_CUSTOM_LOSS:
                raise AssertionError(f"{outcome.kind} is never part of a cycle")
            case _:
                assert_never(outcome.kind)

    def _forget_refused_before(self, seq_id: int) -> None:
        """They were told, or belonged to a gradient that is gone."""
        self.refused_passes = {refused for refused in self.refused_passes if refused > seq_id}

    def drop_state(self) -> None:
        """The worker holds nothing of it any more, or nothing that counts."""
        self.tag = None
        self.part = None
        self.log = ()
        self.knows_refused = False

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

    def apply(self, advance: ModelAdvance) -> None:
        """Take over what a committed cycle changed."""
        changes = {
            name: value
            for name in ("state", "incarnation", "changed_seq")
            if (value := getattr(advance, name)) is not None
        }
        self.record = replace(
            self.record, next_seq_id=advance.next_seq_id, state_message=advance.state_message, **changes
        )

    def register(self, snapshot: SnapshotRecord) -> None:
        """Take over a snapshot that was committed."""
        others = [known for known in self.snapshots if known.seq_id != snapshot.seq_id]
        newest = sorted([*others, snapshot], key=lambda known: known.seq_id, reverse=True)
        self.snapshots = tuple(newest[:NUM_SNAPSHOTS])


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
            is_fresh = record.state is not ModelState.READY
            snapshots = () if is_fresh else tuple(await self._store.snapshots.newest(model_id))
            run = self._runs[model_id] = Run(record, snapshots)
        return run

    async def of(self, model_ids: Collection[ModelId]) -> dict[ModelId, Run]:
        """These runs, by id: all that are known, and the first MAX_RUNS_READ_PER_CYCLE of the others."""
        unknown = (model_id for model_id in model_ids if model_id not in self._runs)
        await asyncio.gather(*(self.get(model_id) for model_id in islice(unknown, MAX_RUNS_READ_PER_CYCLE)))
        return {model_id: self._runs[model_id] for model_id in model_ids if model_id in self._runs}

    def known(self, model_id: ModelId) -> Run | None:
        """The run, if it was read before."""
        return self._runs.get(model_id)

    def resident(self) -> list[Run]:
        """Runs that the worker holds."""
        return [run for run in self._runs.values() if run.tag is not None]

    def of_tenant(self, tenant_id: TenantId) -> list[Run]:
        """All that are known of this tenant."""
        return [run for run in self._runs.values() if run.record.tenant_id == tenant_id]

    def tenants(self) -> set[TenantId]:
        """Whose runs are known."""
        return {run.record.tenant_id for run in self._runs.values()}

    def take_over(self, finished: FinishedCycle) -> None:
        """A cycle was committed."""
        for advance in finished.advances:
            if (run := self._runs.get(advance.model_id)) is not None:
                run.apply(advance)
        for snapshot in finished.snapshots:
            if (run := self._runs.get(snapshot.model_id)) is not None:
                run.register(snapshot)

    def forget(self, model_ids: Iterable[ModelId]) -> None:
        """Read these runs again when they are next needed; the worker holds nothing of them that counts."""
        for model_id in model_ids:
            self._runs.pop(model_id, None)


def is_over(state: ModelState) -> bool:
    """True when no op of the run can ever run again."""
    return state in (ModelState.FAILED, ModelState.LOST, ModelState.UNLOADED)


def snapshot_key(model_id: ModelId, name: str) -> BlobKey:
    """Where a snapshot called `name` lies. Colons of the id are kept out of file names."""
    return BlobKey(f"snapshots/{model_id.replace(':', '_')}/{name}.safetensors")
