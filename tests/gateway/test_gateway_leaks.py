"""Credentials are in no log, no refusal and no database, wherever a client puts them.

Around a whole server, with its processes and files: tests/e2e/test_guards_live.py.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gateway_support import KEY, Harness, ok
from gateway_surface import CALLS, Call, Estate, new_estate, send, serve_text
from test_gateway_schemathesis import Played, played, with_each_text_replaced  # noqa: F401 (a fixture)

from treadle.domain.keys import key_digest, new_key
from treadle.telemetry.logs import configure_logging

# Nobody's, but they look like keys; the second one as ModelScope's tokens do.
STRAYS = (new_key(), "tml-ms-5f0c2d1e-1234-5678-9abc-def012345678", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhZGEifQ.c2lnbmVk")


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that is logged, from debug on."""
    stream = io.StringIO()
    root, ours = logging.getLogger(), logging.getLogger("treadle")
    before = (root.handlers[:], root.level, ours.level)
    configure_logging(level="debug", style="json", stream=stream)
    root.setLevel(logging.DEBUG)
    yield stream
    root.handlers[:], root.level, ours.level = before


def is_in(secret: str, text: str | bytes) -> bool:
    """Whether a credential is there, in one of the ways in which it may be written."""
    content = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    plain = secret.encode()
    forms = (
        plain,
        plain[8:],
        base64.b64encode(plain),
        plain.hex().encode(),
        urllib.parse.quote(secret, safe="").encode(),
    )
    return any(form in content for form in forms)


def misplaced(call: Call, secret: str) -> Iterator[Call]:
    """The call with a credential in each place where none belongs."""
    for body in with_each_text_replaced(call.body, secret):
        yield replace(call, body=body)
    if call.body is not None:
        yield replace(call, body=None, content=json.dumps(call.body).encode()[:-1] + secret.encode())
    for number, part in enumerate(call.path.split("/")):
        if part and number > 2:
            parts = call.path.split("/")
            parts[number] = secret
            yield replace(call, path="/".join(parts))
    mark = "&" if "?" in call.path else "?"
    yield replace(call, path=f"{call.path}{mark}api_key={secret}&limit={secret}&after={secret}")
    for name in ("Authorization", "Cookie", "Accept", "Content-Encoding", "X-Forwarded-For", "Twinkle-Authorization"):
        yield replace(call, headers={**call.headers, name: secret})


async def test_what_is_misplaced_comes_back_in_no_refusal_and_in_no_log(played: Played, log: io.StringIO) -> None:  # noqa: F811
    estate = await played.new_estate()
    told = []
    num_refused = 0
    for index, calls in enumerate(CALLS.values()):
        secret = STRAYS[index % len(STRAYS)]
        for call in misplaced(calls(estate, estate)[0], secret):
            answer = await send(played.gateway, call, key=KEY)
            assert answer.status_code < 500, (call, answer.text)
            if answer.status_code >= 400:
                num_refused += 1
                if is_in(secret, answer.text + str(answer.headers)):
                    told.append((call, answer.text[:300]))
            elif answer.headers.get("content-type") == "application/json" and "request_id" in answer.json():
                future = await played.gateway.future(answer.json()["request_id"])
                if future.status_code == 200 and "error" in future.json() and is_in(secret, future.text):
                    told.append((call, future.text[:300]))
        if call.method == "DELETE" or call.path.endswith(("finish", "unload_model")):
            estate = await played.new_estate()
    assert told == []
    assert num_refused > 500
    assert [secret for secret in STRAYS if is_in(secret, log.getvalue())] == []


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


async def test_what_callers_present_is_kept_nowhere(gateway: Harness, tmp_path: Path, log: io.StringIO) -> None:
    serve_text(gateway)
    key, admin = new_key(), new_key()
    await gateway.store.keys.add("ada", key_digest(key), False)
    await gateway.store.keys.add("root", key_digest(admin), True)
    estate = await new_estate(gateway, key=key)
    token = str(ok(await gateway.post("auth/token", key=key))["jwt"])
    wrong = new_key()
    for presented in (key, token, wrong, token[:-9] + "AAAAAAAAA", f"Bearer {wrong}", wrong + "%00", "tml-" + token):
        for headers in ({"X-API-Key": presented}, {"Authorization": f"Bearer {presented}"}):
            answer = await gateway.client.get(f"/api/v1/sessions/{estate.session_id}", headers=headers)
            assert answer.status_code in (200, 401)
            assert not any(is_in(one, answer.text) for one in (key, token, wrong))
    for path in ("keys", "tenants", "audit", "usage", "queue", "runs", "quotas"):
        assert not is_in(admin, (await gateway.client.get(f"/admin/v1/{path}", headers={"X-API-Key": admin})).text)
    made = (await gateway.client.post("/admin/v1/keys", headers={"X-API-Key": admin}, json={"user": "bob"})).json()
    assert ok(await gateway.get("sessions", key=made["key"])) is not None
    listed = (await gateway.client.get("/admin/v1/keys", headers={"X-API-Key": admin})).text
    assert str(made["key_id"]) in listed
    assert not is_in(made["key"], listed)

    kept = files_in(tmp_path)
    assert any(name.endswith("-wal") for name in kept)
    kept["log"] = log.getvalue().encode()
    kept["metrics"] = gateway.metrics.render()
    secrets = {"key": key, "admin's key": admin, "token": token, "wrong key": wrong, "made key": made["key"]}
    assert [(name, where) for name, secret in secrets.items() for where in kept if is_in(secret, kept[where])] == []


async def test_an_error_of_the_servers_says_nothing_and_is_logged_without_the_key(
    gateway: Harness, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even one whose text has everything that the request had."""

    async def broken(*_: object) -> None:
        raise RuntimeError(f"cannot read {STRAYS[0]} of /var/lib/treadle at SELECT 1")

    estate: Estate = await new_estate(gateway)
    monkeypatch.setattr(type(gateway.store.sessions), "find", broken, raising=False)
    monkeypatch.setattr(type(gateway.store.sessions), "get", broken, raising=False)
    answer = await gateway.get(f"sessions/{estate.session_id}")
    assert answer.status_code == 500
    body = answer.json()
    assert body.keys() == {"detail", "category", "error_id"}
    assert body["detail"] == "internal error"
    (event,) = [json.loads(line) for line in log.getvalue().splitlines() if body["error_id"] in line]
    assert "cannot read tml-***" in event["traceback"]
    assert re.search(r"/var/lib", event["traceback"])
