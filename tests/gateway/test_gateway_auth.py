"""Keys: open mode, its end, revocation, and what a wrong key looks like."""

from __future__ import annotations

import pytest
from gateway_support import KEY, OTHER_KEY, Harness, ok, open_tenant, refused

from treadle.domain.ids import SessionId
from treadle.domain.keys import key_digest
from treadle.gateway import GatewaySettings
from treadle.gateway.auth import KEY_CACHE_S, OPEN_CACHE_S


async def test_in_open_mode_every_key_is_its_own_tenant(gateway: Harness) -> None:
    session_id = await gateway.new_session(key=KEY)
    session = await gateway.store.sessions.get(SessionId(session_id))

    assert session is not None
    assert session.tenant_id == open_tenant(KEY)
    refused(await gateway.get(f"sessions/{session_id}", key=OTHER_KEY), 404)


async def test_the_first_key_ends_open_mode(gateway: Harness) -> None:
    ok(await gateway.get("sessions"))
    await gateway.store.keys.add("ada", key_digest("tml-ada"), False)
    gateway.clock.advance(OPEN_CACHE_S)

    refused(await gateway.get("sessions"), 401)
    ok(await gateway.get("sessions", key="tml-ada"))


async def test_revoking_the_last_key_does_not_open_the_door_again(gateway: Harness) -> None:
    record = await gateway.store.keys.add("ada", key_digest("tml-ada"), False)
    await gateway.store.keys.revoke(record.key_id)

    refused(await gateway.get("sessions"), 401)


async def test_a_revoked_key_is_refused_within_a_second(gateway: Harness) -> None:
    record = await gateway.store.keys.add("ada", key_digest("tml-ada"), False)
    ok(await gateway.get("sessions", key="tml-ada"))

    await gateway.store.keys.revoke(record.key_id)
    gateway.clock.advance(KEY_CACHE_S)

    assert "revoked" in refused(await gateway.get("sessions", key="tml-ada"), 401)


async def test_a_new_key_works_at_once(gateway: Harness) -> None:
    await gateway.store.keys.add("ada", key_digest("tml-ada"), False)
    refused(await gateway.get("sessions", key="tml-bob"), 401)

    await gateway.store.keys.add("bob", key_digest("tml-bob"), False)

    ok(await gateway.get("sessions", key="tml-bob"))


async def test_two_keys_of_one_user_see_the_same_sessions(gateway: Harness) -> None:
    await gateway.store.keys.add("ada", key_digest("tml-a1"), False)
    await gateway.store.keys.add("ada", key_digest("tml-a2"), False)
    session_id = await gateway.new_session(key="tml-a1")

    assert ok(await gateway.get("sessions", key="tml-a2"))["sessions"] == [session_id]


async def test_a_bearer_token_is_a_key_too(gateway: Harness) -> None:
    answer = await gateway.client.get("/api/v1/sessions", headers={"Authorization": f"Bearer {KEY}"})

    ok(answer)


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": ""}, {"Authorization": "Basic dG1sLQ=="}])
async def test_no_key_is_unauthenticated(gateway: Harness, headers: dict[str, str]) -> None:
    assert "X-API-Key" in refused(await gateway.client.get("/api/v1/sessions", headers=headers), 401)


@pytest.mark.parametrize("key", ["sk-1", "eyJhbGciOi", "tml-" + "x" * 600])
async def test_something_that_is_no_key_is_not_repeated_in_the_answer(gateway: Harness, key: str) -> None:
    answer = await gateway.get("sessions", key=key)

    assert key not in refused(answer, 401)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "client/config"),
        ("POST", "create_session"),
        ("POST", "create_model"),
        ("POST", "load_weights"),
        ("POST", "get_info"),
        ("POST", "unload_model"),
        ("POST", "forward_backward"),
        ("POST", "optim_step"),
        ("POST", "save_weights"),
        ("POST", "save_weights_for_sampler"),
        ("POST", "create_sampling_session"),
        ("POST", "join_sampling_session"),
        ("POST", "asample"),
        ("POST", "retrieve_future"),
        ("POST", "retrieve_futures"),
        ("POST", "weights_info"),
        ("POST", "telemetry"),
        ("POST", "session_heartbeat"),
        ("POST", "sessions/x/finish"),
        ("GET", "sessions"),
        ("GET", "sessions/x"),
        ("GET", "samplers/x"),
        ("GET", "training_runs"),
        ("GET", "training_runs/x"),
        ("GET", "training_runs/x/checkpoints"),
        ("GET", "checkpoints"),
        ("GET", "get_server_capabilities"),
        ("POST", "auth/token"),
        ("GET", "auth/apikey/me"),
        ("DELETE", "auth/apikey/me"),
        ("GET", "audit"),
        ("GET", "billing/usage/events"),
        ("GET", "billing/usage/checkpoints/current"),
        ("POST", "sessions/search"),
        ("PUT", "sessions/x/project"),
        ("GET", "sessions/x/trace_export"),
        ("GET", "tokenizers/x"),
    ],
)
async def test_every_route_wants_a_key(gateway: Harness, method: str, path: str) -> None:
    refused(await gateway.client.request(method, f"/api/v1/{path}", content=b"{}"), 401)


class TestWithKeysOnly:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(is_loopback=True, auth_methods=("keys",))

    async def test_nobody_gets_in_without_a_created_key(self, gateway: Harness) -> None:
        refused(await gateway.get("sessions"), 401)


class TestOpenForGood:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(is_loopback=True, auth_methods=("open",))

    async def test_created_keys_change_nothing(self, gateway: Harness) -> None:
        await gateway.store.keys.add("ada", key_digest("tml-ada"), False)

        ok(await gateway.get("sessions"))


class TestOnANetworkAddress:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(is_loopback=False, auth_methods=("open",))

    async def test_it_is_never_open(self, gateway: Harness) -> None:
        refused(await gateway.get("sessions"), 401)
