"""Random bad requests to every route, as a user and as an operator: no error of the server's, no leak, and what is
refused changes nothing.

Requests are drawn from a seed per route, so a failure names what repeats it. The slow test sends a thousand to each.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import random
import re
import sqlite3
import string
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gateway_support
import httpx
import pytest
import zstandard
from gateway_support import POOL, Harness
from gateway_surface import CALLS, Call, Estate, new_estate, serve_text
from test_gateway_schemathesis import Played

from treadle.domain.ids import SessionId
from treadle.domain.keys import key_digest, new_key
from treadle.gateway import GatewaySettings
from treadle.telemetry.logs import configure_logging
from treadle.wire.results import PROTOBUF

NUM_REQUESTS = 15
NUM_SLOW = 1_000
# Sent by nobody who has a right to anything; and where no key belongs.
STRAY_KEY = new_key()
# Nothing of these is for clients.
INTERNALS = ("Traceback", "sqlite", "sqlalchemy", "psycopg", "site-packages", ".py", "SELECT ", "INSERT ", "0x7f")
TEXTS = (
    "",
    " ",
    "\0",
    "a\0b",
    "\ud800",
    "\u202e",
    "💥" * 50,
    "../../../etc/passwd",
    "..",
    "/",
    "a/b/c",
    "%00",
    "%2e%2e%2f",
    "' OR 1=1; DROP TABLE keys; --",
    "{{7*7}}",
    "${jndi:ldap://x}",
    "<script>",
    "x" * 513,
    "x" * 10_000,
    "tinker://",
    "tinker://a/weights/b",
    "ms://a/b/c",
    "hf://../../x",
    "tenant:user:ada",
    "tenant:",
    "organization:",
    "organization:nobody",
    "default",
    "user:ada",
    "custom",
    "cross_entropy",
    "1e999",
    "NaN",
    "2020-13-45T99:99:99Z",
    "9999-12-31T23:59:59Z",
    "0000-00-00T00:00:00Z",
    "true",
    STRAY_KEY,
    POOL,
)
NUMBERS = (0, -1, 1, 2, 1.5, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**400, 1e308, 5e-324)
RAW = (
    b"",
    b"{",
    b"}",
    b"null",
    b"[]",
    b"0",
    b'""',
    b"NaN",
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"\xff\xfe{\x00}",
    b"\xef\xbb\xbf{}",
    b'{"a": "\xed\xa0\x80"}',
    b'{"session_id": "\\u0000"}',
    b'{"a": 1, "a": 2}',
    b'{"a": Infinity}',
    b"1" * 5_000,
    b'{"model_id": ' + b"9" * 5_000 + b"}",
    b"\x28\xb5\x2f\xfd\x04\x00",
    b"\x0a\xff\xff\xff\xff\x0f",
    b"\x08" * 500,
    b"a=b&c=d",
)
TYPES = (PROTOBUF, "application/json", "application/json; charset=utf-16", "text/plain", "multipart/form-data; x=y", "")
ENCODINGS = ("zstd", "gzip", "br", "identity", "zstd, zstd", "nothing", "")
QUERY = (
    *("limit", "after", "before", "since", "offset", "tenant", "tenant_id", "user", "q", "organization", "group_by"),
    *("pool", "state", "status", "event", "actor", "subject", "project_id", "access_scope", "starting_on"),
    *("ending_before", "cursor", "form", "is_public", "page", "model"),
)
HEADERS = (
    *("accept", "accept-encoding", "authorization", "content-encoding", "content-type", "cookie", "host", "if-match"),
    *("range", "x-api-key", "x-forwarded-for", "x-forwarded-prefix", "x-http-method-override", "twinkle-authorization"),
    *("x-stainless-retry-count", "x-tinker-idempotency-key", "connection", "content-length", "traceparent", "origin"),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY", "get")


@pytest.fixture(name="settings")
def gateway_settings() -> GatewaySettings:
    return GatewaySettings(is_loopback=True, hold_s=0.01, max_failed_logins_per_minute=10**9)


@dataclass
class Sent:
    """A request as it is sent."""

    method: str
    url: str
    headers: list[tuple[bytes, bytes]]
    content: bytes


@dataclass
class Actors:
    """A gateway with two users and an operator, whose keys tests may end."""

    played: Played
    directory: Path
    log: io.StringIO
    keys: dict[str, str] = field(default_factory=dict)
    # Every key that was ever there.
    secrets: list[str] = field(default_factory=lambda: [STRAY_KEY])
    estates: dict[str, Estate] = field(default_factory=dict)
    num_sent: int = 0
    wrong: list[str] = field(default_factory=list)
    watching: sqlite3.Connection | None = None

    @property
    def gateway(self) -> Harness:
        return self.played.gateway

    async def settle(self) -> None:
        """Everybody has a key that works and things of their own, and operators' decisions are forgotten."""
        with sqlite3.connect(self.directory / "treadle.db", timeout=20) as database:
            for table in ("quotas", "loss_rules", "control", "pool_settings", "project_members", "projects"):
                database.execute(f"DELETE FROM {table}")
            database.execute("UPDATE tenants SET is_suspended = 0, organization = NULL")
        database.close()
        await self.gateway.app.state.gateway.policies.refresh()
        for name in ("ada", "bob", "root"):
            if name not in self.keys or (await self.ask(name, "/api/v1/sessions")).status_code != 200:
                self.keys[name] = new_key()
                self.secrets.append(self.keys[name])
                await self.gateway.store.keys.add(name, key_digest(self.keys[name]), is_admin=name == "root")
        for name in ("ada", "bob"):
            async with self.played._lock:
                self.estates[name] = await new_estate(self.gateway, key=self.keys[name])

    async def ask(self, name: str, path: str) -> httpx.Response:
        return await self.gateway.client.get(path, headers={"X-API-Key": self.keys[name]})


@pytest.fixture
async def actors(gateway: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Actors]:
    serve_text(gateway)
    log = io.StringIO()
    root, ours = logging.getLogger(), logging.getLogger("treadle")
    before = (root.handlers[:], root.level, ours.level)
    configure_logging(level="debug", style="json", stream=log)
    actors = Actors(Played(gateway), tmp_path, log)
    # Checkpoints of estates are their users'.
    tenants = {"ada": "user:ada", "bob": "user:bob"}
    monkeypatch.setattr(
        gateway_support,
        "open_tenant",
        lambda key: next((tenants[name] for name in tenants if actors.keys.get(name) == key), "user:nobody"),
    )
    player = asyncio.create_task(actors.played.play())
    await actors.settle()
    yield actors
    if actors.watching is not None:
        actors.watching.close()
    assert not player.done()
    player.cancel()
    await asyncio.gather(player, return_exceptions=True)
    root.handlers[:], root.level, ours.level = before


class Fuzzer:
    """Bad requests to one route, from one seed."""

    def __init__(self, seed: str, ada: Estate, bob: Estate, key: str) -> None:
        self._random = random.Random(seed)
        self._estates = (ada, bob, Estate(SessionId("0" * 32)))
        self._key = key

    def request(self, route: str) -> Sent:
        mine = self._estates[0]
        call: Call = self._random.choice(CALLS[route](mine, self._random.choice(self._estates)))
        content = call.content
        if content is None:
            content = b"" if call.body is None else json.dumps(call.body).encode()
        headers = {"x-api-key": self._key, "content-type": "application/json", **call.headers}
        sent = Sent(call.method, call.path, [(k.lower().encode(), v.encode()) for k, v in headers.items()], content)
        for _ in range(self._random.choice((1, 1, 1, 2, 3))):
            self._spoil(sent, call)
        return sent

    def _spoil(self, sent: Sent, call: Call) -> None:
        ways = [self._path, self._query, self._header, self._method]
        if sent.content:
            ways += [self._bytes, self._encoding, self._raw] + [self._json] * 8 * (call.body is not None)
        elif call.method in ("POST", "PUT"):
            ways += [self._raw, self._json]
        self._random.choice(ways)(sent)

    def _json(self, sent: Sent) -> None:
        try:
            body = json.loads(sent.content or b"{}")
        except (ValueError, RecursionError):
            return
        spoiled = self._spoiled(body)
        try:
            sent.content = json.dumps(spoiled).encode()
        except (ValueError, RecursionError):
            sent.content = b"{}"

    def _spoiled(self, value: Any) -> Any:
        chance = self._random.random()
        if isinstance(value, dict) and value and chance < 0.85:
            changed = dict(value)
            name = self._random.choice(list(changed))
            if chance < 0.1:
                del changed[name]
            elif chance < 0.2:
                changed[self._random.choice((self._text(), "limit", "reason", "tenants", "expires_at", "seed"))] = (
                    self._value()
                )
            else:
                changed[name] = self._spoiled(changed[name])
            return changed
        if isinstance(value, list) and value and chance < 0.7:
            changed_list = list(value)
            place = self._random.randrange(len(changed_list))
            changed_list[place] = self._spoiled(changed_list[place])
            return changed_list * self._random.choice((1, 1, 1, 300))
        return self._value()

    def _value(self, depth: int = 0) -> Any:
        kinds = [self._text, lambda: self._random.choice(NUMBERS), lambda: self._random.choice((None, True, False))]
        if depth < 3:
            kinds += [
                lambda: [self._value(depth + 1) for _ in range(self._random.randrange(4))],
                lambda: {self._text()[:600]: self._value(depth + 1) for _ in range(self._random.randrange(4))},
            ]
        kinds.append(lambda: self._random.choice((float("nan"), float("inf"), -float("inf"))))
        return self._random.choice(kinds)()

    def _text(self) -> str:
        if self._random.random() < 0.2:
            return "".join(self._random.choices(string.printable, k=self._random.randrange(40)))
        estate = self._random.choice(self._estates)
        ids = (estate.session_id, estate.model_id, estate.sampler_id, estate.loss_id, estate.sample_id, estate.path())
        return self._random.choice((*TEXTS, *ids))

    def _raw(self, sent: Sent) -> None:
        sent.content = self._random.choice((*RAW, self._random.randbytes(self._random.randrange(300))))

    def _bytes(self, sent: Sent) -> None:
        content = bytearray(sent.content)
        if self._random.random() < 0.4:
            del content[self._random.randrange(len(content) + 1) :]
        for _ in range(self._random.randrange(4)):
            if content:
                content[self._random.randrange(len(content))] = self._random.randrange(256)
        sent.content = bytes(content)

    def _encoding(self, sent: Sent) -> None:
        if self._random.random() < 0.6:
            packed = zstandard.compress(sent.content * self._random.choice((1, 1, 50_000 // (1 + len(sent.content)))))
            sent.content = packed[: self._random.randrange(len(packed) + 1)] if self._random.random() < 0.6 else packed
            self._set(sent, "content-encoding", "zstd")
        else:
            self._set(sent, "content-encoding", self._random.choice(ENCODINGS))

    def _header(self, sent: Sent) -> None:
        if self._random.random() < 0.3:
            self._set(sent, "content-type", self._random.choice(TYPES))
            return
        name = self._random.choice(HEADERS)
        values = (self._text(), f"Bearer {self._text()}", "Bearer eyJhbGciOiJub25lIn0.e30.", "1, 2", "é" * 9)
        value = self._random.choice(values)
        self._set(sent, name, value)

    def _set(self, sent: Sent, name: str, value: str) -> None:
        raw = value.encode("latin-1", "replace")
        if self._random.random() < 0.8:
            sent.headers = [pair for pair in sent.headers if pair[0] != name.encode()]
        sent.headers.append((name.encode(), re.sub(rb"[\0\r\n]", b"", raw)))

    def _method(self, sent: Sent) -> None:
        if self._random.random() < 0.3:
            sent.method = self._random.choice(METHODS)

    def _path(self, sent: Sent) -> None:
        if self._random.random() < 0.4:
            return
        path, mark, query = sent.url.partition("?")
        parts = path.split("/")
        place = self._random.randrange(1, len(parts)) if len(parts) > 1 else 0
        number = str(self._random.choice(NUMBERS))
        spoiled = self._random.choice((self._text(), "..", ".", "", number, parts[place] + "/"))
        keeps = "" if self._random.random() < 0.5 else "/:%"
        parts[place] = urllib.parse.quote(spoiled.encode("utf-8", "surrogatepass"), safe=keeps)[:3_000]
        sent.url = "/".join(parts) + mark + query

    def _query(self, sent: Sent) -> None:
        pairs = []
        for _ in range(self._random.randrange(1, 4)):
            name, value = self._random.choice((*QUERY, self._text()[:50])), str(self._value(3))
            pairs.append("=".join(urllib.parse.quote(one.encode("utf-8", "surrogatepass")) for one in (name, value)))
        text = "&".join(pairs)
        sent.url += ("&" if "?" in sent.url else "?") + text[:5_000]


async def send(actors: Actors, sent: Sent) -> httpx.Response | None:
    """The answer, None when it cannot even be sent."""
    try:
        request = httpx.Request(sent.method, f"http://gateway{sent.url}", headers=sent.headers, content=sent.content)
    except (httpx.InvalidURL, ValueError):
        return None
    return await asyncio.wait_for(actors.gateway.client.send(request), timeout=30)


def complaints(actors: Actors, sent: Sent, answer: httpx.Response) -> Iterator[str]:
    """What is wrong with an answer."""
    if answer.status_code >= 500:
        yield f"is answered {answer.status_code}"
    text = answer.text + str(answer.headers)
    if answer.status_code >= 400:
        if sent.method not in ("HEAD",) and not ({"detail", "error"} & answer.json().keys()):
            yield "is refused without a word"
        yield from (f"shows {word!r}" for word in INTERNALS if word in text)
        yield from ("shows a key" for secret in actors.secrets if secret in text)
    elif sent.method != "HEAD":
        yield from ("shows a key" for secret in actors.secrets[1:] if secret in text)
    if str(actors.directory) in text:
        yield "shows a path"


async def fuzz(actors: Actors, route: str, count: int) -> None:
    is_sampled = any(call.is_sampled for call in CALLS[route](actors.estates["ada"], actors.estates["bob"]))
    for number in range(count):
        # Half of them as an operator, who gets further on the routes of operators and, elsewhere, has nothing.
        name = "root" if ("/admin/" in route or number % 3 == 0) and number % 5 else "ada"
        fuzzer = Fuzzer(f"{route} {number}", actors.estates["ada"], actors.estates["bob"], actors.keys[name])
        sent = fuzzer.request(route)
        if is_sampled:
            answer = await send(actors, sent)
        else:
            # Nobody else writes meanwhile, so that what has changed was changed by this.
            async with actors.played._lock:
                is_same, answer = await watched(actors, sent)
                # Once more, since the gateway may still have written for the one before.
                if not is_same and not (await watched(actors, sent))[0]:
                    actors.wrong.append(f"{route} {number}: {answer} changed the database; {sent}"[:2_000])
        if answer is None:
            continue
        actors.num_sent += 1
        actors.wrong += [
            f"{route} {number}: {what}: {answer.status_code} {answer.text[:300]!r} to {sent}"[:2_000]
            for what in complaints(actors, sent, answer)
        ]
        if number % 50 == 49 or ends_things(route, answer):
            await actors.settle()
    logged = actors.log.getvalue()
    actors.wrong += [f"{route}: a key is logged" for secret in actors.secrets if secret in logged]
    actors.log.seek(0)
    actors.log.truncate()


async def watched(actors: Actors, sent: Sent) -> tuple[bool, httpx.Response | None]:
    """Whether nothing changed, as it must not when the request is refused; and the answer."""
    before = version_of(actors)
    answer = await send(actors, sent)
    is_refused = answer is not None and 400 <= answer.status_code < 500
    return not is_refused or version_of(actors) == before, answer


def ends_things(route: str, answer: httpx.Response) -> bool:
    """Whether somebody's key, session or quota may be gone."""
    is_change = not route.startswith("GET ") and answer.status_code < 400
    return is_change and ("/admin/" in route or "DELETE " in route or route.endswith(("finish", "unload_model")))


def version_of(actors: Actors) -> int:
    """A number that changes with every commit of anybody else."""
    if actors.watching is None:
        actors.watching = sqlite3.connect(actors.directory / "treadle.db", timeout=20)
    return int(actors.watching.execute("PRAGMA data_version").fetchone()[0])


async def fuzz_everything(actors: Actors, count: int) -> None:
    for route in CALLS:
        await fuzz(actors, route, count)
        if ends_things(route, httpx.Response(200)):
            await actors.settle()
    assert actors.wrong[:20] == [], f"{len(actors.wrong)} of {actors.num_sent}"
    assert actors.num_sent > 0.7 * count * len(CALLS)
    for name in ("ada", "root"):
        assert (await actors.ask(name, "/api/v1/sessions")).status_code == 200


@pytest.mark.timeout(400)
async def test_random_bad_requests(actors: Actors) -> None:
    await fuzz_everything(actors, NUM_REQUESTS)


@pytest.mark.slow
@pytest.mark.timeout(7_200)
async def test_a_thousand_random_bad_requests_to_each_route(actors: Actors) -> None:
    await fuzz_everything(actors, NUM_SLOW)
