"""Bytes that outlive the process that made them, without a disk: files in memory of this machine, by blob key.

A directory in shared memory holds one folder per process that stages. Whoever has a folder's lock owns what is in it:
the process that made it, and when that has died, whoever takes the lock next. So nothing moves when an owner dies, and
readers, which look through all folders, need to know nobody. It refuses to know blob stores, and what the bytes mean.
Invariants: a file under its final name is complete; nobody but this user can read or plant one; only the owner of a
folder removes from it. Only the standard library is needed, so that any process of the machine can read.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")
_PLACE = "treadle-"
# In a staging directory: which blobs it is for.
_WHAT_FOR = "for"
LEFT_FOR_GOOD_AFTER_S = 3_600.0
_FOLDER = "w-"
# A folder without its lock yet, and a file that is not complete yet.
_UNFINISHED = "."
# Takes the place of the slashes of a key; no key has it.
_SLASH = "+"
# Of the whole file system: what else lives there (other programs' shared memory) must not meet its end here.
KEPT_FREE_SHARE = 0.1
# A folder gets its name microseconds after it was made.
UNFINISHED_AFTER_S = 60.0
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def staging_place(blobs_url: str, otherwise: Path) -> Path:
    """The directory for what is on its way to these blobs: in shared memory, or `otherwise` where there is none.

    All servers of this machine and user that share the blobs get the same one, so that whoever comes next finds what
    was left behind. It is made here; where somebody else has taken the name, it is `otherwise` as well. Places that
    were left for good go, untouched for an hour: empty ones, and those of a directory of blobs that is not there any
    more.
    """
    name = hashlib.sha256(blobs_url.encode()).hexdigest()[:16]
    place = SHARED_MEMORY / f"{_PLACE}{os.geteuid()}-{name}"
    try:
        area = StagingArea(place)
    except ConfigError:
        return otherwise
    with suppress(OSError):  # without the note it is only not swept
        area.note_what_it_is_for(blobs_url)
    area.close(keeps_empty=True)
    for other in SHARED_MEMORY.glob(f"{_PLACE}{os.geteuid()}-*"):
        if other != place:
            _remove_if_left_for_good(other)
    return place


def _remove_if_left_for_good(place: Path) -> None:
    with suppress(OSError, ConfigError):
        if time.time() - max(one.stat().st_mtime for one in (place, *place.iterdir())) < LEFT_FOR_GOOD_AFTER_S:
            return
        blobs = (place / _WHAT_FOR).read_text()
        is_empty = os.listdir(place) == [_WHAT_FOR]
        if not is_empty and (not blobs.startswith("/") or Path(blobs).exists()):
            return
        area = StagingArea(place)
        for folder in area.take_abandoned():
            for file in folder.open_all():
                folder.remove(file.key)
                file.close()
            area.give_up(folder)
        area.close()


class StagedFile:
    """A complete file that is held open: its bytes can be read whatever becomes of its name. For one thread."""

    def __init__(self, key: str, num_bytes: int, descriptor: int) -> None:
        self.key = key
        self.num_bytes = num_bytes
        self._descriptor = descriptor

    def read(self) -> bytes:
        """All of it. Raises OSError."""
        data = bytearray(self.num_bytes)
        num_read = 0
        while num_read < self.num_bytes:
            count = os.preadv(self._descriptor, [memoryview(data)[num_read:]], num_read)
            if count == 0:
                raise OSError(f"a staged file ends after {num_read} of {self.num_bytes} bytes")
            num_read += count
        return bytes(data)

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder whose lock this process holds. `close` gives it up; its descriptor carries the lock."""

    name: str
    descriptor: int

    def put(self, key: str, data: bytes) -> StagedFile:
        """Stage `data` under a fresh key: readable by all at once, or not at all. Raises OSError."""
        unfinished = _UNFINISHED + secrets.token_hex(8)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(unfinished, flags, 0o600, dir_fd=self.descriptor)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.rename(unfinished, _name_of(key), src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            os.close(descriptor)
            self._unlink(unfinished)
            raise
        return StagedFile(key, len(data), descriptor)

    def open_all(self) -> list[StagedFile]:
        """Every complete file in it; what was not complete is removed. Raises OSError."""
        found = []
        for name in sorted(_listed(self.descriptor)):
            if name.startswith(_UNFINISHED):
                self._unlink(name)
                continue
            descriptor = os.open(name, _OPEN_FILE, dir_fd=self.descriptor)
            found.append(StagedFile(_key_of(name), os.fstat(descriptor).st_size, descriptor))
        return found

    def remove(self, key: str) -> None:
        """Idempotent."""
        self._unlink(_name_of(key))

    def _unlink(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)


class StagingArea:
    """The directory that the processes of one machine share. Thread-safe: it has no state but an open directory."""

    def __init__(self, root: Path) -> None:
        """Makes the directory if it is not there. Raises ConfigError when others can get at what is in it."""
        self._path = root
        try:
            with suppress(FileExistsError):
                root.mkdir(mode=0o700)
            self._root = os.open(root, _OPEN_FOLDER)
        except OSError as error:
            raise ConfigError(f"staging directory {root} cannot be used: {error.strerror}") from error
        found = os.fstat(self._root)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            os.close(self._root)
            raise ConfigError(
                f"staging directory {root} must belong to the server's user alone (mode 0700): weights lie in it"
            )

    def new_folder(self) -> Folder:
        """A folder of this process's own, locked for as long as it lives. Raises OSError."""
        name = f"{os.getpid()}-{secrets.token_hex(8)}"
        os.mkdir(_UNFINISHED + name, 0o700, dir_fd=self._root)
        descriptor = os.open(_UNFINISHED + name, _OPEN_FOLDER, dir_fd=self._root)
        # Others look only at folders that have a name, and this one gets it with its lock.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(_UNFINISHED + name, _FOLDER + name, src_dir_fd=self._root, dst_dir_fd=self._root)
        return Folder(_FOLDER + name, descriptor)

    def take_abandoned(self) -> Iterator[Folder]:
        """Folders whose owners have died, now this process's own. Raises OSError."""
        self._drop_unfinished_folders()
        for name in self._folders():
            try:
                descriptor = os.open(name, _OPEN_FOLDER, dir_fd=self._root)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            yield Folder(name, descriptor)

    def give_up(self, folder: Folder) -> None:
        """Let go of a folder; what is still in it is anybody's. An empty one goes. Call it once."""
        with suppress(OSError):  # not empty, or gone already
            os.rmdir(folder.name, dir_fd=self._root)
        os.close(folder.descriptor)

    def read(self, key: str) -> bytes | None:
        """What any process of this machine has staged under `key`; None when none has. Raises OSError."""
        name = _name_of(key)
        for folder in self._folders():
            try:
                descriptor = os.open(f"{folder}/{name}", _OPEN_FILE, dir_fd=self._root)
            except FileNotFoundError:
                continue
            with os.fdopen(descriptor, "rb") as file:
                return file.read()
        return None

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether its file system holds so much more and stays clear of its end. Raises OSError."""
        found = os.statvfs(self._root)
        return num_bytes <= found.f_bavail * found.f_frsize - KEPT_FREE_SHARE * found.f_blocks * found.f_frsize

    def close(self, *, keeps_empty: bool = False) -> None:
        """Let go of the directory, which goes if nothing is in it. Call it once, when nothing reads any more."""
        if not keeps_empty:
            with suppress(OSError):
                if _listed(self._root) == [_WHAT_FOR]:
                    os.unlink(_WHAT_FOR, dir_fd=self._root)
                self._path.rmdir()
        os.close(self._root)

    def note_what_it_is_for(self, blobs_url: str) -> None:
        """Leave a note, for whoever finds the directory without an owner. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(_WHAT_FOR, flags, 0o600, dir_fd=self._root), "w") as note:
            note.write(blobs_url)

    def _drop_unfinished_folders(self) -> None:
        """Those whose makers died before they had a name; nothing is in them."""
        for name in _listed(self._root):
            if name.startswith(_UNFINISHED):
                with suppress(OSError):
                    if time.time() - os.stat(name, dir_fd=self._root).st_mtime > UNFINISHED_AFTER_S:
                        os.rmdir(name, dir_fd=self._root)

    def _folders(self) -> list[str]:
        return [name for name in _listed(self._root) if name.startswith(_FOLDER)]


def _listed(directory: int) -> list[str]:
    """The names in an open directory, through a descriptor of its own: threads that list one share its position."""
    own = os.open(".", _OPEN_FOLDER, dir_fd=directory)
    try:
        return os.listdir(own)
    finally:
        os.close(own)


def _name_of(key: str) -> str:
    return key.replace("/", _SLASH)


def _key_of(name: str) -> str:
    return name.replace(_SLASH, "/")
