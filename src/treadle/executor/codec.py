"""Stored payloads to ops on the way in, results to the SDK's bytes on the way out.

Runs in the worker's process, so that neither the event loop nor the scheduler ever touches a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from treadle.domain.ops import OpKind, SampleOp
from treadle.domain.outcome import CycleOutcome, OpOutcome, PassResult, SampleOutcome, StepResult
from treadle.domain.plan import CycleWork, SampleWork, WorkItem
from treadle.errors import TreadleError
from treadle.wire.payloads import decode_payload
from treadle.wire.results import encode_pass_result, encode_sample_result, encode_step_result
from treadle.worker.failures import failure_of
from treadle.worker.work import DecodedCycle, DecodedItem, DecodedSample


def decode_cycle(work: CycleWork) -> DecodedCycle:
    """The cycle with every payload decoded; one that cannot be read fails its own op only."""
    return DecodedCycle(
        token=work.token,
        cycle=work.cycle,
        items=tuple(_decode_item(item) for item in work.items),
        restores=work.restores,
    )


def _decode_item(item: WorkItem) -> DecodedItem:
    try:
        op = decode_payload(item.planned.kind, item.payload)
    except TreadleError as error:
        return DecodedItem(item=item, op=failure_of(error))
    assert not isinstance(op, SampleOp), "samples are never planned into a cycle"
    return DecodedItem(item=item, op=op)


def decode_samples(samples: Sequence[SampleWork]) -> tuple[list[DecodedSample], tuple[SampleOutcome, ...]]:
    """Samples ready to run, and outcomes of those whose payload cannot be read."""
    decoded: list[DecodedSample] = []
    refused: list[SampleOutcome] = []
    for sample in samples:
        try:
            op = decode_payload(OpKind.SAMPLE, sample.payload)
        except TreadleError as error:
            refused.append(SampleOutcome(request_id=sample.request_id, failure=failure_of(error)))
            continue
        assert isinstance(op, SampleOp)
        decoded.append(DecodedSample(request_id=sample.request_id, tenant_id=sample.tenant_id, op=op))
    return decoded, tuple(refused)


def encode_cycle(outcome: CycleOutcome) -> CycleOutcome:
    """The same outcome with the bytes clients get; logprob arrays stay behind, only their bytes travel."""
    return replace(outcome, outcomes=tuple(_encode_op(op) for op in outcome.outcomes))


def _encode_op(outcome: OpOutcome) -> OpOutcome:
    match outcome.result:
        case PassResult() as result:
            return replace(outcome, result=replace(result, logprobs=()), encoded=encode_pass_result(result))
        case StepResult() as result:
            return replace(outcome, encoded=encode_step_result(result))
        case _:
            return outcome


def encode_samples(outcomes: Sequence[SampleOutcome]) -> tuple[SampleOutcome, ...]:
    """The same outcomes with the bytes clients get in place of arrays."""
    return tuple(
        outcome
        if outcome.result is None
        else replace(outcome, result=None, encoded=encode_sample_result(outcome.result))
        for outcome in outcomes
    )
