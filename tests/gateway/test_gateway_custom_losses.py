"""Registering custom losses, and passes that use them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway_support import OTHER_KEY, Harness, failed, ok, refused

from treadle.domain.custom_loss import CustomLoss
from treadle.domain.ops import OpKind, PassOp
from treadle.domain.states import RequestState
from treadle.testing.builders import datum, pass_op
from treadle.wire import treadle_pb2 as pb
from treadle.wire.graphs import read_custom_loss
from treadle.wire.passes import encode_pass


def body_of(session_id: str, number: int = 0, *, target: str = "torch.exp", **changes: object) -> dict[str, Any]:
    """sum(f(logprobs) * weights)"""

    def node(op: str, name: str, target: str, *args: object) -> dict[str, object]:
        return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": {}}

    return {
        "session_id": session_id,
        "custom_loss_seq_id": number,
        "name": "mine",
        "inputs": [{"name": "logprobs", "rank": 1}, {"name": "weights", "rank": 1}],
        "graph": {
            "format": 1,
            "nodes": [
                node("placeholder", "logprobs", "logprobs"),
                node("placeholder", "weights", "weights"),
                node("call_function", "f", target, {"ref": "logprobs"}),
                node("call_function", "mul", "operator.mul", {"ref": "f"}, {"ref": "weights"}),
                node("call_method", "sum_1", "sum", {"ref": "mul"}),
                node("output", "output", "output", {"tuple": [{"ref": "sum_1"}, {"dict": {}}]}),
            ],
        },
        "type": "create_custom_loss",
        **changes,
    }


async def create(gateway: Harness, body: dict[str, Any], **options: str) -> str:
    """The id of the request that registers it."""
    return str(ok(await gateway.post("create_custom_loss", body, **options))["request_id"])


async def loss_id_of(gateway: Harness, session_id: str, number: int = 0) -> str:
    answer = ok(await gateway.future(await create(gateway, body_of(session_id, number))))
    assert answer["type"] == "create_custom_loss"
    return str(answer["loss_id"])


async def send_pass(gateway: Harness, model_id: str, settings: dict[str, str], *, seq_id: int = 1, key: str) -> str:
    message = pb.PassRequest()
    message.ParseFromString(encode_pass(pass_op(seq_id, model_id=model_id, datums=[datum(5)])))  # type: ignore[arg-type]
    message.loss_fn = "custom"
    for name, text in settings.items():
        message.loss_fn_settings[name].text = text
    headers = {"Content-Type": "application/x-protobuf"}
    answer = await gateway.post("forward_backward", content=message.SerializeToString(), headers=headers, key=key)
    return str(ok(answer)["request_id"])


async def test_a_registration_is_done_at_once_and_a_retry_gets_the_first(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    request_id = await create(gateway, body_of(session_id))
    assert await create(gateway, body_of(session_id, target="torch.log")) == request_id
    row = await gateway.row(request_id)
    assert (row.kind, row.state) == (OpKind.CREATE_CUSTOM_LOSS, RequestState.DONE)
    loss_id = ok(await gateway.future(request_id))["loss_id"]
    record = await gateway.store.custom_losses.get(loss_id)
    assert record is not None
    assert [node.target for node in read_custom_loss(record.definition).nodes][2] == "torch.exp"
    assert await loss_id_of(gateway, session_id, 1) != loss_id


async def test_the_first_registration_under_a_number_stays_also_when_it_failed(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    request_id = await create(gateway, body_of(session_id, target="os.system"))
    assert "os.system (node 'f') is not an operation of custom losses" in failed(await gateway.future(request_id))
    assert await create(gateway, body_of(session_id)) == request_id
    assert "os.system" in failed(await gateway.future(request_id))


async def test_concurrent_retries_make_one_loss(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    ids = await asyncio.gather(*(create(gateway, body_of(session_id)) for _ in range(8)))
    assert len(set(ids)) == 1
    assert ok(await gateway.future(ids[0]))["loss_id"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"graph": None}, "graph is missing"),
        ({"graph": {"format": 1, "nodes": [{"op": "output"}] * 10_000}}, "the graph has 10000 nodes"),
        ({"name": 7}, "name=7"),
        ({"inputs": "logprobs"}, "inputs='logprobs'"),
    ],
)
async def test_what_is_wrong_comes_through_the_future(gateway: Harness, changes: dict[str, Any], why: str) -> None:
    session_id = await gateway.new_session()
    assert why in failed(await gateway.future(await create(gateway, body_of(session_id, **changes))))


async def test_nesting_that_would_exhaust_a_stack_is_refused(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    body = body_of(session_id)
    value: object = 1
    for _ in range(300):
        value = [value]
    body["graph"]["nodes"][2]["args"] = [value]
    assert "nested" in failed(await gateway.future(await create(gateway, body)))


async def test_sessions_of_others_and_bodies_without_a_place_are_answered_at_once(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    foreign = refused(await gateway.post("create_custom_loss", body_of(session_id), key=OTHER_KEY), 404)
    unknown = refused(await gateway.post("create_custom_loss", body_of("nobody"), key=OTHER_KEY), 404)
    assert foreign.replace(session_id, "ID") == unknown.replace("nobody", "ID")
    for field in ("session_id", "custom_loss_seq_id"):
        body = body_of(session_id)
        del body[field]
        assert field in refused(await gateway.post("create_custom_loss", body), 400)
    assert "larger than" in refused(
        await gateway.post("create_custom_loss", body_of(session_id, padding="x" * 2**20)), 413
    )


async def test_a_future_is_its_owners_alone(gateway: Harness) -> None:
    request_id = await create(gateway, body_of(await gateway.new_session()))
    refused(await gateway.future(request_id, key=OTHER_KEY), 404)


async def test_a_pass_is_stored_with_the_definition(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    loss_id = await loss_id_of(gateway, session_id)
    request_id = await send_pass(gateway, model_id, {"loss_id": loss_id}, key="tml-one")
    op = await gateway.op(request_id)
    assert isinstance(op, PassOp)
    assert isinstance(op.loss.custom, CustomLoss)
    record = await gateway.store.custom_losses.get(loss_id)  # type: ignore[arg-type]
    assert record is not None
    assert op.loss.custom == read_custom_loss(record.definition)


@pytest.mark.parametrize("is_own_session", [True, False])
async def test_another_session_of_the_tenant_may_use_it_and_another_tenant_may_not(
    gateway: Harness, *, is_own_session: bool
) -> None:
    loss_id = await loss_id_of(gateway, await gateway.new_session())
    key = "tml-one" if is_own_session else OTHER_KEY
    model_id = await gateway.new_model(await gateway.new_session(key=key), key=key)
    request_id = await send_pass(gateway, model_id, {"loss_id": loss_id}, key=key)
    if is_own_session:
        assert (await gateway.row(request_id)).state is RequestState.QUEUED
        return
    assert failed(await gateway.future(request_id, key=key)) == f"custom loss '{loss_id}' does not exist"


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        ({}, "custom loss '' does not exist"),
        ({"loss_id": "x" * 600}, "custom loss '' does not exist"),
        ({"loss_id": "a\0b"}, "custom loss '' does not exist"),
        ({"loss_id": "LOSS", "definition": "{}"}, "loss_fn_config key 'definition' is not known to custom"),
        ({"loss_id": "LOSS", "beta": "1"}, "loss_fn_config key 'beta' is not known to custom"),
    ],
)
async def test_settings_of_a_pass_name_the_loss_alone(gateway: Harness, sent: dict[str, str], why: str) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    loss_id = await loss_id_of(gateway, session_id)
    named = {name: loss_id if text == "LOSS" else text for name, text in sent.items()}
    assert why in failed(await gateway.future(await send_pass(gateway, model_id, named, key="tml-one")))
