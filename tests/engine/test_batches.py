"""Batches: each encounter of a batch is decided as if it came alone, also when the gallery changes between search and commit."""

from __future__ import annotations

from dataclasses import replace
from shutil import copytree

import pytest

import biodedup as bd
from biodedup.testing import internals
from tests.engine.test_staged import PEOPLE, TEN, later, rounded
from tests.support.vectors import people

pytestmark = pytest.mark.slow

CONFIG = bd.Config(policy=bd.Policy(use_gallery_impostors=False), gallery=bd.GalleryConfig(background=False))
"""Scores are those of the cards, however many rows the gallery has."""


def of(person: int, columns) -> dict[str, bd.Template]:
    return {column: PEOPLE[person][column] for column in columns}


def gallery(folder, people_of: dict[str, dict[str, bd.Template]]) -> bd.Engine:
    engine = bd.Engine.open(folder, CONFIG)
    engine.import_captures(
        [bd.Encounter(name, templates=given, encounter_id=name) for name, given in people_of.items()]
    )
    return engine


def without_minutiae(captures: dict[str, bd.Template]) -> dict[str, bd.Template]:
    return {column: replace(capture, minutiae=None) for column, capture in captures.items()}


def test_a_column_that_another_caller_begins_with_another_model_is_an_error_of_its_encounters_alone(tmp_path):
    thumb, index = TEN[:2]
    with gallery(tmp_path / "g", {f"s{i}": of(i, ("face", index)) for i in range(8)}) as engine:
        enrolment = internals(engine).enrolment
        batch = [
            bd.Encounter(f"n{i}", templates=of(40 + i, columns)) for i, columns in enumerate(((thumb, index), (index,)))
        ]
        sought = enrolment.search(batch, across=False)
        engine.add_templates(["other"], {thumb: people(1, dimension=64)}, model_id="external-64")
        refused, decided = enrolment.commit(sought)
        assert isinstance(refused, bd.ModelMismatch)
        assert (decided.outcome, "n1" in engine) == ("unique", True)


def test_the_rows_of_a_subject_that_was_enrolled_and_updated_after_the_search_count_together(tmp_path):
    """Neither row is more like the probe than those that the search found; both together are."""
    shared, thumb, index, middle = TEN[:4]
    bare = without_minutiae(of(50, (thumb, index)))
    probe = bd.Encounter("n", templates=bare | of(50, [shared]), encounter_id="n")
    known = {f"s{i}": without_minutiae(later(PEOPLE[50], [thumb], 0.55, i)) for i in range(6)}
    known |= {f"s{i}": of(i, (shared, thumb, index, middle)) for i in range(6, 12)}
    gallery(tmp_path / "after", known).close()
    copytree(tmp_path / "after", tmp_path / "before")
    found = []
    for name in ("after", "before"):
        with bd.Engine.open(tmp_path / name, CONFIG) as engine:
            sought = internals(engine).enrolment.search([probe], across=False) if name == "before" else None
            engine.import_captures([bd.Encounter("stranger", templates=of(30, (shared, thumb, index)))])
            for number, column in enumerate((thumb, index)):
                captures = later(PEOPLE[50], [middle], 0.9, number) | without_minutiae(
                    later(PEOPLE[50], [column], 0.54, 90 + number)
                )
                (engine.update if number else engine.enroll)(bd.Encounter("twice", templates=captures))
            found.append(engine.enroll(probe) if sought is None else internals(engine).enrolment.commit(sought)[0])
    wanted, got = found
    assert wanted.candidates[0].subject_id == "twice" and len(wanted.candidates[0].rows) == 2
    assert rounded(got.candidates) == rounded(wanted.candidates)
    assert (got.outcome, wanted.outcome) == ("review", "review")


@pytest.mark.parametrize("named", [True, False])
def test_a_finger_under_another_label_is_found_among_the_rows_of_its_own_batch(tmp_path, named):
    """Also where the gallery has the probe's first finger alone, so that labels pair one capture."""
    thumb, index = TEN[:2]
    first = bd.Encounter("first", templates=of(45, [thumb]))
    swapped = {index: replace(later(PEOPLE[45], [thumb], 0.9)[thumb], column=index)}
    second = bd.Encounter("second", templates=swapped | (without_minutiae(of(46, [thumb])) if named else {}))
    found = []
    for name in ("batch", "single"):
        with gallery(tmp_path / name, {f"s{i}": of(i, [thumb]) for i in range(3)}) as engine:
            each = [[first, second]] if name == "batch" else [[first], [second]]
            found.append([one for some in each for one in engine.enroll_many(some, across_positions=True)][1])
    in_batch, single = found
    assert (single.outcome, single.candidates[0].subject_id) == ("duplicate", "first")
    assert (in_batch.outcome, rounded(in_batch.candidates)) == (single.outcome, rounded(single.candidates))
