"""What a worker does with blobs. Any blob store fits; the worker never learns which one it is."""

from __future__ import annotations

from typing import Protocol


class BlobIO(Protocol):
    def write(self, key: str, data: bytes) -> int:
        """Store `data` durably under a key never used before; the number of bytes. Never overwrites."""
        ...

    def read(self, key: str) -> bytes:
        """The bytes under `key`. Raises NotFound when there are none."""
        ...

    def exists(self, key: str) -> bool:
        """Whether `key` can be read."""
        ...
