"""Every index engine and every search path finds what a plain numpy search of the same rows finds, ties aside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup.config import SearchConfig
from biodedup.gallery.segments import indexing
from biodedup.gallery.snapshot import Snapshot
from biodedup.match.compare import Comparer
from biodedup.search.multicolumn import plan as multicolumn_plan
from biodedup.search.searcher import Searcher
from biodedup.search.shards import cells, native
from biodedup.search.shards import faiss as faiss_engine
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals
from tests.support.laws import FACE, FINGER
from tests.support.reference import Reference, check_top_k, top_k
from tests.support.vectors import SFACE, people

COLUMNS = ("face", "left_index", "right_index")
LAWS = {"face": FACE, "left_index": FINGER, "right_index": FINGER}
ROWS = 6_000
GROUPS = [("north",), ("south",), ("north", "south"), ()]
POLICY = bd.Policy(duplicate_db=110, review_db=106)


@dataclass(frozen=True)
class IndexEngine:
    """How a column is searched. exact_cells: a codec's rows up to so many are compared exactly; index: as of `GalleryConfig.index`."""

    miss_risk: float
    exact_cells: int
    index: str = "native"

    @property
    def scans(self) -> bool:
        return self.exact_cells < ROWS


INDEX_ENGINES = {
    "exact": IndexEngine(1e-3, ROWS * 2),
    "scan": IndexEngine(1e-3, 1_000),
    "scan-without-risk": IndexEngine(0.0, 1_000),
    "faiss": IndexEngine(1e-3, 1_000, "faiss:IVF8,PQ64x4fs"),
}
"""A new engine is a line here."""


@dataclass(frozen=True)
class Built:
    engine: bd.Engine
    reference: Reference
    vectors: dict[str, np.ndarray]

    @property
    def snapshot(self) -> Snapshot:
        return internals(self.engine).gallery.snapshot()

    @property
    def comparer(self) -> Comparer:
        return internals(self.engine).comparer


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Iterator[Built]:
    """Coded segments with rows of three kinds of columns, a tail that is not sealed, removed rows, and open cases in both."""
    vectors = {column: people(ROWS, seed) for seed, column in enumerate(COLUMNS)}
    vectors["face"][11] = vectors["face"][10]  # a tie
    reference = Reference()
    config = bd.Config(gallery=bd.GalleryConfig(background=False), policy=bd.Policy(duplicate_db=180, review_db=30))
    folder = tmp_path_factory.mktemp("agreement") / "g"
    with pytest.MonkeyPatch.context() as patched, bd.Engine.open(folder, config) as engine:
        comparer = internals(engine).comparer
        patched.setattr(comparer, "_calibration_of", lambda model_id, *_: FACE if model_id == SFACE else FINGER)

        def add(low: int, high: int, columns: tuple[str, ...]) -> None:
            names, groups = [f"s{row}" for row in range(low, high)], [GROUPS[row % 4] for row in range(low, high)]
            engine.add_templates(names, {c: vectors[c][low:high] for c in columns}, groups=groups)
            for row, name in zip(range(low, high), names, strict=True):
                reference.add(name, {c: vectors[c][row] for c in columns}, GROUPS[row % 4])

        def open_case(number: int) -> None:
            row = len(reference.rows)
            own = {
                c: mates_of(vectors[c][number : number + 1], np.array([cos]), seed=900 + number)[0] for c, cos in near
            }
            encounter = bd.Encounter(f"case{number}", (), own, f"e{number}", GROUPS[number % 4])
            assert engine.enroll(encounter).outcome == "review"
            assert engine.case(f"e{number}").row == row
            reference.add(f"case{number}", own, GROUPS[number % 4], pending=True)

        near = (("face", 0.5), ("left_index", 0.4), ("right_index", 0.3))
        add(0, 3_900, COLUMNS)
        for number in range(5):
            open_case(number)
        add(3_905, 4_900, ("face", "right_index"))
        add(4_900, 5_900, ("face",))
        for number in range(0, 5_000, 97):
            if number not in range(3_900, 3_905):
                engine.remove(f"s{number}")
                reference.remove(f"s{number}")
        assert engine.problems() == []
        # sealed rows are coded; merging alone would also drop the removed ones
        internals(engine).gallery.seal()
        add(5_900, 5_990, COLUMNS)
        for number in range(5, 8):
            open_case(number)
        engine.remove("s5950")
        reference.remove("s5950")
        snapshot = internals(engine).gallery.snapshot()
        assert len(snapshot.tombstones) and snapshot.parts[-1].count and len(snapshot.pending) == 8
        reference.stored(snapshot.embeddings)
        yield Built(engine, reference, vectors)


@pytest.fixture(params=INDEX_ENGINES, scope="module")
def searcher(request, built) -> Iterator[Searcher]:
    index = INDEX_ENGINES[request.param]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cells, "EXACT_CELLS", index.exact_cells)
        patched.setattr(indexing, "CELLS_MIN", 1_000)
        if index.scans:
            for engine in (native, faiss_engine):
                patched.setattr(engine, "_SHARE_MAX", 1.0)  # of so few rows most pass
        built.engine.reindex(index.index)
        indexed = [part.columns["face"].index for part in built.snapshot.segments]
        assert any(indexed) == (index.index != "native")
        searcher = Searcher(built.comparer, SearchConfig(miss_risk=index.miss_risk), 2, lambda: POLICY)
        yield searcher
        searcher.close()


def probes_of(built: Built, count: int, cosine: float = 0.6) -> np.ndarray:
    """Mates of rows, and as many strangers."""
    rows = np.linspace(5, len(built.vectors["face"]) - 20, count).astype(int)
    mates = mates_of(built.vectors["face"][rows], np.full(count, cosine), seed=700)
    return np.concatenate([mates, people(count, seed=50)])


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 32], ids=["two-probes", "a-batch"])
@pytest.mark.parametrize("groups", [None, ("north",), ("south", "nowhere"), ("nowhere",)], ids=str)
@pytest.mark.parametrize("from_row", [0, 3_000])
def test_the_rows_nearest_in_one_column_are_those_of_the_reference(built, searcher, request, count, groups, from_row):
    index = INDEX_ENGINES[request.node.callspec.params["searcher"]]
    probes = probes_of(built, count)
    found = searcher.nearest(built.snapshot, "face", probes, 5, groups=groups, from_row=from_row)
    seen = built.reference.in_scope(groups=groups, from_row=from_row)
    exact = built.reference.similarities("face", probes, seen)
    # of 320 places at a risk of 1e-3 three or more are lost in one run of 200
    check_top_k(found.rows, found.similarity, exact, misses=2 if index.scans and index.miss_risk else 0)
    if groups != ("nowhere",):
        assert (found.compared > 0) == index.scans  # by which path it was found


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, ("north",)], ids=str)
@pytest.mark.parametrize("k", [5, 400])
def test_of_the_nearest_rows_only_those_that_reach_a_similarity_are_found(built, searcher, request, groups, k):
    index = INDEX_ENGINES[request.node.callspec.params["searcher"]]
    probes = probes_of(built, 32)
    least = np.tile(np.array([0.1, 0.25, 0.55, 2.0], np.float32), 16)
    found = searcher.nearest(built.snapshot, "face", probes, k, groups=groups, floor_similarity=least)
    exact = built.reference.similarities("face", probes, built.reference.in_scope(groups=groups))
    rows, _ = top_k(np.where(exact >= least[:, None], exact, np.nan), k)
    wanted = {(probe, row) for probe, of_probe in enumerate(rows.tolist()) for row in of_probe if row >= 0}
    which, at = np.nonzero(found.rows >= 0)
    assert (found.similarity[which, at] >= least[which]).all()
    assert np.allclose(found.similarity[which, at], exact[which, found.rows[which, at]], rtol=0, atol=2e-5)
    lost = len(wanted - set(zip(which.tolist(), found.rows[which, at].tolist(), strict=True)))
    assert lost <= (0.003 * len(wanted) if index.scans and index.miss_risk else 0)  # of a risk of 0.001 each


@pytest.mark.slow
def test_a_decision_on_a_face_alone_names_the_rows_that_reach_the_review_threshold_and_no_others(built, searcher):
    """The exhaustive list of candidates says which these are."""
    model, probes = built.snapshot.models["face"].model_id, probes_of(built, 32)
    sent = [{"face": bd.Template("face", model, probe)} for probe in probes]
    _, review_db = searcher.thresholds_db(sent[0], built.snapshot, across=False)
    exact = FACE.score_db(built.reference.similarities("face", probes, built.reference.in_scope()))
    named = [one.comparisons for one in searcher.search(built.snapshot, sent)]
    for scores_db, compared in zip(exact, named, strict=True):
        (reaching,) = np.nonzero(scores_db >= review_db)
        assert set(reaching) <= set(compared.rows)
        assert (compared.score_db >= review_db - 1).all(), "a row far below the threshold was compared"
    assert sum(len(compared.rows) > 0 for compared in named) >= 24


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, ("south",)], ids=str)
@pytest.mark.parametrize("together_from", [2_000, ROWS * 2], ids=["segments-and-journal", "journal-alone"])
def test_the_strongest_by_the_evidence_of_several_columns_are_those_of_the_reference(
    built, searcher, monkeypatch, request, groups, together_from
):
    monkeypatch.setattr(multicolumn_plan, "ROWS_MIN", together_from)
    index = INDEX_ENGINES[request.node.callspec.params["searcher"]]
    query = searcher.multicolumn_query(built.snapshot, COLUMNS)
    assert (query is not None) == (index.miss_risk > 0 and index.index == "native")
    assert query is None or bool(query.plans) == (together_from < ROWS), (
        "sealed rows are searched together from so many on"
    )
    rows = np.arange(1, 3_800, 47)
    cosines = {"face": 0.55, "left_index": 0.45, "right_index": 0.5}
    probes = {
        c: mates_of(built.vectors[c][rows], np.full(len(rows), cosines[c]), seed=800 + i) for i, c in enumerate(COLUMNS)
    }
    models = built.snapshot.models
    sent = [
        {c: bd.Template(c, models[c].model_id, vectors[i]) for c, vectors in probes.items()} for i in range(len(rows))
    ]
    found = searcher.search(built.snapshot, sent, groups=groups)
    seen = built.reference.in_scope(groups=groups)
    exact = built.reference.evidence(probes, {c: law.llr_db for c, law in LAWS.items()}, seen)
    best, best_db = top_k(exact, 1)
    lost = 0
    for i, one in enumerate(found):
        mine, told = one.comparisons.rows, one.comparisons.llr_db
        assert np.allclose(told, exact[i, mine], atol=0.05), "a row's evidence is not the reference's"  # NaN: not seen
        assert not one.incomplete
        if best_db[i, 0] > 40:  # further down, candidates of a single column are not all that matter
            lost += mine[0] != best[i, 0]
    assert (best_db > 40).sum() > 30
    assert lost <= (1 if index.miss_risk else 0)


@pytest.mark.slow
def test_an_engine_names_the_subjects_that_the_reference_names_without_open_cases(built):
    probes = np.concatenate([built.vectors["face"][[10, 0, 97]], probes_of(built, 4)])
    for groups in (None, ["north"], ["nowhere"]):
        found = built.engine.search({"face": probes}, k=7, groups=groups)
        exact = built.reference.similarities("face", probes, built.reference.in_scope(groups=groups, pending=False))
        number = {row.subject_id: i for i, row in enumerate(built.reference.rows)} | {"": -1}
        check_top_k(np.vectorize(number.get)(found.ids), found.similarity, exact)


# wide inputs ---------------------------------------------------------------------------------------------------------


@st.composite
def galleries(draw) -> tuple[list[tuple[int, int]], list[int], list[int], int]:
    """Rows as (which of a few vectors, which groups), which of them are removed, before which it is sealed, and k."""
    rows = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=24))
    numbers = st.lists(st.integers(0, max(len(rows) - 1, 0)), unique=True, max_size=len(rows))
    return rows, draw(numbers), draw(numbers), draw(st.integers(1, 30))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(galleries(), st.sampled_from([2, 16, 70]), st.sampled_from([None, ("north",), ("south", "north"), ("nowhere",)]))
def test_small_galleries_full_of_ties_agree_with_the_reference(tmp_path_factory, gallery, dimension, groups):
    rows, removed, sealed, k = gallery
    vectors = people(6, seed=dimension, dimension=dimension)
    reference, config = Reference(), bd.Config(gallery=bd.GalleryConfig(seal_rows=1 << 10, background=False))
    with bd.Engine.open(tmp_path_factory.mktemp("g") / "g", config) as engine:
        for number, (which, group) in enumerate(rows):
            if number in sealed:
                internals(engine).gallery.seal()
            engine.add_templates([f"s{number}"], {"face": vectors[[which]]}, groups=[GROUPS[group]])
            reference.add(f"s{number}", {"face": vectors[which]}, GROUPS[group])
        for number in removed:
            engine.remove(f"s{number}")
            reference.remove(f"s{number}")
        reference.stored(internals(engine).gallery.snapshot().embeddings)
        if not rows:
            return
        found = engine.search({"face": vectors}, k=k, groups=groups)
        exact = reference.similarities("face", vectors, reference.in_scope(groups=groups))
        number_of = {f"s{i}": i for i in range(len(rows))} | {"": -1}
        check_top_k(np.vectorize(number_of.get, otypes=[int])(found.ids), found.similarity, exact)


# the comparison can fail ---------------------------------------------------------------------------------------------

EXACT = np.array([[0.9, 0.5, 0.5, 0.1, np.nan]])


def checked(rows: list[int], values: list[float], **more: object) -> None:
    check_top_k(np.array([rows]), np.array([values], np.float32), EXACT, **more)


def test_the_comparison_takes_either_of_two_that_tie():
    checked([0, 1], [0.9, 0.5])
    checked([0, 2], [0.9, 0.5])
    checked([0, 2, 1, 3, -1], [0.9, 0.5, 0.5, 0.1, -np.inf])


@pytest.mark.parametrize(
    "rows, values, told",
    [
        ([0, 3], [0.9, 0.1], "1 of the best are not found"),
        ([1, 2], [0.5, 0.5], "1 of the best are not found"),
        ([1, 0], [0.5, 0.9], "not in descending order"),
        ([0, 0], [0.9, 0.9], "found twice"),
        ([0, 4], [0.9, 0.5], "does not count"),
        ([0, 1], [0.9, 0.51], "is not the row's"),
        ([0, -1], [0.9, -np.inf], "1 rows are found of 2"),
        ([-1, 0], [-np.inf, 0.9], "pads come last"),
        ([0, 1, 2, 3, -1], [0.9, 0.5, 0.5, 0.1, 0.0], "pads come last"),
    ],
)
def test_the_comparison_fails(rows, values, told):
    with pytest.raises(AssertionError, match=told):
        checked(rows, values)


def test_the_comparison_lets_through_as_many_misses_as_asked():
    checked([0, 3], [0.9, 0.1], misses=1)
    with pytest.raises(AssertionError, match="2 of the best"):
        check_top_k(np.array([[3, 0]]), np.array([[0.1, 0.0]]), np.array([[0.0, 0.5, 0.6, 0.1]]), misses=1)


def test_a_reference_counts_what_is_seen_alone():
    reference = Reference()
    one = np.eye(2, dtype=np.float32)
    reference.add("a", {"face": one[0]}, ["north"])
    reference.add("b", {"face": one[0], "left_index": one[1]}, pending=True)
    reference.add("c", {"left_index": one[1]}, ["south"])
    reference.remove("c")
    assert reference.in_scope().tolist() == [True, True, False]
    assert reference.in_scope(pending=False).tolist() == [True, False, False]
    assert reference.in_scope(groups=["north", "south"]).tolist() == [True, False, False]
    assert reference.in_scope(from_row=1).tolist() == [False, True, False]
    found = reference.similarities("face", one, reference.in_scope())
    np.testing.assert_array_equal(found, [[1, 1, np.nan], [0, 0, np.nan]])
    sums = reference.evidence(
        {"face": one[:1], "left_index": one[1:]}, {c: lambda s: 10 * s for c in COLUMNS}, reference.in_scope()
    )
    np.testing.assert_array_equal(sums, [[10, 20, np.nan]])
    assert [rows.tolist() for rows in top_k(sums, 3)[0]] == [[1, 0, -1]]
    with pytest.raises(AssertionError, match="another vector is stored"):
        reference.stored(lambda rows, column: np.roll(one, 1, axis=0)[[0] * len(rows)])
    assert replace(reference.rows[0]).vectors["face"].tolist() == [1, 0]
