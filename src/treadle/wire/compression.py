"""Request bodies as they came over HTTP to the bytes that the client meant.

Invariant: never more than the limit comes out, whatever a frame declares. Both formats are decompressed as a stream
and stopped at the first byte too many; and a body that was cut short is refused, never read as a shorter one.
"""

from __future__ import annotations

import zlib
from io import BytesIO

import zstandard

from treadle.errors import BodyTooLarge, InvalidRequest, UnreadableBody

_PIECE_BYTES = 2**20
# zlib: 16 selects the gzip container, 15 the largest window.
_GZIP_WBITS = 16 + 15


def decompress(body: bytes, content_encoding: str | None, *, limit: int) -> bytes:
    """`body` undone by its Content-Encoding: zstd, gzip, or none.

    Raises BodyTooLarge when more than `limit` bytes come out, UnreadableBody for a damaged or truncated body,
    InvalidRequest for another encoding.
    """
    encoding = (content_encoding or "identity").strip().lower()
    match encoding:
        case "zstd":
            return _from_zstd(body, limit)
        case "gzip" | "x-gzip":
            return _from_gzip(body, limit)
        case "identity" | "":
            if len(body) > limit:
                raise _too_large(limit)
            return body
        case _:
            raise InvalidRequest(f"Content-Encoding {encoding[:80]!r} is not supported; send zstd, gzip or none")


def declared_bytes(body: bytes, content_encoding: str) -> int | None:
    """How many bytes `decompress` returns, where the body says so. One that lies about it is refused there."""
    if content_encoding.strip().lower() != "zstd":
        return None
    try:
        declared = zstandard.frame_content_size(body)
    except zstandard.ZstdError:
        return None
    return declared if declared >= 0 else None


def _from_zstd(body: bytes, limit: int) -> bytes:
    try:
        declared = zstandard.frame_content_size(body)
        # The declared size may refuse a body early; it is never trusted to admit one.
        if declared > limit:
            raise _too_large(limit)
        if 0 < declared <= _PIECE_BYTES:
            # One call for the usual small body. It ends at the declared size, and with an error when that was wrong.
            return zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
        data = _bounded_zstd(body, limit)
        is_whole = len(data) == declared if declared >= 0 else _is_one_whole_frame(body)
    except zstandard.ZstdError:
        raise UnreadableBody("the body is not valid zstd, is truncated, or holds more than one frame") from None
    if not is_whole:
        raise UnreadableBody("the zstd body is truncated, or holds more than one frame")
    return data


def _bounded_zstd(body: bytes, limit: int) -> bytes:
    pieces: list[bytes] = []
    num_bytes = 0
    # Reading across frames turns trailing bytes into an error or a wrong length instead of dropping them.
    with zstandard.ZstdDecompressor().stream_reader(BytesIO(body), read_across_frames=True) as reader:
        while piece := reader.read(_PIECE_BYTES):
            num_bytes += len(piece)
            if num_bytes > limit:
                raise _too_large(limit)
            pieces.append(piece)
    return b"".join(pieces)


def _is_one_whole_frame(body: bytes) -> bool:
    """Whether a frame of undeclared size ends where the body ends. Its output is known to be within the limit."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    frame.decompress(body)
    return frame.eof and not frame.unused_data


def _from_gzip(body: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj(_GZIP_WBITS)
    try:
        data = stream.decompress(body, limit + 1)
    except zlib.error:
        raise UnreadableBody("the body is not valid gzip") from None
    if len(data) > limit:
        raise _too_large(limit)
    if not stream.eof or stream.unused_data:
        raise UnreadableBody("the gzip body is truncated, or holds more than one member")
    return data


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes; send fewer datums per request")
