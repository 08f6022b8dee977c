"""Pools and runs as operators see and change them over HTTP, and what users of them are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from gateway_support import OTHER_POOL, POOL, Harness, facts, failed, ok, refused, sample_body

from treadle.domain.commands import CommandKind, CommandOutcome
from treadle.domain.ids import ModelId, PoolName, RequestId, TenantId
from treadle.domain.keys import key_digest
from treadle.domain.ops import OpKind
from treadle.domain.outcome import EncodedResult
from treadle.domain.pool_decisions import PoolState
from treadle.domain.records import FinishedCycle, FinishedRequest, ModelAdvance, RunLogEntry, SnapshotRecord
from treadle.domain.roles import Scale
from treadle.domain.states import ModelState
from treadle.gateway import GatewaySettings, PoolView
from treadle.store.audit import Author
from treadle.store.slots import Slots, WorkerReport
from treadle.testing.builders import pass_op
from treadle.wire.passes import encode_pass
from treadle.wire.results import PROTOBUF

ADMIN, USER = "tml-admin", "tml-user"
ADDED = "org/added"


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.1, auth_methods=("keys",))


@dataclass
class Operator:
    gateway: Harness

    async def call(self, method: str, path: str, *, key: str = ADMIN, **options: Any) -> httpx.Response:
        return await self.gateway.client.request(method, f"/admin/v1/{path}", headers={"X-API-Key": key}, **options)

    async def get(self, path: str, **query: Any) -> dict[str, Any]:
        return ok(await self.call("GET", path, params=query))

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        return ok(await self.call("POST", path, json=body))

    async def pool(self, name: str) -> dict[str, Any]:
        [found] = [pool for pool in (await self.get("pools"))["pools"] if pool["name"] == name]
        assert isinstance(found, dict)
        return found

    async def events(self) -> list[tuple[str, str]]:
        found = await self.gateway.store.audit.read(TenantId("user:ops"), since=0.0, before=1e12)
        assert found is not None
        return [(event.event, str(event.subject)) for event in found]


@pytest.fixture
async def operator(gateway: Harness) -> Operator:
    for key, user in ((ADMIN, "ops"), (USER, "alice")):
        await gateway.store.keys.add(user, key_digest(key), is_admin=key == ADMIN)
    return Operator(gateway)


@pytest.fixture
async def run(gateway: Harness, operator: Operator) -> ModelId:
    """A run of the user that is ready."""
    session_id = await gateway.new_session(key=USER)
    model_id = ModelId(await gateway.new_model(session_id, key=USER))
    await gateway.store.cycles.finish(
        await gateway.lease(),
        FinishedCycle(
            advances=(ModelAdvance(model_id, next_seq_id=1, state=ModelState.READY, incarnation=1, changed_seq=0),),
            snapshots=(SnapshotRecord(model_id, seq_id=0, blob_key=None),),
        ),
    )
    return model_id


async def submit_pass(gateway: Harness, model_id: ModelId, seq_id: int = 1) -> RequestId:
    answer = await gateway.post(
        "forward_backward",
        content=encode_pass(pass_op(seq_id, model_id=model_id)),
        headers={"Content-Type": PROTOBUF},
        key=USER,
    )
    return RequestId(ok(answer)["request_id"])


async def waiting(gateway: Harness, request_id: RequestId) -> tuple[str, str]:
    """What the client of a queued request is told."""
    answer = await gateway.future(request_id, key=USER)
    assert answer.status_code == 408, answer.text
    body = answer.json()
    return body["queue_state"], body["queue_state_reason"]


async def test_pools_are_listed_with_what_operators_decided(operator: Operator) -> None:
    pools = (await operator.get("pools"))["pools"]
    assert [pool["name"] for pool in pools] == [POOL, OTHER_POOL]
    assert pools[0]["state"] == "serving"
    assert pools[0]["facts"]["architecture"] == "FakeForCausalLM"
    assert pools[0]["decided_at"] is None
    lease = await operator.gateway.lease()
    await operator.gateway.store.pools.publish(
        lease, facts=facts(), is_ready=True, reason="", num_workers=1, num_deaths=2
    )
    shown = await operator.pool(POOL)
    assert (shown["leader"], shown["cycle"], shown["num_workers"], shown["num_deaths"]) == ("test", 0, 1, 2)


async def test_a_pause_admits_and_tells_who_waits(operator: Operator, run: ModelId) -> None:
    gateway = operator.gateway
    answer = await operator.post("pools/pause", pool=POOL, reason="new disks until 14:00")
    assert (answer["state"], answer["reason"], answer["is_ready"]) == ("paused", "new disks until 14:00", True)
    request_id = await submit_pass(gateway, run)
    state, reason = await waiting(gateway, request_id)
    assert state == "paused_capacity"
    assert reason == f"base model {POOL} is paused by an operator: new disks until 14:00"
    sampler = await gateway.new_sampler(await gateway.new_session(key=USER), key=USER)
    sample = ok(await gateway.post("asample", sample_body(sampler), key=USER))["request_id"]
    assert await waiting(gateway, sample) == (state, reason)
    shown = ok(await gateway.get(f"treadle/requests/{request_id}", key=USER))
    assert shown["reason"] == reason
    await operator.post("pools/resume", pool=POOL)
    assert "paused" not in (await waiting(gateway, request_id))[1]
    assert await operator.events() == [("pool.paused", f"pool:{POOL}"), ("pool.resumed", f"pool:{POOL}")]


async def test_a_draining_pool_takes_nothing_new_and_serves_what_is_there(operator: Operator, run: ModelId) -> None:
    gateway = operator.gateway
    session_id = await gateway.new_session(key=USER)
    sampler = await gateway.new_sampler(session_id, key=USER)
    checkpoint = await gateway.publish(run, "a", public=True)
    await operator.post("pools/drain", pool=POOL, reason="it is replaced by v2")
    new = {"session_id": session_id, "model_seq_id": 5, "base_model": POOL, "lora_config": {"rank": 8}}
    created = ok(await gateway.post("create_model", new, key=USER))
    words = "takes no new runs and sampling sessions now: it is replaced by v2"
    assert words in failed(await gateway.future(created["request_id"], key=USER))
    load = {"session_id": session_id, "model_seq_id": 6, "path": checkpoint.tinker_path, "optimizer": False}
    loaded = ok(await gateway.post("load_weights", load, key=USER))
    assert words in failed(await gateway.future(loaded["request_id"], key=USER))
    sampling = {"session_id": session_id, "sampling_session_seq_id": 9, "base_model": POOL}
    assert words in refused(await gateway.post("create_sampling_session", sampling, key=USER), 400)
    # What exists goes on, also a creation whose answer was lost on its way.
    assert await gateway.new_sampler(session_id, key=USER) == sampler
    ok(await gateway.post("asample", sample_body(sampler), key=USER))
    assert (await gateway.row(await submit_pass(gateway, run))).state == "queued"
    await operator.post("pools/resume", pool=POOL)
    await gateway.new_sampler(session_id, 9, key=USER)


async def test_a_chat_on_a_draining_pool_is_refused_in_its_own_form(operator: Operator) -> None:
    await operator.post("pools/drain", pool=POOL, reason="old")
    body = {"model": POOL, "messages": [{"role": "user", "content": "hi"}]}
    answer = await operator.gateway.client.post("/v1/chat/completions", json=body, headers={"X-API-Key": USER})
    assert answer.status_code in (400, 404), answer.text


async def test_a_removed_pool_is_not_served_and_its_queue_waits(operator: Operator, run: ModelId) -> None:
    gateway = operator.gateway
    queued = await submit_pass(gateway, run)
    answer = await operator.post("pools/remove", pool=POOL, reason="nobody used it")
    assert (answer["state"], answer["is_ready"], answer["not_ready_reason"]) == ("removed", False, "it was removed")
    state, reason = await waiting(gateway, queued)
    assert (state, reason) == (
        "paused_capacity",
        f"base model {POOL} is not served now, an operator removed it: nobody used it",
    )
    late = await submit_pass(gateway, run, seq_id=2)
    assert "is not served" in failed(await gateway.future(late, key=USER))
    session_id = await gateway.new_session(key=USER)
    sampling = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": POOL}
    assert "(nobody used it); served: fake/other" in refused(
        await gateway.post("create_sampling_session", sampling, key=USER), 404
    )
    served = ok(await gateway.get("get_server_capabilities", key=USER))["supported_models"]
    assert POOL not in {model["model_name"] for model in served}
    for verb in ("pause", "resume", "drain"):
        assert "was removed" in refused(await operator.call("POST", f"pools/{verb}", json={"pool": POOL}), 400)
    # Added again as it was, it goes on. Another model under its name would not fit its runs.
    other = {"pool": POOL, "source": "org/other"}
    assert "leave out the source" in refused(await operator.call("POST", "pools", json=other), 400)
    answer = await operator.post("pools", pool=POOL)
    assert (answer["state"], answer["is_ready"]) == ("serving", True)
    assert "removed" not in (await waiting(gateway, queued))[1]


async def test_a_model_is_added_and_shown_before_any_server_has_it(operator: Operator) -> None:
    gateway = operator.gateway
    answer = await operator.post("pools", pool=ADDED, source="org/model", revision="v2")
    assert (answer["source"], answer["revision"], answer["is_added"]) == ("org/model", "v2", True)
    assert (answer["is_ready"], answer["facts"]) == (False, None)
    again = await operator.post("pools", pool=ADDED, source="org/model", revision="v2")
    assert again == answer
    assert await operator.events() == [("pool.added", f"pool:{ADDED}")]
    # As a server shows it that tried.
    gateway.pools.append(PoolView(PoolName(ADDED), reason="no such repository", source="org/model", revision="v2"))
    shown = await operator.pool(ADDED)
    assert (shown["is_ready"], shown["not_ready_reason"]) == (False, "no such repository")
    assert "served already, from org/model at v2" in refused(
        await operator.call("POST", "pools", json={"pool": ADDED, "source": "org/other"}), 400
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"pool": "a b", "source": "org/model"}, "not allowed"),
        ({"pool": "a/b/c", "source": "org/model"}, "two slashes"),
        ({"pool": "../x", "source": "org/model"}, "not allowed"),
        ({"pool": "treadle/tiny", "source": "org/model"}, "bundled model's name"),
        ({"pool": ADDED, "source": "../models"}, "absolute path"),
        ({"pool": ADDED, "source": "~/models"}, "absolute path"),
        ({"pool": ADDED, "source": "org/model\n"}, "no hub name"),
        ({"pool": ADDED, "source": "/models/x", "revision": "main"}, "no revisions"),
        ({"pool": ADDED, "revision": "main"}, "without its source"),
        ({"pool": ADDED}, "source is missing"),
        ({"pool": ADDED, "source": "org/model", "trust": True}, "trust"),
        ({"source": "org/model"}, "pool"),
    ],
)
async def test_names_and_sources_are_checked(operator: Operator, body: dict[str, object], words: str) -> None:
    assert words in refused(await operator.call("POST", "pools", json=body), 400)
    assert await operator.gateway.store.pool_settings.version() == 0


async def test_pools_that_nobody_knows_are_not_decided_about(operator: Operator) -> None:
    for verb in ("pause", "resume", "drain", "remove"):
        refused(await operator.call("POST", f"pools/{verb}", json={"pool": "org/nothing"}), 404)
    # Another server's, which this one does not have.
    assert await operator.gateway.store.leases.acquire(PoolName("org/elsewhere"), "another server", 100.0) is not None
    assert (await operator.post("pools/pause", pool="org/elsewhere"))["state"] == "paused"
    assert (await operator.pool("org/elsewhere"))["leader"] == "another server"


async def test_what_another_gateway_decided_is_followed(operator: Operator) -> None:
    author = Author(TenantId("user:ops"), "user:ops")
    await operator.gateway.store.pool_settings.decide(author, OTHER_POOL, PoolState.PAUSED, "there")
    await operator.gateway.app.state.gateway.deps.pools.refresh()
    assert (await operator.pool(OTHER_POOL))["reason"] == "there"


async def test_a_run_is_listed_and_inspected_whoever_owns_it(operator: Operator, run: ModelId) -> None:
    gateway = operator.gateway
    queued = await submit_pass(gateway, run)
    [listed] = (await operator.get("runs", tenant="user:alice", state="ready", pool=POOL))["runs"]
    assert (listed["training_run_id"], listed["tenant_id"], listed["state"]) == (run, "user:alice", "ready")
    assert (await operator.get("runs", state="lost"))["runs"] == []
    shown = await operator.get(f"runs/{run}")
    assert (shown["queued"]["num_ops"], shown["replay"]["num_ops"]) == (1, 0)
    assert shown["snapshots"][0]["is_seed"] is True
    assert shown["recent"] == []
    entry = RunLogEntry(run, 1, OpKind.FORWARD_BACKWARD, 1.0, {"loss:sum": 2.5}, queued_s=0.5, run_s=1.5, cycle=3)
    lease = await gateway.lease()
    done = FinishedRequest(queued, result=EncodedResult(PROTOBUF, b"x"))
    advance = ModelAdvance(run, next_seq_id=2, changed_seq=1)
    await gateway.store.cycles.finish(lease, FinishedCycle(finished=(done,), advances=(advance,), run_log=(entry,)))
    await gateway.store.slots.publish(lease, Slots([run]))
    shown = await operator.get(f"runs/{run}")
    assert (shown["is_resident"], shown["leader"]) == (True, "test")
    assert shown["queued"] == {"num_ops": 0, "num_tokens": 0, "num_bytes": 0, "oldest_s": None}
    assert (shown["replay"]["num_ops"], shown["replay"]["run_s"]) == (1, 1.5)
    assert shown["recent"][0]["metrics"] == {"loss:sum": 2.5}
    refused(await operator.call("GET", "runs/nothing:train:0"), 404)
    refused(await operator.call("GET", "runs", params={"after": "nonsense"}), 400)
    refused(await operator.call("GET", "runs", params={"state": "sleeping"}), 400)


async def test_runs_come_in_pages(operator: Operator, run: ModelId) -> None:
    session_id = await operator.gateway.new_session(key=USER)
    ids = {run} | {await operator.gateway.new_model(session_id, number, key=USER) for number in range(4)}
    seen, after = [], {}
    while True:
        page = await operator.get("runs", limit=2, **after)
        seen += [found["training_run_id"] for found in page["runs"]]
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert len(seen) == len(ids)
    assert set(seen) == ids


async def test_a_command_is_given_and_its_end_is_read(operator: Operator, run: ModelId) -> None:
    gateway = operator.gateway
    command_id = (await operator.post(f"runs/{run}/evict"))["command_id"]
    assert (await operator.post(f"runs/{run}/evict"))["command_id"] == command_id
    shown = await operator.get(f"commands/{command_id}")
    assert (shown["state"], shown["kind"], shown["training_run_id"]) == ("open", "evict", run)
    [open_one] = await gateway.store.commands.open_of(POOL)
    assert open_one.kind is CommandKind.EVICT
    await gateway.store.commands.end(await gateway.lease(), command_id, CommandOutcome(True, "gone"))
    shown = await operator.get(f"commands/{command_id}")
    assert (shown["state"], shown["message"]) == ("done", "gone")
    assert shown["created_by"].startswith("user:ops")
    assert await operator.events() == [("run.evict", f"run:{run}")]
    for unknown in ("999", "-1", "x", "1" * 40):
        refused(await operator.call("GET", f"commands/{unknown}"), 404)


async def test_commands_that_nobody_could_carry_out_are_refused(operator: Operator, run: ModelId) -> None:
    session_id = await operator.gateway.new_session(key=USER)
    fresh = await operator.gateway.new_model(session_id, key=USER)
    assert "creating" in refused(await operator.call("POST", f"runs/{fresh}/snapshot"), 400)
    refused(await operator.call("POST", "runs/nothing:train:0/evict"), 404)
    await operator.post("pools/remove", pool=POOL)
    assert "was removed" in refused(await operator.call("POST", f"runs/{run}/snapshot"), 400)


async def test_users_may_do_none_of_it(operator: Operator, run: ModelId) -> None:
    for method, path in (
        ("GET", "pools"),
        ("POST", "pools"),
        ("POST", "pools/remove"),
        ("GET", "runs"),
        ("GET", f"runs/{run}"),
        ("POST", f"runs/{run}/evict"),
        ("GET", "commands/1"),
    ):
        refused(await operator.call(method, path, key=USER), 403)
    assert await operator.gateway.store.pool_settings.version() == 0


async def test_a_pool_is_scaled_and_goes_back_to_its_settings(gateway: Harness, operator: Operator) -> None:
    before = await operator.pool(POOL)
    assert (before["wanted_workers"], before["wanted_samplers"], before["workers"]) == (None, None, [])
    scaled = await operator.post("pools/scale", pool=POOL, workers=3, samplers=1)
    assert (scaled["wanted_workers"], scaled["wanted_samplers"]) == (3, 1)
    decisions = await gateway.store.pool_settings.read()
    assert decisions.scale_of(PoolName(POOL), Scale()) == Scale(3, 1)
    # What else is decided about it leaves that alone.
    await operator.post("pools/pause", pool=POOL, reason="maintenance")
    assert (await operator.pool(POOL))["wanted_workers"] == 3
    assert (await operator.post("pools/scale", pool=POOL))["wanted_workers"] is None
    assert (await operator.pool(POOL))["state"] == "paused"
    assert (await operator.events())[-3:] == [
        ("pool.scaled", f"pool:{POOL}"),
        ("pool.paused", f"pool:{POOL}"),
        ("pool.scaled", f"pool:{POOL}"),
    ]
    for bad in ({"workers": 0}, {"workers": 257}, {"samplers": -1}, {"samplers": 257}, {"workers": "two"}):
        refused(await operator.call("POST", "pools/scale", json={"pool": POOL, **bad}), 400)
    failed = await operator.call("POST", "pools/scale", json={"pool": "no/such", "workers": 2})
    assert (failed.status_code, "does not exist" in failed.text) == (404, True)
    refused(await operator.call("POST", "pools/scale", key=USER, json={"pool": POOL, "workers": 2}), 403)


async def test_each_worker_of_a_pool_is_shown(gateway: Harness, operator: Operator) -> None:
    workers = [
        WorkerReport("0", "training", "up", num_tenants=2, num_runs=3),
        WorkerReport("s0", "sampling", "down", "no GPU"),
    ]
    await gateway.store.slots.publish(await gateway.lease(), Slots(workers=workers))
    [shown] = [pool for pool in (await operator.get("slots"))["pools"] if pool["pool"] == POOL]
    assert [(one["name"], one["role"], one["state"], one["num_runs"]) for one in shown["workers"]] == [
        ("0", "training", "up", 3),
        ("s0", "sampling", "down", 0),
    ]
    assert (await operator.pool(POOL))["workers"] == shown["workers"]
