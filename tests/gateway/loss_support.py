"""A gateway with operators and users, and losses that they may or may not run."""

from __future__ import annotations

from typing import Any

import httpx
from gateway_support import POOL, Harness, ok
from test_gateway_custom_losses import body_of

from treadle.domain.ids import TenantId
from treadle.domain.keys import key_digest
from treadle.domain.named_losses import NewSubmission, ReviewResult, Submission
from treadle.domain.ops import PassOp
from treadle.store.audit import Author
from treadle.wire import treadle_pb2 as pb
from treadle.wire.graphs import CreateCustomLossBody, custom_loss_of, write_custom_loss
from treadle.wire.passes import encode_pass

ADMIN_KEY, ALICE_KEY, BOB_KEY = "tml-admin", "tml-alice", "tml-bob"
ALICE, BOB = TenantId("user:alice"), TenantId("user:bob")
OPERATOR = Author(TenantId("user:root"), "user:root:1")
PROTOBUF_HEADERS = {"Content-Type": "application/x-protobuf"}


async def add_users(gateway: Harness) -> None:
    """An operator; alice of the organisation acme; bob of none."""
    await gateway.store.keys.add("root", key_digest(ADMIN_KEY), True)
    await gateway.store.keys.add("alice", key_digest(ALICE_KEY), False, organization="acme")
    await gateway.store.keys.add("bob", key_digest(BOB_KEY), False)
    await refresh(gateway)


async def refresh(gateway: Harness) -> None:
    """What was decided is known to the gateway."""
    await gateway.app.state.gateway.policies.refresh()


async def admin(
    gateway: Harness, method: str, path: str, body: object = None, *, key: str = ADMIN_KEY
) -> httpx.Response:
    options: dict[str, Any] = {} if body is None else {"json": body}
    return await gateway.client.request(method, f"/admin/v1/{path}", headers={"X-API-Key": key}, **options)


async def rule(gateway: Harness, scope: str, loss: str, **says: object) -> None:
    ok(await admin(gateway, "PUT", f"losses/rules/{scope}/{loss}", says))


async def new_run(gateway: Harness, *, key: str = ALICE_KEY, metadata: dict[str, str] | None = None) -> str:
    session_id = await gateway.new_session(key=key)
    body = {
        "session_id": session_id,
        "model_seq_id": 0,
        "base_model": POOL,
        "lora_config": {"rank": 8},
        "user_metadata": metadata or {},
    }
    answer = ok(await gateway.post("create_model", body, key=key))
    await gateway.finish(answer["request_id"], b"{}")
    return str(answer["model_id"])


async def send(gateway: Harness, op: PassOp, *, key: str = ALICE_KEY, loss_fn: str | None = None) -> str:
    """The id of the request of a pass, with another name for its loss if one is given."""
    body = encode_pass(op)
    if loss_fn is not None:
        body += pb.PassRequest(loss_fn=loss_fn).SerializeToString()
    answer = await gateway.post("forward_backward", content=body, headers=PROTOBUF_HEADERS, key=key)
    return str(ok(answer)["request_id"])


def definition_of(name: str, *, function: str = "torch.exp") -> bytes:
    """sum(function(logprobs) * weights)"""
    fields = {**body_of("session", target=function), "name": name}
    return write_custom_loss(custom_loss_of(CreateCustomLossBody.model_validate(fields)))


async def submit(
    gateway: Harness, name: str, *, tenant_id: TenantId = ALICE, function: str = "torch.exp"
) -> Submission:
    definition = definition_of(name, function=function)
    return await gateway.store.named_losses.submit(
        NewSubmission(
            name=name,
            tenant_id=tenant_id,
            source="upload",
            revision=None,
            sha256="0" * 64,
            form="graph",
            content=definition,
            definition=definition,
        ),
        Author(tenant_id, f"{tenant_id}:1"),
    )


async def approve(gateway: Harness, submission: Submission, tenants: list[TenantId] | None = None) -> None:
    """Reviewed, passed and approved."""
    losses = gateway.store.named_losses
    if submission.review is None:
        await losses.begin_review(submission.named_loss_id, OPERATOR)
        await losses.finish_review(submission.named_loss_id, ReviewResult({"state": "passed"}), OPERATOR)
    await losses.approve(submission.named_loss_id, tenants, OPERATOR)
    await refresh(gateway)
