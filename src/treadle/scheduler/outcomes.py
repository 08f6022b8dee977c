"""What a cycle's outcomes mean for its runs: which are booked, which count for nothing, and what the worker holds now.

Two steps, with the commit between them: `book_outcomes` decides what goes into the ledger, `take_states` takes over the
worker's states once that is public. Neither plans nor commits. Invariants: a replayed op books nothing; of a run whose
state turned out not to be there nothing is booked from that op on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.ops import OpKind
from treadle.domain.outcome import CycleOutcome, OpOutcome
from treadle.scheduler.finishing import CycleLedger
from treadle.scheduler.preparing import Prepared
from treadle.scheduler.replay import Replayer
from treadle.scheduler.runs import Run
from treadle.telemetry.phases import Phase, phase

# Ops that a restore has to run again.
REPLAYED_KINDS = frozenset({OpKind.FORWARD_BACKWARD, OpKind.OPTIM_STEP})
# An op without tokens counts as so many when a cycle's seconds are shared out.
TOKENS_OF_A_STEP = 64


@dataclass(slots=True)
class Booked:
    """What kind of outcome each was.

    broken: runs that have to be restored before anything more of them runs. replayed: ops that ran again, and of these
    done_again: those that ended as they did before.
    """

    broken: set[ModelId] = field(default_factory=set)
    replayed: set[RequestId] = field(default_factory=set)
    done_again: set[RequestId] = field(default_factory=set)


async def book_outcomes(
    outcome: CycleOutcome, prepared: Prepared, runs: Mapping[ModelId, Run], ledger: CycleLedger, replayer: Replayer
) -> Booked:
    """Put every op's own outcome into the ledger."""
    assert len(outcome.outcomes) == len(prepared.items), "one outcome per op"
    booked = Booked(broken=await replayer.book_restores(outcome, prepared.restores, runs, ledger))
    for one in outcome.outcomes:
        run = runs[one.model_id]
        is_replayed = run.is_replayed(one.seq_id)
        if is_replayed:
            booked.replayed.add(one.request_id)
        if one.model_id in booked.broken:
            continue
        if one.must_restore:
            assert one.failure is not None
            replayer.try_again(run, one.failure.message)
            booked.broken.add(one.model_id)
        elif not is_replayed:
            ledger.record_outcome(run, one, prepared.named_ops.get(one.request_id))
        elif one.failure is not None:
            await replayer.book_bad_replay(run, one, ledger)
            booked.broken.add(one.model_id)
        elif not one.is_partial:
            booked.done_again.add(one.request_id)
    return booked


def take_states(
    outcome: CycleOutcome, prepared: Prepared, runs: Mapping[ModelId, Run], booked: Booked, replayer: Replayer
) -> None:
    """What the worker holds of each run now, and what that would cost to make again. Called behind the commit."""
    for model_id, restore in prepared.restores.items():
        if model_id not in booked.broken:
            runs[model_id].restored(restore.tag)
    for model_id in booked.broken:
        runs[model_id].drop_state()
    items = {item.planned.request_id: item for item in prepared.items}
    seconds = seconds_by_op(outcome)
    for one in outcome.outcomes:
        if one.model_id in booked.broken:
            continue
        run, item = runs[one.model_id], items[one.request_id]
        if one.kind in REPLAYED_KINDS and one.failure is None:
            run.debt.add(seconds[one.request_id], 0 if one.is_partial else len(item.payload))
        run.take_state(one, num_quanta_done=item.planned.quantum_stop)
        assert run.position < run.record.next_seq_id, "a state of which something is not committed"
        replayer.note_progress(run)
        if one.request_id in booked.done_again:
            phase(Phase.REPLAYED, model_id=one.model_id, seq_id=one.seq_id)


def seconds_by_op(outcome: CycleOutcome) -> Mapping[RequestId, float]:
    """The cycle's seconds, shared out over its ops by what they weigh: about what each would cost again."""
    weights = {one.request_id: _weight(one) for one in outcome.outcomes if not one.must_restore}
    total = sum(weights.values())
    return {request_id: outcome.compute_s * weight / total for request_id, weight in weights.items()}


def _weight(outcome: OpOutcome) -> int:
    return max(outcome.num_tokens, TOKENS_OF_A_STEP)
