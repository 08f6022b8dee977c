"""Answers as bytes: JSON through orjson, finished results verbatim.

It knows no request. Invariant: what goes out here was encoded once; nothing is validated on the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import orjson
from starlette.responses import Response

JSON = "application/json"


def json_response(body: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`body` as JSON. Only plain JSON types; a NaN becomes null, so numbers must be checked before."""
    return Response(orjson.dumps(body), status_code=status, media_type=JSON, headers=headers)


def iso_time(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 with a zone, which the SDK's models insist on."""
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat()
