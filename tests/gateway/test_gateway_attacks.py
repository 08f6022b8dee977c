"""What an attacker sends to the endpoints around accounts, sessions and text: refused, and never an internal error."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from gateway_support import Harness, ok, refused

# Of a JSON parser in Python; a token may have some 1,500 bytes in each of its parts.
TOO_DEEP = 1_300


def unsigned(header: bytes, claims: bytes = b"{}") -> str:
    """A token with a signature of nobody's."""
    parts = (header, claims, b"x" * 32)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + b"[" * TOO_DEEP,
        b'{"a":' + b"[" * TOO_DEEP + b"]" * 100,
        b'{"a":' + b"1" * 1_400 + b"}",
        b'{"alg":"none"}',
        b'{"alg":[]}',
        b'{"alg":{}}',
        b'{"alg":null,"typ":1}',
        b'{"alg":"HS256","b64":false}',
        b'{"alg":"HS256","crit":["x"]}',
        b'{"alg":"HS256","crit":5}',
        b'{"alg":"HS256","kid":5}',
        b'{"\x7f\xff"}',
        b'{"a":1,"a":2',
    ],
)
async def test_tokens_of_nobody(gateway: Harness, header: bytes) -> None:
    token = unsigned(header)
    assert token.startswith("eyJ") or b"\x7f" in header
    refused(await gateway.get("sessions", key=token), 401)
    for path in (f"/external/{token}/checkpoint.tar.gz", f"/external/{token}/x", f"/api/v1/traces/{token}"):
        refused(await gateway.client.get(path), 403)


@pytest.mark.parametrize(
    "window",
    [
        ("0001-01-01T00:30:00+14:00", "0001-01-02T00:00:00Z"),
        ("0001-01-01T00:00:00+14:00", "0001-01-02T00:00:00Z"),
        ("2024-01-01T00:00:00Z", "9999-12-31T23:30:00-14:00"),
        ("2024-01-01T00:00:00Z", "9999-12-31T23:00:00-14:00"),
        ("1e300", "nan"),
        ("-1e12", "1e12"),
        ("-99999999999999999999", "1"),
    ],
)
async def test_windows_beyond_the_calendar(gateway: Harness, window: tuple[str, str]) -> None:
    params = {"starting_on": window[0], "ending_before": window[1]}
    answer = await gateway.get("billing/usage/events", params=params)
    assert answer.status_code == 400 or answer.json()["data"] == [], answer.text


@pytest.mark.parametrize("day", ["0001-01-01", "9999-12-31"])
async def test_days_at_the_ends_of_the_calendar(gateway: Harness, day: str) -> None:
    assert ok(await gateway.get("audit", params={"day": day})) == {"entries": []}


@pytest.mark.parametrize("day", ["1e300", "-1", "99999999999999999999999", "10000-01-01", "nan"])
async def test_days_that_are_none(gateway: Harness, day: str) -> None:
    answer = await gateway.get("audit", params={"day": day})
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize(
    "body",
    [
        {"statuses": [{"type": "active"}] * 5_000},
        {"statuses": [{"type": "client_finished", "reasons": ["success"] * 5_000}]},
        {"display_name": "a " * 2_000},
        {"user_metadata": {str(number): "x" for number in range(1_100)}},
        {"display_name": "%_\\'\""},
        {"cursor": {"last_created_at": "0001-01-01T00:00:00+14:00", "last_session_id": "x"}},
        {"cursor": {"last_created_at": "9999-12-31T23:59:59-14:00", "last_session_id": "x"}},
        {"cursor": {"last_created_at": 1e300, "last_session_id": "x"}},
        {"cursor": {"last_created_at": -1, "last_session_id": "%"}},
    ],
)
async def test_searches_without_end(gateway: Harness, body: dict[str, Any]) -> None:
    await gateway.new_session()
    answer = await gateway.post("sessions/search", body)
    assert answer.status_code in (200, 400), answer.text
