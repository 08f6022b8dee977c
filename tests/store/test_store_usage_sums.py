"""Usage adds up: random work of some days against a plain account of it, by every grouping; and how checkpoints end."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import get_args

import pytest
from store_builders import (
    MODEL,
    SAMPLER,
    SESSION,
    TENANT,
    checkpoint,
    creation,
    done,
    enqueue_all,
    failed,
    lead,
    model,
    op,
    sample,
    sampling_session,
    session,
    with_run,
    with_sampler,
)

from treadle.domain.ids import (
    BlobKey,
    ModelId,
    SamplingSessionId,
    SessionId,
    TenantId,
    TinkerPath,
    sample_request_id,
)
from treadle.domain.ops import OpKind
from treadle.domain.records import CheckpointRecord, FinishedCycle, LeaseRecord, NewRequest
from treadle.domain.usage import HOUR_S, SampleUsage, UsageKind, hour_of
from treadle.store import Store
from treadle.store.admin_usage import GroupBy, SumQuery
from treadle.testing.clock import ManualClock

FOREVER = 2**40
TENANTS = ("user:ada", "user:bob", "user:eve")
NUM_ACTIONS = 220


@dataclass
class Stored:
    """One checkpoint, as it should be counted."""

    record: CheckpointRecord
    ended_at: float | None = None

    def byte_seconds(self, until: float) -> float:
        ends = [until, *(at for at in (self.ended_at, self.record.expires_at) if at is not None)]
        return self.record.size_bytes * max(0.0, min(ends) - self.record.created_at)


@dataclass
class World:
    """Random work on a store, and an account of it that knows no SQL."""

    store: Store
    clock: ManualClock
    lease: LeaseRecord
    random: random.Random
    # Of each tenant, session and run.
    amounts: Counter[tuple[str, str, str, UsageKind]] = field(default_factory=Counter)
    by_hour: Counter[tuple[int, UsageKind]] = field(default_factory=Counter)
    checkpoints: list[Stored] = field(default_factory=list)
    next_seq: Counter[str] = field(default_factory=Counter)
    # Each server sweeps at its own time.
    swept: dict[str, int] = field(default_factory=dict)
    num_blobs: int = 0

    async def found(self) -> None:
        for tenant in TENANTS:
            for number in range(2):
                session_id = f"{tenant[5:]}{number}"
                await self.store.sessions.create(
                    replace(session(session_id, tenant=TenantId(tenant)), project_id=f"p{number}")
                )
                for place in range(2):
                    name = f"{session_id}:train:{place}"
                    await self.store.models.create(
                        model(name, session_id=session_id, tenant=TenantId(tenant)),
                        creation(name, tenant=TenantId(tenant)),
                    )
                sampler = replace(
                    sampling_session(f"{session_id}:sample:0"),
                    session_id=SessionId(session_id),
                    tenant_id=TenantId(tenant),
                    model_id=ModelId(f"{session_id}:train:0"),
                )
                await self.store.sampling.create(sampler)

    def place(self) -> tuple[str, str, str]:
        tenant = self.random.choice(TENANTS)
        session_id = f"{tenant[5:]}{self.random.randrange(2)}"
        return tenant, session_id, f"{session_id}:train:{self.random.randrange(2)}"

    def used(self, place: tuple[str, str, str], kind: UsageKind, amount: int) -> None:
        self.amounts[*place, kind] += amount
        self.by_hour[hour_of(self.clock.now()), kind] += amount

    async def train(self) -> None:
        place = self.place()
        tenant, _, run = place
        self.next_seq[run] += 1
        kind = self.random.choice((OpKind.FORWARD, OpKind.FORWARD_BACKWARD))
        one = op(
            self.next_seq[run],
            kind,
            model_id=run,
            num_tokens=self.random.randrange(1, 500),
            tenant=TenantId(tenant),
        )
        await enqueue_all(self.store, [one])
        is_done = self.random.random() < 0.8
        # Commits are repeated when their answers are lost.
        for _ in range(self.random.choice((1, 1, 2))):
            await self.store.cycles.finish(self.lease, FinishedCycle(finished=((done if is_done else failed)(one),)))
        if is_done:
            self.used(place, UsageKind.TRAINING, one.num_tokens)

    async def draw(self) -> None:
        tenant, session_id, _ = self.place()
        sampler = SamplingSessionId(f"{session_id}:sample:0")
        self.next_seq[sampler] += 1
        one: NewRequest = replace(
            sample(self.next_seq[sampler], sampler=sampler),
            tenant_id=TenantId(tenant),
            request_id=sample_request_id(sampler, self.next_seq[sampler]),
        )
        await enqueue_all(self.store, [one])
        prompt, sampled = self.random.randrange(1, 100), self.random.randrange(1, 100)
        cached = self.random.randrange(prompt)
        used: SampleUsage | None = SampleUsage(prompt, sampled, cached)
        how = self.random.random()
        if how < 0.6:
            for _ in range(self.random.choice((1, 2))):
                await self.store.cycles.finish_samples(self.lease, [replace(done(one), usage=used)])
        elif how < 0.8:
            used = None if how < 0.7 else SampleUsage(prompt, sampled)
            await self.store.cycles.cancel_sample(one.request_id, used=used)
            # What the sampler brings afterwards comes too late.
            late = replace(done(one), usage=SampleUsage(prompt, sampled + 7))
            await self.store.cycles.finish_samples(self.lease, [late])
        else:
            used = None
            await self.store.cycles.finish_samples(self.lease, [failed(one)])
        if used is not None:
            place = tenant, session_id, f"{session_id}:train:0"
            self.used(place, UsageKind.PREFILL, used.num_prompt_tokens - used.num_cached_tokens)
            self.used(place, UsageKind.PREFILL_CACHED, used.num_cached_tokens)
            self.used(place, UsageKind.SAMPLED, used.num_sampled_tokens)

    def live(self) -> list[Stored]:
        now = self.clock.now()
        return [
            one
            for one in self.checkpoints
            if one.ended_at is None and (one.record.expires_at is None or one.record.expires_at > now)
        ]

    async def save(self) -> None:
        place = self.place()
        tenant, _, run = place
        self.next_seq[run] += 1
        one = op(self.next_seq[run], OpKind.SAVE_WEIGHTS, model_id=run, num_tokens=0, tenant=TenantId(tenant))
        await enqueue_all(self.store, [one])
        self.num_blobs += 1
        name = f"c{self.random.randrange(3)}"
        now = self.clock.now()
        record = replace(
            checkpoint(name, blob_key=f"blob/{self.num_blobs}", seq_id=one.seq_id, created_at=now),
            model_id=ModelId(run),
            tenant_id=TenantId(tenant),
            tinker_path=f"tinker://{run}/weights/{name}",
            size_bytes=self.random.randrange(1, 1_000),
            expires_at=None if self.random.random() < 0.6 else now + self.random.randrange(60, 3 * HOUR_S),
        )
        for _ in range(self.random.choice((1, 2))):
            await self.store.cycles.finish(self.lease, FinishedCycle(finished=(done(one),), checkpoints=(record,)))
        for old in self.checkpoints:
            if old.record.tinker_path == record.tinker_path and old.ended_at is None:
                old.ended_at = now
        self.checkpoints.append(Stored(record))
        self.used(place, UsageKind.CHECKPOINT, 1)

    async def delete(self) -> None:
        if live := self.live():
            one = self.random.choice(live)
            path = path_of(one.record)
            if self.random.random() < 0.5:
                assert await self.store.checkpoints.delete_own(path, one.record.tenant_id)
            else:
                assert await self.store.checkpoints.delete(one.record.tinker_path)
            one.ended_at = self.clock.now()

    async def forget_expired(self) -> None:
        await self.store.retention.drop_checkpoints(expired_before=self.clock.now() - 60)

    async def accrue(self, server: str | None = None) -> None:
        server = server or self.random.choice(("one", "two"))
        if server not in self.swept or self.random.random() < 0.2:  # it was restarted
            self.swept[server] = await self.store.usage.first_hour_to_accrue()
        while self.swept[server] + HOUR_S <= self.clock.now():
            await self.store.usage.accrue_storage(self.swept[server])
            self.swept[server] += HOUR_S

    async def wait(self) -> None:
        self.clock.advance(self.random.randrange(1, HOUR_S))

    async def act(self) -> None:
        actions = (self.train, self.draw, self.save, self.save, self.delete, self.forget_expired, self.accrue)
        await self.random.choice((*actions, self.wait, self.wait))()


def path_of(record: CheckpointRecord) -> TinkerPath:
    return TinkerPath(record.model_id, record.kind, record.name)


def rounded(amounts: dict[object, float]) -> dict[object, float]:
    return {key: round(amount, 3) for key, amount in amounts.items() if round(amount, 3)}


@pytest.mark.parametrize("seed", range(3))
async def test_random_work_adds_up_by_every_grouping(store: Store, clock: ManualClock, seed: int) -> None:
    world = World(store, clock, await lead(store), random.Random(seed))
    await world.found()
    for _ in range(NUM_ACTIONS):
        await world.act()
    clock.advance(HOUR_S)
    end = hour_of(clock.now())
    await world.accrue("one")
    await world.accrue("two")

    account = Counter(world.amounts)
    for one in world.checkpoints:
        owner = one.record.tenant_id, one.record.model_id.partition(":")[0], one.record.model_id
        account[*owner, UsageKind.STORAGE] += one.byte_seconds(end)  # type: ignore[assignment]
    assert len({kind for *_, kind in account}) == len(UsageKind), "a seed that does everything"

    groups: dict[GroupBy, dict[object, float]] = {}
    for group_by in get_args(GroupBy):
        found = await store.admin_usage.sums(SumQuery(group_by=group_by, since=0, before=FOREVER, limit=900))
        groups[group_by] = rounded(
            {(*one.key, kind): amount for one in found for kind, amount in one.amounts.items()}  # type: ignore[misc]
        )
    expected: dict[str, defaultdict[object, float]] = {
        name: defaultdict(float) for name in ("tenant", "session", "run")
    }
    expected["project"] = defaultdict(float)
    for (tenant, session_id, run, kind), amount in account.items():
        expected["tenant"][tenant, kind] += amount
        expected["session"][tenant, session_id, kind] += amount
        expected["run"][tenant, run, kind] += amount
        expected["project"][tenant, f"p{session_id[-1]}", kind] += amount
    for name, sums in expected.items():
        assert groups[name] == rounded(dict(sums)), (seed, name)  # type: ignore[index]
    work = {key: amount for key, amount in groups["hour"].items() if key[1] is not UsageKind.STORAGE}  # type: ignore[index]
    assert work == rounded(dict(world.by_hour)), seed
    totals = {
        name: {kind: round(sum(v for k, v in sums.items() if k[-1] is kind), 3) for kind in UsageKind}  # type: ignore[index]
        for name, sums in groups.items()
    }
    assert len({tuple(total.items()) for total in totals.values()}) == 1, (seed, totals)


async def storage(store: Store) -> float:
    records = await store.usage.events(TENANT, since=0, before=FOREVER) or []
    return sum(record.amount for record in records if record.kind is UsageKind.STORAGE)


async def put(store: Store, record: CheckpointRecord) -> None:
    await store.cycles.finish(await lead(store), FinishedCycle(checkpoints=(record,)))


async def test_a_checkpoint_that_is_deleted_within_the_hour_is_counted_until_then(
    store: Store, clock: ManualClock
) -> None:
    await with_run(store)
    begin = clock.now()
    record = checkpoint(created_at=begin)
    await put(store, record)
    clock.advance(100)
    path = path_of(record)
    assert await store.checkpoints.delete_own(path, TENANT)
    assert not await store.checkpoints.delete_own(path, TENANT)
    clock.advance(HOUR_S)
    for _ in range(2):
        await store.usage.accrue_storage(hour_of(begin))
    assert await storage(store) == 10 * 100


async def test_one_that_is_replaced_ends_where_the_next_begins(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    clock.advance(HOUR_S - clock.now() % HOUR_S)
    begin = clock.now()
    old = checkpoint(created_at=begin)
    new = replace(old, blob_key=BlobKey("blob/2"), size_bytes=7, created_at=begin + 60)
    await put(store, old)
    for _ in range(2):
        await put(store, new)
    clock.advance(HOUR_S)
    await store.usage.accrue_storage(hour_of(begin))
    assert await storage(store) == 10 * 60 + 7 * (HOUR_S - 60)


async def test_one_whose_time_is_up_is_swept_and_counted_until_then(store: Store, clock: ManualClock) -> None:
    await with_run(store)
    begin = clock.now()
    await put(store, checkpoint(created_at=begin, expires_at=begin + 30))
    clock.advance(100)
    count, _ = await store.retention.drop_checkpoints(expired_before=clock.now() - 50)
    assert count == 1
    clock.advance(HOUR_S)
    await store.usage.accrue_storage(hour_of(begin))
    assert await storage(store) == 10 * 30


async def test_a_sample_that_was_cancelled_counts_what_its_client_got(store: Store) -> None:
    await with_sampler(store)
    await enqueue_all(store, [sample(1), sample(2)])
    used = SampleUsage(num_prompt_tokens=9, num_sampled_tokens=4)
    for _ in range(2):
        await store.cycles.cancel_sample(sample(1).request_id, used=used)
    await store.cycles.cancel_sample(sample(2).request_id)
    found = await store.usage.events(TENANT, since=0, before=FOREVER) or []
    assert {record.kind: record.amount for record in found} == {UsageKind.PREFILL: 9, UsageKind.SAMPLED: 4}
    assert {(record.session_id, record.model_id) for record in found} == {(SESSION, "")}
    assert SAMPLER.startswith(SESSION)
    assert MODEL.startswith(SESSION)


async def test_what_is_committed_is_announced_once(store: Store, clock: ManualClock) -> None:
    heard: Counter[tuple[str, UsageKind]] = Counter()

    def hear(base_model: str, kind: UsageKind, amount: float) -> None:
        heard[base_model, kind] += amount  # type: ignore[assignment]

    store.events.on_used(hear)
    await with_run(store)
    await store.sampling.create(sampling_session())
    save = op(2, OpKind.SAVE_WEIGHTS, num_tokens=0)
    await enqueue_all(store, [op(1), save, sample(1)])
    lease = await lead(store)
    cycle = FinishedCycle(
        finished=(done(op(1)), done(save)), checkpoints=(checkpoint(seq_id=2, created_at=clock.now()),)
    )
    for _ in range(2):
        await store.cycles.finish(lease, cycle)
    await store.cycles.cancel_sample(sample(1).request_id, used=SampleUsage(3, 2))
    clock.advance(2 * HOUR_S)
    for _ in range(2):
        await store.usage.accrue_storage(hour_of(clock.now()) - HOUR_S)
    await asyncio.sleep(0)
    tokens = {UsageKind.TRAINING: 32, UsageKind.CHECKPOINT: 1, UsageKind.PREFILL: 3, UsageKind.SAMPLED: 2}
    assert heard == {("treadle/tiny", kind): amount for kind, amount in tokens.items()} | {
        ("treadle/tiny", UsageKind.STORAGE): 10 * HOUR_S
    }
