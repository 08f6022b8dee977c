"""Query strings, checked like bodies. It refuses to know what they ask for."""

from __future__ import annotations

from typing import TypeVar

from starlette.requests import Request

from treadle.wire.bodies import Body, checked_fields

_B = TypeVar("_B", bound=Body)


def query_of(request: Request, model: type[_B]) -> _B:
    """The query string as `model`; what it does not know is ignored. Raises InvalidRequest, naming the parameter."""
    return checked_fields(model, dict(request.query_params))
