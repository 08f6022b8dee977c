"""What operators see and decide: tenants, organisations, the audit log, usage, queue, slots, checkpoints."""

from __future__ import annotations

import asyncio
import csv
import io
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from gateway_support import POOL, Harness, ok, refused, sample_body

from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, RequestId, SessionId, TenantId
from treadle.domain.keys import key_digest
from treadle.domain.ops import LoraSpec
from treadle.domain.outcome import EncodedResult
from treadle.domain.records import CheckpointRecord, FinishedCycle, FinishedRequest, SessionRecord
from treadle.domain.states import SessionState
from treadle.domain.usage import HOUR_S, SampleUsage, hour_of
from treadle.gateway import GatewaySettings, create_app
from treadle.gateway.keyset import cursor_of
from treadle.store.slots import Slots
from treadle.testing.builders import pass_op
from treadle.wire.passes import encode_pass

ADMIN, ALICE, BOB = "tml-admin", "tml-alice", "tml-bob"
DAY_S = 24 * HOUR_S


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.1, auth_methods=("keys",))


@dataclass
class Operator:
    """An operator and two users of one gateway."""

    gateway: Harness

    async def call(self, method: str, path: str, *, key: str = ADMIN, **options: Any) -> httpx.Response:
        return await self.gateway.client.request(method, f"/admin/v1/{path}", headers={"X-API-Key": key}, **options)

    async def get(self, path: str, **query: Any) -> dict[str, Any]:
        return ok(await self.call("GET", path, params=query))

    async def put(self, path: str, **body: Any) -> dict[str, Any]:
        return ok(await self.call("PUT", path, json=body))

    async def pages(self, path: str, rows: str, *, limit: int, **query: Any) -> list[Any]:
        """All pages of a listing."""
        found: list[Any] = []
        after: dict[str, str] = {}
        while True:
            answer = await self.get(path, limit=limit, **query, **after)
            assert len(answer[rows]) <= limit
            found += answer[rows]
            if answer["next"] is None:
                return found
            after = {"after": answer["next"]}


@pytest.fixture
async def operator(gateway: Harness) -> Operator:
    for key, user in ((ADMIN, "ops"), (ALICE, "alice"), (BOB, "bob")):
        await gateway.store.keys.add(user, key_digest(key), is_admin=key == ADMIN)
    return Operator(gateway)


async def work(gateway: Harness, key: str, *, project: str | None = None, num_tokens: int = 5) -> tuple[str, str]:
    """A session with one finished pass and one finished sample of a sampler of the base model: it and its run."""
    body = {} if project is None else {"project_id": project}
    session_id = str(ok(await gateway.post("create_session", body, key=key))["session_id"])
    model_id = await gateway.new_model(session_id, key=key)
    op = replace(pass_op(1, model_id=ModelId(model_id)), forward_only=False)
    protobuf = {"Content-Type": "application/x-protobuf"}
    passed = ok(await gateway.post("forward_backward", content=encode_pass(op), headers=protobuf, key=key))
    await gateway.finish(passed["request_id"], b"done")
    sampler_id = await gateway.new_sampler(session_id, key=key)
    sampled = ok(await gateway.post("asample", sample_body(sampler_id), key=key))
    usage = SampleUsage(num_prompt_tokens=30, num_sampled_tokens=num_tokens, num_cached_tokens=10)
    result = EncodedResult("application/x-protobuf", b"")
    await gateway.commit(FinishedRequest(RequestId(sampled["request_id"]), result=result, usage=usage))
    return session_id, model_id


def session_of(tenant: str, session_id: str) -> SessionRecord:
    return SessionRecord(SessionId(session_id), TenantId(tenant), SessionState.ACTIVE, 1.0, 1.0)


async def checkpoint(gateway: Harness, model_id: str, user: str, name: str, **changes: Any) -> str:
    path = f"tinker://{model_id}/weights/{name}"
    record = CheckpointRecord(
        model_id=ModelId(model_id),
        tenant_id=TenantId(f"user:{user}"),
        kind=CheckpointKind.TRAINING,
        name=name,
        tinker_path=path,
        blob_key=BlobKey(f"checkpoints/{name}"),
        size_bytes=10,
        seq_id=1,
        created_at=gateway.clock.now(),
        base_model=POOL,
        lora=LoraSpec(rank=8, seed=1),
    )
    await gateway.store.cycles.finish(await gateway.lease(), FinishedCycle(checkpoints=(replace(record, **changes),)))
    return path


async def test_tenants_are_listed_in_pages_and_found(operator: Operator) -> None:
    everybody = [f"user:t{number:02}" for number in range(7)]
    for tenant in everybody:
        await operator.put(f"tenants/{tenant}", weight_class="bulk")
    await operator.put("organizations/acme", description="Acme Inc.")
    await operator.put("tenants/user:t03", organization="acme")

    listed = await operator.pages("tenants", "tenants", limit=3)
    assert [row["tenant_id"] for row in listed] == sorted(["user:alice", "user:bob", "user:ops", *everybody])
    assert [row["tenant_id"] for row in (await operator.get("tenants", organization="acme"))["tenants"]] == ["user:t03"]
    assert [row["user"] for row in (await operator.get("tenants", q="ALI"))["tenants"]] == ["alice"]
    assert (await operator.get("tenants", q="t0", limit=2))["tenants"][1]["tenant_id"] == "user:t01"


async def test_tenants_without_a_row_are_listed_and_shown(operator: Operator) -> None:
    gateway = operator.gateway
    for number in range(5):
        await gateway.store.sessions.create(session_of(f"open:{number}", f"s-{number}"))
        await gateway.store.sessions.create(session_of(f"open:{number}", f"t-{number}"))

    listed = [row["tenant_id"] for row in await operator.pages("tenants", "tenants", limit=2, q="open")]
    everybody = [row["tenant_id"] for row in await operator.pages("tenants", "tenants", limit=2)]

    assert listed == [f"open:{number}" for number in range(5)]
    assert everybody == sorted([*listed, "user:alice", "user:bob", "user:ops"])
    shown = await operator.get("tenants/open:3")
    assert (shown["weight_class"], shown["created_at"], shown["num_active_sessions"]) == ("standard", None, 2)
    assert "does not exist" in refused(await operator.call("GET", "tenants/open:9"), 404)


async def test_a_tenant_is_shown_with_what_it_has_and_does(operator: Operator) -> None:
    gateway = operator.gateway
    session_id, model_id = await work(gateway, ALICE)
    num_tokens = (await gateway.row(f"{model_id}:1")).num_tokens
    await checkpoint(gateway, model_id, "alice", "one")
    ok(await gateway.post("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {}}, key=ALICE))

    shown = await operator.get("tenants/user:alice")

    assert (shown["user"], shown["source"], shown["is_suspended"]) == ("alice", "keys", False)
    assert (shown["num_keys"], shown["num_live_runs"], shown["num_active_sessions"]) == (1, 1, 1)
    assert (shown["num_checkpoints"], shown["checkpoint_bytes"]) == (1, 10)
    assert (shown["queued"]["training"]["num_ops"], shown["queued"]["sampling"]["num_ops"]) == (1, 0)
    used = shown["usage_today"]
    assert (used["training_tokens"], used["sampled_tokens"], used["cached_prefill_tokens"]) == (num_tokens, 5, 10)
    assert (await operator.get("tenants/user:bob"))["usage_today"]["training_tokens"] == 0
    assert session_id


async def test_a_change_is_audited_with_what_was_before(operator: Operator) -> None:
    await operator.put("tenants/user:alice", weight_class="interactive")
    await operator.put("tenants/user:alice", weight_class="bulk", is_suspended=True, suspended_reason="unpaid")
    await operator.put("tenants/user:alice", weight_class="bulk")

    events = (await operator.get("audit", subject="tenant:user:alice", event="tenant.changed"))["events"]

    assert len(events) == 2, "what changes nothing leaves no trace"
    newest = events[0]
    assert (newest["tenant_id"], newest["actor"]) == ("user:ops", "user:ops (key 1)")
    before, after = newest["details"]["before"], newest["details"]["after"]
    assert (before["weight_class"], before["is_suspended"]) == ("interactive", False)
    assert (after["weight_class"], after["suspended_reason"]) == ("bulk", "unpaid")
    assert await operator.gateway.store.tenants.classes() == {"user:alice": "bulk"}


async def test_a_suspended_tenant_is_refused_at_once_and_let_in_again(operator: Operator) -> None:
    gateway = operator.gateway
    assert (await gateway.get("sessions", key=ALICE)).status_code == 200
    await operator.put("tenants/user:alice", is_suspended=True, suspended_reason="unpaid")
    assert "unpaid" in refused(await gateway.get("sessions", key=ALICE), 403)
    assert (await gateway.get("sessions", key=BOB)).status_code == 200
    answer = await operator.put("tenants/user:alice", is_suspended=False)
    assert (answer["is_suspended"], answer["suspended_reason"]) == (False, None)
    assert (await gateway.get("sessions", key=ALICE)).status_code == 200


async def test_another_gateway_follows_a_suspension(operator: Operator) -> None:
    other = create_app(operator.gateway.deps())
    transport = httpx.ASGITransport(app=other)
    async with (
        other.router.lifespan_context(other),
        httpx.AsyncClient(transport=transport, base_url="http://other", headers={"X-API-Key": ALICE}) as client,
    ):
        assert (await client.get("/api/v1/sessions")).status_code == 200
        await operator.put("tenants/user:alice", is_suspended=True, suspended_reason="unpaid")
        async with asyncio.timeout(20):
            while (answer := await client.get("/api/v1/sessions")).status_code == 200:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.05)
        assert "unpaid" in refused(answer, 403)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("tenants/user:alice", {}, "nothing to change"),
        ("tenants/user:alice", {"suspended": True}, "suspended"),
        ("tenants/user:alice", {"weight_class": "best"}, "weight_class"),
        ("tenants/user:alice", {"organization": "nobody"}, "does not exist"),
        ("tenants/user:alice", {"suspended_reason": "x"}, "set is_suspended too"),
        ("tenants/user:ops", {"is_suspended": True}, "own access"),
        ("tenants/alice", {"weight_class": "bulk"}, "not a tenant's id"),
        ("organizations/a%20b", {}, "organization"),
        ("organizations/acme", {"name": "x"}, "name"),
    ],
)
async def test_what_cannot_be_decided_is_refused(
    operator: Operator, path: str, body: dict[str, object], words: str
) -> None:
    assert words in refused(await operator.call("PUT", path, json=body), 400)
    assert (await operator.get("audit"))["events"] == [
        event for event in (await operator.get("audit"))["events"] if event["event"] == "key.created"
    ]


async def test_an_organization_with_tenants_or_rules_is_not_deleted(operator: Operator) -> None:
    await operator.put("organizations/acme", description="one")
    await operator.put("organizations/acme", description="two")
    await operator.put("tenants/user:alice", organization="acme")
    assert (await operator.get("organizations/acme"))["num_tenants"] == 1
    assert "has 1 tenants" in refused(await operator.call("DELETE", "organizations/acme"), 400)

    await operator.put("tenants/user:alice", organization=None)
    assert (await operator.get("tenants/user:alice"))["organization"] is None
    ok(await operator.call("DELETE", "organizations/acme"))

    refused(await operator.call("GET", "organizations/acme"), 404)
    refused(await operator.call("DELETE", "organizations/acme"), 404)
    events = (await operator.get("audit", subject="organization:acme"))["events"]
    assert [event["event"] for event in events] == ["organization.deleted", "organization.set", "organization.set"]
    assert events[1]["details"] == {"before": {"description": "one"}, "after": {"description": "two"}}


async def test_the_audit_log_is_paged_newest_first_and_filtered(operator: Operator) -> None:
    gateway = operator.gateway
    times = []
    for number in range(6):
        await operator.put(f"organizations/o{number}", description="d")
        times.append(gateway.clock.now())
        # Some events have one time.
        gateway.clock.advance(number % 2)

    whole = (await operator.get("audit", event="organization.set"))["events"]
    assert [event["subject"] for event in whole] == [f"organization:o{number}" for number in (5, 4, 3, 2, 1, 0)]
    assert await operator.pages("audit", "events", limit=2, event="organization.set") == whole
    since = datetime.fromtimestamp(times[2], tz=UTC).isoformat()
    before = datetime.fromtimestamp(times[4], tz=UTC).isoformat()
    between = (await operator.get("audit", since=since, before=before, event="organization.set"))["events"]
    assert [event["subject"] for event in between] == ["organization:o3", "organization:o2"]
    assert (await operator.get("audit", actor="user:ops (key 1)", limit=1))["events"][0] == whole[0]
    assert (await operator.get("audit", actor="user:ops (key 2)"))["events"] == []
    assert (await operator.get("audit", actor="user:alice"))["events"] == []


@pytest.mark.parametrize("after", ["x", "W10", "WyJhIiwgImIiXQ", "-", "é", "bnVsbA"])
async def test_a_cursor_that_is_none_of_ours_is_refused(operator: Operator, after: str) -> None:
    for path in ("tenants", "audit", "checkpoints", "organizations", "usage"):
        if after == "WyJhIiwgImIiXQ" and path == "usage":
            continue
        assert "after=" in refused(await operator.call("GET", path, params={"after": after}), 400)


async def test_sums_of_all_groupings_agree(operator: Operator) -> None:
    gateway = operator.gateway
    for hours, (key, project) in enumerate(((ALICE, "p"), (ALICE, None), (BOB, "p"), (ALICE, "p"), (BOB, None))):
        await work(gateway, key, project=project, num_tokens=hours + 1)
        gateway.clock.advance(11 * HOUR_S)
    window = {
        "since": datetime.fromtimestamp(hour_of(gateway.clock.now()) - 80 * HOUR_S, tz=UTC).isoformat(),
        "before": datetime.fromtimestamp(hour_of(gateway.clock.now()), tz=UTC).isoformat(),
    }
    sums: dict[str, list[Any]] = {}
    for group_by in ("tenant", "run", "session", "project", "day", "hour"):
        for limit in (1, 2, 100):
            rows = await operator.pages("usage", "data", limit=limit, group_by=group_by, **window)
            assert sums.setdefault(group_by, rows) == rows

    totals = {name: {key: sum(row[key] for row in rows) for key in AMOUNTS} for name, rows in sums.items()}
    assert len({tuple(total.items()) for total in totals.values()}) == 1
    assert totals["day"]["sampled_tokens"] == 1 + 2 + 3 + 4 + 5
    assert totals["day"]["prefill_tokens"] == 5 * 20
    assert [row["tenant_id"] for row in sums["tenant"]] == ["user:alice", "user:bob"]
    assert [row["sampled_tokens"] for row in sums["tenant"]] == [1 + 2 + 4, 3 + 5]
    named = {(row["user"], row["project_id"]): row["sampled_tokens"] for row in sums["project"]}
    assert named == {("alice", "p"): 1 + 4, ("alice", "default"): 2, ("bob", "p"): 3, ("bob", "default"): 5}
    assert len(sums["session"]) == 5
    assert len(sums["run"]) == 5 + 2, "samples of the base model are of no run"
    assert len(sums["hour"]) == 5
    assert all(datetime.fromisoformat(row["bucket_start"]).hour == 0 for row in sums["day"])
    assert len(sums["day"]) in (2, 3)
    of_alice = await operator.get("usage", group_by="day", tenant="user:alice", **window)
    assert sum(row["sampled_tokens"] for row in of_alice["data"]) == 7


AMOUNTS = (
    "training_tokens",
    "prefill_tokens",
    "cached_prefill_tokens",
    "sampled_tokens",
    "checkpoints",
    "storage_byte_hours",
)


async def test_usage_is_exported_as_csv(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = operator.gateway
    for project in ("a,b", '=HYPERLINK("x")', "c"):
        await work(gateway, ALICE, project=project)
    monkeypatch.setattr("treadle.gateway.routes.admin.records.MAX_PAGE_ROWS", 2)

    answer = await operator.call("GET", "usage.csv", params={"group_by": "project"})

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert sorted(row["project_id"] for row in rows) == sorted(["a,b", '\'=HYPERLINK("x")', "c"])
    assert {row["sampled_tokens"] for row in rows} == {"5"}
    assert list(rows[0]) == ["tenant_id", "project_id", *AMOUNTS]


@pytest.mark.parametrize(
    "time",
    ["0001-01-01T00:00:00+14:00", "9999-12-31T23:00:00-12:00", "9999-12-31T23:00:00Z", "1969-12-31T23:00:00Z"],
)
async def test_times_beyond_the_calendar_are_refused(operator: Operator, time: str) -> None:
    for name in ("since", "before"):
        for route in ("usage", "usage.csv"):
            refused(await operator.call("GET", route, params={name: time}), 400)
        assert (await operator.call("GET", "audit", params={name: time})).status_code in (200, 400)


async def test_places_beyond_any_number_are_no_errors_of_the_server(operator: Operator) -> None:
    for place in ([2**63 - 1], [2**62], [-(2**62)], [-(2**63)]):
        for group_by in ("day", "hour"):
            for tenant in ({}, {"tenant": "user:alice"}):
                query = {"group_by": group_by, "after": cursor_of(place), **tenant}
                assert (await operator.call("GET", "usage", params=query)).status_code in (200, 400)
    for place in ([1e308, 2**62], [-1e308, 0]):
        ok(await operator.call("GET", "audit", params={"after": cursor_of(place)}))


async def test_hours_are_whole_ones(operator: Operator) -> None:
    half = "2026-01-01T00:30:00Z"
    assert "hour of UTC" in refused(await operator.call("GET", "usage", params={"since": half}), 400)
    window = {"since": "2026-01-02T00:00:00Z", "before": "2026-01-01T00:00:00Z"}
    assert "in front of" in refused(await operator.call("GET", "usage.csv", params=window), 400)


async def test_checkpoints_of_all_tenants_are_listed_unpublished_and_deleted(operator: Operator) -> None:
    gateway = operator.gateway
    _, of_alice = await work(gateway, ALICE)
    _, of_bob = await work(gateway, BOB)
    paths = []
    for number in range(5):
        paths.append(await checkpoint(gateway, of_alice, "alice", f"c{number}", public=number == 0))
        gateway.clock.advance(number % 2)
    paths.append(await checkpoint(gateway, of_bob, "bob", "of-bob"))
    await checkpoint(gateway, of_bob, "bob", "over", expires_at=gateway.clock.now() - 1)

    listed = await operator.pages("checkpoints", "checkpoints", limit=2)
    assert {row["tinker_path"] for row in listed} == set(paths)
    times = [row["created_at"] for row in listed]
    assert times == sorted(times, reverse=True)
    [own] = await operator.pages("checkpoints", "checkpoints", limit=2, tenant="user:bob")
    assert (own["user"], own["kind"], own["lora_rank"], own["public"]) == ("bob", "weights", 8, False)
    assert [row["name"] for row in await operator.pages("checkpoints", "checkpoints", limit=9, public=True)] == ["c0"]

    for _ in range(2):
        ok(await operator.call("POST", "checkpoints/unpublish", json={"path": paths[0]}))
    ok(await operator.call("POST", "checkpoints/delete", json={"path": paths[5]}))
    refused(await operator.call("POST", "checkpoints/delete", json={"path": paths[5]}), 404)
    refused(await operator.call("POST", "checkpoints/delete", json={"path": "nothing"}), 400)

    assert (await operator.get("checkpoints", public=True))["checkpoints"] == []
    assert (await operator.get("checkpoints", tenant="user:bob"))["checkpoints"] == []
    events = [event for event in (await operator.get("audit"))["events"] if event["event"].startswith("checkpoint.")]
    assert [(event["event"], event["subject"]) for event in events] == [
        ("checkpoint.deleted", f"checkpoint:{paths[5]}"),
        ("checkpoint.unpublished", f"checkpoint:{paths[0]}"),
    ]
    assert events[0]["details"]["before"]["tenant_id"] == "user:bob"


async def test_the_queue_shows_who_waits_where(operator: Operator) -> None:
    gateway = operator.gateway
    _, of_alice = await work(gateway, ALICE)
    session_id, of_bob = await work(gateway, BOB)
    await operator.put("tenants/user:bob", weight_class="bulk")
    ok(await gateway.post("optim_step", {"model_id": of_alice, "seq_id": 2, "adam_params": {}}, key=ALICE))
    gateway.clock.advance(7)
    ok(await gateway.post("optim_step", {"model_id": of_bob, "seq_id": 2, "adam_params": {}}, key=BOB))
    ok(await gateway.post("asample", sample_body(f"{session_id}:sample:0", 2), key=BOB))

    [pool] = (await operator.get("queue", pool=POOL))["pools"]

    assert (pool["pool"], pool["leader"], pool["num_tenants"]) == (POOL, "test", 2)
    assert (pool["training"]["num_ops"], pool["sampling"]["num_ops"]) == (2, 1)
    assert (pool["training"]["oldest_s"], pool["sampling"]["oldest_s"]) == (7, 0)
    bob, alice = pool["tenants"]
    assert (bob["tenant_id"], bob["weight_class"], alice["weight_class"]) == ("user:bob", "bulk", "standard")
    assert bob["sampling"]["num_tokens"] > 0
    assert alice["sampling"] == {"num_ops": 0, "num_tokens": 0, "num_bytes": 0, "oldest_s": None}
    [first] = (await operator.get("queue", pool=POOL, limit=1))["pools"]
    assert (first["num_tenants"], first["tenants"]) == (2, [bob])
    assert (await operator.get("queue", pool="nothing"))["pools"] == []


async def test_slots_are_what_the_leader_of_now_reported(operator: Operator) -> None:
    gateway = operator.gateway
    _, of_alice = await work(gateway, ALICE)
    lease = await gateway.lease()
    [pool] = (await operator.get("slots", pool=POOL))["pools"]
    assert (pool["leader"], pool["num_runs"], pool["reported_at"]) == ("test", None, None)

    slots = Slots([ModelId(of_alice), ModelId("gone")], {TenantId("user:bob"): 3})
    await gateway.store.slots.publish(lease, slots)

    [pool] = (await operator.get("slots", pool=POOL))["pools"]
    assert (pool["num_runs"], pool["num_samples"]) == (2, 3)
    [run] = pool["runs"]
    assert (run["model_id"], run["tenant_id"], run["lora_rank"]) == (of_alice, "user:alice", 8)
    assert pool["samples"] == [{"tenant_id": "user:bob", "num_samples": 3}]
    await gateway.lease()
    [pool] = (await operator.get("slots", pool=POOL))["pools"]
    assert pool["num_runs"] is None, "another leader's report is none"


@pytest.mark.parametrize("route", ["tenants", "audit", "usage", "usage.csv", "checkpoints", "queue", "slots"])
async def test_a_misspelt_parameter_is_refused_and_no_user_may_ask(operator: Operator, route: str) -> None:
    assert "tennant" in refused(await operator.call("GET", route, params={"tennant": "user:alice"}), 400)
    refused(await operator.call("GET", route, key=ALICE), 403)
    refused(await operator.call("GET", route, key="tml-nobody"), 401)
