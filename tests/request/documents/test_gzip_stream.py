"""Unpacking a document while it streams: every document, whole or not, and what somebody made to fill a disk."""

import gzip
import random
import tracemalloc
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadGzip, GzipBomb
from proxy.request.documents.gzip_stream import BOMB_THRESHOLD, CHUNK, MAX_RATIO, Gunzip


def unpack(*chunks: bytes) -> bytes:
    gunzip = Gunzip()
    out = b"".join(piece for chunk in chunks for piece in gunzip.feed(chunk))
    gunzip.end()
    return out


@given(members=st.lists(st.binary(max_size=2000), min_size=1, max_size=4), data=st.data())
def test_any_document_in_any_chunks_comes_out_whole(members: list[bytes], data: st.DataObject) -> None:
    packed = b"".join(gzip.compress(member, mtime=0) for member in members) + b"\0" * data.draw(st.integers(0, 3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(packed)), max_size=6)))
    chunks = [packed[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(packed)], strict=True)]
    assert unpack(*chunks) == b"".join(members)


@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 257])
def test_nothing_stays_behind_at_the_edge_of_a_piece(size: int) -> None:
    assert unpack(gzip.compress(b"a" * size, mtime=0)) == b"a" * size


@given(st.binary(min_size=1, max_size=2000), st.data())
def test_half_a_document_is_never_a_whole_one(content: bytes, data: st.DataObject) -> None:
    packed = gzip.compress(content, mtime=0)
    with pytest.raises(BadGzip):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])


@pytest.mark.parametrize("at", [0, 2, 20, -6, -1])
def test_a_damaged_document_is_told(at: int) -> None:
    packed = bytearray(gzip.compress(random.Random(1).randbytes(5000)))
    packed[at] ^= 0xFF
    with pytest.raises(BadGzip):
        unpack(bytes(packed))


def test_what_follows_a_document_must_be_another_one() -> None:
    with pytest.raises(BadGzip):
        unpack(gzip.compress(b"a", mtime=0) + b"garbage")


def _bomb(size: int) -> Iterator[bytes]:
    packer = zlib.compressobj(9, wbits=31)
    block = bytes(1024 * 1024)
    for _ in range(size // len(block)):
        yield packer.compress(block)
    yield packer.flush()


def test_a_bomb_is_given_up_and_never_held() -> None:
    bomb = b"".join(_bomb(4 * BOMB_THRESHOLD))
    chunks: list[int] = []
    tracemalloc.start()
    with pytest.raises(GzipBomb):
        chunks.extend(map(len, Gunzip().feed(bomb)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(chunks) <= CHUNK
    assert BOMB_THRESHOLD - CHUNK <= sum(chunks) <= BOMB_THRESHOLD
    assert peak < 2 * 1024 * 1024


def test_a_large_report_is_no_bomb() -> None:
    row = b"".join(b"sku-%d\t%d\n" % (number, number * 7919) for number in range(20_000))
    rounds = BOMB_THRESHOLD // len(row) + 2
    packer, gunzip, size, taken = zlib.compressobj(1, wbits=31), Gunzip(), 0, 0
    for _ in range(rounds):
        chunk = packer.compress(row)
        taken += len(chunk)
        size += sum(map(len, gunzip.feed(chunk)))
    chunk = packer.flush()
    size += sum(map(len, gunzip.feed(chunk)))
    gunzip.end()
    assert size == rounds * len(row) > BOMB_THRESHOLD
    assert size / (taken + len(chunk)) < MAX_RATIO


def test_many_empty_members_cost_no_more_than_their_bytes() -> None:
    assert unpack(gzip.compress(b"", mtime=0) * 20_000) == b""
