"""What a tenant had in its hands when an operator suspended it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from gateway_support import KEY, OTHER_KEY, Harness, ok, open_tenant, refused
from gateway_surface import Estate, new_estate
from test_gateway_projects import new_project, shared_estate, signed_urls

from treadle.domain.ids import CheckpointKind, TenantId
from treadle.domain.keys import key_digest
from treadle.domain.tenants import TenantChange
from treadle.gateway import GatewaySettings
from treadle.gateway.auth import KEY_CACHE_S
from treadle.store.audit import Author

BOSS = Author(open_tenant("tml-boss"), "boss")


@pytest.fixture
def settings() -> GatewaySettings:
    """A question is held until its result is there."""
    return GatewaySettings(is_loopback=True, hold_s=30.0)


async def suspend(gateway: Harness, key: str, *, ends: bool = False) -> None:
    change = TenantChange(is_suspended=not ends)
    await gateway.store.tenants.change(open_tenant(key), change, author=BOSS)
    await gateway.app.state.gateway.policies.refresh()


async def all_urls(gateway: Harness, theirs: Estate, *, key: str) -> list[str]:
    path = theirs.url(CheckpointKind.EXTERNAL).removeprefix("/api/v1/")
    archive = await gateway.get(f"{path}/archive", key=key, follow_redirects=False)
    return [*await signed_urls(gateway, theirs, key=key), archive.headers["location"]]


async def test_urls_of_its_own_things_end_with_its_access(gateway: Harness) -> None:
    theirs = await new_estate(gateway)
    urls = await all_urls(gateway, theirs, key=KEY)

    await suspend(gateway, KEY)

    for url in urls:
        refused(await gateway.client.get(url), 403)
    await suspend(gateway, KEY, ends=True)
    for url in urls:
        assert (await gateway.client.get(url)).status_code == 200


@pytest.mark.parametrize("suspended", [OTHER_KEY, KEY])
async def test_urls_that_a_project_gave_end_with_their_readers_access(gateway: Harness, suspended: str) -> None:
    project = await new_project(gateway, OTHER_KEY)
    theirs = await shared_estate(gateway, project)
    urls = await all_urls(gateway, theirs, key=OTHER_KEY)

    await suspend(gateway, suspended)

    for url in urls:
        if suspended == OTHER_KEY:
            refused(await gateway.client.get(url), 403)
        else:
            assert (await gateway.client.get(url)).status_code == 200, "others read what it shared, as they did"


async def test_what_it_published_stays_public(gateway: Harness) -> None:
    theirs = await new_estate(gateway, public=True)
    await gateway.new_session(key=OTHER_KEY)
    path = theirs.url(CheckpointKind.EXTERNAL).removeprefix("/api/v1/")
    [url] = ok(await gateway.get(f"{path}/external_weights_urls", key=OTHER_KEY))["urls"].values()

    await suspend(gateway, KEY)

    assert (await gateway.client.get(url)).status_code == 200
    ok(await gateway.post("weights_info", {"tinker_path": theirs.path()}, key=OTHER_KEY))


async def test_its_key_as_an_access_token_opens_nothing(gateway: Harness) -> None:
    theirs = await new_estate(gateway)
    copy = {"source_path": theirs.path(), "destination_project_id": "p", "weights_access_token": KEY}
    ok(await gateway.post("copy_weights", copy, key=OTHER_KEY))

    await suspend(gateway, KEY)

    refused(await gateway.post("copy_weights", copy, key=OTHER_KEY), 403)


@pytest.mark.parametrize("end", ["revoke", "suspend", "expire"])
async def test_a_result_that_comes_after_the_end_is_not_given_out(gateway: Harness, end: str) -> None:
    """The question came before, and was held until there was a result."""
    record = await gateway.store.keys.add("ada", key_digest("tml-ada"), False, expires_at=gateway.clock.now() + 100.0)
    model_id = await gateway.new_model(await gateway.new_session(key="tml-ada"), key="tml-ada")
    op = {"model_id": model_id, "seq_id": 1, "adam_params": {}}
    request_id = ok(await gateway.post("optim_step", op, key="tml-ada"))["request_id"]
    asking = asyncio.create_task(gateway.future(request_id, key="tml-ada"))
    async with asyncio.timeout(30):
        while not gateway.app.state.gateway.hub.num_waiters:  # noqa: ASYNC110 (nothing tells)
            await asyncio.sleep(0.01)
    match end:
        case "revoke":
            await gateway.store.keys.revoke(record.key_id)
            gateway.clock.advance(KEY_CACHE_S)
        case "suspend":
            change = TenantChange(is_suspended=True)
            await gateway.store.tenants.change(TenantId("user:ada"), change, author=BOSS)
            await gateway.app.state.gateway.policies.refresh()
        case "expire":
            gateway.clock.advance(101.0)

    await gateway.finish(request_id, b"{}")

    refused(await asking, 403 if end == "suspend" else 401)


@pytest.mark.parametrize("path", ["/admin/v1/keys", "/api/v1/create_session", "/api/v1/asample"])
async def test_a_body_that_was_begun_before_the_end_is_not_obeyed(
    gateway: Harness, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Whoever stole a key could else keep a few requests open, and end them when it is revoked."""
    monkeypatch.setattr("treadle.gateway.bodies.FRESH_S", 0.0)
    record = await gateway.store.keys.add("ops", key_digest("tml-ops"), True)
    headers = {"X-API-Key": "tml-ops", "Content-Type": "application/json"}

    async def body() -> AsyncIterator[bytes]:
        yield b'{"user": "mallory", '
        await gateway.store.keys.revoke(record.key_id)
        gateway.clock.advance(KEY_CACHE_S)
        yield b'"is_admin": true}'

    refused(await gateway.client.post(path, content=body(), headers=headers), 401)

    assert len(await gateway.store.keys.list()) == 1
    sessions, _ = await gateway.store.sessions.list(None, 10)
    assert not sessions


class TestBehindAProxyOnTheMachine:
    """Where everybody's connection comes from loopback."""

    @pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"])
    async def test_nobody_counts_as_local(self, gateway: Harness, header: str) -> None:
        await gateway.store.keys.add("ops", key_digest("tml-ops"), True)
        gateway.clock.advance(1.0)
        proxied, admin = {header: "192.0.2.1"}, {"X-API-Key": "tml-ops"}

        refused(await gateway.client.get("/metrics", headers=proxied), 401)
        assert (await gateway.client.get("/metrics", headers=proxied | admin)).status_code == 200
        assert (await gateway.client.get("/metrics")).status_code == 200
        for headers, is_local in ((admin, True), (admin | proxied, False)):
            answer = ok(await gateway.client.get("/api/v1/get_server_capabilities", headers=headers))
            assert ("/models/base" in [model["model_name"] for model in answer["supported_models"]]) == is_local
