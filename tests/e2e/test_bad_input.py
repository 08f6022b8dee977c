"""Bad input over the wire: a quick error of the right kind, and everybody goes on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import tinker
import zstandard
from e2e_support import MODEL, ServerProcess, batch, datum, failure_of, new_key, new_run, train_step
from tinker import types

pytestmark = pytest.mark.filterwarnings("default", "ignore::ResourceWarning")

# Far above what any of these takes, far below a hang.
QUICK_S = 10


@pytest.fixture
def neighbour(server: ServerProcess) -> tinker.TrainingClient:
    """Another tenant's run, which must not notice anything."""
    return server.training_client()


def user_error(call: Callable[[], Any]) -> str:
    """The text of the user-category failure that `call` ends in."""
    with pytest.raises(tinker.RequestFailedError) as caught:
        call()
    assert caught.value.category.value == "user", caught.value
    return str(caught.value)


def create(server: ServerProcess, **options: Any) -> Callable[[], Any]:
    service = server.service()
    return lambda: new_run(service, **options)


def test_unknown_model_is_named_with_what_is_served(server: ServerProcess) -> None:
    text = user_error(create(server, base_model="Qwen/Qwen9-900B"))
    assert "Qwen9-900B" in text
    assert MODEL in text


@pytest.mark.parametrize("rank", [0, -1, 33, 4096])
def test_rank_out_of_range_names_value_and_limit(server: ServerProcess, rank: int) -> None:
    text = user_error(create(server, rank=rank))
    # Whole words: the error also names the request, whose random id may hold any digits.
    assert f"rank={rank} " in text
    assert "1 to 32" in text


def test_no_lora_target_is_refused(server: ServerProcess) -> None:
    with server.http() as http:
        session = http.post("create_session", json={"sdk_version": "0.38.0"}).json()["session_id"]
        body = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": MODEL,
            "lora_config": {"rank": 8, "train_attn": False, "train_mlp": False, "train_unembed": False},
        }
        answer = failed_future(http, http.post("create_model", json=body))
    assert answer["category"] == "user"
    assert "train_attn" in answer["error"]


def failed_future(http: httpx.Client, submitted: httpx.Response) -> dict[str, Any]:
    """The {"error", "category"} that a submitted request ends in."""
    assert submitted.status_code == 200, submitted.text
    request_id = submitted.json()["request_id"]
    answer = http.post("retrieve_future", json={"request_id": request_id}).json()
    assert set(answer) == {"error", "category"}
    return dict(answer)


def text_datum(tokens: list[int], **inputs: Any) -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)


ONES = [1.0, 1.0, 1.0]
TARGETS = [11, 12, 13]
TOKENS = [10, 11, 12]
BAD_PASSES = {
    "unknown loss": ("hinge", text_datum(TOKENS, target_tokens=TARGETS, weights=ONES), {}, "hinge"),
    "unknown setting": (
        "ppo",
        text_datum(TOKENS, target_tokens=TARGETS, logprobs=ONES, advantages=ONES),
        {"clip": 1.0},
        "clip",
    ),
    "missing loss input": ("ppo", text_datum(TOKENS, target_tokens=TARGETS, advantages=ONES), {}, "logprobs"),
    "mis-shaped loss input": (
        "cross_entropy",
        text_datum(TOKENS, target_tokens=TARGETS, weights=[1.0, 1.0]),
        {},
        "weights",
    ),
    "token outside the vocabulary": (
        "cross_entropy",
        text_datum([10, 10**6, 12], target_tokens=TARGETS, weights=ONES),
        {},
        "1000000",
    ),
    "target outside the vocabulary": (
        "cross_entropy",
        text_datum(TOKENS, target_tokens=[11, 10**6, 13], weights=ONES),
        {},
        "1000000",
    ),
    "negative token": ("cross_entropy", text_datum([10, -5, 12], target_tokens=TARGETS, weights=ONES), {}, "-5"),
    "sequence over the context": ("cross_entropy", datum([9] * 2050), {}, "2048"),
    "nan weight": (
        "cross_entropy",
        text_datum(TOKENS, target_tokens=TARGETS, weights=[1.0, math.nan, 1.0]),
        {},
        "weights",
    ),
    "infinite advantage": (
        "ppo",
        text_datum(TOKENS, target_tokens=TARGETS, logprobs=ONES, advantages=[1.0, math.inf, 1.0]),
        {},
        "advantages",
    ),
}


@pytest.mark.parametrize("name", BAD_PASSES)
def test_bad_pass_fails_alone(server: ServerProcess, neighbour: tinker.TrainingClient, name: str) -> None:
    loss_fn, bad, config, mentioned = BAD_PASSES[name]
    client = server.training_client()
    first = train_step(client, batch())
    text = user_error(lambda: client.forward_backward([bad], loss_fn, config).result(timeout=QUICK_S))  # type: ignore[arg-type]
    assert mentioned in text
    assert failure_of(client.optim_step(types.AdamParams())) is not None
    assert train_step(client, batch()) < first
    train_step(neighbour, batch())


def test_a_bad_datum_among_good_ones_is_named_by_its_index(server: ServerProcess) -> None:
    client = server.training_client()
    bad = text_datum([10, 10**6, 12], target_tokens=TARGETS, weights=ONES)
    text = user_error(lambda: client.forward_backward([*batch(3), bad], "cross_entropy").result(timeout=QUICK_S))
    assert "datum 3" in text


def test_a_step_keeps_the_passes_that_succeeded_and_counts_the_others(server: ServerProcess) -> None:
    client = server.training_client()
    good = client.forward_backward(batch(), "cross_entropy")
    bad = client.forward_backward(batch(), "hinge")  # type: ignore[arg-type]
    step = client.optim_step(types.AdamParams())
    good.result(timeout=QUICK_S)
    user_error(lambda: bad.result(timeout=QUICK_S))
    metrics = step.result(timeout=QUICK_S).metrics
    assert metrics is not None
    assert metrics["skipped_passes"] == 1


@pytest.mark.parametrize(
    "changes", [{"learning_rate": math.nan}, {"learning_rate": -1.0}, {"beta1": 1.5}, {"eps": -1e-8}]
)
def test_bad_optimizer_settings_are_named(server: ServerProcess, changes: dict[str, float]) -> None:
    client = server.training_client()
    client.forward_backward(batch(), "cross_entropy").result(timeout=QUICK_S)
    text = user_error(lambda: client.optim_step(types.AdamParams(**changes)).result(timeout=QUICK_S))
    assert next(iter(changes)) in text
    # The gradient is still there for a good step.
    client.optim_step(types.AdamParams()).result(timeout=QUICK_S)


@pytest.mark.parametrize(
    "path",
    [
        "tinker://nobody:train:0/weights/x",
        "tinker://a/b",
        "tinker://a:train:0/weights/../../etc",
        "tinker://a:train:0/nonsense/x",
    ],
)
def test_bad_paths_are_refused_and_the_next_run_works(server: ServerProcess, path: str) -> None:
    service = server.service()
    user_error(lambda: service.create_training_client_from_state(path).result(timeout=60))
    train_step(new_run(service), batch())


def test_a_foreign_checkpoint_looks_like_one_that_does_not_exist(server: ServerProcess) -> None:
    owner = server.training_client()
    train_step(owner, batch())
    path = owner.save_state("mine").result(timeout=QUICK_S).path
    stranger = server.service()
    none = path.replace("/mine", "/none")
    foreign = user_error(lambda: stranger.create_training_client_from_state(path).result(timeout=60))
    missing = user_error(lambda: stranger.create_training_client_from_state(none).result(timeout=60))

    def without_ids(text: str) -> str:
        return re.sub(r"[0-9a-f]{32}:train:[0-9]+(:0)?", "RUN", text.replace("/mine", "/none"))

    assert without_ids(foreign) == without_ids(missing)


def test_a_taken_name_is_refused_and_overwrite_replaces_it(server: ServerProcess) -> None:
    client = server.training_client()
    train_step(client, batch())
    client.save_state("a").result(timeout=QUICK_S)
    assert "exists" in user_error(lambda: client.save_state("a").result(timeout=QUICK_S))
    train_step(client, batch())
    client.save_state("a", overwrite=True).result(timeout=QUICK_S)
    for name in ("../x", "a/b", "", "x" * 200):
        user_error(lambda name=name: client.save_state(name).result(timeout=QUICK_S))  # type: ignore[misc]
    train_step(client, batch())


BAD_SAMPLES = {
    "temperature": types.SamplingParams(max_tokens=4, temperature=-1.0),
    "top_p": types.SamplingParams(max_tokens=4, top_p=1.5),
    "max_tokens": types.SamplingParams(max_tokens=0),
}


@pytest.mark.parametrize("field", BAD_SAMPLES)
def test_bad_sampling_settings_are_named(server: ServerProcess, field: str) -> None:
    sampler = server.service().create_sampling_client(base_model=MODEL).result(timeout=60)
    prompt = types.ModelInput.from_ints([10, 11])
    params = BAD_SAMPLES[field]
    text = user_error(lambda: sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result(QUICK_S))
    assert field in text
    good = types.SamplingParams(max_tokens=4)
    assert sampler.sample(prompt=prompt, num_samples=1, sampling_params=good).result(QUICK_S).sequences


def test_prompt_over_the_context_is_refused(server: ServerProcess) -> None:
    sampler = server.service().create_sampling_client(base_model=MODEL).result(timeout=60)
    prompt = types.ModelInput.from_ints([10] * 3000)
    text = user_error(lambda: sampler.compute_logprobs(prompt).result(timeout=QUICK_S))
    assert "2048" in text


def test_unknown_session_is_not_found(server: ServerProcess) -> None:
    with server.http() as http:
        body = {"session_id": "nobody", "model_seq_id": 0, "base_model": MODEL, "lora_config": {"rank": 8}}
        answer = http.post("create_model", json=body)
        assert answer.status_code == 404
        assert answer.json()["detail"]
        assert http.post("session_heartbeat", json={"session_id": "nobody"}).status_code == 404


PROTO = {"Content-Type": "application/x-protobuf"}


def test_a_finished_session_refuses_ops_without_hanging_their_client(server: ServerProcess) -> None:
    """1,030 datums are two requests; a client whose second one gets a 4xx waits for ever with its next op."""
    key = new_key()
    client = server.training_client(key)
    with server.http(key) as http:
        assert http.post(f"sessions/{client.model_id.partition(':')[0]}/finish", json={}).status_code == 200
    passed = client.forward_backward(batch(1030, 3), "cross_entropy")
    stepped = client.optim_step(types.AdamParams())
    assert "finished" in user_error(lambda: passed.result(timeout=QUICK_S))
    assert "finished" in user_error(lambda: stepped.result(timeout=QUICK_S))


def test_garbage_protobuf_is_a_quick_400_with_a_body(server: ServerProcess) -> None:
    with server.http() as http:
        answer = http.post("forward_backward", content=b"\xff\xfe garbage", headers=PROTO)
        assert answer.status_code == 400
        assert answer.json()["detail"]


def test_zstd_bomb_is_stopped_at_the_limit(server: ServerProcess) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(300 * 2**20))
    assert len(bomb) < 2**20
    with server.http() as http:
        answer = http.post("forward_backward", content=bomb, headers={**PROTO, "Content-Encoding": "zstd"})
        assert answer.status_code == 413
        assert http.get("healthz").status_code == 200


def test_body_over_the_limit_is_refused(server: ServerProcess) -> None:
    with server.http() as http:
        answer = http.post("forward_backward", content=bytes(65 * 2**20), headers=PROTO)
        assert answer.status_code == 413
        assert http.get("healthz").status_code == 200


def test_a_key_of_the_wrong_form_is_unauthorized(server: ServerProcess) -> None:
    with httpx.Client(base_url=f"{server.url}/api/v1/") as http:
        for headers in ({}, {"X-API-Key": "nonsense"}):
            answer = http.post("create_session", json={}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["detail"]


def test_foreign_ids_look_unknown(server: ServerProcess) -> None:
    owner = server.training_client()
    with server.http(new_key()) as stranger:
        body = {"model_id": owner.model_id, "seq_id": 1, "adam_params": {}}
        assert stranger.post("optim_step", json=body).status_code == 404
        assert stranger.post("get_info", json={"model_id": owner.model_id}).status_code == 404
        assert stranger.post("retrieve_future", json={"request_id": f"{owner.model_id}:0"}).status_code == 404
    train_step(owner, batch())


def test_endpoints_that_are_not_there_say_so(server: ServerProcess) -> None:
    with server.http() as http:
        answer = http.post("create_full_model", json={})
        assert answer.status_code == 404
        assert "create_full_model" in answer.json()["detail"]
