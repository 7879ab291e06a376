"""Searches that scan some columns and compare the others for the candidates alone, against all evidence in numpy."""

import numpy as np
import pytest

import biodedup as bd
from biodedup.gallery.segments.reader import SegmentColumn
from biodedup.search.multicolumn import plan as multicolumn_plan
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals
from tests.support.laws import FACE, FINGER

COLUMNS = ("face", "left_index", "right_index")
MODELS = {column: "faces-1" if column == "face" else "fingers-1" for column in COLUMNS}
LAWS = {column: FACE if column == "face" else FINGER for column in COLUMNS}
POLICY = bd.Policy(duplicate_db=70, review_db=60)
ROWS, WHOLE = 3_000, 2_600
"""The rows from WHOLE on have a left index alone."""


def unit(count, seed):
    vectors = np.random.default_rng(seed).standard_normal((count, 128), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def register():
    return {column: unit(ROWS, i) for i, column in enumerate(COLUMNS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, register):
    folder = tmp_path_factory.mktemp("scanned") / "g"
    with bd.Engine.open(folder, bd.Config(gallery=bd.GalleryConfig(background=False), policy=POLICY)) as engine:
        for low, high, columns in ((0, WHOLE, COLUMNS), (WHOLE, ROWS, ("left_index",))):
            vectors = {column: register[column][low:high] for column in columns}
            models = {column: MODELS[column] for column in columns}
            engine.add_templates([f"s{row}" for row in range(low, high)], vectors, model_id=models)
        engine.compact()
    return folder


@pytest.fixture
def scanning(folder, monkeypatch):
    """Opens the register with a search setting."""
    opened = []

    def open_(**settings):
        monkeypatch.setattr(multicolumn_plan, "ROWS_MIN", 2_000)
        config = bd.Config(
            search=bd.SearchConfig(capture_correlation=0.0, **settings), gallery=bd.GalleryConfig(background=False)
        )
        opened.append(bd.Engine.open(folder, config, read_only=True))
        by_model = {"faces-1": FACE, "fingers-1": FINGER}
        monkeypatch.setattr(internals(opened[-1]).comparer, "_calibration_of", lambda model_id, *_: by_model[model_id])
        return opened[-1]

    yield open_
    for engine in opened:
        engine.close()


def encounters(rows, register, seed, columns=COLUMNS):
    """(probes by column, templates of each probe): mates of these rows, with similarities of the calibrations' laws."""
    rng, vectors = np.random.default_rng(seed), {}
    for i, column in enumerate(columns):
        similarity = LAWS[column].mated_similarities(rng.random(len(rows))).clip(-0.9, 0.97)
        vectors[column] = mates_of(register[column][rows], similarity, seed=seed + i)
    each = [{c: bd.Template(c, MODELS[c], vectors[c][i]) for c in columns} for i in range(len(rows))]
    return vectors, each


def evidence(register, vectors, columns):
    """llr_db of each probe with each whole row, summed over the columns, float64 (q, WHOLE)."""
    return sum(LAWS[c].llr_db((vectors[c] @ register[c][:WHOLE].T).astype(np.float64)) for c in columns)


def candidates(engine, templates):
    snapshot = internals(engine).gallery.snapshot()
    return [result.comparisons for result in internals(engine).searcher.search(snapshot, templates)]


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [("face", "right_index"), ("face",)])
def test_the_candidates_of_the_scanned_columns_are_ranked_by_all_columns(scanning, register, scanned):
    engine = scanning(scanned=scanned, candidates=30, returned=3)
    rows = np.arange(0, WHOLE, 13)
    vectors, templates = encounters(rows, register, 3)
    part, whole = (evidence(register, vectors, columns) for columns in (scanned, COLUMNS))
    tried, missed = 0, 0
    for i, (row, found) in enumerate(zip(rows.tolist(), candidates(engine, templates), strict=True)):
        if part[i][row] < np.sort(part[i])[-30] + 2 or whole[i][row] < 60:  # eight bits of rounding
            continue
        tried, missed = tried + 1, missed + (row not in found.rows)
        if row in found.rows and whole[i][row] == whole[i].max():
            assert found.rows[0] == row
            assert found[0].llr_db == pytest.approx(whole[i][row], abs=3)
    assert tried > 150
    assert missed <= 2  # of a risk of a thousandth


@pytest.mark.slow
def test_mates_are_missed_as_rarely_as_the_plan_says(scanning, register):
    engine = scanning(scanned=("right_index",), candidates=3, returned=3)
    stated = engine.plan(COLUMNS).scanned
    rows = np.random.default_rng(8).integers(0, WHOLE, 1_500)
    vectors, templates = encounters(rows, register, 13)
    threshold_db = internals(engine).comparer.llr_reaching(60, list(MODELS.values()))
    own = sum(LAWS[c].llr_db(np.einsum("ij,ij->i", vectors[c], register[c][rows]).astype(np.float64)) for c in COLUMNS)
    reaching = np.flatnonzero(own >= threshold_db)
    found = candidates(engine, [templates[i] for i in reaching.tolist()])
    missed = sum(row not in one.rows for row, one in zip(rows[reaching].tolist(), found, strict=True))
    assert len(reaching) > 1_000
    rate = stated.missed / stated.drawn
    assert 0.01 < rate < stated.miss_bound < 0.5
    assert missed <= len(reaching) * (stated.miss_bound + 1e-3) + 4 * np.sqrt(len(reaching) * rate)
    assert missed >= len(reaching) * rate - 5 * np.sqrt(len(reaching) * rate)  # nor is it far less


@pytest.mark.slow
def test_more_scanned_columns_miss_fewer_mates(scanning):
    bounds = [
        scanning(scanned=scanned, candidates=5).plan(COLUMNS).scanned.miss_bound
        for scanned in (("face",), ("face", "right_index"))
    ]
    assert bounds[1] < bounds[0]


@pytest.mark.slow
def test_rows_without_a_scanned_column_are_found_by_the_others(scanning, register):
    engine = scanning(scanned=("face", "right_index"))
    row = WHOLE + 7
    probe = {c: bd.Template(c, MODELS[c], unit(1, 50 + i)[0]) for i, c in enumerate(COLUMNS)}
    probe["left_index"] = bd.Template("left_index", "fingers-1", register["left_index"][row])
    (found,) = candidates(engine, [probe])
    assert row in found.rows
    assert "left_index: all of 400 other rows are looked at" in engine.plan(COLUMNS).explain()


@pytest.mark.slow
def test_a_probe_without_a_scanned_column_is_searched_in_all_its_columns(scanning, register):
    engine = scanning(scanned=("face",), candidates=5)
    rows = np.array([3, 1_000, WHOLE + 5])
    templates = [{"left_index": bd.Template("left_index", "fingers-1", register["left_index"][row])} for row in rows]
    assert [found.rows[0] for found in candidates(engine, templates)] == rows.tolist()
    text = engine.plan(("left_index", "right_index")).explain()
    assert "left_index + right_index: the setting scanned names none of them" in text


@pytest.mark.slow
def test_probes_with_and_without_scanned_columns_share_a_search(scanning, register):
    engine = scanning(scanned=("face",))
    whole = {c: bd.Template(c, MODELS[c], register[c][11]) for c in COLUMNS}
    bare = {"right_index": bd.Template("right_index", "fingers-1", register["right_index"][12])}
    assert [found.rows[0] for found in candidates(engine, [whole, bare])] == [11, 12]


@pytest.mark.slow
def test_columns_that_are_not_scanned_are_not_read_through(scanning, register, monkeypatch):
    engine = scanning(scanned=("face", "right_index"))
    name_of = {
        id(column): name
        for part in internals(engine).gallery.snapshot().segments
        for name, column in part.columns.items()
        if part.count == WHOLE or len(part.columns) == 3
    }
    read, scan = set(), SegmentColumn.scanned
    monkeypatch.setattr(
        SegmentColumn, "scanned", lambda self, *span: read.add(name_of.get(id(self), "")) or scan(self, *span)
    )
    probe = {c: bd.Template(c, MODELS[c], register[c][11]) for c in ("face", "right_index")}
    assert candidates(engine, [probe])[0].rows[0] == 11
    assert read == {"face", "right_index"}


@pytest.mark.slow
def test_the_plan_states_the_bytes_that_a_search_goes_through(scanning):
    all_columns, few = scanning().plan(COLUMNS), scanning(scanned=("face",)).plan(COLUMNS)
    by_name = {size.column: size for size in few.sizes}
    row = 128 * 3 // 4 + 4
    assert by_name["face"].scanned == pytest.approx(row * WHOLE / ROWS)
    assert by_name["left_index"].scanned == pytest.approx(row * (ROWS - WHOLE) / ROWS)  # rows without a face
    assert by_name["right_index"].scanned == 0
    assert [size.disk for size in few.sizes] == [size.disk for size in all_columns.sizes]
    assert min(size.disk for size in few.sizes) > row
    assert "that a search reads in memory" in few.explain()


@pytest.mark.slow
def test_a_join_scans_all_columns(scanning, register):
    engine = scanning(scanned=("face",), candidates=3)
    snapshot, searcher = internals(engine).gallery.snapshot(), internals(engine).searcher
    row = WHOLE - 1
    probe = {"face": bd.Template("face", MODELS["face"], unit(1, 90)[0])}
    probe |= {c: bd.Template(c, "fingers-1", register[c][row]) for c in COLUMNS[1:]}
    (found,) = searcher.search(snapshot, [probe], floor_db=50.0)
    assert row in found.comparisons.rows


def test_the_setting_names_columns_once_and_allows_a_miss():
    for wrong, words in (
        ({"scanned": ("toe",)}, "'toe', which is no column"),
        ({"scanned": ("face", "face")}, "each column once"),
        ({"scanned": ("face",), "miss_risk": 0.0}, "allows no miss"),
        ({"scanned": "face"}, "scanned"),
    ):
        with pytest.raises(bd.InvalidInput, match=words):
            bd.SearchConfig(**wrong)
