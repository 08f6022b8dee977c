"""From a configured place to a blob store. It knows which kinds exist, and nothing about blobs."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from treadle.blobs.base import BlobStore
from treadle.blobs.local import LocalBlobs
from treadle.errors import ConfigError


def open_blobs(place: str | Path) -> BlobStore:
    """The blob store at a directory path or a file:// URL; the directory is created when missing.

    Raises ConfigError for any other scheme and StoreUnavailable when the directory cannot be used.
    """
    if isinstance(place, Path) or "://" not in place:
        return LocalBlobs(Path(place))
    parts = urlsplit(place)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path:
        raise ConfigError(f"blobs cannot be kept at {place!r}: use a directory or file:///ABSOLUTE/DIRECTORY")
    return LocalBlobs(Path(unquote(parts.path)))
