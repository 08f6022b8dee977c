"""Which sampler a sample goes to."""

from __future__ import annotations

from typing import cast

from treadle.domain.ids import PoolName, RequestId, SamplingSessionId, TenantId
from treadle.domain.ops import OpKind
from treadle.domain.records import RequestRecord
from treadle.domain.roles import Role
from treadle.domain.states import RequestState
from treadle.executor.base import SamplingExecutor
from treadle.scheduler.quarantine import DEATHS_TO_SUSPECT_A_SAMPLE, Quarantine, Suspicions
from treadle.scheduler.samplers import MAX_HANDED_OVER, MAX_HANDED_OVER_PER_TENANT, SPILL_BEYOND, Sampler, Samplers

HOMES = {TenantId("at-0"): 0, TenantId("at-1"): 1}


def row(number: int, tenant: str = "at-0", session: str = "session:sample:0") -> RequestRecord:
    return RequestRecord(
        request_id=RequestId(f"{session}:{number}"),
        tenant_id=TenantId(tenant),
        pool=PoolName("pool"),
        kind=OpKind.SAMPLE,
        state=RequestState.QUEUED,
        seq_id=number,
        num_tokens=1,
        created_at=0.0,
        sampling_session_id=SamplingSessionId(session),
    )


def team(*roles: Role) -> tuple[Samplers, list[Sampler]]:
    samplers, suspicions = Samplers(HOMES.get), Suspicions()
    nobody = cast(SamplingExecutor, None)
    all_of_them = [
        Sampler(("s" if role is Role.SAMPLING else "") + str(index), index, role, nobody, Quarantine(suspicions))
        for index, role in enumerate(roles)
    ]
    for sampler in all_of_them:
        samplers.attach(sampler)
    return samplers, all_of_them


def places(samplers: Samplers, *rows: RequestRecord) -> dict[RequestId, str]:
    return {one.request_id: slot for slot, of in samplers.assign(rows).items() for one in of}


def test_samples_go_to_the_home_of_their_tenant_until_that_is_much_fuller() -> None:
    samplers, _ = team(Role.BOTH, Role.BOTH)
    found = places(samplers, *(row(number) for number in range(60)))
    assert list(found.values())[: SPILL_BEYOND + 1] == ["0"] * (SPILL_BEYOND + 1)
    assert sum(slot == "1" for slot in found.values()) >= 10, "the rest is shared out"
    assert places(samplers, row(99, "at-1")) == {"session:sample:0:99": "1"}


def test_where_workers_only_sample_a_session_stays_together() -> None:
    samplers, _ = team(Role.TRAINING, Role.SAMPLING, Role.SAMPLING, Role.SAMPLING)
    sessions = [f"session:sample:{number}" for number in range(30)]
    found = [set(places(samplers, row(1, session=name), row(2, "at-1", session=name)).values()) for name in sessions]
    assert all(len(slots) == 1 for slots in found)
    assert set().union(*found) == {"s1", "s2", "s3"}


def test_what_a_sampler_cannot_do_goes_to_one_that_trains_even_when_it_is_suspected() -> None:
    samplers, [trainer, sampler] = team(Role.TRAINING, Role.SAMPLING)
    sample = row(1)
    for _ in range(DEATHS_TO_SUSPECT_A_SAMPLE):
        sampler.quarantine.samples_begin([sample.request_id])
        sampler.quarantine.worker_died()
    assert places(samplers, sample) == {sample.request_id: "s1"}, "it is found out where it was"
    samplers.give_to_builtin(sample.request_id)
    assert places(samplers, sample) == {sample.request_id: trainer.slot}


def test_a_suspect_waits_for_its_worker_and_others_go_elsewhere_meanwhile() -> None:
    samplers, [first, _] = team(Role.BOTH, Role.BOTH)
    suspect = row(1)
    for _ in range(DEATHS_TO_SUSPECT_A_SAMPLE):
        first.quarantine.samples_begin([suspect.request_id])
        first.quarantine.worker_died()
    samplers.detach(first)
    assert places(samplers, suspect, row(2)) == {"session:sample:0:2": "1"}
    samplers.attach(first)
    assert places(samplers, suspect, row(2)) == {suspect.request_id: "0", "session:sample:0:2": "1"}
    samplers.detach(first)
    first.quarantine.is_closed = True
    assert places(samplers, suspect) == {suspect.request_id: "1"}, "its worker does not come back"


def test_a_sample_is_with_one_sampler_and_none_has_too_many() -> None:
    samplers, [only] = team(Role.BOTH)
    found = places(samplers, *(row(number) for number in range(400)))
    assert len(found) == MAX_HANDED_OVER_PER_TENANT
    for request_id in found:
        samplers.begin(only, request_id, TenantId("at-0"))
    others = places(samplers, *(row(number, "at-1", "session:sample:1") for number in range(400)))
    assert len(others) == MAX_HANDED_OVER - MAX_HANDED_OVER_PER_TENANT
    assert places(samplers, row(0)) == {}
    samplers.detach(only)
    assert samplers.running == {}
