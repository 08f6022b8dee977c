"""What only files can get wrong, and which places blobs can be kept in. The contract is test_blobs_contract.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from treadle.blobs import LocalBlobs, open_blobs
from treadle.blobs import local as local_module
from treadle.blobs.object_store import ObjectBlobs
from treadle.errors import ConfigError, NotFound, ServerError, StoreUnavailable


def files_below(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_blob_is_not_a_directory(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.write("a", b"1")
    blobs.write("b/c", b"2")
    for key in ("a/b", "b"):
        with pytest.raises((StoreUnavailable, ServerError)):
            blobs.write(key, b"3")
    assert (blobs.read("a"), blobs.read("b/c")) == (b"1", b"2")


def test_local_reader_gets_the_file(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.write("a/b", b"12")
    with pytest.raises(NotFound):
        blobs.path_of("a/c")
    path = blobs.path_of("a/b")
    assert path == tmp_path / "a" / "b"
    assert path.read_bytes() == b"12"


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = LocalBlobs(tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(local_module.os, "fsync", full)
        with pytest.raises(StoreUnavailable, match="No space left on device") as caught:
            blobs.write("a/b", b"12")
    assert str(tmp_path) not in str(caught.value)
    assert files_below(tmp_path) == []
    blobs.write("a/b", b"12")


def test_bytes_are_durable_before_the_name_and_the_name_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = LocalBlobs(tmp_path)
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def spy_fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        steps.append("flush " + (target.relative_to(tmp_path).as_posix() if target.is_dir() else "bytes"))
        fsync(descriptor)

    def spy_link(source: Path, target: Path) -> None:
        steps.append("name")
        link(source, target)

    monkeypatch.setattr(local_module.os, "fsync", spy_fsync)
    monkeypatch.setattr(local_module.os, "link", spy_link)
    blobs.write("a/b/c", b"12")
    assert steps == ["flush bytes", "name", "flush a/b", "flush a", "flush ."]


def test_abandoned_writes_are_removed_at_opening_and_fresh_ones_kept(tmp_path: Path) -> None:
    incoming = tmp_path / ".incoming"
    incoming.mkdir()
    (incoming / "old").write_bytes(b"x")
    os.utime(incoming / "old", (0, 0))
    (incoming / "new").write_bytes(b"x")
    blobs = LocalBlobs(tmp_path)
    assert files_below(tmp_path) == [".incoming/new"]
    assert list(blobs.iter_keys()) == []


def test_writer_killed_at_any_moment_leaves_whole_blobs_only(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4_096
    script = f"""
import sys
from pathlib import Path
from treadle.blobs import LocalBlobs
blobs = LocalBlobs(Path(sys.argv[1]))
data = bytes(range(256)) * {len(data) // 256}
for n in range(100_000):
    blobs.write(f"a/{{n}}", data)
    print(n, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(5)]
        writer.kill()
    blobs = LocalBlobs(tmp_path)
    found = list(blobs.iter_keys())
    assert {f"a/{n}" for n in acknowledged} <= set(found)
    assert all(blobs.read(key) == data for key in found)
    assert blobs.drop_unfinished(older_than_s=-1) <= 1
    assert files_below(tmp_path) == sorted(found)


def test_places_blobs_can_be_kept(tmp_path: Path) -> None:
    for place in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        blobs = open_blobs(place)
        assert isinstance(blobs, LocalBlobs)
        assert blobs.root == tmp_path / "a b"


@pytest.mark.parametrize("place", ["s3://bucket/some/prefix", "gs://bucket"])
def test_bucket_is_opened_without_being_asked_anything(place: str) -> None:
    assert isinstance(open_blobs(place), ObjectBlobs)


def test_bucket_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "treadle.blobs.object_store")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=re.escape("treadle[object-store]")):
        open_blobs("s3://bucket")


@pytest.mark.parametrize("place", ["s3://", "memory:///x", "file://host/x", "http://host/x"])
def test_unsupported_place_is_a_configuration_error(place: str) -> None:
    with pytest.raises(ConfigError, match="blobs cannot be kept"):
        open_blobs(place)


def test_place_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        open_blobs(tmp_path / "file")
