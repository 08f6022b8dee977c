"""Quotas: set by operators, in effect at once, and what a tenant at one of them is told."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
from gateway_support import MAX_CONTEXT, POOL, Harness, failed, ok, prompt, refused, sample_body
from gateway_surface import serve_text

from treadle.domain.ids import BlobKey, CheckpointKind, ModelId, RequestId, TenantId, TinkerPath
from treadle.domain.keys import key_digest
from treadle.domain.ops import LoraSpec, OpKind, SampleOp
from treadle.domain.outcome import EncodedResult
from treadle.domain.policy import DEFAULT_SCOPE, Quota
from treadle.domain.records import CheckpointRecord, FinishedCycle, FinishedRequest, ModelAdvance
from treadle.domain.states import ModelState
from treadle.domain.usage import SampleUsage
from treadle.gateway import GatewaySettings
from treadle.gateway.context import Gateway
from treadle.store.audit import Author
from treadle.testing.builders import datum, pass_op
from treadle.wire.passes import encode_pass

ADMIN, ALICE, BOB = "tml-admin", "tml-alice", "tml-bob"
TENANT = TenantId("user:alice")
PASS_TOKENS = 10
SETTINGS = GatewaySettings(is_loopback=True, hold_s=0.05, max_lora_rank=32)


@pytest.fixture
def settings() -> GatewaySettings:
    return SETTINGS


@dataclass
class World:
    """A gateway with an operator and two users."""

    gateway: Harness

    @property
    def part(self) -> Gateway:
        part = self.gateway.app.state.gateway
        assert isinstance(part, Gateway)
        return part

    async def admin(self, method: str, path: str, body: object = None, *, key: str = ADMIN) -> httpx.Response:
        options = {} if body is None else {"json": body}
        return await self.gateway.client.request(method, f"/admin/v1/{path}", headers={"X-API-Key": key}, **options)

    async def set(self, scope: str = "default", **limits: int | None) -> dict[str, int]:
        quotas: dict[str, int] = ok(await self.admin("PUT", f"quotas/{scope}", limits))["quotas"]
        return quotas

    async def join(self, organization: str | None) -> None:
        """Alice is in this organisation from now on."""
        ok(await self.admin("PUT", f"organizations/{organization}", {}))
        ok(await self.admin("PUT", f"tenants/{TENANT}", {"organization": organization}))

    async def create(self, session_id: str, number: int, **lora: object) -> dict[str, Any]:
        body = {
            "session_id": session_id,
            "model_seq_id": number,
            "base_model": POOL,
            "lora_config": {"rank": 8, **lora},
        }
        return ok(await self.gateway.post("create_model", body, key=ALICE))

    async def refusal(self, answer: Mapping[str, Any]) -> str:
        """Why this future has failed."""
        return failed(await self.gateway.future(answer["request_id"], key=ALICE))

    async def is_queued(self, answer: Mapping[str, Any]) -> bool:
        return (await self.gateway.future(answer["request_id"], key=ALICE)).status_code == 408

    async def send_pass(self, model_id: str, seq_id: int, num_tokens: int = PASS_TOKENS) -> dict[str, Any]:
        op = pass_op(seq_id, model_id=ModelId(model_id), datums=[datum(num_tokens)])
        headers = {"Content-Type": "application/x-protobuf"}
        answer = await self.gateway.post("forward_backward", content=encode_pass(op), headers=headers, key=ALICE)
        return ok(answer)

    async def finish(self, request_id: str, *, sampled: int = 0) -> None:
        """Commit a request as a leader does, whose picture of quotas is the newest."""
        policies = await self.part.policies.refresh()
        row = await self.gateway.row(request_id)
        usage = SampleUsage(num_prompt_tokens=3, num_sampled_tokens=sampled) if row.kind is OpKind.SAMPLE else None
        done = FinishedRequest(RequestId(request_id), result=EncodedResult("application/json", b"{}"), usage=usage)
        lease = await self.gateway.lease()
        if row.kind is OpKind.SAMPLE:
            await self.gateway.store.cycles.finish_samples(lease, [done], policies=policies)
        else:
            await self.gateway.store.cycles.finish(lease, FinishedCycle(finished=(done,)), policies=policies)

    async def standing(self, quota: Quota, *, key: str = ALICE) -> dict[str, Any]:
        quotas = ok(await self.gateway.get("quotas", key=key))["quotas"]
        [one] = [one for one in quotas if one["quota"] == quota]
        assert isinstance(one, dict)
        return one


@pytest.fixture
async def world(gateway: Harness) -> World:
    for user, key in (("ops", ADMIN), ("alice", ALICE), ("bob", BOB)):
        await gateway.store.keys.add(user, key_digest(key), is_admin=key == ADMIN)
    return World(gateway)


@pytest.fixture
async def session_id(world: World) -> str:
    return await world.gateway.new_session(key=ALICE)


@pytest.fixture
async def model_id(world: World, session_id: str) -> str:
    return await world.gateway.new_model(session_id, 100, key=ALICE)


@pytest.fixture
async def sampler_id(world: World, session_id: str) -> str:
    return await world.gateway.new_sampler(session_id, key=ALICE)


class TestSetting:
    async def test_what_is_absent_stays_and_null_unsets(self, world: World) -> None:
        assert await world.set(max_models=3, max_lora_rank=16) == {"max_models": 3, "max_lora_rank": 16}
        assert await world.set(max_models=None, max_checkpoints=5) == {"max_lora_rank": 16, "max_checkpoints": 5}
        answer = ok(await world.admin("GET", "quotas"))
        assert answer["scopes"] == [{"scope": "default", "quotas": {"max_checkpoints": 5, "max_lora_rank": 16}}]
        assert {one["quota"] for one in answer["quotas"]} == set(Quota)
        assert ok(await world.admin("DELETE", "quotas/default"))["quotas"] == {}
        assert ok(await world.admin("GET", "quotas"))["scopes"] == []

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ({"max_lora_rank": 33}, "max_lora_rank=33 is above 32, which this server's settings allow at most"),
            ({"max_lora_rank": 0}, "max_lora_rank=0 is below 1"),
            (
                {"max_context_length": MAX_CONTEXT + 1},
                f"max_context_length={MAX_CONTEXT + 1} is above {MAX_CONTEXT}, which the models of this server allow",
            ),
            ({"max_concurrent_samples": 4_097}, "is above 4096, which this server's settings allow at most"),
            ({"max_queued_tokens": 10**12}, "is above 512000000"),
            ({"trained_tokens_per_minute": 0}, "is below 1"),
            ({"max_models": -1}, "max_models=-1"),
            ({"max_models": "3"}, "max_models='3'"),
            ({"max_models": 1.5}, "max_models=1.5"),
            ({"max_models": 2**53}, "max_models"),
            ({"max_gpus": 1}, "'max_gpus' is not a quota; known: max_lora_rank, max_context_length, max_models"),
        ],
    )
    async def test_a_value_that_cannot_be_kept_is_refused_and_nothing_of_it_set(
        self, world: World, body: dict[str, object], words: str
    ) -> None:
        answer = await world.admin("PUT", "quotas/default", {"max_checkpoints": 1, **body})
        assert words in refused(answer, 400)
        assert ok(await world.admin("GET", "quotas"))["scopes"] == []

    @pytest.mark.parametrize("scope", ["default:x", "tenant:", "team:a", "organization", "tenant:" + "a" * 600])
    async def test_a_scope_has_one_of_three_forms(self, world: World, scope: str) -> None:
        assert "scope" in refused(await world.admin("PUT", f"quotas/{scope}", {"max_models": 1}), 400)

    async def test_every_change_is_audited_with_what_was_there_before(self, world: World) -> None:
        await world.set("tenant:user:alice", max_models=3)
        await world.set("tenant:user:alice", max_models=3)
        await world.set("tenant:user:alice", max_models=4)
        ok(await world.admin("DELETE", "quotas/tenant:user:alice"))
        events = await world.gateway.store.audit.read(TenantId("user:ops"), since=0, before=1e12)
        assert events is not None
        assert [(one.event, one.subject, one.details["before"], one.details["after"]) for one in events] == [
            ("quota.set", "tenant:user:alice", {}, {"max_models": 3}),
            ("quota.set", "tenant:user:alice", {"max_models": 3}, {"max_models": 4}),
            ("quota.deleted", "tenant:user:alice", {"max_models": 4}, None),
        ]
        assert all(one.actor == "user:ops (key 1)" for one in events)

    async def test_users_may_not_look_at_others_or_set(self, world: World) -> None:
        for method, path in (
            ("GET", "quotas"),
            ("PUT", "quotas/default"),
            ("DELETE", "quotas/default"),
            ("GET", "tenants/user:bob/quotas"),
        ):
            refused(await world.admin(method, path, {"max_models": 1} if method == "PUT" else None, key=ALICE), 403)


class TestScopes:
    async def test_the_narrowest_scope_counts_and_the_server_where_none_says_anything(self, world: World) -> None:
        async def rank() -> tuple[int, str]:
            one = await world.standing(Quota.RANK)
            return one["limit"], one["scope"]

        assert await rank() == (32, "server")
        await world.set("default", max_lora_rank=8)
        assert await rank() == (8, "default")
        await world.join("acme")
        await world.set("organization:acme", max_lora_rank=16)
        assert await rank() == (16, "organization:acme")
        await world.set("tenant:user:alice", max_lora_rank=4)
        assert await rank() == (4, "tenant:user:alice")
        assert (await world.standing(Quota.RANK, key=BOB))["limit"] == 8
        assert (await world.standing(Quota.MODELS))["limit"] is None

    async def test_a_limit_set_in_another_process_is_followed(self, world: World, session_id: str) -> None:
        """As the watch of every server does some times a second."""
        store = world.gateway.store
        await store.quotas.change(DEFAULT_SCOPE, {Quota.RANK: 4}, Author(TenantId("user:ops"), "user:ops"))
        async with asyncio.timeout(10):
            while (await world.standing(Quota.RANK))["limit"] != 4:  # noqa: ASYNC110 (a watch sets no event)
                await asyncio.sleep(0.05)
        assert "quota max_lora_rank" in await world.refusal(await world.create(session_id, 0, rank=8))


class TestRuns:
    async def test_a_rank_over_the_quota_fails_through_the_future(self, world: World, session_id: str) -> None:
        await world.set(max_lora_rank=4)
        assert await world.refusal(await world.create(session_id, 0, rank=5)) == (
            "quota max_lora_rank: rank 5 is asked for, and your limit is 4; ask an operator to raise it"
        )
        assert await world.is_queued(await world.create(session_id, 1, rank=4))

    async def test_a_checkpoint_of_a_higher_rank_makes_no_run(
        self, world: World, session_id: str, model_id: str
    ) -> None:
        path = await publish(world, model_id, "a")
        await world.set(max_lora_rank=4)
        body = {"session_id": session_id, "model_seq_id": 0, "path": path, "optimizer": True}
        answer = ok(await world.gateway.post("load_weights", body, key=ALICE))
        assert "quota max_lora_rank: rank 8 is asked for, and your limit is 4" in await world.refusal(answer)

    async def test_one_run_too_many_fails_through_the_future(self, world: World, session_id: str) -> None:
        await world.set(max_models=2)
        first = await world.create(session_id, 0)
        await world.create(session_id, 1)
        third = await world.create(session_id, 2)
        assert await world.refusal(third) == (
            "quota max_models: you have 2 of 2 models; unload one (unload_model) or finish the session of one, or ask "
            "an operator to raise it"
        )
        model = await world.gateway.store.models.get(ModelId(third["model_id"]))
        assert model is not None
        assert model.state is ModelState.FAILED
        # A replay gets its own first answer, whatever there is room for by now.
        await world.set(max_models=3)
        assert "quota max_models" in await world.refusal(await world.create(session_id, 2))
        await world.set(max_models=1)
        assert await world.create(session_id, 0) == first
        assert await world.is_queued(first)

    async def test_runs_of_finished_and_silent_sessions_do_not_count(self, world: World) -> None:
        await world.set(max_models=1)
        for _ in range(3):
            session_id = await world.gateway.new_session(key=ALICE)
            assert await world.is_queued(await world.create(session_id, 0))
            ok(await world.gateway.post(f"sessions/{session_id}/finish", {}, key=ALICE))
        session_id = await world.gateway.new_session(key=ALICE)
        assert await world.is_queued(await world.create(session_id, 0))
        assert (await world.standing(Quota.MODELS))["use"] == 1
        world.gateway.clock.advance(10_000)
        await world.gateway.store.retention.expire_sessions(silent_since=world.gateway.clock.now() - 1)
        assert (await world.standing(Quota.MODELS))["use"] == 0
        assert await world.is_queued(await world.create(await world.gateway.new_session(key=ALICE), 0))

    async def test_creations_at_once_do_not_exceed_it(self, world: World, session_id: str) -> None:
        await world.set(max_models=3)
        answers = await asyncio.gather(*(world.create(session_id, number) for number in range(12)))
        waiting = [answer for answer in answers if await world.is_queued(answer)]
        assert len(waiting) == 3

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("modules_to_save", ["lm_head"]),
            ("target_modules", ["q_proj"]),
            ("lora_alpha", 16),
            ("alpha", 16),
            ("use_dora", True),
        ],
    )
    async def test_what_lora_cannot_do_here_is_refused_by_name(
        self, world: World, session_id: str, field: str, value: object
    ) -> None:
        words = await world.refusal(await world.create(session_id, 0, **{field: value}))
        assert words.startswith(f"lora_config.{field}=")
        assert "is not a setting that this server knows" in words

    async def test_modules_to_save_beside_lora_config_is_not_ignored_either(
        self, world: World, session_id: str
    ) -> None:
        body = {
            "session_id": session_id,
            "model_seq_id": 0,
            "base_model": POOL,
            "lora_config": {"rank": 8},
            "modules_to_save": ["lm_head"],
        }
        answer = ok(await world.gateway.post("create_model", body, key=ALICE))
        assert "modules_to_save=['lm_head']" in await world.refusal(answer)


class TestContext:
    async def test_a_datum_that_is_too_long_fails_through_the_future(self, world: World, model_id: str) -> None:
        await world.set(max_context_length=8)
        assert await world.refusal(await world.send_pass(model_id, 1, num_tokens=9)) == (
            "datum 0: model_input has 9 tokens; the context length is 8; quota max_context_length: your limit is 8 "
            "tokens; ask an operator to raise it"
        )
        assert await world.is_queued(await world.send_pass(model_id, 2, num_tokens=8))

    async def test_a_prompt_and_what_follows_it_are_judged_together(self, world: World, sampler_id: str) -> None:
        await world.set(max_context_length=8)
        body = sample_body(sampler_id, 1, sampling_params={"max_tokens": 6})
        words = await world.refusal(ok(await world.gateway.post("asample", body, key=ALICE)))
        assert "3 prompt tokens + 6 max_tokens > 8; quota max_context_length: your limit is 8 tokens" in words

    async def test_a_sample_without_an_end_ends_at_the_quota(self, world: World, sampler_id: str) -> None:
        await world.set(max_context_length=8)
        body = sample_body(sampler_id, 1, prompt=prompt((1, 2, 3)), sampling_params={})
        answer = ok(await world.gateway.post("asample", body, key=ALICE))
        op = await world.gateway.op(answer["request_id"])
        assert isinstance(op, SampleOp)
        assert op.params.max_tokens == 5
        assert (await world.gateway.row(answer["request_id"])).num_tokens == 3 + 2 * 5

    async def test_a_quota_above_a_models_own_length_changes_nothing(self, world: World, model_id: str) -> None:
        await world.set(max_context_length=MAX_CONTEXT)
        words = await world.refusal(await world.send_pass(model_id, 1, num_tokens=MAX_CONTEXT + 1))
        assert words.endswith(f"the context length is {MAX_CONTEXT}")


class TestWaitingWork:
    async def test_samples_over_their_number_come_back_later(self, world: World, sampler_id: str) -> None:
        await world.set(max_concurrent_samples=2)
        first = ok(await world.gateway.post("asample", sample_body(sampler_id, 1), key=ALICE))
        ok(await world.gateway.post("asample", sample_body(sampler_id, 2), key=ALICE))
        answer = await world.gateway.post("asample", sample_body(sampler_id, 3), key=ALICE)
        assert refused(answer, 429) == (
            "quota max_concurrent_samples: you have 2 of 2 samples waiting or running; wait for one, or ask an "
            "operator to raise it"
        )
        # At once, though the backlog was not read again: a finished one leaves its place.
        await world.finish(first["request_id"])
        ok(await world.gateway.post("asample", sample_body(sampler_id, 3), key=ALICE))

    async def test_samples_at_once_do_not_exceed_it(self, world: World, sampler_id: str) -> None:
        await world.set(max_concurrent_samples=4)
        answers = await asyncio.gather(
            *(world.gateway.post("asample", sample_body(sampler_id, seq_id), key=ALICE) for seq_id in range(1, 25))
        )
        assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 20

    async def test_prompts_of_a_text_request_count_each(self, world: World) -> None:
        serve_text(world.gateway)
        await world.set(max_concurrent_samples=2)
        body = {"model": POOL, "prompt": ["a", "b", "c"], "max_tokens": 2}
        answer = await world.gateway.client.post("/v1/completions", json=body, headers={"X-API-Key": ALICE})
        assert answer.status_code == 429, answer.text
        assert "quota max_concurrent_samples" in answer.text

    async def test_queued_tokens_are_a_tenants_own(self, world: World, model_id: str, sampler_id: str) -> None:
        await world.set("tenant:user:alice", max_queued_tokens=11, max_queued_bytes=10**6)
        ok(await world.gateway.post("asample", sample_body(sampler_id, 1), key=ALICE))
        answer = await world.gateway.post("asample", sample_body(sampler_id, 2), key=ALICE)
        assert refused(answer, 429) == (
            "quota max_queued_tokens: 11 of your tokens wait; the limit is 11; ask an operator to raise it"
        )
        await world.send_pass(model_id, 1)
        sent = await world.send_pass(model_id, 2)
        waiting = (await world.gateway.future(sent["request_id"], key=ALICE)).json()
        assert waiting["queue_state"] == "paused_rate_limit"
        assert "quota max_queued_tokens" in waiting["queue_state_reason"]
        quotas = ok(await world.admin("GET", f"tenants/{TENANT}/quotas"))["quotas"]
        [one] = [one for one in quotas if one["quota"] == Quota.QUEUED_TOKENS]
        assert (one["limit"], one["use"], one["scope"]) == (11, 20, "tenant:user:alice")


class TestRates:
    async def test_sampled_tokens_push_samples_back_until_there_is_room(self, world: World, sampler_id: str) -> None:
        await world.set(sampled_tokens_per_minute=60)
        first = ok(await world.gateway.post("asample", sample_body(sampler_id, 1), key=ALICE))
        await world.finish(first["request_id"], sampled=90)
        words = refused(await world.gateway.post("asample", sample_body(sampler_id, 2), key=ALICE), 429)
        assert words.startswith("quota sampled_tokens_per_minute: 90 of 60 tokens are used; there is room in 30 s, at ")
        assert words.endswith("UTC; ask an operator to raise it")
        world.gateway.clock.advance(40)
        ok(await world.gateway.post("asample", sample_body(sampler_id, 2), key=ALICE))

    async def test_a_day_begins_at_midnight_of_utc(self, world: World, sampler_id: str) -> None:
        clock = world.gateway.clock
        clock.advance(86_400 - clock.now() % 86_400 - 3_600)
        await world.set(sampled_tokens_per_day=60)
        first = ok(await world.gateway.post("asample", sample_body(sampler_id, 1), key=ALICE))
        await world.finish(first["request_id"], sampled=60)
        words = refused(await world.gateway.post("asample", sample_body(sampler_id, 2), key=ALICE), 429)
        assert "quota sampled_tokens_per_day: 60 of 60 tokens are used; there is room in 3,600 s" in words
        assert " 00:00:00 UTC" in words
        clock.advance(3_601)
        ok(await world.gateway.post("asample", sample_body(sampler_id, 2), key=ALICE))

    async def test_training_ops_are_admitted_and_told_why_they_wait(self, world: World, model_id: str) -> None:
        await world.set(trained_tokens_per_minute=10)
        first = await world.send_pass(model_id, 1, num_tokens=20)
        await world.finish(first["request_id"])
        sent = await world.send_pass(model_id, 2)
        step = ok(
            await world.gateway.post("optim_step", {"model_id": model_id, "seq_id": 3, "adam_params": {}}, key=ALICE)
        )
        await self.check_told(world, sent, model_id)
        await self.check_told(world, step, model_id)
        world.gateway.clock.advance(70)
        await consume(world, model_id, 2)
        waiting = (await world.gateway.future(sent["request_id"], key=ALICE)).json()
        assert waiting["queue_state"] == "active"

    async def check_told(self, world: World, answer: Mapping[str, Any], model_id: str) -> None:
        await consume(world, model_id, 2)
        response = await world.gateway.future(answer["request_id"], key=ALICE)
        assert response.status_code == 408
        assert response.json()["queue_state"] == "paused_rate_limit"
        words = "quota trained_tokens_per_minute: 20 of 10 tokens are used; there is room in"
        assert response.json()["queue_state_reason"].startswith(words)
        shown = ok(await world.gateway.get(f"treadle/requests/{answer['request_id']}", key=ALICE))
        assert shown["queue_state"] == "paused_rate_limit"
        assert shown["reason"].startswith(words)

    async def test_others_are_not_affected(self, world: World, sampler_id: str) -> None:
        await world.set("tenant:user:alice", sampled_tokens_per_minute=1)
        first = ok(await world.gateway.post("asample", sample_body(sampler_id, 1), key=ALICE))
        await world.finish(first["request_id"], sampled=90)
        refused(await world.gateway.post("asample", sample_body(sampler_id, 2), key=ALICE), 429)
        other = await world.gateway.new_sampler(await world.gateway.new_session(key=BOB), key=BOB)
        ok(await world.gateway.post("asample", sample_body(other), key=BOB))

    async def test_what_is_used_is_shown(self, world: World, sampler_id: str) -> None:
        await world.set(sampled_tokens_per_minute=60, sampled_tokens_per_day=1_000)
        first = ok(await world.gateway.post("asample", sample_body(sampler_id, 1), key=ALICE))
        await world.finish(first["request_id"], sampled=90)
        one = await world.standing(Quota.SAMPLED_PER_MINUTE)
        assert (one["limit"], one["use"], one["unit"]) == (60, 90, "tokens per minute")
        assert one["room_at"] is not None
        one = await world.standing(Quota.SAMPLED_PER_DAY)
        assert (one["limit"], one["use"], one["room_at"]) == (1_000, 90, None)


class TestCopies:
    async def test_a_copy_counts_like_any_checkpoint(self, world: World, model_id: str) -> None:
        path = await publish(world, model_id, "a")
        await world.set(max_checkpoints=2)
        body = {"source_path": path, "destination_project_id": "p"}
        ok(await world.gateway.post("copy_weights", body, key=ALICE))
        answer = await world.gateway.post("copy_weights", body, key=ALICE)
        assert refused(answer, 400).startswith("quota max_checkpoints: you have 2 of 2 checkpoints; delete one, or ask")
        await world.set(max_checkpoints=None, max_checkpoint_bytes=25)
        answer = await world.gateway.post("copy_weights", body, key=ALICE)
        assert "your checkpoints have 20 of 25 bytes, and this one takes 10" in refused(answer, 400)
        assert (await world.standing(Quota.CHECKPOINT_BYTES))["use"] == 20


async def publish(world: World, model_id: str, name: str) -> str:
    """A checkpoint of ten bytes of Alice's."""
    path = str(TinkerPath(ModelId(model_id), CheckpointKind.TRAINING, name))
    record = CheckpointRecord(
        model_id=ModelId(model_id),
        tenant_id=TENANT,
        kind=CheckpointKind.TRAINING,
        name=name,
        tinker_path=path,
        blob_key=BlobKey(f"checkpoints/{name}"),
        size_bytes=10,
        seq_id=1,
        created_at=world.gateway.clock.now(),
        base_model=POOL,
        lora=LoraSpec(rank=8, seed=1),
        public=False,
    )
    await world.gateway.store.cycles.finish(await world.gateway.lease(), FinishedCycle(checkpoints=(record,)))
    return path


async def consume(world: World, model_id: str, next_seq_id: int) -> None:
    """What is in front of this number is over."""
    advance = ModelAdvance(model_id=ModelId(model_id), next_seq_id=next_seq_id)
    await world.gateway.store.cycles.finish(await world.gateway.lease(), FinishedCycle(advances=(advance,)))


class TestAheadOfItsRate:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        # No hold ends by itself.
        return replace(SETTINGS, hold_s=40)

    async def test_whoever_runs_ahead_of_its_rate_is_answered_late(self, world: World, model_id: str) -> None:
        """Two passes of 10 tokens are 30 s of this rate: the second is admitted, and answered behind the first."""
        await world.set(trained_tokens_per_minute=40)
        first = await world.send_pass(model_id, 1)
        second = asyncio.create_task(world.send_pass(model_id, 2))
        backlog = world.part.backlog
        async with asyncio.timeout(10):
            while not backlog.num_waiting:  # noqa: ASYNC110 (no event says that a call waits)
                await asyncio.sleep(0)
        assert await world.gateway.row(f"{model_id}:2")
        await world.finish(first["request_id"])
        async with asyncio.timeout(10):
            assert (await second)["request_id"] == f"{model_id}:2"
