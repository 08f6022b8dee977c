"""What the database would hold: requests, and per run its line, its log and its registered snapshots; and the blobs.

No costs, no workers, no clients. Invariant: `digest` is the state that an undisturbed run would have after its
committed ops, so whoever holds another one has lost or doubled something.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from treadle.domain.ids import BlobKey, ModelId, PoolName, SessionId, TenantId
from treadle.domain.ops import LoraSpec
from treadle.domain.records import ModelRecord, RequestRecord, SnapshotRecord
from treadle.domain.states import ModelState
from treadle.scheduler.outcomes import REPLAYED_KINDS
from treadle.scheduler.runs import NUM_SNAPSHOTS

POOL = PoolName("simulated/base")
# Of the state that a run's seed makes, before any op.
SEED_DIGEST = 0


@dataclass(slots=True)
class Row:
    """A request. created_cycle: how many cycles its worker had run then. begun_s: when its first part was sent."""

    row_id: int
    record: RequestRecord
    run: RunRow
    created_cycle: int
    begun_s: float | None = None
    finished_s: float | None = None


@dataclass(slots=True)
class RunRow:
    """A run as it is committed. line: queued rows; log: DONE passes and steps that a replay may need; both by seq_id.

    snapshots: newest first. on_finished: the client, told of each of its requests when its outcome is committed.
    """

    model_id: ModelId
    tenant_id: TenantId
    on_finished: Callable[[Row], None]
    next_seq_id: int = 0
    num_submitted: int = 0
    digest: int = SEED_DIGEST
    changed_seq: int = 0
    incarnation: int = 0
    line: deque[Row] = field(default_factory=deque)
    log: deque[Row] = field(default_factory=deque)
    snapshots: tuple[SnapshotRecord, ...] = ()

    def record(self) -> ModelRecord:
        """As a leader reads it."""
        return ModelRecord(
            model_id=self.model_id,
            session_id=SessionId("simulated"),
            tenant_id=self.tenant_id,
            pool=POOL,
            base_model=POOL,
            revision="",
            lora=LoraSpec(rank=8, seed=0),
            state=ModelState.READY if self.next_seq_id else ModelState.CREATING,
            next_seq_id=self.next_seq_id,
            created_at=0.0,
            last_request_at=0.0,
            incarnation=self.incarnation,
            changed_seq=self.changed_seq,
        )

    def row(self, seq_id: int) -> Row:
        """The request with this number, which is queued or in the log."""
        if seq_id >= self.next_seq_id:
            return self.line[seq_id - self.next_seq_id]
        return next(row for row in reversed(self.log) if row.record.seq_id == seq_id)

    def commit(self, row: Row) -> None:
        """The outcome of the first op in line becomes true, once."""
        record = row.record
        assert self.line, f"{record.request_id} is committed twice"
        assert self.line[0] is row, f"{record.request_id} is committed before {self.line[0].record.request_id}"
        assert row.finished_s is None
        assert record.seq_id == self.next_seq_id, f"{record.request_id} is not the next of its run"
        self.line.popleft()
        self.next_seq_id = record.seq_id + 1
        if record.kind in REPLAYED_KINDS:
            self.digest = digest_after(self.digest, record)
            self.changed_seq = record.seq_id
            self.log.append(row)

    def register(self, snapshot: SnapshotRecord) -> None:
        """R3: only what is committed may be registered. Payloads up to the older of the two that stay go."""
        assert snapshot.seq_id < self.next_seq_id, f"{self.model_id}: a snapshot of what is not committed"
        newest = sorted({snapshot, *self.snapshots}, key=lambda known: known.seq_id, reverse=True)
        self.snapshots = tuple(newest[:NUM_SNAPSHOTS])
        if len(self.snapshots) == NUM_SNAPSHOTS:
            while self.log and self.log[0].record.seq_id <= self.snapshots[-1].seq_id:
                self.log.popleft()


@dataclass(slots=True)
class Blobs:
    """What was written, by key: the digest of a state. Keys are never reused."""

    _digests: dict[BlobKey, int] = field(default_factory=dict)

    def write(self, digest: int) -> BlobKey:
        key = BlobKey(f"snapshots/{len(self._digests)}")
        self._digests[key] = digest
        return key

    def read(self, key: BlobKey | None) -> int:
        """None: the state that the seed makes."""
        return SEED_DIGEST if key is None else self._digests[key]


def digest_after(digest: int, record: RequestRecord) -> int:
    """The state that a request makes of a state: different for every history."""
    return zlib.crc32(f"{record.seq_id} {record.kind} {record.num_tokens}".encode(), digest)
