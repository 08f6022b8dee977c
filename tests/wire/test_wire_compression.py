"""Decompression: exact, bounded by what comes out, and never a shorter body than was sent."""

from __future__ import annotations

import contextlib
import gzip
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import BodyTooLarge, InvalidRequest, TreadleError, UnreadableBody
from treadle.wire.compression import decompress

LIMIT = 10_000


def zstd_declared(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def zstd_undeclared(data: bytes) -> bytes:
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(data) + stream.flush()


PACKERS = [("zstd", zstd_declared), ("zstd", zstd_undeclared), ("gzip", gzip.compress)]


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
@given(data=st.binary(max_size=3_000))
def test_round_trip(encoding, pack, data):
    assert decompress(pack(data), encoding, limit=LIMIT) == data


@pytest.mark.parametrize("encoding", [None, "", "identity", " Identity "])
def test_no_encoding_is_the_body_itself(encoding):
    assert decompress(b"abc", encoding, limit=3) == b"abc"
    with pytest.raises(BodyTooLarge, match="3 bytes"):
        decompress(b"abcd", encoding, limit=3)


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_the_limit_is_on_what_comes_out(encoding, pack):
    assert len(decompress(pack(bytes(LIMIT)), encoding, limit=LIMIT)) == LIMIT
    with pytest.raises(BodyTooLarge, match=f"{LIMIT} bytes"):
        decompress(pack(bytes(LIMIT + 1)), encoding, limit=LIMIT)


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_a_bomb_is_stopped_without_unfolding_it(encoding, pack):
    bomb = pack(bytes(200 * 2**20))
    assert len(bomb) < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            decompress(bomb, encoding, limit=2**20)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 * 2**20


def test_a_frame_that_declares_less_than_it_holds_is_not_believed():
    # A single-segment header with a one-byte content size, which is rewritten to lie.
    frame = bytearray(zstandard.ZstdCompressor().compress(b"x" * 200))
    assert frame[5] == 200
    frame[5] = 10
    with pytest.raises(UnreadableBody):
        decompress(bytes(frame), "zstd", limit=LIMIT)
    with pytest.raises(TreadleError):
        decompress(bytes(frame), "zstd", limit=20)


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_a_truncated_body_is_never_read_as_a_shorter_one(encoding, pack):
    body = pack(bytes(range(256)) * 30)
    for length in range(len(body)):
        with pytest.raises(UnreadableBody):
            decompress(body[:length], encoding, limit=LIMIT)


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_bytes_behind_the_end_are_refused(encoding, pack):
    body = pack(b"abc")
    for tail in (b"x", body):
        with pytest.raises(UnreadableBody):
            decompress(body + tail, encoding, limit=LIMIT)


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd, gzip", "x" * 500])
def test_another_encoding_is_named(encoding):
    with pytest.raises(InvalidRequest, match="zstd, gzip or none") as caught:
        decompress(b"abc", encoding, limit=LIMIT)
    assert len(str(caught.value)) < 300


@given(st.binary(max_size=300), st.sampled_from(["zstd", "gzip"]), st.booleans())
def test_random_bytes_raise_only_our_errors(raw, encoding, has_magic):
    magic = {"zstd": b"\x28\xb5\x2f\xfd", "gzip": b"\x1f\x8b\x08"}[encoding]
    with contextlib.suppress(TreadleError):
        decompress(magic + raw if has_magic else raw, encoding, limit=LIMIT)
