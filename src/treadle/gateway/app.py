"""The ASGI application: routes, the error layer, and the gateway's life from start to stop.

It knows the deps it was given and no other process. Invariant: every answer of the API is
JSON or a finished result, whatever path or method was asked for; metrics and tokenizer files have formats of their
own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from treadle import __version__
from treadle.gateway.answers import json_response
from treadle.gateway.context import Gateway
from treadle.gateway.deps import GatewayDeps
from treadle.gateway.middleware import ErrorMiddleware, PrefixMiddleware
from treadle.gateway.openapi import openapi_document
from treadle.gateway.routes import (
    account,
    anthropic,
    checkpoints,
    clock,
    custom_losses,
    external,
    futures,
    legacy,
    losses,
    models,
    named_losses,
    openai,
    projects,
    quotas,
    runs,
    sampling,
    service,
    sessions,
    tokenizers,
    training,
)
from treadle.gateway.routes.admin import checkpoints as admin_checkpoints
from treadle.gateway.routes.admin import keys as admin_keys
from treadle.gateway.routes.admin import losses as admin_losses
from treadle.gateway.routes.admin import named_losses as admin_named_losses
from treadle.gateway.routes.admin import pools as admin_pools
from treadle.gateway.routes.admin import projects as admin_projects
from treadle.gateway.routes.admin import queue as admin_queue
from treadle.gateway.routes.admin import quotas as admin_quotas
from treadle.gateway.routes.admin import records as admin_records
from treadle.gateway.routes.admin import runs as admin_runs
from treadle.gateway.routes.admin import tenants as admin_tenants
from treadle.masking import masked

# Routes are tried in order; the busy ones come first.
RESOURCES = (
    training,
    futures,
    sessions,
    sampling,
    models,
    service,
    checkpoints,
    external,
    runs,
    account,
    custom_losses,
    losses,
    named_losses,
    projects,
    quotas,
    openai,
    anthropic,
    clock,
    tokenizers,
    legacy,
    admin_tenants,
    admin_keys,
    admin_quotas,
    admin_losses,
    admin_named_losses,
    admin_pools,
    admin_runs,
    admin_checkpoints,
    admin_projects,
    admin_records,
    admin_queue,
)
ENDPOINTS = tuple(endpoint for resource in RESOURCES for endpoint in resource.router.endpoints)


def create_app(deps: GatewayDeps) -> FastAPI:
    """The app over `deps`, ready for any ASGI server. Its lifespan must run: it starts and stops the futures hub."""
    gateway = Gateway(deps)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.start()
        try:
            yield
        finally:
            await gateway.stop()

    # No interactive docs: their pages load scripts from elsewhere, and the API's client is the SDK.
    app = FastAPI(
        title="treadle",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        routes=[route for resource in RESOURCES for route in resource.router.routes],
        middleware=_middleware(deps, gateway),
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )
    app.state.gateway = gateway
    document = api_document()
    # FastAPI serves it at /openapi.json.
    app.openapi = lambda: document  # type: ignore[method-assign]
    return app


def api_document() -> dict[str, Any]:
    """The OpenAPI document, the same for every server of this version."""
    return openapi_document(ENDPOINTS, title="treadle", version=__version__)


def _middleware(deps: GatewayDeps, gateway: Gateway) -> list[Middleware]:
    """Outermost first."""
    layers = [Middleware(ErrorMiddleware, metrics=deps.metrics, body_room=gateway.body_room)]
    if deps.settings.root_path:
        layers.append(Middleware(PrefixMiddleware, root_path=deps.settings.root_path))
    return layers


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses: an unknown path or method."""
    assert isinstance(error, HTTPException)
    detail = str(error.detail)
    if error.status_code == 404:
        detail = f"{request.method} {request.url.path[:200]} is not an endpoint of this server (treadle {__version__})"
    elif error.status_code == 405:
        detail = f"{request.url.path[:200]} does not take {request.method}"
    body = {"detail": masked(detail), "category": "user"}
    return json_response(body, status=error.status_code, headers=error.headers)
