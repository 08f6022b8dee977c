"""From a configured place to a blob store. It knows which kinds exist, and nothing about blobs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

from treadle.blobs.base import BlobStore
from treadle.blobs.local import LocalBlobs
from treadle.errors import ConfigError

_BUCKET_SCHEMES = ("s3", "gs")


def open_blobs(place: str | Path, *, create: bool = True) -> BlobStore:
    """The blob store at a directory path, a file:// URL, or s3://BUCKET/PREFIX and gs://BUCKET/PREFIX with options.

    A directory is created when missing, unless `create` is False; a bucket is not looked at. Raises ConfigError for
    anything else, or without the library that a bucket needs, and StoreUnavailable when the directory cannot be used.
    """
    if isinstance(place, Path) or "://" not in place:
        return LocalBlobs(Path(place), create=create)
    parts = urlsplit(place)
    if parts.scheme in _BUCKET_SCHEMES and parts.netloc:
        return _open_bucket(place)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path:
        raise ConfigError(
            f"blobs cannot be kept at {place!r}: use a directory, file:///ABSOLUTE/DIRECTORY, s3://BUCKET/PREFIX or "
            "gs://BUCKET/PREFIX"
        )
    return LocalBlobs(Path(unquote(parts.path)), create=create)


def _open_bucket(url: str) -> BlobStore:
    try:
        module = import_module("treadle.blobs.object_store")
    except ModuleNotFoundError as error:
        raise ConfigError(f"blobs at {url!r} need the extra: pip install 'treadle[object-store]'") from error
    blobs: BlobStore = module.ObjectBlobs.at(url)
    return blobs
