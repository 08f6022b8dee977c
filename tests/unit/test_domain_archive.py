"""Several files in one blob: written whole, found by ranges, readable by any tar program."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.domain.archive import MAX_MEMBERS, list_members, pack_files
from treadle.errors import InvalidRequest

files = st.dictionaries(
    st.text("abcdefgh._-0123456789", min_size=1, max_size=90), st.binary(max_size=2_000), min_size=1, max_size=5
)


@given(files)
def test_files_are_found_where_they_lie_and_by_tar(packed: dict[str, bytes]) -> None:
    data = pack_files(packed)
    members = list_members(lambda start, stop: data[start:stop])
    assert {one.name: data[one.offset : one.offset + one.num_bytes] for one in members} == packed
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        assert tar.getnames() == list(packed)
        for name, content in packed.items():
            member = tar.extractfile(name)
            assert member is not None
            assert member.read() == content


def test_no_more_is_read_than_the_heads() -> None:
    data = pack_files({"small": b"1", "large": bytes(100_000)})
    read: list[int] = []
    list_members(lambda start, stop: (read.append(stop - start), data[start:stop])[1])
    assert sum(read) <= 3 * 512


@pytest.mark.parametrize("cut", [0, 100, 512 + 3, 1_024, 1_500])
def test_an_archive_that_is_cut_off_is_refused(cut: int) -> None:
    data = pack_files({"a": bytes(600)})[:cut]
    with pytest.raises(InvalidRequest, match="damaged"):
        list_members(lambda start, stop: data[start:stop])


def test_an_archive_without_an_end_is_not_read_for_ever() -> None:
    head = pack_files({"a": b""})[:512]
    with pytest.raises(InvalidRequest, match=str(MAX_MEMBERS)):
        list_members(lambda start, stop: head)
