"""Rates in the scheduler: who waits, what runs all the same, and how far anybody gets over a limit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from scheduler_support import PATIENCE_S, SESSION, TENANT, Cluster, _request, _sample_request
from test_sampling_shares import Busy, _handed

from treadle.domain.ids import ModelId, RequestId, TenantId, training_model_id
from treadle.domain.ops import OpKind, SaveWeightsOp
from treadle.domain.plan import ModelQueue, PolicyInput, PolicyState, QueuedOp
from treadle.domain.policy import Policies, Quota
from treadle.domain.rates import MINUTE_S, Meter, RateKind, RateLimits
from treadle.domain.states import Category, RequestState
from treadle.scheduler.policy import plan_cycle
from treadle.scheduler.rates import within_rooms
from treadle.testing.builders import datum, pass_op, sample_op, step_op

A, B = TenantId("a"), TenantId("b")


def passes(*tokens: int, start: int = 1, age_s: float = 0.0, done: int = 0) -> list[QueuedOp]:
    """One pass of one quantum per number; 0 is a step. The first one has waited `age_s`."""
    return [
        QueuedOp(
            request_id=RequestId(f"r{start + index}"),
            seq_id=start + index,
            kind=OpKind.FORWARD_BACKWARD if size else OpKind.OPTIM_STEP,
            quantum_tokens=(size,) if size else (),
            num_quanta_done=done if index == 0 else 0,
            queued_s=age_s - index / 1_000,
        )
        for index, size in enumerate(tokens)
    ]


def queue(ops: Sequence[QueuedOp], name: str = "m", *, tenant: TenantId = A, next_seq_id: int = 1) -> ModelQueue:
    return ModelQueue(ModelId(name), tenant, next_seq_id, tuple(ops))


def left(
    queues: Sequence[ModelQueue], rooms: dict[TenantId, float], **facts: Sequence[ModelId]
) -> dict[str, list[int]]:
    """The numbers of what is let through, by run."""
    within = within_rooms({one.model_id: one for one in queues}, rooms, **facts)
    return {name: [op.seq_id for op in one.ops] for name, one in within.items()}


class TestLettingThrough:
    def test_who_has_no_rate_is_left_alone(self) -> None:
        assert left([queue(passes(5, 0, 9), tenant=B)], {A: -1.0}) == {"m": [1, 2, 3]}

    def test_without_room_what_costs_nothing_runs_as_far_as_nothing_stands_in_front_of_it(self) -> None:
        queues = [queue(passes(0, 0, 9, 0)), queue(passes(9, 0), "n")]
        assert left(queues, {A: 0.0}) == {"m": [1, 2], "n": []}

    def test_the_one_that_fills_the_room_goes_through_and_takes_its_step_along(self) -> None:
        assert left([queue(passes(6, 6, 0, 6, 0))], {A: 7.0}) == {"m": [1, 2, 3]}
        assert left([queue(passes(6, 6, 0, 6, 0))], {A: 6.0}) == {"m": [1]}
        assert left([queue(passes(10**9))], {A: 0.1}) == {"m": [1]}

    def test_the_oldest_of_all_runs_goes_first(self) -> None:
        queues = [queue(passes(6, 6), "m", tenant=A), queue(passes(6, 6, age_s=5), "n")]
        assert left(queues, {A: 6.0}) == {"m": [], "n": [1]}
        assert left(queues, {A: 13.0}) == {"m": [1], "n": [1, 2]}

    def test_what_is_half_done_goes_on_and_counts_whole(self) -> None:
        begun = QueuedOp(RequestId("r1"), 1, OpKind.FORWARD_BACKWARD, (5, 5, 5), num_quanta_done=1)
        queues = [queue([begun]), queue(passes(6, age_s=9), "n")]
        assert left(queues, {A: 15.0}) == {"m": [1], "n": []}
        assert left(queues, {A: 15.5}) == {"m": [1], "n": [1]}
        assert left(queues, {A: -7.0}) == {"m": [1], "n": []}

    def test_what_waits_behind_a_hole_takes_nobodys_room(self) -> None:
        queues = [queue(passes(6, start=2, age_s=9)), queue(passes(6, 6), "n")]
        assert left(queues, {A: 12.0}) == {"m": [], "n": [1, 2]}
        assert left(queues, {A: 12.5}) == {"m": [2], "n": [1, 2]}
        settled = replace(queues[0], settled_seq_ids=frozenset({1}))
        assert left([settled, queues[1]], {A: 6.0}) == {"m": [2], "n": []}

    def test_what_was_counted_before_is_not_held_back(self) -> None:
        assert left([queue(passes(6, 6))], {A: -1.0}, replayed=[ModelId("m")]) == {"m": [1, 2]}


@dataclass
class Worked:
    """One tenant of the simulated pool."""

    limit: int | None
    meter: Meter = field(default_factory=Meter)
    queued: dict[ModelId, list[QueuedOp]] = field(default_factory=dict)
    next_seq: dict[ModelId, int] = field(default_factory=dict)
    # (time, tokens, seconds waited)
    finished: list[tuple[float, int, float]] = field(default_factory=list)
    largest: int = 0

    def submit(self, run: ModelId, tokens: Sequence[int], now: float) -> None:
        line = self.queued.setdefault(run, [])
        seq_id = self.next_seq.setdefault(run, 0) + len(line)
        line.append(QueuedOp(RequestId(f"{run}:{seq_id}:{now}"), seq_id, OpKind.FORWARD_BACKWARD, tuple(tokens)))
        self.largest = max(self.largest, sum(tokens))


def excess(one: Worked) -> float:
    """By how much the worst window of any length was over `limit * (T / 60 + 1)`, in tokens; at most one request."""
    assert one.limit is not None
    worst = 0.0
    for start, (since, _, _) in enumerate(one.finished):
        total = 0
        for at, tokens, _ in one.finished[start:]:
            total += tokens
            worst = max(worst, total - one.limit * ((at - since) / MINUTE_S + 1))
    return worst


@pytest.mark.parametrize("seed", range(12))
def test_nobody_exceeds_a_rate_by_more_than_a_request_and_nobody_starves(seed: int) -> None:
    rng = random.Random(seed)
    tenants = {
        TenantId(f"t{number}"): Worked(limit=None if number % 3 == 0 else rng.choice([50, 500, 5_000, 20_000]))
        for number in range(6)
    }
    speed, now, state = 3_000.0, 1_000_000.0, PolicyState()
    came: dict[RequestId, float] = {}
    end_of_arrivals = now + 90
    while now < end_of_arrivals or any(line for one in tenants.values() for line in one.queued.values()):
        for tenant_id, one in tenants.items() if now < end_of_arrivals else ():
            offered = 400 if one.limit is None else one.limit * rng.choice([0.5, 1, 4]) / MINUTE_S
            while rng.random() < 0.4:
                size = rng.choice([1, 10, 100, 3 * (one.limit or 100)])
                if size > 40 * offered and rng.random() < 0.97:
                    continue
                run = ModelId(f"{tenant_id}-{rng.randrange(3)}")
                one.submit(run, [min(size, 2_048)] * -(-size // 2_048), now)
                came[one.queued[run][-1].request_id] = now
        rooms = {
            tenant_id: min(use.room for use in one.meter.uses(RateLimits(one.limit, None), RateKind.TRAINING, now))
            for tenant_id, one in tenants.items()
            if one.limit is not None
        }
        queues = {
            run: ModelQueue(
                run,
                tenant_id,
                one.next_seq[run],
                tuple(replace(op, queued_s=now - came[op.request_id]) for op in line),
            )
            for tenant_id, one in tenants.items()
            for run, line in one.queued.items()
        }
        within = within_rooms(queues, rooms)
        plan, state = plan_cycle(
            PolicyInput(
                models=tuple(within.values()), state=state, budget_tokens=4_096, tenant_cap_tokens=2_048, gap_wait_s=30
            )
        )
        for tenant_id, room in rooms.items():
            if room > 0 and any(tenants[tenant_id].queued.values()):
                assert any(within[run].ops for run in tenants[tenant_id].queued), "with room, something is let through"
        now += max(0.25 if now < end_of_arrivals or plan.ops else 5.0, sum(op.num_tokens for op in plan.ops) / speed)
        for planned in plan.ops:
            one = tenants[queues[planned.model_id].tenant_id]
            line = one.queued[planned.model_id]
            if not planned.is_last_part:
                line[0] = replace(line[0], num_quanta_done=planned.quantum_stop)
                continue
            op = line.pop(0)
            one.next_seq[planned.model_id] += 1
            tokens = sum(op.quantum_tokens)
            one.meter.add(tokens, now)
            one.finished.append((now, tokens, now - came[op.request_id]))
        assert now < end_of_arrivals + 100 * 3_600, "somebody waits for ever"
    for tenant_id, one in tenants.items():
        if one.limit is not None and one.finished:
            assert excess(one) <= one.largest, (seed, tenant_id, excess(one), one.largest)
    # The others do not wait for those who wait for their rates: the pool is far from full.
    free = [
        wait for one in tenants.values() if one.limit is None for at, _, wait in one.finished if at < end_of_arrivals
    ]
    assert max(free, default=0.0) < 60, seed


class TestMeter:
    def used(self, meter: Meter, limit: int, now: float) -> float:
        return meter.uses(RateLimits(limit, None), RateKind.TRAINING, now)[0].used

    @pytest.mark.parametrize("seed", range(20))
    def test_folding_what_is_settled_changes_nothing(self, seed: int) -> None:
        """A meter that is asked all the time says what one says that is asked once, also when the limit changes."""
        rng = random.Random(seed)
        often, once, now = Meter(), Meter(), 1_000.0
        limit = rng.choice([10, 100, 1_000])
        for _ in range(300):
            now += rng.choice([0.1, 1, 7, 40])
            amount = rng.choice([0, 1, 5, limit // 10, 3 * limit])
            for meter in (often, once):
                meter.add(amount, now)
            if rng.random() < 0.05:
                limit = rng.choice([10, 100, 1_000])
            self.used(often, limit, now)
        assert self.used(often, limit, now) == pytest.approx(self.used(once, limit, now), abs=1e-6)

    def test_a_debt_is_waited_off_at_the_rate(self) -> None:
        meter = Meter()
        meter.add(600, 1_000.0)
        [use] = meter.uses(RateLimits(60, None), RateKind.TRAINING, 1_000.0)
        assert (use.used, use.room, use.opens_at) == (600, -540, 1_540)
        assert self.used(meter, 60, 1_005.0) == 600
        assert self.used(meter, 60, 1_105.0) == 500
        assert self.used(meter, 60, 5_000.0) == 0

    def test_the_day_is_utcs(self) -> None:
        meter = Meter()
        meter.set_day(86_400, 70.0)
        [use] = meter.uses(RateLimits(None, 100), RateKind.TRAINING, 90_000.0)
        assert (use.quota, use.used, use.room) == (Quota.TRAINED_PER_DAY, 70, 30)
        meter.add(40, 90_000.0)
        [use] = meter.uses(RateLimits(None, 100), RateKind.TRAINING, 90_000.0)
        assert (use.used, use.opens_at) == (110, 172_800)
        [use] = meter.uses(RateLimits(None, 100), RateKind.TRAINING, 172_800.0)
        assert (use.used, use.opens_at) == (0, 172_800)


RUN, OTHER = training_model_id(SESSION, 0), training_model_id(SESSION, 1)


def limits(tenant_id: TenantId = TENANT, **quotas: int) -> Policies:
    return Policies(quotas={f"tenant:{tenant_id}": {Quota(name): value for name, value in quotas.items()}})


async def is_queued(cluster: Cluster, request_id: RequestId) -> bool:
    future = await cluster.store.requests.future(request_id)
    assert future is not None
    return future.state is RequestState.QUEUED


class TestPool:
    async def test_a_pass_over_the_rate_waits_until_there_is_room(self, cluster: Cluster) -> None:
        cluster.policies = limits(trained_tokens_per_minute=60)
        await cluster.result(await cluster.create(RUN))
        await cluster.result(await cluster.create(OTHER))
        # Larger than a minute's quota, and there is room: it runs.
        await cluster.run(pass_op(1, model_id=RUN, datums=[datum(90)]), step_op(2, model_id=RUN))
        late = await cluster.submit(
            pass_op(3, model_id=RUN, datums=[datum(8)]),
            step_op(4, model_id=RUN),
            pass_op(1, model_id=OTHER, datums=[datum(8)]),
        )
        # What costs no tokens runs, of the same tenant and in any number of cycles.
        third = training_model_id(SESSION, 2)
        await cluster.result(await cluster.create(third))
        await cluster.run(SaveWeightsOp(third, 1, name="one"))
        await cluster.run(SaveWeightsOp(third, 2, name="two"))
        assert [await is_queued(cluster, request_id) for request_id in late] == [True] * 3
        cluster.clock.advance(60)
        for request_id in late:
            await cluster.result(request_id)

    async def test_another_tenants_passes_do_not_wait(self, cluster: Cluster) -> None:
        cluster.policies = limits(trained_tokens_per_minute=60)
        await cluster.result(await cluster.create(RUN))
        await cluster.result(await cluster.create(OTHER))
        await cluster.run(pass_op(1, model_id=RUN, datums=[datum(90)]))
        [late] = await cluster.submit(pass_op(2, model_id=RUN, datums=[datum(8)]))
        for seq_id in range(1, 4):
            theirs = replace(_request(pass_op(seq_id, model_id=OTHER, datums=[datum(90)])), tenant_id=B)
            record = await cluster.model(OTHER)
            assert record.tenant_id == TENANT
            await cluster.store.requests.enqueue(theirs)
        assert await is_queued(cluster, late)

    async def test_a_limit_that_is_lifted_ends_the_wait(self, cluster: Cluster) -> None:
        cluster.policies = limits(trained_tokens_per_minute=1)
        await cluster.result(await cluster.create(RUN))
        await cluster.run(pass_op(1, model_id=RUN, datums=[datum(90)]))
        [late] = await cluster.submit(pass_op(2, model_id=RUN))
        cluster.policies = Policies()
        await cluster.result(late)

    async def test_a_replay_is_not_charged_and_does_not_wait(self, cluster: Cluster) -> None:
        cluster.policies = limits(trained_tokens_per_minute=60)
        await cluster.result(await cluster.create(RUN))
        await cluster.run(pass_op(1, model_id=RUN, datums=[datum(90)]), step_op(2, model_id=RUN))
        await cluster.restart()
        # Only a run that has its state can be saved.
        await cluster.run(SaveWeightsOp(RUN, 3, name="one"))
        uses = await cluster.store.rates.uses(cluster.policies, RateKind.TRAINING, [TENANT])
        assert uses[TENANT][0].used == 90

    async def test_saves_behind_each_other_stop_at_the_quota(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cluster.policies = limits(max_checkpoints=2)
        written: list[str] = []
        real = cluster.blobs.write

        def write(key: str, data: bytes | bytearray | memoryview) -> int:
            written.append(key)
            return real(key, data)

        monkeypatch.setattr(cluster.blobs, "write", write)
        await cluster.result(await cluster.create(RUN))
        ops = [SaveWeightsOp(RUN, number, name=f"n{number}") for number in range(1, 6)]
        request_ids = await cluster.submit(*ops)
        for request_id in request_ids[:2]:
            await cluster.result(request_id)
        for request_id in request_ids[2:]:
            failure = await cluster.failure(request_id)
            assert failure.category is Category.USER
            assert failure.message.startswith("quota max_checkpoints: you have 2 of 2 checkpoints; delete one")
        assert sum(key.startswith("states/") for key in written) == 2, "the others were not even written"
        # The run goes on, and what has a place may be written again.
        await cluster.run(SaveWeightsOp(RUN, 6, name="n1", overwrite=True), pass_op(7, model_id=RUN))

    async def test_who_is_at_its_bytes_writes_nothing_more(self, cluster: Cluster) -> None:
        cluster.policies = limits(max_checkpoint_bytes=1)
        await cluster.result(await cluster.create(RUN))
        [first, second] = await cluster.submit(SaveWeightsOp(RUN, 1, name="a"), SaveWeightsOp(RUN, 2, name="b"))
        assert "and this one takes" in (await cluster.failure(first)).message
        assert "quota max_checkpoint_bytes" in (await cluster.failure(second)).message
        assert (await cluster.store.quotas.saved(TENANT)).num == 0


class TestSamples:
    async def test_what_is_in_flight_may_fill_the_rate_and_no_more(self, cluster: Cluster) -> None:
        await cluster.crash()
        cluster.executors.clear()
        cluster.new_worker = Busy
        cluster.policies = limits(sampled_tokens_per_minute=100)
        requests = [replace(_sample_request(sample_op(number)), quantum_tokens=(40,)) for number in range(1, 8)]
        theirs = replace(_sample_request(sample_op(1_000)), tenant_id=B)
        for request in (*requests, theirs):
            await cluster.store.requests.enqueue(request)
        cluster.start()
        async with asyncio.timeout(PATIENCE_S):
            while theirs.request_id not in [work.request_id for work in _handed(cluster)]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        # 40 + 40 leave room, the third one fills it.
        assert [work.request_id for work in _handed(cluster) if work.tenant_id == TENANT] == [
            request.request_id for request in requests[:3]
        ]
        # One that ends early gives back what it did not draw.
        await cluster.store.cycles.cancel_sample(requests[0].request_id)
        async with asyncio.timeout(PATIENCE_S):
            while requests[3].request_id not in [work.request_id for work in _handed(cluster)]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert requests[4].request_id not in [work.request_id for work in _handed(cluster)]
