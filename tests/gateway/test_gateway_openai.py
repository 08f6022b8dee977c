"""OpenAI's and Anthropic's forms at the gateway: what is asked of the sampler, what is refused, and who may ask.

The test plays the sampler: it reads the op that was admitted and commits a result.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gateway_support import KEY, OTHER_KEY, OTHER_POOL, POOL, Harness, facts, ok, open_tenant

import treadle
from treadle.domain.ids import CheckpointKind, RequestId
from treadle.domain.ops import OpKind, SampleOp
from treadle.domain.outcome import PoolFacts, SampledPart, SampledSequence, SampleResult
from treadle.domain.states import RequestState, StopReason
from treadle.gateway.chat.samples import KEEP_ALIVE_S
from treadle.gateway.chat.tokenizers import read_tokenizer
from treadle.gateway.deps import GatewaySettings, PoolView
from treadle.wire import answers_anthropic, answers_openai
from treadle.wire.results import encode_sample_result

BUNDLED = Path(treadle.__file__).parent / "bundled" / "tiny"
TOKENIZER = read_tokenizer(BUNDLED, 2048)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.1, max_num_samples=8)


@pytest.fixture
def gateway(gateway: Harness) -> Harness:
    """With a model that has a tokenizer, and one that has none here."""
    real = PoolFacts(
        **{**_fields(facts()), "vocab_size": 1280, "max_context_length": 128, "tokenizer_dir": str(BUNDLED)}
    )
    away = PoolFacts(**{**_fields(facts(OTHER_POOL)), "tokenizer_dir": "/nowhere/at/all"})
    gateway.pools = [
        PoolView(POOL, aliases=("/models/base",), facts=real, is_ready=True),
        PoolView(OTHER_POOL, facts=away, is_ready=True),
    ]
    return gateway


def _fields(record: PoolFacts) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


async def post(gateway: Harness, path: str, body: object, *, key: str = KEY) -> httpx.Response:
    return await gateway.client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})


def chat(**changes: object) -> dict[str, object]:
    return {"model": POOL, "messages": HELLO, **changes}


async def queued(gateway: Harness, number: int = 1) -> list[RequestId]:
    """The requests that wait, once there are so many."""
    for _ in range(500):
        rows = await gateway.store.requests.queued_samples(POOL, 100)
        if len(rows) >= number:
            return [row.request_id for row in rows]
        await asyncio.sleep(0.01)
    raise AssertionError("nothing was admitted")


def result_of(*texts: str, reason: StopReason = StopReason.LENGTH, ends: Sequence[int] = ()) -> bytes:
    """What a sampler would answer: the tokens of texts, each with logprob -1, -2, ..., and end tokens behind them."""
    sequences = []
    for text in texts:
        ids = np.array([*TOKENIZER.encode(text, add_special_tokens=False), *ends], dtype=np.int32)
        logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
        sequences.append(SampledSequence(ids, logprobs, reason))
    return encode_sample_result(SampleResult(tuple(sequences), prompt_cache_hit_tokens=2)).body


async def answered(
    gateway: Harness, path: str, body: object, result: bytes | Callable[[SampleOp], bytes], *, key: str = KEY
) -> tuple[httpx.Response, SampleOp]:
    """The answer to a request whose sample comes back like this, and what was asked of the sampler."""
    asking = asyncio.create_task(post(gateway, path, body, key=key))
    waiting = asyncio.create_task(queued(gateway))
    await asyncio.wait({asking, waiting}, return_when=asyncio.FIRST_COMPLETED)
    assert not asking.done(), asking.result().text
    (request_id,) = waiting.result()
    op = await gateway.op(request_id)
    assert isinstance(op, SampleOp)
    sampled = result if isinstance(result, bytes) else result(op)
    await gateway.finish(request_id, sampled, content_type="application/x-protobuf")
    return await asking, op


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert body.keys() >= {"message", "type", "param", "code"}
    return dict(body)


def events(response: httpx.Response) -> list[Any]:
    """What a stream said; comments are left out."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    return [line.removeprefix("data: ") for line in lines]


@pytest.mark.parametrize("prefix", ["/oai/api/v1", "/v1"])
async def test_chat_samples_behind_the_models_own_template(gateway: Harness, prefix: str) -> None:
    body = chat(
        n=2,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        seed=11,
        stop=["x", "\n"],
        logprobs=True,
        user="somebody",
    )
    response, op = await answered(gateway, f"{prefix}/chat/completions", body, result_of("Hi there", "Ho"))
    answer = ok(response)
    answers_openai.ChatCompletion.model_validate(answer)
    assert op.prompt.tolist() == TOKENIZER.encode_chat(HELLO)
    assert op.num_samples == 2
    params = op.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.seed) == (7, 0.5, 0.9, 5, 11)
    assert params.stop_strings == ("x", "\n")
    assert params.use_eos
    assert not op.streams
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Hi there", "Ho"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["logprobs"]["content"][0]["logprob"] == -1
    num_sampled = sum(len(TOKENIZER.encode(text, add_special_tokens=False)) for text in ("Hi there", "Ho"))
    assert answer["usage"] == {
        "prompt_tokens": len(op.prompt),
        "completion_tokens": num_sampled,
        "total_tokens": len(op.prompt) + num_sampled,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_the_token_that_ends_an_answer_is_not_in_it_but_is_counted(gateway: Harness) -> None:
    end = TOKENIZER.encode("<|im_end|>", add_special_tokens=False)
    result = result_of("Hi", reason=StopReason.STOP, ends=end)
    response, op = await answered(gateway, "/v1/chat/completions", chat(logprobs=True), result)
    choice = ok(response)["choices"][0]
    assert op.params.max_tokens is None
    assert choice["message"]["content"] == "Hi"
    assert choice["finish_reason"] == "stop"
    num_tokens = len(TOKENIZER.encode("Hi", add_special_tokens=False))
    assert len(choice["logprobs"]["content"]) == num_tokens
    assert ok(response)["usage"]["completion_tokens"] == num_tokens + 1


async def test_the_stop_is_not_in_the_text(gateway: Harness) -> None:
    result = result_of("One two. Thr", reason=StopReason.STOP)
    response, _ = await answered(gateway, "/v1/completions", {"model": POOL, "prompt": "Count:", "stop": ". T"}, result)
    answer = ok(response)
    answers_openai.Completion.model_validate(answer)
    assert answer["choices"][0]["text"] == "One two"
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_completions_take_texts_and_tokens_one_sample_each(gateway: Harness) -> None:
    for prompts, expected in (
        (
            ["a b", "c"],
            [TOKENIZER.encode("a b", add_special_tokens=True), TOKENIZER.encode("c", add_special_tokens=True)],
        ),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ):
        asking = asyncio.create_task(post(gateway, "/v1/completions", {"model": POOL, "prompt": prompts, "n": 2}))
        request_ids = await queued(gateway, 2)
        for request_id in request_ids:
            op = await gateway.op(request_id)
            assert isinstance(op, SampleOp)
            assert op.params.max_tokens == 16
            place = expected.index(op.prompt.tolist())
            body = result_of(f"{place}a", f"{place}b")
            await gateway.finish(request_id, body, content_type="application/x-protobuf")
        choices = ok(await asking)["choices"]
        assert [choice["text"] for choice in choices] == ["0a", "0b", "1a", "1b"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]


async def test_echo_scores_the_prompt_and_may_sample_nothing(gateway: Harness) -> None:
    def scored(op: SampleOp) -> bytes:
        assert op.wants_prompt_logprobs
        assert op.params.max_tokens == 1
        logprobs = -np.arange(len(op.prompt), dtype=np.float32)
        logprobs[0] = np.nan
        sequence = SampledSequence(np.array([5], np.int32), np.array([-1.0], np.float32), StopReason.LENGTH)
        return encode_sample_result(SampleResult((sequence,), prompt_logprobs=logprobs)).body

    body = {"model": POOL, "prompt": "naïve words", "echo": True, "max_tokens": 0, "logprobs": 0}
    response, op = await answered(gateway, "/v1/completions", body, scored)
    answer = ok(response)
    answers_openai.Completion.model_validate(answer)
    choice = answer["choices"][0]
    assert choice["text"] == "naïve words"
    assert choice["logprobs"]["token_logprobs"] == [None, *(-float(place) for place in range(1, len(op.prompt)))]
    assert choice["logprobs"]["text_offset"][0] == 0
    assert answer["usage"]["completion_tokens"] == 0


async def test_a_stream_begins_with_the_role_and_ends_with_usage(gateway: Harness) -> None:
    body = chat(stream=True, stream_options={"include_usage": True}, logprobs=True)
    response, op = await answered(gateway, "/v1/chat/completions", body, result_of("Hi there"))
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert op.streams
    first, *middle, last, usage = [json.loads(chunk) for chunk in chunks]
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in middle) == "Hi there"
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == len(op.prompt)
    assert {chunk["usage"] for chunk in (first, *middle, last)} == {None}
    assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1


async def test_a_stream_shows_tokens_as_they_come_each_once(gateway: Harness) -> None:
    """A worker that died is replaced, and draws again what was sent already."""
    ids = TOKENIZER.encode("One two three four five", add_special_tokens=False)
    live = gateway.app.state.gateway.deps.live

    def grow(op: SampleOp) -> bytes:
        (request_id,) = live._listeners
        for start, stop in ((0, 2), (0, 1), (0, 3), (4, 5), (2, 4)):
            part = SampledPart(
                request_id, 0, start, tuple(ids[start:stop]), tuple(-1.0 - n for n in range(start, stop))
            )
            live.publish([part])
        return result_of("One two three four five")

    response, _ = await answered(
        gateway, "/v1/completions", {"model": POOL, "prompt": "Count", "stream": True, "logprobs": 0}, grow
    )
    *chunks, done = events(response)
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == "One two three four five"
    logprobs = [logprob for choice in choices if choice["logprobs"] for logprob in choice["logprobs"]["token_logprobs"]]
    assert logprobs == [-1.0 - n for n in range(len(ids))]
    assert len(choices) > 3
    assert live._listeners == {}


async def test_a_stream_that_was_drawn_anew_with_other_tokens_ends_in_an_error(gateway: Harness) -> None:
    live = gateway.app.state.gateway.deps.live

    def grow(_: SampleOp) -> bytes:
        (request_id,) = live._listeners
        live.publish([SampledPart(request_id, 0, 0, (7,), (-1.0,))])
        return result_of("One two")

    response, _ = await answered(gateway, "/v1/completions", {"model": POOL, "prompt": "Count", "stream": True}, grow)
    assert "drawn again" in json.loads(events(response)[-1])["error"]["message"]


async def test_a_failed_sample_is_an_error_before_and_in_a_stream(gateway: Harness) -> None:
    for streams in (False, True):
        asking = asyncio.create_task(post(gateway, "/v1/chat/completions", chat(stream=streams)))
        (request_id,) = await queued(gateway)
        await gateway.fail(request_id, "the sampler broke")
        response = await asking
        if streams:
            assert json.loads(events(response)[-1])["error"]["message"] == "the sampler broke"
        else:
            assert error_of(response, 500)["type"] == "server_error"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"guided_json": {}}, "guided_json"),
        ({"n": 0}, "n"),
        ({"stop": [""]}, "stop"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 10**30}, "top_k"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages.0.weight"),
        ({"messages": None}, "messages"),
        ({"model": 3}, "model"),
    ],
)
async def test_what_would_change_the_sample_is_refused_by_name(
    gateway: Harness, changes: dict[str, object], param: str
) -> None:
    error = error_of(await post(gateway, "/v1/chat/completions", chat(**changes)), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param.split(".")[0] in error["message"]
    assert await gateway.store.requests.queued_samples(POOL, 10) == []


async def test_what_changes_nothing_is_taken(gateway: Harness) -> None:
    body = chat(
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        seed=None,
        stop=[],
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "Hi", "name": None},
            {"role": "assistant", "content": "Yes?", "refusal": None, "annotations": [], "tool_calls": None},
            {"role": "user", "content": "So?"},
        ],
    )
    response, op = await answered(gateway, "/v1/chat/completions", body, result_of("Hm"))
    ok(response)
    said = [("system", "Be brief"), ("user", "Hi"), ("assistant", "Yes?"), ("user", "So?")]
    assert op.prompt.tolist() == TOKENIZER.encode_chat([{"role": role, "content": text} for role, text in said])
    assert op.params.use_eos


async def test_a_prompt_that_does_not_fit_is_an_overflow_by_name(gateway: Harness) -> None:
    for body in (chat(max_tokens=500), chat(messages=[{"role": "user", "content": "one two three " * 100}])):
        assert error_of(await post(gateway, "/v1/chat/completions", body), 400)["code"] == "context_length_exceeded"


async def test_models_that_are_not_the_callers_are_not_found(gateway: Harness) -> None:
    session = await gateway.new_session(key=OTHER_KEY)
    run = await gateway.new_model(session, key=OTHER_KEY)
    foreign = await gateway.publish(run, "theirs", kind=CheckpointKind.SAMPLER, key=OTHER_KEY)
    unknown = foreign.tinker_path.replace("theirs", "nobodys")
    shared = await gateway.publish(run, "shared", kind=CheckpointKind.SAMPLER, key=OTHER_KEY, public=True)
    texts = set()
    for name in ("nope", foreign.tinker_path, unknown, f"{POOL};{foreign.tinker_path}"):
        error = error_of(await post(gateway, "/v1/chat/completions", chat(model=name)), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        texts.add(error["message"].replace("theirs", "NAME").replace("nobodys", "NAME"))
    assert len(texts) == 2, "a foreign path and an unknown one look alike"
    _, op = await answered(gateway, "/v1/chat/completions", chat(model=shared.tinker_path), result_of("Hi"))
    assert op.blob_key == shared.blob_key


async def test_checkpoints_are_models_under_their_path_alone_or_with_their_base(gateway: Harness) -> None:
    run = await gateway.new_model(await gateway.new_session())
    for kind in (CheckpointKind.SAMPLER, CheckpointKind.TRAINING):
        saved = await gateway.publish(run, f"mine-{kind.value}", kind=kind)
        for name in (saved.tinker_path, f"{POOL};{saved.tinker_path}", f"/models/base;{saved.tinker_path}"):
            response, op = await answered(gateway, "/v1/chat/completions", chat(model=name), result_of("Hi"))
            assert ok(response)["model"] == name
            assert op.blob_key == saved.blob_key
    error = error_of(await post(gateway, "/v1/chat/completions", chat(model=f"{OTHER_POOL};{saved.tinker_path}")), 400)
    assert "belongs to base model" in error["message"]


async def test_samples_share_a_session_of_the_tenants_own(gateway: Harness) -> None:
    sessions = set()
    run = await gateway.new_model(await gateway.new_session())
    saved = await gateway.publish(run, "mine", kind=CheckpointKind.SAMPLER)
    for model in (POOL, POOL, saved.tinker_path):
        _, op = await answered(gateway, "/v1/chat/completions", chat(model=model), result_of("Hi"))
        sessions.add(op.sampling_session_id)
    assert len(sessions) == 2
    (session_id,) = {id_.partition(":")[0] for id_ in sessions}
    assert session_id in ok(await gateway.get("sessions"))["sessions"]
    assert set(ok(await gateway.get(f"sessions/{session_id}"))["sampler_ids"]) == sessions
    assert session_id not in ok(await gateway.get("sessions", key=OTHER_KEY))["sessions"]
    # Its owner may finish it like any other; the next request gets a new one.
    ok(await gateway.post(f"sessions/{session_id}/finish", {"reason": {"type": "success"}}))
    _, op = await answered(gateway, "/v1/chat/completions", chat(), result_of("Hi"))
    assert not op.sampling_session_id.startswith(session_id)


async def test_two_gateways_use_the_same_session(gateway: Harness) -> None:
    _, first = await answered(gateway, "/v1/chat/completions", chat(), result_of("Hi"))
    gateway.app.state.gateway.text_sessions.__init__()
    _, second = await answered(gateway, "/v1/chat/completions", chat(), result_of("Hi"))
    assert first.sampling_session_id == second.sampling_session_id


async def test_too_much_that_waits_is_429_and_counts_like_the_sdks(gateway: Harness) -> None:
    backlog = gateway.app.state.gateway.backlog
    backlog.limits = replace(backlog.limits, sample_ops_of_tenant=3)
    asking = [asyncio.create_task(post(gateway, "/v1/chat/completions", chat(max_tokens=9))) for _ in range(3)]
    request_ids = await queued(gateway, 3)
    row = await gateway.row(request_ids[0])
    assert row.num_tokens == len(TOKENIZER.encode_chat(HELLO)) + 9
    response = await post(gateway, "/v1/chat/completions", chat())
    error = error_of(response, 429)
    assert error["code"] == "rate_limit_exceeded"
    assert response.headers["retry-after"] == "1"
    for request_id in request_ids:
        await gateway.finish(request_id, result_of("Hi"), content_type="application/x-protobuf")
    assert {(await task).status_code for task in asking} == {200}


async def test_without_a_key_or_the_tokenizers_files_nothing_is_sampled(gateway: Harness) -> None:
    response = await gateway.client.post("/v1/chat/completions", json=chat())
    assert error_of(response, 401)["code"] == "invalid_api_key"
    response = await post(gateway, "/v1/chat/completions", chat(model=OTHER_POOL))
    assert "lies on the server that leads it" in error_of(response, 503)["message"]


async def test_models_are_listed_and_found(gateway: Harness) -> None:
    headers = {"X-API-Key": KEY}
    listed = ok(await gateway.client.get("/oai/api/v1/models", headers=headers))
    answers_openai.ModelList.model_validate(listed)
    assert [model["id"] for model in listed["data"]] == [POOL, OTHER_POOL]
    assert ok(await gateway.client.get(f"/v1/models/{POOL}", headers=headers))["max_model_len"] == 128
    run = await gateway.new_model(await gateway.new_session())
    saved = await gateway.publish(run, "mine", kind=CheckpointKind.SAMPLER)
    assert ok(await gateway.client.get(f"/v1/models/{saved.tinker_path}", headers=headers))["owned_by"] == POOL
    assert error_of(await gateway.client.get("/v1/models/nope", headers=headers), 404)["code"] == "model_not_found"
    assert error_of(await gateway.client.get("/v1/models"), 401)["type"] == "invalid_request_error"


@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_that_goes_away_cancels_its_sample(gateway: Harness, streams: bool) -> None:
    leave = asyncio.Event()
    messages = iter([{"type": "http.request", "body": json.dumps(chat(stream=streams)).encode()}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        return None

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"x-api-key", KEY.encode())],
    }
    call: Callable[..., Awaitable[None]] = gateway.app
    serving = asyncio.create_task(_finished(call(scope, receive, send)))
    (request_id,) = await queued(gateway)
    leave.set()
    await serving
    future = await gateway.store.requests.future(request_id)
    assert future is not None
    assert future.state is RequestState.FAILED
    assert gateway.app.state.gateway.deps.live._listeners == {}


async def _finished(call: Awaitable[None]) -> None:
    await call


async def test_a_quiet_stream_says_that_it_is_alive(gateway: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEEP_ALIVE_S < 60
    monkeypatch.setattr("treadle.gateway.chat.samples.KEEP_ALIVE_S", 0.01)

    asking = asyncio.create_task(post(gateway, "/v1/chat/completions", chat(stream=True)))
    (request_id,) = await queued(gateway)
    await asyncio.sleep(0.05)
    await gateway.finish(request_id, result_of("Hi"), content_type="application/x-protobuf")
    assert ": still sampling" in (await asking).text


async def test_while_the_server_stops_clients_are_told_to_ask_again(gateway: Harness) -> None:
    asking = asyncio.create_task(post(gateway, "/v1/chat/completions", chat()))
    (request_id,) = await queued(gateway)
    gateway.is_draining = True
    assert error_of(await asking, 503)["type"] == "server_error"
    future = await gateway.store.requests.future(request_id)
    assert future is not None
    assert future.state is RequestState.FAILED, "nobody will fetch it"


async def test_messages_in_anthropics_form(gateway: Harness) -> None:
    body = {
        "model": POOL,
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be brief", "cache_control": {"type": "ephemeral"}}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "stop_sequences": ["END"],
        "top_k": 3,
        "metadata": {"user_id": "u"},
    }
    said = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    response, op = await answered(
        gateway, "/anthropic/api/v1/messages", body, result_of("Ok END", reason=StopReason.STOP)
    )
    answer = ok(response)
    answers_anthropic.MessageAnswer.model_validate(answer)
    assert op.prompt.tolist() == TOKENIZER.encode_chat(said)
    assert (op.params.max_tokens, op.params.top_k, op.params.stop_strings) == (5, 3, ("END",))
    assert answer["content"] == [{"type": "text", "text": "Ok "}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "END")
    assert answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == len(op.prompt)
    count = await post(gateway, "/v1/messages/count_tokens", {"model": POOL, "messages": body["messages"]})
    assert ok(count) == {"input_tokens": len(TOKENIZER.encode_chat(said[1:]))}


@pytest.mark.parametrize(
    ("changes", "status", "kind"),
    [
        ({"model": "nope"}, 404, "not_found_error"),
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"tools": [{"name": "f"}]}, 400, "invalid_request_error"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 400, "invalid_request_error"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Prefix"}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_request_error"),
        ({"frobnicate": 1}, 400, "invalid_request_error"),
    ],
)
async def test_refusals_in_anthropics_form(
    gateway: Harness, changes: dict[str, object], status: int, kind: str
) -> None:
    response = await post(gateway, "/v1/messages", {"model": POOL, "max_tokens": 5, "messages": HELLO, **changes})
    assert response.status_code == status, response.text
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == kind


async def test_no_row_is_made_for_a_tenant_by_another(gateway: Harness) -> None:
    _, op = await answered(gateway, "/v1/chat/completions", chat(), result_of("Hi"))
    row = await gateway.row(f"{op.sampling_session_id}:{op.seq_id}")
    assert row.tenant_id == open_tenant()
    assert row.kind is OpKind.SAMPLE
