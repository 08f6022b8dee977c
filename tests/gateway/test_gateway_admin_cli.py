"""`treadle admin` and the SDK's AdminClient against a gateway on a loopback port. One server and one story."""

from __future__ import annotations

import asyncio
import json
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
import uvicorn
from gateway_support import POOL, Harness, facts
from starlette.types import ASGIApp, Receive, Scope, Send
from test_gateway_admin import checkpoint, work
from test_gateway_custom_losses import body_of as loss_body
from typer.testing import CliRunner

from treadle.blobs import LocalBlobs
from treadle.cli.app import app
from treadle.domain.ids import ModelId, PoolName
from treadle.domain.keys import key_digest
from treadle.errors import ConfigError, Forbidden, InvalidRequest, NotFound, ServerError, Unauthenticated
from treadle.gateway import GatewaySettings, PoolView, create_app
from treadle.gateway.app import ENDPOINTS
from treadle.gateway.routing import ROUTE_TEMPLATE
from treadle.store import Store
from treadle.store.slots import Slots
from treadle.testing.clock import ManualClock

ADMIN, ALICE, BOB = "tml-admin", "tml-alice", "tml-bob"


class Recorder:
    """The app, with a note of which route every request found."""

    def __init__(self, served: ASGIApp) -> None:
        self._served = served
        self.routes: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._served(scope, receive, send)
        if scope["type"] == "http":
            self.routes.add(f"{scope['method']} {scope.get(ROUTE_TEMPLATE)}")


class World:
    """A gateway with an operator, two users, and something of everything."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = ""
        self.routes: set[str] = set()
        self.run_ids: dict[str, str] = {}
        self.paths: dict[str, str] = {}
        self._is_up = threading.Event()
        self._server: uvicorn.Server | None = None

    async def serve(self) -> None:
        # Today's time, which is what the SDK's questions are about.
        clock = ManualClock(time.time())
        store = await Store.open(f"sqlite:///{self.directory}/treadle.db", clock=clock.now)
        harness = Harness(
            store=store,
            blobs=LocalBlobs(self.directory / "blobs"),
            clock=clock,
            settings=GatewaySettings(is_loopback=True, hold_s=0.1, auth_methods=("keys",)),
            pools=[PoolView(PoolName(POOL), facts=facts(), is_ready=True)],
        )
        harness.app = create_app(harness.deps())
        for key, user in ((ADMIN, "ops"), (ALICE, "alice"), (BOB, "bob")):
            await store.keys.add(user, key_digest(key), is_admin=key == ADMIN)
        recorder = Recorder(harness.app)
        self.routes = recorder.routes
        config = uvicorn.Config(recorder, port=0, log_level="error", access_log=False)
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
            await asyncio.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        async with httpx.AsyncClient(base_url=self.url) as harness.client:
            for key, user in ((ALICE, "alice"), (BOB, "bob")):
                _, self.run_ids[user] = await work(harness, key)
                self.paths[user] = await checkpoint(harness, self.run_ids[user], user, "one", public=True)
        await store.slots.publish(await harness.lease(), Slots([ModelId(self.run_ids["alice"])]))
        self._is_up.set()
        await serving
        await store.close()

    @contextmanager
    def served(self) -> Iterator[World]:
        thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)
        thread.start()
        assert self._is_up.wait(30)
        yield self
        assert self._server is not None
        self._server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()

    def admin(self, command: str, *, key: str | None = ADMIN, text: str | None = None) -> Any:
        """The end of `treadle admin COMMAND`."""
        env = {"COLUMNS": "250", "TREADLE_URL": self.url, "TREADLE_ADMIN_KEY": key, "NO_COLOR": "1"}
        return CliRunner(env=env).invoke(app, ["admin", *shlex.split(command)], input=text)

    def shown(self, command: str, **options: Any) -> str:
        """What it writes to standard output; it must end well."""
        done = self.admin(command, **options)
        assert done.exit_code == 0, (command, done.stdout, done.stderr, done.exception)
        return done.stdout

    def json(self, command: str, **options: Any) -> Any:
        return json.loads(self.shown(f"{command} --json", **options))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(tmp_path_factory.mktemp("admin")).served() as world:
        yield world


def hour(offset: int) -> str:
    return (datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=offset)).isoformat()


def test_the_sdks_admin_client_sees_all_tenants(world: World) -> None:
    admin = tinker.AdminClient(base_url=world.url, api_key=ADMIN)
    user = tinker.AdminClient(base_url=world.url, api_key=BOB)

    usage = admin.get_billing_usage(hour(-1), hour(1)).result(timeout=60).data
    assert {(event.user_id, event.user_name) for event in usage} == {
        ("tml:user:alice", "alice"),
        ("tml:user:bob", "bob"),
    }
    assert {event.user_name for event in user.get_billing_usage(hour(-1), hour(1)).result(timeout=60).data} == {"bob"}
    stored = admin.get_current_checkpoint_storage_usage().result(timeout=60).data
    assert [(item.user_name, item.project_id, item.checkpoint_count) for item in stored] == [
        ("alice", "default", 1),
        ("bob", "default", 1),
    ]
    assert len(user.get_current_checkpoint_storage_usage().result(timeout=60).data) == 1

    world.shown("organizations set audited")
    entries = admin.get_audit_log().result(timeout=60).entries
    [entry] = [entry for entry in entries if entry.event_details.get("subject") == "organization:audited"]
    assert (entry.event, entry.event_details["user_name"]) == ("organization.set", "ops")
    assert entry.event_details["after"] == {"description": ""}
    assert all(entry.event != "organization.set" for entry in user.get_audit_log().result(timeout=60).entries)


def test_tenants_organizations_and_keys(world: World) -> None:
    world.shown('organizations set acme --description "Acme Inc."')
    assert "Acme Inc." in world.shown("organizations list")
    assert world.json("organizations show acme")["num_tenants"] == 0
    world.shown("tenants set alice --class bulk --organization acme")
    shown = world.shown("tenants list --organization acme")
    assert "user:alice" in shown
    assert "bulk" in shown
    assert "user:bob" not in shown
    assert world.json("tenants show alice")["num_checkpoints"] == 1
    assert "max_models" in world.shown("tenants quotas alice")
    world.shown('tenants suspend bob --reason "unpaid"')
    assert world.json("tenants list --name bob")["tenants"][0]["suspended_reason"] == "unpaid"
    world.shown("tenants resume bob")
    world.shown('tenants set alice --class standard --organization ""')
    world.shown("organizations delete acme")

    created = world.admin("keys create carol --name laptop --expires 30d")
    assert created.exit_code == 0, created.stderr
    key = created.stdout.strip()
    assert key.startswith("tml-")
    assert key not in created.stderr
    [listed] = world.json("keys list --user carol")["keys"]
    assert listed["name"] == "laptop"
    assert key not in world.shown("keys list")
    world.shown(f"keys set {listed['key_id']} --name desktop --expires-at never")
    shown = world.json(f"keys show {listed['key_id']}")
    assert (shown["name"], shown["expires_at"]) == ("desktop", None)
    world.shown(f"keys revoke {listed['key_id']}")
    assert world.json(f"keys show {listed['key_id']}")["revoked_at"] is not None


def test_quotas_and_losses(world: World) -> None:
    assert "max_lora_rank" in world.shown("quotas list")
    world.shown("quotas set tenant:alice max_lora_rank=16 max_models=3")
    world.shown("quotas set tenant:alice max_models=none")
    assert world.json("quotas show tenant:alice")["quotas"] == {"max_lora_rank": 16}
    assert "16" in world.shown("quotas show tenant:user:alice")
    world.shown("quotas delete tenant:alice")
    assert world.json("quotas show tenant:alice")["quotas"] == {}

    assert "cross_entropy" in world.shown("losses list")
    world.shown("losses set tenant:alice dro --off --bound beta=0:1")
    [rule] = world.json("losses list")["rules"]
    assert (rule["scope"], rule["is_enabled"], rule["bounds"]) == ("tenant:user:alice", False, {"beta": [0, 1]})
    assert "beta" in world.shown("losses list")
    world.shown("losses unset tenant:alice dro")
    name = world.json("losses operations")["operations"][0]
    assert world.json(f"losses operations --disable {name}")["disabled"] == [name]
    assert world.json("losses operations --enable-all")["disabled"] == []

    definition = loss_body("s")
    graph = json.dumps({"inputs": definition["inputs"], "graph": definition["graph"]})
    submitted = world.json("losses named submit my_loss - --form graph", text=graph)
    number = submitted["named_loss_id"]
    assert "my_loss" in world.shown("losses named list --status pending")
    assert world.json(f"losses named show {number}")["status"] == "pending"
    refused = world.admin(f"losses named approve {number} --tenant alice")
    assert isinstance(refused.exception, InvalidRequest), "it was not reviewed"
    assert isinstance(world.admin(f"losses named revoke {number} --reason x").exception, InvalidRequest)
    world.shown(f'losses named reject {number} --reason "no gradient"')
    assert world.json(f"losses named show {number}")["reason"] == "no gradient"
    assert isinstance(world.admin(f"losses named review {number}").exception, InvalidRequest)
    world.shown(f"losses named delete {number}")


def test_pools_runs_queue_and_slots(world: World) -> None:
    world.shown("pools list")
    # Without a scheduler here no pool is served; its own tests add and pause real ones.
    for action in ("pause", "resume", "drain", "remove"):
        assert isinstance(world.admin(f"pools {action} nothing").exception, NotFound)
    assert world.json(f"pools scale {POOL} --workers 2")["wanted_workers"] == 2
    assert world.json(f"pools scale {POOL}")["wanted_workers"] is None
    refused = world.admin("pools add ../x relative")
    assert isinstance(refused.exception, InvalidRequest)

    run = world.run_ids["alice"]
    assert run in world.shown("runs list --tenant alice")
    assert world.json(f"runs show {run}")["tenant_id"] == "user:alice"
    for action in ("snapshot", "evict"):
        assert isinstance(world.admin(f"runs {action} {run}").exception, InvalidRequest), "it is not ready"
    assert isinstance(world.admin("runs command 99").exception, NotFound)
    assert POOL in world.shown("queue")
    assert run in world.shown("slots")
    assert world.json(f"slots --pool {POOL}")["pools"][0]["num_runs"] == 1


def test_checkpoints_projects_audit_and_usage(world: World) -> None:
    assert world.paths["alice"] in world.shown("checkpoints list --public")
    world.shown(f"checkpoints unpublish {world.paths['bob']}")
    assert [row["user"] for row in world.json("checkpoints list --public")["checkpoints"]] == ["alice"]
    made = httpx.post(f"{world.url}/api/v1/projects", json={"name": "loom"}, headers={"X-API-Key": ALICE})
    project_id = made.json()["project_id"]
    assert "loom" in world.shown("projects list --tenant alice")
    assert world.json(f"projects show {project_id}")["name"] == "loom"
    world.shown(f"projects delete {project_id}")

    events = world.json("audit --event checkpoint.unpublished")["events"]
    assert [event["subject"] for event in events] == [f"checkpoint:{world.paths['bob']}"]
    assert "checkpoint.unpublished" in world.shown("audit --limit 5 --since 2020-01-01")
    for group in ("tenant", "run", "session", "project", "day", "hour"):
        assert sum(row["sampled_tokens"] for row in world.json(f"usage --by {group}")["data"]) == 10
    assert "sampled" in world.shown("usage --by day")
    lines = world.shown("usage --tenant alice --csv").splitlines()
    assert [line.split(",")[0] for line in lines] == ["tenant_id", "user:alice"]
    world.shown(f"checkpoints delete {world.paths['bob']}")
    assert isinstance(world.admin(f"checkpoints delete {world.paths['bob']}").exception, NotFound)


def test_every_route_of_operators_has_a_command(world: World) -> None:
    """The tests above have run all commands."""
    routes = {f"{endpoint.method} {endpoint.path}" for endpoint in ENDPOINTS if endpoint.path.startswith("/admin/")}
    assert routes - world.routes == set()


def test_a_listing_goes_on_over_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.cli.admin.client.MAX_PAGE_ROWS", 1)
    assert len(world.json("tenants list --limit 3")["tenants"]) == 3
    assert len(world.json("keys list --limit 3")["keys"]) == 3
    assert "raise --limit" in world.admin("tenants list --limit 2").stderr


@pytest.mark.parametrize(
    ("command", "key", "error", "words"),
    [
        ("tenants list", None, ConfigError, "TREADLE_ADMIN_KEY"),
        ("tenants list", "tml-nobody", Unauthenticated, "--key-file"),
        ("tenants list", ALICE, Forbidden, "admin key"),
        ("tenants list --url http://127.0.0.1:1", ADMIN, ServerError, "does the server run?"),
        ("tenants list --url ftp://x", ADMIN, ConfigError, "is not the URL"),
        ("tenants list", "tml-a b", ConfigError, "no key has"),
        ("tenants show nobody", ADMIN, NotFound, "does not exist"),
        ("tenants set alice", ADMIN, InvalidRequest, "nothing to change"),
        ("usage --since yesterday", ADMIN, InvalidRequest, "2026-11-20"),
        ("usage --by colour", ADMIN, InvalidRequest, "tenant, run"),
        ("quotas set default max_models", ADMIN, InvalidRequest, "QUOTA=NUMBER"),
        ("losses set default ppo --bound x", ADMIN, InvalidRequest, "KEY=LOW:HIGH"),
        ("keys create x --expires soon", ADMIN, InvalidRequest, "90m"),
    ],
)
def test_errors_say_what_to_do(world: World, command: str, key: str | None, error: type[Exception], words: str) -> None:
    done = world.admin(command, key=key)
    assert isinstance(done.exception, error), (done.exception, done.stderr)
    assert words in str(done.exception)
    assert key is None or key not in str(done.exception)


def test_the_key_may_lie_in_a_file(world: World, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{ADMIN}\n")
    world.shown(f"tenants list --key-file {file}", key=None)
    file.write_text("")
    assert isinstance(world.admin(f"tenants list --key-file {file}", key=None).exception, ConfigError)


def test_what_users_chose_is_shown_as_it_is(world: World) -> None:
    world.shown('organizations set plain --description "[red]a[/] :train:"')
    assert "[red]a[/] :train:" in world.shown("organizations list")
