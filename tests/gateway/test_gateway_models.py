"""Runs: created, created from a checkpoint, loaded, described, unloaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from gateway_support import DRAWN_SEED, LORA, OTHER_KEY, OTHER_POOL, POOL, Harness, facts, failed, ok, refused

from treadle.domain.ids import CheckpointKind, ModelId
from treadle.domain.ops import CreateModelOp, LoadWeightsOp, LoraSpec, OpKind, UnloadModelOp
from treadle.domain.states import ModelState, RequestState
from treadle.gateway import PoolView


def create_body(session_id: str, model_seq_id: int = 0, **changes: object) -> dict[str, object]:
    return {
        "session_id": session_id,
        "model_seq_id": model_seq_id,
        "base_model": POOL,
        "lora_config": {"rank": 8},
        "optimizer_config": {"type": "adamw"},
        "type": "create_model",
        **changes,
    }


def load_body(session_id: str, path: str, model_seq_id: int = 1, **changes: object) -> dict[str, object]:
    return {"session_id": session_id, "model_seq_id": model_seq_id, "path": path, "optimizer": True, **changes}


async def test_create_makes_a_run_with_the_id_that_the_sdk_computes(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    answer = ok(await gateway.post("create_model", create_body(session_id, 3, user_metadata={"n": 1})))

    assert answer["model_id"] == f"{session_id}:train:3"
    record = await gateway.store.models.get(ModelId(answer["model_id"]))
    assert record is not None
    assert record.state is ModelState.CREATING
    assert (record.pool, record.base_model, record.revision) == (POOL, POOL, "rev-1")
    assert record.user_metadata == {"n": "1"}
    op = await gateway.op(answer["request_id"])
    assert op == CreateModelOp(record.model_id, base_model=POOL, lora=LoraSpec(rank=8, seed=DRAWN_SEED))
    assert record.lora == op.lora
    row = await gateway.row(answer["request_id"])
    assert (row.kind, row.seq_id, row.pool, row.state) == (OpKind.CREATE_MODEL, 0, POOL, RequestState.QUEUED)


async def test_a_directory_is_the_pool_it_belongs_to(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    answer = ok(await gateway.post("create_model", create_body(session_id, base_model="/models/base")))

    record = await gateway.store.models.get(ModelId(answer["model_id"]))
    assert record is not None
    assert record.base_model == POOL


async def test_a_given_seed_is_kept(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    answer = ok(await gateway.post("create_model", create_body(session_id, lora_config={"rank": 8, "seed": 0})))

    op = await gateway.op(answer["request_id"])
    assert isinstance(op, CreateModelOp)
    assert op.lora.seed == 0


async def test_a_retried_create_gets_the_first_request(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    first = ok(await gateway.post("create_model", create_body(session_id)))
    again = ok(await gateway.post("create_model", create_body(session_id, lora_config={"rank": 4})))

    assert again == first
    op = await gateway.op(first["request_id"])
    assert isinstance(op, CreateModelOp)
    assert op.lora.rank == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model": "no/such"}, "served: fake/base, fake/other"),
        ({"lora_config": {"rank": 0}}, "rank"),
        ({"lora_config": {"rank": 33}}, "1 to 32"),
        ({"lora_config": {"train_mlp": False, "train_attn": False, "train_unembed": False}}, "trains nothing"),
        ({"lora_config": {"rank": 8, "alpha": 16}}, "alpha"),
        ({"lora_config": None}, "full fine-tuning"),
        ({"optimizer_config": {"type": "dimuon", "version": 1}}, "dimuon"),
        ({"base_model": 5}, "base_model"),
    ],
)
async def test_a_create_that_cannot_be_honoured_fails_through_its_future(
    gateway: Harness, changes: dict[str, object], words: str
) -> None:
    session_id = await gateway.new_session()
    answer = ok(await gateway.post("create_model", create_body(session_id, **changes)))

    assert words in failed(await gateway.future(answer["request_id"]))
    assert answer["model_id"] == f"{session_id}:train:0"
    # The session is unharmed, and the next good request works.
    ok(await gateway.post("create_model", create_body(session_id, 1)))


async def test_work_for_a_run_that_was_refused_fails_with_the_reason(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    answer = ok(await gateway.post("create_model", create_body(session_id, base_model="no/such")))
    step = {"model_id": answer["model_id"], "seq_id": 1, "adam_params": {}}

    future = ok(await gateway.post("optim_step", step))

    assert "never created" in failed(await gateway.future(future["request_id"]))
    assert "never created" in refused(await gateway.post("get_info", {"model_id": answer["model_id"]}), 400)


@pytest.mark.parametrize("missing", ["session_id", "model_seq_id"])
async def test_a_create_without_an_address_is_unreadable(gateway: Harness, missing: str) -> None:
    body = create_body(await gateway.new_session())
    del body[missing]

    assert missing in refused(await gateway.post("create_model", body), 400)


async def test_while_the_base_model_loads_a_create_is_to_be_sent_again(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    loaded = gateway.pools[0]
    gateway.pools[0] = replace(loaded, facts=None, is_ready=False, reason="reading weights")

    answer = await gateway.post("create_model", create_body(session_id))
    assert "reading weights" in refused(answer, 503)
    assert answer.headers["retry-after"] == "1"

    gateway.pools[0] = loaded
    ok(await gateway.post("create_model", create_body(session_id)))


async def test_create_from_a_checkpoint_takes_the_shape_of_the_checkpoint(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    source = await gateway.new_model(session_id)
    lora = replace(LORA, rank=4, train_unembed=False)
    checkpoint = await gateway.publish(source, "0001", lora=lora)

    answer = ok(await gateway.post("load_weights", load_body(session_id, checkpoint.tinker_path)))

    assert answer["model_id"] == f"{session_id}:train:1"
    op = await gateway.op(answer["request_id"])
    assert op == LoadWeightsOp(
        model_id=ModelId(answer["model_id"]),
        seq_id=0,
        path=checkpoint.tinker_path,
        blob_key=checkpoint.blob_key,
        lora=lora,
        with_optimizer=True,
        creates_model=True,
    )
    record = await gateway.store.models.get(ModelId(answer["model_id"]))
    assert record is not None
    assert (record.lora, record.base_model, record.next_seq_id) == (lora, POOL, 0)
    again = ok(await gateway.post("load_weights", load_body(session_id, checkpoint.tinker_path)))
    assert again == answer


async def test_somebody_elses_checkpoint_is_loaded_only_when_public(gateway: Harness) -> None:
    source = await gateway.new_model(await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)
    private = await gateway.publish(source, "private", key=OTHER_KEY)
    public = await gateway.publish(source, "public", key=OTHER_KEY, public=True)
    session_id = await gateway.new_session()

    async def load(path: str, model_seq_id: int) -> httpx.Response:
        answer = ok(await gateway.post("load_weights", load_body(session_id, path, model_seq_id)))
        return await gateway.future(answer["request_id"])

    foreign = failed(await load(private.tinker_path, 0))
    unknown = failed(await load(f"tinker://{source}/weights/nothing", 1))
    assert foreign.replace("private", "X") == unknown.replace("nothing", "X")
    assert (await load(public.tinker_path, 2)).status_code == 408


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("https://x/y", "tinker://"),
        ("tinker://a/weights", "RUN_ID"),
        ("tinker://a/weights/../../x", "RUN_ID"),
        ("tinker://a/weights/..", "not allowed"),
        ("tinker://a/secrets/x", "kind"),
        ("tinker://a/sampler_weights/x", "takes weights"),
        ("tinker://a/weights/none", "does not exist"),
    ],
)
async def test_a_bad_path_fails_through_the_future(gateway: Harness, path: str, words: str) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)

    created = ok(await gateway.post("load_weights", load_body(session_id, path)))
    loaded = ok(
        await gateway.post("load_weights", {"model_id": model_id, "seq_id": 1, "path": path, "optimizer": False})
    )

    assert words in failed(await gateway.future(created["request_id"]))
    assert words in failed(await gateway.future(loaded["request_id"]))


async def test_a_checkpoint_of_another_base_model_is_refused(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    other = await gateway.publish(model_id, "other", base_model=OTHER_POOL)

    body = load_body(session_id, other.tinker_path, base_model=POOL)
    created = ok(await gateway.post("load_weights", body))
    loaded = {"model_id": model_id, "seq_id": 1, "path": other.tinker_path, "optimizer": False}
    loaded = ok(await gateway.post("load_weights", loaded))

    for answer in (created, loaded):
        assert "belongs to base model fake/other" in failed(await gateway.future(answer["request_id"]))


async def test_a_run_loads_only_what_has_its_shape(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    same = await gateway.publish(model_id, "same", lora=replace(LORA, seed=99))
    wider = await gateway.publish(model_id, "wider", lora=replace(LORA, rank=16))

    async def load(path: str, seq_id: int) -> str:
        body = {"model_id": model_id, "seq_id": seq_id, "path": path, "optimizer": True}
        answer = ok(await gateway.post("load_weights", body))
        assert answer["request_id"] == f"{model_id}:{seq_id}"
        return str(answer["request_id"])

    op = await gateway.op(await load(same.tinker_path, 1))
    assert isinstance(op, LoadWeightsOp)
    assert (op.creates_model, op.seq_id, op.blob_key) == (False, 1, same.blob_key)
    assert "rank 16" in failed(await gateway.future(await load(wider.tinker_path, 2)))


async def test_sampler_weights_cannot_be_trained_on(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    sampler = await gateway.publish(model_id, "s", kind=CheckpointKind.SAMPLER)

    answer = ok(await gateway.post("load_weights", load_body(session_id, sampler.tinker_path)))

    assert "takes weights" in failed(await gateway.future(answer["request_id"]))


async def test_a_load_in_both_forms_at_once_is_unreadable(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    body = load_body(session_id, "tinker://a/weights/b", model_id="x", seq_id=1)

    assert "not both" in refused(await gateway.post("load_weights", body), 400)


async def test_info_names_base_model_and_adapter(gateway: Harness) -> None:
    model_id = await gateway.new_model(await gateway.new_session())

    info = ok(await gateway.post("get_info", {"model_id": model_id}))

    assert (info["model_id"], info["is_lora"], info["lora_rank"]) == (model_id, True, 8)
    assert info["model_data"] == {"arch": "FakeForCausalLM", "model_name": POOL, "tokenizer_id": POOL}


async def test_a_client_on_this_machine_gets_the_tokenizers_directory(gateway: Harness, tmp_path: Path) -> None:
    gateway.pools[0] = replace(gateway.pools[0], facts=facts(directory=tmp_path))
    model_id = await gateway.new_model(await gateway.new_session())

    async def tokenizer_id(**headers: str) -> str:
        info = ok(await gateway.post("get_info", {"model_id": model_id}, headers=headers))
        return str(info["model_data"]["tokenizer_id"])

    assert await tokenizer_id() == str(tmp_path)
    assert await tokenizer_id(**{"X-Forwarded-For": "10.0.0.1"}) == POOL


async def test_unknown_and_foreign_runs_look_alike(gateway: Harness) -> None:
    foreign = await gateway.new_model(await gateway.new_session(key=OTHER_KEY), key=OTHER_KEY)

    for model_id in ("nothing:train:0", foreign):
        refused(await gateway.post("get_info", {"model_id": model_id}), 404)
        refused(await gateway.post("unload_model", {"model_id": model_id}), 404)
        refused(await gateway.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}}), 404)
        load = {"model_id": model_id, "seq_id": 1, "path": "tinker://a/weights/b", "optimizer": False}
        refused(await gateway.post("load_weights", load), 404)


async def test_an_unload_without_a_place_goes_behind_everything_queued(gateway: Harness) -> None:
    model_id = await gateway.new_model(await gateway.new_session())
    for seq_id in (1, 2, 5):
        ok(await gateway.post("optim_step", {"model_id": model_id, "seq_id": seq_id, "adam_params": {}}))

    answer = ok(await gateway.post("unload_model", {"model_id": model_id}))

    assert await gateway.op(answer["request_id"]) == UnloadModelOp(ModelId(model_id), 6)


async def test_an_unload_does_not_go_behind_an_op_that_was_refused_for_being_far_ahead(gateway: Harness) -> None:
    model_id = await gateway.new_model(await gateway.new_session())
    for seq_id in (1, 2**31 - 1):
        ok(await gateway.post("optim_step", {"model_id": model_id, "seq_id": seq_id, "adam_params": {}}))

    answer = ok(await gateway.post("unload_model", {"model_id": model_id}))

    assert (await gateway.row(answer["request_id"])).seq_id == 2


async def test_a_run_whose_base_model_left_the_server_says_so(gateway: Harness) -> None:
    model_id = await gateway.new_model(await gateway.new_session())
    gateway.pools[:] = [PoolView(OTHER_POOL, facts=facts(OTHER_POOL), is_ready=True)]

    answer = ok(await gateway.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}}))

    assert "not served" in failed(await gateway.future(answer["request_id"]))
