"""JSON bodies: what the SDK's own request types dump is accepted, and bad ones are refused in plain words."""

from __future__ import annotations

import contextlib
import inspect
import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.types import DimuonParams
from tinker.types.futures_retrieve_request import FuturesRetrieveRequest, SamplingSessionFuturesTarget
from tinker.types.join_sampling_session_request import JoinSamplingSessionRequest
from tinker.types.session_heartbeat_request import SessionHeartbeatRequest

from treadle.domain.limits import MAX_METADATA_BYTES, MAX_NUM_SAMPLES
from treadle.errors import InvalidRequest, NotSupported, UnreadableBody, UserError
from treadle.wire import bodies
from treadle.wire.bodies import OpHead, parse_body, read_op_head

ALL_BODIES = [
    value
    for _, value in inspect.getmembers(bodies, inspect.isclass)
    if issubclass(value, bodies.Body) and value.__name__.endswith(("Body", "Head"))
]


def sdk_json(request) -> bytes:
    """As the SDK sends it: defaults included, None dropped."""
    return orjson.dumps(request.model_dump(mode="json", exclude_none=True))


def body_of(model, **fields):
    return parse_body(model, orjson.dumps(fields))


def test_the_sdks_requests_are_accepted():
    create = types.CreateModelRequest(
        session_id="s", model_seq_id=0, base_model="m", lora_config=types.LoraConfig(rank=8, seed=3, train_mlp=False)
    )
    body = parse_body(bodies.CreateModelBody, sdk_json(create))
    assert (body.session_id, body.model_seq_id, body.base_model) == ("s", 0, "m")
    assert body.lora_config == bodies.LoraConfigBody(rank=8, seed=3, train_mlp=False)

    step = types.OptimStepRequest(model_id="m", seq_id=4, adam_params=types.AdamParams(learning_rate=1e-3))
    adam = parse_body(bodies.OptimStepBody, sdk_json(step)).adam_params
    assert adam is not None
    assert adam.model_dump() == types.AdamParams(learning_rate=1e-3).model_dump()

    save = types.SaveWeightsRequest(model_id="m", seq_id=2, path="a", ttl_seconds=3600, user_metadata={"k": "v"})
    saved = parse_body(bodies.SaveWeightsBody, sdk_json(save))
    assert (saved.path, saved.ttl_seconds, saved.overwrite, saved.user_metadata) == ("a", 3600, False, {"k": "v"})

    ephemeral = types.SaveWeightsForSamplerRequest(model_id="m", seq_id=2, sampling_session_seq_id=5, kind="inflight")
    assert parse_body(bodies.SaveForSamplerBody, sdk_json(ephemeral)).sampling_session_seq_id == 5

    load = types.LoadWeightsRequest(session_id="s", model_seq_id=1, path="tinker://a/weights/b", optimizer=True)
    assert parse_body(bodies.LoadWeightsBody, sdk_json(load)).creates_model
    load = types.LoadWeightsRequest(model_id="m", seq_id=1, path="tinker://a/weights/b", optimizer=False)
    assert not parse_body(bodies.LoadWeightsBody, sdk_json(load)).creates_model

    session = types.CreateSessionRequest(tags=["t"], user_metadata={"a": 1}, sdk_version="0.38.0")
    assert parse_body(bodies.CreateSessionBody, sdk_json(session)).user_metadata == {"a": "1"}

    sample = types.SampleRequest(
        sampling_session_id="s:sample:0",
        seq_id=10**18,
        prompt=types.ModelInput.from_ints([1, 2]),
        sampling_params=types.SamplingParams(max_tokens=3, stop=["x"]),
        prompt_logprobs=False,
        record_stability_info=False,
    )
    sampled = parse_body(bodies.SampleBody, sdk_json(sample))
    assert (sampled.seq_id, sampled.num_samples, sampled.sampling_params.max_tokens) == (10**18, 1, 3)

    poll = FuturesRetrieveRequest(target=SamplingSessionFuturesTarget(sampling_session_id="s:sample:0"), timeout=0.0)
    assert parse_body(bodies.RetrieveFuturesBody, sdk_json(poll)).timeout == 0.0
    assert parse_body(bodies.HeartbeatBody, sdk_json(SessionHeartbeatRequest(session_id="s"))).session_id == "s"
    join = JoinSamplingSessionRequest(sampling_session_id="s:sample:0")
    assert parse_body(bodies.JoinSamplingSessionBody, sdk_json(join)).sampling_session_id == "s:sample:0"
    future = types.FutureRetrieveRequest(request_id="m:1")
    assert parse_body(bodies.RetrieveFutureBody, sdk_json(future)).allow_metadata_only is False
    assert parse_body(bodies.GetInfoBody, sdk_json(types.GetInfoRequest(model_id="m"))).model_id == "m"
    assert parse_body(bodies.UnloadModelBody, sdk_json(types.UnloadModelRequest(model_id="m"))).seq_id is None


def test_defaults_are_the_sdks():
    assert bodies.AdamParamsBody().model_dump() == types.AdamParams().model_dump()
    assert bodies.SamplingParamsBody().model_dump() == types.SamplingParams().model_dump()
    lora = bodies.LoraConfigBody().model_dump()
    assert lora == types.LoraConfig(rank=lora["rank"]).model_dump()


def test_what_older_sdks_send_is_accepted():
    adam = body_of(bodies.OptimStepBody, model_id="m", seq_id=1, adam_params={}).adam_params
    assert adam == bodies.AdamParamsBody()
    lora = {"rank": 8, "seed": None, "train_mlp": None}
    create = body_of(bodies.CreateModelBody, session_id="s", model_seq_id=0, base_model="m", lora_config=lora)
    assert create.lora_config == bodies.LoraConfigBody(rank=8)
    params = {"max_tokens": None, "stop": None, "unknown": None}
    sample = body_of(bodies.SampleBody, sampling_session_id="s", seq_id=0, prompt={}, sampling_params=params)
    assert sample.sampling_params == bodies.SamplingParamsBody()
    finish = body_of(bodies.FinishBody, reason={"type": "errored"}, detail=None)
    assert (finish.reason.type, finish.detail) == ("errored", None)


def test_unknown_top_level_fields_are_ignored():
    assert body_of(bodies.GetInfoBody, model_id="m", type="get_info", from_the_future={"a": 1}).model_id == "m"


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (bodies.OptimStepBody, {"adam_params": {"amsgrad": True}}),
        (bodies.CreateModelBody, {"base_model": "m", "lora_config": {"amsgrad": 0}}),
        (bodies.SampleBody, {"prompt": {}, "sampling_params": {"amsgrad": ""}}),
        (bodies.CreateModelBody, {"base_model": "m", "optimizer_config": {"type": "adamw", "amsgrad": 1}}),
    ],
)
def test_unknown_settings_with_a_value_are_refused_by_name(model, fields):
    ids = {"session_id": "s", "model_seq_id": 0, "model_id": "m", "sampling_session_id": "s", "seq_id": 1}
    with pytest.raises(InvalidRequest, match="amsgrad"):
        body_of(model, **ids, **fields)


def test_other_optimizers_are_not_supported():
    for config in ({"type": "dimuon", "version": 1}, {"type": "sgd"}, {}):
        with pytest.raises(NotSupported, match="adamw"):
            body_of(bodies.CreateModelBody, session_id="s", model_seq_id=0, base_model="m", optimizer_config=config)
    step = types.OptimStepRequest(model_id="m", seq_id=1, optimizer_params=DimuonParams(learning_rate=0.1))
    # The op's builder refuses it, so that it becomes a failed row in its place.
    assert parse_body(bodies.OptimStepBody, sdk_json(step)).optimizer_params["type"] == "dimuon"


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        ("adam_params", "learning_rate", "-0.1", ["-0.1", "greater than or equal to 0"]),
        ("adam_params", "learning_rate", "NaN", ["nan", "finite"]),
        ("adam_params", "learning_rate", "-Infinity", ["-inf", "finite"]),
        ("adam_params", "learning_rate", "1e400", ["inf", "finite"]),
        ("adam_params", "learning_rate", '"1"', ["'1'", "number"]),
        ("adam_params", "learning_rate", "true", ["True", "number"]),
        ("adam_params", "beta1", "1.0", ["1.0", "less than 1"]),
        ("adam_params", "beta1", "-0.1", ["-0.1"]),
        ("adam_params", "beta2", "1", ["less than 1"]),
        ("adam_params", "eps", "0", ["greater than 0"]),
        ("adam_params", "eps", "-1e-9", ["greater than 0"]),
        ("adam_params", "weight_decay", "-1", ["-1"]),
        ("adam_params", "grad_clip_norm", "-1", ["-1"]),
        ("lora_config", "rank", "8.0", ["8.0", "integer"]),
        ("lora_config", "rank", "true", ["True", "integer"]),
        ("lora_config", "rank", "NaN", ["nan"]),
        ("lora_config", "seed", "18446744073709551616", ["seed"]),
        ("lora_config", "seed", "1" * 400, ["seed"]),
        ("lora_config", "train_mlp", "1", ["boolean"]),
        ("sampling_params", "temperature", "-0.5", ["-0.5", "greater than or equal to 0"]),
        ("sampling_params", "temperature", "Infinity", ["inf"]),
        ("sampling_params", "top_p", "0", ["greater than 0"]),
        ("sampling_params", "top_p", "1.01", ["less than or equal to 1"]),
        ("sampling_params", "top_k", "0", ["top_k is 0"]),
        ("sampling_params", "top_k", "-2", ["-2"]),
        ("sampling_params", "max_tokens", "0", ["greater than or equal to 1"]),
        ("sampling_params", "seed", '"a"', ["integer"]),
    ],
)
def test_bad_numbers_name_field_value_and_limit(section, field, value, words):
    model = {
        "adam_params": bodies.OptimStepBody,
        "lora_config": bodies.CreateModelBody,
        "sampling_params": bodies.SampleBody,
    }[section]
    ids = '"session_id":"s","model_seq_id":0,"model_id":"m","sampling_session_id":"s","seq_id":1'
    raw = f'{{{ids},"base_model":"m","prompt":{{}},"{section}":{{"{field}":{value}}}}}'.encode()
    # The head stays readable, so the request can get a row that fails.
    assert read_op_head(raw).seq_id == 1
    with pytest.raises(InvalidRequest) as caught:
        parse_body(model, raw)
    for word in [f"{section}.{field}", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_samples": 0},
        {"num_samples": MAX_NUM_SAMPLES + 1},
        {"topk_prompt_logprobs": -1},
        {"prompt_logprobs": "yes"},
        {"sampling_params": [1]},
        {"sampling_params": "greedy"},
    ],
)
def test_bad_sample_fields_are_refused_by_name(fields):
    with pytest.raises(InvalidRequest, match=next(iter(fields))):
        body_of(bodies.SampleBody, **({"sampling_session_id": "s", "seq_id": 1, "prompt": {}} | fields))


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (bodies.OptimStepBody, {"seq_id": 1}),
        (bodies.OptimStepBody, {"model_id": "m"}),
        (bodies.OptimStepBody, {"model_id": "m", "seq_id": None}),
        (bodies.OptimStepBody, {"model_id": "m", "seq_id": 0}),
        (bodies.OptimStepBody, {"model_id": "m", "seq_id": 2**31}),
        (bodies.OptimStepBody, {"model_id": "m", "seq_id": "1"}),
        (bodies.OptimStepBody, {"model_id": "", "seq_id": 1}),
        (bodies.OptimStepBody, {"model_id": "m\0", "seq_id": 1}),
        (bodies.OptimStepBody, {"model_id": "m" * 10_000, "seq_id": 1}),
        (bodies.OptimStepBody, {"model_id": ["m"], "seq_id": 1, "adam_params": {"beta1": 7}}),
        (bodies.CreateModelBody, {"session_id": "s", "base_model": "m"}),
        (bodies.CreateModelBody, {"session_id": "s", "base_model": "m", "model_seq_id": -1}),
        (bodies.LoadWeightsBody, {"path": "p", "optimizer": True}),
        (bodies.LoadWeightsBody, {"path": "p", "optimizer": True, "model_id": "m"}),
        (bodies.LoadWeightsBody, {"path": "p", "optimizer": True, "session_id": "m", "seq_id": 1}),
        (
            bodies.LoadWeightsBody,
            {"path": "p", "optimizer": True, "model_id": "m", "seq_id": 1, "session_id": "s", "model_seq_id": 0},
        ),
        (bodies.SampleBody, {"sampling_session_id": "s", "seq_id": 2**63, "prompt": {}}),
        (bodies.SampleBody, {"sampling_session_id": "s", "seq_id": -1, "prompt": {}}),
        (bodies.SampleBody, {"seq_id": 1, "prompt": {}, "base_model": "m"}),
        (bodies.RetrieveFutureBody, {"request_id": 5}),
        (bodies.RetrieveFuturesBody, {"target": {"type": "other"}}),
        (bodies.HeartbeatBody, {}),
    ],
)
def test_a_body_without_readable_ids_is_unreadable(model, fields):
    with pytest.raises(UnreadableBody):
        body_of(model, **fields)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'"a"',
        b"\xff\xfe",
        b'{"model_id": "\\ud800"}',
        b'{"a": NaN, "model_id": "\\ud800"}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 5_000 + b"}",
    ],
    ids=range(11),
)
@pytest.mark.parametrize("model", [OpHead, bodies.TelemetryBody])
def test_what_is_not_a_json_object_is_unreadable(model, raw):
    with pytest.raises(UnreadableBody):
        parse_body(model, raw)


def test_the_head_is_read_whatever_the_rest_holds():
    raw = b'{"model_id":"m","seq_id":3,"adam_params":{"learning_rate":NaN},"x":[[[]]]}'
    assert read_op_head(raw) == OpHead(model_id="m", seq_id=3)
    raw = b'{"sampling_session_id":"s:sample:0","seq_id":0,"prompt":7}'
    assert read_op_head(raw) == OpHead(sampling_session_id="s:sample:0", seq_id=0)
    assert read_op_head(b'{"session_id":"s","model_seq_id":2}') == OpHead(session_id="s", model_seq_id=2)
    assert read_op_head(b"{}") == OpHead()
    for bad in (b'{"model_id":"m","seq_id":0}', b'{"model_id":5}', b'{"seq_id":NaN}', b'{"seq_id":1.0}'):
        with pytest.raises(UnreadableBody):
            read_op_head(bad)


def test_metadata_becomes_text_and_is_bounded():
    metadata = {"a": "x", "b": 1, "c": [1, {"d": None}], "e": None}
    session = body_of(bodies.CreateSessionBody, user_metadata=metadata)
    assert session.user_metadata == {"a": "x", "b": "1", "c": '[1, {"d": null}]', "e": "null"}
    assert parse_body(bodies.CreateSessionBody, b'{"user_metadata":{"a":NaN}}').user_metadata == {"a": "NaN"}
    with pytest.raises(InvalidRequest, match="user_metadata"):
        body_of(bodies.CreateSessionBody, user_metadata={"a": "x" * MAX_METADATA_BYTES})
    with pytest.raises(InvalidRequest, match="NUL"):
        body_of(bodies.CreateSessionBody, user_metadata={"a": "\0"})
    with pytest.raises(InvalidRequest, match="user_metadata"):
        body_of(bodies.CreateSessionBody, user_metadata=[1])


def test_deeply_nested_metadata_raises_no_recursion_error():
    deep = b'{"user_metadata":{"a":' + b"[" * 1_000 + b"]" * 1_000 + b"}}"
    # How deep is too deep differs between Python versions.
    with contextlib.suppress(InvalidRequest):
        parse_body(bodies.CreateSessionBody, deep)


@pytest.mark.parametrize("ttl", [0, 3_599, 10**12])
def test_a_ttl_is_an_hour_to_ten_years(ttl):
    with pytest.raises(InvalidRequest, match="ttl_seconds"):
        body_of(bodies.SaveWeightsBody, model_id="m", seq_id=1, ttl_seconds=ttl)


def test_a_sampling_session_names_its_weights():
    with pytest.raises(InvalidRequest, match="base_model or model_path"):
        body_of(bodies.CreateSamplingSessionBody, session_id="s", sampling_session_seq_id=0)


def test_telemetry_takes_anything():
    body_of(bodies.TelemetryBody, events=[{"event": "X"}, 3], platform=5, session_id=None)


def test_messages_stay_short_and_name_no_library():
    with pytest.raises(UserError) as caught:
        body_of(bodies.OptimStepBody, model_id="m", seq_id=1, adam_params={"beta1": "x" * 100_000})
    assert len(str(caught.value)) < 300
    with pytest.raises(UserError) as caught:
        body_of(bodies.OptimStepBody, model_id="m", seq_id=1, adam_params=[])
    assert str(caught.value) == "adam_params=[] should be a JSON object"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("model", ALL_BODIES)
@given(st.data())
def test_random_json_in_known_fields_raises_only_our_errors(model, data):
    fields = {name: data.draw(json_values) for name in model.model_fields}
    with contextlib.suppress(UserError):
        parse_body(model, json.dumps(fields).encode())


@given(st.binary(max_size=60))
def test_random_bytes_raise_only_our_errors(raw):
    with pytest.raises(UnreadableBody):
        parse_body(bodies.HeartbeatBody, raw)


@pytest.mark.parametrize("field", ["learning_rate", "beta2", "grad_clip_norm"])
def test_null_number_is_refused_because_the_sdk_writes_nan_so(field: str) -> None:
    raw = b'{"model_id":"s:train:0","seq_id":1,"adam_params":{"%s":null}}' % field.encode()
    with pytest.raises(InvalidRequest, match=field):
        parse_body(bodies.OptimStepBody, raw)
