"""Where does my request stand, and why was my step slow: for the owner, and for nobody else."""

from __future__ import annotations

import pytest
from gateway_support import OTHER_KEY, POOL, Harness, ok, refused, sample_body

from treadle.domain.ids import ModelId, RequestId
from treadle.domain.ops import OpKind
from treadle.domain.records import FinishedCycle, RunLogEntry
from treadle.gateway.context import Gateway
from treadle.testing.builders import datum, pass_op
from treadle.wire.passes import encode_pass


@pytest.fixture
async def model_id(gateway: Harness) -> ModelId:
    return ModelId(await gateway.new_model(await gateway.new_session()))


async def send_pass(gateway: Harness, model_id: str, seq_id: int) -> str:
    op = pass_op(seq_id, model_id=ModelId(model_id), datums=[datum(10)])
    headers = {"Content-Type": "application/x-protobuf"}
    return str(ok(await gateway.post("forward_backward", content=encode_pass(op), headers=headers))["request_id"])


async def read_backlog(gateway: Harness) -> None:
    part = gateway.app.state.gateway
    assert isinstance(part, Gateway)
    await part.backlog.read()


async def test_a_queued_op_knows_what_is_in_front_of_it(gateway: Harness, model_id: ModelId) -> None:
    for seq_id in (1, 2, 3):
        request_id = await send_pass(gateway, model_id, seq_id)
    gateway.clock.advance(5)
    await read_backlog(gateway)

    body = ok(await gateway.get(f"treadle/requests/{request_id}"))

    assert (body["state"], body["kind"], body["seq_id"], body["num_tokens"]) == ("queued", "forward_backward", 3, 10)
    assert body["training_run_id"] == model_id
    assert body["queued_s"] == 5
    assert body["queue_state"] == "active"
    assert (body["ahead"]["num_ops"], body["ahead"]["num_tokens"]) == (2, 20)
    assert body["waiting_for_seq_id"] is None
    assert not body["is_running"]
    assert (body["tenant"]["training"]["num_ops"], body["tenant"]["training"]["num_tokens"]) == (3, 30)
    assert (body["pool"]["name"], body["pool"]["num_tenants"], body["pool"]["num_tokens"]) == (POOL, 1, 30)
    assert body["pool"]["oldest_s"] == 5


async def test_a_hole_and_a_running_request_are_told(gateway: Harness, model_id: ModelId) -> None:
    first = await send_pass(gateway, model_id, 1)
    behind_a_hole = await send_pass(gateway, model_id, 3)
    lease = await gateway.lease()
    await gateway.store.cycles.begin(lease, 7, [RequestId(first)])

    assert ok(await gateway.get(f"treadle/requests/{behind_a_hole}"))["waiting_for_seq_id"] == 2
    running = ok(await gateway.get(f"treadle/requests/{first}"))
    assert running["is_running"]
    assert running["pool"]["cycle"] == 7


async def test_a_sample_stands_behind_its_tenants_samples(gateway: Harness) -> None:
    sampler_id = await gateway.new_sampler(await gateway.new_session())
    for seq_id in (5, 6):
        request_id = ok(await gateway.post("asample", sample_body(sampler_id, seq_id)))["request_id"]

    body = ok(await gateway.get(f"treadle/requests/{request_id}"))

    assert (body["ahead"]["num_ops"], body["ahead"]["num_tokens"]) == (1, 11)
    assert body["training_run_id"] is None
    assert "your samples" in body["reason"]


async def test_a_final_request_has_its_state_only(gateway: Harness, model_id: ModelId) -> None:
    request_id = await send_pass(gateway, model_id, 1)
    await gateway.finish(request_id, b"x")

    body = ok(await gateway.get(f"treadle/requests/{request_id}"))

    assert body["state"] == "done"
    assert "queue_state" not in body


async def test_where_the_time_of_recent_ops_went(gateway: Harness, model_id: ModelId) -> None:
    entries = tuple(
        RunLogEntry(
            model_id,
            seq_id,
            kind,
            gateway.clock.now(),
            {"num_tokens": 10.0},
            queued_s=0.5,
            run_s=0.25,
            cycle=40 + seq_id,
        )
        for seq_id, kind in ((1, OpKind.FORWARD_BACKWARD), (2, OpKind.OPTIM_STEP))
    )
    await gateway.store.cycles.finish(await gateway.lease(), FinishedCycle(run_log=entries))

    body = ok(await gateway.get(f"treadle/runs/{model_id}/timing"))

    assert [(op["seq_id"], op["kind"], op["cycle"]) for op in body["recent"]] == [
        (2, "optim_step", 42),
        (1, "forward_backward", 41),
    ]
    assert (body["recent"][0]["queued_s"], body["recent"][0]["run_s"], body["recent"][0]["num_tokens"]) == (
        0.5,
        0.25,
        10,
    )
    assert len(ok(await gateway.get(f"treadle/runs/{model_id}/timing?limit=1"))["recent"]) == 1


async def test_strangers_find_nothing(gateway: Harness, model_id: ModelId) -> None:
    request_id = await send_pass(gateway, model_id, 1)

    for path in (f"treadle/requests/{request_id}", f"treadle/runs/{model_id}/timing"):
        foreign = refused(await gateway.get(path, key=OTHER_KEY), 404)
        unknown = refused(await gateway.get(path.replace(model_id, "nothing")), 404)
        assert foreign.replace(model_id, "nothing") == unknown
    assert (await gateway.client.get(f"/api/v1/treadle/requests/{request_id}")).status_code == 401
