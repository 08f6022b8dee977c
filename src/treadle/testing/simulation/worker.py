"""A worker: which state of which runs it holds, and what planned ops do to them. It knows no rows' fate and no clock.

Invariant: a state is a chain of whole ops in seq order since a snapshot, none of them twice (R1, R2 of the log).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.ops import OpKind
from treadle.domain.outcome import OpOutcome
from treadle.domain.plan import FIRST_INCARNATION, PlannedOp, RestoreItem, StateTag
from treadle.domain.records import RequestRecord
from treadle.scheduler.outcomes import REPLAYED_KINDS
from treadle.testing.simulation.rows import SEED_DIGEST, Blobs, digest_after


@dataclass(slots=True)
class Held:
    """One run's state on a worker. open_part: the pass that is partly done, and how many quanta of it are."""

    tag: StateTag
    digest: int
    open_part: tuple[RequestId, int] | None = None


class SimWorker:
    """Applies planned ops; asserts that each starts from the state it must start from."""

    def __init__(self, blobs: Blobs) -> None:
        self.held: dict[ModelId, Held] = {}
        self._blobs = blobs

    def restore(self, item: RestoreItem) -> None:
        """Drop what is there and start from the snapshot."""
        old = self.held.get(item.model_id)
        assert old is None or old.tag.incarnation < item.tag.incarnation, f"{item.model_id} is rebuilt under an old tag"
        self.held[item.model_id] = Held(item.tag, self._blobs.read(item.blob_key))

    def drop_all(self) -> None:
        """A worker that died, or was fenced by a leader that knows nothing of its states."""
        self.held.clear()

    def apply(self, planned: PlannedOp, record: RequestRecord) -> OpOutcome:
        """Run one planned op, or some quanta of it."""
        model_id = planned.model_id
        if record.kind is OpKind.CREATE_MODEL:
            assert model_id not in self.held, f"{model_id} is created on top of a state"
            tag = StateTag(model_id, incarnation=FIRST_INCARNATION, applied_seq=planned.seq_id)
            self.held[model_id] = Held(tag, SEED_DIGEST)
            return _outcome(planned, tag, is_partial=False)
        held = self.held.get(model_id)
        assert held is not None, f"{record.request_id} starts from a state that is not there"
        assert planned.seq_id > held.tag.applied_seq, f"{record.request_id} is applied twice or out of order"
        if record.quantum_tokens and not self._take_quanta(held, planned, record.quantum_tokens):
            return _outcome(planned, held.tag, is_partial=True)
        assert held.open_part is None, f"{record.request_id} runs between the parts of a pass"
        held.tag = StateTag(model_id, held.tag.incarnation, planned.seq_id)
        if record.kind in REPLAYED_KINDS:
            held.digest = digest_after(held.digest, record)
        return _outcome(planned, held.tag, is_partial=False)

    def _take_quanta(self, held: Held, planned: PlannedOp, quanta: Sequence[int]) -> bool:
        """Run a pass's planned quanta behind those that it has run; whether it is whole now."""
        request_id, done = held.open_part or (planned.request_id, 0)
        assert request_id == planned.request_id, f"{planned.request_id} runs between two parts of {request_id}"
        assert planned.quantum_start == done, f"{planned.request_id} goes on at {planned.quantum_start}, not {done}"
        is_whole = planned.quantum_stop == len(quanta)
        assert is_whole == planned.is_last_part
        held.open_part = None if is_whole else (planned.request_id, planned.quantum_stop)
        return is_whole


def _outcome(planned: PlannedOp, tag: StateTag, *, is_partial: bool) -> OpOutcome:
    return OpOutcome(
        planned.request_id,
        planned.model_id,
        planned.seq_id,
        planned.kind,
        is_partial=is_partial,
        tag_after=tag,
        num_tokens=planned.num_tokens,
    )
