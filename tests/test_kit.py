"""Field kits: nothing is doubled, nothing is lost, and nobody else's records are taken."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from conftest import again, people
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup import jobs
from biodedup.cli import main
from biodedup.errors import BatchDamaged, UnknownKit
from biodedup.jobs.kit_file import BatchReader, BatchWriter, Record, decode, encode, gaps
from biodedup.jobs.kit_keys import KitKey, load_key, load_trusted
from biodedup.synthetic import draw_impression, draw_master

MONDAY = 1_790_000_000.0  # the kit's key is made
FRIDAY = MONDAY + 4 * 86_400
YEAR = 365 * 86_400


class Stop(Exception):
    """A job is killed here."""


def stop_at(stage: str, count: int):
    def progress(at: str, done: int, total: int) -> None:
        if at == stage and done >= count:
            raise Stop

    return progress


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> KitKey:
    folder = tmp_path_factory.mktemp("kit")
    jobs.make_keys("K1", folder / "K1.key", clock=lambda: MONDAY)
    return load_key(folder / "K1.key")


@pytest.fixture
def centre(tmp_path: Path) -> Path:
    """A folder with the keys of kits A and B, whose public halves are trusted."""
    (tmp_path / "trusted").mkdir()
    for kit in "AB":
        jobs.make_keys(kit, tmp_path / f"{kit}.key", clock=lambda: MONDAY)
        (tmp_path / "trusted" / f"{kit}.pub").write_bytes((tmp_path / f"{kit}.pub").read_bytes())
    return tmp_path


def table(vectors: np.ndarray, names: list[str] | None = None, **columns: list[object]) -> pa.Table:
    names = names or [f"s{i}" for i in range(len(vectors))]
    return pa.table({"subject_id": names, "face": [v.tolist() for v in vectors], **columns})


def packed(centre: Path, kit: str, out: str, content: pa.Table, clock: float = MONDAY + 86_400) -> Path:
    manifest = centre / f"{out}.parquet"
    pa.parquet.write_table(content, manifest)
    jobs.pack_batch(manifest, centre / out, centre / f"{kit}.key", clock=lambda: clock)
    return centre / out


def ingested(centre: Path, *batches: Path, out: str = "o.parquet", gallery: str = "g", now: float = FRIDAY, **more):
    config = bd.Config(batch_size=4)
    return jobs.ingest_batches(
        batches, centre / gallery, centre / "trusted", centre / out, config, clock=lambda: now, **more
    )


def outcomes(result: jobs.IngestResult) -> list[str]:
    return [outcome.outcome for outcome in result.outcomes]


def enrolled(centre: Path, gallery: str = "g") -> list[str]:
    with bd.Engine.open(centre / gallery, read_only=True) as engine:
        return engine.subject_ids()


def records_of(count: int, start: int = 1) -> list[Record]:
    rng = np.random.default_rng(start)
    return [
        Record(
            bd.Encounter(
                f"s{i}",
                [bd.Face(rng.bytes(int(rng.integers(1, 300)))), bd.Missing("left_thumb", "bandaged")],
                {"right_index": bd.Template("right_index", "m", people(1, i)[0], b"minutiae", 40.0)},
                f"e{i}",
                ["village"],
            ),
            i,
            MONDAY + i,
            MONDAY + 100,
            (bd.Refusal("face", "blurred", "", 0.01, 0.1),),
        )
        for i in range(start, start + count)
    ]


def written(key: KitKey, records: list[Record], void: tuple[int, ...] = ()) -> bytes:
    file = io.BytesIO()
    writer = BatchWriter(file, key)
    for record in records:
        writer.add(record)
    writer.finish(void)
    return file.getvalue()


def read(path: Path, key: KitKey) -> tuple[list[Record], BatchReader]:
    with BatchReader(path, {key.public.fingerprint: key.public}) as batch:
        return list(batch), batch


def payloads(records: list[Record]) -> list[bytes]:
    return [encode(record) for record in records]


# the file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_the_same_records_make_the_same_bytes(key, tmp_path):
    records = records_of(5)
    content = written(key, records, (8, 9))
    assert content == written(key, records, (8, 9))
    (tmp_path / "b.kit").write_bytes(content)
    found, batch = read(tmp_path / "b.kit", key)
    assert (batch.whole, batch.void) == (True, (8, 9))
    assert payloads(found) == payloads(records)
    assert [record.sequence for record in found] == [1, 2, 3, 4, 5]
    given = found[0].encounter.templates["right_index"]
    assert np.array_equal(given.embedding, records[0].encounter.templates["right_index"].embedding)
    assert found[0].refusals == records[0].refusals
    assert b"minutiae" not in repr(found[0]).encode()


def test_a_file_cut_anywhere_yields_its_whole_records_and_says_that_it_is_cut(key, tmp_path):
    records = records_of(4)
    content, expected = written(key, records), payloads(records)
    ends = [len(written(key, records[:n])) - len(written(key, [])) for n in range(5)]
    head = len(written(key, [])) - _end_bytes(key)

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(content) - 1) | st.sampled_from([head + end + d for end in ends for d in (-1, 0, 1)]))
    def cut(length: int) -> None:
        length = min(length, len(content) - 1)
        (tmp_path / "cut.kit").write_bytes(content[:length])
        found, batch = read(tmp_path / "cut.kit", key)
        assert not batch.whole
        assert payloads(found) == expected[: len(found)]
        assert len(found) == sum(head + end <= length for end in ends[1:])

    cut()


def _end_bytes(key: KitKey) -> int:
    return 17 + len(b'{"records":0,"void":[]}') + 64


def test_a_flipped_bit_is_never_accepted_and_the_record_is_told(key, tmp_path):
    records = records_of(3)
    content, expected = written(key, records), payloads(records)
    first = len(written(key, [])) - _end_bytes(key)
    spans_of = [first + len(written(key, records[:n])) - len(written(key, [])) for n in range(4)]

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(content) * 8 - 1))
    def flip(bit: int) -> None:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped.kit").write_bytes(damaged)
        taken: list[Record] = []
        with pytest.raises((bd.InvalidInput, UnknownKit, BatchDamaged)) as caught:
            with BatchReader(tmp_path / "flipped.kit", {key.public.fingerprint: key.public}) as batch:
                for record in batch:
                    taken.append(record)
        assert payloads(taken) == expected[: len(taken)]
        at = bit // 8
        if spans_of[0] <= at < spans_of[3]:
            number = sum(at >= end for end in spans_of)  # of the record, from 1
            header = at - spans_of[number - 1] < 17
            told = "its manifest" if number == 1 else f"sequence {number - 1}"
            assert (f"after {told}" if header else "sequence") in str(caught.value).replace(
                "after the record with ", "after "
            )
            assert header or f"sequence {number} " in str(caught.value)
            assert len(taken) == number - 1

    flip()


def test_records_cannot_be_moved_left_out_added_or_carried_to_another_file(key, tmp_path):
    records = records_of(3)
    one, other = written(key, records), written(key, records_of(3, start=10))
    pieces = [written(key, records[:n])[: -_end_bytes(key)] for n in range(4)]
    head, a, b, c = pieces[0], *(pieces[n][len(pieces[n - 1]) :] for n in (1, 2, 3))
    end, foreign = one[len(pieces[3]) :], other[len(head) : -len(one[len(pieces[3]) :])]
    for forged in (
        head + b + a + c + end,
        head + a + c + end,
        head + a + a + b + c + end,
        head + a + b + end,
        head + foreign + end,
        one + b"x",
        one + one,
        head + end,
    ):
        (tmp_path / "forged.kit").write_bytes(forged)
        with pytest.raises(BatchDamaged, match="nothing of this file was taken"):
            read(tmp_path / "forged.kit", key)
    (tmp_path / "forged.kit").write_bytes(head + a + b + c + end)
    assert len(read(tmp_path / "forged.kit", key)[0]) == 3


def test_a_signed_record_that_cannot_be_understood_is_damage_and_no_crash(key, tmp_path):
    file = io.BytesIO()
    writer = BatchWriter(file, key)
    for payload in (b"", b"\xff" * 40, encode(records_of(1)[0])[:-200]):
        with pytest.raises((pa.ArrowException, OSError, ValueError)):
            decode(payload, 1)
    writer._add(b"R", 7, b"\xff" * 40)
    (tmp_path / "odd.kit").write_bytes(file.getvalue())
    with pytest.raises(BatchDamaged, match="sequence 7 is signed and cannot be read"):
        read(tmp_path / "odd.kit", key)


def test_other_files_are_refused_with_what_to_do(key, tmp_path):
    (tmp_path / "photo.kit").write_bytes(b"\xff\xd8 a photo")
    newer = bytearray(written(key, records_of(1)))
    newer[7] = 9
    (tmp_path / "newer.kit").write_bytes(newer)
    for name, text in (("photo.kit", "not a batch file"), ("newer.kit", "version 9"), ("none.kit", "does not exist")):
        with pytest.raises(bd.InvalidInput, match=text):
            read(tmp_path / name, key)


def test_gaps_are_what_is_missing_below_the_largest():
    assert gaps([]) == gaps([1, 2, 3]) == []
    assert gaps([4, 5, 7, 2**62]) == [(1, 3), (6, 6), (8, 2**62 - 1)]


# keys -------------------------------------------------------------------------------------------------------------


def test_a_private_key_is_for_its_owner_alone_and_is_never_overwritten(tmp_path):
    public = jobs.make_keys("kit-07", tmp_path / "kit.key", clock=lambda: MONDAY)
    assert os.stat(tmp_path / "kit.key").st_mode & 0o777 == 0o600
    assert "PRIVATE" not in (tmp_path / "kit.pub").read_text()
    loaded = load_key(tmp_path / "kit.key")
    assert loaded.public.fingerprint == public.fingerprint
    assert "PRIVATE" not in repr(loaded)
    (trusted,) = load_trusted(tmp_path).values()
    assert (trusted.kit_id, trusted.made_at) == ("kit-07", MONDAY)
    with pytest.raises(bd.InvalidInput, match="never overwritten"):
        jobs.make_keys("kit-07", tmp_path / "kit.key")
    for wrong in ("", "../x", "a b", "x" * 65):
        with pytest.raises(bd.InvalidInput, match="kit id"):
            jobs.make_keys(wrong, tmp_path / "other.key")
    secret = json.loads((tmp_path / "kit.key").read_text())["private_key"]
    (tmp_path / "kit.key").write_text(json.dumps({"kit_id": "k", "made_at": 0, "private_key": secret[:60]}))
    with pytest.raises(bd.InvalidInput) as caught:
        load_key(tmp_path / "kit.key")
    assert secret[30:60] not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(bd.InvalidInput, match=r"no \.pub files"):
        load_trusted(tmp_path / "empty")


# packing ----------------------------------------------------------------------------------------------------------


def test_the_same_manifest_makes_the_same_bytes_and_batches_never_share_sequences(centre):
    first = packed(centre, "A", "one.kit", table(people(5)))
    content = first.read_bytes()
    later = packed(centre, "A", "one.kit", table(people(5)), clock=FRIDAY)
    assert later.read_bytes() == content
    first.unlink()
    assert packed(centre, "A", "one.kit", table(people(5)), clock=FRIDAY).read_bytes() == content
    second = packed(centre, "A", "two.kit", table(people(3, 9), ["x", "y", "z"]))
    kit = load_key(centre / "A.key")
    assert [record.sequence for record in read(second, kit)[0]] == [6, 7, 8]
    names = [record.encounter.encounter_id for record in read(second, kit)[0]]
    assert names == [f"A-{kit.public.fingerprint.hex()[:6]}-{n:06d}" for n in (6, 7, 8)]


def test_after_a_recapture_only_the_changed_record_has_a_new_number_and_the_old_one_is_void(centre):
    vectors = people(4)
    packed(centre, "A", "b.kit", table(vectors))
    changed = vectors.copy()
    changed[1] = people(1, 77)[0]
    batch = packed(centre, "A", "b.kit", table(changed))
    records, reader = read(batch, load_key(centre / "A.key"))
    assert [record.sequence for record in records] == [1, 5, 3, 4]
    assert reader.void == (2,)
    result = ingested(centre, batch)
    assert result.gaps == ()
    assert result.batches[0].out_of_order == 1


def test_a_batch_is_never_replaced_by_one_that_lacks_its_records(centre):
    packed(centre, "A", "b.kit", table(people(3)))
    content = (centre / "b.kit").read_bytes()
    with pytest.raises(bd.InvalidInput, match="2 records that this manifest does not name"):
        packed(centre, "A", "b.kit", table(people(1)))
    with pytest.raises(bd.InvalidInput, match="not a sound batch of this kit"):
        packed(centre, "B", "b.kit", table(people(3)))
    assert (centre / "b.kit").read_bytes() == content


def test_a_kit_killed_while_packing_makes_the_same_file_when_started_again(centre, monkeypatch):
    content = table(people(40))
    pa.parquet.write_table(content, centre / "m.parquet")

    def pack(out: str, **more):
        return jobs.pack_batch(
            centre / "m.parquet", centre / out, centre / "A.key", bd.Config(batch_size=8), clock=lambda: FRIDAY, **more
        )

    for stage, count in (("packing", 16), ("comparing", 1)):
        with pytest.raises(Stop):
            pack("b.kit", progress=stop_at(stage, count))
        assert not (centre / "b.kit").exists()
    with monkeypatch.context() as patched:  # between the state and the file
        real = Path.replace
        patched.setattr(Path, "replace", lambda self, to: _stop() if Path(to).name == "b.kit" else real(self, to))
        with pytest.raises(Stop):
            pack("b.kit")
    assert json.loads((centre / "A.state.json").read_text())["next_sequence"] == 41
    pack("b.kit")
    sequences = [record.sequence for record in read(centre / "b.kit", load_key(centre / "A.key"))[0]]
    assert sequences == list(range(1, 41))


def _stop() -> None:
    raise Stop


def test_a_kit_without_its_state_gives_out_no_numbers(centre):
    packed(centre, "A", "b.kit", table(people(2)))
    (centre / "A.state.json").unlink()
    with pytest.raises(bd.InvalidInput, match="restore it, or make new keys"):
        packed(centre, "A", "c.kit", table(people(2)))


def test_a_kit_finds_the_doubles_of_its_own_batch(centre):
    vectors = people(6)
    vectors[4] = again(vectors[1:2], 0.95)[0]
    names = ["a", "b", "c", "d", "e", "a"]
    pa.parquet.write_table(table(vectors, names, encounter_id=[f"v{i}" for i in range(6)]), centre / "m.parquet")
    result = jobs.pack_batch(centre / "m.parquet", centre / "b.kit", centre / "A.key")
    assert [double.subject_ids for double in result.doubles] == [("b", "e"), ("a", "a")]
    assert result.doubles[0].score_db > 60 and result.doubles[1].score_db is None
    page = (centre / "b.html").read_text()
    assert "look like one person" in page and "<script" not in page


# a manifest of images, as a team writes it -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fingers() -> list[bytes]:
    """Seven generated fingers, and another impression of the first."""
    rng = np.random.default_rng(11)
    masters = [draw_master(rng) for _ in range(7)]
    images = [draw_impression(rng, master).image for master in [*masters, masters[0]]]
    return [cv2.imencode(".png", image)[1].tobytes() for image in images]


def manifest_of(centre: Path, rows: list[dict[str, object]]) -> Path:
    names = dict.fromkeys(name for row in rows for name in row)
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    (centre / "team.csv").write_text("\n".join(lines) + "\n")
    return centre / "team.csv"


def test_a_team_packs_images_and_hears_what_to_capture_again(centre, fingers):
    for i, content in enumerate(fingers):
        (centre / f"f{i}.png").write_bytes(content)
    (centre / "torn.png").write_bytes(fingers[1][: len(fingers[1]) // 2])
    (centre / "text.png").write_text("no image")
    rows = [
        {"subject_id": f"00{i}", "path": f"f{i}.png", "position": "right_index", "captured_at": "2026-09-22T08:00:00"}
        for i in range(6)
    ]
    rows += [
        {"subject_id": "006", "path": "torn.png", "position": "right_index", "encounter_id": "e6"},
        {"subject_id": "006", "path": "f6.png", "position": "left_index", "encounter_id": "e6"},
        {"subject_id": "007", "path": "text.png", "position": "right_index"},
        {"subject_id": "008", "path": "absent.png", "position": "right_index"},
        {"subject_id": "009", "path": "f1.png", "position": "righ_index"},
        {"subject_id": "010", "path": "f1.png", "position": "right_index", "dpi": "many"},
        {"subject_id": "011", "path": "f1.png", "position": "right_index", "encounter_id": "e1"},
        {"subject_id": "012", "path": "f2.png", "position": "right_index", "encounter_id": "e1"},
        {"subject_id": "000", "position": "left_thumb", "missing": "amputated"},
        {"subject_id": "013", "path": ".", "position": "right_index"},
        {"subject_id": "014", "path": "f7.png", "position": "right_index"},
        {"subject_id": "", "path": "f7.png", "position": "right_index"},
    ]
    manifest = manifest_of(centre, rows)

    def pack(out: str, **more: object) -> jobs.PackResult:
        return jobs.pack_batch(manifest, centre / out, centre / "A.key", **more)

    result = pack("b.kit")
    broken = {one.subject_id: one.problem for one in result.broken}
    assert broken.keys() == {"008", "009", "010", "011, 012", "013", ""}
    assert "absent.png does not exist" in broken["008"] and "righ_index" in broken["009"]
    assert "'many'" in broken["010"] and "give each its own" in broken["011, 012"] and "not a file" in broken["013"]
    refused = {record.subject_id: [r.reason for r in record.refusals] for record in result.recaptures}
    assert refused.keys() == {"006", "007"}
    assert [record.subject_id for record in result.packed] == [*(f"00{i}" for i in range(8)), "014"]
    records, _ = read(centre / "b.kit", load_key(centre / "A.key"))
    assert bd.Missing("left_thumb", "amputated") in records[0].encounter.captures
    assert [refusal.column for refusal in records[6].refusals] == ["right_index"]
    assert len(records[6].encounter.captures) == 2
    page = (centre / "b.html").read_text()
    assert "Capture again" in page and "absent.png does not exist" in page

    good = pack("good.kit", only_good=True)
    assert [record.subject_id for record in good.packed] == [*(f"00{i}" for i in range(7)), "014"]
    (mixed,) = (r for r in read(centre / "good.kit", load_key(centre / "A.key"))[0] if r.encounter.subject_id == "006")
    assert [capture.column for capture in mixed.encounter.captures] == ["left_index"]

    small = pack("templates.kit", as_templates=True)
    templates = read(centre / "templates.kit", load_key(centre / "A.key"))[0]
    assert len(small.packed) == 8
    assert (centre / "templates.kit").stat().st_size < (centre / "b.kit").stat().st_size / 4
    assert all(isinstance(c, bd.Missing) for record in templates for c in record.encounter.captures)
    assert all(isinstance(given, bd.Template) for r in templates for given in r.encounter.templates.values())

    taken = ingested(centre, centre / "good.kit", centre / "templates.kit")
    assert outcomes(taken)[:7] == [*["enrolled"] * 6, "review"]  # nobody else has a left index
    assert outcomes(taken)[7] in ("duplicate", "review", "enrolled")  # an impression as poor as it may be
    assert outcomes(taken)[8:15] == ["subject_exists"] * 6 + ["conflict"]  # e6 came with captures first
    assert len(enrolled(centre)) in (6, 7)


def test_what_was_extracted_once_is_not_extracted_again(centre, fingers, monkeypatch):
    for i, content in enumerate(fingers[:4]):
        (centre / f"f{i}.png").write_bytes(content)
    rows = [{"subject_id": f"s{i}", "path": f"f{i}.png", "position": "right_index"} for i in range(3)]
    asked: list[int] = []
    real = bd.Extractor.extract
    monkeypatch.setattr(
        "biodedup.jobs.kit_pack.Extractor.extract",
        lambda self, captures: asked.append(len(captures)) or real(self, captures),
    )
    first = jobs.pack_batch(manifest_of(centre, rows), centre / "b.kit", centre / "A.key")
    content = (centre / "b.kit").read_bytes()
    assert jobs.pack_batch(manifest_of(centre, rows), centre / "b.kit", centre / "A.key") == first
    assert (centre / "b.kit").read_bytes() == content
    rows[1]["path"] = "f3.png"
    again_packed = jobs.pack_batch(manifest_of(centre, rows), centre / "b.kit", centre / "A.key")
    assert [record.sequence for record in again_packed.packed] == [1, 4, 3]
    assert sum(asked) == 4


def test_what_is_no_manifest_is_refused_whole(centre):
    for name, content, text in (
        ("no.csv", "name,photo\na,b\n", "lacks the columns"),
        ("empty.csv", "subject_id,path\n", "no rows"),
        ("none.csv", "", "not a readable table"),
        ("bytes.parquet", "PAR1 no", "not a readable table"),
    ):
        (centre / name).write_text(content)
        with pytest.raises(bd.InvalidInput, match=text):
            jobs.pack_batch(centre / name, centre / "b.kit", centre / "A.key")
    with pytest.raises(bd.InvalidInput, match="does not exist"):
        jobs.pack_batch(centre / "gone.csv", centre / "b.kit", centre / "A.key")


# at the centre ----------------------------------------------------------------------------------------------------


def test_the_same_batch_twice_is_taken_once(centre):
    batch = packed(centre, "A", "b.kit", table(people(10)))
    assert outcomes(ingested(centre, batch)) == ["enrolled"] * 10
    second = ingested(centre, batch, out="again.parquet")
    assert outcomes(second) == ["already_taken"] * 10
    assert second.batches[0].state == "repeated" and second.batches[0].first_received_at == FRIDAY
    assert {o.decision for o in second.outcomes} == {"unique"}
    assert len(enrolled(centre)) == 10
    both = ingested(centre, batch, batch, gallery="other")
    assert outcomes(both) == ["enrolled"] * 10 + ["already_taken"] * 10
    assert [one.state for one in both.batches] == ["whole", "repeated"]


def test_two_kits_with_copies_of_one_record_bring_it_once(centre):
    vectors = people(6)
    names = [f"visit-{i}" for i in range(6)]
    a = packed(centre, "A", "a.kit", table(vectors[:4], encounter_id=names[:4]))
    b = packed(centre, "B", "b.kit", table(vectors[2:], [f"s{i}" for i in range(2, 6)], encounter_id=names[2:]))
    result = ingested(centre, a, b)
    assert outcomes(result) == ["enrolled"] * 4 + ["already_taken"] * 2 + ["enrolled"] * 2
    assert result.outcomes[4].first_from == "kit A, sequence 3"
    assert sorted(enrolled(centre)) == [f"s{i}" for i in range(6)]


def test_one_encounter_with_two_contents_is_a_conflict_and_the_first_stays(centre):
    vectors = people(3)
    a = packed(centre, "A", "a.kit", table(vectors[:1], ["s0"], encounter_id=["e"]))
    b = packed(centre, "B", "b.kit", table(vectors[1:], ["s1", "s2"], encounter_id=["e", "f"]))
    result = ingested(centre, a, b)
    assert outcomes(result) == ["enrolled", "conflict", "enrolled"]
    assert result.outcomes[1].first_from == "kit A, sequence 1"
    assert enrolled(centre) == ["s0", "s2"]
    page = (centre / "o.html").read_text()
    assert "Conflicts" in page and "What came first stays" in page


def test_one_person_under_two_encounters_is_found_by_id_or_by_biometrics(centre):
    vectors = people(2)
    mates = again(vectors, 0.95)
    a = packed(centre, "A", "a.kit", table(vectors, ["anna", "bella"]))
    others = np.concatenate([mates, people(1, 9)])
    b = packed(centre, "B", "b.kit", table(others, ["anna", "isabella", "bella"]))
    result = ingested(centre, a, b)
    assert outcomes(result) == ["enrolled", "enrolled", "subject_exists", "duplicate", "review"]
    assert "the same person" in result.outcomes[2].reason and result.outcomes[4].reason == "another_person"
    assert outcomes(ingested(centre, b)) == ["subject_exists", "already_taken", "already_taken"]
    with bd.Engine.open(centre / "g", read_only=True) as engine:  # one case, which the same file again leaves as it is
        assert [(case.subject_id, case.decision.best.subject_id) for case in engine.cases()] == [("bella", "bella")]
    assert result.outcomes[3].candidate == "bella"
    assert enrolled(centre) == ["anna", "bella"]


def test_of_a_batch_cut_in_the_middle_the_whole_records_are_taken_and_the_rest_is_asked_for(centre):
    batch = packed(centre, "A", "b.kit", table(people(9)))
    content = batch.read_bytes()
    (centre / "cut.kit").write_bytes(content[: len(content) * 6 // 10])
    result = ingested(centre, centre / "cut.kit")
    (one,) = result.batches
    assert one.state == "cut" and 0 < one.records < 9
    assert outcomes(result) == ["enrolled"] * one.records
    assert f"{one.records} records were whole" in one.problem and f"up to sequence {one.records};" in one.problem
    rest = ingested(centre, batch)
    assert outcomes(rest) == ["already_taken"] * one.records + ["enrolled"] * (9 - one.records)
    assert len(enrolled(centre)) == 9
    (centre / "stub.kit").write_bytes(content[:20])
    assert "before its first record" in ingested(centre, centre / "stub.kit").batches[0].problem


def test_nothing_is_taken_of_an_unknown_kit_or_of_a_changed_file_and_others_go_on(centre):
    good = packed(centre, "A", "good.kit", table(people(2)))
    changed = bytearray(packed(centre, "B", "bad.kit", table(people(5, 3), list("vwxyz"))).read_bytes())
    changed[len(changed) // 2] ^= 16
    (centre / "bad.kit").write_bytes(changed)
    jobs.make_keys("C", centre / "C.key")
    stranger = packed(centre, "C", "stranger.kit", table(people(2, 4), ["p", "q"]))
    result = ingested(centre, stranger, centre / "bad.kit", good, centre / "o.txt")
    assert [one.state for one in result.batches] == ["refused", "damaged", "whole", "refused"]
    fingerprint = load_key(centre / "C.key").public.fingerprint.hex()[:16]
    assert fingerprint in result.batches[0].problem and "trusted folder" in result.batches[0].problem
    assert "Copy it from kit B again" in result.batches[1].problem
    assert enrolled(centre) == ["s0", "s1"]
    only_bad = ingested(centre, stranger, gallery="untouched")
    assert only_bad.outcomes == () and not (centre / "untouched").exists()


@pytest.mark.parametrize(
    ("shift", "told"), [(YEAR, "in the future"), (-YEAR, "before the kit's key was made")], ids=["ahead", "behind"]
)
def test_a_clock_that_is_wrong_by_a_year_is_told_and_changes_nothing(centre, shift, told):
    times = [MONDAY + 3_600 * i + shift for i in range(4)]
    batch = packed(centre, "A", "b.kit", table(people(4), captured_at=times), clock=MONDAY + 86_400 + shift)
    result = ingested(centre, batch)
    assert outcomes(result) == ["enrolled"] * 4
    assert all(told in outcome.clock for outcome in result.outcomes)
    assert result.outcomes[0].received_at == FRIDAY
    ahead = result.batches[0].clock_ahead_days
    assert ahead is None if shift < 0 else 360 < ahead < 370
    assert "Clock doubtful" in (centre / "o.html").read_text()


def test_records_out_of_order_and_unreadable_times_are_taken_like_any_other(centre):
    kit = load_key(centre / "A.key")
    vectors = people(5)
    order = [3, 1, 5, 2, 4]
    times = {1: MONDAY + 7_200, 2: None, 3: MONDAY + 60, 4: 1e300, 5: -1e300}
    records = [
        Record(bd.Encounter(f"s{n}", (), {"face": vectors[n - 1]}, f"e{n}"), n, times[n], MONDAY + 9_000) for n in order
    ]
    (centre / "b.kit").write_bytes(written(kit, records))
    result = ingested(centre, centre / "b.kit")
    assert outcomes(result) == ["enrolled"] * 5
    assert [outcome.sequence for outcome in result.outcomes] == order
    assert result.batches[0].out_of_order == 2 and result.gaps == ()
    doubts = {outcome.sequence: outcome.clock for outcome in result.outcomes}
    assert doubts[3] == doubts[1] == ""
    assert "future" in doubts[4] and "precedes" in doubts[5]
    assert doubts[2] == "" and (result.summary()["clock_doubtful"], result.summary()["clock_not_checked"]) == (2, 1)
    assert "1 record came without a time of capture" in (centre / "o.html").read_text()
    assert len(pa.parquet.read_table(centre / "o.parquet")) == 5


def test_what_never_arrived_is_told_until_it_arrives(centre):
    one = packed(centre, "A", "one.kit", table(people(3)))
    two = packed(centre, "A", "two.kit", table(people(4, 5), list("abcd")))
    three = packed(centre, "A", "three.kit", table(people(1, 6), ["z"]))
    (gap,) = ingested(centre, one, three).gaps
    assert (gap.kit_id, gap.first, gap.last) == ("A", 4, 7)
    assert "4 to 7" in (centre / "o.html").read_text()
    assert ingested(centre, two).gaps == ()


def test_a_kit_whose_numbers_began_anew_is_told(centre):
    first = packed(centre, "A", "one.kit", table(people(2), encounter_id=["e0", "e1"]))
    second = packed(centre, "A", "none.kit", table(people(1, 8), ["x"], encounter_id=["e9"]))
    kit = load_key(centre / "A.key")
    (record,) = read(second, kit)[0]
    (centre / "set_back.kit").write_bytes(written(kit, [replace(record, sequence=1)]))
    result = ingested(centre, first, centre / "set_back.kit")
    assert outcomes(result) == ["enrolled"] * 3
    assert [(one.sequence, one.encounter_id, one.before) for one in result.reused] == [(1, "e9", "e0")]


def test_killed_in_the_middle_and_run_again_the_result_is_the_same_byte_for_byte(centre):
    vectors = people(30)
    vectors[20:22] = again(vectors[3:5], 0.95)
    names = [f"s{i}" for i in range(30)]
    names[25] = "s2"
    visits = [f"e{i}" for i in range(30)]
    a = packed(centre, "A", "a.kit", table(vectors[:15], names[:15], encounter_id=visits[:15]))
    copies = [*range(10, 13), *range(15, 30)]
    b = packed(
        centre,
        "B",
        "b.kit",
        table(vectors[copies], [names[i] for i in copies], encounter_id=[visits[i] for i in copies]),
    )
    whole = ingested(centre, a, b, out="whole.parquet", gallery="whole")
    assert {"enrolled", "duplicate", "review", "already_taken"} == set(outcomes(whole))
    for kill in (1, 4, 15, 18, 32):
        gallery = f"g{kill}"
        with pytest.raises(Stop):
            ingested(centre, a, b, out=f"{kill}.parquet", gallery=gallery, progress=stop_at("enrolling", kill))
        assert not (centre / f"{kill}.parquet").exists()
        ingested(centre, a, b, out=f"{kill}.parquet", gallery=gallery, now=FRIDAY + 9_999)
        for suffix in ("parquet", "html", "summary.json"):
            assert (centre / f"{kill}.{suffix}").read_bytes() == (centre / f"whole.{suffix}").read_bytes()
        assert enrolled(centre, gallery) == enrolled(centre, "whole")


def test_with_its_ledger_lost_the_centre_still_doubles_nothing(centre):
    batch = packed(centre, "A", "b.kit", table(people(5)))
    ingested(centre, batch)
    (centre / "g" / "kits.sqlite3").write_bytes(b"no database, 4,096 bytes of something else" * 100)
    with pytest.raises(bd.GalleryDamaged, match="bookkeeping alone: move it away"):
        ingested(centre, batch)
    (centre / "g" / "kits.sqlite3").unlink()
    result = ingested(centre, batch)
    assert outcomes(result) == ["already_taken"] * 5
    assert {outcome.first_from for outcome in result.outcomes} == {"enrolled directly"}
    with bd.Engine.open(centre / "g", read_only=True) as engine:
        assert engine.problems() == []


def test_an_official_does_it_from_the_command_line(tmp_path, monkeypatch, capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["biodedup", "kit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    monkeypatch.chdir(tmp_path)
    pa.parquet.write_table(table(people(3), ["<b>anna</b>", "bella", "carla"]), tmp_path / "m.parquet")
    assert run("keys", "--kit-id", "K7", "--out", "kit.key")[0] == 0
    (tmp_path / "trusted").mkdir()
    (tmp_path / "kit.pub").rename(tmp_path / "trusted" / "K7.pub")
    assert run("pack", "m.parquet", "--out", "b.kit", "--key", "kit.key")[0] == 0
    code, out, _ = run("inspect", "b.kit", "--json")
    assert (code, json.loads(out)["batches"][0]["records"]) == (0, 3)
    code, out, _ = run("ingest", "b.kit", "--gallery", "g", "--out", "o.csv", "--report", "r.html", "--json")
    assert (code, json.loads(out)["enrolled"]) == (0, 3)
    page = (tmp_path / "r.html").read_text()
    assert "<b>anna" not in page and "3 records" in page
    assert pa.csv.read_csv(tmp_path / "o.csv").column("outcome").to_pylist() == ["enrolled"] * 3
    content = (tmp_path / "b.kit").read_bytes()
    (tmp_path / "b.kit").write_bytes(content[:-10])
    code, _, err = run("ingest", "b.kit", "--gallery", "g", "--out", "o.csv")
    assert code == 4 and "breaks off: 3 records were whole" in err
    assert run("ingest", "m.parquet", "--gallery", "g")[0] == 2


def test_without_the_library_that_signs_everything_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for call in (
        lambda: jobs.make_keys("A", tmp_path / "A.key"),
        lambda: load_key(tmp_path / "A.key"),
        lambda: jobs.load_trusted(tmp_path),
    ):
        with pytest.raises(bd.InvalidInput, match=r"biodedup\[kit\]"):
            call()
