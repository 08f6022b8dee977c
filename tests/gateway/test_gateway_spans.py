"""A call about a request is a part of that request's trace, whoever serves it; others belong to their client's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gateway_support import KEY, Harness, ok, open_tenant

from treadle.telemetry.tracing import Span, SpanKind, from_traceparent, request_trace, start_tracing

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> Iterator[list[Span]]:
    """What is emitted during the test."""
    emitted: list[Span] = []
    end = start_tracing(emitted.append)
    yield emitted
    end()


async def test_calls_about_a_request_share_its_trace(gateway: Harness, spans: list[Span]) -> None:
    model_id = await gateway.new_model(await gateway.new_session())
    spans.clear()
    body = {"model_id": model_id, "seq_id": 1, "adam_params": {"learning_rate": 1e-3}}
    request_id = ok(await gateway.post("optim_step", body, headers={"traceparent": TRACEPARENT}))["request_id"]
    assert (await gateway.future(request_id)).status_code == 408

    submitted, asked = spans
    root = request_trace(request_id)
    assert [span.name for span in spans] == ["POST /api/v1/optim_step", "POST /api/v1/retrieve_future"]
    assert submitted.parent == asked.parent == root
    assert submitted.at.trace_id == asked.at.trace_id == root.trace_id
    assert submitted.at.span_id != asked.at.span_id
    assert submitted.links == (from_traceparent(TRACEPARENT),)
    assert asked.links == ()
    assert submitted.kind is SpanKind.SERVER
    assert submitted.attributes["treadle.tenant_id"] == open_tenant()
    assert asked.attributes["http.response.status_code"] == 408
    assert asked.error == "", "held and told to ask again is no error"
    assert KEY not in repr(spans)


async def test_other_calls_belong_to_their_clients_trace(gateway: Harness, spans: list[Span]) -> None:
    await gateway.get("get_server_capabilities")
    ok(
        await gateway.client.get(
            "/api/v1/get_server_capabilities", headers={"X-API-Key": KEY, "traceparent": TRACEPARENT}
        )
    )
    await gateway.client.get("/metrics")
    await gateway.client.get("/healthz")

    alone, theirs = spans
    assert alone.parent is None
    assert theirs.parent == from_traceparent(TRACEPARENT)
    assert theirs.at.trace_id != alone.at.trace_id
    assert theirs.links == ()
