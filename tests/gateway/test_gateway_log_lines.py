"""Lines of a live gateway say whose call and which request they belong to, and never with which key."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from gateway_support import KEY, OTHER_KEY, Harness, ok, open_tenant
from starlette.requests import Request
from starlette.responses import Response

from treadle.telemetry.context import current_context
from treadle.telemetry.logs import configure_logging


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What this process logs during the test, as JSON."""
    root, ours = logging.getLogger(), logging.getLogger("treadle")
    before = (root.handlers[:], root.level, ours.level)
    stream = io.StringIO()
    configure_logging(level="debug", style="json", stream=stream)
    yield stream
    root.handlers[:], root.level, ours.level = before


async def test_lines_of_a_request_carry_its_ids(gateway: Harness, lines: io.StringIO) -> None:
    model_id = await gateway.new_model(await gateway.new_session())
    other_id = await gateway.new_model(await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)
    bodies = [
        ({"model_id": run, "seq_id": 1, "adam_params": {"learning_rate": 1e-3}}, run) for run in (model_id, other_id)
    ]
    lines.truncate(0)
    lines.seek(0)

    for (body, _), key in zip(bodies, (KEY, OTHER_KEY), strict=True):
        ok(await gateway.post("optim_step", body, key=key))

    queued = [event for event in map(json.loads, lines.getvalue().splitlines()) if event.get("phase") == "queued"]
    assert [event["request_id"] for event in queued] == [f"{model_id}:1", f"{other_id}:1"]
    assert [event["tenant_id"] for event in queued] == [open_tenant(), open_tenant(OTHER_KEY)]
    assert len({event["call_id"] for event in queued}) == 2
    assert KEY not in lines.getvalue()
    assert dict(current_context()) == {}, "what was bound ends with its call"


async def test_a_bug_of_ours_is_told_apart_by_its_call(gateway: Harness, lines: io.StringIO) -> None:
    async def broken(request: Request) -> Response:
        await request.app.state.gateway.caller(request)
        logging.getLogger("some.library").warning("odd %s", request.headers["x-api-key"])
        raise RuntimeError("boom")

    gateway.app.add_route("/api/v1/broken", broken)
    answer = await gateway.get("broken")

    first, second = map(json.loads, lines.getvalue().splitlines()[-2:])
    assert (first["logger"], second["event"]) == ("some.library", "request failed unexpectedly")
    assert answer.json()["error_id"] == second["error_id"] == second["call_id"] == first["call_id"]
    assert first["tenant_id"] == second["tenant_id"] == open_tenant()
    assert KEY not in lines.getvalue()


async def test_refusals_are_counted_by_what_they_are(gateway: Harness) -> None:
    await gateway.client.get("/api/v1/get_server_capabilities")
    model_id = await gateway.new_model(await gateway.new_session())
    ok(await gateway.post("save_weights", {"model_id": model_id, "seq_id": 1, "path": "no/such/name"}))
    text = (await gateway.client.get("/metrics")).text

    assert 'treadle_refused_calls_total{error="Unauthenticated",status="401"} 1.0' in text
    assert 'treadle_refused_requests_total{kind="save_weights",pool="fake/base"} 1.0' in text
    assert 'treadle_held_calls{until="result"} 0.0' in text
