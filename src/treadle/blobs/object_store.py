"""Blobs as objects of a bucket (S3 and what speaks its protocol, Google Cloud Storage), through obstore.

It refuses to know rows, checkpoints and formats, and the credentials: obstore takes those from the environment, as the
provider's own tools do, or asks for those of a file (bucket_urls.py). Invariant: an object under its key is complete;
the service makes a finished upload visible at once, and keeps nothing readable of one that did not finish.

A small object is created on the condition that its key is free. An upload in parts knows no such condition, so a
large one is preceded by a look: of two writers that name one large blob at the same moment, both could succeed.
Keys are drawn at random (R3 of the log), so only a bug of ours could make that happen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from treadle.blobs.base import BlobInfo, checked_key
from treadle.blobs.bucket_urls import BucketUrl, parse_bucket_url, read_credentials
from treadle.errors import ConfigError, NotFound, ServerError, StoreUnavailable
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# Above this an upload goes in parts of PART_BYTES: one that fails is repeated by the part, and parts go side by side.
# S3 takes at most 10,000 parts, so this bounds a blob at 320 GB.
PART_BYTES = 32 * 2**20
# How long the library repeats a request on its own. Callers have their own patience, and a client waits for some.
RETRY_S = 10.0


class ObjectBlobs:
    """A `BlobStore` in a bucket, below the prefix that the obstore store was opened with. Thread-safe."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @staticmethod
    def at(url: str) -> ObjectBlobs:
        """The blobs below s3://BUCKET/PREFIX or gs://BUCKET/PREFIX, with the options of bucket_urls.py.

        Nothing is connected yet. Raises ConfigError.
        """
        place = parse_bucket_url(url)
        options = _options_of(place)
        try:
            return ObjectBlobs(
                from_url(place.bare, retry_config={"retry_timeout": timedelta(seconds=RETRY_S)}, **options)
            )
        except (BaseError, ValueError) as error:
            raise ConfigError(f"blobs cannot be kept at {place.bare!r}: {_first_line(error)}") from error

    def write(self, key: str, data: bytes | bytearray | memoryview) -> int:
        """See `BlobStore.write`; for large blobs see the module."""
        checked_key(key)
        view = memoryview(data).cast("B")
        is_large = view.nbytes > PART_BYTES
        with _translated("write"):
            try:
                if not is_large:
                    obstore.put(self._store, key, view, mode="create", use_multipart=False)
                elif not self._is_there(key):
                    obstore.put(self._store, key, view, use_multipart=True, chunk_size=PART_BYTES)
                else:
                    raise _exists_already(key)
            except AlreadyExistsError as error:
                raise _exists_already(key) from error
        return view.nbytes

    def read(self, key: str) -> bytes:
        """See `BlobStore.read`."""
        checked_key(key)
        with self._looking_for(key, "read"):
            return bytes(obstore.get(self._store, key).bytes())

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """See `BlobStore.read_range`."""
        checked_key(key)
        assert 0 <= start < stop
        with self._looking_for(key, "read"):
            return bytes(obstore.get(self._store, key, options={"range": (start, stop)}).bytes())

    def exists(self, key: str) -> bool:
        """See `BlobStore.exists`."""
        checked_key(key)
        try:
            with self._looking_for(key, "look up"):
                obstore.head(self._store, key)
        except NotFound:
            return False
        return True

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        checked_key(key)
        with self._looking_for(key, "look up"):
            return obstore.head(self._store, key)["size"]

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        checked_key(key)
        with _translated("delete"), suppress(FileNotFoundError):
            obstore.delete(self._store, key)

    def iter_keys(self, prefix: str = "") -> Iterator[str]:
        """See `BlobStore.iter_keys`. These services list in the order of the keys."""
        return (blob.key for blob in self.iter_blobs(prefix))

    def iter_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See `BlobStore.iter_blobs`."""
        # The library's prefixes are whole segments.
        folder, _, _ = prefix.rpartition("/")
        with _translated("list"):
            for page in obstore.list(self._store, folder or None):
                for found in page:
                    if found["path"].startswith(prefix):
                        yield BlobInfo(found["path"], found["size"], found["last_modified"].timestamp())

    def drop_unfinished(self, *, older_than_s: float) -> int:
        """See `BlobStore.drop_unfinished`: nothing here, a bucket's own rules end uploads that were not finished."""
        del older_than_s
        return 0

    def path_of(self, key: str) -> Path | None:
        """See `BlobStore.path_of`: there is no local file."""
        checked_key(key)
        return None

    @contextmanager
    def _looking_for(self, key: str, what: str) -> Iterator[None]:
        """`_translated`; a missing object is NotFound, unless the bucket is missing."""
        with _translated(what, key):
            try:
                yield
            except FileNotFoundError as error:
                # Raises where there is no bucket, which looks the same to a read. It is a rare question.
                next(iter(obstore.list(self._store, chunk_size=1)), None)
                raise NotFound(f"there is no blob {key}") from error

    def _is_there(self, key: str) -> bool:
        try:
            obstore.head(self._store, key)
        except FileNotFoundError:
            return False
        return True


def _options_of(place: BucketUrl) -> dict[str, Any]:
    """What a bucket's URL says, as obstore takes it. Raises ConfigError for a file without credentials."""
    options: dict[str, Any] = {}
    config = {"aws_endpoint": place.endpoint, "aws_region": place.region}
    if any(config.values()):
        options["config"] = {name: value for name, value in config.items() if value is not None}
    if place.endpoint is not None and place.endpoint.startswith("http://"):
        options["client_options"] = {"allow_http": True}
    if place.credentials_file is not None:
        file = place.credentials_file
        read_credentials(file)
        options["credential_provider"] = lambda: read_credentials(file)
    return options


def _exists_already(key: str) -> ServerError:
    return ServerError(f"blob {key} exists already; blobs are never overwritten")


@contextmanager
def _translated(what: str, key: str | None = None) -> Iterator[None]:
    """obstore's errors as ours. Details are logged: they may hold URLs."""
    try:
        yield
    except (BaseError, OSError) as error:
        log.error("blob store failed", exc=error, what=what, key=key)
        raise StoreUnavailable(f"the blob store could not {what}: {type(error).__name__}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
