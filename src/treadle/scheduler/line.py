"""One model's queue while a cycle is planned: a cursor that knows which op may come next.

It enforces every rule that concerns a model alone: seq order, holes, phases, whole quanta. It knows no tenant,
no budget and no fairness; those are policy.py's.
Invariant: the ops taken are consecutive from next_seq_id on, except for seq ids that are settled or that `missing`
lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Final

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.limits import MAX_GAP_IDS_PER_CYCLE, MAX_HEADS_PER_MODEL
from treadle.domain.ops import OpKind, Phase, phase_of
from treadle.domain.plan import Gap, ModelQueue, PlannedOp, QueuedOp

_OUTSIDE_CYCLES: Final = frozenset({OpKind.SAMPLE, OpKind.CREATE_CUSTOM_LOSS})
PHASE_INDEX: Final[Mapping[OpKind, int]] = {
    kind: tuple(Phase).index(phase_of(kind)) for kind in OpKind if kind not in _OUTSIDE_CYCLES
}
_PASS: Final = tuple(Phase).index(Phase.PASS)
_STEP: Final = tuple(Phase).index(Phase.STEP)
# An op of these kinds, queued for long behind a hole, proves that the missing ids are not merely late.
_ENDS_THE_WAIT: Final = frozenset(kind for kind, phase in PHASE_INDEX.items() if phase != _PASS)
# create_model has seq 0 and the SDK's first op seq 1; a load behind those replaces a state that ops have shaped.
_LAST_SEQ_OF_A_NEW_RUN: Final = 1


class Line:
    """A cursor over one model's queued ops. `head` is the next op that may run in this cycle, or None."""

    __slots__ = (
        "_expected",
        "_gap_wait_s",
        "_index",
        "_phase",
        "_quanta_done",
        "_quarantined",
        "head",
        "missing",
        "planned",
        "queue",
    )

    def __init__(self, queue: ModelQueue, *, gap_wait_s: float, quarantined: frozenset[RequestId]) -> None:
        self.queue = queue
        self.planned: list[PlannedOp] = []
        self.missing: list[int] = []
        self._gap_wait_s = gap_wait_s
        self._quarantined = quarantined
        self._expected = queue.next_seq_id
        self._index = 0
        self._phase = 0
        self._quanta_done = queue.ops[0].num_quanta_done if queue.ops else 0
        self.head = self._find_head()

    @property
    def model_id(self) -> ModelId:
        return self.queue.model_id

    @property
    def gap(self) -> Gap | None:
        """The seq ids that this cycle gives up."""
        return Gap(self.model_id, tuple(self.missing)) if self.missing else None

    @property
    def has_free_head(self) -> bool:
        """The head costs no tokens."""
        return self.head is not None and not self.head.quantum_tokens

    @property
    def next_quantum_tokens(self) -> int | None:
        """Tokens of the quantum that `take_quantum` would take; None when the head is not a pass."""
        if self.head is None or not self.head.quantum_tokens:
            return None
        return self.head.quantum_tokens[self._quanta_done]

    def is_extension(self) -> bool:
        """The next quantum belongs to an op that is in the plan already."""
        return bool(self.planned) and self.head is not None and self.planned[-1].seq_id == self.head.seq_id

    def take_free(self) -> None:
        """Plan the head, an op without tokens."""
        op = self.head
        assert op is not None, "nothing may run"
        assert not op.quantum_tokens, f"{op.request_id} costs tokens"
        self.planned.append(PlannedOp(op.request_id, self.model_id, op.seq_id, op.kind))
        self._advance(op)

    def take_quantum(self) -> int:
        """Plan the next quantum of the head and get its tokens."""
        op = self.head
        assert op is not None, "nothing may run"
        assert self._quanta_done < len(op.quantum_tokens), f"{op.request_id} has no quantum left"
        tokens = op.quantum_tokens[self._quanta_done]
        earlier = self.planned.pop() if self.is_extension() else None
        self._quanta_done += 1
        is_last_part = self._quanta_done == len(op.quantum_tokens)
        self.planned.append(
            PlannedOp(
                op.request_id,
                self.model_id,
                op.seq_id,
                op.kind,
                quantum_start=earlier.quantum_start if earlier else self._quanta_done - 1,
                quantum_stop=self._quanta_done,
                num_tokens=tokens + (earlier.num_tokens if earlier else 0),
                is_last_part=is_last_part,
            )
        )
        if is_last_part:
            self._advance(op)
        return tokens

    def waiting_tokens(self, *, limit: int) -> int:
        """Tokens of passes that could still run in this cycle if there were room; counting stops at `limit`."""
        if self.next_quantum_tokens is None:
            return 0
        tokens = -sum(self.queue.ops[self._index].quantum_tokens[: self._quanta_done])
        expected = self._expected
        for op in self._rest():
            if tokens >= limit or not op.quantum_tokens or not self._is_joined(expected, op.seq_id):
                break
            tokens += sum(op.quantum_tokens)
            expected = op.seq_id + 1
        return min(tokens, limit)

    def _advance(self, op: QueuedOp) -> None:
        self._index += 1
        self._expected = op.seq_id + 1
        self._phase = PHASE_INDEX[op.kind]
        # Only a queue's first op can have parts behind it.
        self._quanta_done = 0
        # Nothing follows an unload in its cycle: there is no state left to run it on.
        self.head = self._find_head() if op.kind is not OpKind.UNLOAD_MODEL else None

    def _find_head(self) -> QueuedOp | None:
        if self._index >= len(self.queue.ops):
            return None
        op = self.queue.ops[self._index]
        assert op.seq_id >= self._expected, f"{op.request_id} was consumed already or is out of order"
        assert self._quanta_done < len(op.quantum_tokens) or not op.quantum_tokens, f"{op.request_id} is complete"
        if op.seq_id > self._expected and not self._cross_to(op.seq_id):
            return None
        return op if self._may_follow(op) else None

    def _cross_to(self, seq_id: int) -> bool:
        """Whether the line may move on to `seq_id`; ids before it that are given up are noted as missing."""
        room = MAX_GAP_IDS_PER_CYCLE - len(self.missing)
        absent = list(islice(self._absent(self._expected, seq_id), room + 1))
        if not absent:
            return True
        if not any(op.queued_s > self._gap_wait_s and self._ends_the_wait(op) for op in self._rest()):
            return False
        self.missing += absent[:room]
        return len(absent) <= room

    def _ends_the_wait(self, op: QueuedOp) -> bool:
        """A step, save or load proves that the missing ids are not merely late; so does a head that is full."""
        is_full = len(self.queue.ops) + len(self.queue.settled_seq_ids) >= MAX_HEADS_PER_MODEL
        return is_full or op.kind in _ENDS_THE_WAIT

    def _absent(self, start: int, stop: int) -> Iterator[int]:
        """Ids in [start, stop) that neither wait nor were refused at admission."""
        return (seq_id for seq_id in range(start, stop) if seq_id not in self.queue.settled_seq_ids)

    def _is_joined(self, start: int, stop: int) -> bool:
        return next(self._absent(start, stop), None) is None

    def _rest(self) -> tuple[QueuedOp, ...]:
        return self.queue.ops[self._index :]

    def _may_follow(self, op: QueuedOp) -> bool:
        """Phases never go back and a run steps once per cycle; a quarantined op is never behind another."""
        if not self.planned:
            return True
        phase = PHASE_INDEX[op.kind]
        if phase < self._phase or (phase == self._phase == _STEP) or op.request_id in self._quarantined:
            return False
        return op.kind is not OpKind.LOAD_WEIGHTS or op.seq_id <= _LAST_SEQ_OF_A_NEW_RUN
