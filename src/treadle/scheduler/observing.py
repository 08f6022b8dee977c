"""What cycles and samples were like, for metrics and traces: told once they are committed, it changes nothing.

Times are the store's clock's, but for what workers time by their own. It refuses to know how anything is planned.
Invariant: a request is counted once, when it is final; what is run again behind a restore is counted as a replay alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from treadle.domain.ids import PoolName, RequestId
from treadle.domain.ops import OpKind, phase_of
from treadle.domain.ops import Phase as OpPhase
from treadle.domain.outcome import CycleOutcome, CyclePart, Failure, OpOutcome, SampleOutcome, WorkTiming
from treadle.domain.records import FinishedRequest, RequestRecord
from treadle.scheduler.finishing import CycleLedger, OpTimes
from treadle.scheduler.sorting import Queues
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics
from treadle.telemetry.tracing import (
    MAX_LINKS,
    Span,
    SpanRef,
    cycle_trace,
    emit,
    emit_always,
    is_collected,
    is_tracing,
    request_trace,
)

log = get_logger(__name__)

# What a request of each phase takes part in, of what a worker does for all runs at once.
_SHARED_PART = {OpPhase.PASS: CyclePart.PASSES, OpPhase.STEP: CyclePart.STEPS}


class CycleObserver:
    """Of one worker's cycles. slot: its name in the pool; token: of the lease."""

    def __init__(self, *, pool: PoolName, slot: str, token: int, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._slot = slot
        self._token = token
        self._metrics = metrics
        self._clock = clock
        self._began_at = 0.0

    def cycle_begins(self) -> None:
        """The next cycle was booked, and goes to the worker now."""
        self._began_at = self._clock()

    def cycle_ended(
        self, outcome: CycleOutcome, ledger: CycleLedger, replayed: Collection[RequestId], *, budget_tokens: int
    ) -> None:
        """Its outcome is committed. replayed: requests that ran again behind a restore."""
        num_tokens = sum(one.num_tokens for one in outcome.outcomes)
        num_replayed = sum(one.num_tokens for one in outcome.outcomes if one.request_id in replayed)
        metrics, pool = self._metrics, self._pool
        metrics.cycles.labels(pool).inc()
        metrics.cycle_seconds.labels(pool).observe(outcome.compute_s)
        metrics.cycle_tokens.labels(pool).observe(num_tokens)
        metrics.cycle_occupancy.labels(pool).observe(num_tokens / budget_tokens)
        metrics.trained_tokens.labels(pool).inc(num_tokens - num_replayed)
        metrics.replayed_ops.labels(pool).inc(len(replayed))
        metrics.base_forwards.labels(pool).inc(outcome.num_forwards)
        for timing in outcome.timings:
            metrics.cycle_part_seconds.labels(pool, timing.part.value).observe(timing.seconds)
        log.debug(
            "cycle finished",
            pool=pool,
            slot=self._slot,
            cycle=outcome.cycle,
            ops=len(outcome.outcomes),
            replayed=len(replayed),
            tokens=num_tokens,
            ms=round(outcome.compute_s * 1000, 1),
        )
        if is_tracing():
            self._trace_cycle(outcome, ledger, replayed, num_tokens)

    def requests_ended(self, ledger: CycleLedger, queues: Queues) -> None:
        """These of the queued requests are final now, for whatever reason."""
        ended = {one.request_id: one for one in ledger.finished}
        for rows in queues.values():
            for row in rows:
                if row.request_id in ended:
                    self._count(row, ended[row.request_id], ledger)

    def _count(self, row: RequestRecord, end: FinishedRequest, ledger: CycleLedger) -> None:
        now = self._clock()
        times = ledger.times.get(row.request_id)
        count_request(self._metrics, row, end.failure, now)
        if times is not None:
            self._metrics.wait_seconds.labels(self._pool, "training").observe(max(0.0, times.sent_at - times.queued_at))
        if is_tracing():
            attributes: dict[str, str | int] = {"treadle.slot": self._slot}
            if times is not None:
                attributes["treadle.cycle"] = ledger.cycle
            cycle = None if times is None else cycle_trace(self._pool, self._token, ledger.cycle)
            _trace_request(row, end.failure, times, now, attributes, cycle=cycle)

    def _trace_cycle(
        self, outcome: CycleOutcome, ledger: CycleLedger, replayed: Collection[RequestId], num_tokens: int
    ) -> None:
        at = cycle_trace(self._pool, self._token, outcome.cycle)
        ran = [one for one in outcome.outcomes if one.request_id not in replayed]
        traced = [one for one in ran if is_collected(request_trace(one.request_id))]
        for one in traced:
            self._trace_parts(outcome, one, at)
        if not (traced or is_collected(at)):
            return
        for number, timing in enumerate(outcome.timings):
            emit_always(_part_span(timing, at.child(timing.part.value, str(number)), parent=at))
        ended_at = self._clock()
        emit_always(Span("commit", at.child("commit"), began_at=ledger.now, ended_at=ended_at, parent=at))
        emit_always(
            Span(
                "cycle",
                at,
                began_at=self._began_at,
                ended_at=ended_at,
                attributes={
                    "treadle.pool": self._pool,
                    "treadle.slot": self._slot,
                    "treadle.cycle": outcome.cycle,
                    "treadle.ops": len(outcome.outcomes),
                    "treadle.replayed_ops": len(replayed),
                    "treadle.tokens": num_tokens,
                    "treadle.base_forwards": outcome.num_forwards,
                    "treadle.worker_seconds": outcome.compute_s,
                },
                links=tuple(request_trace(one.request_id) for one in traced[:MAX_LINKS]),
            )
        )

    def _trace_parts(self, outcome: CycleOutcome, one: OpOutcome, cycle: SpanRef) -> None:
        """What a request took part in, in its own trace."""
        run = request_trace(one.request_id).child("run")
        for number, timing in enumerate(outcome.timings):
            if _is_part_of(timing, one):
                place = run.child(str(outcome.cycle), timing.part.value, str(number))
                emit(_part_span(timing, place, parent=run, links=(cycle,)))


@dataclass(frozen=True, slots=True)
class _Sample:
    """A sample that is with a sampler: its row, and when it was handed over."""

    row: RequestRecord
    times: OpTimes
    slot: str


class SampleObserver:
    """Of one pool's samples, whichever sampler has them."""

    def __init__(self, *, pool: PoolName, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._metrics = metrics
        self._clock = clock
        self._samples: dict[RequestId, _Sample] = {}

    def begin(self, rows: Iterable[RequestRecord], slot: str) -> None:
        """These are with the sampler of this slot now; one that was with another before began then."""
        now = self._clock()
        for row in rows:
            before = self._samples.get(row.request_id)
            sent_at = now if before is None else before.times.sent_at
            self._samples[row.request_id] = _Sample(row, OpTimes(row.created_at, sent_at), slot)

    def forget(self, request_id: RequestId) -> None:
        """It is over, or its client wants it no more. Idempotent."""
        self._samples.pop(request_id, None)

    def ended(self, outcome: SampleOutcome) -> None:
        """Its outcome is committed."""
        metrics, pool = self._metrics, self._pool
        metrics.sampled_tokens.labels(pool).inc(outcome.num_sampled_tokens)
        metrics.prompt_tokens.labels(pool).inc(outcome.num_prompt_tokens)
        metrics.cached_prompt_tokens.labels(pool).inc(outcome.num_cached_tokens)
        sample = self._samples.pop(outcome.request_id, None)
        if sample is None:
            return
        now, times = self._clock(), sample.times
        count_request(metrics, sample.row, outcome.failure, now)
        metrics.wait_seconds.labels(pool, "sampling").observe(max(0.0, times.sent_at - times.queued_at))
        if is_tracing():
            attributes: dict[str, str | int] = {
                "treadle.slot": sample.slot,
                "treadle.prompt_tokens": outcome.num_prompt_tokens,
                "treadle.cached_prompt_tokens": outcome.num_cached_tokens,
                "treadle.sampled_tokens": outcome.num_sampled_tokens,
            }
            _trace_request(sample.row, outcome.failure, times, now, attributes)
            if outcome.worked_s > 0.0:
                run = request_trace(outcome.request_id).child("run")
                emit(
                    Span(
                        "sampling",
                        run.child("sampling"),
                        began_at=outcome.began_at,
                        ended_at=outcome.began_at + outcome.worked_s,
                        parent=run,
                    )
                )


def count_request(metrics: Metrics, row: RequestRecord, failure: Failure | None, now: float) -> None:
    """A request is final."""
    kind = row.kind.value
    metrics.finished_requests.labels(row.pool, kind).inc()
    metrics.request_seconds.labels(row.pool, kind).observe(max(0.0, now - row.created_at))
    if failure is not None:
        metrics.failed_requests.labels(row.pool, kind, failure.category.value).inc()


def _trace_request(
    row: RequestRecord,
    failure: Failure | None,
    times: OpTimes | None,
    now: float,
    attributes: Mapping[str, str | int],
    *,
    cycle: SpanRef | None = None,
) -> None:
    """The root of a request's trace, and its wait and its work. cycle: the one that completed it."""
    root = request_trace(row.request_id)
    if not is_collected(root):
        return
    about: dict[str, str | int] = {
        "treadle.request_id": row.request_id,
        "treadle.tenant_id": row.tenant_id,
        "treadle.pool": row.pool,
        "treadle.kind": row.kind.value,
        "treadle.tokens": row.num_tokens,
        **attributes,
    }
    if row.model_id is not None:
        about["treadle.model_id"] = row.model_id
    error = "" if failure is None else f"failed: {failure.category.value}"
    emit(Span(row.kind.value, root, began_at=row.created_at, ended_at=now, attributes=about, error=error))
    if times is None:
        return
    emit(Span("queued", root.child("queued"), began_at=times.queued_at, ended_at=times.sent_at, parent=root))
    links = () if cycle is None else (cycle,)
    emit(Span("run", root.child("run"), began_at=times.sent_at, ended_at=now, parent=root, links=links))


def _is_part_of(timing: WorkTiming, one: OpOutcome) -> bool:
    if timing.request_id is not None:
        return timing.request_id == one.request_id
    if timing.model_id is not None:
        return timing.model_id == one.model_id
    assert one.kind is not OpKind.SAMPLE, "samples are in no cycle"
    return _SHARED_PART.get(phase_of(one.kind)) is timing.part


def _part_span(timing: WorkTiming, at: SpanRef, *, parent: SpanRef, links: tuple[SpanRef, ...] = ()) -> Span:
    attributes = {} if timing.model_id is None else {"treadle.model_id": timing.model_id}
    return Span(
        timing.part.value,
        at,
        began_at=timing.began_at,
        ended_at=timing.began_at + timing.seconds,
        parent=parent,
        attributes=attributes,
        links=links,
    )
