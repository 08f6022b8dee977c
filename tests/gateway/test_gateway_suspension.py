"""What a tenant had in its hands when an operator suspended it."""

from __future__ import annotations

import pytest
from gateway_support import KEY, OTHER_KEY, Harness, ok, open_tenant, refused
from gateway_surface import Estate, new_estate
from test_gateway_projects import new_project, shared_estate, signed_urls

from treadle.domain.ids import CheckpointKind
from treadle.domain.tenants import TenantChange
from treadle.store.audit import Author

BOSS = Author(open_tenant("tml-boss"), "boss")


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
