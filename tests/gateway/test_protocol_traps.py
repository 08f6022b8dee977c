"""The traps of the protocol: what makes the official SDK hang, spin, retry for minutes or read a result wrongly.

Each trap has a test. TRAPS names it, by file and name; those that had none elsewhere are here. The numbers are those of
the protocol's list, and a test checks that every test that is named exists.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from gateway_support import KEY, POOL, Harness, ok, refused, sample_body
from tinker import types
from tinker.types.futures_retrieve_response import FuturesRetrieveResponse

from treadle.config.tree import Settings
from treadle.domain.ids import CheckpointKind
from treadle.domain.limits import HOLD_S
from treadle.domain.outcome import StepResult
from treadle.domain.states import Category
from treadle.gateway import GatewaySettings
from treadle.gateway.routes.futures import PIECE_BYTES, SIZE_FIRST_BYTES
from treadle.wire import results
from treadle.wire.results import PROTOBUF

TESTS = Path(__file__).parents[1]
# What the SDK allows a retrieval (_fetch_via_rest, 0.38), and the period of its heartbeat.
SDK_RETRIEVE_S = 45
SDK_HEARTBEAT_S = 10
# What the SDK sends, nulls and all.
FINISH = {"reason": {"type": "success"}, "detail": None}

TRAPS = {
    1: ["gateway/test_gateway_sampling.py::test_a_sample_knows_its_sequence_ids_at_once"],
    2: ["gateway/test_gateway_legacy.py::test_a_pass_is_answered_as_it_is_asked_for"],
    3: [
        "gateway/test_gateway_training.py::test_a_pass_that_cannot_be_honoured_is_a_failed_row",
        "e2e/test_bad_input.py::test_a_step_keeps_the_passes_that_succeeded_and_counts_the_others",
    ],
    4: ["gateway/test_gateway_training.py::test_chunks_may_arrive_in_any_order"],
    5: ["gateway/test_gateway_futures.py::test_an_unfinished_future_is_408_with_the_state_on_top"],
    6: [
        "gateway/test_protocol_traps.py::test_an_unfinished_future_is_held_before_it_is_408",
        "gateway/test_gateway_futures.py::test_polls_of_a_stopping_server_are_held_for_a_moment_only",
    ],
    7: ["gateway/test_protocol_traps.py::test_nothing_is_held_as_long_as_the_sdk_waits"],
    8: ["gateway/test_protocol_traps.py::test_no_answer_is_409"],
    9: ["gateway/test_protocol_traps.py::test_every_400_has_a_body"],
    10: ["gateway/test_gateway_service.py::test_telemetry_of_any_shape_is_accepted"],
    11: ["gateway/test_protocol_traps.py::test_both_configurations_answer"],
    12: ["gateway/test_protocol_traps.py::test_unpublishing_deletes_nothing"],
    13: ["gateway/test_gateway_sampling.py::test_clones_count_from_far_away"],
    14: [
        "wire/test_wire_results.py::test_pass_metrics_survive_the_sdks_combination_of_chunks",
        "wire/test_wire_results.py::test_a_pass_without_datums_or_with_a_bad_metric_name_is_our_bug",
    ],
    15: [
        "gateway/test_protocol_traps.py::test_a_step_result_is_never_nan",
        "wire/test_wire_results.py::test_step_metrics_are_what_the_sdk_validates",
    ],
    16: ["gateway/test_protocol_traps.py::test_categories_are_the_sdks_words"],
    17: ["gateway/test_protocol_traps.py::test_a_retried_ephemeral_save_may_count_on"],
    18: ["gateway/test_protocol_traps.py::test_no_result_has_a_key_by_which_the_sdk_tells_answers_apart"],
    19: ["wire/test_wire_ops.py::test_the_forms_of_stop"],
    20: [
        "gateway/test_gateway_sampling.py::test_base_model_and_checkpoint_must_agree",
        "gateway/test_protocol_traps.py::test_a_training_checkpoint_is_sampled_or_refused_at_once",
    ],
    21: ["gateway/test_protocol_traps.py::test_nulls_mean_nothing_was_said"],
    22: ["gateway/test_protocol_traps.py::test_metadata_is_text_and_times_have_a_zone"],
    23: ["wire/test_wire_passes.py::test_what_cannot_be_honoured_is_refused_by_datum_and_field"],
    24: [
        "wire/test_wire_passes.py::test_soft_targets_are_read_whether_the_sdk_sends_them_sparse_or_dense",
        "wire/test_wire_passes.py::test_malformed_sparse_tensors_are_refused",
    ],
    25: ["gateway/test_protocol_traps.py::test_runs_stay_listed_when_their_session_is_over"],
    26: ["gateway/test_protocol_traps.py::test_a_retry_is_known_by_its_address_not_by_what_it_says"],
    27: ["e2e/test_many_samples.py::test_samples_that_wait_hold_no_connections"],
    28: ["gateway/test_gateway_auth.py::test_two_keys_of_one_user_see_the_same_sessions"],
    29: ["gateway/test_protocol_traps.py::test_the_sdks_poller_outlives_every_kind_of_completion"],
    30: [
        "gateway/test_gateway_models.py::test_a_client_on_this_machine_gets_the_tokenizers_directory",
        "gateway/test_gateway_service.py::test_tokenizer_files_come_as_a_plain_tar",
    ],
    31: [
        "gateway/test_gateway_futures.py::test_results_go_out_verbatim_and_again",
        "gateway/test_protocol_traps.py::test_a_client_that_hangs_up_cancels_nothing",
    ],
    32: ["gateway/test_gateway_futures.py::test_a_transient_failure_of_a_sample_asks_for_it_again"],
    33: [
        "gateway/test_protocol_traps.py::test_the_size_of_a_large_result_comes_first_and_once",
        "gateway/test_protocol_traps.py::test_a_large_result_goes_out_in_pieces",
        "e2e/test_many_samples.py::test_a_result_of_fifty_megabytes_comes_through",
    ],
    34: ["gateway/test_protocol_traps.py::test_connections_outlive_the_time_between_two_heartbeats"],
}


@pytest.fixture
async def model_id(gateway: Harness) -> str:
    return await gateway.new_model(await gateway.new_session())


@pytest.fixture
async def sampler_id(gateway: Harness) -> str:
    return await gateway.new_sampler(await gateway.new_session())


async def step(gateway: Harness, model_id: str, seq_id: int = 1, **fields: object) -> str:
    body = {"model_id": model_id, "seq_id": seq_id, "adam_params": {}, **fields}
    return str(ok(await gateway.post("optim_step", body))["request_id"])


async def sample(gateway: Harness, sampler_id: str, seq_id: int = 1) -> str:
    return str(ok(await gateway.post("asample", sample_body(sampler_id, seq_id)))["request_id"])


def test_every_trap_has_a_test_that_exists() -> None:
    assert sorted(TRAPS) == list(range(1, 35))
    for names in TRAPS.values():
        for path, _, name in (named.partition("::") for named in names):
            assert re.search(rf"def {name}\(", (TESTS / path).read_text()), f"{path} has no {name}"


async def test_an_unfinished_future_is_held_before_it_is_408(gateway: Harness, model_id: str) -> None:
    request_id = await step(gateway, model_id)
    started_at = time.monotonic()
    assert (await gateway.future(request_id)).status_code == 408
    assert time.monotonic() - started_at >= 0.9 * gateway.settings.hold_s


def test_nothing_is_held_as_long_as_the_sdk_waits() -> None:
    assert GatewaySettings(is_loopback=True).hold_s == HOLD_S < SDK_RETRIEVE_S
    with pytest.raises(ValueError, match="hold_s"):
        Settings(server={"hold_s": SDK_RETRIEVE_S})


async def test_no_answer_is_409(gateway: Harness) -> None:
    """Taken names, repeated and misplaced requests; the SDK would repeat each for minutes."""
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    await gateway.publish(model_id, "taken")
    answers = [
        await gateway.post("save_weights", {"model_id": model_id, "seq_id": 1, "path": "taken"}),
        await gateway.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}}),
        await gateway.post("create_model", {"session_id": session_id, "model_seq_id": 0, "base_model": "another"}),
        await gateway.post("create_sampling_session", {"session_id": session_id, "sampling_session_seq_id": 0}),
        await gateway.post(f"sessions/{session_id}/finish", FINISH),
        await gateway.post(f"sessions/{session_id}/finish", FINISH),
        await gateway.post("create_model", {"session_id": session_id, "model_seq_id": 1, "base_model": POOL}),
    ]
    assert 409 not in [answer.status_code for answer in answers]
    assert not [
        path for path in (TESTS.parent / "src/treadle").rglob("*.py") if re.search(r"\b409\b", path.read_text())
    ]


@pytest.mark.parametrize(
    "path", ["forward_backward", "forward", "optim_step", "asample", "create_model", "retrieve_future", "save_weights"]
)
async def test_every_400_has_a_body(gateway: Harness, path: str) -> None:
    assert refused(await gateway.post(path, content=b"\xff"), 400)
    assert refused(await gateway.post(path, content=b""), 400)


async def test_both_configurations_answer(gateway: Harness) -> None:
    ok(await gateway.post("client/config", {"sdk_version": "0.38.0"}))
    ok(await gateway.post("client/dynamic_config", {"sdk_version": "0.38.0"}))


async def test_unpublishing_deletes_nothing(gateway: Harness, model_id: str) -> None:
    await gateway.publish(model_id, "a", public=True)
    path = f"/api/v1/training_runs/{model_id}/checkpoints/weights/a"
    answer = await gateway.client.delete(f"{path}/publish", headers={"X-API-Key": KEY})
    assert answer.status_code < 300, answer.text
    listed = ok(await gateway.get(f"training_runs/{model_id}/checkpoints"))["checkpoints"]
    assert [(found["checkpoint_id"], found["public"]) for found in listed] == [("weights/a", False)]


def test_a_step_result_is_never_nan() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(AssertionError, match="finite"):
            results.encode_step_result(StepResult({"grad_norm": value}))


def test_categories_are_the_sdks_words() -> None:
    known = {category.value for category in types.RequestErrorCategory}
    assert {category.value for category in Category} <= known
    assert all(category.value.islower() for category in Category)


async def test_a_retried_ephemeral_save_may_count_on(gateway: Harness, model_id: str) -> None:
    body = {"model_id": model_id, "seq_id": 1, "kind": "snapshot"}
    first = ok(await gateway.post("save_weights_for_sampler", {**body, "sampling_session_seq_id": 0}))
    again = ok(await gateway.post("save_weights_for_sampler", {**body, "sampling_session_seq_id": 1}))
    assert again["request_id"] == first["request_id"]


def test_no_result_has_a_key_by_which_the_sdk_tells_answers_apart() -> None:
    made = {
        name: make
        for name, make in vars(results).items()
        if name.endswith("_result") and inspect.isfunction(make) and not name.startswith("encode_")
    }
    assert len(made) >= 6
    for name, make in made.items():
        values = {"size_bytes": 1, "path": "tinker://a", "model_id": "m"}
        wanted = inspect.signature(make).parameters
        body = json.loads(make(**{key: value for key, value in values.items() if key in wanted}).body)
        assert not {"error", "status"} & set(body), name
        assert body.get("type") != "try_again", name


async def test_a_training_checkpoint_is_sampled_or_refused_at_once(gateway: Harness, model_id: str) -> None:
    record = await gateway.publish(model_id, "state", kind=CheckpointKind.TRAINING)
    body = {"session_id": await gateway.new_session(), "sampling_session_seq_id": 0, "model_path": record.tinker_path}
    answer = await gateway.post("create_sampling_session", body)
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert record.tinker_path in answer.json()["detail"]


async def test_nulls_mean_nothing_was_said(gateway: Harness, model_id: str) -> None:
    record = await gateway.publish(model_id, "a")
    path = f"/api/v1/training_runs/{model_id}/checkpoints/weights/{record.name}/ttl"
    answer = await gateway.client.put(path, json={"ttl_seconds": None}, headers={"X-API-Key": KEY})
    assert answer.status_code < 300, answer.text
    ok(await gateway.post(f"sessions/{await gateway.new_session()}/finish", FINISH))


async def test_metadata_is_text_and_times_have_a_zone(gateway: Harness) -> None:
    session_id = ok(await gateway.post("create_session", {"user_metadata": {"n": 3, "deep": {"a": [1]}}}))["session_id"]
    model_id = await gateway.new_model(session_id)
    await gateway.publish(model_id, "a")
    session = ok(await gateway.get(f"sessions/{session_id}"))
    assert {type(value) for value in session["user_metadata"].values()} == {str}
    run = ok(await gateway.get(f"training_runs/{model_id}"))
    times = [run["last_request_time"], run["last_checkpoint"]["time"]]
    assert all(datetime.fromisoformat(value).tzinfo is not None for value in times)


async def test_runs_stay_listed_when_their_session_is_over(gateway: Harness) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    ok(await gateway.post(f"sessions/{session_id}/finish", FINISH))
    listed = ok(await gateway.get("training_runs"))["training_runs"]
    assert model_id in [run["training_run_id"] for run in listed]


async def test_a_retry_is_known_by_its_address_not_by_what_it_says(gateway: Harness, model_id: str) -> None:
    body = {"model_id": model_id, "seq_id": 1, "adam_params": {}}
    answers = [
        ok(await gateway.post("optim_step", body, headers={"x-stainless-retry-count": count}))["request_id"]
        for count in ("0", "2", "0")
    ]
    assert len(set(answers)) == 1
    assert (
        ok(await gateway.post("optim_step", {**body, "seq_id": 2}, headers={"x-stainless-retry-count": "2"}))[
            "request_id"
        ]
        not in answers
    )


async def test_the_sdks_poller_outlives_every_kind_of_completion(gateway: Harness, sampler_id: str) -> None:
    """Finished, refused, failed for good and for a while, cancelled, and one whose result is gone already."""
    ids = [await sample(gateway, sampler_id, seq_id) for seq_id in range(1, 6)]
    refused_id = ok(await gateway.post("asample", sample_body(sampler_id, 6, prompt=None)))["request_id"]
    await gateway.finish(ids[0], b"x", content_type=PROTOBUF)
    await gateway.fail(ids[1], "no")
    await gateway.fail(ids[2], "again", is_transient=True)
    ok(await gateway.post("cancel_future", {"request_id": ids[3]}))
    await gateway.finish(ids[4], b"y", content_type=PROTOBUF)
    target = {"type": "sampling_session", "sampling_session_id": sampler_id, "cloned_sampler_id": 0}
    body = {"target": target, "prev_cursor": 0, "retrieved_request_ids": [ids[4]], "timeout": 0.0}
    answer = await gateway.post("retrieve_futures", body)
    read = FuturesRetrieveResponse.model_validate(ok(answer))
    assert {done.request_id for done in read.completions} == {*ids, refused_id}


async def test_a_client_that_hangs_up_cancels_nothing(gateway: Harness, sampler_id: str) -> None:
    request_id = await sample(gateway, sampler_id)
    waiting = asyncio.create_task(gateway.future(request_id))
    await asyncio.sleep(0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await gateway.finish(request_id, b"tokens", content_type=PROTOBUF)
    assert (await gateway.future(request_id)).content == b"tokens"


async def test_the_size_of_a_large_result_comes_first_and_once(gateway: Harness, model_id: str) -> None:
    large, small = await step(gateway, model_id, 1), await step(gateway, model_id, 2)
    await gateway.finish(large, b"x" * SIZE_FIRST_BYTES, content_type=PROTOBUF)
    await gateway.finish(small, b"x" * (SIZE_FIRST_BYTES - 1), content_type=PROTOBUF)

    async def retrieved(request_id: str, **fields: object) -> bytes:
        answer = await gateway.post("retrieve_future", {"request_id": request_id, **fields})
        assert answer.status_code == 200
        return answer.content

    for _ in range(2):
        size = json.loads(await retrieved(large, allow_metadata_only=True))
        assert size == {"status": "complete_metadata", "response_payload_size": SIZE_FIRST_BYTES}
        assert len(await retrieved(large, allow_metadata_only=False)) == SIZE_FIRST_BYTES
        assert len(await retrieved(large)) == SIZE_FIRST_BYTES
        assert len(await retrieved(small, allow_metadata_only=True)) == SIZE_FIRST_BYTES - 1


async def test_a_large_result_goes_out_in_pieces(gateway: Harness, model_id: str) -> None:
    request_id = await step(gateway, model_id)
    body = np.random.default_rng(0).bytes(3 * PIECE_BYTES + 5)
    await gateway.finish(request_id, body, content_type=PROTOBUF)
    sent: list[dict[str, object]] = []
    asked = [{"type": "http.request", "body": json.dumps({"request_id": request_id}).encode(), "more_body": False}]

    async def receive() -> dict[str, object]:
        if asked:
            return asked.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    headers = [(b"x-api-key", KEY.encode()), (b"accept", PROTOBUF.encode())]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/api/v1/retrieve_future",
        "raw_path": b"/api/v1/retrieve_future",
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("gateway", 80),
        "state": {},
    }
    await gateway.app(scope, receive, send)  # type: ignore[arg-type]
    pieces = [message["body"] for message in sent if message["type"] == "http.response.body"]
    assert b"".join(pieces) == body  # type: ignore[arg-type]
    assert max(len(piece) for piece in pieces) == PIECE_BYTES  # type: ignore[arg-type]
    assert (b"content-length", str(len(body)).encode()) in sent[0]["headers"]  # type: ignore[operator]


def test_connections_outlive_the_time_between_two_heartbeats() -> None:
    assert Settings().server.keep_alive_s > 60 > SDK_HEARTBEAT_S
