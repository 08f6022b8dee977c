"""The SDK's command line, run in this process with a home of its own."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import tinker
from safetensors import safe_open

from conform.registry import command
from conform.world import MODEL, World


@command("tinker version")
def version(world: World) -> str:
    assert tinker.__version__ in world.cli("version")
    return "asks no server"


@command("tinker model list")
def model_list(world: World) -> str:
    assert MODEL in world.cli("model", "list")
    assert MODEL in world.cli("model", "list", "tiny", is_json=False)
    return "the served model, whole and by a part of its name"


@command("tinker run list")
def run_list(world: World) -> str:
    assert world.run.model_id in world.cli("run", "list", "--limit", "0")
    return "the run's id"


@command("tinker run info")
def run_info(world: World) -> str:
    assert MODEL in world.cli("run", "info", world.run.model_id)
    return "the run's base model"


@command("tinker checkpoint list")
def checkpoint_list(world: World) -> str:
    path = world.saved
    assert path in world.cli("checkpoint", "list")
    assert path in world.cli("checkpoint", "list", "--run-id", world.run.model_id)
    return "the checkpoint, of all runs and of one"


@command("tinker checkpoint info")
def checkpoint_info(world: World) -> str:
    assert world.saved in world.cli("checkpoint", "info", world.saved)
    return "the checkpoint"


@command("tinker checkpoint publish")
def checkpoint_publish(world: World) -> str:
    path = world.save(world.run)
    world.cli("checkpoint", "publish", path)
    assert _listed(world, path).public
    return "listed as public"


@command("tinker checkpoint unpublish")
def checkpoint_unpublish(world: World) -> str:
    path = world.save(world.run)
    world.cli("checkpoint", "publish", path)
    world.cli("checkpoint", "unpublish", path)
    assert not _listed(world, path).public
    return "listed as private again"


@command("tinker checkpoint set-ttl")
def checkpoint_ttl(world: World) -> str:
    path = world.save(world.run)
    world.cli("checkpoint", "set-ttl", path, "--ttl", "7200")
    assert _listed(world, path).expires_at is not None
    world.cli("checkpoint", "set-ttl", path, "--remove")
    assert _listed(world, path).expires_at is None
    return "an expiry, and none after --remove"


@command("tinker checkpoint delete")
def checkpoint_delete(world: World) -> str:
    path = world.save(world.run)
    world.cli("checkpoint", "delete", path, "--yes")
    listed = world.rest.list_checkpoints(world.run.model_id).result().checkpoints
    assert path not in {one.tinker_path for one in listed}
    return "no longer listed"


@command("tinker checkpoint download")
def checkpoint_download(world: World) -> str:
    folder = world.folder / world.name()
    world.cli("checkpoint", "download", world.saved, "--output", str(folder))
    (found,) = folder.rglob("adapter_model.safetensors")
    with safe_open(found, framework="np") as file:
        names = list(file.keys())
    assert any(name.endswith("lora_B.weight") for name in names)
    assert json.loads((found.parent / "adapter_config.json").read_text())["r"] == 4
    return f"a PEFT directory with {len(names)} tensors"


@command("tinker checkpoint push-hf")
def checkpoint_push(world: World) -> str:
    try:
        world.cli("checkpoint", "push-hf", world.saved, "--repo", "someone/nothing")
    except RuntimeError as error:
        # No hub is reachable where this runs: everything in front of it has to have worked.
        if "adapter_config" in str(error) or "404" in str(error):
            raise
        return "files, model card and metadata are prepared; the upload itself needs the hub's token"
    return "pushed"


@command("tinker session export-trace")
def export_trace(world: World) -> str:
    target = world.folder / f"{world.name()}.json"
    world.cli("session", "export-trace", world.session_of(world.run), "--output", str(target))
    found = target if target.exists() else next(Path(world.folder).rglob("*trace*"))
    assert json.loads(found.read_text())["traceEvents"]
    return "a Chrome trace in a file"


@command("tinker auth status")
def auth_status(world: World) -> str:
    assert world.cli("auth", "status")
    return "the key is accepted"


@command("tinker auth whoami")
def auth_whoami(world: World) -> str:
    mine = world.rest.whoami().result().user_urn
    assert mine in world.cli("auth", "whoami")
    return "the same user as RestClient.whoami"


@command("tinker auth login")
def auth_login(world: World) -> str:
    if not (stored := _credentials(world)).exists():
        world.cli("auth", "login", is_json=False, given=f"{world.key}\n")
    assert world.key in stored.read_text()
    return "the pasted key is checked and kept"


def _credentials(world: World) -> Path:
    return world.folder / ".tinker" / "credentials.json"


@command("tinker auth logout")
def auth_logout(world: World) -> str:
    auth_login(world)
    world.cli("auth", "logout", is_json=False)
    assert world.key not in _credentials(world).read_text()
    return "the kept key is gone"


@command("tinker billing usage")
def billing_usage(world: World) -> str:
    assert world.run is not None
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    given = [f"{hour + timedelta(hours=hours):%Y-%m-%dT%H:00:00Z}" for hours in (-24, 2)]
    assert "training" in world.cli("billing", "usage", *given).lower()
    return "the tokens that were trained"


@command("tinker billing checkpoint-storage")
def billing_storage(world: World) -> str:
    assert world.saved
    assert "size" in world.cli("billing", "checkpoint-storage").lower()
    return "checkpoints and their bytes"


def _listed(world: World, path: str) -> tinker.types.Checkpoint:
    listed = world.rest.list_checkpoints(world.run.model_id).result().checkpoints
    return next(one for one in listed if one.tinker_path == path)
