"""The OpenAPI document: complete, served, and true of real answers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from gateway_support import KEY, POOL, Harness
from gateway_surface import CALLS, Call, Estate, new_estate, send, serve_text
from pydantic import BaseModel, ValidationError
from test_gateway_openai import queued, result_of

from treadle.domain.ids import TenantId
from treadle.domain.keys import key_digest
from treadle.gateway import GatewaySettings, create_app
from treadle.gateway.app import ENDPOINTS, api_document
from treadle.gateway.routing import Endpoint
from treadle.store.audit import Author
from treadle.wire.results import PROTOBUF

# They are asked for without a body, or with whatever a client has to say.
BODILESS = {
    "POST /api/v1/auth/token",
    "POST /api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}/publish",
    "POST /admin/v1/losses/named/{named_loss_id}/review",
    "PUT /api/v1/projects/{project_id}/members/{user_or_tenant}",
    "POST /admin/v1/runs/{model_id}/snapshot",
    "POST /admin/v1/runs/{model_id}/evict",
}
# They answer with files, text or a trace, whose forms are not this API's.
NOT_JSON = {
    "GET /api/v1/traces/{token}",
    "GET /external/{token}/{name}",
    "GET /metrics",
    "GET /admin/v1/usage.csv",
    "GET /api/v1/tokenizers/{name:path}",
}
# In open mode no key can be ended, so the tests of accounts ask for this one.
ASKED_ELSEWHERE = {"DELETE /api/v1/auth/apikey/me"}
ADMIN_KEY = "tml-admin"
# What these are about is made by a scheduler, or in several steps; their own tests ask for them.
MADE_ELSEWHERE = (
    *("/admin/v1/losses/named/", "/admin/v1/pools/", "/admin/v1/commands/"),
    *(f"/admin/v1/runs/{{model_id}}/{action}" for action in ("snapshot", "evict")),
)


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(
        is_loopback=True,
        hold_s=0.1,
        has_jwt=True,
        auth_methods=("keys", "open"),
        max_failed_logins_per_minute=1_000_000,
    )


@pytest.fixture(autouse=True)
async def administered(gateway: Harness) -> None:
    """An operator, and what operators' routes are asked about: the first key, an organisation."""
    await gateway.store.keys.add("alice", key_digest("tml-first"), is_admin=False)
    await gateway.store.keys.add("ops", key_digest(ADMIN_KEY), is_admin=True)
    await gateway.store.organizations.put("acme", "", author=Author(TenantId("user:ops"), "user:ops"))


def is_operators(path: str) -> bool:
    return path.startswith("/admin/")


def route_of(endpoint: Endpoint) -> str:
    return f"{endpoint.method} {endpoint.path}"


def operations() -> list[dict[str, Any]]:
    return [operation for path in api_document()["paths"].values() for operation in path.values()]


def test_every_route_says_what_it_reads_and_answers() -> None:
    for endpoint in ENDPOINTS:
        route = route_of(endpoint)
        assert (endpoint.body is None) == (endpoint.method in ("GET", "DELETE") or route in BODILESS), route
        assert (endpoint.answer is None) == (route in NOT_JSON), route


def test_every_operation_is_described_and_has_a_name_of_its_own() -> None:
    names = [operation["operationId"] for operation in operations()]
    assert len(set(names)) == len(names) == len(ENDPOINTS)
    for operation in operations():
        assert len(operation["summary"].split()) > 1, operation["operationId"]
        assert {"200", "302"} & operation["responses"].keys()
        for response in operation["responses"].values():
            assert response["description"]
    for name, schema in api_document()["components"]["schemas"].items():
        assert schema["type"] in ("object", "string"), name


def test_the_document_is_served_below_a_prefix_too(gateway: Harness) -> None:
    for root_path in ("", "/tinker"):
        deps = replace(gateway.deps(), settings=replace(gateway.settings, root_path=root_path))
        answer = TestClient(create_app(deps)).get(f"{root_path}/openapi.json")
        assert answer.status_code == 200
        served = answer.json()
        assert served["paths"] == api_document()["paths"]
        assert served["components"] == api_document()["components"]


async def answer_to(gateway: Harness, call: Call) -> httpx.Response:
    """The answer; the test plays the sampler where one has to do its part."""
    asking = asyncio.create_task(send(gateway, call, key=ADMIN_KEY if is_operators(call.path) else KEY))
    if call.is_sampled:
        waiting = asyncio.create_task(queued(gateway))
        await asyncio.wait({asking, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            waiting.cancel()
        else:
            await gateway.finish(waiting.result()[0], result_of("Hi"), content_type=PROTOBUF)
    return await asking


def misfit(model: type[BaseModel], answer: httpx.Response) -> str | None:
    """What is wrong with an answer: a field that is missing, or that the model does not know."""
    try:
        # Only results may have fields of their own kind.
        model.model_validate_json(answer.content, extra=model.model_config.get("extra", "forbid"))
    except ValidationError as error:
        return str(error)
    return None


async def test_real_answers_are_what_the_document_says(gateway: Harness) -> None:
    serve_text(gateway)
    mine = await new_estate(gateway)
    misfits = []
    for endpoint in ENDPOINTS:
        route = route_of(endpoint)
        if endpoint.answer is None or route in ASKED_ELSEWHERE:
            continue
        num_answers = 0
        for index in range(len(CALLS[route](mine, mine))):
            mine = replace(mine, seq_id=mine.seq_id + 2)
            call = CALLS[route](mine, mine)[index]
            if route.endswith("asample"):
                await drain(gateway)
            answer = await answer_to(gateway, call)
            if answer.status_code in (
                (endpoint.status,) if is_operators(call.path) else (endpoint.status, *endpoint.others)
            ):
                num_answers += 1
                model = endpoint.others.get(answer.status_code, endpoint.answer)
                if wrong := misfit(model, answer):
                    misfits.append(f"{route}: {wrong}")
            elif wrong := misfit(endpoint.error, answer):
                misfits.append(f"{route}: {answer.status_code} {wrong}")
        if not num_answers and not endpoint.path.startswith(MADE_ELSEWHERE):
            misfits.append(f"{route} was never answered: {answer.text}")
        await drain(gateway)
        if route.startswith("DELETE") or route.endswith(("finish", "unload_model")):
            mine = await new_estate(gateway)
    assert misfits == []


async def drain(gateway: Harness) -> None:
    """No sample waits any more."""
    for row in await gateway.store.requests.queued_samples(POOL, 100):
        await gateway.finish(row.request_id, result_of("Hi"), content_type=PROTOBUF)


async def test_refusals_are_what_the_document_says(gateway: Harness) -> None:
    serve_text(gateway)
    nobodys = Estate((await new_estate(gateway)).session_id, number=77)
    misfits = []
    for endpoint in ENDPOINTS:
        for call in CALLS[route_of(endpoint)](nobodys, nobodys):
            if call.is_sampled and not call.names(nobodys):
                continue
            for key in (KEY, "no key"):
                answer = await send(gateway, call, key=key)
                if answer.status_code < 400:
                    continue
                known = {str(status): endpoint.error for status in (400, 401, 404)}
                known |= {str(status): model for status, model in endpoint.others.items()}
                model = known.get(str(answer.status_code))
                wrong = "not in the document" if model is None else misfit(model, answer)
                if wrong:
                    misfits.append(f"{call.method} {call.path}: {answer.status_code} {wrong}")
    assert misfits == []
