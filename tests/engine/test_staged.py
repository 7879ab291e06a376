"""Staged evidence in an engine: the decisions of comparing all minutiae, for a fraction of the comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from shutil import copytree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup.embed.cards import joint_id, load_card, minutiae_card
from biodedup.engine.prepare import Probe
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.testing import internals
from biodedup.values import FINGER_POSITIONS
from tests.support.minutiae import moved, record, strewn
from tests.support.vectors import SFACE, again, people

FINGER = joint_id(load_card("finger256"), minutiae_card("skeleton"))
TEN = tuple(column for column in FINGER_POSITIONS if column != "unknown")
COUNT = 60


def enrolled() -> list[dict[str, bd.Template]]:
    rng = np.random.default_rng(0)
    embeddings = {column: people(COUNT, seed=i, dimension=256) for i, column in enumerate(TEN)}
    faces, prints = people(COUNT, seed=99), [strewn(40, seed) for seed in range(25)]

    def finger(i: int, column: str) -> bd.Template:
        rows = prints[rng.integers(len(prints))] + np.append(rng.normal(0, 20, (40, 2)), np.zeros((40, 2)), axis=1)
        return bd.Template(column, FINGER, embeddings[column][i], record(moved(rows, rng.uniform(-30, 30))), 0.6)

    faced = [bd.Template("face", SFACE, face) for face in faces]
    return [{"face": faced[i], **{column: finger(i, column) for column in TEN}} for i in range(COUNT)]


PEOPLE = enrolled()


def later(person: dict[str, bd.Template], columns, cosine: float = 0.7, seed: int = 5) -> dict[str, bd.Template]:
    """Other captures of these columns of a person: the same minutiae, and embeddings at this cosine."""
    return {c: replace(person[c], embedding=again(person[c].embedding[None], cosine, seed)[0]) for c in columns}


def galleries(folder, **search) -> bd.Engine:
    engine = bd.Engine.open(folder, bd.Config(search=bd.SearchConfig(**search)))
    engine.import_captures([bd.Encounter(f"s{i}", templates=PEOPLE[i], encounter_id=f"e{i}") for i in range(40)])
    return engine


PROBES = {
    "a stranger": PEOPLE[40],
    "a stranger of a face and two fingers": {c: PEOPLE[41][c] for c in ("face", *TEN[:2])},
    "a stranger of one finger": {TEN[0]: PEOPLE[42][TEN[0]]},
    "a mate": later(PEOPLE[3], PEOPLE[3]),
    "a mate by two fingers": later(PEOPLE[4], TEN[2:4]),
    "a twin": PEOPLE[43] | later(PEOPLE[5], ["face"]),
    "an operator's finger": PEOPLE[44] | later(PEOPLE[6], TEN[5:6], 0.9),
    "two people's captures": later(PEOPLE[7], ("face", *TEN[:5])) | later(PEOPLE[8], TEN[5:]),
}


def rounded(value):
    """The same with floats to nine decimals: the tables of intervals differ in their last bits between two engines."""
    if is_dataclass(value):
        return type(value).__name__, [rounded(getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, (tuple, list)):
        return [rounded(one) for one in value]
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 9) if isinstance(value, float) else value


@pytest.mark.slow
@pytest.mark.parametrize("across", [False, True])
def test_decisions_are_those_of_comparing_all_minutiae(tmp_path, across):
    with galleries(tmp_path / "staged") as staged, galleries(tmp_path / "all", miss_risk=0.0) as everything:
        outcomes = set()
        for name, probe in PROBES.items():
            if across and len(probe) > 3:
                continue
            encounter = bd.Encounter(templates=probe)
            decision = staged.identify(encounter, across_positions=across)
            whole = everything.identify(encounter, across_positions=across)
            assert rounded(replace(decision, decided_at=0.0)) == rounded(replace(whole, decided_at=0.0)), name
            outcomes.add(decision.outcome)
        assert len(outcomes) > 1


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Iterator[tuple[bd.Engine, bd.Engine]]:
    """One gallery twice, staged and exhaustive: subjects with two rows, some that lack captures, open cases, one removed."""
    folder = tmp_path_factory.mktemp("engines")
    with galleries(folder / "staged") as engine:
        for i in range(6):
            again_here = later(PEOPLE[i], ("face", *TEN[i : i + 4]), seed=1000 + i)
            assert engine.update(bd.Encounter(f"s{i}", templates=again_here)).outcome == "unique"
        fingers = [{column: PEOPLE[i][column] for column in TEN[:3]} for i in range(50, 53)]
        engine.import_captures([bd.Encounter(f"f{i}", templates=templates) for i, templates in enumerate(fingers)])
        for i in range(6, 9):
            probe = PEOPLE[40 + i] | later(PEOPLE[i], TEN[i : i + 1], 0.9, seed=1100 + i)
            assert engine.enroll(bd.Encounter(f"c{i}", templates=probe)).outcome == "review"
        engine.import_captures([bd.Encounter("late", templates=PEOPLE[53])])
        engine.remove("s9")
    copytree(folder / "staged", folder / "exhaustive")
    everything = bd.Config(search=bd.SearchConfig(miss_risk=0.0))
    with bd.Engine.open(folder / "staged") as staged, bd.Engine.open(folder / "exhaustive", everything) as exhaustive:
        yield staged, exhaustive


@st.composite
def captures(draw) -> dict[str, tuple[int, str, float, bool]]:
    """By column: whose capture it is (54 and 55 are strangers), of which finger, its cosine, and whether it has minutiae."""
    columns = draw(st.lists(st.sampled_from(("face", *TEN)), min_size=1, max_size=11, unique=True))
    owners = st.sampled_from((54, 55, *draw(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=3, unique=True))))
    labels = {column: column for column in columns}
    if len(columns) > 2 and draw(st.booleans()):
        a, b = draw(st.permutations([column for column in columns if column != "face"]))[:2]
        labels[a], labels[b] = b, a
    cosines, has_minutiae = st.sampled_from((0.5, 0.7, 0.9)), st.sampled_from((True,) * 9 + (False,))
    return {column: (draw(owners), labels[column], draw(cosines), draw(has_minutiae)) for column in columns}


def captured(drawn: dict[str, tuple[int, str, float, bool]]) -> dict[str, bd.Template]:
    probe = {}
    for column, (owner, label, cosine, has_minutiae) in drawn.items():
        capture = later(PEOPLE[owner], [label], cosine, seed=1200 + owner)[label]
        probe[column] = replace(capture, column=column, minutiae=capture.minutiae if has_minutiae else None)
    return probe


@pytest.mark.slow
@settings(max_examples=30, derandomize=True)
@given(st.lists(captures(), min_size=1, max_size=3), st.booleans())
def test_any_probes_are_decided_as_by_comparing_all_minutiae(engines, several, across):
    probes = [Probe(bd.Encounter(), captured(drawn), ()) for drawn in several]
    seen = [internals(engine).searches.search(probes, across=across) for engine in engines]
    for number, probe in enumerate(probes):
        staged, everything = (one.found[number].comparisons for one in seen)
        assert staged.compared <= everything.compared
        known = {one.row: one for one in everything}
        assert [one.row for one in staged if rounded(one) != rounded(known[one.row])] == []
        encounter = bd.Encounter(templates=probe.templates)
        ours, wanted = (engine.identify(encounter, across_positions=across) for engine in engines)
        assert (ours.outcome, ours.reasons) == (wanted.outcome, wanted.reasons)
        assert rounded(ours.candidates) == rounded(wanted.candidates)
        assert rounded(replace(ours, decided_at=0.0)) == rounded(replace(wanted, decided_at=0.0))


@pytest.mark.slow
def test_a_trace_says_how_many_minutiae_were_compared(tmp_path):
    with galleries(tmp_path / "g") as engine:
        for call in (engine.identify, engine.enroll):
            with bd.explain() as steps:
                call(bd.Encounter("new", templates=PEOPLE[40]))
            (step,) = steps.of("comparisons")
            assert 50 <= step["minutiae"] < 100
            assert step["candidates"] == 5


@pytest.mark.slow
def test_encounters_of_one_batch_are_compared_with_one_another_in_stages(tmp_path):
    with galleries(tmp_path / "g") as engine:
        batch = [bd.Encounter(f"n{i}", templates=PEOPLE[40 + i]) for i in range(12)]
        batch.append(bd.Encounter("again", templates=later(PEOPLE[45], PEOPLE[45])))
        decisions = list(engine.enroll_many(batch))
        assert [decision.outcome for decision in decisions] == ["unique"] * 12 + ["duplicate"]
        assert decisions[-1].candidates[0].subject_id == "n5"
        assert [len(decision.candidates) for decision in decisions] == [5] * 13


@pytest.mark.slow
def test_a_batch_compares_few_of_its_own_strangers_and_lists_what_single_enrolments_list(tmp_path, monkeypatch):
    real, compared = CylinderMatcher.compare_pairs, list[int]()
    monkeypatch.setattr(
        CylinderMatcher, "compare_pairs", lambda self, *given: compared.append(len(given[1])) or real(self, *given)
    )
    encounters = [bd.Encounter(f"n{i}", templates=PEOPLE[40 + i], encounter_id=f"n{i}") for i in range(12)]
    with galleries(tmp_path / "batch") as batch, galleries(tmp_path / "single") as single:
        decisions = list(batch.enroll_many(encounters))
        in_batch, compared[:] = sum(compared), []
        wanted = [single.enroll(encounter) for encounter in encounters]
    assert [rounded(d.candidates) for d in decisions] == [rounded(d.candidates) for d in wanted]
    assert 12 * 50 <= in_batch < 1.4 * sum(compared)  # nearly twice as many if each compared five others of its batch


@pytest.mark.slow
def test_a_lower_review_threshold_between_search_and_commit_searches_again(tmp_path):
    with galleries(tmp_path / "g") as engine:
        probe = bd.Encounter("new", templates=PEOPLE[40])
        enrolment = internals(engine).enrolment
        sought = enrolment.search([probe], across=False)
        before = engine.identify(probe)
        engine.set_policy(bd.Policy(review_db=0.5), by="a test", reason="to see more")
        wanted = engine.identify(probe)
        (decision,) = enrolment.commit(sought)
        assert (decision.outcome, decision.candidates) == (wanted.outcome, wanted.candidates)
        assert decision.candidates != before.candidates


@pytest.mark.slow
def test_similarities_are_those_of_the_stored_vectors(tmp_path):
    faces, probes = people(700, seed=1), people(3, seed=2)
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=bd.GalleryConfig(background=False))) as engine:
        for low, high in ((0, 600), (600, 700)):  # sealed with a codec, and in the journal
            engine.add_templates([f"s{i}" for i in range(low, high)], {"face": faces[low:high]}, model_id=SFACE)
            if not low:
                engine.compact()
        snapshot = internals(engine).gallery.snapshot()
        assert [part.columns["face"].codec is None for part in snapshot.parts] == [False, True]
        rows = np.random.default_rng(0).permutation(700)[:400]
        wanted = snapshot.embeddings(rows, "face") @ probes.T
        assert (
            np.abs(snapshot.similarities(rows, "face", probes[None], np.zeros(len(rows), np.int64)) - wanted).max()
            < 1e-6
        )


@pytest.mark.slow
def test_a_join_finds_the_pairs_of_comparing_all_minutiae(tmp_path):
    with galleries(tmp_path / "staged") as engine:
        mates = [
            PEOPLE[i] | later(PEOPLE[20 + i], ("face", *TEN[: i + 2])) for i in range(8)
        ]  # some resemble two people
        engine.import_captures([bd.Encounter(f"m{i}", templates=templates) for i, templates in enumerate(mates)])
    copytree(tmp_path / "staged", tmp_path / "exhaustive")
    found = []
    for name, miss_risk in (("staged", 1e-3), ("exhaustive", 0.0)):
        with bd.Engine.open(tmp_path / name, bd.Config(search=bd.SearchConfig(miss_risk=miss_risk))) as engine:
            found.append(list(engine.join(threshold_db=40.0)))
    assert found[0] == found[1] and found[0][-1].links
