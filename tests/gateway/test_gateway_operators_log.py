"""Every route with which an operator changes something, one by one: what it leaves in the audit log."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_support import Harness, ok
from gateway_surface import CALLS, new_estate, send

from treadle.domain.keys import key_digest
from treadle.gateway import GatewaySettings
from treadle.gateway.app import ENDPOINTS

ADMIN = "tml-admin"
CHANGES = [one for one in ENDPOINTS if one.method != "GET" and one.path.startswith("/admin/v1")]
# They want a run on a worker, or a loss that was reviewed: tests of theirs look at their events.
NOT_READY = ("/admin/v1/runs/", "/admin/v1/losses/named/")


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.1, auth_methods=("open", "keys"))


async def events_of(gateway: Harness) -> list[dict[str, Any]]:
    answer = await gateway.client.get("/admin/v1/audit", params={"limit": 1_000}, headers={"X-API-Key": ADMIN})
    # Not what owners of projects read in their own logs.
    return [event for event in ok(answer)["events"] if event["event_type"] != "projects"]


async def test_a_change_leaves_one_event_and_a_refusal_none(gateway: Harness) -> None:
    # The key that the calls are about, and that of the operator.
    await gateway.store.keys.add("other", key_digest("tml-other"), False)
    await gateway.store.keys.add("ops", key_digest(ADMIN), True)
    mine, theirs = await new_estate(gateway, key="tml-mine"), await new_estate(gateway, public=True)
    num_events = len(await events_of(gateway))
    for endpoint in CHANGES:
        [call] = CALLS[f"{endpoint.method} {endpoint.path}"](mine, theirs)
        answers = [await send(gateway, call, key="tml-other"), await send(gateway, call, key=ADMIN)]

        events = await events_of(gateway)
        new = events[: len(events) - num_events]
        num_events = len(events)

        assert answers[0].status_code in (401, 403), "another's key, which is revoked on the way"
        if not endpoint.path.startswith(NOT_READY):
            ok(answers[1])
        assert len(new) == (answers[1].status_code == 200), (call, answers[1].text, new)
        for event in new:
            assert (event["tenant_id"], event["actor"]) == ("user:ops", "user:ops (key 2)")
            assert event["subject"]
            assert event["details"].keys() >= {"before", "after"}
            assert event["details"]["before"] != event["details"]["after"]
