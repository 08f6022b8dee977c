"""What no database can hold, in every place where a client can put it: refused as the client's error, on both of them.

PostgreSQL refuses text with NUL and numbers that its columns cannot hold, where SQLite takes or cuts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from gateway_support import POOL, Harness, ok, sample_body
from starlette.routing import Route

# As they stand in a URL: NUL, bytes that are not UTF-8, a lone surrogate, a way out of a directory, no end.
HOSTILE = ("a%00b", "%00", "a%ff%fe", "%ED%A0%80", "..%2f..%2fetc", "'%3B%20DROP%20TABLE%20models", "x" * 5_000)
NUMBERS = ("-1", "9223372036854775808", "1e400", "%00", "NaN", "")


@pytest.fixture(params=["sqlite_url", pytest.param("postgres_url", marks=pytest.mark.postgres)])
def gateway_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(request.param)
    return url


def routes_with_parameters(gateway: Harness) -> Iterator[tuple[str, str]]:
    """Method and path of every route that takes something from its path."""
    for route in gateway.app.routes:
        if isinstance(route, Route) and route.param_convertors and route.path.startswith("/api/"):
            assert route.methods is not None
            for method in sorted(route.methods - {"HEAD"}):
                yield method, route.path


@pytest.mark.parametrize("text", HOSTILE)
async def test_paths(gateway: Harness, text: str) -> None:
    asked = 0
    for method, path in routes_with_parameters(gateway):
        parts = [text if part.startswith("{") else part for part in path.split("/")]
        answer = await gateway.client.request(
            method, "/".join(parts), headers={"X-API-Key": "tml-one"}, json={} if method == "POST" else None
        )
        assert 400 <= answer.status_code < 500, (method, path, answer.status_code, answer.text)
        asked += 1
    assert asked >= 8


@pytest.mark.parametrize("text", [*HOSTILE, *NUMBERS])
async def test_queries(gateway: Harness, text: str) -> None:
    for path in ("training_runs", "checkpoints", "sessions"):
        for name in ("project_id", "limit", "offset", "access_scope"):
            answer = await gateway.get(f"{path}?{name}={text}")
            assert answer.status_code < 500, (path, name, answer.status_code, answer.text)


@pytest.mark.parametrize("text", ["\0", "a\0b", "\\\0", "\ud800", "x" * 20_000])
async def test_bodies(gateway: Harness, text: str) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    sampler_id = await gateway.new_sampler(session_id)
    create = {"session_id": session_id, "model_seq_id": 7, "base_model": POOL, "lora_config": {"rank": 8}}
    bodies: list[tuple[str, dict[str, object], tuple[str, ...]]] = [
        ("create_session", {}, ("display_name", "project_id", "sdk_version")),
        ("session_heartbeat", {"session_id": session_id}, ("session_id",)),
        (f"sessions/{session_id}/finish", {}, ("detail",)),
        ("create_model", create, ("session_id", "base_model")),
        ("load_weights", {"model_id": model_id, "seq_id": 1}, ("path", "model_id")),
        ("save_weights", {"model_id": model_id, "seq_id": 2}, ("path", "model_id")),
        ("save_weights_for_sampler", {"model_id": model_id, "seq_id": 3}, ("path", "model_id")),
        ("get_info", {}, ("model_id",)),
        ("unload_model", {}, ("model_id",)),
        ("weights_info", {}, ("tinker_path",)),
        ("retrieve_future", {}, ("request_id",)),
        ("join_sampling_session", {}, ("sampling_session_id",)),
        ("asample", sample_body(sampler_id), ("sampling_session_id",)),
        ("create_sampling_session", {"session_id": session_id, "sampling_session_seq_id": 9}, ("model_path",)),
    ]
    for path, body, fields in bodies:
        for name in fields:
            for value in (text, [text], {text: text}):
                content = _json({**body, name: value})
                answer = await gateway.post(path, content=content)
                assert answer.status_code < 500, (path, name, value, answer.status_code, answer.text)
    for metadata in ({text: "x"}, {"x": text}, {"x": {"y": text}}, {"x": [text]}):
        answer = await gateway.post("create_session", content=_json({"user_metadata": metadata}))
        assert answer.status_code < 500, (metadata, answer.text)
        answer = await gateway.post("create_model", content=_json({**create, "user_metadata": metadata}))
        assert answer.status_code < 500, (metadata, answer.text)
    # Nothing of it is in the way of what is right.
    ok(await gateway.post("create_session", {"user_metadata": {"a": "ü", "b": {"c": 1}}}))


@pytest.mark.parametrize("number", [-1, 0, 2**31, 2**63 - 1, 2**63, 10**30])
async def test_numbers(gateway: Harness, number: int) -> None:
    session_id = await gateway.new_session()
    model_id = await gateway.new_model(session_id)
    sampler_id = await gateway.new_sampler(session_id)
    create = {"session_id": session_id, "base_model": POOL, "lora_config": {"rank": 8}}
    target = {"sampling_session_id": sampler_id, "cloned_sampler_id": number}
    for path, body in (
        ("create_model", {**create, "model_seq_id": number}),
        ("create_model", {**create, "model_seq_id": 1, "lora_config": {"rank": 8, "seed": number}}),
        ("optim_step", {"model_id": model_id, "seq_id": number, "adam_params": {}}),
        ("unload_model", {"model_id": model_id, "seq_id": number}),
        ("save_weights", {"model_id": model_id, "seq_id": 4, "ttl_seconds": number}),
        ("save_weights_for_sampler", {"model_id": model_id, "seq_id": 5, "sampling_session_seq_id": number}),
        ("asample", sample_body(sampler_id, number)),
        ("create_sampling_session", {"session_id": session_id, "sampling_session_seq_id": number, "base_model": POOL}),
        ("retrieve_futures", {"target": target, "prev_cursor": 0, "timeout": 0}),
        ("retrieve_futures", {"target": {**target, "cloned_sampler_id": 0}, "prev_cursor": number, "timeout": 0}),
    ):
        answer = await gateway.post(path, body)
        assert answer.status_code < 500, (path, body, answer.status_code, answer.text)


def _json(body: dict[str, object]) -> bytes:
    return json.dumps(body, ensure_ascii=True).encode()
