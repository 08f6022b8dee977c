"""Listings of runs and checkpoints, and what a checkpoint is made of."""

from __future__ import annotations

from datetime import datetime

import pytest
from gateway_support import LORA, OTHER_KEY, POOL, Harness, ok, open_tenant, refused

from treadle.domain.ids import CheckpointKind


@pytest.fixture
async def model_id(gateway: Harness) -> str:
    return await gateway.new_model(await gateway.new_session())


async def test_a_run_shows_its_newest_checkpoints(gateway: Harness, model_id: str) -> None:
    await gateway.publish(model_id, "0001")
    gateway.clock.advance(1)
    newest = await gateway.publish(model_id, "0002")
    sampler = await gateway.publish(model_id, "s", kind=CheckpointKind.SAMPLER)

    run = ok(await gateway.get(f"training_runs/{model_id}"))

    assert run["training_run_id"] == model_id
    assert (run["base_model"], run["is_lora"], run["lora_rank"], run["corrupted"]) == (POOL, True, 8, False)
    assert run["model_owner"] == open_tenant()
    assert run["last_checkpoint"]["tinker_path"] == newest.tinker_path
    assert run["last_checkpoint"]["checkpoint_id"] == "weights/0002"
    assert run["last_checkpoint"]["checkpoint_type"] == "training"
    assert run["last_sampler_checkpoint"]["tinker_path"] == sampler.tinker_path
    assert datetime.fromisoformat(run["last_request_time"]).tzinfo is not None


async def test_runs_are_listed_newest_first_and_only_to_their_owner(gateway: Harness, model_id: str) -> None:
    gateway.clock.advance(1)
    second = await gateway.new_model(await gateway.new_session())
    await gateway.new_model(await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)

    body = ok(await gateway.get("training_runs?limit=1&offset=0&access_scope=owned"))

    assert [run["training_run_id"] for run in body["training_runs"]] == [second]
    assert body["cursor"] == {"offset": 0, "limit": 1, "total_count": 2}
    rest = ok(await gateway.get("training_runs?limit=1&offset=1"))
    assert [run["training_run_id"] for run in rest["training_runs"]] == [model_id]


async def test_runs_can_be_filtered_by_project(gateway: Harness, model_id: str) -> None:
    session = ok(await gateway.post("create_session", {"project_id": "p1"}))["session_id"]
    in_project = await gateway.new_model(session)

    body = ok(await gateway.get("training_runs?project_id=p1"))

    assert [run["training_run_id"] for run in body["training_runs"]] == [in_project]


async def test_a_run_that_was_refused_is_listed_as_unusable(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    body = {"session_id": session_id, "model_seq_id": 0, "base_model": "no/such", "lora_config": {}}
    ok(await gateway.post("create_model", body))

    [run] = ok(await gateway.get("training_runs"))["training_runs"]

    assert run["corrupted"] is True


async def test_checkpoints_of_a_run_are_all_there(gateway: Harness, model_id: str) -> None:
    await gateway.publish(model_id, "a")
    await gateway.publish(model_id, "a", kind=CheckpointKind.SAMPLER)

    body = ok(await gateway.get(f"training_runs/{model_id}/checkpoints"))

    assert {c["checkpoint_id"] for c in body["checkpoints"]} == {"weights/a", "sampler_weights/a"}
    assert all(c["size_bytes"] == 10 and c["public"] is False for c in body["checkpoints"])


async def test_checkpoints_are_paged_over_all_runs(gateway: Harness, model_id: str) -> None:
    for name in ("a", "b", "c"):
        gateway.clock.advance(1)
        await gateway.publish(model_id, name)

    body = ok(await gateway.get("checkpoints?limit=2&offset=1"))

    assert [c["checkpoint_id"] for c in body["checkpoints"]] == ["weights/b", "weights/a"]
    assert body["cursor"] == {"offset": 1, "limit": 2, "total_count": 3}
    assert ok(await gateway.get("checkpoints", key=OTHER_KEY))["checkpoints"] == []


async def test_weights_info_tells_what_a_run_from_it_would_be(gateway: Harness, model_id: str) -> None:
    for kind in CheckpointKind:
        checkpoint = await gateway.publish(model_id, "a", kind=kind)

        assert ok(await gateway.post("weights_info", {"tinker_path": checkpoint.tinker_path})) == {
            "base_model": POOL,
            "is_lora": True,
            "lora_rank": LORA.rank,
            "train_attn": True,
            "train_mlp": True,
            "train_unembed": True,
            "optimizer_config": {"type": "adamw"},
        }


async def test_weights_info_is_for_owners_unless_public(gateway: Harness, model_id: str) -> None:
    private = await gateway.publish(model_id, "private")
    public = await gateway.publish(model_id, "public", public=True)

    refused(await gateway.post("weights_info", {"tinker_path": private.tinker_path}, key=OTHER_KEY), 404)
    ok(await gateway.post("weights_info", {"tinker_path": public.tinker_path}, key=OTHER_KEY))


@pytest.mark.parametrize(("body", "status"), [({}, 400), ({"tinker_path": "x"}, 400), ({"tinker_path": 5}, 400)])
async def test_a_bad_weights_info_is_refused(gateway: Harness, body: dict[str, object], status: int) -> None:
    refused(await gateway.post("weights_info", body), status)


async def test_unknown_and_foreign_runs_are_404(gateway: Harness, model_id: str) -> None:
    for path in (f"training_runs/{model_id}", f"training_runs/{model_id}/checkpoints"):
        refused(await gateway.get(path, key=OTHER_KEY), 404)
    refused(await gateway.get("training_runs/nothing"), 404)
