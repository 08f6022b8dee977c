"""Created keys: their ends, other gateways, open mode beside them, suspended tenants, and operators' routes."""

from __future__ import annotations

from datetime import UTC, datetime

import httpx
import pytest
from gateway_support import KEY, Harness, ok, open_tenant, refused
from test_gateway_tokens import claims_of, is_invalid_token, token_of

from treadle.domain.ids import TenantId
from treadle.domain.keys import is_own_form, key_digest, new_key
from treadle.domain.tenants import TenantChange
from treadle.errors import InvalidRequest
from treadle.gateway import GatewaySettings
from treadle.gateway.auth import KEY_CACHE_S, OPEN_CACHE_S
from treadle.store.audit import Author

ADMIN = "tml-admin"
OPS = Author(TenantId("user:ops"), "user:ops (key 1)")


async def call(gateway: Harness, method: str, path: str, body: object = None, *, key: str = ADMIN) -> httpx.Response:
    options = {} if body is None else {"json": body}
    return await gateway.client.request(method, f"/admin/v1/{path}", headers={"X-API-Key": key}, **options)


@pytest.fixture
async def admin(gateway: Harness) -> Harness:
    """A gateway with an admin key."""
    await gateway.store.keys.add("ops", key_digest(ADMIN), True)
    gateway.clock.advance(OPEN_CACHE_S)
    return gateway


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat()


def test_a_key_has_256_random_bits_and_a_form_of_its_own() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(is_own_form(key) and len(key) == len("tml-") + 43 for key in keys)
    assert not any(is_own_form(other) for other in ("tml-ada", new_key() + "x", new_key()[4:], "tml-ms-0123456789"))


async def test_a_key_ends_on_time_whether_cached_or_not(gateway: Harness) -> None:
    await gateway.store.keys.add("ada", key_digest("tml-ada"), False, expires_at=gateway.clock.now() + 100)
    gateway.clock.advance(99.9)
    ok(await gateway.get("sessions", key="tml-ada"))

    gateway.clock.advance(0.1)

    assert "expired" in refused(await gateway.get("sessions", key="tml-ada"), 401)
    gateway.clock.advance(1_000)
    assert "expired" in refused(await gateway.get("sessions", key="tml-ada"), 401)


async def test_a_token_ends_when_its_key_does(gateway: Harness) -> None:
    await gateway.store.keys.add("ada", key_digest("tml-ada"), False, expires_at=gateway.clock.now() + 100)
    token = await token_of(gateway, "tml-ada")
    ok(await gateway.get("sessions", key=token))

    gateway.clock.advance(100)

    assert is_invalid_token(await gateway.get("sessions", key=token))
    refused(await gateway.post("auth/token", key="tml-ada"), 401)


async def test_another_gateway_follows_within_a_second(gateway: Harness, other_gateway: Harness) -> None:
    record = await gateway.store.keys.add("ada", key_digest("tml-ada"), False)
    later = await gateway.store.keys.add("bob", key_digest("tml-bob"), False)
    for key in ("tml-ada", "tml-bob"):
        ok(await other_gateway.get("sessions", key=key))

    await gateway.store.keys.revoke(record.key_id)
    await gateway.store.keys.change(later.key_id, name=None, expires_at=gateway.clock.now(), author=OPS)
    gateway.clock.advance(KEY_CACHE_S)

    assert KEY_CACHE_S < 1
    for key in ("tml-ada", "tml-bob"):
        refused(await other_gateway.get("sessions", key=key), 401)

    await gateway.store.keys.change(later.key_id, name=None, expires_at=None, author=OPS)
    gateway.clock.advance(KEY_CACHE_S)
    ok(await other_gateway.get("sessions", key="tml-bob"))


async def test_a_key_makes_its_tenant_a_row(gateway: Harness) -> None:
    await gateway.store.keys.add("ada", key_digest("tml-1"), False)
    tenant = await gateway.store.tenants.get(TenantId("user:ada"))
    assert tenant is not None
    assert (tenant.source, tenant.organization) == ("keys", None)

    version = (await gateway.store.policies.read()).version
    await gateway.store.keys.add("ada", key_digest("tml-2"), False, organization="acme")
    policies = await gateway.store.policies.read()

    assert policies.organizations == {"user:ada": "acme"}
    assert policies.version > version
    await gateway.store.keys.add("ada", key_digest("tml-3"), False, organization="acme")
    with pytest.raises(InvalidRequest, match="acme"):
        await gateway.store.keys.add("ada", key_digest("tml-4"), False, organization="rival")
    assert await gateway.store.keys.find(key_digest("tml-4")) is None


async def test_who_one_is_names_the_key_and_the_organization(gateway: Harness) -> None:
    await gateway.store.keys.add("ada", key_digest("tml-ada"), False, name="laptop", organization="acme")
    await gateway.app.state.gateway.policies.refresh()

    me = ok(await gateway.get("auth/apikey/me", key="tml-ada"))

    assert me["name"] == "laptop"
    assert me["details"]["org_details"] == {"name": "acme"}
    assert claims_of(await token_of(gateway, "tml-ada"))["org_id"] == "acme"


@pytest.mark.parametrize("reason", ["unpaid since May", ""])
async def test_a_suspended_tenant_is_refused_everything(admin: Harness, reason: str) -> None:
    await admin.store.keys.add("ada", key_digest("tml-ada"), False)
    token = await token_of(admin, "tml-ada")
    ok(await admin.get("sessions", key="tml-ada"))
    change = {"is_suspended": True, "suspended_reason": reason} if reason else {"is_suspended": True}

    ok(await call(admin, "PUT", "tenants/user:ada", change))

    for credential in ("tml-ada", token):
        for answer in (
            await admin.get("sessions", key=credential),
            await admin.post("create_session", key=credential),
            await admin.post("auth/token", key=credential),
        ):
            assert reason in refused(answer, 403)
    ok(await call(admin, "PUT", "tenants/user:ada", {"is_suspended": False}))
    ok(await admin.get("sessions", key="tml-ada"))


async def test_a_suspended_tenant_of_open_mode_is_refused_too(gateway: Harness) -> None:
    await gateway.store.tenants.change(open_tenant(), TenantChange(is_suspended=True), author=OPS)
    await gateway.app.state.gateway.policies.refresh()

    refused(await gateway.get("sessions"), 403)
    ok(await gateway.get("sessions", key="tml-two"))


class TestOpenBesideKeys:
    @pytest.fixture
    def settings(self) -> GatewaySettings:
        return GatewaySettings(is_loopback=True, hold_s=0.1, auth_methods=("open", "keys"))

    async def test_a_created_key_is_that_key_and_any_other_a_tenant_of_its_own(self, gateway: Harness) -> None:
        await gateway.store.keys.add("ops", key_digest(ADMIN), True)

        ok(await call(gateway, "GET", "keys"))
        assert ok(await gateway.get("auth/apikey/me", key=ADMIN))["name"] == "ops-1"
        assert ok(await gateway.get("auth/apikey/me"))["name"] == open_tenant()
        refused(await call(gateway, "GET", "keys", key=KEY), 403)

    async def test_a_key_that_ended_does_not_become_a_tenant_of_its_own(self, gateway: Harness) -> None:
        record = await gateway.store.keys.add("ada", key_digest("tml-ada"), False)
        await gateway.store.keys.add("bob", key_digest("tml-bob"), False, expires_at=gateway.clock.now() + 5)
        token = await token_of(gateway, "tml-ada")
        await gateway.store.keys.revoke(record.key_id)
        gateway.clock.advance(5)

        refused(await gateway.get("sessions", key="tml-ada"), 401)
        refused(await gateway.get("sessions", key="tml-bob"), 401)
        assert is_invalid_token(await gateway.get("sessions", key=token))

    async def test_a_key_that_is_created_counts_within_a_second(self, gateway: Harness) -> None:
        assert ok(await gateway.get("auth/apikey/me", key="tml-ada"))["key_id"] == 0
        await gateway.store.keys.add("ada", key_digest("tml-ada"), False)
        gateway.clock.advance(OPEN_CACHE_S)

        assert ok(await gateway.get("auth/apikey/me", key="tml-ada"))["key_id"] == 1


class TestOperators:
    async def test_create_list_change_revoke(self, admin: Harness) -> None:
        body = {"user": "ada", "name": "laptop", "expires_in_s": 3_600, "organization": "acme"}
        made = ok(await call(admin, "POST", "keys", body))
        key = made.pop("key")
        assert is_own_form(key)
        now = admin.clock.now()
        assert made == {
            "key_id": 2,
            "user": "ada",
            "tenant_id": "user:ada",
            "organization": "acme",
            "name": "laptop",
            "is_admin": False,
            "created_at": at(now),
            "created_by": "user:ops (key 1)",
            "expires_at": at(now + 3_600),
            "revoked_at": None,
            "is_usable": True,
        }
        assert ok(await admin.get("auth/apikey/me", key=key))["details"]["org_details"] == {"name": "acme"}
        assert ok(await call(admin, "GET", "keys/2")) == made
        assert ok(await call(admin, "GET", "keys?user=ada")) == {"keys": [made], "next": None}

        changed = ok(await call(admin, "PUT", "keys/2", {"expires_at": None}))
        assert (changed["expires_at"], changed["name"]) == (None, "laptop")
        changed = ok(await call(admin, "PUT", "keys/2", {"name": None, "expires_at": at(now + 5)}))
        assert (changed["expires_at"], changed["name"]) == (at(now + 5), None)
        ok(await admin.get("sessions", key=key))

        revoked = ok(await call(admin, "DELETE", "keys/2"))
        assert (revoked["revoked_at"], revoked["is_usable"]) == (at(now), False)
        # Here at once, without a moment of grace.
        refused(await admin.get("sessions", key=key), 401)
        assert ok(await call(admin, "DELETE", "keys/2")) == revoked
        assert "revoked" in refused(await call(admin, "PUT", "keys/2", {"name": "again"}), 400)

    async def test_a_key_that_is_given_its_end_now_is_refused_at_once(self, admin: Harness) -> None:
        await admin.store.keys.add("ada", key_digest("tml-ada"), False)
        ok(await admin.get("sessions", key="tml-ada"))

        ok(await call(admin, "PUT", "keys/2", {"expires_at": at(admin.clock.now())}))

        refused(await admin.get("sessions", key="tml-ada"), 401)

    async def test_every_change_is_in_the_audit_log_without_the_key(self, admin: Harness) -> None:
        key = ok(await call(admin, "POST", "keys", {"user": "ada", "is_admin": True}))["key"]
        ok(await call(admin, "PUT", "keys/2", {"name": "n"}))
        ok(await call(admin, "PUT", "keys/2", {"name": "n"}))
        ok(await call(admin, "DELETE", "keys/2"))

        events = ok(await call(admin, "GET", "audit?subject=key:2"))

        entries = sorted(events["events"], key=lambda entry: entry["event"])
        assert [entry["event"] for entry in entries] == ["key.changed", "key.created", "key.revoked"]
        assert {entry["actor"] for entry in entries} == {"user:ops (key 1)"}
        assert entries[1]["details"]["after"]["is_admin"] is True
        changed = entries[0]["details"]
        assert (changed["before"]["name"], changed["after"]["name"]) == (None, "n")
        for secret in (key, key_digest(key)):
            assert secret not in str(events)

    async def test_pages_go_from_the_newest_to_the_oldest(self, admin: Harness) -> None:
        for number in range(4):
            await admin.store.keys.add("ada", key_digest(f"tml-{number}"), False)
        found, following = [], ""
        while following is not None:
            page = ok(await call(admin, "GET", f"keys?limit=2{following and '&before=' + following}"))
            found += [key["key_id"] for key in page["keys"]]
            following = page["next"]
        assert found == [5, 4, 3, 2, 1]

    @pytest.mark.parametrize(
        ("method", "path", "body", "status"),
        [
            ("GET", "keys/9", None, 404),
            ("GET", "keys/-1", None, 404),
            ("GET", "keys/" + "9" * 40, None, 404),
            ("DELETE", "keys/9", None, 404),
            ("PUT", "keys/9", {"name": "n"}, 404),
            ("PUT", "keys/1", {}, 400),
            ("PUT", "keys/1", {"expires_at": "tomorrow"}, 400),
            ("PUT", "keys/1", {"expires_at": "2026-01-01T00:00:00"}, 400),
            ("PUT", "keys/1", {"expires_at": "9999-12-31T23:59:59-12:00"}, 400),
            ("PUT", "keys/1", {"expires_at": "0001-01-01T00:00:00+12:00"}, 400),
            ("PUT", "keys/1", {"is_admin": True}, 400),
            ("PUT", "keys/1", {"name": "a\nb"}, 400),
            ("POST", "keys", {"user": "a/b"}, 400),
            ("POST", "keys", {"user": "ada", "expire_in_s": 5}, 400),
            ("POST", "keys", {"user": "ada", "expires_in_s": 0}, 400),
            ("POST", "keys", {"user": "ada", "expires_in_s": 10**12}, 400),
            ("POST", "keys", {"user": "ada", "organization": ""}, 400),
            ("POST", "keys", {}, 400),
            ("GET", "keys?before=x", None, 400),
            ("GET", "keys?limit=0", None, 400),
        ],
    )
    async def test_what_makes_no_sense_is_refused(
        self, admin: Harness, method: str, path: str, body: object, status: int
    ) -> None:
        refused(await call(admin, method, path, body), status)
        assert len(await admin.store.keys.list()) == 1

    async def test_a_users_key_may_do_none_of_it(self, admin: Harness) -> None:
        await admin.store.keys.add("ada", key_digest("tml-ada"), False)
        for method, path, body in [
            ("GET", "keys", None),
            ("POST", "keys", {"user": "ada"}),
            ("GET", "keys/1", None),
            ("PUT", "keys/1", {"name": "n"}),
            ("DELETE", "keys/1", None),
        ]:
            refused(await call(admin, method, path, body, key="tml-ada"), 403)
