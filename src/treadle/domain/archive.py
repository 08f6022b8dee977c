"""Several files in one blob: an uncompressed tar, written whole, read one file at a time by ranges.

It refuses to know what the files are and where the blob lies. Invariant: what `pack_files` wrote, `list_members` finds,
and any tar program unpacks.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from treadle.errors import InvalidRequest

# No archive of ours has more files; a damaged one must not be read for ever.
MAX_MEMBERS = 64
_EMPTY = bytes(tarfile.BLOCKSIZE)
ARCHIVE_END = 2 * _EMPTY

# The bytes [start, stop) of a blob; fewer only at its end.
ReadRange = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive: where its bytes lie in the blob."""

    name: str
    offset: int
    num_bytes: int


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """The archive of these files, in their order. The same files give the same bytes."""
    assert 1 <= len(files) <= MAX_MEMBERS
    parts: list[bytes] = []
    for name, data in files.items():
        parts += (member_head(name, len(data)), data, member_tail(len(data)))
    return b"".join([*parts, ARCHIVE_END])


def member_head(name: str, num_bytes: int) -> bytes:
    """What stands in front of a file of this size in an archive."""
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    return info.tobuf(tarfile.GNU_FORMAT)


def member_tail(num_bytes: int) -> bytes:
    """What stands behind a file of this size in an archive."""
    return bytes(-num_bytes % tarfile.BLOCKSIZE)


def list_members(read: ReadRange) -> tuple[Member, ...]:
    """The files of an archive, in its order. Reads one block per file. Raises InvalidRequest when it is damaged."""
    members: list[Member] = []
    offset = 0
    while len(members) <= MAX_MEMBERS:
        block = read(offset, offset + tarfile.BLOCKSIZE)
        if block == _EMPTY:
            return tuple(members)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise InvalidRequest("the files of this checkpoint cannot be read: its archive is damaged") from error
        offset += tarfile.BLOCKSIZE
        members.append(Member(info.name, offset, info.size))
        offset += info.size + len(member_tail(info.size))
    raise InvalidRequest(f"the files of this checkpoint cannot be read: there are more than {MAX_MEMBERS}")
