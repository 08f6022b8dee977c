"""The outermost layers: every error becomes a JSON answer, every answer is counted, every body's room is given back;
and the prefix of the server's paths is taken off.

It knows errors by their class and routes by their template, and refuses to know bodies. Invariants: a
client never sees a traceback, a path or SQL, only an error id that the log has too; and no 4xx has an
empty body (the SDK takes an empty 400 for a network glitch and retries it, protocol 1.4).
"""

from __future__ import annotations

import itertools
import secrets
import time

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treadle.errors import InvalidToken, NotFound, TreadleError, Unauthenticated
from treadle.gateway.answers import json_response
from treadle.gateway.bodies import ROOM, BodyRoom, Room
from treadle.gateway.routing import ROUTE_TEMPLATE
from treadle.telemetry.context import current_context
from treadle.telemetry.logs import get_logger, log_context
from treadle.telemetry.metrics import Metrics
from treadle.telemetry.tracing import Span, SpanKind, emit, from_traceparent, is_tracing, new_trace, request_trace

log = get_logger(__name__)

# Held by design: their time says how long clients waited, not how fast we are.
LONG_POLLS = frozenset(
    {
        "/api/v1/retrieve_future",
        "/api/v1/retrieve_futures",
        *(f"{prefix}/{path}" for prefix in ("/oai/api/v1", "/v1") for path in ("completions", "chat/completions")),
        *(f"{prefix}/messages" for prefix in ("/anthropic/api/v1", "/v1")),
    }
)
# Answers that ask for patience, and how much; the SDK's HTTP layer obeys it (protocol 1.3).
BACK_OFF = frozenset({429, 503})
RETRY_AFTER_S = "1"
# What machines ask the server itself, not the API: below a prefix and without it.
TOP_LEVEL = frozenset({"/healthz", "/readyz", "/metrics"})


class ErrorMiddleware:
    """Pure ASGI, so that it costs no task and no copy per request."""

    def __init__(self, app: ASGIApp, metrics: Metrics, body_room: BodyRoom) -> None:
        self._app = app
        self._metrics = metrics
        self._body_room = body_room
        # Of calls: unique over servers and restarts, and no secret. Randomness for each would cost a system call.
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call_id = f"{self._prefix}-{next(self._numbers):x}"
        with log_context(call_id=call_id):
            await self._answer(scope, receive, send, call_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, call_id: str) -> None:
        """call_id: of this HTTP call, in all of its log lines; a client that meets a bug of ours is told it."""
        started_at = time.perf_counter()
        status = 0
        room = scope[ROOM] = Room(self._body_room)

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counting_send)
        except ClientDisconnect:
            # Nobody is left to answer.
            log.debug("client went away", method=scope["method"])
        except TreadleError as error:
            self._metrics.refused_calls.labels(error=type(error).__name__, status=str(error.status)).inc()
            if status:
                raise
            if error.status >= 500:
                log.warning("request refused", path=_template(scope), status=error.status, reason=error.message)
            body = {"detail": error.message, "category": error.category}
            await json_response(body, status=error.status, headers=_headers_of(error))(scope, receive, counting_send)
        except Exception as error:
            log.error("request failed unexpectedly", exc=error, path=_template(scope), error_id=call_id)
            self._metrics.caught_errors.labels(boundary="middleware").inc()
            if status:
                raise
            body = {"detail": "internal error", "category": "server", "error_id": call_id}
            await json_response(body, status=500)(scope, receive, counting_send)
        finally:
            room.give_back()
            seconds = time.perf_counter() - started_at
            self._count(scope, status, seconds)
            if is_tracing():
                _trace(scope, status, seconds)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = _template(scope)
        self._metrics.http_requests.labels(route=route, status=str(status)).inc()
        if route not in LONG_POLLS:
            self._metrics.http_seconds.labels(route=route).observe(seconds)


def _trace(scope: Scope, status: int, seconds: float) -> None:
    """Emit the span of an answered call: a part of its request's trace, if it was about one that is in the queue.

    What the client says in `traceparent` is linked to then; else the call is a part of the client's trace.
    """
    route, context, now = _template(scope), current_context(), time.time()
    if route in TOP_LEVEL:
        return
    request_id = context.get("request_id")
    theirs = from_traceparent(Headers(scope=scope).get("traceparent"))
    parent = theirs if request_id is None else request_trace(str(request_id))
    attributes: dict[str, str | int] = {
        "http.request.method": str(scope["method"]),
        "http.route": route,
        "http.response.status_code": status,
    }
    attributes |= {f"treadle.{name}": str(value) for name, value in context.items()}
    emit(
        Span(
            name=f"{scope['method']} {route}",
            at=(new_trace() if parent is None else parent.new_child()),
            began_at=now - seconds,
            ended_at=now,
            parent=parent,
            kind=SpanKind.SERVER,
            attributes=attributes,
            links=() if theirs is None or theirs is parent else (theirs,),
            error=f"status {status}" if status >= 500 else "",
        )
    )


class PrefixMiddleware:
    """Serves below `root_path` only, but for TOP_LEVEL.

    The prefix is the server's setting: what a client or a proxy says in headers (X-Forwarded-Prefix) changes nothing.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            if path.startswith(f"{self._root_path}/"):
                # The router takes it off the path, and URLs that are made for this request have it.
                scope["root_path"] = self._root_path
            elif path not in TOP_LEVEL:
                raise NotFound(
                    f"{path[:200]} is not a path of this server: all of its paths begin with {self._root_path}"
                )
        await self._app(scope, receive, send)


def _headers_of(error: TreadleError) -> dict[str, str] | None:
    if error.status in BACK_OFF:
        return {"Retry-After": RETRY_AFTER_S}
    if isinstance(error, InvalidToken):
        # The SDK gets a new token at this word, and sends the request once more (RFC 6750).
        return {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    return {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthenticated) else None


def _template(scope: Scope) -> str:
    """The route's template, never the path itself, which a client chooses."""
    return str(scope.get(ROUTE_TEMPLATE, "unmatched"))
