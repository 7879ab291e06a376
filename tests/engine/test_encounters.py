"""Rows are encounters: subjects with several, open cases that searches see, updates that are verified."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest

import biodedup as bd
from biodedup.gallery.encounters import kept_rows
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.encounters import SubjectScores, presence_of_subjects
from biodedup.search.selfjoin import join as selfjoin
from biodedup.testing import internals
from tests.support.cases import CONFIG, Clock, names, sent
from tests.support.faults import Countdown, FailingStorage
from tests.support.vectors import again, between, orthogonal, people


@pytest.fixture
def engine(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG, clock=Clock()) as engine:
        yield engine


def face_and(finger: np.ndarray, face: np.ndarray) -> dict[str, np.ndarray]:
    return {"face": face, "right_index": finger}


# updates -------------------------------------------------------------------------------------------------------------


def test_an_update_with_another_persons_face_opens_a_case_and_takes_nothing_away(engine):
    anna, other = people(2)
    finger = people(1, seed=9)[0]
    engine.enroll(bd.Encounter("anna", templates=face_and(finger, anna), encounter_id="e1"))
    decision = engine.update(sent("anna", other, "e2"))
    assert (decision.outcome, decision.reasons[0], names(decision.candidates)) == ("review", "another_person", ["anna"])
    assert engine.templates("anna").keys() == {"face", "right_index"}
    assert np.allclose(engine.templates("anna")["face"].embedding, anna, atol=1e-6)
    assert engine.adjudicate("e2", "different", "A. Officer").outcome == "refused"


@pytest.mark.slow
@pytest.mark.parametrize("nth", range(1, 6))
@pytest.mark.parametrize("name", ["encounters", "templates", "verify"])
def test_a_subject_removed_during_a_call_is_seen_whole_or_not_at_all(engine, monkeypatch, name, nth):
    """Removed right after the call took its nth snapshot: the answer is that of one snapshot, or UnknownSubject."""
    (anna,) = people(1)
    engine.enroll(sent("anna", anna, "e1"))
    gallery_type, snapshot, taken = type(internals(engine).gallery), type(internals(engine).gallery).snapshot, []

    def then_removed(gallery):
        seen = snapshot(gallery)
        taken.append(seen)
        if len(taken) == nth:
            engine.remove("anna")
        return seen

    monkeypatch.setattr(gallery_type, "snapshot", then_removed)
    try:
        if name == "verify":
            assert engine.verify(bd.Encounter(templates={"face": anna}), "anna").accepted
        else:
            assert len(getattr(engine, name)("anna")) == 1
    except bd.UnknownSubject:
        assert len(taken) >= nth


def test_an_update_with_another_subjects_face_is_a_duplicate_of_that_subject(engine):
    anna, bella = people(2)
    engine.enroll(sent("anna", anna, "e1"))
    engine.enroll(sent("bella", bella, "e2"))
    decision = engine.update(sent("anna", again(bella, 0.9), "e3"))
    assert (decision.outcome, decision.best.subject_id) == ("duplicate", "bella")
    assert len(engine.encounters("anna")) == 1


def anew(engine, subject_id: str, vector: np.ndarray, encounter_id: str) -> None:
    """The id is given to another person."""
    engine.remove(subject_id)
    assert engine.enroll(sent(subject_id, vector, encounter_id)).outcome == "unique"


def test_a_verdict_on_an_update_does_not_hold_for_another_person_who_got_the_id_since(engine):
    anna, other, carla = orthogonal(3)
    engine.enroll(sent("anna", anna, "e1"))
    engine.enroll(sent("carla", carla, "e2"))
    update = again(anna, 0.2) + carla * 0.6
    assert engine.update(sent("anna", update / np.linalg.norm(update), "e3")).outcome == "review"
    assert names(engine.case("e3").undecided) == ["anna", "carla"]
    assert engine.adjudicate("e3", "same", "A. Officer", candidate="anna").outcome == "review"
    anew(engine, "anna", other, "e4")
    decision = engine.adjudicate("e3", "different", "A. Officer", candidate="carla")
    assert (decision.outcome, names(decision.candidates), decision.reasons[0]) == ("review", ["anna"], "another_person")
    assert names(engine.case("e3").undecided) == ["anna"] and len(engine.encounters("anna")) == 1
    assert engine.adjudicate("e3", "different", "A. Officer", candidate="anna").outcome == "refused"


def test_an_update_that_was_verified_is_verified_again_once_its_case_is_decided(engine):
    anna, other, carla = orthogonal(3)
    engine.enroll(sent("anna", anna, "e1"))
    engine.enroll(sent("carla", carla, "e2"))
    assert engine.update(sent("anna", between(anna, carla), "e3")).outcome == "review"
    assert names(engine.case("e3").undecided) == ["carla"]
    anew(engine, "anna", other, "e4")
    decision = engine.adjudicate("e3", "different", "A. Officer", candidate="carla")
    assert (decision.outcome, names(engine.case("e3").undecided)) == ("review", ["anna"])
    assert engine.adjudicate("e3", "same", "A. Officer", candidate="anna").outcome == "unique"  # a person says so
    assert len(engine.encounters("anna")) == 2


def test_a_verdict_on_a_case_as_shown_is_refused_once_it_has_other_candidates(engine):
    anna, other, carla = orthogonal(3)
    engine.enroll(sent("anna", anna, "e1"))
    engine.enroll(sent("carla", carla, "e2"))
    assert engine.update(sent("anna", between(anna, carla), "e3")).outcome == "review"
    shown = engine.case("e3")
    anew(engine, "anna", other, "e4")
    assert engine.adjudicate(shown, "different", "A. Officer", candidate="carla").outcome == "review"
    assert names(engine.case("e3").undecided) == ["anna"]
    for candidate in (None, "anna"):
        with pytest.raises(bd.EncounterConflict, match="look at the case again"):
            engine.adjudicate(shown, "same", "A. Officer", candidate=candidate)
    assert len(engine.case("e3").verdicts) == 1
    assert engine.adjudicate(engine.case("e3"), "same", "A. Officer").outcome == "unique"


def test_an_update_that_shares_no_column_with_what_is_enrolled_is_for_a_person_to_judge(engine):
    (anna,), finger = people(1), people(1, seed=9)[0]
    engine.enroll(sent("anna", anna, "e1"))
    decision = engine.update(bd.Encounter("anna", templates={"right_index": finger}, encounter_id="e2"))
    assert (decision.outcome, decision.reasons[0]) == ("review", "another_person")
    assert engine.adjudicate("e2", "same", "A. Officer").outcome == "unique"
    assert engine.templates("anna").keys() == {"face", "right_index"}


def test_a_confirmed_update_adds_a_row_and_columns_that_were_not_sent_stay(engine):
    (anna,), finger = people(1), people(1, seed=9)[0]
    engine.enroll(bd.Encounter("anna", templates=face_and(finger, anna), encounter_id="e1"))
    older = again(anna, 0.9)
    assert engine.update(sent("anna", older, "e2")).outcome == "unique"
    assert [sorted(e.templates) for e in engine.encounters("anna")] == [["face", "right_index"], ["face"]]
    assert [e.encounter_id for e in engine.encounters("anna")] == ["e1", "e2"]
    assert (len(engine), engine.subject_ids(), engine.info()["rows"]) == (1, ["anna"], 2)
    for face in (anna, older):
        found = engine.identify(bd.Encounter(templates={"face": face}))
        assert (found.outcome, names(found.candidates)) == ("duplicate", ["anna"])
        assert engine.verify(bd.Encounter(templates={"face": face}), "anna").accepted


def test_only_an_explicit_replacement_with_a_reason_replaces_what_is_enrolled(engine):
    anna, other = people(2)
    engine.enroll(bd.Encounter("anna", templates=face_and(people(1, seed=9)[0], anna), encounter_id="e1"))
    for arguments in ({"replace": True}, {"reason": "no reason to replace"}):
        with pytest.raises(bd.InvalidInput, match="go together"):
            engine.update(sent("anna", other, "e2"), **arguments)
    decision = engine.update(sent("anna", other, "e2"), replace=True, reason="enrolled with a wrong face")
    assert (decision.outcome, decision.replacement) == ("unique", "enrolled with a wrong face")
    assert engine.decision("e2") == decision
    assert [e.encounter_id for e in engine.encounters("anna")] == ["e2"]
    assert engine.identify(bd.Encounter(templates={"face": anna})).outcome == "unique"


def test_a_replacement_in_review_replaces_once_it_is_judged(engine):
    anna, bella = orthogonal(2)
    engine.enroll(sent("anna", anna, "e1"))
    engine.enroll(sent("bella", bella, "e2"))
    new = between(bella, orthogonal(3)[2])
    assert engine.update(sent("anna", new, "e3"), replace=True, reason="wrong face").outcome == "review"
    assert engine.case("e3").replacement == "wrong face"
    assert engine.adjudicate("e3", "different", "A. Officer").outcome == "unique"
    assert [e.encounter_id for e in engine.encounters("anna")] == ["e3"]


# several rows --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_subjects_with_several_rows_are_one_candidate_after_sealing_merging_and_reopening(tmp_path, sealed):
    faces = orthogonal(30)
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        for i, face in enumerate(faces):
            engine.enroll(sent(f"s{i}", face, f"e{i}"))
        for i, face in enumerate(faces[:20]):
            assert engine.update(sent(f"s{i}", again(face, 0.9, seed=i), f"u{i}")).outcome == "unique"
            if sealed and i % 7 == 0:
                engine.maintain()
        if sealed:
            engine.compact()
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        assert (len(engine), len(engine.subject_ids()), engine.info()["rows"]) == (30, 30, 50)
        assert engine.problems() == []
        for i in (0, 7, 19, 25):
            found = engine.identify(bd.Encounter(templates={"face": again(faces[i], 0.95, seed=99)}))
            assert names(found.candidates).count(f"s{i}") == 1 and found.best.subject_id == f"s{i}"
            assert len(found.best.rows) == (2 if i < 20 else 1)
        ids, similarity = engine.search({"face": faces}, k=5)
        assert (ids[:, 0] == [f"s{i}" for i in range(30)]).all()
        assert all(len(set(row)) == 5 for row in ids.tolist())
        assert (np.diff(similarity, axis=1) <= 0).all()
        engine.remove("s3")
        assert (len(engine), engine.info()["rows"]) == (29, 48)
        assert engine.identify(bd.Encounter(templates={"face": faces[3]})).outcome == "unique"
        assert engine.find_duplicates() == []


def test_the_rows_of_a_subject_are_compared_jointly_and_charged_for_being_several(engine):
    (anna,), (index, thumb) = people(1), people(2, seed=9)
    face, finger = again(anna, 0.6, seed=4), again(index, 0.6, seed=5)
    probe = bd.Encounter(templates=face_and(finger, face))
    engine.enroll(bd.Encounter("anna", templates=face_and(index, anna), encounter_id="e1"))
    together = engine.identify(probe).best
    engine.remove("anna")
    engine.enroll(bd.Encounter("anna", templates={"face": anna, "right_thumb": thumb}, encounter_id="e2"))
    second = {"right_thumb": again(thumb, 0.95), "right_index": index}
    assert engine.update(bd.Encounter("anna", templates=second, encounter_id="e3")).outcome == "unique"
    joint = engine.identify(probe).best
    assert {part.column for part in joint.evidence} == {"face", "right_index"}
    assert joint.score_db == pytest.approx(together.score_db, abs=0.3)  # each column in one row: one reading, no charge
    assert (
        engine.update(bd.Encounter("anna", templates={"face": again(anna, 0.99)}, encounter_id="e4")).outcome
        == "unique"
    )
    several = engine.identify(probe).best
    assert several.label_penalty_db > 0 and several.rows == tuple(e.row for e in engine.encounters("anna"))


def test_a_join_compares_a_later_subject_with_all_rows_of_an_earlier_one_together(engine, monkeypatch):
    monkeypatch.setattr(selfjoin, "_SEARCHED_ROWS", 1)
    (anna,), (index, thumb) = people(1), people(2, seed=9)
    engine.enroll(bd.Encounter("anna", templates={"face": anna, "right_thumb": thumb}, encounter_id="e1"))
    engine.update(
        bd.Encounter("anna", templates={"right_thumb": again(thumb, 0.95), "right_index": index}, encounter_id="e2")
    )
    bella = face_and(again(index, 0.6, seed=5), again(anna, 0.6, seed=4))
    together = engine.identify(bd.Encounter(templates=bella)).best.score_db
    apart = [engine.identify(bd.Encounter(templates={column: bella[column]})).best.score_db for column in bella]
    assert max(apart) < together - 2  # none of anna's rows has both captures
    engine.import_captures([bd.Encounter("bella", templates=bella)])
    (tile,) = engine.join(threshold_db=together - 1)
    assert [set(link.subject_ids) for link in tile.links] == [{"anna", "bella"}]


def test_joint_readings_agree_with_a_loop_over_rows():
    rng = np.random.default_rng(5)
    from biodedup.match.ranked import PairScores, ScoreModel
    from biodedup.match.scores.calibration import Calibration

    card = {"score": [-1.0, 1.0], "llr_db": [-20, 60], "nonmated_db": [0, 90], "measured_db": 50, "source": "x"}
    model = ScoreModel(Calibration.from_card(card), None)
    subjects = np.array([4, 4, 4, 1, 7, 7, 2])
    scores = {}
    for name in ("face", "right_index"):
        llr = rng.normal(0, 20, len(subjects))
        llr[rng.random(len(subjects)) < 0.4] = np.nan
        scores[name, name] = PairScores(model, llr, llr, llr, np.full(len(llr), np.nan), llr)
    joint = SubjectScores(scores, subjects)
    for number, (pair, one) in enumerate(scores.items()):
        for row, subject in enumerate(subjects):
            mine, offers = one.llr_db[row], one.llr_db[(subjects == subject) & ~np.isnan(one.llr_db)]
            best = mine if not np.isnan(mine) or not len(offers) else offers.max()
            assert np.array_equal(joint.scores[pair].llr_db[row], best, equal_nan=True)
            charged = 10 * np.log10(len(offers)) if np.isnan(mine) and len(offers) else 0.0
            assert joint.borrowed_db[row, number] == pytest.approx(charged)
    presence = np.array([1, 2, 1, 2, 4, 1, 2], np.uint16)
    assert presence_of_subjects(presence, subjects).tolist() == [3, 3, 3, 2, 5, 5, 2]


@pytest.mark.slow
def test_an_impostor_reaches_a_subject_with_several_rows_no_more_often_than_the_score_says(tmp_path):
    """Without the charge three rows would reach a score three times as often as one."""
    faces = people(60, seed=3)
    config = replace(CONFIG, policy=bd.Policy(duplicate_db=300, review_db=290, use_gallery_impostors=False))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        engine.import_captures([sent(f"s{i}", face, f"e{i}") for i, face in enumerate(faces)])
        with internals(engine).gallery.transaction() as transaction:
            template = engine.templates("s0")["face"]
            for i in range(60):
                for n in (1, 2):
                    other = bd.Template("face", template.model_id, again(faces[i], 0.3, seed=100 * n + i))
                    transaction.add_encounter(f"s{i}", {"face": other}, f"u{i} {n}")
        probes = people(200, seed=8)
        scores = [
            c.score_db
            for probe in probes
            for c in engine.identify(bd.Encounter(templates={"face": probe}), from_db=0).candidates
        ]
    assert len(scores) > 500
    assert np.mean(np.array(scores) >= 20) * len(scores) / (200 * 60) < 0.01


def test_of_too_many_rows_the_poor_and_the_close_go_and_no_column_is_lost(tmp_path):
    (anna,), (index,) = people(1), people(1, seed=9)
    config = replace(CONFIG, gallery=replace(CONFIG.gallery, encounters_max=2))
    with bd.Engine.open(tmp_path / "g", config, clock=Clock()) as engine:
        engine.enroll(bd.Encounter("anna", templates=face_and(index, anna), encounter_id="e1"))
        for n in (2, 3, 4):
            assert engine.update(sent("anna", again(anna, 0.95, seed=n), f"e{n}")).outcome == "unique"
        assert [e.encounter_id for e in engine.encounters("anna")] == ["e1", "e4"]
        assert engine.templates("anna").keys() == {"face", "right_index"}
        assert (len(engine), engine.info()["rows"], engine.problems()) == (1, 2, [])


def test_which_rows_are_kept_goes_by_quality_and_then_by_time(tmp_path):
    (anna,) = people(1)
    qualities, times = [0.9, 0.3, 0.9, 0.9, 0.5], [0.0, 10.0, 500.0, 510.0, 900.0]
    clock = iter(times)
    with bd.Engine.open(tmp_path / "g", CONFIG, clock=lambda: next(clock, 1e9)) as engine:
        model = bd.Config().face.model
        engine.enroll(bd.Encounter("anna", templates={"face": anna}, encounter_id="e0"))
        template = engine.templates("anna")["face"]
        engine.remove("anna")
        clock = iter(times)
        decisions = [engine.identify(bd.Encounter("anna", templates={"face": anna})) for _ in times]
        from biodedup.gallery.answers import StoredDecision, to_json

        with internals(engine).gallery.transaction() as transaction:
            for i, (quality, decision) in enumerate(zip(qualities, decisions, strict=True)):
                one = {"face": bd.Template("face", template.model_id, anna, quality=quality)}
                (transaction.add if i == 0 else transaction.add_encounter)("anna", one, f"e{i + 1}")
                transaction.record(f"e{i + 1}", StoredDecision(b"", "unique", to_json(decision)))
        snapshot = internals(engine).gallery.snapshot()
        rows = snapshot.rows_under("anna")
        first = rows[0]
        assert [row - first for row in kept_rows(snapshot, rows, 4)] == [0, 2, 3, 4]  # the poorest goes
        assert [row - first for row in kept_rows(snapshot, rows, 3)] == [
            0,
            3,
            4,
        ]  # two are close in time: the older goes
        assert model


# open cases ----------------------------------------------------------------------------------------------------------


def waiting(engine: bd.Engine) -> np.ndarray:
    """anna, enrolled; bella waits, since she may be anna."""
    anna = orthogonal(1)[0]
    engine.enroll(sent("anna", anna, "e-anna"))
    bella = between(anna, orthogonal(2)[1])
    assert engine.enroll(sent("bella", bella, "e1")).outcome == "review"
    return bella


def test_the_same_images_under_a_second_name_wait_with_the_first(engine):
    bella = waiting(engine)
    decision = engine.enroll(sent("carla", bella, "e2"))
    assert (decision.outcome, decision.best.case, decision.reasons[0]) == ("review", "e1", "open_case")
    assert engine.case("e1").linked == ("e2",) and engine.case("e2").linked == ("e1",)
    assert engine.subject_ids() == ["anna"] and engine.rows_of(["bella"]).tolist() == [-1]
    assert (engine.search({"face": bella[None]}, k=3).ids[0] == ["anna", "", ""]).all()


def test_deciding_one_case_decides_the_linked_one_again(engine):
    bella = waiting(engine)
    engine.enroll(sent("carla", bella, "e2"))
    assert engine.adjudicate("e1", "different", "A", candidate="anna").outcome == "review"
    assert engine.adjudicate("e1", "different", "A", candidate="e2").outcome == "unique"
    case = engine.case("e2")  # judged not to be bella's; anna is left
    assert (names(case.undecided), names(case.decision.cleared)) == (["anna"], ["bella"])
    assert "bella" in engine and engine.adjudicate("e2", "same", "A").outcome == "duplicate"


def test_a_case_that_waited_for_another_alone_is_enrolled_when_that_is_closed(engine):
    bella = waiting(engine)
    engine.enroll(sent("carla", bella, "e2"))
    engine.adjudicate("e2", "different", "A", candidate="anna")
    assert names(engine.case("e2").undecided) == ["bella"]
    assert engine.adjudicate("e1", "same", "A", candidate="e2").outcome == "duplicate"
    assert engine.decision("e2").outcome == "unique" and "carla" in engine
    assert (list(engine.cases()), engine.problems()) == ([], [])


def test_a_case_whose_linked_case_was_enrolled_shows_the_subject(engine):
    bella = waiting(engine)
    engine.enroll(sent("carla", again(bella, 0.9), "e2"))
    with internals(engine).gallery.transaction() as transaction:  # as if the cases were not linked
        transaction.enrol_case("e1")
    (candidate,) = [c for c in engine.case("e2").undecided if c.subject_id == "bella"]
    assert candidate.case == ""
    assert engine.adjudicate("e2", "same", "A", candidate="bella").outcome == "duplicate"


@pytest.mark.slow
def test_an_open_case_survives_sealing_merging_reopening_and_is_erased_when_it_is_refused(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        bella = waiting(engine)
        for i, face in enumerate(people(20, seed=6)):
            engine.enroll(sent(f"s{i}", face, f"s{i}"))
        engine.compact()
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        assert len(engine) == 21 and engine.info()["open_cases"] == 1
        assert engine.enroll(sent("carla", bella, "e2")).best.case == "e1"
        assert engine.adjudicate("e1", "recapture", "A").outcome == "refused"
        assert internals(engine).gallery.snapshot().pending.keys() == {engine.case("e2").row}
        engine.compact()
        assert engine.problems() == []


def test_open_cases_do_not_come_up_in_joins(engine):
    waiting(engine)
    assert engine.find_duplicates(threshold_db=10) == []


def test_a_resent_encounter_whose_subject_was_removed_says_so(engine):
    (anna,) = people(1)
    encounter = sent("anna", anna, "e1")
    engine.enroll(encounter)
    engine.remove("anna")
    again_sent = engine.enroll(encounter)
    assert (again_sent.outcome, again_sent.reasons, len(engine)) == ("unique", ("removed",), 0)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_of_eight_threads_with_weak_captures_of_one_person_none_passes_an_open_case(tmp_path, rounds):
    """Each round: eight names at once with captures that score between the thresholds."""
    threads = 8
    with bd.Engine.open(tmp_path / "g", replace(CONFIG, gallery=bd.GalleryConfig(seal_rows=64))) as engine:
        faces = people(rounds, seed=11)
        barrier = threading.Barrier(threads)
        outcomes: list[list[str]] = [[""] * threads for _ in range(rounds)]

        def work(number: int) -> None:
            for i, face in enumerate(faces):
                capture = again(face, 0.75, seed=1000 * i + number)  # of two such captures the cosine is some 0.56
                barrier.wait()
                outcomes[i][number] = engine.enroll(sent(f"p{i} {number}", capture, f"e{i} {number}")).outcome

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert all(row.count("unique") <= 1 for row in outcomes)
        assert engine.problems() == []


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["update", "review", "release"])
def test_after_any_single_fault_the_rows_are_those_before_or_after(tmp_path, operation):
    anna = orthogonal(1)[0]
    bella = between(anna, orthogonal(2)[1])
    for n in itertools.count(1):
        folder = tmp_path / f"g{n}"
        with bd.Engine.open(folder, CONFIG) as engine:
            engine.enroll(sent("anna", anna, "e-anna"))
            if operation == "release":
                engine.enroll(sent("bella", bella, "e1"))
        countdown = Countdown(n)
        done = False
        try:
            with bd.Engine.open(folder, CONFIG, storage=FailingStorage(countdown)) as engine:
                if operation == "update":
                    engine.update(sent("anna", again(anna, 0.9), "e2"))
                elif operation == "review":
                    engine.enroll(sent("bella", bella, "e1"))
                else:
                    engine.adjudicate("e1", "different", "A")
                done = True
        except bd.StorageUnavailable:
            pass
        with bd.Engine.open(folder, CONFIG) as engine:
            assert engine.problems() == []
            state = (len(engine), engine.info()["rows"], engine.info()["open_cases"])
            before, after = {
                "update": ((1, 1, 0), (1, 2, 0)),
                "review": ((1, 1, 0), (1, 1, 1)),
                "release": ((1, 1, 1), (2, 2, 0)),
            }[operation]
            assert state == after if done else state in (before, after)
        if countdown.left > 0:
            break
    assert n > 3


def test_a_search_across_positions_charges_each_candidate_once_whatever_others_are_compared(tmp_path):
    fingers = people(4, seed=9)
    probe = {"right_thumb": again(fingers[0], 0.9), "right_index": again(fingers[1], 0.9)}
    found = []
    for others in (False, True):
        with bd.Engine.open(tmp_path / str(others), CONFIG) as engine:
            anna = {"right_thumb": fingers[0], "right_index": fingers[1]}
            engine.import_captures([bd.Encounter("anna", templates=anna)])
            if others:  # of other sorts: their columns come behind hers
                engine.import_captures([bd.Encounter("bella", templates={"left_index": fingers[2]})])
                engine.import_captures(
                    [bd.Encounter("carla", templates={"left_middle": fingers[3], "left_ring": fingers[2]})]
                )
            best = engine.identify(bd.Encounter(templates=probe), across_positions=True).best
            found.append((best.subject_id, best.label_penalty_db, best.score_db))
    assert found[0] == found[1] and found[0][1] > 0


@pytest.mark.slow
def test_cases_are_listed_without_looking_at_each_for_each(engine, monkeypatch):
    crowd = again(np.repeat(people(1), 12, axis=0), 0.75)
    for number, vector in enumerate(crowd):
        engine.enroll(sent(f"s{number}", vector, f"e{number}"))
    looked_up = []
    answer = Snapshot.answer
    monkeypatch.setattr(Snapshot, "answer", lambda *args: looked_up.append(args[1]) or answer(*args))
    cases = list(engine.cases())
    assert len(cases) > 8 and any(len(case.linked) > 3 for case in cases)
    assert len(looked_up) == len(cases)
    for case in cases:
        assert all(case.encounter_id in engine.case(other).linked for other in case.linked)


# hostile sequences ---------------------------------------------------------------------------------------------------


def like(*weighted: tuple[np.ndarray, float]) -> np.ndarray:
    total = sum(weight * vector for vector, weight in weighted)
    return (total / np.linalg.norm(total)).astype(np.float32)


def test_captures_of_none_of_the_candidates_are_not_the_subjects_either(engine):
    anna, other, carla = orthogonal(3)
    engine.enroll(sent("anna", anna, "e1"))
    engine.enroll(sent("carla", carla, "e2"))
    engine.update(sent("anna", like((anna, 0.2), (carla, 0.5), (other, 0.84)), "e3"))
    assert names(engine.case("e3").undecided) == ["anna", "carla"]
    decision = engine.adjudicate("e3", "different", "A. Officer")
    assert (decision.outcome, decision.refusals[-1].reason) == ("refused", "another_person")
    assert len(engine.encounters("anna")) == 1 and list(engine.cases()) == []
    assert engine.adjudicate("e3", "different", "A. Officer") == decision  # said again


def test_a_case_without_a_verdict_is_not_enrolled_though_nothing_was_compared_with_it(engine):
    finger = {"right_index": people(1, seed=9)[0]}
    engine.enroll(sent("anna", orthogonal(1)[0], "e1"))
    assert engine.enroll(bd.Encounter("bella", templates=finger, encounter_id="e2")).reasons == ("nothing_in_common",)
    assert engine.enroll(bd.Encounter("carla", templates=finger, encounter_id="e3")).outcome == "review"
    assert engine.adjudicate("e3", "same", "A. Officer").outcome == "duplicate"
    assert engine.case("e2").decision.outcome == "review" and "bella" not in engine
    assert engine.adjudicate("e2", "different", "A. Officer").outcome == "unique"  # a person has looked


def test_a_replacement_that_waited_does_not_replace_who_got_the_id_since(engine):
    anna, other, carla, dora = orthogonal(4)
    engine.enroll(sent("anna", anna, "e1"))
    engine.enroll(sent("carla", carla, "e2"))
    engine.update(sent("anna", like((other, 0.86), (carla, 0.5)), "e3"), replace=True, reason="burnt")
    assert names(engine.case("e3").undecided) == ["carla"]
    anew(engine, "anna", dora, "e4")
    decision = engine.adjudicate("e3", "different", "A. Officer")
    assert (decision.outcome, names(engine.case("e3").undecided)) == ("review", ["anna"])
    assert [one.encounter_id for one in engine.encounters("anna")] == ["e4"]
    assert engine.adjudicate("e3", "same", "A. Officer").outcome == "unique"  # a person says so
    assert [one.encounter_id for one in engine.encounters("anna")] == ["e3"]


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True])
def test_no_number_of_open_cases_under_one_name_hides_whom_they_resemble(engine, at_once):
    anna, other, *crowd = orthogonal(23)
    engine.enroll(sent("anna", anna, "e1"))
    for i, one in enumerate(crowd):
        engine.enroll(sent(f"s{i}", one, f"s{i}"))
    again_and_again = [sent("bella", like((anna, 0.5), (other, 0.86)), f"b{i}") for i in range(30)]
    decisions = list(engine.enroll_many(again_and_again)) if at_once else map(engine.enroll, again_and_again)
    assert [(d.outcome, d.best.subject_id) for d in decisions] == [("review", "anna")] * 30
    assert names(engine.adjudicate("b7", "different", "A. Officer").cleared) == ["anna"]


@pytest.mark.slow
def test_rows_removed_during_a_search_hide_no_candidate_from_it(engine, monkeypatch):
    anna, other, *crowd = orthogonal(40)
    engine.enroll(sent("anna", anna, "e1"))
    nearer = np.array([like((other, 0.86), (one, 0.5)) for one in crowd[:24]])
    engine.add_templates([f"s{i}" for i in range(24)], {"face": nearer})
    commit = type(internals(engine).enrolment).commit

    def after_removals(enrolment, *given):
        for subject_id in engine.subject_ids():
            if subject_id != "anna":
                engine.remove(subject_id)
        return commit(enrolment, *given)

    monkeypatch.setattr(type(internals(engine).enrolment), "commit", after_removals)
    decision = engine.enroll(sent("bella", like((anna, 0.5), (other, 0.86)), "e2"))
    assert (decision.outcome, names(decision.candidates)) == ("review", ["anna"])


def test_a_verdict_that_could_be_about_a_subject_or_an_open_case_of_that_name_is_refused(engine):
    anna, bella, carla = orthogonal(3)
    engine.enroll(sent("anna", anna, "e1"))
    assert engine.enroll(sent("bella", like((anna, 0.5), (bella, 0.86)), "anna")).outcome == "review"
    engine.enroll(sent("carla", like((anna, 0.5), (bella, 0.5), (carla, 0.7)), "e3"))
    assert {(c.subject_id, c.case) for c in engine.case("e3").undecided} == {("anna", ""), ("bella", "anna")}
    for ruling, candidate in (("same", "anna"), ("different", "anna"), ("different", None)):
        with pytest.raises(bd.InvalidInput, match="decide the case 'anna' first"):
            engine.adjudicate("e3", ruling, "A. Officer", candidate=candidate)
    engine.adjudicate("anna", "recapture", "A. Officer")
    assert engine.adjudicate("e3", "same", "A. Officer").best.subject_id == "anna"


def test_the_decision_on_a_subject_or_an_encounter_called_added_is_reported(engine):
    anna, bella = orthogonal(2)
    engine.enroll(sent("added", anna, "e1"))
    engine.enroll(sent("bella", bella, "added"))
    engine.add_templates(["carla"], {"face": orthogonal(3)[2:]}, encounter_id="e2")
    assert engine.decision("e1").subject_id == "added" and engine.decision("added").subject_id == "bella"
    assert engine.decision("e2") is None


@pytest.mark.slow
def test_updates_in_small_steps_do_not_lead_from_one_person_to_another(engine):
    anna, other = orthogonal(2)
    engine.enroll(sent("anna", anna, "e0"))
    turns = [like((anna, np.cos(turn)), (other, np.sin(turn))) for turn in np.linspace(0, np.pi / 2, 13)[1:]]
    decisions = [engine.update(sent("anna", one, f"e{i}")) for i, one in enumerate(turns, start=1)]
    assert (decisions[0].outcome, decisions[-1].outcome) == ("unique", "review")
    assert decisions[-1].reasons[0] == "another_person"
    kept = engine.encounters("anna")
    assert len(kept) == 3 and kept[0].encounter_id == "e0"
    assert engine.enroll(sent("bella", anna, "e20")).best.subject_id == "anna"  # she is not forgotten


# archives ------------------------------------------------------------------------------------------------------------


def test_an_encounter_id_is_admitted_once_in_a_batch_and_after_a_removal(engine):
    anna, bella = orthogonal(2)
    first, second = engine.import_captures([sent("anna", anna, "e1"), sent("anna", anna, "e1")])
    assert first == second and len(engine.encounters("anna")) == 1
    with pytest.raises(bd.EncounterConflict):
        engine.import_captures([sent("bella", bella, "e2"), sent("carla", bella, "e2")])
    assert engine.subject_ids() == ["anna"]
    engine.remove("anna")
    (resent,) = engine.import_captures([sent("anna", anna, "e1")])
    assert resent.reasons == engine.recall(sent("anna", anna, "e1")).reasons == ("removed",)
    assert "anna" not in engine
