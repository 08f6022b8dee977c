"""The contract of a blob store, on every adapter that can run here: files, objects in memory, and a stub of S3.

Not run yet: a real S3 or GCS bucket.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from obstore.store import MemoryStore
from s3_stub import TIME, S3Stub

from treadle.blobs import BlobStore, LocalBlobs, object_store, open_blobs
from treadle.blobs.object_store import ObjectBlobs
from treadle.errors import InvalidRequest, NotFound, ServerError, StoreUnavailable

PART_BYTES = 1_000


@pytest.fixture(params=["local", "memory", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BlobStore]:
    monkeypatch.setattr(object_store, "PART_BYTES", PART_BYTES)
    if request.param == "local":
        yield LocalBlobs(tmp_path / "blobs")
    elif request.param == "memory":
        yield ObjectBlobs(MemoryStore())
    else:
        with S3Stub() as bucket:
            yield s3_blobs(bucket, monkeypatch)


def s3_blobs(bucket: S3Stub, monkeypatch: pytest.MonkeyPatch) -> ObjectBlobs:
    """The stub, opened as an operator does: by a URL and the environment."""
    for name, value in {
        "AWS_ENDPOINT_URL": bucket.url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "anywhere",
    }.items():
        monkeypatch.setenv(name, value)
    blobs = open_blobs("s3://bucket/some/prefix")
    assert isinstance(blobs, ObjectBlobs)
    return blobs


def test_written_blob_is_read_back(blobs: BlobStore) -> None:
    assert blobs.write("models/s1:train:0/12.safetensors", b"\x00bytes") == 6
    assert blobs.read("models/s1:train:0/12.safetensors") == b"\x00bytes"
    assert blobs.size("models/s1:train:0/12.safetensors") == 6
    assert blobs.exists("models/s1:train:0/12.safetensors")
    assert not blobs.exists("models/s1:train:0")


def test_parts_of_a_blob_are_read_by_range(blobs: BlobStore) -> None:
    blobs.write("a/b", b"0123456789")
    assert blobs.read_range("a/b", 2, 5) == b"234"
    assert blobs.read_range("a/b", 8, 99) == b"89", "a range ends with the blob"
    with pytest.raises(NotFound):
        blobs.read_range("a/c", 0, 1)
    with pytest.raises(InvalidRequest):
        blobs.read_range("../etc/passwd", 0, 1)


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
            blobs.write("raced/key", bytes([n]) * 900)
        except ServerError:
            return None
        return n

    with ThreadPoolExecutor(8) as pool:
        winners = [n for n in pool.map(write, range(8)) if n is not None]
    assert len(winners) == 1
    assert blobs.read("raced/key") == bytes([winners[0]]) * 900


def test_missing_blob_is_not_found(blobs: BlobStore) -> None:
    blobs.write("a/b", b"")
    for key in ("c", "a/c", "a", "a/b/c"):
        for method in (blobs.read, blobs.size):
            with pytest.raises(NotFound, match=f"no blob {key}"):
                method(key)
        assert not blobs.exists(key)


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


def test_listing_tells_size_and_age(blobs: BlobStore) -> None:
    before = time.time()
    blobs.write("a/b", b"123")
    blobs.write("c", b"")
    (first, second) = blobs.iter_blobs()
    assert (first.key, first.num_bytes, second.key, second.num_bytes) == ("a/b", 3, "c", 0)
    # File systems and services keep times to a few milliseconds or a second; the stub's clock stands still.
    assert (
        before - 2 <= first.written_at <= time.time() + 2
        or first.written_at == datetime.fromisoformat(TIME).timestamp()
    )
    assert [blob.key for blob in blobs.iter_blobs("a/")] == ["a/b"]


def test_dropping_unfinished_writes_leaves_blobs_alone(blobs: BlobStore) -> None:
    blobs.write("a/b", b"123")
    assert blobs.drop_unfinished(older_than_s=0) == 0
    assert blobs.read("a/b") == b"123"


@pytest.mark.parametrize("num_bytes", [0, 1, 1_000, 3_001])
def test_reader_never_sees_half_a_blob(blobs: BlobStore, num_bytes: int) -> None:
    """Sizes on both sides of where an upload in parts begins (1,000 bytes in this test)."""
    data = bytes(range(256)) * 16
    seen: set[int] = set()
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            for key in blobs.iter_keys():
                seen.add(len(blobs.read(key)))

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for n in range(20):
            blobs.write(f"blob/{n}", data[:num_bytes])
        is_over.set()
        reading.result()
    assert seen <= {num_bytes}
    assert blobs.read("blob/19") == data[:num_bytes]


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
def test_malformed_key_is_refused_everywhere(blobs: BlobStore, key: str) -> None:
    for method in (blobs.read, blobs.exists, blobs.size, blobs.delete, blobs.path_of):
        with pytest.raises(InvalidRequest, match="blob key"):
            method(key)
    with pytest.raises(InvalidRequest, match="blob key"):
        blobs.write(key, b"")
    assert list(blobs.iter_keys()) == []


def test_large_blob_goes_to_a_bucket_in_parts_and_a_small_one_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * 2**20)
    data = bytes(range(256)) * (11 * 2**12)
    with S3Stub() as bucket:
        blobs = s3_blobs(bucket, monkeypatch)
        blobs.write("small", data[: 5 * 2**20])
        blobs.write("large", data)
        assert bucket.seen == ["put", "part", "part", "part"]
        assert bucket.objects["some/prefix/large"] == data
        assert blobs.read("large") == data
        with pytest.raises(ServerError, match="exists already"):
            blobs.write("large", data)


def test_bucket_that_does_not_answer_is_an_outage_without_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Stub() as bucket:
        """Nobody listens there afterwards."""
    monkeypatch.setattr(object_store, "RETRY_S", 0.1)
    blobs = s3_blobs(bucket, monkeypatch)
    with pytest.raises(StoreUnavailable) as caught:
        blobs.read("a")
    assert "127.0.0.1" not in str(caught.value)
    with pytest.raises(StoreUnavailable):
        blobs.write("a", b"1")


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_place_that_is_away_is_not_taken_for_blobs_that_are_gone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever believed it would forget snapshots that come back with their file system."""
    with S3Stub() as bucket:
        root, elsewhere = tmp_path / "blobs", tmp_path / "elsewhere"
        blobs: BlobStore = LocalBlobs(root) if kind == "local" else s3_blobs(bucket, monkeypatch)
        blobs.write("a/b", b"1")
        for is_there in (False, True):
            if kind == "local":
                _ = elsewhere.rename(root) if is_there else root.rename(elsewhere)
                if not is_there:
                    # The mount point stays.
                    root.mkdir()
            bucket.is_there = is_there
            if is_there:
                assert blobs.read("a/b") == b"1"
                assert not blobs.exists("a/c")
                continue
            for look in (blobs.read, blobs.size, blobs.exists):
                with pytest.raises(StoreUnavailable):
                    look("a/b")
            with pytest.raises(StoreUnavailable):
                blobs.write("a/c", b"1")
            if kind == "local":
                root.rmdir()
            with pytest.raises(StoreUnavailable):
                list(blobs.iter_keys())
