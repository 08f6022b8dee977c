"""Random worlds of tenants, organisations, projects, published checkpoints and access tokens, asked at random.

A few lines (`World.may_read`) say what is allowed, knowing nothing of the server. Everything else must be answered as
if there were nothing, and nobody's rows but the caller's may change, whatever is asked.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import sqlalchemy as sa
from gateway_support import KEY, OTHER_KEY, Harness, ok, open_tenant
from gateway_surface import CALLS, Call, Estate, new_estate, send, serve_text
from test_gateway_ownership import USERS, answers_about, is_refused
from test_gateway_projects import call as ask

from treadle.domain.ids import CheckpointKind, TenantId
from treadle.domain.tenants import TenantChange
from treadle.gateway import GatewaySettings
from treadle.gateway.sharing import SHARING_CACHE_S
from treadle.store.audit import Author
from treadle.store.tables import metadata

KEYS = (KEY, OTHER_KEY, "tml-three", "tml-four", "tml-five")
KEY_OF = {open_tenant(key): key for key in KEYS}
OPERATOR = Author(open_tenant("tml-operator"), "operator")
# Calls of CALLS that read somebody's checkpoint, by their places; of other routes, every one of CHECKPOINT_ROUTES.
CHECKPOINT_READS = {
    "POST /api/v1/load_weights": (1, 3),
    "POST /api/v1/create_sampling_session": (1, 2),
    "POST /api/v1/copy_weights": (0, 1),
    "POST /api/v1/weights_info": (0, 1, 2),
    "GET /api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}/archive": (0, 1, 2),
    "GET /api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}/external_weights_urls": (0,),
    **{
        f"POST {prefix}/{path}": (1, 2)
        for prefix, paths in {
            "/oai/api/v1": ("chat/completions", "completions"),
            "/v1": ("chat/completions", "completions", "messages", "messages/count_tokens"),
            "/anthropic/api/v1": ("messages", "messages/count_tokens"),
        }.items()
        for path in paths
    },
    **{f"GET {prefix}/models/{{model:path}}": (1,) for prefix in ("/oai/api/v1", "/v1")},
}
# Calls that read a session or a run, where that is enough of a scope.
SESSION_READS = {
    "GET /api/v1/sessions/{session_id}": (1,),
    "GET /api/v1/sessions/{session_id}/trace_export": (0,),
    "POST /api/v1/sessions/search": (2,),
    "GET /api/v1/training_runs/{model_id}": (1,),
    "GET /api/v1/training_runs/{model_id}/checkpoints": (0,),
}
# Listings that take a project's id.
BY_PROJECT = ("POST /api/v1/sessions/search", "GET /api/v1/training_runs")


@pytest.fixture(params=["sqlite_url", pytest.param("postgres_url", marks=pytest.mark.postgres)])
def gateway_url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.01)


@dataclass
class Project:
    owner: TenantId
    members: set[TenantId]


@dataclass
class World:
    """What there is, as whoever made it remembers it."""

    gateway: Harness
    random: random.Random
    organizations: dict[TenantId, str] = field(default_factory=dict)
    projects: dict[str, Project] = field(default_factory=dict)
    estates: list[Estate] = field(default_factory=list)
    owner_of: dict[str, TenantId] = field(default_factory=dict)
    project_of: dict[str, str] = field(default_factory=dict)
    published: set[str] = field(default_factory=set)
    # (project, tenant) of everybody who ever was a member: things of its own may still be there.
    have_been_in: set[tuple[str, TenantId]] = field(default_factory=set)

    def are_together(self, one: TenantId, other: TenantId) -> bool:
        return self.organizations[one] == self.organizations[other]

    def is_shared(self, reader: TenantId, theirs: Estate) -> bool:
        """THE ORACLE: both are in the session's project, and in its owner's organisation."""
        project, owner = self.projects.get(self.project_of[theirs.session_id]), self.owner_of[theirs.session_id]
        return project is not None and all(
            one in project.members and self.are_together(one, project.owner) for one in (reader, owner)
        )

    def may_read(self, reader: TenantId, theirs: Estate, route: str, index: int) -> bool:
        """THE ORACLE of calls."""
        if index in SESSION_READS.get(route, ()):
            return self.is_shared(reader, theirs)
        is_readable = theirs.session_id in self.published or self.is_shared(reader, theirs)
        return index in CHECKPOINT_READS.get(route, ()) and is_readable

    def any_tenant(self) -> TenantId:
        return self.random.choice(list(KEY_OF))

    def any_project(self) -> str:
        return self.random.choice(list(self.projects))

    def any_estate(self) -> Estate:
        return self.random.choice(self.estates)


async def new_world(gateway: Harness, seed: int) -> World:
    world = World(gateway, random.Random(seed))
    for name in ("acme", "beta"):
        await gateway.store.organizations.put(name, "", author=OPERATOR)
    for tenant, key in KEY_OF.items():
        world.organizations[tenant] = ""
        estate = await new_estate(gateway, key=key)
        world.estates.append(estate)
        world.owner_of[estate.session_id] = tenant
        world.project_of[estate.session_id] = estate.project
        world.projects[estate.shared_project] = Project(tenant, {tenant})
    # So that much is shared: most are in two projects, with what they have.
    hubs = list(world.projects)[:2]
    for project_id in hubs:
        for tenant in KEY_OF:
            if world.random.random() < 0.7:
                await add(world, project_id, tenant)
    for estate in world.estates:
        await put_in(world, estate, world.random.choice(hubs))
    for _ in range(6):
        await happen(world)
    return world


async def happen(world: World) -> None:
    """Something changes."""
    project_id, tenant, estate = world.any_project(), world.any_tenant(), world.any_estate()
    match world.random.choices(["add", "put in", "remove", "publish", "join", "delete"], [4, 4, 2, 2, 1, 0.5]):
        case ["add"]:
            await add(world, project_id, tenant)
        case ["put in"]:
            await put_in(world, estate, world.random.choice([project_id, project_id, "private"]))
        case ["remove"]:
            await remove(world, project_id, tenant)
        case ["publish"]:
            await publish(world, estate)
        case ["join"]:
            await join(world, tenant, world.random.choice(["", "", "acme", "beta"]))
        case _:
            await delete(world, project_id)


async def add(world: World, project_id: str, tenant: TenantId) -> None:
    project = world.projects[project_id]
    answer = await ask(world.gateway, "PUT", f"projects/{project_id}/members/{tenant}", key=KEY_OF[project.owner])
    assert answer.status_code == (200 if world.are_together(tenant, project.owner) else 404), answer.text
    if answer.status_code == 200:
        project.members.add(tenant)
        world.have_been_in.add((project_id, tenant))


async def remove(world: World, project_id: str, tenant: TenantId) -> None:
    project = world.projects[project_id]
    if tenant != project.owner:
        path = f"projects/{project_id}/members/{tenant}"
        ok(await ask(world.gateway, "DELETE", path, key=KEY_OF[project.owner]))
        project.members.discard(tenant)


async def put_in(world: World, estate: Estate, project_id: str) -> None:
    """A session moves into a project, or into a name of its owner's."""
    owner, project = world.owner_of[estate.session_id], world.projects.get(project_id)
    path, body = f"sessions/{estate.session_id}/project", {"project_id": project_id}
    answer = await ask(world.gateway, "PUT", path, body, key=KEY_OF[owner])
    may = project is None or (owner in project.members and world.are_together(owner, project.owner))
    assert answer.status_code == (200 if may else 403), answer.text
    if may:
        world.project_of[estate.session_id] = project_id


async def publish(world: World, estate: Estate) -> None:
    is_public = estate.session_id in world.published
    for kind in CheckpointKind:
        path = f"{estate.url(kind)}/publish".removeprefix("/api/v1/")
        key = KEY_OF[world.owner_of[estate.session_id]]
        ok(await ask(world.gateway, "DELETE" if is_public else "POST", path, key=key))
    world.published ^= {estate.session_id}


async def join(world: World, tenant: TenantId, organization: str) -> None:
    await world.gateway.store.tenants.change(tenant, TenantChange(organization=organization), author=OPERATOR)
    world.organizations[tenant] = organization
    # Operators' changes come through the database.
    world.gateway.clock.advance(SHARING_CACHE_S)


async def delete(world: World, project_id: str) -> None:
    if len(world.projects) > 2:
        ok(await ask(world.gateway, "DELETE", f"projects/{project_id}", key=KEY_OF[world.projects[project_id].owner]))
        del world.projects[project_id]


async def rows_of_others(gateway: Harness, tenant: TenantId) -> Counter[tuple[object, ...]]:
    """Every row that says whose it is, but a tenant's own."""
    tables = [table for table in metadata.sorted_tables if "tenant_id" in table.c]

    def read(conn: sa.Connection) -> Counter[tuple[object, ...]]:
        return Counter(
            (table.name, *map(repr, row))
            for table in tables
            for row in conn.execute(sa.select(table).where(table.c.tenant_id != tenant))
        )

    return await gateway.store._database.read(read)


async def is_answered(gateway: Harness, asked: Call, *, key: str) -> bool:
    """Whether a call found what it named."""
    answer = await send(gateway, asked, key=key)
    if answer.status_code == 200 and "request_id" in answer.json():
        # It was admitted, and waits for a worker.
        return (await gateway.future(answer.json()["request_id"], key=key)).status_code == 408
    if answer.status_code == 200 and "sessions" in answer.json():
        return answer.json()["sessions"] != []
    # The archive was looked into.
    return answer.status_code in (200, 302) or "holds no adapter" in answer.text


async def breach_of(world: World, caller: TenantId, mine: Estate, theirs: Estate) -> object | None:
    """What is wrong with the answer to a random call about somebody else's things."""
    readings = [*CHECKPOINT_READS, *SESSION_READS]
    route = world.random.choice(readings if world.random.random() < 0.4 else sorted(USERS))
    index = world.random.randrange(len(CALLS[route](mine, theirs)))
    asked, key = CALLS[route](mine, theirs)[index], KEY_OF[caller]
    if world.may_read(caller, theirs, route, index):
        # Nobody samples here.
        if asked.is_sampled or await is_answered(world.gateway, asked, key=key):
            return None
        return "refused", route, index
    answers = await answers_about(world.gateway, mine, theirs, route, index, key=key)
    if not answers or is_refused(route, answers):
        return None
    # A project that the caller is in, or where it left things of its own: see `breach_of_listings`.
    if theirs.shared_project in f"{asked.path} {asked.body}":
        project = world.projects.get(theirs.shared_project)
        is_member = project is not None and caller in project.members
        has_been_in = route in BY_PROJECT and (theirs.shared_project, caller) in world.have_been_in
        if is_member or has_been_in:
            return None
    return "answered", route, index, answers


async def breach_of_a_token(world: World, caller: TenantId, mine: Estate, theirs: Estate) -> object | None:
    """What is wrong with a copy by an access token: of its owner's things, and no more."""
    holder = world.any_tenant()
    headers = {"X-API-Key": KEY_OF[caller], "X-Tinker-Weights-Access-Token": KEY_OF[holder]}
    body = {"source_path": theirs.path(), "destination_project_id": "copies"}
    answer = await world.gateway.client.post("/api/v1/copy_weights", json=body, headers=headers)
    is_readable = world.may_read(caller, theirs, "POST /api/v1/copy_weights", 0)
    may = world.owner_of[theirs.session_id] in (holder, caller) or is_readable
    return None if answer.status_code == (200 if may else 404) else ("token", may, answer.text)


async def breach_of_listings(world: World, caller: TenantId) -> object | None:
    key, scope = KEY_OF[caller], "access_scope=accessible"
    readable = {
        estate.session_id
        for estate in world.estates
        if world.owner_of[estate.session_id] == caller or world.is_shared(caller, estate)
    }
    everything = {estate.session_id for estate in world.estates}
    gateway = world.gateway
    sessions = set(ok(await gateway.get(f"sessions?limit=1000&{scope}", key=key))["sessions"])
    runs = ok(await gateway.get(f"training_runs?limit=1000&{scope}", key=key))["training_runs"]
    found = ok(await gateway.post("sessions/search", {"owner": {"type": "accessible"}, "limit": 200}, key=key))
    listed = {
        "sessions": sessions & everything,
        "runs": {run["training_run_id"].partition(":")[0] for run in runs} & everything,
        "found": {session["session_id"] for session in found["sessions"]} & everything,
    }
    wrong = {name: ids ^ readable for name, ids in listed.items() if ids != readable}
    return ("listed", wrong) if wrong else None


async def explore(gateway: Harness, seed: int, *, num_rounds: int, num_calls: int) -> None:
    serve_text(gateway)
    world = await new_world(gateway, seed)
    num_read = 0
    for number in range(num_rounds):
        for _ in range(3):
            await happen(world)
        caller = world.any_tenant()
        mine = await new_estate(gateway, key=KEY_OF[caller])
        before = await rows_of_others(gateway, caller)
        breaches = [await breach_of_listings(world, caller)]
        for _ in range(num_calls):
            mine = replace(mine, seq_id=mine.seq_id + 8)
            theirs = world.any_estate()
            if world.owner_of[theirs.session_id] == caller:
                continue
            num_read += world.is_shared(caller, theirs)
            breaches.append(await breach_of(world, caller, mine, theirs))
        breaches.append(await breach_of_a_token(world, caller, mine, world.any_estate()))
        found = [breach for breach in breaches if breach is not None]
        assert not found, (seed, number, found)
        after = await rows_of_others(gateway, caller)
        assert after == before, (seed, number, after - before, before - after)
    assert num_read > num_rounds, f"seed {seed}: too little was shared to say anything"


@pytest.mark.parametrize("seed", [1, 2])
async def test_nobody_reads_more_than_is_shared(gateway: Harness, seed: int) -> None:
    await explore(gateway, seed, num_rounds=8, num_calls=30)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10, 16))
async def test_nobody_reads_more_than_is_shared_in_many_worlds(gateway: Harness, seed: int) -> None:
    await explore(gateway, seed, num_rounds=40, num_calls=60)
