"""The HTTP server under the app: uvicorn's, with bounds on what a client may do before anybody knows who it is.

Bounded are open connections (in total and per client address), the head of a request (bytes, headers, URL, seconds),
the pace of a body, pipelined requests, what is read of a request that is answered already, and how long an answer may
wait for a client that does not take it. It refuses to know routes, keys and what bodies mean.
Invariants: no connection stays in a state in which it only waits for its client, but for the keep-alive time between
two requests; and what a connection holds before its request is handled is bounded by the limits of its head and by 64
kB of its body.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import resource
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar, Final

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from treadle.config.tree import ServerSettings
from treadle.domain.addresses import forwarded_address, network_of, parsed_address
from treadle.domain.limits import (
    BODY_WINDOW_S,
    LINGER_BYTES,
    LINGER_S,
    MAX_HEADERS,
    MAX_PIPELINED,
    UNREAD_ANSWER_S,
)
from treadle.telemetry.logs import get_logger
from treadle.telemetry.metrics import Metrics

log = get_logger(__name__)

# How often connections are looked at; what is overdue ends up to so much later. One look at 10,000 takes 5 ms.
TICK_S: Final = 1.0
# Files that are no connections: database, blobs, pipes to workers.
_OTHER_FILES = 256
# What may come between two pieces of a body's content: the frames of chunks.
_FRAMING_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection ends. reason: the metric's label. status 0: nothing is said."""

    reason: str
    status: int = 0
    detail: str = ""


BAD_REQUEST = Refusal("bad_request", 400, "this is not a valid HTTP/1.1 request")
SLOW_HEAD = Refusal("slow_head", 408, "the head of the request did not arrive in time")
SLOW_BODY = Refusal("slow_body", 408, "the body of the request came too slowly; send it again")
LARGE_HEAD = Refusal("large_head", 431, "the head of the request is larger than this server takes")
LONG_URL = Refusal("long_url", 414, "the URL is longer than this server takes")
FRAMING = Refusal("framing", 400, "the chunks of the body have extensions or trailers that this server does not take")
PIPELINED = Refusal("pipelined")
UNREAD = Refusal("unread_answer")
LINGERED = Refusal("unread_body")
SILENT = Refusal("silent")
FULL = Refusal("connections", 503, "this server has no room for another connection; try again in a moment")
FULL_OF_ADDRESS = Refusal(
    "connections_of_address", 429, "too many connections from your address; close some, or try again in a moment"
)


class Connections:
    """The open connections of one server. It owns the one timer that looks at all of them."""

    def __init__(self, settings: ServerSettings, metrics: Metrics, *, tick_s: float = TICK_S) -> None:
        self.settings = settings
        self._metrics = metrics
        self._tick_s = tick_s
        self._max_open = _granted(settings.max_connections)
        self._proxies = tuple(ipaddress.ip_network(proxy) for proxy in settings.trusted_proxies)
        self._open: set[GuardedProtocol] = set()
        self._of_address: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, connection: GuardedProtocol, address: str) -> Refusal | None:
        """Count a new connection; or why there is no room for it."""
        if len(self._open) >= self._max_open:
            return FULL
        connection.is_proxied = self._is_proxy(address)
        connection.place = "" if connection.is_proxied else network_of(address)
        if connection.place and self._of_address[connection.place] >= self.settings.max_connections_per_address:
            return FULL_OF_ADDRESS
        self._of_address[connection.place] += 1
        self._open.add(connection)
        if self._timer is None:
            self._looked_at = connection.loop.time()
            self._timer = connection.loop.call_later(self._tick_s, self._look, connection.loop)
        return None

    def leave(self, connection: GuardedProtocol) -> None:
        """It is closed. Idempotent."""
        if connection in self._open:
            self._open.remove(connection)
            self._of_address[connection.place] -= 1
            if not self._of_address[connection.place]:
                del self._of_address[connection.place]

    def count(self, refusal: Refusal) -> None:
        """A connection ends for this reason."""
        self._metrics.refused_connections.labels(refusal.reason).inc()

    def client_of(self, peer: str, headers: Sequence[tuple[bytes, bytes]]) -> str:
        """The address of the client behind a trusted proxy: the last one in X-Forwarded-For that is no such proxy.

        The proxy's own where that says nothing readable.
        """
        forwarded = b",".join(value for name, value in headers if name == b"x-forwarded-for").decode("latin-1")
        for hop in reversed(forwarded.split(",")):
            address = forwarded_address(hop)
            if address is None:
                return peer
            if not self._is_proxy(address):
                return address
        return peer

    def _is_proxy(self, address: str) -> bool:
        if not self._proxies:
            return False
        parsed = parsed_address(address)
        return parsed is not None and any(parsed in network for network in self._proxies)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """End what is overdue; again in a tick, as long as anybody is connected."""
        self._timer = loop.call_later(self._tick_s, self._look, loop) if self._open else None
        now = loop.time()
        elapsed, self._looked_at = now - self._looked_at, now
        for connection in tuple(self._open):
            connection.look(now, elapsed)


class _Reading(Enum):
    """Where in a request the bytes of a connection are."""

    NOTHING = auto()
    HEAD = auto()
    BODY = auto()
    REFUSED = auto()


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the bounds. `open_connections` is set by `guarded`."""

    open_connections: ClassVar[Connections]

    is_proxied = False
    place = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        # A connection that says nothing yet is as good as one between two requests.
        self._reading = _Reading.HEAD
        self._since = self.loop.time()
        # Bytes of the head, or since the last content of the body.
        self._num_raw = 0
        self._num_body = 0
        self._num_body_before = 0
        self._num_headers = 0
        self._refusal: Refusal | None = None
        self._unsent = 0
        self._unsent_since = self._since
        refusal = self.open_connections.enter(self, self.client[0] if self.client else "")
        if refusal is not None:
            # There may be no room to wait for it to read this.
            self.open_connections.count(refusal)
            self._say(refusal)
            self._reading = _Reading.REFUSED
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open_connections.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._reading is _Reading.REFUSED:
            self._num_raw += len(data)
            if self._num_raw > LINGER_BYTES:
                self.transport.abort()
            return
        if self._reading is _Reading.NOTHING:
            self._begin_head()
        self._num_raw += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Other protocols are not spoken here: it is answered like any request, and is the last one.
            self.cycle.keep_alive = False
        except httptools.HttpParserError:
            self._refuse(self._refusal or BAD_REQUEST)
        else:
            self._check_progress()

    def on_headers_complete(self) -> None:
        settings = self.open_connections.settings
        if len(self.url) > settings.max_url_bytes:
            self._stop(LONG_URL)
        # What was read since the head began is at least as long, and mostly little more.
        if len(self.headers) > MAX_HEADERS or (
            self._num_raw > settings.max_header_bytes and self._head_bytes() > settings.max_header_bytes
        ):
            self._stop(LARGE_HEAD)
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(PIPELINED)
        if self.is_proxied and self.client is not None:
            self.scope["client"] = (self.open_connections.client_of(self.client[0], self.headers), 0)
        self._reading = _Reading.BODY
        self._since = self.loop.time()
        self._num_headers = len(self.headers)
        self._num_raw = self._num_body = self._num_body_before = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_body += len(body)
        self._num_raw = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        # Trailers are no headers: what a proxy in front has set would not be in them.
        del self.headers[self._num_headers :]
        super().on_message_complete()
        self._reading = _Reading.NOTHING
        self._num_raw = 0
        if self.cycle.response_complete and not self.transport.is_closing():
            # It was answered before its body came; only now it is between two requests.
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._reading is _Reading.BODY and self.cycle.response_complete:
            self._unset_keepalive_if_required()
            self._since = self.loop.time()
            self._num_raw = self._num_body = 0

    def look(self, now: float, elapsed: float) -> None:
        """End the connection if something of it is overdue. elapsed: since the last look."""
        self._look_at_answer(now)
        if self._reading is _Reading.HEAD:
            if self.flow.read_paused:
                self._since += elapsed
            elif not self._num_raw:
                if now - self._since > self.open_connections.settings.keep_alive_s:
                    self._refuse(SILENT)
            elif now - self._since > self.open_connections.settings.header_timeout_s:
                self._refuse(SLOW_HEAD)
        elif self._reading is _Reading.BODY:
            self._look_at_body(now, elapsed)
        elif self._reading is _Reading.REFUSED and now - self._since > LINGER_S:
            self.transport.abort()

    def _look_at_body(self, now: float, elapsed: float) -> None:
        if self.cycle.response_complete:
            if now - self._since > LINGER_S:
                self._refuse(LINGERED)
            return
        if self.flow.read_paused or self.cycle.waiting_for_100_continue:
            self._since += elapsed
            return
        window_s = now - self._since
        if window_s >= BODY_WINDOW_S:
            pace = (self._num_body - self._num_body_before) / window_s
            if pace < self.open_connections.settings.min_body_bytes_per_s:
                self._refuse(SLOW_BODY)
            self._since, self._num_body_before = now, self._num_body

    def _look_at_answer(self, now: float) -> None:
        """End a connection whose client takes nothing of what waits for it."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._unsent_since = now
        self._unsent = unsent
        if unsent and now - self._unsent_since > UNREAD_ANSWER_S:
            self.open_connections.count(UNREAD)
            self.transport.abort()

    def _begin_head(self) -> None:
        self._reading = _Reading.HEAD
        self._since = self.loop.time()
        self._num_raw = 0

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _check_progress(self) -> None:
        """What the parser holds without telling: a head, or the frame of a body."""
        if self._reading is _Reading.HEAD:
            if self._num_raw > self.open_connections.settings.max_header_bytes:
                self._refuse(LONG_URL if len(self.url) > self.open_connections.settings.max_url_bytes else LARGE_HEAD)
        elif self._reading is _Reading.BODY:
            if self.cycle.response_complete:
                if self._num_raw + self._num_body > LINGER_BYTES:
                    self._refuse(LINGERED)
            elif self._num_raw > _FRAMING_BYTES or len(self.headers) > self._num_headers:
                self._refuse(FRAMING)

    def _stop(self, refusal: Refusal) -> None:
        """End the parsing, from within one of its callbacks."""
        self._refusal = refusal
        raise ValueError(refusal.reason)

    def _refuse(self, refusal: Refusal) -> None:
        """Say why, where that can be heard as an answer to the right request, and end the connection."""
        self.open_connections.count(refusal)
        log.debug("connection refused", reason=refusal.reason)
        is_idle = self.cycle is None or self.cycle.response_complete
        is_its_own = self._reading is _Reading.BODY and not self.pipeline and not is_idle
        can_answer = is_idle if self._reading is _Reading.HEAD else is_its_own and not self.cycle.response_started
        if not refusal.status or not can_answer:
            self.transport.abort()
            return
        if not is_idle:
            # Whoever handles it hears that its client is gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._reading = _Reading.REFUSED
        self._since = self.loop.time()
        self._num_raw = 0
        self._say(refusal)
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            # Closed at once, what the client still sends would be answered with a reset, and this lost on the way.
            self.transport.write_eof()
        else:
            self.transport.close()

    def _say(self, refusal: Refusal) -> None:
        body = json.dumps({"detail": refusal.detail, "category": "user"}).encode()
        retry = b"retry-after: 1\r\n" if refusal.status in (429, 503) else b""
        head = b"content-type: application/json\r\nconnection: close\r\n%scontent-length: %d\r\n\r\n"
        self.transport.write(STATUS_LINE[refusal.status] + head % (retry, len(body)) + body)


def guarded(connections: Connections) -> type[GuardedProtocol]:
    """The protocol class of a server with these connections, for uvicorn's `http` setting."""

    class Guarded(GuardedProtocol):
        open_connections = connections

    return Guarded


def http_config(app: ASGIApp, connections: Connections, **options: Any) -> uvicorn.Config:
    """uvicorn's configuration for `app` behind the guards; `options` are uvicorn's own."""
    return uvicorn.Config(
        app,
        http=guarded(connections),
        # No route speaks it.
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        # Whose word on clients' addresses counts is decided here (trusted_proxies).
        proxy_headers=False,
        timeout_keep_alive=int(connections.settings.keep_alive_s),
        **options,
    )


def _granted(max_connections: int) -> int:
    """So many connections, as far as the system lets this process open files; asks it for more files if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("fewer connections than configured", open_files=allowed, max_connections=max_connections)
    return max(1, min(max_connections, allowed - _OTHER_FILES))
