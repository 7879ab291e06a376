"""Minutiae records checked together: the same result as one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biodedup.capture.minutiae.batch import standard_records
from biodedup.capture.minutiae.record import MinutiaeRecord, MinutiaeView, standard, view_of, write_record, write_views
from biodedup.errors import InvalidInput


def record(seed=0, count=30, code=2, quality=60, version=2005, side=300, spread=None):
    rng = np.random.default_rng(seed)
    body = np.zeros((count, 6), np.uint8)
    points = rng.integers(0, spread or side, (count, 2)).astype(">u2")
    body[:, :4] = points.view(np.uint8).reshape(count, 4)
    body[:, 0] |= rng.choice([0, 0x40, 0x80], count).astype(np.uint8)
    body[:, 4:] = rng.integers(0, 100, (count, 2))
    return write_record(MinutiaeRecord(side, side, body.tobytes()), code, quality, version=version)


def changed(content, at, value):
    return content[:at] + bytes([value]) + content[at + 1 :]


def together(records, position="right_index"):
    offsets = np.cumsum([0, *map(len, records)])
    ends, data, bad = standard_records(offsets, np.frombuffer(b"".join(records), np.uint8), position)
    return [data[ends[i] : ends[i + 1]].tobytes() for i in range(len(records))], bad.tolist()


def one_by_one(records, position="right_index"):
    results, bad = [], []
    for content in records:
        try:
            results.append(standard(view_of(content, position)) if content else b"")
            bad.append(False)
        except InvalidInput:
            results.append(b"")
            bad.append(True)
    return results, bad


SOUND = record()
ODD = {
    "no record": b"",
    "another finger": record(code=7),
    "an unknown finger": record(code=0),
    "of 2011": record(version=2011),
    "no minutiae": record(count=0),
    "255 minutiae": record(count=255, side=900),
    "a crowd": record(count=90, spread=20),
    "two fingers": write_views([view_of(SOUND, "right_index"), view_of(record(3, code=7), "left_index")]),
    "two views": write_views([view_of(SOUND, "right_index")] * 2),
    "zeros behind it": SOUND + b"\0\0\0",
    "something behind it": SOUND + b"\1",
    "cut short": SOUND[:-9],
    "text": b"no record at all, and longer than thirty bytes",
    "position 11": changed(SOUND, 24, 11),
    "a device": changed(SOUND, 13, 9),
    "reserved bits": changed(changed(SOUND, 23, 1), 30, 0x80 | SOUND[30]),
    "a reserved kind": changed(SOUND, 28, 0xC0 | SOUND[28]),
    "no quality": changed(SOUND, 26, 254),
    "a minutia without quality": changed(SOUND, 33, 255),
    "another impression": changed(SOUND, 25, 0x12),
    "198 pixels a cm": changed(SOUND, 19, 198),
    "394 pixels a cm": changed(changed(SOUND, 18, 1), 19, 0x8A),
    "no width": changed(changed(SOUND, 14, 0), 15, 0),
    "a point outside": changed(SOUND, 15, 10),
    "extended data": SOUND[:8] + (len(SOUND) + 2).to_bytes(4, "big") + SOUND[12:-2] + b"\0\2\1\1",
}  # fmt: skip


@pytest.mark.parametrize("position", ["right_index", "unknown"])
@pytest.mark.parametrize("name", ODD)
def test_an_odd_record_among_sound_ones_comes_out_as_one_by_one(name, position):
    records = [SOUND, ODD[name], record(5, code=2)]
    assert together(records, position) == one_by_one(records, position)


@given(st.data())
def test_any_changed_bytes_come_out_as_one_by_one(data):
    content = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert together([bytes(content)]) == one_by_one([bytes(content)])


def test_a_record_of_an_unknown_finger_gets_the_name_of_its_column():
    (content,), (bad,) = together([record(code=0)], "left_little")
    assert not bad
    assert isinstance(view_of(content, "left_little"), MinutiaeView)
    assert content[24] == 10


def test_no_records_are_none():
    assert together([]) == ([], [])
