"""Routes of the SDK's endpoints as decorated functions: a request and the path's parameters in, a response out.

Plain routes of the FastAPI app, which find no dependencies to resolve and no models to validate: these handlers read
and check their bodies themselves (protobuf, bounded), and FastAPI's own routes cost twice as much per call (measured:
50 against 28 us). It refuses to know what any route does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from treadle.errors import InvalidRequest

# Where metrics find which route answered, without what the client put into its path.
ROUTE_TEMPLATE = "treadle.route"

Handler: TypeAlias = Callable[..., Awaitable[Response]]


class Resource:
    """The routes of one resource, in the order in which they are tried."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self.routes: list[Route] = []

    def get(self, path: str) -> Callable[[Handler], Handler]:
        """Register a handler for GET and HEAD of prefix + `path`; `{name}` in it becomes a parameter of the handler."""
        return self._register(path, "GET")

    def post(self, path: str) -> Callable[[Handler], Handler]:
        """Like `get`, for POST."""
        return self._register(path, "POST")

    def _register(self, path: str, method: str) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            async def endpoint(request: Request) -> Response:
                request.scope[ROUTE_TEMPLATE] = self._prefix + path
                if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
                    # PostgreSQL has no NUL in text; in bodies, each field is checked.
                    raise InvalidRequest("the URL contains a NUL character")
                return await handler(request, **request.path_params)

            self.routes.append(Route(self._prefix + path, endpoint, methods=[method]))
            return handler

        return register
