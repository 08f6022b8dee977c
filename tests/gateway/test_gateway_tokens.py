"""Tokens in exchange for keys: what they say, whose they are, and when they end."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import jwt
import pytest
from gateway_support import KEY, Harness, ok, open_tenant, refused

from treadle.domain.ids import SessionId
from treadle.domain.keys import key_digest
from treadle.domain.limits import JWT_LIFE_S
from treadle.gateway import GatewaySettings
from treadle.gateway.auth import KEY_CACHE_S, OPEN_CACHE_S
from treadle.store import Store


def claims_of(token: str) -> dict[str, Any]:
    """As the SDK reads them: without a look at the signature."""
    payload = token.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert isinstance(claims, dict)
    return claims


async def token_of(gateway: Harness, key: str = KEY) -> str:
    return str(ok(await gateway.post("auth/token", key=key))["jwt"])


async def with_key(gateway: Harness, key: str = "tml-ada", user: str = "ada") -> int:
    return (await gateway.store.keys.add(user, key_digest(key), False)).key_id


def is_invalid_token(answer: httpx.Response) -> bool:
    """Whether the SDK would get a new token and ask again (tinker 0.38, _jwt_auth.py)."""
    refused(answer, 401)
    return 'error="invalid_token"' in answer.headers["www-authenticate"]


async def test_a_token_stands_for_the_tenant_of_its_key(gateway: Harness) -> None:
    token = await token_of(gateway)

    session_id = await gateway.new_session(key=token)

    session = await gateway.store.sessions.get(SessionId(session_id))
    assert session is not None
    assert session.tenant_id == open_tenant()
    ok(await gateway.get(f"sessions/{session_id}", key=KEY))
    ok(await gateway.get(f"sessions/{session_id}", key=token))


async def test_a_token_says_what_whoami_reads(gateway: Harness) -> None:
    await with_key(gateway)

    claims = claims_of(await token_of(gateway, "tml-ada"))

    assert (claims["sub"], claims["org_id"]) == ("tml:user:ada", "user:ada")
    assert claims["exp"] - claims["iat"] == JWT_LIFE_S
    assert "tml-ada" not in json.dumps(claims)


async def test_a_token_ends_after_an_hour(gateway: Harness) -> None:
    token = await token_of(gateway)
    gateway.clock.advance(JWT_LIFE_S - 1)
    ok(await gateway.get("sessions", key=token))

    gateway.clock.advance(1)

    assert is_invalid_token(await gateway.get("sessions", key=token))


async def test_a_token_ends_with_its_key(gateway: Harness) -> None:
    key_id = await with_key(gateway)
    token = await token_of(gateway, "tml-ada")
    ok(await gateway.get("sessions", key=token))

    await gateway.store.keys.revoke(key_id)
    gateway.clock.advance(KEY_CACHE_S)

    assert is_invalid_token(await gateway.get("sessions", key=token))
    plain = await gateway.post("auth/token", key="tml-ada")
    refused(plain, 401)
    assert "invalid_token" not in plain.headers["www-authenticate"]


async def test_a_token_of_open_mode_ends_with_open_mode(gateway: Harness) -> None:
    token = await token_of(gateway)

    await with_key(gateway)
    gateway.clock.advance(OPEN_CACHE_S)

    assert is_invalid_token(await gateway.get("sessions", key=token))


async def test_a_token_gets_another_one_only_for_the_rest_of_its_own_hour(gateway: Harness) -> None:
    token = await token_of(gateway)
    gateway.clock.advance(JWT_LIFE_S / 2)

    second = await token_of(gateway, token)

    assert claims_of(second)["exp"] == claims_of(token)["exp"]
    gateway.clock.advance(JWT_LIFE_S / 2)
    assert is_invalid_token(await gateway.get("sessions", key=second))


async def test_forged_tokens_are_refused(gateway: Harness) -> None:
    token = await token_of(gateway)
    head, payload, signature = token.split(".")
    claims = claims_of(token)
    claims["key"] = key_digest("tml-two")
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').rstrip(b"=").decode()
    for forged in (
        f"{head}.{body}.{signature}",
        f"{none}.{payload}.",
        jwt.encode(claims, "x" * 64, algorithm="HS256"),
        f"{head}.{payload}",
        token + "A" * 3_000,
        "eyJ",
        "eyJé",
    ):
        answer = await gateway.client.get("/api/v1/sessions", headers={"X-API-Key": forged.encode()})
        refused(answer, 401)


async def test_what_was_signed_for_something_else_is_no_login(gateway: Harness) -> None:
    signer = gateway.app.state.gateway.signer
    claims = {"key": key_digest(KEY), "sub": "tml:user:ada", "org_id": "user:ada"}

    token = await signer.sign("trace", claims, expires_at=gateway.clock.now() + 100)

    assert is_invalid_token(await gateway.get("sessions", key=token))


async def test_gateways_of_one_database_know_each_others_tokens(gateway: Harness, gateway_url: str) -> None:
    token = await token_of(gateway)

    other = await Store.open(gateway_url)
    try:
        secret = await other.secrets.get_or_create("signing", lambda: "another one")
    finally:
        await other.close()

    jwt.decode(token, secret, algorithms=["HS256"], audience="login", options={"verify_exp": False})


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer tml-one"},
        {"authorization": "bearer tml-one"},
        {"Twinkle-Authorization": "Bearer tml-one"},
        {"Twinkle-Authorization": "Bearer one"},
        {"Twinkle-Authorization": "Bearer tml-one", "Authorization": "Bearer somebody-else"},
        {"X-API-Key": "tml-one", "Authorization": "Bearer tml-two"},
    ],
)
async def test_a_key_is_the_same_in_every_header(gateway: Harness, headers: dict[str, str]) -> None:
    session_id = await gateway.new_session(key="tml-one")

    answer = await gateway.client.get("/api/v1/sessions", headers=headers)

    assert ok(answer)["sessions"] == [session_id]


async def test_a_token_works_as_a_bearer_token(gateway: Harness) -> None:
    token = await token_of(gateway)

    ok(await gateway.client.get("/api/v1/sessions", headers={"Authorization": f"Bearer {token}"}))
    ok(await gateway.client.get("/api/v1/sessions", headers={"Twinkle-Authorization": f"Bearer {token}"}))


async def test_an_own_key_is_described_and_can_be_ended(gateway: Harness) -> None:
    key_id = await with_key(gateway)
    token = await token_of(gateway, "tml-ada")

    me = ok(await gateway.get("auth/apikey/me", key="tml-ada"))

    assert (me["key_id"], me["name"]) == (key_id, f"ada-{key_id}")
    assert me["details"] == {"org_details": {"name": "user:ada"}, "user_details": {"email": "ada"}}
    ok(await gateway.client.delete("/api/v1/auth/apikey/me", headers={"X-API-Key": "tml-ada"}))
    refused(await gateway.get("sessions", key="tml-ada"), 401)
    assert is_invalid_token(await gateway.get("sessions", key=token))


async def test_a_key_of_open_mode_cannot_be_ended(gateway: Harness) -> None:
    assert ok(await gateway.get("auth/apikey/me"))["key_id"] == 0

    answer = await gateway.client.delete("/api/v1/auth/apikey/me", headers={"X-API-Key": KEY})

    assert "open mode" in refused(answer, 400)


class TestWithoutTokens:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(is_loopback=True, has_jwt=False)

    async def test_none_are_given_out_and_none_are_taken(self, gateway: Harness) -> None:
        assert ok(await gateway.post("client/config", {"sdk_version": "0.38.0"}))["pjwt_auth_enabled"] is False
        assert "API key" in refused(await gateway.post("auth/token"), 400)
        signer = gateway.app.state.gateway.signer
        token = await signer.sign("login", {"key": key_digest(KEY)}, expires_at=gateway.clock.now() + 100)
        refused(await gateway.get("sessions", key=token), 401)


class TestBelowAPrefix:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(is_loopback=True, root_path="/twinkle")

    async def test_every_route_answers_below_it_and_only_there(self, gateway: Harness) -> None:
        headers = {"X-API-Key": KEY}
        get = gateway.client.get
        assert ok(await get("/twinkle/api/v1/sessions", headers=headers)) == {"sessions": []}
        assert "/twinkle" in refused(await get("/api/v1/sessions", headers=headers), 404)
        for path in ("/twinklex/api/v1/sessions", "/twinkle", "/"):
            refused(await get(path, headers=headers), 404)

    async def test_health_and_metrics_answer_at_the_top_as_well(self, gateway: Harness) -> None:
        for path in ("/healthz", "/readyz", "/metrics"):
            for prefix in ("", "/twinkle"):
                assert (await gateway.client.get(prefix + path)).status_code == 200, prefix + path

    async def test_what_a_proxy_says_about_a_prefix_is_not_believed(self, gateway: Harness) -> None:
        headers = {"X-API-Key": KEY, "X-Forwarded-Prefix": "/other"}
        ok(await gateway.client.get("/twinkle/api/v1/sessions", headers=headers))
        refused(await gateway.client.get("/other/api/v1/sessions", headers=headers), 404)

    async def test_metrics_name_the_route_without_the_prefix(self, gateway: Harness) -> None:
        await gateway.client.get("/twinkle/api/v1/sessions", headers={"X-API-Key": KEY})
        text = (await gateway.client.get("/metrics")).text
        assert 'route="/api/v1/sessions",status="200"' in text

    async def test_the_document_of_the_api_says_where_it_is(self, gateway: Harness) -> None:
        document = ok(await gateway.client.get("/twinkle/openapi.json"))
        assert document["servers"] == [{"url": "/twinkle"}]
