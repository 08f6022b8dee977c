"""The guards in front of the app, over real sockets: what they end, and that neighbours go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from gateway_support import Harness
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treadle import http_server
from treadle.config.tree import ServerSettings
from treadle.domain.addresses import network_of
from treadle.domain.keys import key_digest
from treadle.domain.limits import LINGER_BYTES, MAX_HEADERS, MAX_PIPELINED
from treadle.http_server import Connections, http_config
from treadle.telemetry.metrics import Metrics

# Ticks and windows of these tests, in seconds: bounds are reached at once, and nothing depends on how soon.
TICK_S = 0.02
WINDOW_S = 0.3
SHORT = {"header_timeout_s": WINDOW_S, "min_body_bytes_per_s": 100_000.0}
# A test that hangs fails here rather than at its own end.
PATIENCE_S = 20.0


@dataclass
class App:
    """Does what its path says, and remembers the last scopes."""

    scopes: list[Scope] = field(default_factory=list)
    num_bodies: int = 0
    num_gone: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["path"] == "/hold":
            await asyncio.sleep(PATIENCE_S)
        body = b""
        if scope["path"] != "/early":
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.num_gone += 1
                    return
                body += message["body"]
                more = message["more_body"]
            self.num_bodies += 1
        answer = b"x" * 50_000_000 if scope["path"] == "/large" else b"%d" % len(body)
        start: Message = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": [(b"content-length", b"%d" % len(answer))]})
        await send({"type": "http.response.body", "body": answer})


@dataclass
class Served:
    """A server on a port of its own."""

    port: int
    app: App
    connections: Connections
    metrics: Metrics
    clients: list[Client] = field(default_factory=list)

    async def open(self, data: bytes = b"", *, source: str | None = None) -> Client:
        local = None if source is None else (source, 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=local)
        client = Client(reader, writer)
        self.clients.append(client)
        client.send(data)
        return client

    async def is_well(self) -> bool:
        """A neighbour's ordinary request."""
        client = await self.open(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nok", source="127.0.0.9")
        status, body = await client.answer()
        client.writer.close()
        return (status, body) == (200, b"2")

    def refused(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("treadle_refused_connections_total", {"reason": reason}) or 0


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        if not self.writer.is_closing():
            self.writer.write(data)

    async def answer(self) -> tuple[int, bytes]:
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            size = int(head.partition("content-length:")[2].partition("\r\n")[0])
            return int(head.split()[1]), await self.reader.readexactly(size)

    async def is_closed(self) -> bool:
        """Whether nothing more comes; waits for the end."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True

    async def trickle(self, piece: bytes, *, pause_s: float = TICK_S) -> None:
        """Send a piece again and again until the connection ends."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE_S):
                while not self.reader.at_eof() and not self.writer.is_closing():
                    self.send(piece)
                    await self.writer.drain()
                    await asyncio.sleep(pause_s)


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, **settings: Any) -> AsyncIterator[tuple[int, Connections, Metrics]]:
    """`app` behind the guards, on a free port of this event loop."""
    metrics = Metrics(CollectorRegistry())
    connections = Connections(ServerSettings(**settings), metrics, tick_s=TICK_S)
    server = uvicorn.Server(http_config(app, connections, port=0, lifespan="off", timeout_graceful_shutdown=1))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    await server.startup()
    try:
        yield server.servers[0].sockets[0].getsockname()[1], connections, metrics
    finally:
        server.should_exit = True
        for task in server.server_state.tasks:
            task.cancel()
        await server.shutdown()


async def until(is_so: Callable[[], bool]) -> None:
    """Return when it is."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(TICK_S)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., contextlib.AbstractAsyncContextManager[Served]]:
    for name in ("BODY_WINDOW_S", "LINGER_S", "UNREAD_ANSWER_S"):
        monkeypatch.setattr(http_server, name, WINDOW_S)

    @contextlib.asynccontextmanager
    async def made(**settings: Any) -> AsyncIterator[Served]:
        app = App()
        async with serving(app, **settings) as (port, connections, metrics):
            served = Served(port, app, connections, metrics)
            yield served
            for client in served.clients:
                client.writer.transport.abort()
                with contextlib.suppress(ConnectionError):
                    await client.writer.wait_closed()

    return made


Make = Callable[..., contextlib.AbstractAsyncContextManager[Served]]
POST = b"POST /echo HTTP/1.1\r\nhost: x\r\n"


async def test_a_head_that_does_not_end_is_given_up(make: Make) -> None:
    async with make(**SHORT) as server:
        client = await server.open(b"GET /echo HTTP/1.1\r\nhost: x\r\n")
        trickling = asyncio.create_task(client.trickle(b"a: b\r\n"))
        status, body = await client.answer()
        assert status == 408
        assert "head" in json.loads(body)["detail"]
        assert await client.is_closed()
        await trickling
        assert server.refused("slow_head") == 1
        assert await server.is_well()
        assert len(server.app.scopes) == 1


async def test_empty_lines_between_requests_hold_no_connection(make: Make) -> None:
    async with make(**SHORT) as server:
        client = await server.open(b"GET /echo HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer())[0] == 200
        await client.trickle(b"\r\n")
        assert server.refused("slow_head") == 1


async def test_who_says_nothing_may_stay_as_long_as_who_said_something(make: Make) -> None:
    async with make(keep_alive_s=1) as server:
        client = await server.open()
        assert await client.is_closed()
        assert server.refused("silent") == 1


@pytest.mark.parametrize("head", [b"content-length: 100000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"])
async def test_a_slow_body_is_given_up(make: Make, head: bytes) -> None:
    async with make(**SHORT) as server:
        client = await server.open(POST + head)
        piece = b"x" if b"length" in head else b"1\r\nx\r\n"
        trickling = asyncio.create_task(client.trickle(piece))
        status, body = await client.answer()
        assert status == 408
        assert "slowly" in json.loads(body)["detail"]
        assert await client.is_closed()
        await trickling
        assert server.refused("slow_body") == 1
        # Its handler hears of it, and ends.
        assert server.app.num_gone == 1
        assert await server.is_well()


async def test_a_body_that_comes_fast_enough_takes_its_time(make: Make) -> None:
    async with make(header_timeout_s=WINDOW_S, min_body_bytes_per_s=10.0) as server:
        client = await server.open(POST + b"content-length: 40\r\n\r\n")
        for _ in range(40):
            client.send(b"x")
            await asyncio.sleep(2 * WINDOW_S / 40)
        assert await client.answer() == (200, b"40")
        assert server.refused("slow_body") == 0


async def test_time_in_which_the_server_does_not_read_is_nobodys_fault(make: Make) -> None:
    """The app holds the request without reading: uvicorn stops reading, and the client cannot send."""
    async with make(**SHORT) as server:
        client = await server.open(POST.replace(b"/echo", b"/hold") + b"content-length: 10000000\r\n\r\n")
        client.send(b"x" * 10_000_000)
        waiting = await server.open(
            POST.replace(b"/echo", b"/hold") + b"content-length: 5\r\nexpect: 100-continue\r\n\r\n"
        )
        await asyncio.sleep(4 * WINDOW_S)
        assert server.refused("slow_body") == 0
        assert len(server.connections) == 2
        client.writer.close()
        waiting.writer.close()


@pytest.mark.parametrize("is_one_line", [True, False])
@pytest.mark.parametrize("ends", [True, False])
async def test_large_heads_are_refused(make: Make, is_one_line: bool, ends: bool) -> None:
    async with make() as server:
        line = b"a: " + b"b" * 70_000 if is_one_line else b"\r\n".join(b"a%d: %s" % (i, b"b" * 700) for i in range(100))
        client = await server.open(b"GET /echo HTTP/1.1\r\n" + line + (b"\r\n\r\n" if ends else b""))
        assert (await client.answer())[0] == 431
        assert await client.is_closed()
        assert not server.app.scopes
        assert await server.is_well()


async def test_many_headers_are_refused_and_many_kilobytes_are_not(make: Make) -> None:
    async with make() as server:
        lines = b"".join(b"a%d: b\r\n" % i for i in range(MAX_HEADERS + 1))
        client = await server.open(b"GET /echo HTTP/1.1\r\n" + lines + b"\r\n")
        assert (await client.answer())[0] == 431
        client = await server.open(b"GET /echo HTTP/1.1\r\na: " + b"b" * 60_000 + b"\r\n\r\n")
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("size", [20_000, 70_000])
async def test_long_urls_are_refused(make: Make, ends: bool, size: int) -> None:
    async with make() as server:
        client = await server.open(b"GET /echo?" + b"x" * size)
        if ends or size < 65_536:
            client.send(b" HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer())[0] == 414
        assert not server.app.scopes


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        POST + b"content-length: 99999999999999999999999\r\n\r\n",
        POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\nabc",
        POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\nabc",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /a HTTP/1.1\r\nbad header\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_answered_400_and_not_logged(
    make: Make, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with make() as server:
        client = await server.open(data)
        assert (await client.answer())[0] == 400
        assert await client.is_closed()
        assert server.refused("bad_request") == 1
        assert await server.is_well()
    assert not caplog.records


async def test_other_protocols_are_not_spoken(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    async with make() as server:
        upgrade = b"GET /echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: %s\r\n\r\n"
        for name in (b"websocket", b"h2c"):
            client = await server.open(upgrade % name)
            assert await client.answer() == (200, b"0")
            assert await client.is_closed()
    assert not caplog.records


async def test_a_chunked_body_is_no_way_around(make: Make) -> None:
    """Frames and headers behind the body could go on without an end."""
    async with make() as server:
        chunked = POST + b"transfer-encoding: chunked\r\n\r\n"
        extended = await server.open(chunked + b"1;" + b"a" * 200_000)
        assert (await extended.answer())[0] == 400
        trailing = await server.open(chunked + b"1\r\nx\r\n0\r\n" + b"a: b\r\n" * 10)
        assert (await trailing.answer())[0] == 400
        endless = await server.open(chunked + b"1\r\nx\r\n0\r\na: " + b"b" * 200_000)
        assert (await endless.answer())[0] == 400
        assert server.refused("framing") == 3
        short = await server.open(chunked + b"2\r\nok\r\n0\r\nx-forwarded-for: 192.0.2.9\r\nx-api-key: tml-x\r\n\r\n")
        assert await short.answer() == (200, b"2")
        assert {b"x-forwarded-for", b"x-api-key"}.isdisjoint(name for name, _ in server.app.scopes[-1]["headers"])
        honest = await server.open(chunked + b"1\r\nx\r\n" * 1_000 + b"0\r\n\r\n")
        assert await honest.answer() == (200, b"1000")


async def test_an_answer_before_the_body_ends_what_is_still_coming(make: Make) -> None:
    async with make() as server:
        client = await server.open(POST.replace(b"/echo", b"/early") + b"content-length: 1000000000\r\n\r\n")
        assert (await client.answer())[0] == 200
        with contextlib.suppress(ConnectionError):
            for _ in range(2 * LINGER_BYTES // 2**20):
                client.send(bytes(2**20))
                await client.writer.drain()
        assert await client.is_closed()
        slow = await server.open(POST.replace(b"/echo", b"/early") + b"content-length: 1000\r\n\r\n")
        assert (await slow.answer())[0] == 200
        assert await slow.is_closed()
        assert server.refused("unread_body") == 2


async def test_after_a_body_that_nobody_read_the_connection_goes_on(make: Make) -> None:
    async with make() as server:
        client = await server.open(POST.replace(b"/echo", b"/early") + b"content-length: 1000000\r\n\r\n")
        assert (await client.answer())[0] == 200
        client.send(b"x" * 1_000_000 + POST + b"content-length: 2\r\n\r\nok")
        assert await client.answer() == (200, b"2")


async def test_who_expects_a_word_first_is_refused_without_sending(make: Make) -> None:
    async with make() as server:
        early = POST.replace(b"/echo", b"/early") + b"content-length: 100000000\r\nexpect: 100-continue\r\n\r\n"
        client = await server.open(early)
        assert (await client.answer())[0] == 200
        wanted = await server.open(POST + b"content-length: 2\r\nexpect: 100-continue\r\n\r\n")
        assert b" 100 " in await wanted.reader.readuntil(b"\r\n\r\n")
        wanted.send(b"ok")
        assert await wanted.answer() == (200, b"2")


async def test_pipelined_requests_are_bounded(make: Make) -> None:
    async with make() as server:
        request = b"GET /echo HTTP/1.1\r\nhost: x\r\n\r\n"
        few = await server.open(request * MAX_PIPELINED)
        assert [await few.answer() for _ in range(MAX_PIPELINED)] == [(200, b"0")] * MAX_PIPELINED
        many = await server.open(request.replace(b"/echo", b"/hold") + request * 5_000)
        assert await many.is_closed()
        assert server.refused("pipelined") == 1
        assert await server.is_well()


async def test_who_does_not_read_its_answer_is_given_up(make: Make) -> None:
    async with make() as server:
        client = await server.open(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: server.refused("unread_answer") == 1)
        assert await server.is_well()


async def test_connections_of_one_address_are_bounded(make: Make) -> None:
    async with make(max_connections_per_address=5) as server:
        held = [await server.open(b"GET /hold HTTP/1.1\r\nhost: x\r\n\r\n", source="127.0.0.2") for _ in range(5)]
        late = await server.open(source="127.0.0.2")
        assert (await late.answer())[0] == 429
        assert await late.is_closed()
        assert await server.is_well()
        held.pop().writer.close()
        await until(lambda: len(server.connections) <= 4)
        again = await server.open(b"GET /echo HTTP/1.1\r\nhost: x\r\n\r\n", source="127.0.0.2")
        assert (await again.answer())[0] == 200


async def test_connections_are_bounded_in_total(make: Make) -> None:
    async with make(max_connections=5, trusted_proxies=["127.0.0.2"]) as server:
        held = [
            await server.open(b"GET /hold HTTP/1.1\r\nhost: x\r\n\r\n", source=f"127.0.0.{2 + i}") for i in range(5)
        ]
        late = await server.open(source="127.0.0.20")
        assert (await late.answer())[0] == 503
        assert server.refused("connections") == 1
        for client in held:
            client.writer.close()


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("10.9.9.9, 198.51.100.7", "198.51.100.7"),
        ("198.51.100.7, 10.1.0.5", "198.51.100.7"),
        ("198.51.100.7:4242", "198.51.100.7"),
        ("[2001:db8::1]:80", "2001:db8::1"),
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("198.51.100.7, nonsense", "127.0.0.1"),
        ("", "127.0.0.1"),
    ],
)
async def test_behind_a_proxy_the_client_is_who_it_names(make: Make, forwarded: str, client: str) -> None:
    request = f"GET /echo HTTP/1.1\r\nhost: x\r\nx-forwarded-for: {forwarded}\r\n\r\n".encode()
    async with make(trusted_proxies=["127.0.0.1", "10.1.0.0/16"], max_connections_per_address=1) as server:
        # The proxy's own connections are not those of one client.
        for _ in range(3):
            assert (await (await server.open(request)).answer())[0] == 200
        assert {scope["client"][0] for scope in server.app.scopes} == {client}


async def test_without_a_trusted_proxy_nobody_chooses_an_address(make: Make) -> None:
    async with make() as server:
        sent = await server.open(b"GET /echo HTTP/1.1\r\nhost: x\r\nx-forwarded-for: 198.51.100.7\r\n\r\n")
        assert (await sent.answer())[0] == 200
        assert server.app.scopes[0]["client"][0] == "127.0.0.1"


def test_a_network_of_ipv6_is_one_client() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:1") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1") == "192.0.2.1"


async def test_no_timer_runs_without_connections(make: Make) -> None:
    async with make() as server:
        assert await server.is_well()
        await until(lambda: server.connections._timer is None)
        assert await server.is_well()


PATHS = (
    "forward_backward",
    "asample",
    "create_session",
    "optim_step",
    "save_weights",
    "create_custom_loss",
    "telemetry",
)


@pytest.mark.parametrize("key", [None, "tml-nobody", "sk-other"])
async def test_a_large_body_without_a_key_is_answered_before_it_is_read(gateway: Harness, key: str | None) -> None:
    """Of every route that takes one: what came of it until then is all that was read."""
    await gateway.store.keys.add("somebody", key_digest("tml-somebody"), False)
    head = "" if key is None else f"x-api-key: {key}\r\n"
    async with serving(gateway.app) as (port, _, _):
        for path in PATHS:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"POST /api/v1/{path} HTTP/1.1\r\nhost: x\r\n{head}content-length: 50000000\r\n\r\n".encode())
            writer.write(b"x" * 100_000)
            status, _ = await Client(reader, writer).answer()
            writer.transport.abort()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            assert status == 401, path
        assert gateway.app.state.gateway.body_room.sent.held == 0
