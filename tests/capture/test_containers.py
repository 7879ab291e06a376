"""Containers of registers: every picture in them is a capture, and what is not read is named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup.capture.pictures.containers import is_container, pictures_in, read_captures
from biodedup.capture.pictures.unread import unread_kind
from biodedup.capture.reading import held
from biodedup.config import CaptureConfig
from tests.support.images import finger
from tests.support.records import encoded, fac_2005, fac_2011, fir_2005, fir_2011, itl, tagged, type_4

EXTRACTOR = bd.Extractor()
GREY = finger(3)
PRINT = encoded(GREY, "PNG")
SIZE = GREY.shape[::-1]


@pytest.fixture(scope="module")
def jpeg(portrait) -> bytes:
    return encoded(portrait, "JPEG")


def columns(content: bytes) -> list[str]:
    return [capture.column for capture in read_captures(content)]


@pytest.mark.parametrize("writer", [fir_2005, fir_2011])
def test_a_finger_record_gives_each_picture_with_position_and_resolution(writer):
    content = writer([(2, PRINT), (7, PRINT), (11, PRINT)], dpi=1000)
    right, left, thumb = read_captures(content)
    assert (right.position, left.position, thumb.position) == ("right_index", "left_index", "right_thumb")
    assert right.dpi == 1000
    assert right.data == PRINT


def test_the_record_of_ansi_381_is_told_from_iso_by_its_longer_header():
    assert columns(fir_2005([(2, PRINT), (3, PRINT)], ansi=True)) == ["right_index", "right_middle"]


def test_pixels_without_compression_are_taken_as_they_are():
    (capture,) = read_captures(fir_2005([(2, GREY.tobytes())], size=SIZE, compression=0))
    assert (capture.data == GREY).all()


def test_certificates_and_several_quality_blocks_are_passed_over():
    content = fir_2011([(2, PRINT)], certified=True, quality=(254, 60))
    (picture,) = pictures_in(content)
    assert picture.quality == 60
    assert picture.data == PRINT


def test_a_face_record_gives_its_pictures(jpeg):
    for content in (
        fac_2005([jpeg, jpeg], points=3),
        fac_2011([jpeg, jpeg]),
        fac_2011([jpeg, jpeg], length_of_data=False),
    ):
        assert [capture.data for capture in read_captures(content)] == [jpeg, jpeg]


def test_what_lies_behind_the_stated_length_is_ignored(jpeg):
    for content in (fir_2005([(2, PRINT)]), fir_2011([(2, PRINT)]), fac_2005([jpeg]), fac_2011([jpeg])):
        assert read_captures(content + b"\0\n rest")


def test_an_ansi_nist_file_gives_face_and_fingers(jpeg):
    raw = {6: SIZE[0], 7: SIZE[1], 8: 1, 9: 500, 10: 500, 11: "NONE", 12: 8, 13: 3}
    content = itl(
        [
            type_4(2, GREY.tobytes(), SIZE, 0),
            tagged(14, {2: 1, 3: 0, 6: SIZE[0], 7: SIZE[1], 8: 1, 9: 1000, 10: 1000, 11: "PNG", 12: 8, 13: 7}, PRINT),
            tagged(13, {2: 2, 3: 4, **raw}, GREY.tobytes()),
            tagged(10, {2: 3, 3: "FACE", 6: 512, 7: 512, 8: 0, 9: 1, 10: 1, 11: "JPEGB", 12: "YCC"}, jpeg),
            tagged(10, {2: 4, 3: "TATTOO", 6: 512, 7: 512, 8: 0, 9: 1, 10: 1, 11: "JPEGB", 12: "YCC"}, jpeg),
        ]
    )
    plain, rolled, latent, face = read_captures(content)
    assert (plain.position, plain.dpi) == ("right_index", 500)
    assert (plain.data == GREY).all()
    assert (rolled.position, rolled.dpi, rolled.data) == ("left_index", 1000, PRINT)
    assert latent.position == "right_middle"
    assert isinstance(face, bd.Face) and face.data == jpeg


@pytest.mark.slow
def test_a_capture_takes_its_picture_from_a_record(portrait, jpeg):
    content = fir_2011([(2, PRINT), (7, encoded(finger(4), "PNG"))])
    face, right, left, absent, unclear = EXTRACTOR.extract(
        [
            bd.Face(fac_2011([jpeg])),
            bd.Finger(content, "right_index"),
            bd.Finger(content, "left_index"),
            bd.Finger(content, "left_thumb"),
            bd.Finger(content),
        ]
    )
    assert isinstance(face, bd.Template)
    (itself,) = EXTRACTOR.extract([bd.Finger(PRINT, "right_index")])
    assert isinstance(right, bd.Template)
    assert isinstance(left, bd.Template)
    assert right.minutiae == itself.minutiae
    assert left.minutiae != itself.minutiae
    assert (absent.column, absent.reason) == ("left_thumb", "not_in_record")
    assert "right_index, left_index" in unclear.detail


def test_a_finger_of_unknown_position_gets_the_position_of_its_record():
    (template,) = EXTRACTOR.extract([bd.Finger(fir_2005([(9, PRINT)], compression=5))])
    assert isinstance(template, bd.Template), template
    assert template.column == "left_ring"


def test_of_several_faces_the_one_of_the_highest_quality_is_taken(portrait, jpeg):
    grey = encoded(portrait[..., 0], "JPEG")
    (result,) = EXTRACTOR.extract([bd.Face(fac_2011([jpeg, grey], quality=(70,)))])
    (itself,) = EXTRACTOR.extract([bd.Face(jpeg)])
    assert float(result.embedding @ itself.embedding) > 0.9999


def test_an_encounter_opens_a_container_and_refuses_a_slap_in_it(jpeg, tmp_path):
    path = tmp_path / "card.an2"
    face = tagged(10, {2: 3, 3: "FACE", 6: 512, 7: 512, 8: 0, 11: "JPEGB", 12: "YCC"}, jpeg)
    path.write_bytes(itl([type_4(2, PRINT, SIZE, 1), type_4(13, PRINT, SIZE, 1), face]))
    parts = held([bd.Finger(path), bd.Missing("left_thumb", "amputated")], CaptureConfig())
    assert [part.column for part in parts] == ["right_index", "unknown", "face", "left_thumb"]
    (slap,) = EXTRACTOR.extract([parts[1]])
    assert (slap.reason, slap.detail.startswith("the record holds right four fingers")) == ("several_fingers", True)


@pytest.mark.slow
def test_an_engine_enrols_the_captures_of_a_container(jpeg, tmp_path):
    face = tagged(10, {2: 3, 3: "FACE", 6: 512, 7: 512, 8: 0, 11: "JPEGB", 12: "YCC"}, jpeg)
    content = itl([type_4(2, PRINT, SIZE, 1), face])
    with bd.Engine.open(tmp_path / "g", bd.Config()) as engine:
        engine.enroll(bd.Encounter("anna", captures=[bd.Finger(content)]))
        (encounter,) = engine.encounters("anna")
        assert sorted(encounter.templates) == ["face", "right_index"]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"\x1f\x8b\x08\0\0", "a file packed by gzip"),
        (b"data:image/jpeg;base64,/9j/4AAQ", "base64 text of a picture (a data URI)"),
        (b"/9j/4AAQSkZJRg", "base64 text of a JPEG file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", "a drawing in SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a picture of HEIC"),
        (b"IIR\x00020\0" + bytes(40), "an iris image record"),
        (b'<?xml version="1.0"?><BIR xmlns="x"></BIR>', "a CBEFF record in XML"),
        (b'<fa:face xmlns="http://standards.iso.org/iso-iec/39794/-5">', "an ISO/IEC 39794 record in XML"),
        ("<a><NISTBiometricInformationExchangePackage/>".encode("utf-16-le"), "an ANSI/NIST-ITL file in XML"),
        (b"\x65\x82\x01\x00" + bytes(256), "an ISO/IEC 39794-5 record"),
        (b"\x7f\x61\x81\x80" + bytes(128), "a CBEFF record"),
        (
            bytes(20) + fac_2005([b"\xff\xd8\xff" + bytes(40)]),
            "a face image record of ISO/IEC 19794 inside another record, such as CBEFF",
        ),
        (bytes(128) + b"DICM" + bytes(99), "a DICOM file"),
        (encoded(GREY, "ICO"), "an icon (ICO)"),
        (encoded(GREY, "TGA"), "a picture of TGA"),
        (encoded(GREY, "PCX"), "a picture of PCX"),
        (encoded(GREY, "EPS"), "a PostScript document (EPS)"),
        (b"8BPS\0\1" + bytes(40), "a Photoshop picture (PSD)"),
        (b"\xff\x0a" + bytes(40), "a picture of JPEG XL"),
        (b"\0\0\0\x18ftypavif", "a picture of AVIF"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"\n%PDF-1.4 ...", "a PDF document"),
        (b"P7\nWIDTH 9\n", "a picture of PAM"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"RklSADAxMAAAAA", "base64 text of a finger image record"),
    ],
)
def test_what_is_not_read_is_named_in_the_refusal(content, name):
    assert unread_kind(content) == name
    (refusal,) = EXTRACTOR.extract([bd.Face(content)])
    assert refusal.reason == "not_an_image"
    assert name in refusal.detail
    with pytest.raises(bd.InvalidInput, match="is not read"):
        read_captures(content)


def test_colours_of_a_face_that_are_no_rgb_are_refused_by_name_and_not_taken_for_grey(portrait):
    side = {6: portrait.shape[1], 7: portrait.shape[0], 8: 0, 11: "NONE"}
    content = itl([tagged(10, {2: 3, 3: "FACE", **side, 12: "YCC"}, portrait.tobytes())])
    with pytest.raises(bd.InvalidInput, match="YCC"):
        pictures_in(content)


def test_a_record_of_an_unknown_version_is_refused_with_its_version():
    (refusal,) = EXTRACTOR.extract([bd.Finger(b"FIR\x00050\0" + bytes(60))])
    assert refusal.reason == "unsound_record"
    assert "050" in refusal.detail


SOUND = [
    fir_2005([(2, PRINT[:200]), (3, PRINT[:50])]),
    fir_2005([(2, bytes(64))], size=(8, 8), compression=0),
    fir_2011([(2, PRINT[:100])], certified=True),
    fac_2005([b"\xff\xd8\xff" + bytes(40)], points=2),
    fac_2011([b"\xff\xd8\xff" + bytes(40)]),
    itl(
        [
            type_4(2, bytes(64), (8, 8), 0),
            tagged(14, {2: 1, 6: 8, 7: 8, 8: 1, 9: 500, 10: 500, 11: "NONE", 12: 8, 13: 7}, bytes(64)),
            tagged(10, {2: 3, 3: "FACE", 6: 8, 7: 8, 8: 2, 9: 197, 10: 197, 11: "NONE", 12: "RGB"}, bytes(192)),
        ]
    ),
]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SOUND), st.data())
def test_no_bytes_make_a_reader_raise_anything_but_invalid_input(content, data):
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(0, 6))):
        damaged[data.draw(st.integers(0, min(len(damaged), 260) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for read in (pictures_in, read_captures):
        try:
            pictures = read(damaged)
        except bd.InvalidInput:
            continue
        assert isinstance(pictures, list)
    assert is_container(damaged) in (True, False)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=120),
    st.sampled_from([b"FIR\x00010\0", b"FIR\x00020\0", b"FAC\x00010\0", b"FAC\x00030\0", b"1.001:99\x1d", b""]),
)
def test_any_bytes_behind_a_mark_are_refused_as_such(rest, mark):
    (capture,) = held([bd.Finger(mark + rest)], CaptureConfig())
    with pytest.raises(bd.InvalidInput):
        read_captures(mark + rest)
    assert isinstance(capture, bd.Finger)


def test_every_sound_record_of_the_damaging_test_is_read():
    assert [len(pictures_in(content)) for content in SOUND] == [2, 1, 1, 1, 1, 3]
    assert np.array_equal(read_captures(SOUND[1])[0].data, np.zeros((8, 8), np.uint8))
