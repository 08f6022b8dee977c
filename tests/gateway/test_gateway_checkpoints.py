"""What owners and readers do with checkpoints by name: publish, expire, delete, copy; and who may not."""

from __future__ import annotations

import uuid

import pytest
from gateway_support import KEY, OTHER_KEY, POOL, Harness, failed, ok, open_tenant, refused

from treadle.domain.ids import CheckpointKind, ModelId
from treadle.domain.limits import MAX_TTL_S, MIN_TTL_S
from treadle.domain.ops import LoadWeightsOp
from treadle.domain.records import CheckpointRecord
from treadle.domain.states import ModelState, SessionState
from treadle.scheduler.sweeps.unnamed import wanted_by_loads

HOSTILE_NAMES = ("..", "%2e%2e", "a%2fb", "a..b", "%00", "a%00b", "é", "🙂", "-rf", ".hidden", "a b", "x" * 10_000)


@pytest.fixture
async def model_id(gateway: Harness) -> str:
    return await gateway.new_model(await gateway.new_session())


async def send(gateway: Harness, method: str, path: str, *, key: str = KEY, json: object = None) -> tuple[int, str]:
    """An answer's status and text. The URL goes out as it is written here."""
    options = {} if json is None else {"json": json}
    answer = await gateway.client.request(method, f"/api/v1/{path}", headers={"X-API-Key": key}, **options)
    return answer.status_code, answer.text


def url_of(record: CheckpointRecord, *, action: str = "") -> str:
    return f"training_runs/{record.model_id}/checkpoints/{record.kind.value}/{record.name}{action}"


async def is_listed(gateway: Harness, record: CheckpointRecord, *, key: str = KEY) -> bool:
    listed = ok(await gateway.get("checkpoints", key=key))["checkpoints"]
    return record.tinker_path in [one["tinker_path"] for one in listed]


async def test_a_published_checkpoint_is_readable_by_everybody_and_listed_by_its_owner(
    gateway: Harness, model_id: str
) -> None:
    record = await gateway.publish(model_id, "a")
    info = {"tinker_path": record.tinker_path}
    refused(await gateway.post("weights_info", info, key=OTHER_KEY), 404)
    for _ in range(2):
        assert (await send(gateway, "POST", url_of(record, action="/publish")))[0] == 200
    assert ok(await gateway.post("weights_info", info, key=OTHER_KEY))["base_model"] == POOL
    other_session = await gateway.new_session(key=OTHER_KEY)
    load = {"session_id": other_session, "model_seq_id": 0, "path": record.tinker_path, "optimizer": True}
    loaded = ok(await gateway.post("load_weights", load, key=OTHER_KEY))
    op = await gateway.op(loaded["request_id"])
    assert isinstance(op, LoadWeightsOp)
    assert op.blob_key == record.blob_key
    sampler = {"session_id": other_session, "sampling_session_seq_id": 1, "model_path": record.tinker_path}
    ok(await gateway.post("create_sampling_session", sampler, key=OTHER_KEY))
    assert await is_listed(gateway, record)
    assert not await is_listed(gateway, record, key=OTHER_KEY)
    for _ in range(2):
        assert (await send(gateway, "DELETE", url_of(record, action="/publish")))[0] == 200
    refused(await gateway.post("weights_info", info, key=OTHER_KEY), 404)
    assert await is_listed(gateway, record), "DELETE .../publish deletes nothing"


@pytest.mark.parametrize("is_public", [False, True])
async def test_only_the_owner_may_change_it_and_a_foreign_id_looks_unknown(
    gateway: Harness, model_id: str, is_public: bool
) -> None:
    record = await gateway.publish(model_id, "a", public=is_public)
    calls = (("POST", "/publish", None), ("DELETE", "/publish", None), ("PUT", "/ttl", {"ttl_seconds": 3600}))
    for method, action, body in (*calls, ("DELETE", "", None)):
        foreign = await send(gateway, method, url_of(record, action=action), key=OTHER_KEY, json=body)
        nobodys = f"training_runs/{model_id}/checkpoints/weights/b{action}"
        unknown = await send(gateway, method, nobodys, key=OTHER_KEY, json=body)
        assert foreign[0] == 404
        assert unknown == (404, foreign[1].replace("weights/a", "weights/b"))
    assert await gateway.store.checkpoints.find(record.tinker_path) == record


@pytest.mark.parametrize("ttl", [MIN_TTL_S, MAX_TTL_S, None])
async def test_a_time_to_live_counts_from_now(gateway: Harness, model_id: str, ttl: int | None) -> None:
    record = await gateway.publish(model_id, "a")
    gateway.clock.advance(50.0)
    assert await send(gateway, "PUT", url_of(record, action="/ttl"), json={"ttl_seconds": ttl}) == (200, "{}")
    found = await gateway.store.checkpoints.find(record.tinker_path)
    assert found is not None
    assert found.expires_at == (None if ttl is None else gateway.clock.now() + ttl)
    (listed,) = ok(await gateway.get("checkpoints"))["checkpoints"]
    assert (listed["expires_at"] is None) == (ttl is None)


@pytest.mark.parametrize("body", [{"ttl_seconds": 3599}, {"ttl_seconds": MAX_TTL_S + 1}, {"ttl_seconds": 3600.5}, {}])
async def test_a_time_to_live_out_of_bounds_is_refused(gateway: Harness, model_id: str, body: object) -> None:
    record = await gateway.publish(model_id, "a")
    status, text = await send(gateway, "PUT", url_of(record, action="/ttl"), json=body)
    assert status == 400
    assert "ttl_seconds" in text
    assert await gateway.store.checkpoints.find(record.tinker_path) == record


@pytest.mark.parametrize("kind", list(CheckpointKind))
async def test_checkpoints_of_every_kind_are_deleted(gateway: Harness, model_id: str, kind: CheckpointKind) -> None:
    record = await gateway.publish(model_id, "publish", kind=kind)
    assert await send(gateway, "DELETE", url_of(record)) == (200, "{}")
    assert (await send(gateway, "DELETE", url_of(record)))[0] == 404
    assert not await is_listed(gateway, record)


async def test_deleting_breaks_no_queued_load_and_no_sampling_session(gateway: Harness, model_id: str) -> None:
    record = await gateway.publish(model_id, "a")
    session_id = await gateway.new_session()
    load = {"session_id": session_id, "model_seq_id": 7, "path": record.tinker_path, "optimizer": True}
    request_id = ok(await gateway.post("load_weights", load))["request_id"]
    sampler = {"session_id": session_id, "sampling_session_seq_id": 1, "model_path": record.tinker_path}
    sampler_id = ok(await gateway.post("create_sampling_session", sampler))["sampling_session_id"]
    assert (await send(gateway, "DELETE", url_of(record)))[0] == 200
    op = await gateway.op(request_id)
    assert isinstance(op, LoadWeightsOp)
    assert op.blob_key == record.blob_key
    assert record.blob_key in await wanted_by_loads(gateway.store), "the sweep of files spares what a load will read"
    assert await gateway.store.retention.unnamed([record.blob_key]) == (), "the sampling session names it"
    assert ok(await gateway.get(f"samplers/{sampler_id}"))["model_path"] == record.tinker_path
    message = failed(
        await gateway.future(ok(await gateway.post("load_weights", {**load, "model_seq_id": 8}))["request_id"])
    )
    assert "does not exist" in message


@pytest.mark.parametrize("name", HOSTILE_NAMES)
async def test_a_name_is_never_a_path(gateway: Harness, model_id: str, name: str) -> None:
    record = await gateway.publish(model_id, "a")
    before = await gateway.store.checkpoints.of_model(ModelId(model_id))
    for kind in ("weights", "sampler_weights", "external_weights", "..", "nothing"):
        stem = f"training_runs/{model_id}/checkpoints/{kind}/{name}"
        calls = (("POST", "/publish"), ("DELETE", "/publish"), ("GET", "/archive"), ("GET", "/external_weights_urls"))
        for method, action in (*calls, ("PUT", "/ttl"), ("DELETE", "")):
            body = {"ttl_seconds": None} if method == "PUT" else None
            status, text = await send(gateway, method, stem + action, json=body)
            assert status in (400, 404, 405), (method, action, status, text[:200])
            assert len(text) < 1_000
    for path in (f"tinker://{model_id}/weights/{name}", f"tinker://{model_id}/../{name}", f"tinker://{name}"):
        body = {"source_path": path, "destination_project_id": "p"}
        assert (await gateway.post("copy_weights", body)).status_code == 400
    assert await gateway.store.checkpoints.of_model(ModelId(model_id)) == before == [record]


async def copy(gateway: Harness, path: str, *, key: str = OTHER_KEY, idem: str | None = None, **body: object) -> str:
    headers = {"X-Idempotency-Key": uuid.uuid4().hex if idem is None else idem}
    if "session_id" not in body:
        body = {"destination_project_id": "archive", **body}
    return str(
        ok(await gateway.post("copy_weights", {"source_path": path, **body}, key=key, headers=headers))["tinker_path"]
    )


@pytest.mark.parametrize("kind", list(CheckpointKind))
async def test_a_copy_belongs_to_its_copier(gateway: Harness, model_id: str, kind: CheckpointKind) -> None:
    source = await gateway.publish(model_id, "a", kind=kind, public=True)
    path = await copy(gateway, source.tinker_path, ttl_seconds=3600)
    made = await gateway.store.checkpoints.find(path)
    assert made is not None
    assert (made.kind, made.blob_key, made.copied_from) == (kind, source.blob_key, source.tinker_path)
    assert made.tenant_id == open_tenant(OTHER_KEY)
    assert made.expires_at == gateway.clock.now() + 3600
    assert not made.public
    run_id = path.removeprefix("tinker://").partition("/")[0]
    run = ok(await gateway.get(f"training_runs/{run_id}", key=OTHER_KEY))
    assert (run["base_model"], run["lora_rank"], run["corrupted"]) == (POOL, source.lora.rank, False)
    in_project = ok(await gateway.get("training_runs?project_id=archive", key=OTHER_KEY))["training_runs"]
    assert [one["training_run_id"] for one in in_project] == [run_id]
    assert await is_listed(gateway, made, key=OTHER_KEY)
    refused(await gateway.get(f"training_runs/{run_id}"), 404)


async def test_deleting_the_source_leaves_the_copy(gateway: Harness, model_id: str) -> None:
    source = await gateway.publish(model_id, "a", public=True)
    path = await copy(gateway, source.tinker_path)
    await send(gateway, "DELETE", url_of(source))
    assert ok(await gateway.post("weights_info", {"tinker_path": path}, key=OTHER_KEY))["base_model"] == POOL
    assert await gateway.store.retention.unnamed([source.blob_key]) == ()


async def test_a_retried_copy_is_the_first_one(gateway: Harness, model_id: str) -> None:
    source = await gateway.publish(model_id, "a", public=True)
    first = await copy(gateway, source.tinker_path, idem="k")
    assert await copy(gateway, source.tinker_path, idem="k") == first
    assert await copy(gateway, source.tinker_path, idem="k", key=KEY) != first, "a key is its caller's own"
    assert await copy(gateway, source.tinker_path, idem="l") != first
    listed = ok(await gateway.get("checkpoints", key=OTHER_KEY))["checkpoints"]
    assert len(listed) == 2
    other = await gateway.publish(model_id, "b", public=True)
    body = {"source_path": other.tinker_path, "destination_project_id": "archive"}
    answer = await gateway.post("copy_weights", body, key=OTHER_KEY, headers={"X-Idempotency-Key": "k"})
    assert "another copy" in refused(answer, 400)


async def test_a_copy_into_a_session_takes_the_place_of_a_run(gateway: Harness, model_id: str) -> None:
    source = await gateway.publish(model_id, "a", public=True)
    session_id = await gateway.new_session(key=OTHER_KEY)
    place = {"session_id": session_id, "model_seq_id": 3}
    path = await copy(gateway, source.tinker_path, **place)
    assert path == f"tinker://{session_id}:train:3/weights/a"
    assert await copy(gateway, source.tinker_path, **place) == path
    run = await gateway.store.models.get(ModelId(f"{session_id}:train:3"))
    assert run is not None
    assert run.state is ModelState.UNLOADED
    taken = await gateway.new_model(session_id, 4, key=OTHER_KEY)
    body = {"source_path": source.tinker_path, "session_id": session_id, "model_seq_id": 4}
    assert taken in refused(await gateway.post("copy_weights", body, key=OTHER_KEY), 400)
    refused(await gateway.post("copy_weights", body), 404)


async def test_the_session_of_a_copy_waits_for_no_client(gateway: Harness, model_id: str) -> None:
    source = await gateway.publish(model_id, "a", public=True)
    path = await copy(gateway, source.tinker_path)
    session_id = path.removeprefix("tinker://").partition(":")[0]
    session = await gateway.store.sessions.get(session_id)
    assert session is not None
    assert (session.state, session.project_id) == (SessionState.FINISHED, "archive")


@pytest.mark.parametrize(
    "body",
    [
        {"destination_project_id": "p", "session_id": "s", "model_seq_id": 1},
        {"session_id": "s"},
        {"model_seq_id": 1},
        {"destination_project_id": "p", "model_seq_id": 1},
        {},
    ],
)
async def test_a_copy_needs_one_place(gateway: Harness, model_id: str, body: dict[str, object]) -> None:
    source = await gateway.publish(model_id, "a")
    assert "destination_project_id" in refused(
        await gateway.post("copy_weights", {"source_path": source.tinker_path, **body}), 400
    )


async def test_an_access_token_opens_what_its_owner_may_read(gateway: Harness, model_id: str) -> None:
    source = await gateway.publish(model_id, "a")
    body = {"source_path": source.tinker_path, "destination_project_id": "p"}
    refused(await gateway.post("copy_weights", body, key=OTHER_KEY), 404)
    by_header = {"X-Tinker-Weights-Access-Token": KEY}
    ok(await gateway.post("copy_weights", body, key=OTHER_KEY, headers=by_header))
    ok(await gateway.post("copy_weights", {**body, "weights_access_token": KEY}, key=OTHER_KEY))
    session_id = await gateway.new_session(key=OTHER_KEY)
    load = {"session_id": session_id, "model_seq_id": 0, "path": source.tinker_path, "optimizer": False}
    closed = ok(await gateway.post("load_weights", load, key=OTHER_KEY))
    assert "does not exist" in failed(await gateway.future(closed["request_id"], key=OTHER_KEY))
    load |= {"model_seq_id": 1, "weights_access_token": KEY}
    loaded = ok(await gateway.post("load_weights", load, key=OTHER_KEY))
    assert isinstance(await gateway.op(loaded["request_id"]), LoadWeightsOp)
    run = await gateway.new_model(session_id, 2, key=OTHER_KEY)
    into_run = {"model_id": run, "seq_id": 1, "path": source.tinker_path, "optimizer": True}
    loaded = ok(await gateway.post("load_weights", {**into_run, "weights_access_token": KEY}, key=OTHER_KEY))
    assert isinstance(await gateway.op(loaded["request_id"]), LoadWeightsOp)


async def test_a_token_that_nobody_holds_is_refused(gateway: Harness, model_id: str) -> None:
    source = await gateway.publish(model_id, "a", public=True)
    body = {"source_path": source.tinker_path, "destination_project_id": "p", "weights_access_token": "no-key"}
    assert "weights_access_token" in refused(await gateway.post("copy_weights", body), 403)
    load = {
        "session_id": await gateway.new_session(),
        "model_seq_id": 1,
        "path": source.tinker_path,
        "optimizer": False,
    }
    answer = ok(await gateway.post("load_weights", {**load, "weights_access_token": "no-key"}))
    assert "weights_access_token" in failed(await gateway.future(answer["request_id"]))


async def test_paths_of_twinkle_are_taken_and_answered_as_tinkers(gateway: Harness, model_id: str) -> None:
    source = await gateway.publish(model_id, "a")
    theirs = source.tinker_path.replace("tinker://", "twinkle://")
    ok(await gateway.post("weights_info", {"tinker_path": theirs}))
    assert (await copy(gateway, theirs, key=KEY)).startswith("tinker://")
    session_id = await gateway.new_session()
    load = {"session_id": session_id, "model_seq_id": 0, "path": theirs, "optimizer": True}
    op = await gateway.op(ok(await gateway.post("load_weights", load))["request_id"])
    assert isinstance(op, LoadWeightsOp)
    assert op.path == source.tinker_path
    sampler = {"session_id": session_id, "sampling_session_seq_id": 1, "model_path": theirs}
    sampler_id = ok(await gateway.post("create_sampling_session", sampler))["sampling_session_id"]
    assert ok(await gateway.get(f"samplers/{sampler_id}"))["model_path"] == source.tinker_path
