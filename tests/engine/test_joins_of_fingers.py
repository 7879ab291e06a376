"""Joins of galleries with faces and fingers: each pair once, whichever of its rows comes first, and however rows are batched."""

from __future__ import annotations

import pytest

import biodedup as bd
from biodedup.search.selfjoin import join as selfjoin
from tests.support.ten_fingers import PEOPLE, TEN, later

pytestmark = pytest.mark.slow
CONFIG = bd.Config(gallery=bd.GalleryConfig(background=False))
TWO = ("face", *TEN[:2])
MATES = ((3, 40), (7, 8), (20, 21), (0, 39), (15, 38))
"""(the place of a person, the place of the same person's second record), in a gallery of 41."""


def enrolled(engine: bd.Engine, encounters: dict[str, dict[str, bd.Template]]) -> None:
    for subject_id, templates in encounters.items():
        (outcome,) = engine.import_captures([bd.Encounter(subject_id, templates=templates)])
        assert outcome.outcome != "refused", outcome


def with_mates() -> dict[str, dict[str, bd.Template]]:
    records = [{column: person[column] for column in TWO} for person in PEOPLE[:41]]
    for first, second in MATES:
        records[second] = later(records[first], TWO, seed=second)
    return {f"s{place:02}": record for place, record in enumerate(records)}


def pairs_of(tiles) -> list[tuple[str, str]]:
    return sorted(tuple(sorted(link.subject_ids)) for tile in tiles for link in tile.links)


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 128])
def test_a_join_finds_each_pair_once_however_its_rows_are_batched(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(selfjoin, "_SEARCHED_ROWS", batch)
    wanted = sorted((f"s{a:02}", f"s{b:02}") for a, b in MATES)
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        enrolled(engine, with_mates())
        for _ in range(2):  # rows of the journal, then of a segment
            assert pairs_of(engine.join(threshold_db=60.0)) == wanted
            engine.compact()


def test_listed_subjects_are_joined_with_earlier_ones_too(tmp_path):
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        enrolled(engine, with_mates())
        listed = [f"s{second:02}" for _, second in MATES]
        found = pairs_of(engine.join(threshold_db=60.0, subject_ids=listed))
        assert found == sorted((f"s{a:02}", f"s{b:02}") for a, b in MATES)


@pytest.mark.parametrize("columns", [TWO, ("face",)], ids=["face and fingers", "faces"])
def test_a_join_that_goes_on_compares_new_subjects_with_those_before_it(tmp_path, columns):
    records = {name: {c: record[c] for c in columns} for name, record in with_mates().items()}
    names = list(records)
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        enrolled(engine, {name: records[name] for name in names[:40]})
        (tile,) = engine.join(threshold_db=50.0)
        enrolled(engine, {name: records[name] for name in names[40:]})
        for _ in range(2):  # the new row in the journal, then in a segment
            found = pairs_of(engine.join(threshold_db=50.0, since=tile.reached))
            assert ("s03", "s40") in found, "the first one was compared before the second one came"
            engine.compact()
