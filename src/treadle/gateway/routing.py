"""Routes of the SDK's endpoints as decorated functions: a request and the path's parameters in, a response out.

Plain routes of the FastAPI app, which find no dependencies to resolve and no models to validate: these handlers read
and check their bodies themselves (protobuf, bounded), and FastAPI's own routes cost twice as much per call (measured:
50 against 28 us). What each reads and answers is noted beside it, for the OpenAPI document. It refuses to know what any
route does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from treadle.errors import InvalidRequest
from treadle.wire.answers import ErrorAnswer

# Where metrics find which route answered, without what the client put into its path.
ROUTE_TEMPLATE = "treadle.route"

Handler: TypeAlias = Callable[..., Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What the OpenAPI document says about one route.

    body: what its JSON body is checked against; body_type: the media type of a body that is not JSON. query: its query
    parameters. answer: the JSON that it answers with, None when that is empty or not JSON; status: of that answer.
    error: what its refusals look like. others: statuses that few routes have, and the JSON of each. is_public: it needs
    no key.
    """

    path: str
    method: str
    handler: Handler
    body: type[BaseModel] | None = None
    body_type: str = "application/json"
    query: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    answer_type: str = "application/json"
    error: type[BaseModel] = ErrorAnswer
    status: int = 200
    others: Mapping[int, type[BaseModel]] = field(default_factory=dict)
    is_public: bool = False


class Resource:
    """The routes of one resource, in the order in which they are tried."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self.routes: list[Route] = []
        self.endpoints: list[Endpoint] = []

    def get(self, path: str, **facts: object) -> Callable[[Handler], Handler]:
        """Register a handler for GET and HEAD of prefix + `path`; `{name}` in it becomes a parameter of the handler.

        facts: those of Endpoint.
        """
        return self._register(path, "GET", facts)

    def post(self, path: str, **facts: object) -> Callable[[Handler], Handler]:
        """Like `get`, for POST."""
        return self._register(path, "POST", facts)

    def put(self, path: str, **facts: object) -> Callable[[Handler], Handler]:
        """Like `get`, for PUT."""
        return self._register(path, "PUT", facts)

    def delete(self, path: str, **facts: object) -> Callable[[Handler], Handler]:
        """Like `get`, for DELETE."""
        return self._register(path, "DELETE", facts)

    def _register(self, path: str, method: str, facts: dict[str, object]) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            async def endpoint(request: Request) -> Response:
                request.scope[ROUTE_TEMPLATE] = self._prefix + path
                if "\0" in request.scope["path"] or b"%00" in request.scope["query_string"]:
                    # PostgreSQL has no NUL in text; in bodies, each field is checked.
                    raise InvalidRequest("the URL contains a NUL character")
                return await handler(request, **request.path_params)

            self.routes.append(Route(self._prefix + path, endpoint, methods=[method]))
            self.endpoints.append(Endpoint(self._prefix + path, method, handler, **facts))  # type: ignore[arg-type]  # Endpoint checks the names
            return handler

        return register
