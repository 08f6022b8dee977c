"""Traces as documents: every event complete, no track with two things at once."""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from typing import Any

from treadle.domain.ids import ModelId, PoolName, SessionId
from treadle.domain.ops import OpKind
from treadle.domain.states import RequestState
from treadle.gateway.traces import chrome_trace
from treadle.store.traces import SessionTrace, TracedOp

RUN = ModelId("s:train:0")
POOL = PoolName("base")
NOW = 1_000.0


def op(seq_id: int, queued: float, sent: float | None, done: float | None, *, cycle: int | None = None) -> TracedOp:
    return TracedOp(
        owner=RUN,
        pool=POOL,
        kind=OpKind.FORWARD_BACKWARD,
        state=RequestState.QUEUED if done is None else RequestState.DONE,
        seq_id=seq_id,
        num_tokens=10,
        queued_at=queued,
        sent_at=sent,
        finished_at=done,
        cycle=cycle,
    )


def drawn(*ops: TracedOp, is_cut: bool = False) -> dict[str, Any]:
    trace = chrome_trace(SessionId("s"), SessionTrace(ops, is_cut), now=NOW)
    json.dumps(trace)
    return trace


def spans(trace: dict[str, Any], track: str) -> list[tuple[str, float, float]]:
    """Name, begin and end in seconds of what is on tracks of this kind."""
    events = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["cat"] == track]
    return [(e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events]


def test_an_op_waits_and_then_runs() -> None:
    trace = drawn(op(1, 10.0, 12.5, 13.0, cycle=4))

    assert spans(trace, "waiting") == [("forward_backward 1", 10.0, 12.5)]
    assert spans(trace, "running") == [("forward_backward 1", 12.5, 13.0)]
    assert spans(trace, "cycles of base") == [("cycle 4", 12.5, 13.0)]


def test_what_is_queued_waits_until_now() -> None:
    assert spans(drawn(op(1, 10.0, None, None)), "waiting") == [("forward_backward 1", 10.0, NOW)]


def test_where_nobody_noted_when_it_was_sent_the_whole_time_is_one_event() -> None:
    trace = drawn(op(1, 10.0, None, 20.0))

    assert spans(trace, "waiting") == [("forward_backward 1", 10.0, 20.0)]
    assert spans(trace, "running") == []
    [event] = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert event["args"]["includes"] == "waiting and running"


def test_a_cycle_begins_when_its_last_op_was_sent_and_not_before_the_last_one_ended() -> None:
    """Op 2 was sent with cycle 1 already, and completed by cycle 2."""
    trace = drawn(op(1, 0.0, 1.0, 2.0, cycle=1), op(2, 0.0, 1.0, 4.0, cycle=2), op(3, 0.0, 5.0, 6.0, cycle=3))

    assert spans(trace, "cycles of base") == [("cycle 1", 1.0, 2.0), ("cycle 2", 2.0, 4.0), ("cycle 3", 5.0, 6.0)]


def test_events_of_one_track_never_overlap() -> None:
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    ops = []
    for seq_id in range(400):
        queued = draw.uniform(0, 50)
        sent = queued + draw.choice([0.0, draw.uniform(0, 5)])
        ops.append(op(seq_id, queued, sent, sent + draw.choice([0.0, draw.uniform(0, 5)]), cycle=seq_id // 7))

    trace = drawn(*ops)

    tracks: defaultdict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and not event["cat"].startswith("cycles"):
            tracks[event["pid"], event["tid"]].append(event)
    assert sum(len(events) for events in tracks.values()) == 2 * len(ops)
    for events in tracks.values():
        for earlier, later in itertools.pairwise(events):
            assert earlier["ts"] + earlier["dur"] <= later["ts"], f"seed {seed}"


def test_a_trace_says_that_it_was_cut() -> None:
    assert drawn(is_cut=True)["otherData"] == {"session_id": "s", "is_cut_to_newest": True}
    assert drawn()["otherData"]["is_cut_to_newest"] is False
