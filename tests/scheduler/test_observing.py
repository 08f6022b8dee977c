"""What a cycle was is told once it is committed: in metrics, in spans that a real collector gets, in log lines."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from scheduler_support import POOL, TENANT, Cluster

from treadle.config import OtelSettings
from treadle.domain.ids import ModelId
from treadle.domain.ops import OpKind
from treadle.domain.states import Category
from treadle.telemetry.collector import tracing_to
from treadle.telemetry.logs import configure_logging
from treadle.telemetry.tracing import request_trace
from treadle.testing.builders import datum, pass_op, sample_op, step_op
from treadle.testing.otlp_collector import Collector, attributes_of, collecting

RUN = ModelId("session:train:0")


def count(cluster: Cluster, name: str, **labels: str) -> float:
    """A number of the pool's newest runner, 0 while there is none."""
    value = cluster.runner._metrics.registry.get_sample_value(name, {"pool": POOL, **labels})
    return 0.0 if value is None else value


def of_request(collector: Collector, request_id: str) -> dict[str, Span]:
    """The spans of a request's trace, by name; none is there twice."""
    trace_id = request_trace(request_id).trace_id.to_bytes(16, "big")
    spans = [span for span in collector.spans if span.trace_id == trace_id]
    assert len({span.name for span in spans}) == len(spans), [span.name for span in spans]
    return {span.name: span for span in spans}


async def test_a_request_and_its_cycle_are_traced_through_scheduler_and_worker(cluster: Cluster) -> None:
    with collecting() as collector, tracing_to(OtelSettings(endpoint=collector.endpoint)):
        await cluster.result(await cluster.create(RUN))
        passed, stepped = await cluster.submit(pass_op(1, model_id=RUN), step_op(2, model_id=RUN))
        await cluster.result(passed)
        await cluster.result(stepped)
        sampled = await cluster.submit_sample(sample_op(1))
        await cluster.result(sampled)
        await cluster.drain()

    spans = of_request(collector, passed)
    assert spans.keys() == {"forward_backward", "queued", "run", "passes"}
    root, run = spans["forward_backward"], spans["run"]
    assert root.parent_span_id == b""
    assert spans["queued"].parent_span_id == run.parent_span_id == root.span_id
    assert spans["passes"].parent_span_id == run.span_id
    about = attributes_of(root)
    assert (about["treadle.model_id"], about["treadle.tenant_id"], about["treadle.slot"]) == (RUN, TENANT, "0")
    assert of_request(collector, stepped).keys() == {"optim_step", "queued", "run", "steps"}

    [link] = run.links
    [cycle] = [span for span in collector.named("cycle") if span.trace_id == link.trace_id]
    assert cycle.span_id == link.span_id
    assert root.trace_id in {link.trace_id for link in cycle.links}
    assert attributes_of(cycle)["treadle.cycle"] == about["treadle.cycle"]
    parts = [span for span in collector.spans if span.trace_id == cycle.trace_id and span.parent_span_id]
    assert {span.name for span in parts} >= {"passes", "commit"}
    assert {span.parent_span_id for span in parts} == {cycle.span_id}

    spans = of_request(collector, sampled)
    assert spans.keys() == {"sample", "queued", "run"}
    assert attributes_of(spans["sample"])["treadle.sampled_tokens"] == 4
    assert b"tml-" not in b"".join(request.SerializeToString() for request in collector.requests)


async def test_what_fails_is_an_error_in_its_trace_and_in_the_counts(cluster: Cluster) -> None:
    with collecting() as collector, tracing_to(OtelSettings(endpoint=collector.endpoint)):
        await cluster.result(await cluster.create(RUN))
        [stepped] = await cluster.submit(step_op(1, model_id=RUN))
        record = await cluster.future(stepped)
        assert record.failure is not None
        await cluster.drain()

    root = of_request(collector, stepped)["optim_step"]
    assert (root.status.code, root.status.message) == (root.status.STATUS_CODE_ERROR, "failed: user")
    failed = {"kind": OpKind.OPTIM_STEP.value, "category": Category.USER.value}
    assert count(cluster, "treadle_failed_requests_total", **failed) == 1
    assert count(cluster, "treadle_finished_requests_total", kind="optim_step") == 1
    assert count(cluster, "treadle_finished_requests_total", kind="create_model") == 1


async def test_a_share_of_requests_takes_their_cycles_along(cluster: Cluster) -> None:
    """A cycle of a request that is collected is, whatever its own trace id says."""
    with collecting() as collector, tracing_to(OtelSettings(endpoint=collector.endpoint, sample_ratio=0.5)):
        ids = [await cluster.create(RUN)]
        for seq_id in range(1, 9):
            ids += await cluster.submit(pass_op(seq_id, model_id=RUN, forward_only=True))
        for request_id in ids:
            await cluster.result(request_id)
        await cluster.drain()

    taken = [request_id for request_id in ids if (request_trace(request_id).trace_id & (2**64 - 1)) < 2**63]
    assert 0 < len(taken) < len(ids)
    assert [bool(of_request(collector, request_id)) for request_id in ids] == [one in taken for one in ids]
    cycles = {span.trace_id for span in collector.named("cycle")}
    assert {link.trace_id for span in collector.named("run") for link in span.links} <= cycles


async def test_replays_are_counted_as_replays_alone(cluster: Cluster) -> None:
    await cluster.result(await cluster.create(RUN))
    await cluster.run(pass_op(1, model_id=RUN), step_op(2, model_id=RUN), pass_op(3, model_id=RUN))
    trained = count(cluster, "treadle_trained_tokens_total")
    cluster.worker.die("killed")
    await cluster.run(step_op(4, model_id=RUN))

    assert count(cluster, "treadle_replayed_ops_total") > 0
    assert count(cluster, "treadle_restores_total") == 1
    assert count(cluster, "treadle_worker_deaths_total", worker="0") == 1
    assert count(cluster, "treadle_trained_tokens_total") == trained
    assert count(cluster, "treadle_finished_requests_total", kind="forward_backward") == 2
    assert count(cluster, "treadle_finished_requests_total", kind="optim_step") == 2
    assert count(cluster, "treadle_wait_seconds_count", work="training") == 5
    assert count(cluster, "treadle_cycle_part_seconds_count", part="steps") >= 2


async def test_samples_are_counted_with_their_wait_and_their_cache_hits(cluster: Cluster) -> None:
    for seq_id in (1, 2, 3):
        await cluster.result(await cluster.submit_sample(sample_op(seq_id)))

    assert count(cluster, "treadle_finished_requests_total", kind="sample") == 3
    assert count(cluster, "treadle_sampled_tokens_total") == 12
    assert count(cluster, "treadle_prompt_tokens_total") == 9
    assert count(cluster, "treadle_cached_prompt_tokens_total") == 0
    assert count(cluster, "treadle_wait_seconds_count", work="sampling") == 3
    assert count(cluster, "treadle_request_seconds_count", kind="sample") == 3
    assert count(cluster, "treadle_lease_changes_total", change="acquired") == 1
    counts = cluster.runner.count()
    assert counts is not None
    assert dict(counts.workers) == {"up": 1}
    assert counts.num_running_samples == 0


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What is logged during the test, as JSON."""
    root, ours = logging.getLogger(), logging.getLogger("treadle")
    before = (root.handlers[:], root.level, ours.level)
    stream = io.StringIO()
    configure_logging(level="debug", style="json", stream=stream)
    yield stream
    root.handlers[:], root.level, ours.level = before


async def test_lines_of_a_cycle_say_which_it_is(cluster: Cluster, lines: io.StringIO) -> None:
    await cluster.result(await cluster.create(RUN))
    await cluster.run(pass_op(1, model_id=RUN, datums=[datum()]))
    cluster.worker.die("killed")
    await cluster.run(step_op(2, model_id=RUN))

    events = [json.loads(line) for line in lines.getvalue().splitlines()]
    begun = [event for event in events if event.get("phase") == "cycle begun"]
    [restored] = [event for event in events if event["event"] == "run restored"]
    [replaced] = [event for event in events if event["event"] == "worker is replaced"]
    assert {(event["pool"], event["slot"]) for event in [*begun, restored]} == {(POOL, "0")}
    assert restored["cycle"] in {event["cycle"] for event in begun}, "it is said by one who knows of no cycle"
    assert "cycle" not in replaced, "what is bound in a cycle ends with it"
