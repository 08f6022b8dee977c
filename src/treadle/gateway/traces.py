"""A session's trace in Chrome's format: what waited and what ran, on tracks that viewers draw (ui.perfetto.dev).

Pure: from what the store knows to a JSON document of complete events ("ph": "X"), in microseconds since the epoch.
Each run and each sampling session is a process with two kinds of tracks, for waiting and for running; the cycles that
completed the session's ops are another one. Invariant: events of one track never overlap, which viewers could not draw;
where they would, there are more tracks of that kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

from treadle.domain.ids import SessionId
from treadle.domain.states import RequestState
from treadle.store.traces import SessionTrace, TracedOp

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Span:
    """Something on a track, in epoch seconds."""

    name: str
    begin: float
    end: float
    args: dict[str, Any]


def chrome_trace(session_id: SessionId, trace: SessionTrace, *, now: float) -> dict[str, Any]:
    """The document. now: where what still waits ends."""
    events: list[Event] = []
    by_owner: defaultdict[str, list[TracedOp]] = defaultdict(list)
    for op in trace.ops:
        by_owner[op.owner].append(op)
    for pid, (owner, ops) in enumerate(sorted(by_owner.items()), start=1):
        tracks = (("waiting", _waiting(ops, now)), ("running", _running(ops)))
        events += _process(pid, str(owner), tracks)
    cycles = [(f"cycles of {pool}", spans) for pool, spans in _cycles(trace.ops).items()]
    events += _process(len(by_owner) + 1, "cycles", cycles)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"session_id": session_id, "is_cut_to_newest": trace.is_cut},
    }


def _waiting(ops: Iterable[TracedOp], now: float) -> list[_Span]:
    """From admission to a worker; to the end where nobody noted when that was, and until now in the queue."""
    spans = []
    for op in ops:
        end = op.sent_at
        if end is None:
            end = now if op.finished_at is None else op.finished_at
        spans.append(_Span(_name(op), op.queued_at, end, _args(op)))
    return spans


def _running(ops: Iterable[TracedOp]) -> list[_Span]:
    return [
        _Span(_name(op), op.sent_at, op.finished_at, _args(op))
        for op in ops
        if op.sent_at is not None and op.finished_at is not None
    ]


def _name(op: TracedOp) -> str:
    return f"{op.kind.value} {op.seq_id}"


def _args(op: TracedOp) -> dict[str, Any]:
    args: dict[str, Any] = {"seq_id": op.seq_id, "state": op.state.value, "num_tokens": op.num_tokens}
    if op.cycle is not None:
        args["cycle"] = op.cycle
    if op.sent_at is None and op.state is not RequestState.QUEUED:
        args["includes"] = "waiting and running"
    return args


def _cycles(ops: Iterable[TracedOp]) -> dict[str, list[_Span]]:
    """The cycles that completed ops of the session, by pool.

    A cycle ends when its ops do, and began when the last of them was sent; one that was sent earlier had parts in
    earlier cycles. Where only such ops are known, the end of the cycle before is all that is known of its beginning.
    """
    members: defaultdict[tuple[str, int], list[TracedOp]] = defaultdict(list)
    for op in ops:
        if op.cycle is not None and op.sent_at is not None and op.finished_at is not None:
            members[op.pool, op.cycle].append(op)
    spans: defaultdict[str, list[_Span]] = defaultdict(list)
    for (pool, cycle), done in sorted(members.items()):
        end = max(op.finished_at or 0.0 for op in done)
        begin = max(op.sent_at or 0.0 for op in done)
        if spans[pool]:
            begin = min(max(begin, spans[pool][-1].end), end)
        args = {"num_ops": len(done), "num_tokens": sum(op.num_tokens for op in done)}
        spans[pool].append(_Span(f"cycle {cycle}", begin, end, args))
    return spans


def _process(pid: int, name: str, tracks: Iterable[tuple[str, Sequence[_Span]]]) -> Iterator[Event]:
    """The events of one process, each kind of track on as many tracks as it needs."""
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    tid = 0
    for kind, spans in tracks:
        for number, lane in enumerate(_lanes(spans)):
            tid += 1
            shown = kind if number == 0 else f"{kind} {number + 1}"
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": shown}}
            for span in lane:
                yield {
                    "ph": "X",
                    "name": span.name,
                    "cat": kind,
                    "pid": pid,
                    "tid": tid,
                    "ts": _microseconds(span.begin),
                    "dur": max(0, _microseconds(span.end) - _microseconds(span.begin)),
                    "args": span.args,
                }


def _lanes(spans: Iterable[_Span]) -> list[list[_Span]]:
    """The fewest tracks on which nothing overlaps, each by time."""
    lanes: list[list[_Span]] = []
    free: list[int] = []
    taken: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda span: (span.begin, span.end)):
        while taken and taken[0][0] <= _microseconds(span.begin):
            heappush(free, heappop(taken)[1])
        if not free:
            lanes.append([])
            free.append(len(lanes) - 1)
        lane = heappop(free)
        lanes[lane].append(span)
        heappush(taken, (max(_microseconds(span.end), _microseconds(span.begin)), lane))
    return lanes


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)
