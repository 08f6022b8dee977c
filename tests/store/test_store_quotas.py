"""Quotas in the store: what is set, and what no transaction exceeds."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from store_builders import (
    MODEL,
    OTHER_TENANT,
    TENANT,
    checkpoint,
    creation,
    done,
    enqueue_all,
    lead,
    model,
    op,
    sample,
    sampling_session,
    session,
    snapshot,
    with_run,
)

from treadle.domain.ids import ModelId, PoolName, TenantId
from treadle.domain.ops import OpKind
from treadle.domain.policy import DEFAULT_SCOPE, Policies, Quota, Scope
from treadle.domain.rates import RATE_KEPT_S, RateKind
from treadle.domain.records import CheckpointRecord, FinishedCycle, ModelAdvance, NewRequest
from treadle.domain.states import Category, ModelState, RequestState
from treadle.domain.usage import SampleUsage
from treadle.store import Store
from treadle.store.audit import Author
from treadle.store.quotas import Saved, SaveLimits
from treadle.store.rates import READ_DAY_EVERY_S, READ_EVERY_S
from treadle.testing.clock import ManualClock

OTHER_POOL = PoolName("treadle/other")
AUTHOR = Author(TenantId("user:ops"), "user:ops (key 1)")


def limits(**quotas: int) -> Policies:
    return Policies(quotas={"default": {Quota(name): value for name, value in quotas.items()}})


async def test_what_is_set_is_in_the_picture_at_once(store: Store) -> None:
    scope = Scope("tenant", TENANT)
    version = (await store.policies.read()).version
    assert await store.quotas.change(DEFAULT_SCOPE, {Quota.MODELS: 3, Quota.RANK: 4}, AUTHOR) == {
        Quota.MODELS: 3,
        Quota.RANK: 4,
    }
    await store.quotas.change(scope, {Quota.MODELS: 5}, AUTHOR)
    picture = await store.policies.read()
    assert picture.version == version + 2
    assert (picture.quota(TENANT, Quota.MODELS), picture.quota(TENANT, Quota.RANK)) == (5, 4)
    assert picture.quota(OTHER_TENANT, Quota.MODELS) == 3
    assert await store.quotas.of(scope) == {Quota.MODELS: 5}

    assert await store.quotas.clear(scope, AUTHOR) == {Quota.MODELS: 5}
    assert await store.quotas.all() == {"default": {Quota.MODELS: 3, Quota.RANK: 4}}
    # Nothing changes, so nobody reads anything again.
    version = (await store.policies.read()).version
    await store.quotas.change(DEFAULT_SCOPE, {Quota.MODELS: 3, Quota.SAMPLES: None}, AUTHOR)
    await store.quotas.clear(scope, AUTHOR)
    assert (await store.policies.read()).version == version


class TestModels:
    async def test_runs_that_are_over_make_room(self, store: Store) -> None:
        await with_run(store, "s1:train:0", "s1:train:1")
        assert await store.quotas.num_models(TENANT) == 2
        request_id = await store.models.create(model("s1:train:2"), creation("s1:train:2"), max_alive=2)
        future = await store.requests.future(request_id)
        assert future is not None
        assert future.failure is not None
        assert future.failure.category is Category.USER
        assert "quota max_models: you have 2 of 2 models" in future.failure.message
        refused = await store.models.get(ModelId("s1:train:2"))
        assert refused is not None
        assert (refused.state, refused.state_message) == (ModelState.FAILED, future.failure.message)
        # It failed, so it has no line and takes no place.
        assert await store.quotas.num_models(TENANT) == 2
        assert all(row.model_id != "s1:train:2" for line in await store.requests.heads(op(1).pool) for row in line)

        assert await store.sessions.finish(session().session_id, "success")
        assert await store.quotas.num_models(TENANT) == 0

    async def test_a_replay_is_not_judged(self, store: Store) -> None:
        await with_run(store)
        request_id = await store.models.create(model(), creation(), max_alive=0)
        future = await store.requests.future(request_id)
        assert future is not None
        assert future.state is RequestState.QUEUED

    async def test_gateways_that_create_at_once_do_not_exceed_it(
        self, store: Store, database_url: str, clock: ManualClock
    ) -> None:
        await store.sessions.create(session(), None)
        other = await Store.open(database_url, clock=clock.now)
        try:
            ids = [f"s1:train:{number}" for number in range(20)]
            await asyncio.gather(
                *(
                    part.models.create(model(model_id), creation(model_id), max_alive=5)
                    for part, model_id in zip([store, other] * 10, ids, strict=True)
                )
            )
        finally:
            await other.close()
        assert await store.quotas.num_models(TENANT) == 5


def save(seq_id: int, name: str, *, size_bytes: int = 10, model_id: str = MODEL) -> tuple[NewRequest, CheckpointRecord]:
    record = replace(
        checkpoint(name, seq_id=seq_id, blob_key=f"blob/{seq_id}"), size_bytes=size_bytes, model_id=ModelId(model_id)
    )
    return op(seq_id, OpKind.SAVE_WEIGHTS, num_tokens=0, model_id=model_id), record


class TestCheckpoints:
    async def commit(self, store: Store, policies: Policies, *saves: tuple[NewRequest, CheckpointRecord]) -> list[str]:
        """Commit these saves as one cycle; why each failed, "" where it did not. The blobs that nobody names go."""
        await enqueue_all(store, [request for request, _ in saves])
        unused = await store.cycles.finish(
            await lead(store),
            FinishedCycle(
                finished=tuple(done(request) for request, _ in saves),
                checkpoints=tuple(record for _, record in saves),
                snapshots=tuple(snapshot(record.seq_id, blob_key=record.blob_key) for _, record in saves[:1]),
                advances=(ModelAdvance(ModelId(MODEL), next_seq_id=saves[-1][1].seq_id + 1),),
            ),
            policies=policies,
        )
        futures = [await store.requests.future(request.request_id) for request, _ in saves]
        messages = ["" if one is None or one.failure is None else one.failure.message for one in futures]
        refused = [record.blob_key for (_, record), message in zip(saves, messages, strict=True) if message]
        # The first one's is a snapshot as well.
        assert list(unused) == [key for key in refused if key != saves[0][1].blob_key]
        return messages

    async def test_what_is_queued_behind_each_other_is_judged_in_order(self, store: Store) -> None:
        await with_run(store)
        first = await self.commit(store, limits(max_checkpoints=3), save(1, "a"), save(2, "b"))
        assert first == ["", ""]
        words = "quota max_checkpoints: you have 3 of 3 checkpoints; delete one, or ask an operator to raise it"
        later = await self.commit(store, limits(max_checkpoints=3), save(3, "c"), save(4, "d"), save(5, "e"))
        assert later == ["", words, words]
        assert await store.quotas.saved(TENANT) == Saved(3, 30)
        assert not await store.checkpoints.exists(save(4, "d")[1].tinker_path)
        # A failed save is no event of the audit log, and its usage is not counted.
        events = await store.audit.read(TENANT, since=0, before=1e12)
        assert events is not None
        assert [event.event for event in events] == ["checkpoint_save"] * 3

    async def test_bytes_are_those_that_were_written(self, store: Store) -> None:
        await with_run(store)
        policies = limits(max_checkpoint_bytes=100)
        results = await self.commit(
            store, policies, save(1, "a", size_bytes=60), save(2, "b", size_bytes=41), save(3, "c", size_bytes=40)
        )
        assert results == [
            "",
            "quota max_checkpoint_bytes: your checkpoints have 60 of 100 bytes, and this one takes 41; delete one, or "
            "ask an operator to raise it",
            "",
        ]
        assert await store.quotas.saved(TENANT) == Saved(2, 100)

    async def test_a_save_over_its_own_name_adds_what_it_is_larger_by(self, store: Store) -> None:
        await with_run(store)
        policies = limits(max_checkpoints=1, max_checkpoint_bytes=100)
        assert await self.commit(store, policies, save(1, "a", size_bytes=90)) == [""]
        assert await self.commit(store, policies, save(2, "a", size_bytes=100)) == [""]
        [refusal] = await self.commit(store, policies, save(3, "a", size_bytes=101))
        assert "have 100 of 100 bytes, and this one takes 1" in refusal
        kept = await store.checkpoints.find(save(3, "a")[1].tinker_path)
        assert kept is not None
        assert (kept.seq_id, kept.size_bytes) == (2, 100)

    async def test_who_is_above_a_limit_that_was_lowered_may_still_save_over_a_name(self, store: Store) -> None:
        await with_run(store)
        assert await self.commit(store, Policies(), save(1, "a", size_bytes=90), save(2, "b")) == ["", ""]
        tight = limits(max_checkpoints=1, max_checkpoint_bytes=10)
        assert await self.commit(store, tight, save(3, "a", size_bytes=80)) == [""]
        assert await self.commit(store, tight, save(4, "c")) != [""]

    async def test_expired_ones_make_room(self, store: Store, clock: ManualClock) -> None:
        await with_run(store)
        request, record = save(1, "a")
        policies = limits(max_checkpoints=1)
        expiring = request, replace(record, expires_at=clock.now() + 10)
        assert await self.commit(store, policies, expiring) == [""]
        assert (await self.commit(store, policies, save(2, "b")))[0] != ""
        clock.advance(11)
        assert await self.commit(store, policies, save(3, "b")) == [""]

    async def test_leaders_that_save_at_once_do_not_exceed_it(
        self, store: Store, database_url: str, clock: ManualClock
    ) -> None:
        """Two pools of one tenant: two leases, two writers."""
        await with_run(store)
        elsewhere = replace(model("s1:train:7"), pool=OTHER_POOL)
        await store.models.create(elsewhere, replace(creation("s1:train:7"), pool=OTHER_POOL))
        other = await Store.open(database_url, clock=clock.now)
        policies = limits(max_checkpoints=8)
        try:
            mine = await lead(store)
            theirs = await other.leases.acquire(OTHER_POOL, "other", ttl_s=60.0)
            assert theirs is not None
            for number in range(1, 9):
                saves = [save(number, f"n{number}"), save(number, f"n{number}", model_id="s1:train:7")]
                path = saves[1][1].tinker_path.replace(MODEL, "s1:train:7")
                saves[1] = replace(saves[1][0], pool=OTHER_POOL), replace(saves[1][1], tinker_path=path)
                await enqueue_all(store, [request for request, _ in saves])
                cycles = [FinishedCycle(finished=(done(of),), checkpoints=(record,)) for of, record in saves]
                await asyncio.gather(
                    store.cycles.finish(mine, cycles[0], policies=policies),
                    other.cycles.finish(theirs, cycles[1], policies=policies),
                )
                assert (await store.quotas.saved(TENANT)).num == min(8, 2 * number)
        finally:
            await other.close()

    def test_what_adds_nothing_is_never_refused(self) -> None:
        tight = SaveLimits(num=0, num_bytes=0)
        assert tight.refusal(Saved(3, 30), Saved(3, 30)) is None
        assert tight.refusal(Saved(3, 30), Saved(3, 20)) is None
        assert tight.refusal(Saved(3, 30), Saved(4, 30)) is not None
        assert tight.refusal(Saved(3, 30), Saved(3, 31)) is not None
        assert SaveLimits.of(limits(max_models=1), TENANT) is None


class TestRates:
    async def train(self, store: Store, seq_id: int, num_tokens: int, policies: Policies, **facts: TenantId) -> None:
        """One pass, committed."""
        request = op(seq_id, num_tokens=num_tokens, **facts)
        await store.requests.enqueue(request)
        await store.cycles.finish(await lead(store), FinishedCycle(finished=(done(request),)), policies=policies)

    async def used(self, store: Store, policies: Policies, kind: RateKind = RateKind.TRAINING) -> dict[Quota, float]:
        uses = await store.rates.uses(policies, kind, [TENANT, OTHER_TENANT])
        return {use.quota: use.used for use in uses.get(TENANT, ())}

    async def test_what_was_committed_here_counts_at_once(self, store: Store, clock: ManualClock) -> None:
        await with_run(store)
        policies = limits(trained_tokens_per_minute=60, trained_tokens_per_day=1_000)
        minute, day = Quota.TRAINED_PER_MINUTE, Quota.TRAINED_PER_DAY
        assert await self.used(store, policies) == {minute: 0, day: 0}
        await self.train(store, 1, 100, policies)
        assert await self.used(store, policies) == {minute: 100, day: 100}
        clock.advance(READ_EVERY_S / 2)
        await self.train(store, 2, 50, policies)
        assert await self.used(store, policies) == {minute: 150, day: 150}
        clock.advance(65)
        # A full minute's worth went out; what was just committed counts to the end of its slot.
        assert 85 <= (await self.used(store, policies))[minute] <= 90
        assert (await self.used(store, policies))[day] == 150
        clock.advance(24 * 3_600)
        assert await self.used(store, policies) == {minute: 0, day: 0}

    async def test_only_tenants_with_a_rate_are_counted(self, store: Store) -> None:
        await with_run(store)
        await self.train(store, 1, 100, limits(max_models=3))
        await self.train(store, 2, 100, limits(sampled_tokens_per_minute=3))
        theirs = Policies(quotas={f"tenant:{OTHER_TENANT}": {Quota.TRAINED_PER_MINUTE: 10}})
        await self.train(store, 3, 100, theirs)
        both = limits(trained_tokens_per_minute=60, trained_tokens_per_day=1_000)
        # The day's sum is usage, which is always counted; the minute's counts from when it is limited.
        assert await self.used(store, both) == {Quota.TRAINED_PER_MINUTE: 0, Quota.TRAINED_PER_DAY: 300}

    async def test_what_another_server_committed_is_seen_at_the_next_reading(
        self, store: Store, database_url: str, clock: ManualClock
    ) -> None:
        await with_run(store)
        policies = limits(trained_tokens_per_minute=60, trained_tokens_per_day=1_000)
        other = await Store.open(database_url, clock=clock.now)
        try:
            assert (await self.used(other, policies))[Quota.TRAINED_PER_MINUTE] == 0
            await self.train(store, 1, 100, policies)
            clock.advance(READ_EVERY_S)
            assert 99 <= (await self.used(other, policies))[Quota.TRAINED_PER_MINUTE] <= 100
            clock.advance(READ_DAY_EVERY_S)
            assert (await self.used(other, policies))[Quota.TRAINED_PER_DAY] == 100
            # Not twice, whoever reads.
            assert (await self.used(store, policies))[Quota.TRAINED_PER_DAY] == 100
        finally:
            await other.close()

    async def test_a_commit_that_is_repeated_counts_once(self, store: Store) -> None:
        await with_run(store)
        policies = limits(trained_tokens_per_minute=60)
        await self.train(store, 1, 100, policies)
        lease = await lead(store)
        await store.cycles.finish(lease, FinishedCycle(finished=(done(op(1)),)), policies=policies)
        assert await self.used(store, policies) == {Quota.TRAINED_PER_MINUTE: 100}

    async def test_samples_count_what_was_drawn(self, store: Store) -> None:
        await store.sessions.create(session(), None)
        await store.sampling.create(sampling_session())
        policies = limits(sampled_tokens_per_minute=60)
        await self.used(store, policies, RateKind.SAMPLING)
        requests = [sample(1), sample(2)]
        await enqueue_all(store, requests)
        usage = SampleUsage(num_prompt_tokens=1_000, num_sampled_tokens=7)
        finished = [replace(done(requests[0]), usage=usage)]
        await store.cycles.finish_samples(await lead(store), finished, policies=policies)
        # Its reader went away, with nine tokens.
        used = replace(usage, num_sampled_tokens=9)
        await store.cycles.cancel_sample(requests[1].request_id, used=used, policies=policies)
        assert await self.used(store, policies, RateKind.SAMPLING) == {Quota.SAMPLED_PER_MINUTE: 16}

    async def test_a_restarted_server_knows_a_debt(self, store: Store, database_url: str, clock: ManualClock) -> None:
        await with_run(store)
        policies = limits(trained_tokens_per_minute=60)
        await self.train(store, 1, 600, policies)
        clock.advance(120)
        fresh = await Store.open(database_url, clock=clock.now)
        try:
            assert 480 <= (await self.used(fresh, policies))[Quota.TRAINED_PER_MINUTE] <= 485
        finally:
            await fresh.close()

    async def test_old_slots_are_deleted(self, store: Store, clock: ManualClock) -> None:
        await with_run(store)
        policies = limits(trained_tokens_per_minute=60)
        await self.train(store, 1, 600, policies)
        clock.advance(1_000)
        await self.train(store, 2, 600, policies)
        assert await store.rates.forget() == 0
        clock.advance(RATE_KEPT_S - 900)
        assert await store.rates.forget() == 1
        assert await store.rates.forget() == 0
        clock.advance(RATE_KEPT_S)
        assert await store.rates.forget() == 1

    async def test_without_rates_there_is_no_query(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        async def read(*_: object) -> None:
            raise AssertionError("a query")

        monkeypatch.setattr(store.rates._database, "read", read)
        assert await store.rates.uses(limits(max_models=1), RateKind.TRAINING, [TENANT]) == {}
        theirs = Policies(quotas={f"tenant:{OTHER_TENANT}": {Quota.TRAINED_PER_MINUTE: 10}})
        assert await store.rates.uses(theirs, RateKind.TRAINING, [TENANT]) == {}
