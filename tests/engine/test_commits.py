"""What a group commit does with rows that were added since its searches: the short cuts find what a search of these rows finds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup.embed.cards import load_card
from biodedup.gallery.segments.tail import Tail, TailPart
from biodedup.testing import internals
from tests.support.interleaved import SHAPES, play
from tests.support.vectors import SFACE, again, people

REVIEW_DB = 60.0
FINGER = load_card("finger256").model_id


def encounter(name: str, vector: np.ndarray, **more: object) -> bd.Encounter:
    return bd.Encounter(name, templates={"face": vector}, model_id=SFACE, **more)


@pytest.mark.slow
def test_a_row_that_a_search_returns_is_never_ruled_out_before_it(tmp_path):
    vectors, ruled_out, returned = people(40, seed=3), 0, 0
    config = bd.Config(policy=bd.Policy(duplicate_db=REVIEW_DB, review_db=REVIEW_DB))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        list(engine.enroll_many(encounter(f"s{i}", vector) for i, vector in enumerate(vectors)))
        inside, now = internals(engine), internals(engine).gallery.snapshot()
        assert len(engine) == len(vectors)
        for i, cosine in enumerate(np.linspace(-1, 1, 400).tolist()):
            vector = vectors[i % len(vectors)]
            probe = {"face": bd.Template("face", SFACE, again(vector, cosine))}
            from_row = i % len(vectors) - i % 7
            (found,) = inside.searcher.search(now, [probe], from_row=max(from_row, 0))
            returned += bool(len(found.comparisons))
            if not inside.searcher.may_find(now, probe, max(from_row, 0), REVIEW_DB, across=False):
                ruled_out += 1
                assert not len(found.comparisons)
    assert returned > 50  # the mates above the threshold
    assert ruled_out + returned > 390  # little is searched for nothing


def test_two_encounters_of_a_person_in_one_commit_are_one_subject(tmp_path):
    anna, bella = people(2)
    with bd.Engine.open(tmp_path / "g", bd.Config(batch_size=8)) as engine:
        several = [encounter("a", anna), encounter("b", bella), encounter("c", again(anna, 0.95)), encounter("d", anna)]
        decisions = list(engine.enroll_many(several))
        assert [decision.outcome for decision in decisions] == ["unique", "unique", "duplicate", "duplicate"]
        assert [decision.best.subject_id for decision in decisions[2:]] == ["a", "a"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 3), st.floats(0, 1)), max_size=40))
def test_counts_of_a_tail_are_those_of_its_rows_after_any_appends_and_truncations(steps):
    """An integer appends a row with these columns, a fraction keeps that part of the rows. Older, shorter views are asked, too."""
    tail, vector = Tail(0), people(1)[0]
    for number, step in enumerate(steps):
        if isinstance(step, float):
            tail.truncate(int(step * tail.count))
        else:
            columns = [name for bit, name in ((1, "face"), (2, "left_index")) if step & bit]
            tail.append(f"s{number}", "", 0, {name: bd.Template(name, SFACE, vector) for name in columns})
        for count in (tail.count, tail.count // 2):
            values, counts = np.unique(tail.presence.view(count), return_counts=True)
            assert TailPart(tail, count).bits == dict(zip(values.tolist(), counts.tolist(), strict=True))


def test_a_subject_that_loses_its_strongest_row_after_the_search_is_compared_by_the_rows_that_stay(tmp_path):
    """The update leaves room for its own subject's row among the candidates, so that one candidate fewer is no reason to search again."""
    sita, budi = people(2, seed=5)
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=bd.GalleryConfig(background=False))) as engine:
        enrolment, gallery = internals(engine).enrolment, internals(engine).gallery
        engine.enroll(encounter("sita", sita))
        engine.update(encounter("sita", again(sita, 0.75)))
        engine.enroll(encounter("budi", budi))
        prepared = enrolment.search([encounter("budi", again(sita, 0.99, seed=7))], False, replaces=True)
        with gallery.transaction() as transaction:
            transaction.remove_rows([0])
        (decision,) = enrolment.commit(prepared)
        assert [candidate.subject_id for candidate in decision.candidates if candidate.kind == "same_person"] == [
            "sita"
        ]
        assert [candidate.rows for candidate in decision.candidates if candidate.subject_id == "sita"] == [(1,)]


def test_the_evidence_of_a_row_that_was_removed_after_the_search_does_not_count(tmp_path):
    """A subject with a row of its face and one of another person's fingers; the row of fingers is removed."""
    faces, fingers = people(2, seed=5), people(4, seed=6, dimension=256)
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=bd.GalleryConfig(background=False))) as engine:
        enrolment, gallery = internals(engine).enrolment, internals(engine).gallery
        of_face = {"face": bd.Template("face", SFACE, faces[0])}
        of_fingers = {
            name: bd.Template(name, FINGER, fingers[i]) for i, name in enumerate(("left_index", "right_index"))
        }
        engine.enroll(bd.Encounter("sita", templates=of_face))
        with gallery.transaction() as transaction:
            transaction.add_encounter("sita", of_fingers, "e2", ())
        probe = {"face": bd.Template("face", SFACE, again(faces[0], 0.6))}
        probe |= {name: replace(one, embedding=fingers[2 + i]) for i, (name, one) in enumerate(of_fingers.items())}
        prepared = enrolment.search([bd.Encounter("ani", templates=probe)], False)
        with gallery.transaction() as transaction:
            transaction.remove_rows([1])
        afresh = engine.identify(bd.Encounter(templates=probe))
        (decision,) = enrolment.commit(prepared)
        assert (decision.outcome, decision.reasons) == (afresh.outcome, afresh.reasons)
        assert decision.best.score_db == pytest.approx(afresh.best.score_db)
        assert decision.best.kind == "same_person"


def test_a_subject_that_gained_a_row_since_the_search_is_compared_with_all_of_them(tmp_path):
    """Two readings have two chances to look alike: 3 dB less than the one row that the search saw."""
    sita, ani = people(2, seed=5)
    policy = bd.Policy(duplicate_db=REVIEW_DB, review_db=20)
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=policy)) as engine:
        enrolment = internals(engine).enrolment
        engine.enroll(encounter("sita", sita))
        probe = encounter("ani", again(sita, 0.6))
        prepared = enrolment.search([probe], False)
        with internals(engine).gallery.transaction() as transaction:
            transaction.add_encounter("sita", {"face": bd.Template("face", SFACE, ani)}, "e2", ())
        afresh = engine.identify(replace(probe, subject_id=None))
        (decision,) = enrolment.commit(prepared)
        assert decision.best.score_db == pytest.approx(afresh.best.score_db)
        assert decision.best.rows == (0, 1)


def test_a_case_that_became_a_row_of_a_subject_since_the_search_is_compared_with_its_other_rows(tmp_path):
    """The row was there when the search began, as an open case of its own."""
    sita, budi = people(2, seed=5)
    both = (sita + budi) / np.linalg.norm(sita + budi)
    policy = bd.Policy(duplicate_db=REVIEW_DB, review_db=20)
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=policy)) as engine:
        enrolment = internals(engine).enrolment
        engine.enroll(encounter("sita", sita))
        engine.enroll(encounter("budi", budi))
        assert engine.update(replace(encounter("sita", both), encounter_id="visit")).outcome == "review"
        probe = encounter("ani", again(sita, 0.6))
        prepared = enrolment.search([probe], False)
        engine.adjudicate("visit", "different", "clerk", candidate="budi")
        afresh = engine.identify(replace(probe, subject_id=None))
        (decision,) = enrolment.commit(prepared)
        assert afresh.best.rows == decision.best.rows == (0, 2)
        assert decision.best.score_db == pytest.approx(afresh.best.score_db)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHAPES)
def test_a_decision_is_that_of_comparing_all_rows_of_its_commit(tmp_path, kind):
    """With searches, removals, further rows, cases and seals in any order; staged evidence is left out, since it may miss a share."""
    seed = list(SHAPES).index(kind)
    gallery = bd.GalleryConfig(3 + 40 * (seed % 2), 2, background=False)
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=gallery, search=bd.SearchConfig(miss_risk=0.0))) as engine:
        outcomes = play([engine], kind, seed)
    assert outcomes.total() > 5
