"""Whose is it: every endpoint, asked about what another tenant has, answers as if there were nothing."""

from __future__ import annotations

import re
import sqlite3
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from gateway_support import KEY, OTHER_KEY, Harness, ok, open_tenant
from gateway_surface import CALLS, Call, Estate, new_estate, send, serve_text

from treadle.domain.ids import SessionId
from treadle.gateway.app import ENDPOINTS

# Routes that answer 200 with nothing in it: listings and filters, and what a client says about its own results.
EMPTY_ANSWERS = {
    "POST /api/v1/retrieve_futures",
    "POST /api/v1/sessions/search",
    "GET /api/v1/training_runs",
    "GET /api/v1/billing/usage/checkpoints/current",
}
# What everybody may do with a published checkpoint.
OPEN_TO_ALL = {
    "POST /api/v1/weights_info",
    "POST /api/v1/load_weights",
    "POST /api/v1/create_sampling_session",
    "POST /api/v1/copy_weights",
    "GET /api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}/archive",
    "GET /api/v1/training_runs/{model_id}/checkpoints/{kind}/{name}/external_weights_urls",
    *(f"POST {prefix}/{path}" for prefix in ("/oai/api/v1", "/v1") for path in ("chat/completions", "completions")),
    *(f"POST {prefix}/messages{path}" for prefix in ("/anthropic/api/v1", "/v1") for path in ("", "/count_tokens")),
    *(f"GET {prefix}/models/{{model:path}}" for prefix in ("/oai/api/v1", "/v1")),
}

# What is refused whatever it is asked about: see the tests of operators' routes below.
OPERATORS = {route for route in CALLS if " /admin/" in route}
USERS = CALLS.keys() - OPERATORS


def test_every_endpoint_is_called() -> None:
    assert {f"{endpoint.method} {endpoint.path}" for endpoint in ENDPOINTS} == CALLS.keys()


def everything_of_others(tmp_path: Path, tenant: str) -> list[tuple[object, ...]]:
    """Every row of the database but a tenant's own."""
    rows: list[tuple[object, ...]] = []
    with sqlite3.connect(tmp_path / "treadle.db") as database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            found = database.execute(f"SELECT * FROM {table}").fetchall()
            rows += [(table, *row) for row in found if tenant not in row]
    database.close()
    return sorted(rows, key=repr)


async def answer_of(
    gateway: Harness, call: Call, mine: Estate, theirs: Estate, *, key: str = OTHER_KEY
) -> tuple[int, str]:
    """Status and text, with the text that a future brings; without the ids."""
    answer = await send(gateway, call, key=key)
    status, text = answer.status_code, answer.text
    if status == 200 and "request_id" in answer.json():
        future = await gateway.future(answer.json()["request_id"], key=key)
        assert future.json().get("category") == "user", (call, future.text)
        status, text = 404, future.text
    text = text.replace(mine.session_id, "MINE").replace(theirs.session_id, "THEIRS")
    return status, re.sub(r"(THEIRS|MINE)(:\w+:|-)\d+(:\d+)*|seq_id=\d+", r"\1\2", text)


def unknown(estate: Estate) -> tuple[Estate, ...]:
    """What is not there: of a session that is not there either, and of one that is."""
    return replace(estate, session_id=SessionId(uuid.uuid4().hex)), replace(estate, number=77)


async def probe(gateway: Harness, mine: Estate, theirs: Estate, routes: Iterable[str]) -> list[object]:
    """Calls whose answer depends on whether what they are about is there; `theirs` is."""
    breaches: list[object] = []
    for route in routes:
        for index, call in enumerate(CALLS[route](mine, theirs)):
            mine = replace(mine, seq_id=mine.seq_id + 6)
            answers = await answers_about(gateway, mine, theirs, route, index)
            if answers and not is_refused(route, answers):
                breaches.append((call, answers))
    return breaches


async def answers_about(
    gateway: Harness, mine: Estate, theirs: Estate, route: str, index: int, *, key: str = OTHER_KEY
) -> list[tuple[int, str]]:
    """The answers to a call about what is there, and to the same call about what is not; none when it names nothing."""
    answers = []
    call = CALLS[route](mine, theirs)[index]
    for number, estate in enumerate((theirs, *unknown(theirs))):
        # A place of its own for each, so that none is answered as the replay of another.
        mine = replace(mine, seq_id=mine.seq_id + 2)
        asked = CALLS[route](mine, estate)[index]
        # A session that is there, named without anything that it made, is no unknown id.
        if asked.names(theirs if number == 0 else estate) and (number == 0 or asked != call):
            answers.append(await answer_of(gateway, asked, mine, estate, key=key))
    return answers


def is_refused(route: str, answers: list[tuple[int, str]]) -> bool:
    """Whether all answers are one, and it is a refusal or an answer with nothing in it."""
    status, text = answers[0]
    is_empty = route in EMPTY_ANSWERS and status == 200 and "THEIRS" not in text
    return len(answers) > 1 and len(set(answers)) == 1 and (status in (400, 403, 404) or is_empty)


async def test_foreign_ids_look_unknown_and_nothing_changes(gateway: Harness, tmp_path: Path) -> None:
    serve_text(gateway)
    theirs, mine = await new_estate(gateway), await new_estate(gateway, key=OTHER_KEY)
    before = everything_of_others(tmp_path, open_tenant(OTHER_KEY))
    assert await probe(gateway, mine, theirs, sorted(USERS)) == []
    assert everything_of_others(tmp_path, open_tenant(OTHER_KEY)) == before


async def test_what_is_published_is_read_and_no_more(gateway: Harness, tmp_path: Path) -> None:
    serve_text(gateway)
    theirs, mine = await new_estate(gateway, public=True), await new_estate(gateway, key=OTHER_KEY)
    before = everything_of_others(tmp_path, open_tenant(OTHER_KEY))
    assert await probe(gateway, mine, theirs, sorted(USERS - OPEN_TO_ALL)) == []
    assert everything_of_others(tmp_path, open_tenant(OTHER_KEY)) == before


def test_every_path_with_an_id_is_asked_for_somebody_elses() -> None:
    theirs = Estate(SessionId(uuid.uuid4().hex))
    for route in USERS:
        if "_id}" in route:
            asked = CALLS[route](Estate(SessionId("mine")), theirs)
            assert asked, route
            assert all(call.names(theirs) for call in asked), route
            assert any(theirs.session_id in call.path for call in asked), route


async def test_an_owner_is_answered_where_others_are_not(gateway: Harness) -> None:
    """So that the tests above do not pass because a call is wrong."""
    serve_text(gateway)
    refused = []
    mine = await new_estate(gateway)
    for route in CALLS:
        if route in OPERATORS:
            continue
        for index in range(len(CALLS[route](mine, mine))):
            mine = replace(mine, seq_id=mine.seq_id + 2)
            call = CALLS[route](mine, mine)[index]
            # No tokenizer is anybody's.
            if call.is_sampled or not call.names(mine) or "/tokenizers/" in route:
                continue
            answer = await send(gateway, call, key=KEY)
            # It was found, and read.
            has_no_adapter = "holds no adapter" in answer.text
            if answer.status_code not in (200, 302) and not has_no_adapter:
                refused.append((route, call, answer.status_code, answer.text))
        if route.startswith("DELETE") or route.endswith(("finish", "unload_model")):
            mine = await new_estate(gateway)
    assert refused == []


async def test_operators_routes_refuse_users_whatever_they_name(gateway: Harness) -> None:
    """A user's key is told so before anything is looked up or read, and no key is asked for one."""
    theirs = await new_estate(gateway)
    for endpoint in ENDPOINTS:
        if not endpoint.path.startswith("/admin/"):
            continue
        answers = set()
        for name in (theirs.session_id, theirs.model_id, "user:ada", "1", "nothing"):
            url = re.sub(r"{[^}]*}", name, endpoint.path)
            for body in (b"", b"{", b'{"user": "ada"}'):
                answer = await gateway.client.request(
                    endpoint.method, url, content=body, headers={"X-API-Key": OTHER_KEY}
                )
                answers.add((answer.status_code, answer.text))
        # Requests without a key are counted, and too many of them are refused for that.
        gateway.clock.advance(60)
        nobody = await gateway.client.request(endpoint.method, url)
        assert nobody.status_code == 401, (endpoint.method, url, nobody.text)
        assert {status for status, _ in answers} == {403}, (endpoint.method, endpoint.path, answers)
        assert len(answers) == 1, (endpoint.method, endpoint.path, answers)


async def test_the_error_of_a_refused_op_is_its_callers(gateway: Harness) -> None:
    theirs, mine = await new_estate(gateway), await new_estate(gateway, key=OTHER_KEY)
    load = {"model_id": mine.model_id, "seq_id": 5, "path": theirs.path(), "optimizer": True}
    request_id = ok(await gateway.post("load_weights", load, key=OTHER_KEY))["request_id"]
    assert "does not exist" in (await gateway.future(request_id, key=OTHER_KEY)).json()["error"]
    assert (await gateway.future(request_id, key=KEY)).status_code == 404
