"""Requests that nobody would write by hand, made from the OpenAPI document; and hostile names in every text.

Whatever is sent, the answer is one that the document has, which no 500 is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from gateway_support import KEY, POOL, Harness
from gateway_surface import CALLS, Call, Estate, new_estate, send, serve_text
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from test_gateway_openai import result_of

from treadle.gateway import GatewaySettings
from treadle.gateway.app import api_document
from treadle.wire.results import PROTOBUF

HOSTILE = (
    "",
    "../../../etc/passwd",
    "..",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "\u202egpj.exe",
    "%2e%2e%2f",
    "tinker://../weights/..",
    "x" * 10_240,
)
# After these the estate is no longer what it was.
ENDS_THINGS = ("finish", "unload_model", "publish")
# The protocol's own: how the router answers what is no path or method at all.
NO_ROUTE = {404, 405}


@pytest.fixture(name="settings")
def gateway_settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.01)


class Played:
    """A gateway whose samples are answered, so that nobody waits for one."""

    def __init__(self, gateway: Harness) -> None:
        self.gateway = gateway
        # The harness is one worker: only one task may finish requests.
        self._lock = asyncio.Lock()

    async def play(self) -> None:
        while True:
            async with self._lock:
                for row in await self.gateway.store.requests.queued_samples(POOL, 100):
                    await self.gateway.finish(row.request_id, result_of("Hi"), content_type=PROTOBUF)
            await asyncio.sleep(0.01)

    async def new_estate(self) -> Estate:
        async with self._lock:
            return await new_estate(self.gateway)


@pytest.fixture
async def played(gateway: Harness) -> AsyncIterator[Played]:
    """The gateway with tokenizer and sampler."""
    serve_text(gateway)
    played = Played(gateway)
    player = asyncio.create_task(played.play())
    yield played
    assert not player.done()
    player.cancel()
    with suppress(asyncio.CancelledError):
        await player


def planted(value: object, known: dict[str, str]) -> object:
    """`value` with ids that are there wherever it has a field for one."""
    if isinstance(value, dict):
        return {
            name: known[name] if name in known and isinstance(one, str) else planted(one, known)
            for name, one in value.items()
        }
    return [planted(one, known) for one in value] if isinstance(value, list) else value


def known_of(estate: Estate) -> dict[str, str]:
    return {
        "session_id": estate.session_id,
        "model_id": estate.model_id,
        "sampling_session_id": estate.sampler_id,
        "request_id": estate.sample_id,
        "model_path": estate.path(),
        "source_path": estate.path(),
        "tinker_path": estate.path(),
        "path": estate.path(),
        "base_model": POOL,
        "model": POOL,
    }


def request_of(case: schemathesis.Case, known: dict[str, str] | None) -> dict[str, Any]:
    """What a generated case sends, as httpx has it."""
    if known is not None:
        case.path_parameters = planted(dict(case.path_parameters or {}), known)
    sent = case.as_transport_kwargs()
    request = {"method": sent["method"], "url": sent["url"], "params": sent.get("params")}
    headers = {"X-API-Key": KEY}
    if "json" in sent:
        body = sent["json"] if known is None else planted(sent["json"], known)
        request["content"] = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    elif "data" in sent:
        request["content"] = sent["data"] if isinstance(sent["data"], bytes) else str(sent["data"]).encode()
        headers["Content-Type"] = case.media_type or PROTOBUF
    return {**request, "headers": headers}


async def explore(played: Played, num_examples: int) -> list[str]:
    """Answers that the document does not have, of 1.5 * `num_examples` requests per operation."""
    loop = asyncio.get_running_loop()
    bad: list[str] = []
    estate = await played.new_estate()
    for result in schemathesis.openapi.from_dict(api_document()).get_all_operations():
        operation = result.ok()
        known = known_of(estate)
        statuses = api_document()["paths"][operation.path][operation.method.lower()]["responses"]

        def check(case: schemathesis.Case, is_planted: bool) -> None:
            request = request_of(case, known if is_planted else None)  # noqa: B023
            asked = asyncio.run_coroutine_threadsafe(answer_to(played.gateway, request), loop)
            answer = asked.result(timeout=30)
            if answer is None or str(answer.status_code) in statuses or answer.status_code in NO_ROUTE:  # noqa: B023
                return
            bad.append(f"{answer.status_code} {answer.text[:300]} to {str(request)[:600]}")

        # Data that fits the document gets further than data that does not.
        for mode, number in ((GenerationMode.POSITIVE, num_examples), (GenerationMode.NEGATIVE, num_examples // 2)):
            await asyncio.to_thread(drive, operation.as_strategy(generation_mode=mode), check, number)
        if operation.method == "DELETE" or operation.path.endswith(ENDS_THINGS):
            estate = await played.new_estate()
    return bad


def drive(
    cases: st.SearchStrategy[schemathesis.Case],
    check: Callable[[schemathesis.Case, bool], None],
    num_examples: int,
) -> None:
    """Check examples of `cases`, the same ones every time."""

    @settings(
        max_examples=num_examples,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases, st.booleans())
    def run(case: schemathesis.Case, is_planted: bool) -> None:
        check(case, is_planted)

    # Some operations read nothing that could be wrong.
    with suppress(Unsatisfiable):
        run()


async def answer_to(gateway: Harness, request: dict[str, Any]) -> httpx.Response | None:
    """The answer, None when it cannot even be sent."""
    try:
        return await gateway.client.request(**request)
    except (httpx.InvalidURL, UnicodeEncodeError):
        return None


async def test_no_request_is_answered_with_what_the_document_does_not_have(played: Played) -> None:
    assert await explore(played, 2) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_no_request_of_many_is(played: Played) -> None:
    assert await explore(played, 100) == []


def with_each_text_replaced(value: object, text: str) -> Iterator[object]:
    """`value` once per text in it, with that one replaced."""
    if isinstance(value, str):
        yield text
    elif isinstance(value, dict):
        for name, one in value.items():
            for changed in with_each_text_replaced(one, text):
                yield {**value, name: changed}
    elif isinstance(value, list):
        # The first of each list will do.
        for changed in with_each_text_replaced(value[0] if value else None, text):
            yield [changed, *value[1:]]


def hostile_calls(estate: Estate, text: str) -> Iterator[Call]:
    for calls in CALLS.values():
        for call in calls(estate, estate):
            for body in with_each_text_replaced(call.body, text):
                content = json.dumps(body).encode()
                yield replace(call, body=None, content=content, headers={"Content-Type": "application/json"})


def files_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:20])
async def test_hostile_texts_are_no_errors_of_the_server_and_no_paths(
    played: Played, tmp_path: Path, text: str
) -> None:
    estate = await played.new_estate()
    before = files_below(tmp_path)
    num_sent = 0
    for call in hostile_calls(estate, text):
        answer = await send(played.gateway, call, key=KEY)
        assert answer.status_code < 500, (call, answer.text)
        num_sent += 1
    assert num_sent > 100
    # Payloads are kept under names that the server makes.
    assert all(name.startswith(("blobs/payloads/", "treadle.db")) for name in files_below(tmp_path) - before)
