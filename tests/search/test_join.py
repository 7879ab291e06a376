"""Everybody against everybody."""

import json
import shutil
from itertools import combinations

import numpy as np
import pyarrow.parquet as pq
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.engine import joining
from biodedup.search.selfjoin import join as selfjoin
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals
from tests.support.vectors import SFACE

THRESHOLD_DB = 60.0
CONFIG = bd.Config(gallery=bd.GalleryConfig(seal_rows=700, background=False))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder, subject_id -> vector): 2,500 subjects, 40 of them enrolled again at falling cosines, one of these a third time; removed ones
    among them."""
    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((2_500, 128), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    again = mates_of(vectors[:40], np.linspace(0.95, 0.5, 40))
    third = mates_of(again[:1], np.array([0.9]), seed=9)
    everybody = np.concatenate([vectors, again, third])[rng.permutation(2_541)]
    vector_of = {f"s{i}": vector for i, vector in enumerate(everybody)}
    names, folder = list(vector_of), tmp_path_factory.mktemp("join") / "g"
    with bd.Engine.open(folder, CONFIG) as engine:
        for low in range(0, len(names), 400):
            engine.add_templates(names[low : low + 400], {"face": everybody[low : low + 400]})
            engine.maintain()
        for gone in (3, 700, 2_540):
            engine.remove(names[gone])
            del vector_of[names[gone]]
    return folder, vector_of


@pytest.fixture
def gallery(built, tmp_path, monkeypatch):
    """A copy of it, opened."""
    for module in (joining, selfjoin):
        monkeypatch.setattr(module, "JOIN_ROWS", 300)
    folder, vector_of = built
    shutil.copytree(folder, tmp_path / "g")
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        yield engine, vector_of


def oracle(engine, vectors):
    names = list(vectors)
    matrix = np.array(list(vectors.values()))
    near = np.argwhere(np.triu(matrix @ matrix.T, 1) > 0.3)
    templates = [bd.Template("face", SFACE, vector) for vector in matrix]
    found = {}
    for i, j in near:
        (compared,) = internals(engine).comparer.compare({"face": templates[i]}, candidate_of(templates[j]), [0])
        if compared.score_db >= THRESHOLD_DB:
            found[frozenset((names[i], names[j]))] = compared.score_db
    return found


def candidate_of(template):
    from biodedup.match.compare import TemplateCandidates

    return TemplateCandidates({"face": template})


def pairs(clusters):
    return {frozenset(link.subject_ids): link.score_db for cluster in clusters for link in cluster.links}


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True], ids=["with a tail", "sealed"])
def test_a_join_finds_every_pair_above_the_threshold_and_no_other(gallery, sealed):
    engine, vectors = gallery
    if sealed:
        engine.compact()
    assert (internals(engine).gallery.snapshot().parts[-1].count == 0) == sealed
    told = []
    clusters = engine.find_duplicates(threshold_db=THRESHOLD_DB, progress=lambda *done: told.append(done))
    ours, theirs = pairs(clusters), oracle(engine, vectors)
    near = {pair for pair, score in (ours | theirs).items() if abs(score - THRESHOLD_DB) < 1}  # eight bits of rounding
    assert ours.keys() - near == theirs.keys() - near
    assert len(theirs) > 25
    assert told[-1] == (2_538, 2_538) and len(told) == 9


@pytest.mark.slow
def test_an_interrupted_join_goes_on_and_ends_as_if_it_had_not_been(gallery, tmp_path):
    engine, _ = gallery
    whole = jobs.find_duplicates(engine, tmp_path / "whole.parquet", threshold_db=THRESHOLD_DB)
    out = tmp_path / "cut.parquet"

    class Cut(Exception):
        pass

    def after(stop):
        def progress(stage, done, total):
            seen.append(done)
            if len(seen) == stop:
                raise Cut

        return progress

    for stop in (2, 3):
        seen = []
        with pytest.raises(Cut):
            jobs.find_duplicates(engine, out, threshold_db=THRESHOLD_DB, progress=after(stop))
    notes = tmp_path / "cut.parquet.notes"
    assert json.loads(notes.read_text().splitlines()[-1])["done"] == 1500
    notes.write_bytes(notes.read_bytes()[:-20])  # the machine went down in the middle of a line
    seen = []
    resumed = jobs.find_duplicates(engine, out, threshold_db=THRESHOLD_DB, progress=after(99))
    assert seen[0] == 1500
    assert resumed.summary() == whole.summary()
    assert pairs(resumed.clusters) == pairs(whole.clusters)
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "whole.parquet"))
    assert not notes.exists()


@pytest.mark.slow
def test_notes_of_another_version_or_threshold_are_not_gone_on_with(gallery, tmp_path):
    engine, _ = gallery
    out = tmp_path / "out.csv"

    def stop(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.find_duplicates(engine, out, threshold_db=THRESHOLD_DB, progress=stop)
    engine.remove("s10")
    first = []
    jobs.find_duplicates(engine, out, threshold_db=THRESHOLD_DB, progress=lambda stage, done, total: first.append(done))
    assert first[0] == 300
    assert out.read_text().startswith('"cluster","subject_id_a"')


@pytest.mark.slow
def test_a_join_that_goes_on_after_the_journal_was_sealed_misses_no_pair_with_it(gallery, tmp_path):
    engine, _ = gallery
    out = tmp_path / "out.parquet"
    whole = jobs.find_duplicates(engine, tmp_path / "whole.parquet", threshold_db=THRESHOLD_DB)
    assert engine.info()["sealed_rows"] < 2_541

    def stop(stage, done, total):
        if done == 1_200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.find_duplicates(engine, out, threshold_db=THRESHOLD_DB, progress=stop)
    internals(engine).gallery.seal()
    resumed = jobs.find_duplicates(engine, out, threshold_db=THRESHOLD_DB)
    assert pairs(resumed.clusters).keys() == pairs(whole.clusters).keys()


@pytest.mark.slow
def test_a_cluster_states_the_link_that_holds_it_together_worst(gallery, tmp_path):
    engine, _ = gallery
    result = jobs.find_duplicates(engine, tmp_path / "out.parquet", threshold_db=THRESHOLD_DB)
    largest = result.clusters[0]
    assert len(largest.subject_ids) == 3
    strongest = sorted((link.score_db for link in largest.links), reverse=True)
    assert largest.weakest_db == strongest[1]
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert {row["weakest_db"] for row in table if row["cluster"] == 1} == {largest.weakest_db}
    assert all(len(set(pair)) == 2 for pair in combinations(largest.subject_ids, 2))
