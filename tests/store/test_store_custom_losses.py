"""Custom losses and the requests that registered them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from store_builders import OTHER_TENANT, REFUSED, SESSION, TENANT, session

from treadle.domain.ids import LossId, PoolName, SessionId, custom_loss_id, custom_loss_request_id
from treadle.domain.limits import MAX_CUSTOM_LOSSES_PER_SESSION
from treadle.domain.ops import OpKind
from treadle.domain.outcome import EncodedResult
from treadle.domain.records import CustomLossRecord, NewRequest
from treadle.domain.states import RequestState
from treadle.store import Store
from treadle.testing.clock import ManualClock

RESULT = EncodedResult("application/json", b'{"loss_id": "it"}')


def loss(number: int = 0, *, session_id: SessionId = SESSION) -> CustomLossRecord:
    return CustomLossRecord(
        loss_id=custom_loss_id(session_id, number),
        session_id=session_id,
        tenant_id=TENANT,
        custom_loss_seq_id=number,
        name="mine",
        definition=b"\x00graph",
    )


def place(number: int = 0, *, session_id: SessionId = SESSION) -> NewRequest:
    return NewRequest(
        request_id=custom_loss_request_id(session_id, number),
        tenant_id=TENANT,
        pool=PoolName(""),
        kind=OpKind.CREATE_CUSTOM_LOSS,
        seq_id=number,
        num_tokens=0,
    )


@pytest.fixture
async def sessions(store: Store) -> None:
    await store.sessions.create(session(), None)
    await store.sessions.create(session("s2", tenant=OTHER_TENANT), None)


@pytest.mark.usefixtures("sessions")
async def test_a_loss_and_its_request_are_there_together(store: Store, clock: ManualClock) -> None:
    finished: list[str] = []
    store.events.on_finished(lambda ids: finished.extend(ids))
    await store.custom_losses.register(place(), loss(), RESULT)
    assert await store.custom_losses.get(loss().loss_id) == replace(loss(), created_at=clock.now())
    future = await store.requests.future(place().request_id)
    assert future is not None
    assert (future.state, future.result, future.tenant_id) == (RequestState.DONE, RESULT, TENANT)
    assert finished == [place().request_id]
    assert await store.requests.heads(PoolName("")) == []
    assert await store.custom_losses.get(LossId("nobody")) is None


@pytest.mark.usefixtures("sessions")
async def test_a_retry_changes_nothing(store: Store) -> None:
    await asyncio.gather(
        *(
            store.custom_losses.register(place(), replace(loss(), definition=definition), RESULT)
            for definition in (b"first", b"second", b"third")
        )
    )
    await store.custom_losses.refuse(place(), REFUSED)
    record = await store.custom_losses.get(loss().loss_id)
    assert record is not None
    assert record.definition == b"first"
    future = await store.requests.future(place().request_id)
    assert future is not None
    assert future.state is RequestState.DONE


@pytest.mark.usefixtures("sessions")
async def test_a_refused_registration_leaves_its_reason_and_no_loss(store: Store) -> None:
    await store.custom_losses.refuse(place(), REFUSED)
    await store.custom_losses.register(place(), loss(), RESULT)
    future = await store.requests.future(place().request_id)
    assert future is not None
    assert (future.state, future.failure) == (RequestState.FAILED, REFUSED)
    assert await store.custom_losses.get(loss().loss_id) is None


@pytest.mark.usefixtures("sessions")
async def test_a_session_has_so_many_losses_and_no_more(store: Store) -> None:
    await asyncio.gather(
        *(
            store.custom_losses.register(place(number), loss(number), RESULT)
            for number in range(MAX_CUSTOM_LOSSES_PER_SESSION)
        )
    )
    number = MAX_CUSTOM_LOSSES_PER_SESSION
    await store.custom_losses.register(place(number), loss(number), RESULT)
    future = await store.requests.future(place(number).request_id)
    assert future is not None
    assert future.failure is not None
    assert f"has {number} custom losses, the most that is allowed" in future.failure.message
    assert await store.custom_losses.get(loss(number).loss_id) is None
    other = SessionId("s2")
    await store.custom_losses.register(place(session_id=other), loss(session_id=other), RESULT)
    assert await store.custom_losses.get(loss(session_id=other).loss_id) is not None


@pytest.mark.usefixtures("sessions")
async def test_a_swept_request_leaves_the_loss(store: Store, clock: ManualClock) -> None:
    await store.custom_losses.register(place(), loss(), RESULT)
    later = clock.now() + 10
    await store.requests.sweep(delivered_before=later, undelivered_before=later)
    assert (await store.retention.forget_requests(finished_before=later)).num_forgotten == 1
    assert await store.requests.get(place().request_id) is None
    assert await store.custom_losses.get(loss().loss_id) is not None


@pytest.mark.usefixtures("sessions")
async def test_losses_go_with_the_finished_session_and_no_other(store: Store, clock: ManualClock) -> None:
    other = SessionId("s2")
    for number in range(3):
        await store.custom_losses.register(place(number), loss(number), RESULT)
    kept = replace(loss(session_id=other), tenant_id=OTHER_TENANT)
    await store.custom_losses.register(replace(place(session_id=other), tenant_id=OTHER_TENANT), kept, RESULT)
    assert await store.custom_losses.forget(finished_before=clock.now() + 1) == 0
    await store.sessions.finish(SESSION, reason="completed")
    assert await store.custom_losses.forget(finished_before=clock.now()) == 0
    clock.advance(1)
    assert await store.custom_losses.forget(finished_before=clock.now()) == 3
    assert await store.custom_losses.get(loss().loss_id) is None
    assert await store.custom_losses.get(kept.loss_id) is not None
