"""Files of checkpoints under URLs that work without a key for a while, and the bytes behind them.

A URL is this server's own, with a token that names the checkpoint, its blob and the file. A blob store that signs URLs
by itself could take over `file_urls` and `archive_url`, but for the end of a sharing; nothing else would change. It
refuses to know who may have a URL: routes decide that, once, when they hand it out.
Invariant: a URL serves the bytes that it was made for or nothing: not what took the checkpoint's name later, and
nothing once the checkpoint is gone, is no longer shared with the reader whom a project gave the URL, or while that
reader is suspended; the owner is the reader of what is nobody else's.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from treadle.blobs import BlobStore
from treadle.domain.adapter_file import LazyFile, Span, peft_directory
from treadle.domain.archive import ARCHIVE_END, ReadRange, list_members, member_head, member_tail
from treadle.domain.ids import BlobKey, CheckpointKind, TenantId
from treadle.domain.limits import DOWNLOAD_CHUNK_BYTES, SIGNED_URL_LIFE_S
from treadle.domain.records import CheckpointRecord
from treadle.errors import Forbidden
from treadle.gateway.context import Gateway
from treadle.gateway.signing import BadToken

PREFIX = "/external"
ARCHIVE_NAME = "checkpoint.tar.gz"
# SDKs before 0.36 take an archive without this file for one that was cut off.
COMPLETE_NAME = "checkpoint_complete"
_FILE = "external file"
_ARCHIVE = "archive"
# Level 0 of gzip: weights do not get smaller, and every other level would cost seconds of CPU per gigabyte.
_GZIP_LEVEL, _GZIP_FORMAT = 0, 31


@dataclass(frozen=True, slots=True)
class SignedUrls:
    """URLs by file name, and when all of them end: epoch seconds."""

    by_name: dict[str, str]
    expires_at: float

    @property
    def expires(self) -> datetime:
        return datetime.fromtimestamp(self.expires_at, tz=UTC)


async def file_urls(gateway: Gateway, request: Request, record: CheckpointRecord, *, reader: TenantId) -> SignedUrls:
    """One URL per file of external weights, for this reader. Raises InvalidRequest when their archive is damaged."""
    assert record.kind is CheckpointKind.EXTERNAL
    members = await asyncio.to_thread(lambda: list_members(_reader(gateway.deps.blobs, record.blob_key)))
    expires_at = _end_of(gateway, record)
    urls = {}
    for member in members:
        data = _claims(record, reader) | {"file": member.name, "at": [member.offset, member.num_bytes]}
        token = await gateway.signer.sign(_FILE, data, expires_at=expires_at)
        urls[member.name] = _url(gateway, request, token, member.name)
    return SignedUrls(urls, expires_at)


async def archive_url(gateway: Gateway, request: Request, record: CheckpointRecord, *, reader: TenantId) -> SignedUrls:
    """The URL of an archive of the PEFT directory, for this reader.

    Raises InvalidRequest when the checkpoint cannot be exported.
    """
    await asyncio.to_thread(lambda: _directory(gateway.deps.blobs, record))
    expires_at = _end_of(gateway, record)
    token = await gateway.signer.sign(_ARCHIVE, _claims(record, reader), expires_at=expires_at)
    return SignedUrls({ARCHIVE_NAME: _url(gateway, request, token, ARCHIVE_NAME)}, expires_at)


async def served_file(gateway: Gateway, request: Request, token: str, name: str) -> Response:
    """The bytes behind a URL of this server. Raises Forbidden, in the same words for whatever is wrong with it."""
    if name == ARCHIVE_NAME and (claims := await _claimed(gateway, _ARCHIVE, token)) is not None:
        record = await _signed_record(gateway, claims)
        files = await asyncio.to_thread(lambda: _directory(gateway.deps.blobs, record))
        stream = _tar_gz(gateway.deps.blobs, record.blob_key, files)
        return _answer(request, stream, name, media_type="application/gzip")
    claims = await _claimed(gateway, _FILE, token)
    if claims is None or claims["file"] != name:
        raise _forbidden()
    record = await _signed_record(gateway, claims)
    offset, num_bytes = claims["at"]
    stream = _read(gateway.deps.blobs, record.blob_key, Span(offset, offset + num_bytes))
    return _answer(request, stream, name, num_bytes=num_bytes)


async def _claimed(gateway: Gateway, purpose: str, token: str) -> dict[str, Any] | None:
    try:
        return await gateway.signer.verify(purpose, token)
    except BadToken:
        return None


async def _signed_record(gateway: Gateway, claims: dict[str, Any]) -> CheckpointRecord:
    """The checkpoint that the URL was made for, if it is still there."""
    record = await gateway.store.checkpoints.find(claims["path"])
    if record is None or _digest(record.blob_key) != claims["blob"]:
        raise _forbidden()
    # Without a reader it is the owner's, or of something that was everybody's then.
    reader = claims.get("reader", record.tenant_id)
    if reader in gateway.policies.now.suspended and not record.public:
        raise _forbidden()
    if not await gateway.access.may_read_checkpoint(reader, record):
        raise _forbidden()
    return record


def _forbidden() -> Forbidden:
    return Forbidden("this URL is not valid, or not any more")


def _claims(record: CheckpointRecord, reader: TenantId) -> dict[str, Any]:
    claims = {"path": record.tinker_path, "blob": _digest(record.blob_key)}
    # Only where a project lets the reader have it: whoever gets a URL learns nothing else of who asked for it.
    return claims if record.tenant_id == reader or record.public else claims | {"reader": reader}


def _digest(key: BlobKey) -> str:
    """Stands for a blob's key in a URL, which says nothing about how blobs are kept."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _end_of(gateway: Gateway, record: CheckpointRecord) -> float:
    end = gateway.deps.clock.now() + SIGNED_URL_LIFE_S
    # Whole seconds, as in the token.
    return float(int(end if record.expires_at is None else min(end, record.expires_at)))


def _url(gateway: Gateway, request: Request, token: str, name: str) -> str:
    base = gateway.settings.public_url or str(request.base_url)
    return f"{base.rstrip('/')}{PREFIX}/{token}/{quote(name)}"


def _reader(blobs: BlobStore, key: BlobKey) -> ReadRange:
    return lambda start, stop: blobs.read_range(key, start, stop)


def _directory(blobs: BlobStore, record: CheckpointRecord) -> tuple[LazyFile, ...]:
    """The files of a checkpoint's PEFT directory, whatever its kind."""
    read = _reader(blobs, record.blob_key)
    if record.kind is not CheckpointKind.EXTERNAL:
        return peft_directory(read)
    return tuple(
        LazyFile(member.name, (Span(member.offset, member.offset + member.num_bytes),)) for member in list_members(read)
    )


def _tar_gz(blobs: BlobStore, key: BlobKey, files: Sequence[LazyFile]) -> Iterator[bytes]:
    """The archive, a piece at a time. Blocking."""
    compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_FORMAT)
    for file in (*files, LazyFile(COMPLETE_NAME, ())):
        yield compressor.compress(member_head(file.name, file.num_bytes))
        for piece in file.pieces:
            for part in (piece,) if isinstance(piece, bytes) else _read(blobs, key, piece):
                yield compressor.compress(part)
        yield compressor.compress(member_tail(file.num_bytes))
    yield compressor.compress(ARCHIVE_END) + compressor.flush()


def _read(blobs: BlobStore, key: BlobKey, span: Span) -> Iterator[bytes]:
    """A part of a blob, a chunk at a time. Blocking."""
    for start in range(span.start, span.stop, DOWNLOAD_CHUNK_BYTES):
        stop = min(start + DOWNLOAD_CHUNK_BYTES, span.stop)
        chunk = blobs.read_range(key, start, stop)
        # The length was promised in the headers; the client sees an answer that ends early.
        assert len(chunk) == stop - start, f"blob {key} ends before {stop}"
        yield chunk


def _answer(
    request: Request,
    stream: Iterator[bytes],
    name: str,
    *,
    media_type: str = "application/octet-stream",
    num_bytes: int | None = None,
) -> Response:
    # The URL is the credential: it must not stay in a proxy's cache.
    headers = {
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}",
        "Cache-Control": "private, no-store",
        "X-Content-Type-Options": "nosniff",
    }
    if num_bytes is not None:
        headers["Content-Length"] = str(num_bytes)
    if request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    # A plain iterator is read in threads.
    return StreamingResponse(stream, headers=headers, media_type=media_type)
