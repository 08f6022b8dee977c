"""ModelScope tokens: who gets in, what ModelScope is asked and how often, and what happens when it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import get_args

import httpx
import pytest
from gateway_support import KEY, Harness, ok, refused
from modelscope_stand_in import HUGE_BYTES, ORGANIZATION, StandIn, Trouble, stand_in
from test_gateway_tokens import claims_of, is_invalid_token

from treadle.config import ModelScopeSettings
from treadle.domain.ids import SessionId, TenantId
from treadle.domain.keys import key_digest, new_key
from treadle.domain.limits import JWT_LIFE_S
from treadle.domain.tenants import TenantChange
from treadle.gateway import GatewaySettings
from treadle.gateway.authenticators.modelscope import REFUSED_S, VERDICT_CACHE_S
from treadle.gateway.authenticators.modelscope_api import MAX_ANSWER_BYTES
from treadle.store.audit import Author

MEMBER, OUTSIDER, NOBODY = "ms-member-0123456789", "ms-outsider-0123456789", "ms-nobody-0123456789"
ALICE = TenantId("ms:alice")
AGE_S, NON_MEMBER_S, STALE_S = 300.0, 60.0, 3_600.0


@pytest.fixture
async def modelscope() -> AsyncIterator[StandIn]:
    async with stand_in() as server:
        server.users |= {MEMBER: "alice", OUTSIDER: "bob"}
        server.members.add("alice")
        yield server


@pytest.fixture
def options() -> dict[str, object]:
    """Tests that need other ones override this fixture."""
    return {}


@pytest.fixture
def settings(modelscope: StandIn, options: dict[str, object]) -> GatewaySettings:
    asked = ModelScopeSettings(
        **{"organization": ORGANIZATION, "endpoint": modelscope.url, "stale_age_s": STALE_S, **options}
    )
    return GatewaySettings(is_loopback=False, hold_s=0.1, auth_methods=("keys", "modelscope"), modelscope=asked)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another task does."""
    while not holds():  # noqa: ASYNC110 (nobody sets an event)
        await asyncio.sleep(0.005)


def later(gateway: Harness, seconds: float) -> None:
    gateway.clock.advance(seconds)


async def list_sessions(gateway: Harness, token: str = MEMBER) -> httpx.Response:
    return await gateway.get("sessions", key=token)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": MEMBER},
        {"X-API-Key": f"tml-{MEMBER}"},
        {"Authorization": f"Bearer {MEMBER}"},
        {"Authorization": f"Bearer tml-{MEMBER}"},
        {"Twinkle-Authorization": f"Bearer {MEMBER}"},
        {"Twinkle-Authorization": f"Bearer tml-{MEMBER}"},
    ],
)
async def test_a_members_token_is_the_same_tenant_in_every_form(
    gateway: Harness, modelscope: StandIn, headers: dict[str, str]
) -> None:
    session_id = ok(await gateway.client.post("/api/v1/create_session", json={}, headers=headers))["session_id"]

    session = await gateway.store.sessions.get(SessionId(session_id))
    assert session is not None
    assert session.tenant_id == ALICE
    assert ok(await list_sessions(gateway))["sessions"] == [session_id]
    assert modelscope.num_logins == 1


async def test_a_member_becomes_a_tenant_in_the_organization(gateway: Harness) -> None:
    ok(await list_sessions(gateway))

    tenant = await gateway.store.tenants.get(ALICE)
    assert tenant is not None
    assert (tenant.source, tenant.organization) == ("modelscope", ORGANIZATION)
    # At once, for what is decided about it.
    assert gateway.app.state.gateway.policies.now.organizations == {ALICE: ORGANIZATION}


async def test_an_operators_word_about_a_tenant_stays(gateway: Harness) -> None:
    author = Author(TenantId("user:ops"), "ops")
    await gateway.store.organizations.put("vip", "", author=author)
    await gateway.store.tenants.change(ALICE, TenantChange(organization="vip"), author=author)
    ok(await list_sessions(gateway))

    tenant = await gateway.store.tenants.get(ALICE)
    assert tenant is not None
    assert tenant.organization == "vip"


async def test_an_unknown_token_is_unauthenticated(gateway: Harness) -> None:
    answer = await list_sessions(gateway, NOBODY)

    assert NOBODY not in refused(answer, 401)
    assert "invalid_token" not in answer.headers["www-authenticate"]


async def test_somebody_who_is_no_member_is_told_how_to_join(gateway: Harness, modelscope: StandIn) -> None:
    reason = refused(await list_sessions(gateway, OUTSIDER), 403)

    assert ORGANIZATION in reason
    assert f"https://www.modelscope.cn/organization/{ORGANIZATION}" in reason
    assert await gateway.store.tenants.get(TenantId("ms:bob")) is None


async def test_who_joins_gets_in_within_a_minute(gateway: Harness, modelscope: StandIn) -> None:
    refused(await list_sessions(gateway, OUTSIDER), 403)
    modelscope.members.add("bob")
    refused(await list_sessions(gateway, OUTSIDER), 403)

    later(gateway, NON_MEMBER_S)

    ok(await list_sessions(gateway, OUTSIDER))


async def test_a_token_in_use_is_checked_again_in_the_background(gateway: Harness, modelscope: StandIn) -> None:
    ok(await list_sessions(gateway))
    later(gateway, AGE_S / 2)
    modelscope.gate.clear()

    # Nobody waits for ModelScope.
    ok(await list_sessions(gateway))
    ok(await list_sessions(gateway))

    modelscope.gate.set()
    await until(lambda: modelscope.num_logins == 2 and modelscope.num_open == 0)
    await until(lambda: not gateway.app.state.gateway.auth._modelscope._asking)
    modelscope.gate.clear()
    later(gateway, AGE_S / 2 + 1)
    ok(await list_sessions(gateway))


async def test_who_leaves_the_organization_is_out_within_the_verdicts_age(
    gateway: Harness, modelscope: StandIn
) -> None:
    ok(await list_sessions(gateway))
    modelscope.members.clear()

    later(gateway, AGE_S)

    refused(await list_sessions(gateway), 403)


async def test_a_token_that_is_revoked_there_ends_here(gateway: Harness, modelscope: StandIn) -> None:
    ok(await list_sessions(gateway))
    modelscope.users.clear()

    later(gateway, AGE_S)

    refused(await list_sessions(gateway), 401)
    # Also when ModelScope is away then.
    modelscope.trouble = "500"
    later(gateway, REFUSED_S)
    refused(await list_sessions(gateway), 503)


async def test_a_refused_token_is_not_asked_about_again_at_once(gateway: Harness, modelscope: StandIn) -> None:
    for _ in range(5):
        refused(await list_sessions(gateway, NOBODY), 401)
    assert modelscope.num_logins == 1

    modelscope.users[NOBODY] = "carol"
    modelscope.members.add("carol")
    later(gateway, REFUSED_S)

    ok(await list_sessions(gateway, NOBODY))


async def test_many_first_requests_with_one_token_ask_once(gateway: Harness, modelscope: StandIn) -> None:
    modelscope.gate.clear()
    asked = [asyncio.ensure_future(list_sessions(gateway)) for _ in range(50)]
    await until(lambda: modelscope.num_open == 1)
    # Whoever began it may go away.
    asked.pop(0).cancel()
    modelscope.gate.set()

    for answer in await asyncio.gather(*asked):
        ok(answer)
    assert modelscope.num_logins == 1


class TestWithShortPatience:
    @pytest.fixture
    def options(self) -> dict[str, object]:
        return {"timeout_s": 0.3}

    @pytest.mark.parametrize("troubled", ["login", "membership"])
    @pytest.mark.parametrize("trouble", [trouble for trouble in get_args(Trouble) if trouble])
    async def test_when_modelscope_fails_who_is_unknown_is_asked_to_come_back(
        self, gateway: Harness, modelscope: StandIn, trouble: Trouble, troubled: str
    ) -> None:
        modelscope.trouble, modelscope.troubled = trouble, troubled  # type: ignore[assignment]

        answer = await list_sessions(gateway)

        reason = refused(answer, 503)
        assert "ModelScope" in reason
        assert "token" in reason
        assert answer.headers["retry-after"]
        assert modelscope.num_elsewhere == 0
        assert modelscope.bytes_sent < min(HUGE_BYTES, 20 * MAX_ANSWER_BYTES)
        assert await gateway.store.tenants.get(TenantId("ms:mallory")) is None
        modelscope.trouble = ""
        ok(await list_sessions(gateway))

    @pytest.mark.parametrize("trouble", ["500", "hangs", "redirect"])
    async def test_when_modelscope_fails_who_is_known_goes_on(
        self, gateway: Harness, modelscope: StandIn, trouble: Trouble
    ) -> None:
        ok(await list_sessions(gateway))
        jwt = str(ok(await gateway.post("auth/token", key=MEMBER))["jwt"])
        modelscope.trouble = trouble

        for _ in range(int(STALE_S / AGE_S) - 1):
            later(gateway, AGE_S + 1)
            ok(await list_sessions(gateway))
        refused(await list_sessions(gateway, NOBODY), 503)
        assert is_invalid_token(await list_sessions(gateway, jwt))  # its own time is up
        ok(await list_sessions(gateway, str(ok(await gateway.post("auth/token", key=MEMBER))["jwt"])))

        # But not for ever.
        later(gateway, 2 * AGE_S)
        refused(await list_sessions(gateway), 503)
        modelscope.trouble = ""
        ok(await list_sessions(gateway))

    async def test_who_was_no_member_stays_none_when_modelscope_fails(
        self, gateway: Harness, modelscope: StandIn
    ) -> None:
        refused(await list_sessions(gateway, OUTSIDER), 403)
        modelscope.trouble = "hangs"

        later(gateway, NON_MEMBER_S)

        refused(await list_sessions(gateway, OUTSIDER), 403)


class TestWithFewCalls:
    @pytest.fixture
    def options(self) -> dict[str, object]:
        return {"max_calls": 4, "unknown_tokens_per_minute": 10}

    async def test_an_address_that_floods_unknown_tokens_holds_up_nobody_else(
        self, gateway: Harness, modelscope: StandIn
    ) -> None:
        ok(await list_sessions(gateway))
        later(gateway, AGE_S)
        modelscope.gate.clear()
        flood = httpx.ASGITransport(app=gateway.app, client=("203.0.113.9", 1))
        async with httpx.AsyncClient(transport=flood, base_url="http://gateway") as flooder:
            unknown = [
                asyncio.ensure_future(
                    flooder.get("/api/v1/sessions", headers={"X-API-Key": f"ms-unknown-0123456789-{i}"})
                )
                for i in range(40)
            ]
            await until(lambda: modelscope.num_open == 3)
            # The member's verdict is over, and ModelScope is asked about it past all of them.
            known = asyncio.ensure_future(list_sessions(gateway))
            await until(lambda: modelscope.num_open == 4)
            modelscope.gate.set()
            ok(await known)
            statuses = [answer.status_code for answer in await asyncio.gather(*unknown)]
        assert (statuses.count(401), statuses.count(503)) == (10, 30)
        assert modelscope.max_open == 4

    async def test_access_tokens_of_nobody_hold_up_nobody_elses(self, gateway: Harness, modelscope: StandIn) -> None:
        """They come in bodies of callers who are let in."""
        modelscope.users["ms-mallory-0123456789"] = "mallory"
        modelscope.members.add("mallory")
        for key in ("tml-ada", "tml-eve"):
            await gateway.store.keys.add(key[4:], key_digest(key), False)

        async def copy(key: str, token: str) -> httpx.Response:
            body = {"source_path": "tinker://x/weights/y", "destination_project_id": "p", "weights_access_token": token}
            return await gateway.post("copy_weights", body, key=key)

        for i in range(10):
            refused(await copy("tml-eve", f"ms-unknown-0123456789-{i}"), 403)
        refused(await copy("tml-eve", "ms-unknown-0123456789-x"), 503)

        refused(await copy("tml-ada", "ms-mallory-0123456789"), 404)

    async def test_good_tokens_are_not_counted(self, gateway: Harness, modelscope: StandIn) -> None:
        for i in range(25):
            token = f"ms-student-0123456789-{i}"
            modelscope.users[token] = f"student-{i}"
            modelscope.members.add(f"student-{i}")
            ok(await list_sessions(gateway, token))

    async def test_an_address_may_ask_again_later(self, gateway: Harness) -> None:
        for i in range(10):
            refused(await list_sessions(gateway, f"ms-unknown-0123456789-{i}"), 401)
        assert "address" in refused(await list_sessions(gateway, "ms-unknown-0123456789-x"), 503)
        later(gateway, 6.0)
        refused(await list_sessions(gateway, "ms-unknown-0123456789-x"), 401)


async def test_what_one_gateway_was_told_another_one_knows(
    gateway: Harness, modelscope: StandIn, other_gateway: Harness
) -> None:
    ok(await list_sessions(gateway))
    ok(await list_sessions(other_gateway))
    assert modelscope.num_logins == 1

    modelscope.users.clear()
    later(gateway, AGE_S)
    refused(await list_sessions(gateway), 401)
    later(gateway, VERDICT_CACHE_S)
    modelscope.trouble = "500"
    # It asks for itself, because the first one's verdict is gone.
    refused(await list_sessions(other_gateway), 503)


async def test_what_another_gateway_was_told_ends_what_this_one_believes(
    gateway: Harness, modelscope: StandIn, other_gateway: Harness
) -> None:
    ok(await list_sessions(gateway))
    ok(await list_sessions(other_gateway))
    modelscope.members.clear()
    later(gateway, AGE_S / 2)
    ok(await list_sessions(gateway))  # asks in the background
    await until(lambda: modelscope.num_logins == 2 and not gateway.app.state.gateway.auth._modelscope._asking)

    later(gateway, VERDICT_CACHE_S)

    refused(await list_sessions(other_gateway), 403)


async def test_what_another_gateway_was_told_just_now_counts(
    gateway: Harness, modelscope: StandIn, other_gateway: Harness
) -> None:
    ok(await list_sessions(gateway))
    ok(await list_sessions(other_gateway))
    later(gateway, AGE_S)
    # What the other one knows is confirmed, and a moment later the first one asks.
    assert await other_gateway.app.state.gateway.auth._modelscope._known.get(key_digest(MEMBER)) is not None
    jwt = str(ok(await gateway.post("auth/token", key=MEMBER))["jwt"])

    ok(await list_sessions(other_gateway, jwt))
    ok(await list_sessions(other_gateway))
    assert modelscope.num_logins == 2


async def test_a_jwt_is_worth_what_its_verdict_is_worth(gateway: Harness, modelscope: StandIn) -> None:
    jwt = str(ok(await gateway.post("auth/token", key=f"tml-{MEMBER}"))["jwt"])
    claims = claims_of(jwt)
    assert (claims["sub"], claims["org_id"]) == ("tml:ms:alice", ORGANIZATION)
    assert claims["exp"] - claims["iat"] == AGE_S < JWT_LIFE_S
    assert MEMBER not in str(claims)
    session_id = ok(await gateway.post("create_session", key=jwt))["session_id"]
    assert ok(await list_sessions(gateway))["sessions"] == [session_id]

    await gateway.store.token_verdicts.forget(key_digest(MEMBER), f"modelscope:{modelscope.url}:{ORGANIZATION}")
    later(gateway, VERDICT_CACHE_S)

    assert is_invalid_token(await list_sessions(gateway, jwt))


async def test_a_jwt_ends_with_its_verdict_when_that_is_sooner(gateway: Harness, modelscope: StandIn) -> None:
    ok(await list_sessions(gateway))
    # Too early to ask ModelScope again.
    later(gateway, AGE_S / 3)
    jwt = str(ok(await gateway.post("auth/token", key=MEMBER))["jwt"])
    later(gateway, AGE_S * 2 / 3 - 1)
    ok(await list_sessions(gateway, jwt))

    later(gateway, 1)

    assert is_invalid_token(await list_sessions(gateway, jwt))
    assert modelscope.num_logins == 1
    jwt = str(ok(await gateway.post("auth/token", key=MEMBER))["jwt"])
    ok(await list_sessions(gateway, jwt))


async def test_a_jwt_of_somebody_who_left_is_refused(gateway: Harness, modelscope: StandIn) -> None:
    jwt = str(ok(await gateway.post("auth/token", key=MEMBER))["jwt"])
    modelscope.members.clear()
    later(gateway, AGE_S / 2)

    ok(await list_sessions(gateway))  # asks in the background
    await until(lambda: modelscope.num_logins == 2 and not gateway.app.state.gateway.auth._modelscope._asking)

    assert ORGANIZATION in refused(await list_sessions(gateway, jwt), 403)


async def test_an_sdk_that_renews_its_jwt_never_meets_an_old_verdict(gateway: Harness, modelscope: StandIn) -> None:
    auth = gateway.app.state.gateway.auth
    jwt = str(ok(await gateway.post("auth/token", key=MEMBER))["jwt"])
    for _ in range(8):
        # tinker 0.38 sends its token again at 0.45 to 0.55 of a JWT's life.
        for _ in range(3):
            later(gateway, 0.45 * AGE_S / 3)
            ok(await list_sessions(gateway, jwt))
        jwt = str(ok(await gateway.post("auth/token", key=MEMBER))["jwt"])
        await until(lambda: not auth._modelscope._asking)
    assert modelscope.num_logins == 9


async def test_a_key_of_this_server_comes_first_and_never_leaves_it(gateway: Harness, modelscope: StandIn) -> None:
    key, other_servers = new_key(), new_key()
    record = await gateway.store.keys.add("ada", key_digest(key), False)
    ok(await list_sessions(gateway, key))
    await gateway.store.keys.revoke(record.key_id)
    later(gateway, 1.0)

    refused(await list_sessions(gateway, key), 401)
    refused(await list_sessions(gateway, other_servers), 401)

    assert modelscope.calls == []


@pytest.mark.parametrize("token", ["short", "sk with spaces 0123456789", "x" * 600, "ms-0123456789-é", "tml-"])
async def test_what_can_be_no_token_is_not_asked_about(gateway: Harness, modelscope: StandIn, token: str) -> None:
    answer = await gateway.client.get("/api/v1/sessions", headers={"X-API-Key": token.encode()})

    refused(answer, 401)
    assert modelscope.calls == []


async def test_a_suspended_member_is_refused_with_the_reason(gateway: Harness) -> None:
    ok(await list_sessions(gateway))
    jwt = str(ok(await gateway.post("auth/token", key=MEMBER))["jwt"])
    change = TenantChange(is_suspended=True, suspended_reason="spam")
    await gateway.store.tenants.change(ALICE, change, author=Author(TenantId("user:ops"), "ops"))
    await gateway.app.state.gateway.policies.refresh()

    for credential in (MEMBER, jwt):
        assert "spam" in refused(await list_sessions(gateway, credential), 403)


async def test_who_one_is(gateway: Harness) -> None:
    me = ok(await gateway.get("auth/apikey/me", key=MEMBER))

    assert (me["key_id"], me["name"]) == (0, "alice")
    assert me["details"] == {"org_details": {"name": ORGANIZATION}, "user_details": {"email": "alice"}}
    assert "ModelScope" in me["note"]
    answer = await gateway.client.delete("/api/v1/auth/apikey/me", headers={"X-API-Key": MEMBER})
    assert "ModelScope" in refused(answer, 400)


async def test_no_token_is_kept_anywhere(gateway: Harness, modelscope: StandIn, gateway_url: str) -> None:
    for token in (MEMBER, OUTSIDER, NOBODY):
        await list_sessions(gateway, token)
    modelscope.trouble = "500"
    await list_sessions(gateway, "ms-another-0123456789")

    rows = await gateway.store._database.read(lambda conn: list(conn.connection.driver_connection.iterdump()))
    dump = "\n".join(rows)
    assert "ms:alice" in dump
    assert all(token not in dump for token in (MEMBER, OUTSIDER, NOBODY, "ms-another-0123456789"))
    metrics = (await gateway.client.get("/metrics", headers={"X-API-Key": KEY})).text
    assert "-0123456789" not in metrics


class TestWithAListOfMembers:
    """Another contract: the settings say where the answer is and what it means."""

    @pytest.fixture
    def options(self) -> dict[str, object]:
        return {
            "login_path": "/v2/token",
            "user_json_path": "user.login",
            "membership_path": "/v2/members?org={organization}",
            "member_json_path": "items.*.name",
            "member_means": "user",
        }

    async def test_it_is_read_as_the_settings_say(self, gateway: Harness, modelscope: StandIn) -> None:
        modelscope.members.add("zoe")

        ok(await list_sessions(gateway))
        refused(await list_sessions(gateway, OUTSIDER), 403)
        refused(await list_sessions(gateway, NOBODY), 401)

        assert modelscope.calls == []


class TestWithOpenMode:
    @pytest.fixture
    def settings(self, modelscope: StandIn) -> GatewaySettings:
        asked = ModelScopeSettings(organization=ORGANIZATION, endpoint=modelscope.url)
        methods = ("open", "keys", "modelscope")
        return GatewaySettings(is_loopback=True, hold_s=0.1, auth_methods=methods, modelscope=asked)

    async def test_what_begins_like_a_key_is_one(self, gateway: Harness, modelscope: StandIn) -> None:
        me = ok(await gateway.get("auth/apikey/me", key=f"tml-{MEMBER}"))
        assert me["name"].startswith("open:")
        assert modelscope.calls == []

        assert ok(await gateway.get("auth/apikey/me", key=MEMBER))["name"] == "alice"
