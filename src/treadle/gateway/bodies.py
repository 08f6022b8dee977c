"""Reading a request's body without ever holding more of it than the limit.

It knows sizes, not meaning: bytes go on to wire, which decodes them. Invariant: the limit is enforced on
the stream itself, so a missing or lying Content-Length changes nothing.
"""

from __future__ import annotations

from starlette.requests import Request

from treadle.errors import BodyTooLarge

# JSON bodies other than samples (which carry prompts) are small; anything larger is a mistake or an attack.
MAX_JSON_BYTES = 2**20


async def read_body(request: Request, *, limit_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as more than `limit_bytes` are announced or have arrived."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit_bytes:
        raise _too_large(limit_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > limit_bytes:
            raise _too_large(limit_bytes)
        if chunk:
            chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(
        f"the request body is larger than {limit_bytes} bytes, this server's limit; send smaller chunks"
    )
