"""Attacks by a kit, or with a kit's stolen key: each stays within what the centre trusts that key with."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.jobs.kits.format.keys import load_key
from biodedup.jobs.kits.names import bound_id, prefix_of
from tests.support.kits import FRIDAY, MONDAY, a_record, enrolled, forged, ingested, outcomes, packed, table
from tests.support.vectors import again, people

DAY = 86_400


def bound(centre: Path, kit: str, encounter_id: str) -> str:
    return bound_id(load_key(centre / f"{kit}.key").public.fingerprint, encounter_id)


# ids ---------------------------------------------------------------------------------------------------------------


def test_a_kit_that_guesses_the_ids_of_another_takes_none_of_them(centre):
    """B sends, under the ids that A will give out, people of its own; A's citizens are enrolled all the same."""
    fingerprint = load_key(centre / "A.key").public.fingerprint.hex()[:6]
    guesses = [f"A-{fingerprint}-{n:06d}" for n in (1, 2, 3)]
    theirs = people(3, 50)
    evil = forged(centre, "B", "evil.kit", [a_record(n, guesses[n - 1], theirs[n - 1], f"x{n}") for n in (1, 2, 3)])
    honest = packed(centre, "A", "a.kit", table(people(3)))
    result = ingested(centre, evil, honest)
    assert outcomes(result) == ["enrolled"] * 6
    assert [o.encounter_id for o in result.outcomes[3:]] == [bound(centre, "A", name) for name in guesses]
    assert [o.kit_encounter_id for o in result.outcomes[:3]] == guesses


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["kit:{key}:e1", "kit:{short}:e1", "KIT:{key}:e1", "kit:", "kit::e1"])
def test_an_id_that_carries_the_reserved_prefix_is_refused_by_name_and_others_go_on(centre, shape):
    key = load_key(centre / "A.key").public.fingerprint
    name = shape.format(key=key.hex()[:32], short=key.hex()[:16])
    vectors = people(3)
    evil = forged(centre, "B", "evil.kit", [a_record(1, name, vectors[0], "x"), a_record(2, "fine", vectors[1], "y")])
    honest = forged(centre, "A", "a.kit", [a_record(1, "e1", vectors[2], "z")])
    result = ingested(centre, evil, honest)
    assert outcomes(result) == ["refused", "enrolled", "enrolled"]
    assert result.outcomes[0].reason == "reserved_id"
    assert enrolled(centre) == ["y", "z"]


def test_a_kit_takes_no_id_of_the_centre(centre):
    with bd.Engine.open(centre / "g") as engine:
        engine.enroll(bd.Encounter("citizen", (), {"face": people(1)[0]}, "office-1"))
    evil = forged(centre, "B", "evil.kit", [a_record(n, f"office-{n}", people(1, n + 9)[0], f"x{n}") for n in (1, 2)])
    assert outcomes(ingested(centre, evil)) == ["enrolled"] * 2
    with bd.Engine.open(centre / "g") as engine:
        decision = engine.enroll(bd.Encounter("another", (), {"face": people(1, 77)[0]}, "office-2"))
        assert (decision.outcome, engine.decision("office-1").subject_id) == ("unique", "citizen")


def test_a_copy_of_a_record_under_the_same_id_but_altered_is_no_copy(centre):
    """B sends A's encounter with another face before A does: it is B's encounter, and A's own follows."""
    evil = forged(centre, "B", "evil.kit", [a_record(1, "visit-1", people(1, 50)[0], "s0")])
    honest = forged(centre, "A", "a.kit", [a_record(1, "visit-1", people(1)[0], "s0")])
    result = ingested(centre, evil, honest)
    assert outcomes(result) == ["enrolled", "review"]  # two people under one subject_id: a person judges
    assert result.outcomes[1].reason == "another_person"


def test_keys_of_two_kits_never_share_a_prefix(centre):
    prefixes = {prefix_of(load_key(centre / f"{kit}.key").public.fingerprint) for kit in "AB"}
    assert len(prefixes) == 2 and all(len(p) == 37 and p.startswith("kit:") and p.endswith(":") for p in prefixes)


# groups and limits -------------------------------------------------------------------------------------------------


def test_a_kit_writes_the_groups_that_it_is_trusted_with_and_no_other(centre):
    jobs.set_trust("A", centre / "trusted", groups=("north",))
    wanted = [(), ("north",), ("staff",), ("north", "staff")]
    records = [a_record(n, f"e{n}", people(1, n)[0], f"s{n}", groups) for n, groups in enumerate(wanted, start=1)]
    result = ingested(centre, forged(centre, "A", "a.kit", records), forged(centre, "B", "b.kit", [
        a_record(1, "b1", people(1, 90)[0], "t1", ("north",))
    ]))  # fmt: skip
    assert outcomes(result) == ["enrolled", "enrolled", "refused", "refused", "refused"]
    assert [o.reason for o in result.outcomes[2:]] == [
        "group_not_allowed: staff",
        "group_not_allowed: staff",
        "group_not_allowed: north",
    ]
    with bd.Engine.open(centre / "g", read_only=True) as engine:
        assert engine.info()["groups"] == ["north"]
    jobs.set_trust("A", centre / "trusted", groups=("north", "staff"))  # allowed since, the same file brings the rest
    rest = ingested(centre, centre / "a.kit", out="rest.parquet")
    assert outcomes(rest) == ["already_taken", "already_taken", "enrolled", "enrolled"]


def test_a_batch_with_more_encounters_than_its_key_may_bring_is_refused_whole(centre):
    jobs.set_trust("A", centre / "trusted", encounters_batch_max=3)
    result = ingested(
        centre, packed(centre, "A", "a.kit", table(people(4))), packed(centre, "B", "b.kit", table(people(1, 9), ["t"]))
    )
    assert [one.state for one in result.batches] == ["refused", "whole"]
    assert "more than 3 records" in result.batches[0].problem
    assert enrolled(centre) == ["t"]


def test_a_key_brings_so_many_new_encounters_within_a_day(centre):
    jobs.set_trust("A", centre / "trusted", encounters_day_max=5)
    one = packed(centre, "A", "one.kit", table(people(3)))
    two = packed(centre, "A", "two.kit", table(people(3, 9), list("xyz")))
    result = ingested(centre, one, two)
    assert [batch.state for batch in result.batches] == ["whole", "refused"]
    assert "3 new encounters after 3 within a day; its key may bring 5" in result.batches[1].problem
    assert outcomes(result) == ["enrolled"] * 3 and result.gaps == ()
    again_one = ingested(centre, one, two, now=FRIDAY + DAY - 1)  # what was taken is no new encounter
    assert [batch.state for batch in again_one.batches] == ["repeated", "refused"]
    later = ingested(centre, two, now=FRIDAY + DAY + 1)
    assert outcomes(later) == ["enrolled"] * 3


def test_numbers_that_are_used_again_do_not_lift_the_limit_of_a_day(centre):
    jobs.set_trust("A", centre / "trusted", encounters_day_max=4)
    batches = [
        forged(
            centre,
            "A",
            f"{i}.kit",
            [a_record(n, f"e{i}-{n}", people(1, 10 * i + n)[0], f"s{i}-{n}") for n in (1, 2, 3)],
        )
        for i in range(3)
    ]
    result = ingested(centre, *batches)
    assert [one.state for one in result.batches] == ["whole", "refused", "refused"]
    assert len(enrolled(centre)) == 3


def test_one_sequence_for_two_records_of_a_batch_is_refused(centre):
    records = [a_record(1, f"e{n}", people(1, n)[0], f"s{n}") for n in (1, 2)]
    result = ingested(centre, forged(centre, "A", "a.kit", records))
    assert result.batches[0].state == "refused" and "one sequence to two records" in result.batches[0].problem


def test_a_kit_hides_no_more_numbers_than_it_may_declare_void(centre):
    jobs.set_trust("A", centre / "trusted", void_max=4)
    first = [a_record(10, "e10", people(1)[0], "s0")]
    everything = forged(centre, "A", "all.kit", first, tuple(range(1, 10)))
    result = ingested(centre, everything)
    assert result.batches[0].state == "refused" and result.outcomes == ()
    assert "9 void sequences in all; its key may declare 4" in result.batches[0].problem
    honest = ingested(centre, forged(centre, "A", "some.kit", first, (1, 2, 3)))
    assert outcomes(honest) == ["enrolled"] and (honest.gaps[0].first, honest.gaps[0].last) == (4, 9)
    assert (honest.batches[0].void, honest.summary()["sequences_void"]) == (3, 3)
    bit_by_bit = ingested(centre, forged(centre, "A", "more.kit", [a_record(11, "e11", people(1, 5)[0], "s1")], (4, 5)))
    assert bit_by_bit.batches[0].state == "refused" and "5 void sequences" in bit_by_bit.batches[0].problem


def test_a_kit_voids_its_own_numbers_alone(centre):
    ingested(centre, forged(centre, "A", "a.kit", [a_record(n, f"e{n}", people(1, n)[0], f"s{n}") for n in (1, 4)]))
    ingested(centre, forged(centre, "B", "b.kit", [a_record(9, "x", people(1, 50)[0], "t")], tuple(range(1, 9))))
    result = ingested(centre, centre / "a.kit", out="again.parquet")
    assert [(gap.kit_id, gap.first, gap.last) for gap in result.gaps] == [("A", 2, 3)]


def test_a_million_void_numbers_are_reported_with_the_limit(centre):
    batch = forged(centre, "A", "a.kit", [a_record(1, "e", people(1)[0], "s")], tuple(range(2, 400_000)))
    (one,) = ingested(centre, batch).batches
    assert one.state == "refused" and "399,998 void sequences" in one.problem


# keys --------------------------------------------------------------------------------------------------------------


def test_nothing_is_taken_of_a_revoked_key_and_others_go_on(centre):
    before = packed(centre, "A", "before.kit", table(people(1)))
    ingested(centre, before)
    jobs.revoke("A", centre / "trusted", by="N. Rahma", reason="laptop stolen", clock=lambda: FRIDAY)
    late = packed(centre, "A", "late.kit", table(people(1, 3), ["x"]))
    result = ingested(centre, late, before, packed(centre, "B", "b.kit", table(people(1, 4), ["y"])), now=FRIDAY + 60)
    assert [one.state for one in result.batches] == ["refused", "refused", "whole"]
    assert "kit A was revoked on 2026-09-25 by N. Rahma (laptop stolen)" in result.batches[0].problem
    assert enrolled(centre) == ["s0", "y"]
    (centre / "trusted" / "A.pub").rename(centre / "trusted" / "new name.pub")  # the key comes back
    assert ingested(centre, late).batches[0].state == "refused"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("days", "trust", "told"),
    [
        (-3, {}, None),
        (800, {}, "expired on 2028-09-20"),
        (800, {"not_after": MONDAY + 900 * DAY}, None),
        (5, {"not_after": MONDAY + 4 * DAY}, "expired on 2026-09-25"),
        (1, {"not_before": MONDAY + 2 * DAY}, "not valid before 2026-09-23"),
        (3, {"not_before": MONDAY + 2 * DAY}, None),
    ],
)
def test_a_key_is_trusted_within_its_dates_by_the_centres_clock(centre, days, trust, told):
    if trust:
        jobs.set_trust("A", centre / "trusted", **trust)
    batch = packed(centre, "A", "a.kit", table(people(1)), clock=MONDAY + DAY)
    (one,) = ingested(centre, batch, now=MONDAY + days * DAY).batches
    assert one.state == ("whole" if told is None else "refused")
    assert told is None or told in one.problem


def test_one_broken_key_among_good_ones_is_reported_and_stops_no_other(centre):
    trusted = centre / "trusted"
    (trusted / "0 empty.pub").write_bytes(b"")
    (trusted / "1 noise.pub").write_bytes(bytes(range(256)) * 9)
    (trusted / "2 array.pub").write_text("[1]")
    (trusted / "3 nested.pub").write_text("[" * 9_000)
    (trusted / "4 folder.pub").mkdir()
    (trusted / "5 dangling.pub").symlink_to(centre / "nowhere")
    (trusted / "6 long.pub").write_bytes(b" " * 100_000)
    (trusted / "7 centre.pub").write_bytes((centre / "centre.pub").read_bytes())
    (trusted / "8 date.pub").write_text(
        (centre / "B.pub").read_text().replace('"made_at": 1790000000.0', '"made_at": 1e300')
    )
    result = ingested(centre, packed(centre, "A", "a.kit", table(people(2))))
    assert outcomes(result) == ["enrolled"] * 2
    problems = result.summary()["problems"]
    assert len(problems) == 9 and all(str(trusted / f"{n} ") in problem for n, problem in enumerate(problems))
    assert "0 empty.pub" in (centre / "o.html").read_text()


@pytest.mark.slow
def test_a_record_of_trust_that_cannot_be_read_bars_its_key_alone(centre):
    a, b = packed(centre, "A", "a.kit", table(people(1))), packed(centre, "B", "b.kit", table(people(1, 5), ["t"]))
    record = centre / "trusted" / f"{load_key(centre / 'A.key').public.fingerprint.hex()[:16]}.toml"
    contents = (
        "groups = [",
        'group = ["north"]',
        "void_max = -1",
        'groups = "north"',
        "not_after = 5",
        "void_max = true",
    )
    for number, content in enumerate(contents):
        record.write_text(content)
        result = ingested(centre, a, b, gallery=f"g{number}")
        assert [one.state for one in result.batches] == ["refused", "whole"], content
        assert record.name in result.batches[0].problem
        assert any(record.name in problem for problem in result.trust_problems)
    record.write_text("groups = []\nnot_after = 2026-09-25\n")
    assert outcomes(ingested(centre, a, gallery="last", now=FRIDAY)) == ["enrolled"]


def test_a_record_of_trust_under_another_name_is_not_taken_for_one(centre):
    (centre / "trusted" / "A.toml").write_text("encounters_batch_max = 0\n")
    result = ingested(centre, packed(centre, "A", "a.kit", table(people(1))))
    assert any("A.toml is not used" in problem for problem in result.trust_problems)


def test_a_key_under_two_names_is_reported(centre):
    text = (centre / "trusted" / "A.pub").read_text()
    (centre / "trusted" / "Z.pub").write_text(text.replace('"kit_id": "A"', '"kit_id": "Z"'))
    result = ingested(centre, packed(centre, "A", "a.kit", table(people(1))))
    assert result.outcomes[0].kit_id == "A"
    assert any("Z.pub is the key of kit A under the name Z" in problem for problem in result.trust_problems)


# citizens ----------------------------------------------------------------------------------------------------------


def test_a_copied_record_brings_a_kit_no_decision_of_its_own(centre):
    """The same content under the same id by another kit is that encounter; a mate under another id is a duplicate."""
    vectors = people(2)
    honest = forged(centre, "A", "a.kit", [a_record(1, "visit-1", vectors[0], "s0")])
    copy = forged(centre, "B", "b.kit", [a_record(1, "visit-1", vectors[0], "s0")])
    mate = forged(centre, "B", "c.kit", [a_record(2, "visit-2", again(vectors[:1], 0.95)[0], "s9")])
    result = ingested(centre, honest, copy, mate)
    assert outcomes(result) == ["enrolled", "already_taken", "duplicate"]
    assert result.outcomes[1].first_from == "kit A, sequence 1"


def test_a_truncation_at_a_records_boundary_is_reported_as_a_cut(centre):
    batch = packed(centre, "A", "a.kit", table(people(3)))
    content = batch.read_bytes()
    ends, at = [], 104
    while at < len(content):
        at += 17 + int.from_bytes(content[at + 9 : at + 13], "little") + 80
        ends.append(at)
    assert ends[-1] == len(content)
    for gone in (1, 2):
        batch.write_bytes(content[: ends[-1 - gone]])
        result = ingested(centre, batch, gallery=f"g{gone}")
        assert result.batches[0].state == "cut" and outcomes(result) == ["enrolled"] * (4 - gone)
        assert "breaks off" in result.batches[0].problem
    batch.write_bytes(content[: ends[1]] + content[ends[2] :])  # one from the middle
    assert ingested(centre, batch, gallery="middle").batches[0].state == "damaged"


def test_what_a_kit_calls_itself_is_shown_as_text(centre):
    vector = people(1)[0]
    record = a_record(1, "<script>alert(1)</script>", vector, "<img src=x onerror=alert(1)>", ("<b>",))
    ingested(centre, forged(centre, "A", "a.kit", [record]))
    page = (centre / "o.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;img" in page


def test_a_table_lists_both_ids_of_each_encounter(centre):
    ingested(centre, forged(centre, "A", "a.kit", [a_record(1, "e", people(1)[0], "s")]))
    (row,) = pyarrow.parquet.read_table(centre / "o.parquet").to_pylist()
    assert (row["encounter_id"], row["kit_encounter_id"]) == (bound(centre, "A", "e"), "e")
