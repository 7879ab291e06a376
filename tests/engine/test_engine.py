"""The engine: decisions, idempotence, linearizability, bad input."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup.gallery.snapshot import Snapshot
from biodedup.testing import internals
from tests.support.images import jpeg
from tests.support.vectors import again, people, unit

STRICT = bd.Policy(duplicate_db=58, review_db=58)
"""So that of many thousands of non-mated pairs none is a false match, as the default policy would have it now and then."""
ROUNDS = [16, pytest.param(1000, marks=pytest.mark.slow)]


def enroll(engine: bd.Engine, subject_id: str, vector: np.ndarray, **more: object) -> bd.Decision:
    return engine.enroll(bd.Encounter(subject_id, templates={"face": vector}, **more))


def test_the_first_encounter_is_unique_and_a_second_under_another_name_is_a_duplicate(engine):
    (anna,) = people(1)
    assert enroll(engine, "anna", anna).outcome == "unique"
    decision = enroll(engine, "bella", again(anna, 0.8))
    assert decision.outcome == "duplicate"
    assert decision.best is not None
    assert decision.best.subject_id == "anna"
    assert decision.best.evidence[0].similarity == pytest.approx(0.8, abs=1e-5)
    assert engine.subject_ids() == ["anna"]


def test_a_score_between_the_thresholds_goes_to_review_and_is_not_enrolled(engine):
    (anna,) = people(1)
    enroll(engine, "anna", anna)
    decision = next(
        d
        for c in np.linspace(0.2, 0.6, 81)
        if (d := engine.identify(bd.Encounter(templates={"face": again(anna, c)}))).outcome != "unique"
    )
    assert decision.outcome == "review"
    assert decision.review_db <= decision.best.score_db < decision.duplicate_db
    cosine = decision.best.evidence[0].similarity
    assert enroll(engine, "bella", again(anna, cosine)).outcome == "review"
    assert "bella" not in engine


def test_thresholds_follow_the_target_error_at_the_present_gallery_size(engine):
    engine.add_templates([f"s{i}" for i in range(1000)], {"face": people(1000)})
    decision = engine.identify(bd.Encounter(templates={"face": people(1, seed=9)[0]}))
    assert decision.duplicate_db == pytest.approx(60.0)  # 10 log10(1000 / 1e-3)
    assert decision.gallery_size == 1000


def test_identify_looks_for_weaker_candidates_when_asked(engine):
    vectors, probe = people(200), bd.Encounter(templates={"face": people(1, seed=9)[0]})
    engine.add_templates([f"s{i}" for i in range(200)], {"face": vectors})
    usual = engine.identify(probe)
    assert (usual.outcome, usual.candidates) == ("unique", ())
    nearest = engine.search({"face": probe.templates["face"][None]}, k=10)
    asked = engine.identify(probe, from_db=-100.0)
    assert (asked.outcome, asked.review_db) == ("unique", usual.review_db)
    assert {c.subject_id for c in asked.candidates} == set(nearest.ids[0])
    some_db = asked.candidates[4].score_db
    fewer = engine.identify(probe, from_db=some_db)
    assert {c.subject_id for c in asked.candidates[:5]} <= {c.subject_id for c in fewer.candidates}
    assert engine.identify(probe, from_db=300.0) == replace(usual, decided_at=ANY)
    with pytest.raises(bd.InvalidInput, match="from_db is nan"):
        engine.identify(probe, from_db=float("nan"))


def test_identify_writes_nothing(engine):
    (anna,) = people(1)
    enroll(engine, "anna", anna)
    version = engine.gallery_version
    engine.identify(bd.Encounter("x", templates={"face": people(1, seed=3)[0]}, encounter_id="e"))
    assert (engine.gallery_version, len(engine), engine.decision("e")) == (version, 1, None)


def test_decisions_survive_a_restart_and_a_resent_encounter_gets_the_same_one(tmp_path):
    anna, other = people(2)
    with bd.Engine.open(tmp_path / "g") as engine:
        first = enroll(engine, "anna", anna, encounter_id="e1")
        second = enroll(engine, "bella", again(anna, 0.9), encounter_id="e2")
    with bd.Engine.open(tmp_path / "g") as engine:
        version = engine.gallery_version
        assert enroll(engine, "anna", anna, encounter_id="e1") == first
        assert enroll(engine, "bella", again(anna, 0.9), encounter_id="e2") == second
        assert engine.decision("e2") == second
        assert (engine.gallery_version, len(engine)) == (version, 1)
        with pytest.raises(bd.EncounterConflict, match="e1"):
            enroll(engine, "anna", other, encounter_id="e1")


@pytest.mark.slow
def test_a_batch_finds_the_duplicates_inside_itself_and_keeps_its_order(engine):
    vectors = people(100)
    encounters = [bd.Encounter(f"a{i}", templates={"face": v}) for i, v in enumerate(vectors)]
    encounters += [bd.Encounter(f"b{i}", templates={"face": v}) for i, v in enumerate(again(vectors, 0.9))]
    decisions = list(engine.enroll_many(encounters))
    assert [d.subject_id for d in decisions] == [e.subject_id for e in encounters]
    assert [d.outcome for d in decisions] == ["unique"] * 100 + ["duplicate"] * 100
    assert [d.best.subject_id for d in decisions[100:]] == [f"a{i}" for i in range(100)]


def test_who_the_batch_before_added_is_found_though_the_next_was_searched_already(tmp_path):
    vectors = people(6)
    stream = np.concatenate([vectors[:3], again(vectors[:3], 0.95), vectors[3:]])
    encounters = [bd.Encounter(f"s{i}", templates={"face": vector}) for i, vector in enumerate(stream)]
    with bd.Engine.open(tmp_path / "g", bd.Config(batch_size=3, policy=STRICT)) as engine:
        found = list(engine.enroll_many(encounters))
    assert [one.outcome for one in found] == ["unique"] * 3 + ["duplicate"] * 3 + ["unique"] * 3
    assert [one.best.subject_id for one in found[3:6]] == ["s0", "s1", "s2"]


def test_one_bad_record_never_stops_a_batch(engine, tmp_path):
    anna, bella, carla = people(3)
    enroll(engine, "known", carla)
    decisions = list(
        engine.enroll_many(
            [
                bd.Encounter("anna", templates={"face": anna}),
                bd.Encounter("known", templates={"face": bella}),
                bd.Encounter("absent", captures=[bd.Face(tmp_path / "absent.jpg")]),
                bd.Encounter("bella", templates={"face": bella * np.nan}),
                bd.Encounter("dora", templates={"face": people(1, dimension=64)[0]}),
                bd.Encounter("bella", captures=[bd.Face(np.zeros((5, 5, 5, 5), np.uint8))]),
                bd.Encounter("bella", templates={"face": bella}),
            ]
        )
    )
    assert [d.outcome for d in decisions] == ["unique", *["refused"] * 5, "unique"]
    reasons = [d.refusals[0].reason for d in decisions[1:6]]
    assert reasons == ["subject_exists", "missing_file", "invalid_input", "model_mismatch", "invalid_input"]


@pytest.mark.slow
@pytest.mark.parametrize("rounds", ROUNDS)
def test_two_threads_enrolling_one_person_never_both_come_out_unique(tmp_path, rounds):
    engine = bd.Engine.open(tmp_path / "g", bd.Config(policy=STRICT))
    firsts, seconds = people(rounds), again(people(rounds), 0.9)
    outcomes: dict[tuple[str, int], str] = {}
    barrier = threading.Barrier(2)

    def run(name: str, vectors: np.ndarray) -> None:
        for i, vector in enumerate(vectors):
            barrier.wait()
            outcomes[name, i] = enroll(engine, f"{name}{i}", vector).outcome

    threads = [threading.Thread(target=run, args=pair) for pair in (("a", firsts), ("b", seconds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = [{outcomes["a", i], outcomes["b", i]} for i in range(rounds)]
    assert pairs == [{"unique", "duplicate"}] * rounds
    assert len(engine) == rounds
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("rounds", ROUNDS)
def test_eight_threads_enrolling_one_new_person_under_two_ids_make_one_subject(tmp_path, rounds):
    threads = 8
    vectors = people(rounds, seed=4)
    outcomes: list[list[str]] = [[] for _ in range(rounds)]
    barrier = threading.Barrier(threads)
    sealing = bd.GalleryConfig(seal_rows=rounds // 4, merge_fan=2)  # sealed and merged all the while
    config = bd.Config(gallery=sealing, policy=STRICT)

    def run(thread: int) -> None:
        for i in range(rounds):
            barrier.wait()
            try:
                outcome = enroll(
                    engine, f"{'ab'[thread % 2]}{i}", again(vectors[i], 0.9, seed=1000 * thread + i)
                ).outcome
            except bd.SubjectExists:
                outcome = "exists"
            outcomes[i].append(outcome)

    with bd.Engine.open(tmp_path / "g", config) as engine:
        workers = [threading.Thread(target=run, args=(t,)) for t in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [sorted(some) for some in outcomes] == [["duplicate"] * 4 + ["exists"] * 3 + ["unique"]] * rounds
        assert len(engine) == rounds
        assert engine.info()["segments"] >= 1
        assert engine.problems() == []


def test_threads_that_resend_one_encounter_all_get_one_decision(engine):
    (anna,) = people(1)
    answers: list[bd.Decision] = []
    threads = [
        threading.Thread(target=lambda: answers.append(enroll(engine, "anna", anna, encounter_id="e")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert all(answer == answers[0] for answer in answers)
    assert answers[0].outcome == "unique"


def test_a_removed_subject_is_not_seen_by_the_next_search_and_may_enrol_again(tmp_path):
    (anna,) = people(1)
    with bd.Engine.open(tmp_path / "g") as engine:
        enroll(engine, "anna", anna)
        engine.remove("anna")
        assert len(engine) == 0
        assert engine.search({"face": anna[None]}, k=1).ids[0, 0] == ""
        assert enroll(engine, "bella", again(anna, 0.9)).outcome == "unique"
    with bd.Engine.open(tmp_path / "g") as engine:
        assert engine.subject_ids() == ["bella"]
        with pytest.raises(bd.UnknownSubject, match="anna"):
            engine.remove("anna")


@pytest.mark.slow
@pytest.mark.parametrize("compacted", [False, True])
def test_a_candidate_removed_between_search_and_commit_does_not_block(engine, monkeypatch, compacted):
    (anna, *others) = people(4)
    for name, other in zip(("o1", "o2", "o3"), others, strict=True):
        enroll(engine, name, other)
    enroll(engine, "anna", anna)
    search = internals(engine).searcher.search
    calls = []

    def removing(*args, **kwargs):
        found = search(*args, **kwargs)
        if not calls:
            calls.append(1)
            engine.remove("anna")
            if compacted:
                engine.compact()
        return found

    monkeypatch.setattr(internals(engine).searcher, "search", removing)
    assert enroll(engine, "bella", again(anna, 0.9)).outcome == "unique"


def test_verify_accepts_the_mate_and_not_another(engine):
    anna, bella = people(2)
    enroll(engine, "anna", anna)
    assert engine.verify(bd.Encounter(templates={"face": again(anna, 0.7)}), "anna").accepted
    assert not engine.verify(bd.Encounter(templates={"face": bella}), "anna").accepted
    with pytest.raises(bd.UnknownSubject):
        engine.verify(bd.Encounter(templates={"face": anna}), "nobody")


@pytest.mark.slow
def test_search_returns_what_numpy_returns(engine):
    vectors = people(500)
    names = np.array([f"s{i}" for i in range(500)], object)
    engine.add_templates(list(names), {"face": vectors})
    for i in range(0, 500, 3):
        engine.remove(f"s{i}")
    alive = np.array([i % 3 != 0 for i in range(500)])
    probes = people(20, seed=5)
    exact = np.where(alive, probes @ vectors.T, -np.inf)
    ids, similarity = engine.search({"face": probes}, k=25)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :25]
    assert (ids == names[order]).all()
    np.testing.assert_allclose(similarity, np.take_along_axis(exact, order, axis=1), atol=1e-5)


def test_a_search_does_not_look_up_one_by_one_the_ids_that_it_names(engine, monkeypatch):
    vectors = people(30)
    engine.add_templates([f"s{i}" for i in range(30)], {"face": vectors}, model_id="own-1")

    def one_by_one(snapshot, subject_id):
        raise AssertionError(f"{subject_id} was looked up by itself")

    monkeypatch.setattr(Snapshot, "row_of", one_by_one)
    assert engine.search({"face": vectors}, k=3).ids[:, 0].tolist() == [f"s{i}" for i in range(30)]


def test_search_pads_where_the_gallery_is_smaller_than_k(engine):
    engine.add_templates(["a", "b"], {"face": people(2)})
    result = engine.search({"face": people(3, seed=1)}, k=5)
    assert result.ids.shape == (3, 5)
    assert (result.ids[:, 2:] == "").all()
    assert np.isneginf(result.similarity[:, 2:]).all()
    assert (np.diff(result.similarity[:, :2]) <= 0).all()


@pytest.mark.parametrize("least", [-1.0, 0.02, 0.3, 0.999])
def test_a_search_with_a_least_similarity_leaves_out_what_numpy_finds_below_it(engine, least):
    vectors, probes = people(300), people(20, seed=5)
    names = np.array([f"s{i}" for i in range(300)], object)
    engine.add_templates(list(names), {"face": vectors})
    exact = probes @ vectors.T
    ids, similarity = engine.search({"face": probes}, k=8, min_similarity=least)
    order = np.argsort(-exact, axis=1, kind="stable")[:, :8]
    found = np.take_along_axis(exact, order, axis=1)
    assert (ids == np.where(found >= least, names[order], "")).all()
    np.testing.assert_allclose(similarity, np.where(found >= least, found, -np.inf), atol=1e-5)


def test_a_least_similarity_that_is_no_cosine_is_refused(engine):
    with pytest.raises(bd.InvalidInput, match=r"min_similarity is 40, wanted a cosine from -1 to 1"):
        engine.search({"face": people(1)}, min_similarity=40)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_sequence_of_changes_leaves_what_a_dictionary_would_hold(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("g") / "gallery"
    vectors = people(12)
    held: set[int] = set()
    for _ in range(data.draw(st.integers(1, 3))):
        with bd.Engine.open(folder) as engine:
            for _ in range(data.draw(st.integers(0, 6))):
                i = data.draw(st.integers(0, 11))
                if i in held:
                    engine.remove(f"s{i}")
                    held.remove(i)
                else:
                    assert enroll(engine, f"s{i}", vectors[i]).outcome == "unique"
                    held.add(i)
            assert sorted(engine.subject_ids()) == sorted(f"s{i}" for i in held)
            ids, _ = engine.search({"face": vectors}, k=1)
            assert all(ids[i, 0] == f"s{i}" for i in held)
            assert engine.problems() == []


def test_find_duplicates_gives_clusters_with_their_weakest_link(engine):
    vectors = people(300)
    near, nearer = again(vectors[:10], 0.75), again(vectors[:5], 0.85, seed=2)
    names = [f"s{i}" for i in range(300)]
    engine.add_templates(
        names + [f"t{i}" for i in range(10)] + [f"u{i}" for i in range(5)],
        {"face": np.concatenate([vectors, near, nearer])},
    )
    clusters = engine.find_duplicates()
    assert {c.subject_ids for c in clusters} == {
        *((f"s{i}", f"t{i}", f"u{i}") for i in range(5)),
        *((f"s{i}", f"t{i}") for i in range(5, 10)),
    }
    for cluster in clusters:
        assert cluster.weakest_db <= max(link.score_db for link in cluster.links)
        assert cluster.weakest_db >= min(link.score_db for link in cluster.links)


def test_more_mates_than_candidates_are_all_found_by_find_duplicates(tmp_path):
    (anna,) = people(1)
    crowd = again(np.repeat(anna[None], 30, axis=0), 0.95)
    config = bd.Config(search=bd.SearchConfig(candidates=4, returned=2))
    with bd.Engine.open(tmp_path / "g", config) as engine:
        engine.add_templates([f"c{i:02d}" for i in range(30)], {"face": crowd})
        (cluster,) = engine.find_duplicates()
        assert len(cluster.subject_ids) == 30
        assert len(cluster.links) == 30 * 29 // 2


@pytest.mark.slow
def test_embeddings_of_any_model_can_be_brought(tmp_path):
    vectors = people(2000, dimension=512)
    with bd.Engine.open(tmp_path / "g") as engine:
        engine.add_templates([f"s{i}" for i in range(2000)], {"face": vectors})
        again_ = enroll(engine, "again", again(vectors[7], 0.6))
        assert (again_.outcome, again_.reasons, again_.best.subject_id) == ("review", ("uncalibrated",), "s7")
        assert enroll(engine, "new", people(1, seed=8, dimension=512)[0]).outcome == "unique"
        with pytest.raises(bd.ModelMismatch, match="512"):
            enroll(engine, "other", people(1)[0])
    with bd.Engine.open(tmp_path / "g") as engine:  # bare embeddings do not tie a gallery to a model
        assert len(engine) == 2001


@pytest.mark.slow
def test_captures_do_not_enter_a_gallery_of_another_models_embeddings(engine, portrait):
    engine.add_templates(["a"], {"face": people(1, dimension=512)})
    with pytest.raises(bd.ModelMismatch):
        engine.enroll(bd.Encounter("b", [bd.Face(portrait)]))


@pytest.mark.slow
def test_a_gallery_made_with_another_model_is_refused_at_opening(tmp_path, portrait):
    def ready(column: str, model_id: str, dimension: int) -> bd.Encounter:
        return bd.Encounter(column, templates={column: bd.Template(column, model_id, people(1, 0, dimension)[0])})

    with bd.Engine.open(tmp_path / "g", bd.Config(finger=bd.FingerConfig(model=None))) as engine:
        engine.import_captures([ready("face", "another-model", 128), ready("right_index", "finger256-3", 256)])
        engine.import_captures([ready("left_index", "finger256-3+skeleton-1", 256)])
    with pytest.raises(bd.ModelMismatch, match="left_index"):
        bd.Engine.open(tmp_path / "g", bd.Config(finger=bd.FingerConfig(model=None)))
    with bd.Engine.open(tmp_path / "g") as engine:  # whatever comes ready made ties a gallery to no configuration
        with pytest.raises(bd.ModelMismatch, match="another-model"):
            engine.identify(bd.Encounter(captures=[bd.Face(portrait)]))


def test_bad_templates_are_named(engine):
    ids = ["a", "b"]
    good = people(2)
    for wrong, text in [
        (good * np.nan, "NaN"),
        (good * 7, "length 7"),
        (good.astype(np.float64)[:, :, None], "shape"),
        ((good * 100).astype(np.int32), "dtype int32"),
        (good[:1], "1 rows for 2"),
    ]:
        with pytest.raises(bd.InvalidInput, match=text):
            engine.add_templates(ids, {"face": wrong})
    with pytest.raises(bd.InvalidInput, match="repetitions"):
        engine.add_templates(["a", "a"], {"face": good})
    with pytest.raises(bd.InvalidInput, match="got int"):
        engine.add_templates([1, 2], {"face": good})
    with pytest.raises(bd.InvalidInput, match="toe"):
        engine.add_templates(ids, {"toe": good})
    assert len(engine) == 0
    engine.add_templates(ids, {"face": good})
    with pytest.raises(bd.SubjectExists, match="'b'"):
        engine.add_templates(["c", "b"], {"face": people(2, seed=4)})
    assert len(engine) == 2


def test_add_templates_is_idempotent_by_encounter_id(engine):
    vectors = people(3)
    assert engine.add_templates(["a", "b", "c"], {"face": vectors}, encounter_id="load-1") == 3
    assert engine.add_templates(["a", "b", "c"], {"face": vectors}, encounter_id="load-1") == 0
    with pytest.raises(bd.EncounterConflict):
        engine.add_templates(["d"], {"face": vectors[:1]}, encounter_id="load-1")
    assert len(engine) == 3


def test_bad_calls_say_what_got_wanted_next(engine):
    with pytest.raises(bd.InvalidInput, match="subject_id"):
        engine.enroll(bd.Encounter(templates={"face": people(1)[0]}))
    with pytest.raises(bd.InvalidInput, match="k is 0"):
        engine.search({"face": people(1)}, k=0)
    with pytest.raises(bd.InvalidInput, match="position"):
        bd.Finger(b"", position="right_toe")
    with pytest.raises(bd.InvalidInput, match="printable"):
        bd.Encounter("a\nb")
    with pytest.raises(bd.InvalidInput, match="wrap it"):
        bd.Encounter("a", captures=["face.jpg"])
    engine.close()
    with pytest.raises(bd.EngineClosed):
        engine.subject_ids()


def test_a_second_writer_is_refused_with_the_holders_name(tmp_path):
    import os

    with bd.Engine.open(tmp_path / "g") as engine:
        engine.add_templates(["a"], {"face": people(1)})
        with pytest.raises(bd.GalleryBusy, match=f"process {os.getpid()}"):
            bd.Engine.open(tmp_path / "g")
        with bd.Engine.open(tmp_path / "g", read_only=True) as reader:
            assert reader.subject_ids() == ["a"]
            with pytest.raises(bd.InvalidInput, match="read_only"):
                reader.remove("a")


def test_foreign_folders_and_files_are_not_galleries(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(bd.NotAGallery, match="other files"):
        bd.Engine.open(tmp_path / "photos")
    with pytest.raises(bd.NotAGallery):
        bd.Engine.open(tmp_path / "photos" / "a.jpg")
    with pytest.raises(bd.NotAGallery, match="no gallery"):
        bd.Engine.open(tmp_path / "nothing", read_only=True)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "gallery.sqlite3").write_bytes(b"not a database at all, just some text" * 40)
    with pytest.raises(bd.NotAGallery, match="not a gallery's database"):
        bd.Engine.open(tmp_path / "fake")
    import sqlite3

    (tmp_path / "other").mkdir()
    connection = sqlite3.connect(tmp_path / "other" / "gallery.sqlite3")
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(bd.NotAGallery, match="another program"):
        bd.Engine.open(tmp_path / "other")


@pytest.mark.slow
def test_the_real_path_blocks_a_recaptured_portrait_and_refuses_a_poor_one(engine, portrait):
    assert engine.enroll(bd.Encounter("astronaut", [bd.Face(jpeg(portrait))])).outcome == "unique"
    decision = engine.enroll(bd.Encounter("impostor", [bd.Face(jpeg(portrait[:, ::-1], 60))]))
    assert decision.outcome == "duplicate"
    assert decision.best.subject_id == "astronaut"
    refused = engine.enroll(bd.Encounter("dark", [bd.Face((portrait * 0.05).astype(np.uint8))]))
    assert refused.outcome == "refused"
    assert refused.refusals[0].reason
    assert "dark" not in engine


def test_the_better_of_two_captures_is_kept_and_the_other_named(engine):
    a, b = people(2)
    templates = {"face": bd.Template("face", "m", a, quality=0.5)}
    assert bd.Template("face", "m", unit(b), quality=0.7).quality == 0.7
    decision = engine.enroll(bd.Encounter("a", templates=templates))
    assert decision.outcome == "unique"


@pytest.mark.slow
def test_admitting_without_a_usable_capture_leaves_the_enrolled_subject(engine):
    enroll(engine, "anna", people(1)[0])
    (answer,) = engine.import_captures(
        [bd.Encounter("anna", captures=[bd.Face(np.full((200, 200, 3), 127, np.uint8))])]
    )
    assert answer.outcome == "refused" and "anna" in engine
    (answer,) = engine.import_captures([bd.Encounter("anna", templates={"face": people(2)[1]})])
    assert answer.outcome == "unique" and len(engine) == 1


def test_missing_captures_stay_on_record(engine):
    missing = bd.Missing("left_thumb", "amputated")
    decision = engine.enroll(bd.Encounter("a", [missing], templates={"face": people(1)[0]}, encounter_id="e"))
    assert decision.missing == (missing,)
    assert engine.decision("e").missing == (missing,)


def test_an_encounter_with_nothing_to_compare_is_refused(engine):
    decision = engine.enroll(bd.Encounter("a", [bd.Missing("face", "veiled")]))
    assert decision.outcome == "refused"
    assert len(engine) == 0


def test_reprs_show_no_biometric_data():
    vector = people(1)[0]
    shown = repr(bd.Encounter("a", [bd.Face(b"\xff\xd8secret")], templates={"face": vector}))
    assert "secret" not in shown
    assert str(vector[0])[:6] not in shown


def test_a_folder_may_be_given_as_text(tmp_path):
    with bd.Engine.open(str(tmp_path / "g")) as engine:
        assert len(engine) == 0
    assert Path(tmp_path / "g").is_dir()


@pytest.mark.slow
def test_a_finger_embedding_finds_a_mate_whose_face_does_not(tmp_path):
    rng = np.random.default_rng(2)

    def unit(count, dimension):
        vectors = rng.standard_normal((count, dimension), np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    faces, fingers = unit(3_000, 128), unit(3_000, 128)
    with bd.Engine.open(tmp_path / "g", bd.Config(search=bd.SearchConfig(candidates=5))) as engine:
        engine.add_templates([f"s{i}" for i in range(3_000)], {"face": faces, "right_index": fingers})
        probe = {"face": unit(1, 128)[0], "right_index": fingers[7]}
        decision = engine.identify(bd.Encounter(None, templates=probe))
        assert decision.best.subject_id == "s7"
        assert {evidence.column for evidence in decision.best.evidence} == {"face", "right_index"}
        assert not decision.incomplete  # three thousand fingers were scanned, not compared one by one
        unknown = engine.identify(bd.Encounter(None, templates={"unknown": fingers[9]}))
        assert unknown.best.subject_id == "s9"


def test_the_old_name_of_the_subjects_of_a_join_is_deprecated(engine):
    anna, bella = people(2)
    for name, face in (("anna", anna), ("bella", bella), ("anne", again(anna, 0.9))):
        engine.add_templates([name], {"face": face[None]})
    wanted = [tile.links for tile in engine.join(subject_ids=["anne"], threshold_db=20)]
    with pytest.warns(DeprecationWarning, match="subject_ids"):
        assert [tile.links for tile in engine.join(among=["anne"], threshold_db=20)] == wanted
    assert [link.subject_ids for links in wanted for link in links] == [("anne", "anna")]
