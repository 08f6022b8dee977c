"""Answers that take as long as a sample does: whole ones and server-sent events, and clients that go away meanwhile.

It refuses to know what is answered. Invariant: when the client is gone, or the answer is complete, nothing that was
begun for it goes on.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from treadle.errors import TreadleError
from treadle.gateway.answers import json_response
from treadle.gateway.middleware import BACK_OFF, RETRY_AFTER_S
from treadle.gateway.routing import ROUTE_TEMPLATE, Handler
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")

# Ignored by every reader of events.
KEEP_ALIVE = b": still sampling\n\n"
# nginx would collect a stream before it passes it on.
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
EVENTS = "text/event-stream"


async def attended(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; cancelled, with ClientDisconnect, when the client goes away. The body was read before."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_until_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        await _end(working, gone)


def in_form(error_of: Callable[[TreadleError], object]) -> Callable[[Handler], Handler]:
    """A decorator: the handler with its errors in the shape that `error_of` gives them."""

    def wrap(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def endpoint(request: Request, **params: str) -> Response:
            try:
                return await handler(request, **params)
            except TreadleError as error:
                return _refusal(request, error, error_of(error))

        return endpoint

    return wrap


def _refusal(request: Request, error: TreadleError, body: object) -> Response:
    """The answer to a request that is refused with `error`, in the words of its form."""
    if error.status >= 500:
        log.warning(
            "request refused", path=request.scope.get(ROUTE_TEMPLATE), status=error.status, reason=error.message
        )
    headers = {"Retry-After": RETRY_AFTER_S} if error.status in BACK_OFF else None
    return json_response(body, status=error.status, headers=headers)


class EventStream(Response):
    """Server-sent events, each one sent as soon as it is there.

    close: called when the stream has ended, complete or not, also when it never began.
    """

    media_type = EVENTS

    def __init__(self, events: AsyncIterator[bytes], *, close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(headers=_HEADERS)
        # Its length is not known.
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pumping = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({pumping, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pumping.done():
                pumping.result()
        finally:
            await _end(pumping, gone)
            await self._close()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
