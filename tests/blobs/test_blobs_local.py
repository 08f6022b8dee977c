"""The contract of a blob store, on the local one, and what only files can get wrong."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from treadle.blobs import BlobStore, LocalBlobs, open_blobs
from treadle.blobs import local as local_module
from treadle.errors import ConfigError, InvalidRequest, NotFound, ServerError, StoreUnavailable


@pytest.fixture(params=["local"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    assert request.param == "local"
    return open_blobs(tmp_path / "blobs")


def files_below(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_written_blob_is_read_back(blobs: BlobStore) -> None:
    assert blobs.write("models/s1:train:0/12.safetensors", b"\x00bytes") == 6
    assert blobs.read("models/s1:train:0/12.safetensors") == b"\x00bytes"
    assert blobs.size("models/s1:train:0/12.safetensors") == 6
    assert blobs.exists("models/s1:train:0/12.safetensors")
    assert not blobs.exists("models/s1:train:0")


@pytest.mark.parametrize("data", [b"", bytearray(b"abc"), memoryview(b"abcd")[1:]])
def test_any_kind_of_bytes_can_be_written(blobs: BlobStore, data: bytes | bytearray | memoryview) -> None:
    assert blobs.write("a", data) == len(data)
    assert blobs.read("a") == bytes(data)


def test_blob_is_never_overwritten(blobs: BlobStore) -> None:
    blobs.write("a/b", b"first")
    for data in (b"second", b"first"):
        with pytest.raises(ServerError, match="exists already"):
            blobs.write("a/b", data)
    assert blobs.read("a/b") == b"first"


def test_one_of_many_writers_of_a_key_wins(blobs: BlobStore) -> None:
    barrier = threading.Barrier(8)

    def write(n: int) -> int | None:
        barrier.wait()
        try:
            blobs.write("raced/key", bytes([n]) * 10_000)
        except ServerError:
            return None
        return n

    with ThreadPoolExecutor(8) as pool:
        winners = [n for n in pool.map(write, range(8)) if n is not None]
    assert len(winners) == 1
    assert blobs.read("raced/key") == bytes([winners[0]]) * 10_000


def test_missing_blob_is_not_found(blobs: BlobStore) -> None:
    blobs.write("a/b", b"")
    for key in ("c", "a/c", "a", "a/b/c"):
        for method in (blobs.read, blobs.size, blobs.path_of):
            with pytest.raises(NotFound):
                method(key)
        assert not blobs.exists(key)


def test_blob_is_not_a_directory(blobs: BlobStore) -> None:
    blobs.write("a", b"1")
    blobs.write("b/c", b"2")
    for key in ("a/b", "b"):
        with pytest.raises((StoreUnavailable, ServerError)):
            blobs.write(key, b"3")
    assert (blobs.read("a"), blobs.read("b/c")) == (b"1", b"2")


def test_deletion_is_final_and_idempotent(blobs: BlobStore) -> None:
    blobs.write("a/b", b"1")
    blobs.delete("a/b")
    blobs.delete("a/b")
    blobs.delete("never/was")
    assert not blobs.exists("a/b")
    blobs.write("a/b", b"2")
    assert blobs.read("a/b") == b"2"


def test_keys_are_listed_in_order_by_prefix(blobs: BlobStore) -> None:
    keys = ["a-b", "a.b/c", "a/b/c", "a/b/d", "ab/c", "b"]
    for key in reversed(keys):
        blobs.write(key, b"")
    assert list(blobs.iter_keys()) == sorted(keys)
    assert list(blobs.iter_keys("a/")) == ["a/b/c", "a/b/d"]
    assert list(blobs.iter_keys("a/b/d")) == ["a/b/d"]
    assert list(blobs.iter_keys("a")) == sorted(key for key in keys if key.startswith("a"))
    assert list(blobs.iter_keys("zz")) == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "a//b",
        "a/",
        "../a",
        "a/../../b",
        "a/./b",
        ".hidden",
        "a/.incoming",
        "a\\b",
        "a\nb",
        "a b",
        "ä",
        "a\x00",
        "x" * 201,
        "/".join(["x" * 100] * 11),
    ],
)
def test_malformed_key_is_refused_everywhere(blobs: BlobStore, key: str, tmp_path: Path) -> None:
    for method in (blobs.read, blobs.exists, blobs.size, blobs.delete, blobs.path_of):
        with pytest.raises(InvalidRequest, match="blob key"):
            method(key)
    with pytest.raises(InvalidRequest, match="blob key"):
        blobs.write(key, b"")
    assert files_below(tmp_path) == []


def test_local_reader_gets_the_file(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.write("a/b", b"12")
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


def test_places_blobs_can_be_kept(tmp_path: Path) -> None:
    for place in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        blobs = open_blobs(place)
        assert isinstance(blobs, LocalBlobs)
        assert blobs.root == tmp_path / "a b"


@pytest.mark.parametrize("place", ["s3://bucket/x", "file://host/x", "http://host/x"])
def test_unsupported_place_is_a_configuration_error(place: str) -> None:
    with pytest.raises(ConfigError, match="blobs cannot be kept"):
        open_blobs(place)


def test_place_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        open_blobs(tmp_path / "file")
