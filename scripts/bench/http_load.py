"""A minimal HTTP/1.1 client for load: requests are bytes made beforehand, answers a status and a body.

A client that spends as much on a request as the server does measures itself. This one costs about a tenth of what the
SDK's does; what it cannot do (chunked answers, pipelining, TLS) the server under test does not need.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import cast

# What tinker 0.38 sends beside the body, so that the server parses as many headers as it would for the SDK.
SDK_HEADERS = (
    "accept: application/json\r\naccept-encoding: gzip, deflate\r\nconnection: keep-alive\r\n"
    "user-agent: AsyncTinker/Python 0.38.0\r\nx-stainless-lang: python\r\nx-stainless-package-version: 0.38.0\r\n"
    "x-stainless-os: Linux\r\nx-stainless-arch: x64\r\nx-stainless-runtime: CPython\r\n"
    "x-stainless-runtime-version: 3.11.0\r\nx-stainless-async: async:asyncio\r\nx-stainless-retry-count: 0\r\n"
    "x-stainless-read-timeout: 60\r\n"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. `at` is the loop's time in seconds at which its last byte was here."""

    status: int
    body: bytes
    at: float


def request_bytes(
    path: str, body: bytes, *, key: str, content_type: str = "application/json", encoding: str | None = None
) -> bytes:
    """A POST of `body` with the SDK's headers."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{SDK_HEADERS}x-api-key: {key}\r\ncontent-type: {content_type}\r\n"
        f"content-length: {len(body)}\r\n" + (f"content-encoding: {encoding}\r\n" if encoding else "")
    )
    return head.encode() + b"\r\n" + body


class Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._answer: asyncio.Future[Answer] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(f"the server closed the connection: {exc}"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        start = self._received.find(b"content-length: ", 0, end) + 16
        assert start >= 16, f"an answer without a length: {bytes(self._received[:end])!r}"
        stop = self._received.find(b"\r\n", start)
        num_bytes = int(self._received[start:stop])
        if len(self._received) < end + 4 + num_bytes:
            return
        assert self._answer is not None
        answer = Answer(int(self._received[9:12]), bytes(self._received[end + 4 :]), self._loop.time())
        self._received.clear()
        if not self._answer.done():
            self._answer.set_result(answer)

    async def send(self, request: bytes) -> Answer:
        """Send a request and wait for its answer. Raises ConnectionError when the server hangs up."""
        assert self.transport is not None
        assert self._answer is None or self._answer.done(), "one request at a time"
        self._answer = self._loop.create_future()
        self.transport.write(request)
        return await self._answer


class ConnectionPool:
    """The connections of one client: as many as it has requests at once, kept open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[Connection] = []
        self._all: list[Connection] = []

    async def send(self, request: bytes) -> Answer:
        """Send on a free connection, or on a new one."""
        if self._free:
            connection = self._free.pop()
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
            self._all.append(connection)
        answer = await connection.send(request)
        self._free.append(connection)
        return answer

    def close(self) -> None:
        for connection in self._all:
            if connection.transport is not None:
                connection.transport.abort()
