"""Hints between processes that share one PostgreSQL: LISTEN and NOTIFY, on one connection in a thread of its own.

What happened here goes out in as few notifications as possible, right after its commit; what happened elsewhere comes
in and is told to this process's listeners. It refuses to know what anybody does about it. Invariants: nothing waits
for a notification to go out; a notification that is lost (the connection broke, too many wait) costs whoever waited
for it the time to the next slow poll, and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from treadle.domain.ids import PoolName, RequestId
from treadle.domain.ops import OpKind
from treadle.errors import StoreUnavailable, TreadleError
from treadle.store.engine import Database
from treadle.store.events import Events
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

CHANNEL = "treadle"
# PostgreSQL takes payloads below 8,000 bytes.
_MAX_PAYLOAD_BYTES = 7_900
# Hints that may wait to go out while the connection is away: seconds of a busy server. More are dropped.
_MAX_WAITING = 10_000
_RECONNECT_S = 1.0

_KINDS = frozenset(kind.value for kind in OpKind)
_NOTIFY = sa.select(sa.func.pg_notify(CHANNEL, sa.bindparam("payload", type_=sa.Text)))


class Notifier:
    """Forwards hints from and to one event loop, the one that constructed it, until `close`."""

    def __init__(self, database: Database, events: Events, *, forget: Callable[[Sequence[RequestId]], None]) -> None:
        """forget: called before requests that another process finished are announced: what this one knows is old."""
        self._database = database
        self._events = events
        self._forget = forget
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        # What is to go out, in order and once each.
        self._queued: dict[tuple[PoolName, OpKind], None] = {}
        self._finished: dict[RequestId, None] = {}
        self._pools: dict[PoolName, None] = {}
        self._is_closing = threading.Event()
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name="store-notify", daemon=True)
        self._thread.start()

    def enqueued(self, pool: PoolName, kind: OpKind) -> None:
        """See Forwarding."""
        self._add(self._queued, [(pool, kind)])

    def finished(self, request_ids: Sequence[RequestId]) -> None:
        """See Forwarding."""
        self._add(self._finished, request_ids)

    def pool_changed(self, pool: PoolName) -> None:
        """See Forwarding."""
        self._add(self._pools, [pool])

    async def close(self) -> None:
        """Send what waits, then stop. Idempotent."""
        self._is_closing.set()
        self._ring()
        await asyncio.to_thread(self._thread.join)
        self._bell.close()
        self._rope.close()

    def _add(self, waiting: dict[Any, None], items: Sequence[Any]) -> None:
        with self._lock:
            if len(waiting) < _MAX_WAITING:
                waiting.update(dict.fromkeys(items))
        self._ring()

    def _ring(self) -> None:
        try:
            self._rope.send(b"!")
        except OSError:
            return  # it rings already, or the notifier is closed

    def _serve(self) -> None:
        while not self._is_closing.is_set():
            try:
                with self._database.apart() as conn:
                    self._serve_on(conn)
            except TreadleError as error:
                log.warning("no notifications from other servers", reason=error.message, again_in_s=_RECONNECT_S)
                self._is_closing.wait(_RECONNECT_S)

    def _serve_on(self, conn: sa.Connection) -> None:
        conn.exec_driver_sql(f"LISTEN {CHANNEL}")
        driver: Any = conn.connection.driver_connection
        own_pid = driver.info.backend_pid
        with selectors.DefaultSelector() as selector:
            selector.register(driver.fileno(), selectors.EVENT_READ)
            selector.register(self._bell, selectors.EVENT_READ)
            while True:
                self._send(conn)
                # What came in beside the answers is handed out here as well.
                self._receive(driver, own_pid)
                if self._is_closing.is_set():
                    return
                selector.select()
                self._silence()

    def _silence(self) -> None:
        try:
            while self._bell.recv(4_096):
                pass
        except BlockingIOError:
            return

    def _send(self, conn: sa.Connection) -> None:
        with self._lock:
            queued, finished, pools = list(self._queued), list(self._finished), list(self._pools)
            for waiting in (self._queued, self._finished, self._pools):
                waiting.clear()
        for payload in payloads(queued, finished, pools):
            conn.execute(_NOTIFY, {"payload": payload})

    def _receive(self, driver: Any, own_pid: int) -> None:
        try:
            incoming = list(driver.notifies(timeout=0))
        except self._database.writing.dialect.loaded_dbapi.Error as error:
            raise StoreUnavailable("the connection for notifications broke") from error
        hints = [hint for notify in incoming if notify.pid != own_pid for hint in _hints(notify.payload)]
        if hints:
            self._loop.call_soon_threadsafe(self._relay, hints)

    def _relay(self, hints: Sequence[Mapping[str, Any]]) -> None:
        for hint in hints:
            finished = [RequestId(request_id) for request_id in hint.get("finished", ())]
            self._forget(finished)
            self._events.relay_finished(finished)
            for pool, kind in hint.get("queued", ()):
                # A newer treadle may have kinds that this one does not know, and never runs.
                if kind in _KINDS:
                    self._events.relay_enqueued(PoolName(pool), OpKind(kind))
            for pool in hint.get("pools", ()):
                self._events.relay_pool(PoolName(pool))


def payloads(
    queued: Sequence[tuple[PoolName, OpKind]], finished: Sequence[RequestId], pools: Sequence[PoolName]
) -> Iterator[str]:
    """Hints as the payloads of notifications, as few as hold them."""
    items: list[tuple[str, Any]] = [("queued", [pool, kind.value]) for pool, kind in queued]
    items += [("pools", pool) for pool in pools]
    items += [("finished", request_id) for request_id in finished]
    hints: dict[str, list[Any]] = {}
    num_bytes = 0
    for name, value in items:
        # Names, quotes and commas of the whole stay below this per item; ids are ASCII, names are escaped to it.
        size = len(json.dumps(value)) + len(name) + 8
        if hints and num_bytes + size > _MAX_PAYLOAD_BYTES:
            yield json.dumps(hints, separators=(",", ":"))
            hints, num_bytes = {}, 0
        hints.setdefault(name, []).append(value)
        num_bytes += size
    if hints:
        yield json.dumps(hints, separators=(",", ":"))


def _hints(payload: str) -> list[Mapping[str, Any]]:
    """What a notification says; nothing when it is not one of ours."""
    try:
        hints = json.loads(payload)
    except ValueError:
        hints = None
    if not isinstance(hints, dict):
        log.warning("notification not understood", channel=CHANNEL)
        return []
    return [hints]
