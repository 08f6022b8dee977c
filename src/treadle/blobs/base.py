"""What a blob store promises, and which keys it takes.

A blob is an immutable byte string under a key like "models/SESSION:train:0/12.safetensors". This layer refuses to
know what the bytes mean or which database row names them. Invariant: a key, once readable, always yields the same
bytes until it is deleted, and what `write` returned for survives a power cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from treadle.errors import InvalidRequest

# Common file systems allow 255 bytes per name; object stores allow 1,024 bytes per key.
MAX_SEGMENT_CHARS = 200
MAX_KEY_CHARS = 1_000

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:\-]*")


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One blob of a listing. written_at: seconds since the epoch, by the clock of the medium."""

    key: str
    num_bytes: int
    written_at: float


class BlobStore(Protocol):
    """Blocking and thread-safe: async callers use `asyncio.to_thread`.

    Every method raises InvalidRequest for a malformed key and StoreUnavailable when the medium fails.
    """

    def write(self, key: str, data: bytes | bytearray | memoryview) -> int:
        """Store `data` durably under a fresh key; the number of bytes.

        Atomic: readers see all of it or nothing. Raises ServerError when the key exists, whatever its bytes.
        """
        ...

    def read(self, key: str) -> bytes:
        """The bytes under `key`. Raises NotFound when there are none."""
        ...

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) under `key`, fewer where it ends before; `start` lies inside. Raises NotFound."""
        ...

    def exists(self, key: str) -> bool:
        """Whether `key` can be read."""
        ...

    def size(self, key: str) -> int:
        """Bytes under `key`. Raises NotFound when there are none."""
        ...

    def delete(self, key: str) -> None:
        """Forget `key`. Idempotent."""
        ...

    def iter_keys(self, prefix: str = "") -> Iterator[str]:
        """All keys that start with `prefix` (any text, not only whole segments), in sorted order."""
        ...

    def iter_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """What `iter_keys` lists, with size and age. A blob that goes meanwhile may be missing."""
        ...

    def drop_unfinished(self, *, older_than_s: float) -> int:
        """Remove what writes left behind that ended half-way that long ago; how many. Idempotent.

        Nothing of them was ever readable. No write may take as long as `older_than_s`.
        """
        ...

    def path_of(self, key: str) -> Path | None:
        """The file that holds the blob, for readers that map it into memory; None when there is no local file.

        The file must not be written to. Raises NotFound when a local store has no such blob.
        """
        ...


def checked_key(key: str) -> str:
    """`key` itself when every segment is a plain name.

    Raises InvalidRequest for an empty key, an absolute one, "." or "..", hidden names, and anything too long.
    """
    segments = key.split("/")
    is_plain = all(_SEGMENT.fullmatch(segment) and len(segment) <= MAX_SEGMENT_CHARS for segment in segments)
    if not is_plain or len(key) > MAX_KEY_CHARS:
        raise InvalidRequest(
            f"blob key {key[:120]!r} is not allowed: use segments of 1 to {MAX_SEGMENT_CHARS} of letters, digits, "
            f"'.', '_', ':', '-', starting with a letter, digit or '_', joined by '/', at most {MAX_KEY_CHARS} in all"
        )
    return key
