"""RestClient and AdminClient: runs, checkpoints, sessions, audit, usage."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from urllib.request import urlopen

import tinker
from tinker import types

from conform.registry import Call, method
from conform.world import MODEL, World, logprobs, train


@method("RestClient.get_training_run")
def get_training_run(world: World, call: Call) -> str:
    run = call(world.rest, "get_training_run", world.run.model_id)
    assert (run.training_run_id, run.base_model, run.lora_rank) == (world.run.model_id, MODEL, 4)
    return "id, base model and rank of the run"


@method("RestClient.get_training_run_by_tinker_path")
def run_by_path(world: World, call: Call) -> str:
    assert call(world.rest, "get_training_run_by_tinker_path", world.saved).training_run_id == world.run.model_id
    return "the run that saved it"


@method("RestClient.list_training_runs")
def list_training_runs(world: World, call: Call) -> str:
    first = world.run.model_id
    newest = world.new_run().model_id
    listed = call(world.rest, "list_training_runs", limit=100)
    ids = [run.training_run_id for run in listed.training_runs]
    assert ids.index(newest) < ids.index(first)
    assert listed.cursor.total_count >= 2
    assert [run.training_run_id for run in call(world.rest, "list_training_runs", limit=1).training_runs] == ids[:1]
    return "newest first, with a page and a total"


@method("RestClient.list_checkpoints")
def list_checkpoints(world: World, call: Call) -> str:
    want = {world.saved, world.sampler_path}
    listed = call(world.rest, "list_checkpoints", world.run.model_id).checkpoints
    assert want <= {one.tinker_path for one in listed}
    kinds = {one.tinker_path: one.checkpoint_type for one in listed}
    assert (kinds[world.saved], kinds[world.sampler_path]) == ("training", "sampler")
    return "both kinds that the run saved, with their sizes"


@method("RestClient.list_user_checkpoints")
def list_user_checkpoints(world: World, call: Call) -> str:
    path = world.save(world.run)
    listed = call(world.rest, "list_user_checkpoints", limit=5)
    assert listed.checkpoints[0].tinker_path == path
    others = tinker.RestClient(base_url=world.url, api_key=world.other_key)
    assert call(others, "list_user_checkpoints").checkpoints == []
    return "newest first; another user sees none of them"


@method("RestClient.delete_checkpoint")
def delete_checkpoint(world: World, call: Call) -> str:
    path = world.save(world.run)
    call(world.rest, "delete_checkpoint", world.run.model_id, path.partition(f"{world.run.model_id}/")[2])
    return _is_gone(world, path)


@method("RestClient.delete_checkpoint_from_tinker_path")
def delete_by_path(world: World, call: Call) -> str:
    path = world.save(world.run)
    call(world.rest, "delete_checkpoint_from_tinker_path", path)
    return _is_gone(world, path)


def _is_gone(world: World, path: str) -> str:
    listed = world.rest.list_checkpoints(world.run.model_id).result().checkpoints
    assert path not in {one.tinker_path for one in listed}
    try:
        world.service.create_training_client_from_state(path).result(timeout=30)
    except tinker.TinkerError:
        return "no longer listed, and cannot be loaded"
    raise AssertionError("a deleted checkpoint was loaded")


@method("RestClient.publish_checkpoint_from_tinker_path")
def publish(world: World, call: Call) -> str:
    path = world.save(world.run)
    stranger = world.new_service(world.other_key)
    assert not _can_load(stranger, path)
    call(world.rest, "publish_checkpoint_from_tinker_path", path)
    run = stranger.create_training_client_from_state(path).result()
    assert logprobs(run) == logprobs(world.run)
    return "another user can load it, and could not before"


@method("RestClient.unpublish_checkpoint_from_tinker_path")
def unpublish(world: World, call: Call) -> str:
    path = world.save(world.run)
    stranger = world.new_service(world.other_key)
    world.rest.publish_checkpoint_from_tinker_path(path).result()
    assert _can_load(stranger, path)
    call(world.rest, "unpublish_checkpoint_from_tinker_path", path)
    assert not _can_load(stranger, path)
    return "another user can no longer load it"


def _can_load(service: tinker.ServiceClient, path: str) -> bool:
    try:
        service.create_training_client_from_state(path).result(timeout=30)
    except tinker.TinkerError:
        return False
    return True


@method("RestClient.set_checkpoint_ttl_from_tinker_path")
def set_ttl(world: World, call: Call) -> str:
    path = world.save(world.run)
    call(world.rest, "set_checkpoint_ttl_from_tinker_path", path, 7200)
    left = _expiry(world, path) - datetime.now(UTC)
    assert timedelta(minutes=110) < left <= timedelta(hours=2)
    call(world.rest, "set_checkpoint_ttl_from_tinker_path", path, None)
    assert _expiry(world, path) is None
    return "expires in two hours, and never again after None"


def _expiry(world: World, path: str) -> datetime | None:
    listed = world.rest.list_checkpoints(world.run.model_id).result().checkpoints
    return next(one.expires_at for one in listed if one.tinker_path == path)


@method("RestClient.get_external_weights_urls")
def external_urls(world: World, call: Call) -> str:
    path = world.run.save_weights_external(world.name()).result().path
    answer = call(world.rest, "get_external_weights_urls", path)
    with urlopen(answer.urls["adapter_config.json"]) as file:
        config = json.loads(file.read())
    assert config["r"] == 4
    assert answer.expires > datetime.now(UTC)
    return "the adapter's configuration, read without a key"


@method("RestClient.get_weights_info_by_tinker_path")
def weights_info(world: World, call: Call) -> str:
    info = call(world.rest, "get_weights_info_by_tinker_path", world.saved)
    assert (info.base_model, info.lora_rank, info.is_lora) == (MODEL, 4, True)
    return "base model and rank of the checkpoint"


@method("RestClient.get_sampler")
def get_sampler(world: World, call: Call) -> str:
    sampler = world.service.create_sampling_client(model_path=world.sampler_path).result()
    session_id = world.session_of(world.run)
    samplers = world.rest.get_session(session_id).result().sampler_ids
    answers = [call(world.rest, "get_sampler", sampler_id) for sampler_id in samplers]
    assert world.sampler_path in {answer.model_path for answer in answers}
    assert sampler is not None
    return "the path that the sampler was made from"


@method("RestClient.list_sessions")
def list_sessions(world: World, call: Call) -> str:
    listed = call(world.rest, "list_sessions", limit=100).sessions
    assert world.session_of(world.run) in listed
    return "this user's session"


@method("RestClient.get_session")
def get_session(world: World, call: Call) -> str:
    found = call(world.rest, "get_session", world.session_of(world.run))
    assert world.run.model_id in found.training_run_ids
    assert found.user_metadata == {"made_by": "conformance"}
    return "its runs and its metadata"


@method("RestClient.search_sessions")
def search_sessions(world: World, call: Call) -> str:
    name = f"display {world.name()}"
    service = world.new_service(display_name=name)
    run = service.create_lora_training_client(MODEL, rank=2).result()
    request = types.SessionSearchRequest(display_name=name.upper())
    found = call(world.rest, "search_sessions", request).sessions
    assert [one.session_id for one in found] == [world.session_of(run)]
    assert found[0].status.type == "active"
    return "by its display name, in another case"


@method("RestClient.assign_session_project")
def assign_project(world: World, call: Call) -> str:
    service = world.new_service()
    run = service.create_lora_training_client(MODEL, rank=2).result()
    project = world.name()
    call(world.rest, "assign_session_project", world.session_of(run), project)
    listed = world.rest.list_training_runs(project_id=project).result().training_runs
    assert [one.training_run_id for one in listed] == [run.model_id]
    return "its runs are listed under the project"


@method("RestClient.export_session_trace")
def export_trace(world: World, call: Call) -> str:
    train(world.new_run())
    url = call(world.rest, "export_session_trace", world.session_of(world.run))
    with urlopen(url) as file:
        events = json.loads(file.read())["traceEvents"]
    assert {"forward_backward", "optim_step"} <= {str(event.get("name")).split(" ")[0] for event in events}
    return f"a Chrome trace of {len(events)} events, read without a key"


@method("RestClient.whoami")
def whoami(world: World, call: Call) -> str:
    mine = call(world.rest, "whoami")
    other = call(tinker.RestClient(base_url=world.url, api_key=world.other_key), "whoami")
    assert mine.user_urn != other.user_urn
    assert mine.org_urn
    return "two keys are two users"


@method("RestClient.get_audit_log", "AdminClient.get_audit_log")
def audit_log(world: World, call: Call) -> str:
    path = world.save(world.run)
    for client in (world.rest, world.admin):
        entries = call(client, "get_audit_log", "checkpoints").entries
        assert path in {entry.tinker_path for entry in entries}
    return "the save of a checkpoint"


@method("RestClient.get_billing_usage", "AdminClient.get_billing_usage")
def billing_usage(world: World, call: Call) -> str:
    def trained() -> int:
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        given = (hour - timedelta(days=1), hour + timedelta(hours=2))
        counts = [
            sum(
                event.event_info.token_count
                for event in call(client, "get_billing_usage", *given).data
                if event.event_info.type == "training"
            )
            for client in (world.rest, world.admin)
        ]
        assert counts[0] == counts[1]
        return counts[0]

    before = trained()
    train(world.new_run())
    grown = trained() - before
    assert grown == 7, grown
    return "grows by the tokens of one pass"


@method("RestClient.get_current_checkpoint_storage_usage", "AdminClient.get_current_checkpoint_storage_usage")
def storage(world: World, call: Call) -> str:
    def stored() -> tuple[int, int]:
        items = [call(client, "get_current_checkpoint_storage_usage").data for client in (world.rest, world.admin)]
        assert items[0] == items[1]
        return sum(one.checkpoint_count for one in items[0]), sum(one.size_bytes for one in items[0])

    count, size = stored()
    path = world.save(world.run)
    listed = world.rest.list_checkpoints(world.run.model_id).result().checkpoints
    grown = next(one.size_bytes for one in listed if one.tinker_path == path)
    assert stored() == (count + 1, size + grown)
    return "grows by one checkpoint and its bytes"
