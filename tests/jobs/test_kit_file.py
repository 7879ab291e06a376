"""The batch file of a field kit: what is written is read, and nothing else."""

from __future__ import annotations

import io
import os
import resource
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup import jobs
from biodedup.errors import BatchDamaged, UnknownKit
from biodedup.jobs.kits.format.batch_file import BatchReader, BatchWriter, gaps
from biodedup.jobs.kits.format.keys import load_centre_key, load_key
from biodedup.jobs.kits.format.record import _SCHEMA, RECORD_BYTES_MAX, Record, decode, encode
from tests.support.kits import payloads, read, records_of, written

both_versions = pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "version 1"])
HEAD = 17  # kind, sequence, length, check


def end_bytes(encrypted: bool) -> int:
    return HEAD + len(b'{"records":0,"void":[]}') + 64 + (16 if encrypted else 0)


def frames(content: bytes, encrypted: bool) -> tuple[bytes, list[bytes]]:
    """(what stands before the frames, the frames)."""
    at = 104 if encrypted else 40
    start, pieces = content[:at], []
    while at < len(content):
        length = struct.unpack_from("<I", content, at + 9)[0] + HEAD + 64 + (16 if encrypted else 0)
        pieces.append(content[at : at + length])
        at += length
    return start, pieces


def a_header(kind: bytes, sequence: int, length: int) -> bytes:
    head = struct.pack("<cQI", kind, sequence, length)
    return head + struct.pack("<I", zlib.crc32(head))


@both_versions
def test_what_is_written_is_read(kit_keys, tmp_path, encrypted):
    records = records_of(5)
    (tmp_path / "b.kit").write_bytes(written(kit_keys, records, (8, 9), encrypted=encrypted))
    found, batch = read(tmp_path / "b.kit", *kit_keys)
    assert (batch.whole, batch.void) == (True, (8, 9))
    assert payloads(found) == payloads(records)
    assert [record.sequence for record in found] == [1, 2, 3, 4, 5]
    given = found[0].encounter.templates["right_index"]
    assert np.array_equal(given.embedding, records[0].encounter.templates["right_index"].embedding)
    assert found[0].refusals == records[0].refusals
    assert b"minutiae" not in repr(found[0]).encode()


def test_a_batch_hides_what_is_in_it_and_has_the_same_digest_each_time(kit_keys, tmp_path):
    records = records_of(3)
    contents = []
    for name in ("a.kit", "b.kit"):
        with (tmp_path / name).open("wb") as file:
            writer = BatchWriter(file, kit_keys[0], kit_keys[1].public)
            for record in records:
                writer.add(record)
            writer.finish()
        contents.append((tmp_path / name).read_bytes())
    assert contents[0][72:] != contents[1][72:]
    digests = {read(tmp_path / name, *kit_keys)[1].digest for name in ("a.kit", "b.kit")}
    assert digests == {writer.digest}
    clear = written(kit_keys, records, encrypted=False)
    for secret in (b"village", b"minutiae", b"bandaged", payloads(records)[0][200:240]):
        assert secret in clear and secret not in contents[0]


@pytest.mark.slow
@both_versions
def test_a_file_cut_anywhere_yields_its_whole_records_and_says_that_it_is_cut(kit_keys, tmp_path, encrypted):
    records = records_of(4)
    content, expected = written(kit_keys, records, encrypted=encrypted), payloads(records)
    start, pieces = frames(content, encrypted)
    ends = np.cumsum([len(start), *map(len, pieces)]).tolist()

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(content) - 1) | st.sampled_from([end + d for end in ends for d in (-1, 0, 1)]))
    def cut(length: int) -> None:
        length = min(length, len(content) - 1)
        (tmp_path / "cut.kit").write_bytes(content[:length])
        found, batch = read(tmp_path / "cut.kit", *kit_keys)
        assert not batch.whole
        assert payloads(found) == expected[: len(found)]
        assert len(found) == sum(end <= length for end in ends[2:])

    cut()


@both_versions
def test_a_flipped_bit_is_never_accepted_and_the_record_is_reported(kit_keys, tmp_path, encrypted):
    records = records_of(3)
    content, expected = written(kit_keys, records, encrypted=encrypted), payloads(records)
    start, pieces = frames(content, encrypted)
    spans_of = np.cumsum([len(start), *map(len, pieces)]).tolist()[1:5]

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(content) * 8 - 1))
    def flip(bit: int) -> None:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped.kit").write_bytes(damaged)
        taken: list[Record] = []
        with pytest.raises((bd.InvalidInput, UnknownKit, BatchDamaged)) as caught:
            key, centre = kit_keys
            with BatchReader(
                tmp_path / "flipped.kit", {key.public.fingerprint: key.public}, [centre], allow_unencrypted=True
            ) as batch:
                for record in batch:
                    taken.append(record)
        assert payloads(taken) == expected[: len(taken)]
        at = bit // 8
        if spans_of[0] <= at < spans_of[3]:
            number = sum(at >= end for end in spans_of)  # of the record, from 1
            header = at - spans_of[number - 1] < HEAD
            told = "its manifest" if number == 1 else f"the record with sequence {number - 1}"
            assert (f"after {told}" if header else f"sequence {number} ") in str(caught.value)
            assert len(taken) == number - 1

    flip()


@both_versions
def test_records_cannot_be_moved_left_out_added_or_carried_to_another_file(kit_keys, tmp_path, encrypted):
    start, (manifest, a, b, c, end) = frames(written(kit_keys, records_of(3), encrypted=encrypted), encrypted)
    _, (_, foreign, *_) = frames(written(kit_keys, records_of(3, start=10), encrypted=encrypted), encrypted)
    head, one = start + manifest, start + manifest + a + b + c + end
    for forged in (
        head + b + a + c + end,
        head + a + c + end,
        head + a + a + b + c + end,
        head + a + b + end,
        head + foreign + end,
        start + a + b + c + end,
        one + b"x",
        one + one,
        head + end,
    ):
        (tmp_path / "forged.kit").write_bytes(forged)
        with pytest.raises(BatchDamaged, match="nothing of this file was taken"):
            read(tmp_path / "forged.kit", *kit_keys)
    (tmp_path / "forged.kit").write_bytes(one)
    assert len(read(tmp_path / "forged.kit", *kit_keys)[0]) == 3


def test_a_batch_for_another_centre_or_by_another_kit_does_not_open(kit_keys, tmp_path):
    jobs.make_centre_key(tmp_path / "other.key")
    jobs.make_keys("K2", tmp_path / "K2.key")
    other, second = load_centre_key(tmp_path / "other.key"), load_key(tmp_path / "K2.key").public
    content = written(kit_keys, records_of(2))
    (tmp_path / "b.kit").write_bytes(content)
    with pytest.raises(bd.InvalidInput, match=rf"fingerprint {kit_keys[1].public.fingerprint.hex()[:16]}.*nothing"):
        read(tmp_path / "b.kit", kit_keys[0], other)
    (tmp_path / "b.kit").write_bytes(content[:40] + other.public.fingerprint + content[72:])  # addressed anew
    with pytest.raises(BatchDamaged, match=r"its manifest .* was changed"):
        read(tmp_path / "b.kit", kit_keys[0], other)
    (tmp_path / "b.kit").write_bytes(content[:8] + second.fingerprint + content[40:])  # another sender
    with pytest.raises(BatchDamaged, match=r"its manifest .* was changed"):
        with BatchReader(tmp_path / "b.kit", {second.fingerprint: second}, [kit_keys[1]]) as batch:
            list(batch)
    (tmp_path / "b.kit").write_bytes(content[:72] + bytes(32) + content[104:])  # an ephemeral key of order 1
    with pytest.raises(BatchDamaged, match="key agreement is forged"):
        read(tmp_path / "b.kit", *kit_keys)


def test_an_unencrypted_batch_is_read_where_that_is_allowed_alone(kit_keys, tmp_path):
    key, centre = kit_keys
    (tmp_path / "old.kit").write_bytes(written(kit_keys, records_of(2), encrypted=False))
    trusted = {key.public.fingerprint: key.public}
    with pytest.raises(bd.InvalidInput, match=r"not encrypted.*--allow-unencrypted"):
        BatchReader(tmp_path / "old.kit", trusted, [centre])
    with BatchReader(tmp_path / "old.kit", trusted, allow_unencrypted=True) as batch:
        assert len(list(batch)) == 2
    content = bytearray(written(kit_keys, records_of(2)))
    content[7] = 1  # an encrypted batch that claims to be an old one
    (tmp_path / "old.kit").write_bytes(content)
    with pytest.raises(BatchDamaged):
        read(tmp_path / "old.kit", *kit_keys)


# hostile lengths, before and behind a signature --------------------------------------------------------------------


@both_versions
@pytest.mark.parametrize("kind", [b"M", b"R", b"E"])
def test_a_length_beyond_any_frame_is_refused_before_a_byte_of_it_is_read(kit_keys, tmp_path, encrypted, kind):
    """A sparse file takes no room on a disk, and would take all of the memory."""
    start, (manifest, *_) = frames(written(kit_keys, [], encrypted=encrypted), encrypted)
    with (tmp_path / "sparse.kit").open("wb") as file:
        file.write(start + (b"" if kind == b"M" else manifest) + a_header(kind, 0, 3_200_000_000))
        file.truncate(4 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BatchDamaged, match="3,200,000,000 bytes, wanted at most"):
        read(tmp_path / "sparse.kit", *kit_keys)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_a_sparse_file_within_the_limit_of_a_record_is_damaged_and_cheap(kit_keys, tmp_path):
    start, (manifest, *_) = frames(written(kit_keys, []), True)
    with (tmp_path / "sparse.kit").open("wb") as file:
        file.write(start + manifest + a_header(b"R", 1, RECORD_BYTES_MAX))
        file.truncate(64 << 30)
    with pytest.raises(BatchDamaged, match="sequence 1 "):
        read(tmp_path / "sparse.kit", *kit_keys)


@pytest.mark.parametrize("length", range(0, 130, 7))
def test_a_header_cut_anywhere_is_no_crash(kit_keys, tmp_path, length):
    (tmp_path / "b.kit").write_bytes(written(kit_keys, records_of(1))[:length])
    found, batch = read(tmp_path / "b.kit", *kit_keys)
    assert (found, batch.whole) == ([], False)


def test_a_pipe_or_a_device_is_no_batch_and_nothing_waits_for_it(kit_keys, tmp_path):
    os.mkfifo(tmp_path / "pipe.kit")
    for path in (tmp_path / "pipe.kit", Path("/dev/zero"), tmp_path):
        with pytest.raises(bd.InvalidInput, match="not a regular file"):
            read(path, *kit_keys)


def test_more_records_than_a_reader_takes_are_refused(kit_keys, tmp_path):
    (tmp_path / "b.kit").write_bytes(written(kit_keys, records_of(3)))
    key, centre = kit_keys
    with pytest.raises(bd.InvalidInput, match="more than 2 records"):
        with BatchReader(tmp_path / "b.kit", {key.public.fingerprint: key.public}, [centre], records_max=2) as batch:
            list(batch)


def one_row(rows: list[dict[str, object]], compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _SCHEMA, options=pa.ipc.IpcWriteOptions(compression=compression)) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=_SCHEMA))
    return sink.getvalue().to_pybytes()


def a_row(**changed: object) -> dict[str, object]:
    row: dict[str, object] = {"subject_id": "s", "encounter_id": "e", "captured_at": None, "packed_at": 0.0}
    return row | {name: [] for name in ("groups", "captures", "templates", "missing", "refusals")} | changed


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (one_row([a_row(captures=[{"position": "face", "data": b"0" * 10_000, "dpi": None}])], "zstd"), "compressed"),
        (one_row([a_row(), a_row()]), "2 rows"),
        (one_row([]), "0 rows"),
        (one_row([a_row(groups=["g"] * 65)]), "65 groups"),
        (one_row([a_row(missing=[{"position": "left_thumb", "reason": "r" * 501}])]), "500 characters"),
        (one_row([a_row(encounter_id="")]), "no encounter_id"),
        (one_row([a_row()]) * 2, None),
        (one_row([a_row(templates=[{"column": "face", "embedding": [0.0] * 200_000}])]), "200,000 numbers"),
    ],
    ids=["compressed", "two rows", "no row", "groups", "long text", "no id", "two streams", "long embedding"],
)
def test_a_signed_record_stays_within_limits(payload, told):
    """A kit's key may be stolen: what is signed takes no more memory than its bytes."""
    if told is None:
        assert decode(payload, 1).sequence == 1  # what stands behind the stream's end is not read
        return
    with pytest.raises(bd.InvalidInput, match=told):
        decode(payload, 1)
    assert decode(one_row([a_row()]), 1).encounter.encounter_id == "e"


def test_a_record_too_large_for_a_reader_is_not_written(kit_keys):
    (record,) = records_of(1)
    encounter = replace(record.encounter, captures=[bd.Face(bytes(RECORD_BYTES_MAX))])
    with pytest.raises(bd.InvalidInput, match="wanted at most"):
        BatchWriter(io.BytesIO(), kit_keys[0], kit_keys[1].public).add(replace(record, encounter=encounter))


def test_a_signed_record_that_cannot_be_understood_is_damage_and_no_crash(kit_keys, tmp_path):
    file = io.BytesIO()
    writer = BatchWriter(file, kit_keys[0], kit_keys[1].public)
    for payload in (b"", b"\xff" * 40, encode(records_of(1)[0])[:-200]):
        with pytest.raises((pa.ArrowException, OSError, ValueError)):
            decode(payload, 1)
    writer.add_encoded(7, b"\xff" * 40)
    (tmp_path / "odd.kit").write_bytes(file.getvalue())
    with pytest.raises(BatchDamaged, match="sequence 7 is signed and cannot be read"):
        read(tmp_path / "odd.kit", *kit_keys)


def test_other_files_are_refused_with_what_to_do(kit_keys, tmp_path):
    (tmp_path / "photo.kit").write_bytes(b"\xff\xd8 a photo")
    newer = bytearray(written(kit_keys, records_of(1)))
    newer[7] = 9
    (tmp_path / "newer.kit").write_bytes(newer)
    for name, text in (("photo.kit", "not a batch file"), ("newer.kit", "version 9"), ("none.kit", "does not exist")):
        with pytest.raises(bd.InvalidInput, match=text):
            read(tmp_path / name, *kit_keys)


def test_gaps_are_what_is_missing_below_the_largest():
    assert gaps([]) == gaps([1, 2, 3]) == []
    assert gaps([4, 5, 7, 2**62]) == [(1, 3), (6, 6), (8, 2**62 - 1)]


def test_the_bytes_are_those_that_kit_md_describes(kit_keys, tmp_path):
    """Opened by the primitives alone, step by step as in KIT.md."""
    import hashlib

    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    (record,), (key, centre) = records_of(1), kit_keys
    content = written(kit_keys, [record])
    start, pieces = frames(content, True)
    kit, to, ephemeral = start[8:40], start[40:72], start[72:]
    assert (kit, to) == (key.public.fingerprint, centre.public.fingerprint)
    shared = centre.key.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    salt = ephemeral + centre.key.public_key().public_bytes_raw()
    aead = ChaCha20Poly1305(HKDF(SHA256(), 32, salt, b"biodedup kit batch 2 encryption\0" + kit).derive(shared))
    digest = hashlib.sha256(start[:72]).digest()
    for number, piece in enumerate(pieces):
        head, nonce = piece[:HEAD], number.to_bytes(11, "big") + bytes([number == len(pieces) - 1])
        plain = aead.decrypt(nonce, piece[HEAD:], kit + nonce + head)
        digest = hashlib.sha256(digest + head + plain[:-64]).digest()
        key.public.key.verify(plain[-64:], b"biodedup kit batch 2\0" + digest)
        assert number != 1 or plain[:-64] == encode(record)


def test_a_peak_of_memory_stays_small_while_a_long_batch_is_read(kit_keys, tmp_path):
    """40 records of 1 MB: a reader holds one of them at a time."""
    records = [
        replace(one, encounter=replace(one.encounter, captures=[bd.Face(bytes(1 << 20))])) for one in records_of(40)
    ]
    with (tmp_path / "b.kit").open("wb") as file:
        writer = BatchWriter(file, kit_keys[0], kit_keys[1].public)
        for one in records:
            writer.add(one)
        writer.finish()
    import tracemalloc

    key, centre = kit_keys
    tracemalloc.start()
    with BatchReader(tmp_path / "b.kit", {key.public.fingerprint: key.public}, [centre]) as batch:
        count = sum(1 for _ in batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (count, batch.whole) == (40, True)
    assert peak < 12 << 20
