"""Blobs as files below one directory.

It refuses to know rows, checkpoints and formats. Invariant: a file under its final name is complete and durable. A
write goes to a temporary file, is flushed to the disk, and only then gets its name through a hard link, which fails
where the name exists; the directories on the way are flushed too.

(obstore's LocalStore has the same atomicity but never flushes, so a power cut could leave a committed row that names
an empty blob. File systems without hard links are not supported.)
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from treadle.blobs.base import BlobInfo, checked_key
from treadle.errors import NotFound, ServerError, StoreUnavailable
from treadle.telemetry.logs import get_logger

log = get_logger(__name__)

# Unfinished writes live here; no key can start with a dot, so nothing in it is ever listed or read.
_INCOMING = ".incoming"
# An unfinished write older than this belongs to a process that is gone: no single write takes so long.
_ABANDONED_AFTER_S = 3_600.0


class LocalBlobs:
    """A `BlobStore` in a directory. Several processes may share it.

    create: make the directory when it is missing. Without that, a place that was never one is away, like one whose file
    system is not mounted.
    """

    def __init__(self, root: Path, *, create: bool = True) -> None:
        self._root = root.resolve()
        # Also what tells a place of blobs from the directory that another file system is mounted on.
        self._incoming = self._root / _INCOMING
        if create:
            with _translated("open"):
                self._incoming.mkdir(parents=True, exist_ok=True)
            self.drop_unfinished(older_than_s=_ABANDONED_AFTER_S)

    @property
    def root(self) -> Path:
        return self._root

    def write(self, key: str, data: bytes | bytearray | memoryview) -> int:
        """See `BlobStore.write`."""
        target = self._path(key)
        with _translated("write"):
            unfinished = self._incoming / secrets.token_hex(16)
            try:
                num_bytes = _write_durably(unfinished, data)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link_as_new(unfinished, target, key)
            finally:
                with suppress(FileNotFoundError):
                    unfinished.unlink()
            # Flushing a directory that did not change costs microseconds. All of them are flushed, because
            # another writer may have made one a moment ago and not flushed its parent yet.
            for directory in self._directories_of(target):
                _flush_directory(directory)
        return num_bytes

    def read(self, key: str) -> bytes:
        """See `BlobStore.read`."""
        with self._looking_for(key, "read"):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """See `BlobStore.read_range`."""
        assert 0 <= start < stop
        with self._looking_for(key, "read"), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def exists(self, key: str) -> bool:
        """See `BlobStore.exists`."""
        path = self._path(key)
        try:
            with self._looking_for(key, "look up"):
                _stat_of_file(path)
        except NotFound:
            return False
        return True

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        with self._looking_for(key, "look up"):
            return _stat_of_file(self._path(key)).st_size

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`. Emptied directories stay, since another writer may be about to use them."""
        with _translated("delete"), suppress(FileNotFoundError, NotADirectoryError):
            self._path(key).unlink()

    def iter_keys(self, prefix: str = "") -> Iterator[str]:
        """See `BlobStore.iter_keys`. One directory is read at a time, so memory is bounded by the largest."""
        return (key for key, _entry in self._files_below(self._root, "", prefix))

    def iter_blobs(self, prefix: str = "") -> Iterator[BlobInfo]:
        """See `BlobStore.iter_blobs`."""
        for key, entry in self._files_below(self._root, "", prefix):
            try:
                with self._looking_for(key, "list"):
                    found = entry.stat()
            except NotFound:
                continue
            yield BlobInfo(key, found.st_size, found.st_mtime)

    def drop_unfinished(self, *, older_than_s: float) -> int:
        """See `BlobStore.drop_unfinished`. Ages are measured against the wall clock of the machine that wrote."""
        oldest = time.time() - older_than_s
        num_dropped = 0
        with _translated("clean up"), os.scandir(self._incoming) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.stat().st_mtime < oldest:
                        os.unlink(entry.path)
                        num_dropped += 1
        return num_dropped

    def path_of(self, key: str) -> Path | None:
        """See `BlobStore.path_of`."""
        path = self._path(key)
        with self._looking_for(key, "look up"):
            _stat_of_file(path)
        return path

    @contextmanager
    def _looking_for(self, key: str, what: str) -> Iterator[None]:
        """`_translated`; a missing file is NotFound, unless all of them are missing."""
        with _translated(what, key):
            try:
                yield
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
                if not self._incoming.is_dir():
                    # Its file system is not mounted. Whoever took that for the end of a snapshot would forget it.
                    log.error("blob store is away", directory=str(self._root))
                    raise StoreUnavailable("the blob store is away: its directory is not there") from error
                raise NotFound(f"there is no blob {key}") from error

    def _path(self, key: str) -> Path:
        path = self._root / checked_key(key)
        assert path.is_relative_to(self._root)
        return path

    def _directories_of(self, target: Path) -> Iterator[Path]:
        directory = target.parent
        while directory != self._root:
            yield directory
            directory = directory.parent
        yield self._root

    def _files_below(self, directory: Path, base: str, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        with _translated("list"):
            try:
                with os.scandir(directory) as scanned:
                    # A directory sorts as "name/", so that the keys come out in plain string order.
                    entries = sorted((entry.name + "/" * entry.is_dir(), entry) for entry in scanned)
            except FileNotFoundError:
                if directory == self._root:
                    raise
                return
        for name, entry in entries:
            key = base + name
            if name.startswith("."):
                continue
            if not name.endswith("/"):
                if key.startswith(prefix):
                    yield key, entry
            elif key.startswith(prefix) or prefix.startswith(key):
                yield from self._files_below(Path(entry.path), key, prefix)


def _stat_of_file(path: Path) -> os.stat_result:
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError
    return found


def _write_durably(path: Path, data: bytes | bytearray | memoryview) -> int:
    with path.open("xb") as file:
        num_bytes = file.write(data)
        file.flush()
        os.fsync(file.fileno())
    assert num_bytes == memoryview(data).nbytes
    return num_bytes


def _link_as_new(source: Path, target: Path, key: str) -> None:
    try:
        os.link(source, target)
    except FileExistsError as error:
        raise ServerError(f"blob {key} exists already; blobs are never overwritten") from error


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translated(what: str, key: str | None = None) -> Iterator[None]:
    """OSErrors as ours. A path is logged but never part of a message."""
    try:
        yield
    except OSError as error:
        log.error("blob store failed", exc=error, what=what, key=key)
        raise StoreUnavailable(f"the blob store could not {what}: {error.strerror or type(error).__name__}") from error
