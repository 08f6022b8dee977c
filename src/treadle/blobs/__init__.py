"""Checkpoint and payload bytes under immutable keys. Start with `open_blobs`."""

from __future__ import annotations

from treadle.blobs.base import BlobInfo, BlobStore
from treadle.blobs.local import LocalBlobs
from treadle.blobs.opening import open_blobs

__all__ = ["BlobInfo", "BlobStore", "LocalBlobs", "open_blobs"]
