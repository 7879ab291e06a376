"""At the centre: nothing is doubled, nothing is lost, and what cannot be taken is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.jobs.kits.format.keys import load_centre_key, load_key
from biodedup.jobs.kits.format.record import Record
from tests.support.kits import (
    FRIDAY,
    MONDAY,
    YEAR,
    Stop,
    enrolled,
    forged,
    ingested,
    outcomes,
    packed,
    read,
    stop_at,
    table,
    written,
)
from tests.support.vectors import again, people


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


def test_one_id_with_two_contents_is_a_conflict_within_a_kit_and_two_encounters_of_two(centre):
    vectors = people(3)
    a = packed(centre, "A", "a.kit", table(vectors[:1], ["s0"], encounter_id=["e"]))
    b = packed(centre, "B", "b.kit", table(vectors[1:2], ["s1"], encounter_id=["e"]))
    again_a = packed(centre, "A", "again.kit", table(vectors[2:], ["s2"], encounter_id=["e"]))
    result = ingested(centre, a, b, again_a)
    assert outcomes(result) == ["enrolled", "enrolled", "conflict"]
    assert result.outcomes[2].first_from == "kit A, sequence 1"
    assert {o.kit_encounter_id for o in result.outcomes} == {"e"} and len(
        {o.encounter_id for o in result.outcomes}
    ) == 2
    assert enrolled(centre) == ["s0", "s1"]
    page = (centre / "o.html").read_text()
    assert "Conflicts" in page and "The earlier encounter remains" in page


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


def test_a_run_that_is_refused_leaves_the_earlier_results_alone(centre):
    batch = packed(centre, "A", "b.kit", table(people(3)))
    assert ingested(centre, batch, out="o.csv").written
    written = {name: (centre / name).read_bytes() for name in ("o.csv", "o.summary.json", "o.html")}
    (centre / "trusted" / "A.pub").unlink()
    refused = ingested(centre, batch, out="o.csv")
    assert not refused.written and refused.outcomes == () and refused.batches[0].state == "refused"
    assert {name: (centre / name).read_bytes() for name in written} == written
    assert ingested(centre, batch, out="new.csv").written and (centre / "new.html").exists()


@pytest.mark.parametrize(
    ("shift", "told"), [(YEAR, "in the future"), (-YEAR, "before the kit's key was made")], ids=["ahead", "behind"]
)
def test_a_clock_that_is_wrong_by_a_year_is_reported_and_changes_nothing(centre, shift, told):
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
    vectors = people(5)
    order = [3, 1, 5, 2, 4]
    times = {1: MONDAY + 7_200, 2: None, 3: MONDAY + 60, 4: 1e300, 5: -1e300}
    records = [
        Record(bd.Encounter(f"s{n}", (), {"face": vectors[n - 1]}, f"e{n}"), n, times[n], MONDAY + 9_000) for n in order
    ]
    result = ingested(centre, forged(centre, "A", "b.kit", records))
    assert outcomes(result) == ["enrolled"] * 5
    assert [outcome.sequence for outcome in result.outcomes] == order
    assert result.batches[0].out_of_order == 2 and result.gaps == ()
    doubts = {outcome.sequence: outcome.clock for outcome in result.outcomes}
    assert doubts[3] == doubts[1] == ""
    assert "future" in doubts[4] and "precedes" in doubts[5]
    assert doubts[2] == "" and (result.summary()["clock_doubtful"], result.summary()["clock_not_checked"]) == (2, 1)
    assert "1 record came without a time of capture" in (centre / "o.html").read_text()
    assert len(pa.parquet.read_table(centre / "o.parquet")) == 5


def test_what_never_arrived_is_reported_until_it_arrives(centre):
    one = packed(centre, "A", "one.kit", table(people(3)))
    two = packed(centre, "A", "two.kit", table(people(4, 5), list("abcd")))
    three = packed(centre, "A", "three.kit", table(people(1, 6), ["z"]))
    (gap,) = ingested(centre, one, three).gaps
    assert (gap.kit_id, gap.first, gap.last) == ("A", 4, 7)
    assert "4 to 7" in (centre / "o.html").read_text()
    assert ingested(centre, two).gaps == ()


def test_a_kit_whose_numbers_began_anew_is_reported(centre):
    first = packed(centre, "A", "one.kit", table(people(2), encounter_id=["e0", "e1"]))
    second = packed(centre, "A", "none.kit", table(people(1, 8), ["x"], encounter_id=["e9"]))
    (record,) = read(second, load_key(centre / "A.key"))[0]
    result = ingested(centre, first, forged(centre, "A", "set_back.kit", [replace(record, sequence=1)]))
    assert outcomes(result) == ["enrolled"] * 3
    assert [(one.sequence, one.encounter_id, one.before) for one in result.reused] == [(1, "e9", "e0")]


@pytest.mark.slow
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
    with pytest.raises(bd.GalleryDamaged, match="only bookkeeping: move it away"):
        ingested(centre, batch)
    (centre / "g" / "kits.sqlite3").unlink()
    result = ingested(centre, batch)
    assert outcomes(result) == ["already_taken"] * 5
    assert {outcome.first_from for outcome in result.outcomes} == {"enrolled directly"}
    with bd.Engine.open(centre / "g", read_only=True) as engine:
        assert engine.problems() == []


def old_batch(centre, name: str, names: list[str], vectors: np.ndarray):
    """A batch of a release whose files were not encrypted."""
    kit, to = load_key(centre / "A.key"), load_centre_key(centre / "centre.key")
    records = [
        Record(bd.Encounter(f"s{i}", (), {"face": vector}, name), i, None, MONDAY + 100)
        for i, (name, vector) in enumerate(zip(names, vectors, strict=True), start=1)
    ]
    (centre / name).write_bytes(written((kit, to), records, encrypted=False))
    return centre / name, records


@pytest.mark.parametrize("ledger", ["kept", "lost"])
def test_what_was_taken_before_ids_were_bound_is_not_taken_again(centre, ledger):
    """An earlier release enrolled under the kit's own ids."""
    batch, records = old_batch(centre, "old.kit", [f"e{i}" for i in range(4)], people(4))
    with bd.Engine.open(centre / "g", bd.Config(batch_size=4)) as engine:
        list(engine.enroll_many(record.encounter for record in records))
    if ledger == "kept":
        ingested(centre, batch, gallery="elsewhere", allow_unencrypted=True)  # a ledger with other names
        (centre / "elsewhere" / "kits.sqlite3").rename(centre / "g" / "kits.sqlite3")
    result = ingested(centre, batch, out="again.parquet", allow_unencrypted=True)
    assert outcomes(result) == ["already_taken"] * 4
    assert [outcome.encounter_id for outcome in result.outcomes] == [f"e{i}" for i in range(4)]
    assert enrolled(centre) == [f"s{i}" for i in range(1, 5)]


def test_an_unencrypted_batch_is_taken_where_that_is_allowed_alone(centre):
    batch, _ = old_batch(centre, "old.kit", ["e1", "e2"], people(2))
    result = ingested(centre, batch)
    assert result.batches[0].state == "refused" and "--allow-unencrypted" in result.batches[0].problem
    assert not (centre / "g").exists()
    assert outcomes(ingested(centre, batch, allow_unencrypted=True)) == ["enrolled"] * 2


def test_a_centre_with_a_new_key_still_reads_what_was_packed_for_the_old_one(centre):
    old = packed(centre, "A", "old.kit", table(people(2)))
    (centre / "centre.key").rename(centre / "before.key")
    (centre / "centre.pub").unlink()
    jobs.make_centre_key(centre / "centre.key")
    new = packed(centre, "A", "new.kit", table(people(2, 7), ["x", "y"]))
    result = ingested(centre, old, new)
    assert [one.state for one in result.batches] == ["refused", "whole"]
    assert "encrypted to a centre's key that was not given" in result.batches[0].problem
    both = [load_centre_key(centre / name) for name in ("centre.key", "before.key")]
    assert outcomes(ingested(centre, old, new, centre=both)) == ["enrolled"] * 2 + ["already_taken"] * 2


def test_the_ledger_is_for_its_owner_alone(centre):
    batch = packed(centre, "A", "b.kit", table(people(1)))
    (centre / "g").mkdir()
    ingested(centre, batch)
    assert (centre / "g" / "kits.sqlite3").stat().st_mode & 0o777 == 0o600
