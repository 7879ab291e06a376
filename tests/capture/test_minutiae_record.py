"""Minutiae records of three standards: read, written, hostile; and from a legacy database into a gallery."""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup import jobs
from biodedup.capture.minutiae.record import (
    COUNT_MAX,
    MinutiaeRecord,
    MinutiaeView,
    read_record,
    read_views,
    write_record,
    write_views,
)
from tests.support.bozorth import Bozorth3, load
from tests.support.images import finger

SIDE = 400
EXTRACTOR = bd.Extractor()
PRINTS = [EXTRACTOR.extract([bd.Finger(finger(seed))])[0].minutiae for seed in range(3)]
AGAIN = [EXTRACTOR.extract([bd.Finger(finger(seed, degrees=7, noise_seed=9))])[0].minutiae for seed in range(3)]


def body(*minutiae: tuple[int, int, int, int, int]) -> bytes:
    """kind, x, y, angle, quality."""
    return b"".join(struct.pack(">HHBB", kind << 14 | x, y, angle, quality) for kind, x, y, angle, quality in minutiae)


def strewn(count: int, seed: int = 0, side: int = SIDE) -> MinutiaeRecord:
    rng = np.random.default_rng(seed)
    columns = (rng.integers(low, high, count) for low, high in ((0, 3), (0, side), (0, side), (0, 256), (0, 101)))
    return MinutiaeRecord(side, side, body(*zip(*(column.tolist() for column in columns), strict=True)))


def iso_2005(views: bytes, *, count: int = 1, size: int = SIDE, resolution: int = 197) -> bytes:
    head = struct.pack(">HHHHHBB", 0x8001, size, size, resolution, resolution, count, 0)
    return b"FMR\0 20\0" + struct.pack(">I", 12 + len(head) + len(views)) + head + views


def ansi_2004(views: bytes) -> bytes:
    head = struct.pack(">HHHHHHHBB", 0x1234, 1, 0, SIDE, SIDE, 197, 197, 1, 0)
    return b"FMR\0 20\0" + struct.pack(">H", 10 + len(head) + len(views)) + head + views


def view_2011(
    position: int, minutiae: bytes, *, size: int = 6, qualities: tuple[int, ...] = (), certificates: int | None = None
) -> bytes:
    date_and_device = struct.pack(">HBBBBBHBHH", 2012, 7, 31, 12, 0, 59, 999, 3, 0x0C, 0x0D)
    blocks = bytes([len(qualities)]) + b"".join(struct.pack(">BHH", quality, 15, 1) for quality in qualities)
    if certificates is not None:
        blocks += bytes([certificates]) + b"\0\x01\x02" * certificates
    image = struct.pack(">BBHHBHHBB", position, 2, 197, 197, 0, SIDE, SIDE, size << 4, len(minutiae) // size)
    extended = struct.pack(">HHHB", 7, 1, 7, 0xAA) + b"\0\0"
    rest = date_and_device + blocks + image + minutiae + extended
    return struct.pack(">I", 4 + len(rest)) + rest


def iso_2011(*views: bytes, certified: bool = False, version: bytes = b"030\0") -> bytes:
    rest = struct.pack(">HB", len(views), certified) + b"".join(views)
    return b"FMR\0" + version + struct.pack(">I", 12 + len(rest)) + rest


TWO = body((1, 10, 20, 64, 90), (2, 30, 40, 128, 0))
FIVE = TWO[:5] + TWO[6:11]


def test_2005_views_extended_data_and_padding_are_understood():
    views = b"\x07\x00\x50\x02" + TWO + b"\x00\x05\x00\x01\x00\x05\xee"  # five bytes of extended data
    views += b"\x00\x13\xfe\x00\x00\x00"
    first, second = read_views(iso_2005(views, count=2) + bytes(100))
    assert (first.position, first.number, first.quality, first.record.body) == ("left_index", 0, 80, TWO)
    assert (first.record.width, first.record.height) == (SIDE, SIDE)
    assert (second.position, second.number, second.quality, second.record.count) == ("unknown", 1, None, 0)


@pytest.mark.parametrize("version", [b"030\0", b" 30\0"])
def test_2011_blocks_certificates_and_five_byte_minutiae_are_understood(version):
    content = iso_2011(
        view_2011(2, TWO, qualities=(255, 70, 40), certificates=2),
        view_2011(3, FIVE, size=5, certificates=0),
        certified=True,
        version=version,
    )
    first, second = read_views(content)
    assert (first.position, first.number, first.quality, first.record.body) == ("right_index", 2, 70, TWO)
    without_quality = body((1, 10, 20, 64, 0), (2, 30, 40, 128, 0))
    assert (second.position, second.quality, second.record.body) == ("right_middle", None, without_quality)


def test_ansi_378_has_another_header_and_counts_two_degrees():
    (view,) = read_views(ansi_2004(b"\x01\x00\x3c\x01" + body((1, 5, 6, 45, 33)) + b"\0\0"))
    assert (view.position, view.quality, view.record.body) == ("right_thumb", 60, body((1, 5, 6, 64, 33)))
    with pytest.raises(bd.InvalidInput, match="360 degrees"):
        read_views(ansi_2004(b"\x01\x00\x3c\x01" + body((1, 5, 6, 180, 33)) + b"\0\0"))


def test_what_is_reserved_or_not_reported_becomes_nothing():
    given = body((3, 10, 20, 64, 254))
    given = given[:2] + bytes([given[2] | 0xC0]) + given[3:]
    assert read_record(iso_2005(b"\0\0\0\x01" + given + b"\0\0")).body == body((0, 10, 20, 64, 0))


@pytest.mark.parametrize("resolution", [99, 196, 197, 198, 236, 394])
def test_every_resolution_is_brought_to_500_dpi(resolution):
    record = strewn(30, side=300)
    scale = 1 if abs(resolution - 197) <= 1 else 197 / resolution
    (view,) = read_views(
        iso_2005(b"\0\0\0" + bytes([record.count]) + record.body + b"\0\0", size=300, resolution=resolution)
    )
    before, after = (np.frombuffer(r.body, ">u2").reshape(-1, 3)[:, :2] & 0x3FFF for r in (record, view.record))
    assert np.abs(after - before * scale).max() <= 1
    assert view.record.width == np.ceil(300 * scale)
    assert after.max() < view.record.width


@pytest.mark.slow
def test_a_print_scores_the_same_at_another_resolution():
    record = read_record(PRINTS[0])
    rows = np.frombuffer(record.body, ">u2").reshape(-1, 3).copy()
    rows[:, :2] = (rows[:, :2] & 0xC000) + 2 * (rows[:, :2] & 0x3FFF)
    views = b"\0\0\0" + bytes([record.count]) + rows.tobytes() + b"\0\0"
    size = 2 * max(record.width, record.height)
    fine = iso_2005(views, size=size, resolution=394)
    assert Bozorth3().compare(fine, [AGAIN[0]]) == Bozorth3().compare(PRINTS[0], [AGAIN[0]])


minutia = st.tuples(
    st.integers(0, 2), st.integers(0, SIDE - 1), st.integers(0, SIDE - 1), st.integers(0, 255), st.integers(0, 100)
)
view = st.builds(
    MinutiaeView,
    st.sampled_from(bd.FINGER_POSITIONS),
    st.just(0),
    st.builds(lambda rows: MinutiaeRecord(SIDE, SIDE, body(*rows)), st.lists(minutia, max_size=40)),
    st.integers(0, 100),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(view, min_size=1, max_size=4), st.sampled_from([2005, 2011]))
def test_what_is_written_is_read_again(views, version):
    found = read_views(write_views(views, version=version))
    assert [one._replace(number=0) for one in found] == views


def test_a_quality_that_is_not_stated_stays_so_in_2011():
    assert read_views(write_record(strewn(3), 2, None, version=2011))[0].quality is None


@pytest.mark.parametrize("count", [0, 1, 3, 100, COUNT_MAX])
@pytest.mark.parametrize("version", [2005, 2011])
def test_few_and_many_minutiae_are_written_and_read(count, version):
    record = strewn(count, side=2000)
    content = write_record(record, 1, 50, version=version)
    assert read_record(content) == record
    assert len(content) == int.from_bytes(content[8:12], "big")


def test_what_a_record_cannot_hold_is_not_written():
    for wrong in (
        lambda: write_record(strewn(500, side=2000), 1, 50),
        lambda: write_record(strewn(1), 11, 50),
        lambda: write_record(strewn(1), 1, 101),
        lambda: write_record(MinutiaeRecord(20_000, 10, b""), 1, 50),
        lambda: write_record(strewn(1), 1, 50, version=2004),
        lambda: write_views([MinutiaeView("left_thumb", 0, strewn(1), 50)] * 17),
        lambda: write_views([]),
        lambda: bd.write_minutiae([]),
    ):
        with pytest.raises(bd.InvalidInput, match=";"):
            wrong()


SOUND = {
    "2005": iso_2005(b"\x07\x00\x50\x02" + TWO + b"\x00\x05\x00\x01\x00\x05\xee"),
    "2011": iso_2011(view_2011(2, FIVE, size=5, qualities=(9,), certificates=1), certified=True),
    "2004": ansi_2004(b"\x01\x00\x3c\x02" + TWO + b"\0\0"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_record_that_breaks_off_anywhere_is_invalid_input(name):
    assert read_views(SOUND[name])
    for length in range(len(SOUND[name])):
        with pytest.raises(bd.InvalidInput, match=";"):
            read_views(SOUND[name][:length])


@pytest.mark.parametrize("name", SOUND)
def test_any_one_byte_that_lies_gives_a_sound_record_or_invalid_input(name):
    for at in range(len(SOUND[name])):
        for value in (0, 1, 3, 0x40, 0x7F, 0x80, 0xC0, 0xFF, SOUND[name][at] ^ 1):
            check_hostile(SOUND[name][:at] + bytes([value]) + SOUND[name][at + 1 :])


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SOUND)), st.data())
def test_any_damage_gives_a_sound_record_or_invalid_input(name, data):
    content = bytearray(SOUND[name])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check_hostile(bytes(content))


@given(st.sampled_from([b"FMR\0 20\0", b"FMR\0" + b"030\0"]), st.binary(max_size=200))
def test_any_bytes_behind_a_signature_give_a_sound_record_or_invalid_input(signature, rest):
    check_hostile(signature + rest)


def check_hostile(content: bytes) -> None:
    try:
        views = read_views(content)
    except bd.InvalidInput as error:
        assert ";" in str(error)  # says what to do next
        return
    assert views
    for one in views:
        assert one.position in bd.FINGER_POSITIONS
        again = read_record(write_record(one.record, 0, one.quality))
        assert again == one.record
        points = np.frombuffer(again.body, ">u2").reshape(-1, 3)[:, :2] & 0x3FFF
        assert (points < (again.width, again.height)).all()


def test_a_record_of_thousands_of_views_is_refused_at_once():
    views = (b"\0\0\0\xff" + strewn(255, side=16).body + b"\0\0") * 255
    with pytest.raises(bd.InvalidInput, match="255 views"):
        read_views(iso_2005(views, count=255, size=16))


def test_what_is_no_single_finger_is_refused():
    with pytest.raises(bd.InvalidInput, match="position code 13"):
        read_views(iso_2011(view_2011(13, TWO)))
    with pytest.raises(bd.InvalidInput, match="compact formats"):
        read_views(TWO)


@pytest.mark.slow
def test_nbis_reads_in_a_record_what_ours_does():
    record = read_record(legacy(0))
    rows = np.frombuffer(record.body, np.dtype([("x", ">u2"), ("y", ">u2"), ("angle", "u1"), ("quality", "u1")]))
    ours = [(int(row["x"]) & 0x3FFF, int(row["y"]), float(row["angle"]) * 360 / 256) for row in rows]
    theirs = [(minutia.x(), minutia.y(), minutia.angle()) for minutia in load(record).get()]
    assert sorted(m[:2] for m in theirs) == sorted(m[:2] for m in ours)
    apart = [abs((a[2] - b[2] + 180) % 360 - 180) for a, b in zip(sorted(theirs), sorted(ours), strict=True)]
    assert np.median(apart) <= 360 / 64  # NBIS counts 32 directions to the turn


# from a legacy database into a gallery ------------------------------------------------------------------------------


def legacy(seed: int, position: str = "unknown", version: int = 2011) -> bytes:
    """A record as another system would have written it."""
    return bd.write_minutiae([bd.Template(position, "theirs", minutiae=PRINTS[seed])], version=version)


def test_a_capture_may_be_a_record(tmp_path):
    path = tmp_path / "x.fmr"
    path.write_bytes(legacy(0, "left_ring"))
    stated, own, image = EXTRACTOR.extract(
        [bd.Finger(path, "right_index"), bd.Finger(path.read_bytes()), bd.Finger(finger(0), "right_index")]
    )
    assert (stated.column, own.column) == ("right_index", "left_ring")
    assert stated.model_id == own.model_id == "external-minutiae"
    assert stated.quality == image.quality
    assert stated.minutiae == image.minutiae
    with pytest.raises(bd.ModelMismatch):
        bd.compare(stated, image)


def test_a_capture_that_is_an_unsound_record_is_refused():
    several = bd.write_minutiae(bd.Template(p, "theirs", minutiae=PRINTS[0]) for p in ("left_thumb", "left_ring"))
    few = write_record(strewn(3), 0, 50)
    captures = [legacy(0)[:-1], several, few, b"FMR\0"]
    refusals = EXTRACTOR.extract([bd.Finger(content, "right_index") for content in captures])
    assert [r.reason for r in refusals] == ["unsound_record", "unsound_record", "few_minutiae", "unsound_record"]
    assert "left_thumb, left_ring" in refusals[1].detail
    (face,) = EXTRACTOR.extract([bd.Face(legacy(0))])
    assert face.reason == "not_an_image"


def test_a_record_of_several_fingers_becomes_templates_by_position():
    templates = {
        p: bd.Template(p, "theirs", minutiae=PRINTS[i]) for i, p in enumerate(("unknown", "left_ring", "right_thumb"))
    }
    found = bd.read_minutiae(bd.write_minutiae(templates.values()))
    assert {p: t.minutiae[28:] for p, t in found.items()} == {p: t.minutiae[28:] for p, t in templates.items()}
    assert {t.model_id for t in found.values()} == {"external-minutiae"}


def test_legacy_records_compare_with_one_another_and_no_score_counts_as_measured():
    a, b = (bd.read_minutiae(PRINTS[0]), bd.read_minutiae(AGAIN[0]))
    score = bd.compare(a["unknown"], b["unknown"])
    measured = bd.compare(
        *(bd.Template("unknown", "skeleton-1", minutiae=content) for content in (PRINTS[0], AGAIN[0]))
    )
    assert (score.score_db, score.minutiae) == (measured.score_db, measured.minutiae)
    assert score.extrapolated
    with pytest.raises(bd.InvalidInput, match="no calibration"):
        bd.compare(*(bd.Template("unknown", "theirs", minutiae=content) for content in (PRINTS[0], AGAIN[0])))


def test_a_gallery_takes_records_and_one_bad_record_stops_no_other(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine:
        encounters = [
            bd.Encounter("anna", [bd.Finger(legacy(0), "right_index")]),
            bd.Encounter(
                "bad", templates={"right_index": bd.Template("right_index", "external-minutiae", minutiae=b"?")}
            ),
            bd.Encounter("strange", templates={"right_index": bd.Template("right_index", "x", minutiae=PRINTS[1])}),
            bd.Encounter("bella", templates={"right_index": AGAIN[0]}),
            bd.Encounter("faceless", templates={"face": AGAIN[0]}),
            bd.Encounter("broken", templates={"right_index": AGAIN[0][:-1]}),
            bd.Encounter("photographed", [bd.Finger(finger(1), "right_index")]),
        ]
        decisions = list(engine.enroll_many(encounters))
        assert [d.outcome for d in decisions] == [
            "unique",
            "refused",
            "refused",
            "duplicate",
            "refused",
            "refused",
            "refused",
        ]
        assert "skeleton-1" in decisions[-1].refusals[0].detail


def test_records_that_are_declared_to_be_of_the_extractor_compare_with_captures(tmp_path):
    config = bd.Config(finger=bd.FingerConfig(model=None, record_model_id="skeleton-1"))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        assert (
            engine.add_templates(["anna", "bella"], {"right_index": [legacy(0), None], "left_ring": [None, legacy(1)]})
            == 2
        )
        assert engine.identify(bd.Encounter(captures=[bd.Finger(finger(0), "right_index")])).best.subject_id == "anna"
        for wrong in ({"right_index": [None]}, {"face": [legacy(0)]}, {"right_index": [b"?"]}):
            with pytest.raises(bd.InvalidInput, match=";"):
                engine.add_templates(["clara"], wrong)
    with bd.Engine.open(tmp_path / "g", config) as engine:
        assert engine.info()["columns"]["left_ring"]["subjects"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("seal_rows", [2, 1000])
def test_load_takes_records_by_column_and_by_their_own_position(tmp_path, seal_rows):
    several = bd.write_minutiae(
        [bd.Template(p, "theirs", minutiae=PRINTS[i]) for i, p in ((1, "left_ring"), (2, "right_thumb"))], version=2011
    )
    table = {
        "subject_id": ["anna", "bella", "bad", "clara", "nobody"],
        "right_index": [legacy(0), None, b"FMR\0 20\0", legacy(2), None],
        "unknown": [None, several, None, legacy(1, "right_index"), b""],
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    config = bd.Config(gallery=bd.GalleryConfig(seal_rows=seal_rows))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        first = jobs.load(engine, tmp_path / "t.parquet")
        again = jobs.load(engine, tmp_path / "t.parquet")
        assert (first.added, first.refused, again.added, again.present) == (3, 2, 0, 3)
        assert first.reasons == {"no template": 1, "right_index is not a sound minutiae record": 1}
        assert first.refused_rows == (2, 4)
        counts = {column: facts["subjects"] for column, facts in engine.info()["columns"].items()}
        assert counts == {"right_thumb": 1, "right_index": 2, "left_ring": 1}
        best = engine.identify(bd.Encounter(captures=[bd.Finger(AGAIN[2], "right_index")])).best
        assert best.subject_id == "clara"
        assert engine.problems() == []


def test_a_subject_loaded_again_with_another_record_is_distinguished(tmp_path):
    def table(seed: int) -> list[pa.RecordBatch]:
        return [pa.record_batch({"subject_id": ["anna"], "left_ring": [legacy(seed)]})]

    with bd.Engine.open(tmp_path / "g") as engine:
        assert jobs.load(engine, table(0)).added == 1
        result = jobs.load(engine, table(1))
        assert result.reasons == {"enrolled with other templates": 1}
        mixed = pa.record_batch({"subject_id": ["bella"], "left_ring": [legacy(1)], "face": [[1.0, 0.0]]})
        assert jobs.load(engine, [mixed]).added == 1
        assert jobs.load(engine, [mixed]).present == 1


def one_view(minutiae: bytes, extension: bytes = b"", stated: int | None = None) -> bytes:
    count, length = len(minutiae) // 6, len(extension) if stated is None else stated
    return iso_2005(b"\x02\x00\x50" + bytes([count]) + minutiae + struct.pack(">H", length) + extension)


def test_a_few_minutiae_just_outside_are_moved_to_the_edge_and_counted():
    inside = strewn(30).body
    outside = body((1, SIDE, 9, 1, 50), (1, 20, SIDE + 3, 2, 50), (1, 5, SIDE + 300, 3, 50))
    (view,) = read_views(one_view(inside + outside))
    moved = body((1, SIDE - 1, 9, 1, 50), (1, 20, SIDE - 1, 2, 50))
    assert view.record.body == inside + moved
    assert (view.record.moved, view.record.dropped) == (2, 1)
    template = bd.read_minutiae(one_view(inside + outside))["right_index"]
    assert template.provenance == ("minutiae outside of the image: 2 moved to its edge, 1 dropped",)
    (extracted,) = EXTRACTOR.extract([bd.Finger(one_view(inside + outside), "right_index")])
    assert extracted.provenance == template.provenance


def test_a_record_with_many_minutiae_outside_states_a_wrong_size():
    with pytest.raises(bd.InvalidInput, match=r"20 of 50 minutiae outside its 400 x 400 pixels"):
        read_views(one_view(strewn(30).body + body(*[(1, SIDE, 9, 1, 50)] * 20)))


@pytest.mark.parametrize("behind", [bytes(50), b"\n", b"\xad\xbe\xf0\x1d"])
def test_what_lies_behind_the_stated_length_is_ignored(behind):
    record = one_view(strewn(20).body)
    assert read_views(record + behind) == read_views(record)
    recent = write_record(strewn(20), 2, 80, version=2011)
    assert read_views(recent + behind) == read_views(recent)


@pytest.mark.parametrize("stated", [9, 11, 12])
def test_extended_data_of_another_length_than_stated_are_left(stated):
    extension = b"\0\2\0\x0b\1\1\2\3\4\5\6"
    assert read_record(one_view(strewn(20).body, extension, stated)) == strewn(20)


def test_a_record_of_ansi_378_of_2009_is_named_as_not_read():
    content = b"FMR\x00030\0" + struct.pack(">I", 296) + bytes.fromhex("01030000") + bytes(280)
    with pytest.raises(bd.InvalidInput, match=r"ANSI/INCITS 378-2009, which is not read"):
        read_views(content)
    (refusal,) = EXTRACTOR.extract([bd.Finger(content)])
    assert (refusal.reason, "378-2009" in refusal.detail) == ("unsound_record", True)
