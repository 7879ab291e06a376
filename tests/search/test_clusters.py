"""Clusters of links, and what is kept of those of crowds."""

from itertools import combinations

import numpy as np
import pyarrow.parquet as pq
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.match.judgement import TRUSTED_KINDS
from biodedup.search import clusters as module
from biodedup.search.clusters import EXTREMES, LINKS_MAX, Links, clusters_of
from biodedup.search.selfjoin import crowds
from biodedup.values import Link
from tests.support.vectors import SFACE, again, people


def random_links(seed, subjects, share=1.0, kinds=("same_person",)):
    rng = np.random.default_rng(seed)
    names = [f"s{i}" for i in range(subjects)]
    return [
        Link((a, b), float(rng.integers(40, 90)), bool(rng.random() < 0.3), (), kinds[rng.integers(len(kinds))])
        for a, b in combinations(names, 2)
        if rng.random() < share
    ]


def groups(links):
    """The obvious way: sets that are joined link by link."""
    sets = {}
    for link in links:
        joined = frozenset().union(*(sets.get(name, frozenset((name,))) for name in link.subject_ids))
        sets |= dict.fromkeys(joined, joined)
    return set(sets.values())


def of(clusters):
    return {frozenset(cluster.subject_ids) for cluster in clusters}


def test_a_small_cluster_keeps_every_link():
    links = random_links(1, 44)
    (cluster,) = clusters_of(links)
    held = Links()
    held.add(links)
    assert len(links) <= LINKS_MAX
    assert held.clusters() == [cluster] and set(cluster.links) == set(links) and cluster.links_left_out == 0


@pytest.mark.slow
def test_a_crowd_keeps_a_number_of_links_that_grows_with_its_subjects():
    for subjects in (60, 120, 240):
        links = random_links(2, subjects)
        held = Links()
        held.add(links)
        (cluster,) = held.clusters()
        assert len(cluster.subject_ids) == subjects
        assert len(cluster.links) + cluster.links_left_out == len(links)
        assert len(cluster.links) <= 2 * (subjects - 1) + 2 * EXTREMES  # a forest for each of two classes
        scores = sorted(link.score_db for link in links)
        assert sorted(link.score_db for link in cluster.links)[:EXTREMES] == scores[:EXTREMES]
        assert sorted(link.score_db for link in cluster.links)[-EXTREMES:] == scores[-EXTREMES:]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_the_kept_links_make_the_same_clusters_at_every_threshold_and_for_every_class(seed):
    kinds = ("same_person", "look_alike", "swapped_fingers")
    links = random_links(seed, 90, 0.4, kinds)
    held = Links()
    held.add(links)
    kept = held.kept()
    assert len(kept) < len(links)
    for threshold_db in range(40, 90, 7):
        for believed in (False, True):
            for measured in (False, True):

                def counts(link, threshold_db=threshold_db, believed=believed, measured=measured):
                    return (
                        link.score_db >= threshold_db
                        and (not believed or link.kind in TRUSTED_KINDS)
                        and not (measured and link.extrapolated)
                    )

                expected = groups(filter(counts, links))
                ours = clusters_of(filter(counts, kept))
                assert of(ours) == expected
    assert [c.weakest_db for c in clusters_of(kept)] == [c.weakest_db for c in clusters_of(links)]


@pytest.mark.slow
def test_links_that_come_in_parts_and_from_both_sides_are_thinned_on_the_way(monkeypatch):
    monkeypatch.setattr(module, "_THINNED_AT", 1_500)
    links = random_links(5, 150)
    held = Links()
    for low in range(0, len(links), 400):
        held.add(links[low : low + 400])
        assert len(held._links) < 2_500
    held.add([Link(link.subject_ids[::-1], link.score_db, link.extrapolated, ()) for link in held.kept()[:50]])
    (cluster,) = held.clusters()
    assert of([cluster]) == groups(links) and cluster.weakest_db == clusters_of(links)[0].weakest_db
    assert cluster.links_left_out >= len(links) - len(cluster.links)


def test_what_a_step_left_out_is_counted_for_the_cluster_of_its_subject():
    held = Links()
    held.add([Link(("a", "b"), 50.0, False, ()), Link(("c", "d"), 60.0, False, ())], {"d": 7})
    held.add([Link(("d", "e"), 50.0, False, ())], {"e": 2})
    assert {c.subject_ids: c.links_left_out for c in held.clusters()} == {("c", "d", "e"): 9, ("a", "b"): 0}


# in a gallery -------------------------------------------------------------------------------------------------------


@pytest.fixture
def crowd(tmp_path, monkeypatch):
    """A crowd of 150 records of one face, two records of another one, and 100 other people."""
    monkeypatch.setattr(crowds, "_THINNED_AT", 2_000)
    one, pair = people(1, seed=3), people(1, seed=4)
    faces = np.vstack([np.repeat(one, 150, 0), pair, again(pair, 0.9), people(100, seed=5)])
    names = [*(f"ghost {i}" for i in range(150)), "twice", "again", *(f"other {i}" for i in range(100))]
    with bd.Engine.open(tmp_path / "g", bd.Config()) as engine:
        engine.add_templates(names, {"face": faces}, model_id=SFACE)
        yield engine


@pytest.mark.slow
def test_a_join_keeps_of_a_crowd_what_holds_it_together_and_says_how_much_it_left_out(crowd, tmp_path):
    large, small = crowd.find_duplicates()
    assert len(large.subject_ids) == 150 and set(small.subject_ids) == {"twice", "again"}
    assert len(large.links) <= 149 + 2 * EXTREMES
    assert len(large.links) + large.links_left_out == 150 * 149 // 2
    assert small.links_left_out == 0 and len(small.links) == 1
    assert large.links[0].evidence
    result = jobs.find_duplicates(crowd, tmp_path / "p.parquet")
    summary = result.summary()
    assert summary["pairs"] == len(large.links) + 1 == pq.read_metadata(tmp_path / "p.parquet").num_rows
    assert summary["pairs_left_out"] == large.links_left_out
    assert of(result.clusters) == of((large, small))


def test_an_audit_of_a_crowd_names_every_listed_subject_of_it(crowd, tmp_path):
    (tmp_path / "roll.csv").write_text("subject_id\n" + "".join(f"ghost {i}\n" for i in range(0, 150, 2)))
    result = jobs.audit(crowd, tmp_path / "roll.csv", tmp_path / "a.csv")
    named = {name for finding in result.findings for name in (finding.subject_id, finding.other_id)}
    assert {f"ghost {i}" for i in range(150)} <= named
    assert len(result.findings) < 1_000 and result.summary()["links_left_out"] > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("listed", [range(1, 150, 2), range(140, 150)], ids=["half", "few"])
def test_an_audit_of_a_crowd_says_which_listed_subjects_are_one_person(crowd, tmp_path, listed):
    # most of the gallery is listed, or little of it: the join goes another way
    names = [f"ghost {i}" for i in listed]
    others = [f"other {i}" for i in range(100)] if len(names) > 50 else []
    (tmp_path / "roll.csv").write_text("subject_id\n" + "".join(f"{name}\n" for name in [*names, *others]))
    findings = jobs.audit(crowd, tmp_path / "roll.csv", tmp_path / "a.csv").findings
    doubles = [f for f in findings if f.finding == "two_ids"]
    assert {name for f in doubles for name in (f.subject_id, f.other_id)} == set(names)
    assert {f.person for f in findings} == {1}


@pytest.mark.slow
def test_an_audit_that_left_links_out_begins_anew_where_the_gallery_changed(crowd, tmp_path, monkeypatch):
    from biodedup.engine import joining

    monkeypatch.setattr(joining, "JOIN_ROWS", 200)  # the whole crowd in one step
    (tmp_path / "roll.csv").write_text("subject_id\n" + "".join(f"ghost {i}\n" for i in range(150)))

    def stop(stage, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.audit(crowd, tmp_path / "roll.csv", tmp_path / "a.csv", progress=stop)
    crowd.remove("ghost 0")  # the one that holds a star together
    result = jobs.audit(crowd, tmp_path / "roll.csv", tmp_path / "a.csv")
    doubles = {name for f in result.findings if f.finding == "two_ids" for name in (f.subject_id, f.other_id)}
    assert doubles == {f"ghost {i}" for i in range(1, 150)}


@pytest.mark.slow
def test_a_merge_of_registers_with_a_crowd_keeps_the_whole_cluster(crowd, tmp_path):
    crowd.close()
    summary = jobs.merge([tmp_path / "g"], tmp_path / "m.parquet").summary
    assert (summary["clusters"], summary["subjects_in_clusters"]) == (2, 152)
    assert summary["pairs_left_out"] == 150 * 149 // 2 + 1 - summary["pairs"] - summary["pairs_for_review"]


def test_a_crowd_of_several_captures_is_thinned_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(crowds, "_THINNED_AT", 1_000)
    face, thumb = people(1, seed=8), people(1, seed=9)
    count = 70
    with bd.Engine.open(tmp_path / "g", bd.Config()) as engine:
        engine.add_templates(
            [f"ghost {i}" for i in range(count)],
            {"face": np.repeat(face, count, 0), "right_thumb": np.repeat(thumb, count, 0)},
            model_id={"face": SFACE, "right_thumb": "thumbs-1"},
        )
        (cluster,) = engine.find_duplicates(threshold_db=40.0)
    assert len(cluster.subject_ids) == count
    assert len(cluster.links) <= 2 * (count - 1) + 2 * EXTREMES and cluster.links_left_out > 0


def test_a_deduplication_counts_a_crowd_of_one_label_as_found():
    from biodedup.jobs.deduplication.folder import DedupResult, Unit

    links = random_links(6, 60)
    held = Links()
    held.add(links)
    names = {name for link in links for name in link.subject_ids}
    units = tuple(Unit(name, "one", ()) for name in sorted(names))
    summary = DedupResult(units, tuple(held.clusters()), {}, 40.0).summary()
    assert summary["pairs_left_out"] > 0
    assert (summary["precision"], summary["recall"], summary["pairs_across_labels"]) == (1.0, 1.0, 0)
