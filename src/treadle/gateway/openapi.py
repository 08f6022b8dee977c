"""The OpenAPI document, made from what routes say about themselves: their paths, bodies, answers and docstrings.

Nothing in it is written by hand, so it cannot part from the code; a test freezes it and compares real answers with it.
It refuses to know what any route does. Invariant: the same routes give the same document, byte for byte.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from treadle.gateway.routing import Endpoint

JSON = "application/json"
_REF = "#/components/schemas/{model}"
_PATH_PARAMETER = re.compile(r"{(\w+)(?::(\w+))?}")
_KEY_SCHEMES = {
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The header that the SDK sends."},
    "bearer": {"type": "http", "scheme": "bearer", "description": "The same key, for plain HTTP clients."},
}
_STATUSES = {
    302: "Where it is.",
    400: "A value that cannot be honoured; the text names it.",
    401: "No key, or one that nobody holds.",
    403: "Not with this key, token or URL; or the tenant is suspended, or no member of who may use the server.",
    404: "The id names nothing that the caller may see.",
    408: "Nothing to answer with yet; ask again.",
    410: "Gone: the session is finished, or the result is no longer kept.",
    413: "The body is over the server's limit.",
    429: "Too much of the caller's waits; send it again a little later.",
    503: "Not now: the server is stopping, a model is loading, or the database is away. Ask again.",
}
# What a route answers that asks for a key, that reads a body, and that does neither.
_OF_KEYED = (400, 401, 403, 404, 503)
_OF_BODIES = (413,)
_OF_ALL = (503,)

Schemas = Mapping[Any, Mapping[str, Any]]


def openapi_document(endpoints: Iterable[Endpoint], *, title: str, version: str) -> dict[str, Any]:
    """The document of these endpoints, in the order of their paths."""
    ordered = sorted(endpoints, key=lambda endpoint: (_openapi_path(endpoint.path), endpoint.method))
    schemas, definitions = models_json_schema(_models_of(ordered), ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    num_with_id: Counter[str] = Counter()
    for endpoint in ordered:
        path = paths.setdefault(_openapi_path(endpoint.path), {})
        operation = path[endpoint.method.lower()] = _operation(endpoint, schemas)
        # A handler may answer under several paths.
        num_with_id[operation["operationId"]] += 1
        if (number := num_with_id[operation["operationId"]]) > 1:
            operation["operationId"] += f"_{number}"
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": _DESCRIPTION},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {}), "securitySchemes": _KEY_SCHEMES},
    }


_DESCRIPTION = (
    "The Tinker API as the official SDK speaks it, treadle's own endpoints about waiting, and chat in the forms of "
    "OpenAI and Anthropic. Training ops and samples are answered with a future, whose result retrieve_future gives."
)


def _models_of(endpoints: Iterable[Endpoint]) -> list[tuple[type[BaseModel], JsonSchemaMode]]:
    models: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {}
    for endpoint in endpoints:
        for model in (endpoint.error, *endpoint.others.values()):
            models[model, "serialization"] = None
        if endpoint.body is not None:
            models[endpoint.body, "validation"] = None
        if endpoint.answer is not None:
            models[endpoint.answer, "serialization"] = None
    return list(models)


def _operation(endpoint: Endpoint, schemas: Schemas) -> dict[str, Any]:
    summary, description = _texts(endpoint)
    operation: dict[str, Any] = {
        "operationId": f"{_resource(endpoint)}_{endpoint.handler.__name__}_{endpoint.method.lower()}",
        "tags": [_resource(endpoint)],
        "summary": summary,
        "description": description,
        "responses": _responses(endpoint, schemas),
    }
    if parameters := [*_path_parameters(endpoint.path), *_query_parameters(endpoint)]:
        operation["parameters"] = parameters
    if (body := _body(endpoint, schemas)) is not None:
        operation["requestBody"] = body
    operation["security"] = [] if endpoint.is_public else [{"apiKey": []}, {"bearer": []}]
    return operation


def _texts(endpoint: Endpoint) -> tuple[str, str]:
    """The first sentence of the handler's docstring, and all of it."""
    text = " ".join((inspect.getdoc(endpoint.handler) or "").split())
    assert text, f"{endpoint.method} {endpoint.path} has no docstring"
    sentence, _, _ = text.partition(". ")
    return sentence.rstrip("."), text


def _resource(endpoint: Endpoint) -> str:
    return endpoint.handler.__module__.rpartition(".")[2]


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name, _converter in _PATH_PARAMETER.findall(path)
    ]


def _query_parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    if endpoint.query is None:
        return []
    schema = endpoint.query.model_json_schema(ref_template=_REF)
    required = set(schema.get("required", ()))
    parameters = []
    for name, field in schema.get("properties", {}).items():
        parameter = {"name": name, "in": "query", "required": name in required, "schema": field}
        if "description" in field:
            parameter["description"] = field["description"]
        parameters.append(parameter)
    return parameters


def _body(endpoint: Endpoint, schemas: Schemas) -> dict[str, Any] | None:
    content: dict[str, Any] = {}
    if endpoint.body is not None:
        content[JSON] = {"schema": dict(schemas[endpoint.body, "validation"])}
    if endpoint.body_type != JSON:
        content[endpoint.body_type] = {"schema": {"type": "string", "format": "binary"}}
    return {"required": True, "content": content} if content else None


def _responses(endpoint: Endpoint, schemas: Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.answer is not None:
        content[JSON] = {"schema": dict(schemas[endpoint.answer, "serialization"])}
    elif endpoint.answer_type == JSON:
        content[JSON] = {"schema": {"type": "object"}}
    if endpoint.answer_type != JSON:
        content[endpoint.answer_type] = {"schema": {"type": "string", "format": "binary"}}
    answers = {str(endpoint.status): {"description": _STATUSES.get(endpoint.status, "Done."), "content": content}}
    models = {**dict.fromkeys(_refusals(endpoint), endpoint.error), **endpoint.others}
    for status, model in sorted(models.items()):
        refusal = {JSON: {"schema": dict(schemas[model, "serialization"])}}
        answers[str(status)] = {"description": _STATUSES[status], "content": refusal}
    return answers


def _refusals(endpoint: Endpoint) -> list[int]:
    reads_body = endpoint.body is not None or endpoint.body_type != JSON
    return [*(_OF_ALL if endpoint.is_public else _OF_KEYED), *(_OF_BODIES if reads_body else ())]


def _openapi_path(path: str) -> str:
    return _PATH_PARAMETER.sub(r"{\1}", path)
