"""Registers of several districts brought together, and taken apart again."""

from __future__ import annotations

import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.capture.minutiae.record import MinutiaeRecord, write_record
from biodedup.config import EXTERNAL_MINUTIAE
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.gallery import Gallery
from biodedup.jobs.merging.model import Member
from biodedup.jobs.merging.survivors import absorbed, survivor
from tests.support.faults import Countdown, FailingStorage
from tests.support.shell import run_here as run
from tests.support.vectors import again, people

pytestmark = pytest.mark.slow

CONFIG = bd.Config(gallery=bd.GalleryConfig(seal_rows=64, merge_fan=2, background=False))
FILES = ("m.parquet", "m.pairs.parquet", "m.collisions.parquet", "m.summary.json", "m.html")
MIN_DB = 70.0
NAMES = ("agam", "bantul", "cimahi")


def register(folder: Path, vectors, names, *, compact=True, groups=None) -> Path:
    with bd.Engine.open(folder, CONFIG) as engine:
        for low in range(0, len(names), 65):
            some = slice(low, low + 65)
            engine.add_templates(
                names[some], {"face": vectors[some]}, groups=groups[some] if groups else [["roll"]] * len(names[some])
            )
            engine.maintain()
        if compact:
            engine.compact()
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Three districts of 150; six of the first are in the second again, one of them in the third, too; and `s7` is one person in
    the first two, `x9` two persons."""
    folder = tmp_path_factory.mktemp("districts")
    a, b, c = (people(150, seed) for seed in (1, 2, 3))
    b[:5], c[0] = again(a[:5], 0.9), again(a[:1], 0.9, seed=9)[0]
    b[7], b[149] = again(a[7:8], 0.9)[0], again(a[149:], 0.9)[0]
    names = [[f"{letter}{i}" for i in range(150)] for letter in "abc"]
    names[0][7] = names[1][7] = "s7"
    names[0][9] = names[1][9] = "x9"
    for name, vectors, ids in zip(NAMES, (a, b, c), names, strict=True):
        register(folder / name, vectors, ids, compact=name != "bantul")
    return folder


@pytest.fixture
def districts(built, tmp_path):
    return [Path(shutil.copytree(built / name, tmp_path / name)) for name in NAMES]


def contents(folder: Path) -> dict[str, tuple]:
    """subject_id -> (groups, column -> (model_id, vector, minutiae, quality)) of everybody."""
    gallery = opened(folder)
    try:
        now = gallery.snapshot()
        rows = now.live_rows().tolist()
        found = {}
        for name, row, groups in zip(now.subject_ids(rows), rows, now.groups(rows), strict=True):
            templates = {
                column: (one.model_id, one.embedding, one.minutiae, one.quality)
                for column, one in now.templates(row).items()
            }
            found[name] = (groups, templates)
        return found
    finally:
        gallery.close()


def opened(folder: Path) -> Gallery:
    return Gallery.open(
        folder, storage=LocalStorage(), config=CONFIG.gallery, settings={}, gallery_id="", read_only=True
    )


def assert_same(one: dict, other: dict, atol: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, (groups, templates) in one.items():
        assert groups == other[name][0]
        assert templates.keys() == other[name][1].keys()
        for column, (model_id, vector, *rest) in templates.items():
            theirs = other[name][1][column]
            assert (model_id, *rest) == (theirs[0], *theirs[2:])
            assert vector is None or np.allclose(vector, theirs[1], atol=atol)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def merged(districts, out, **more):
    return jobs.merge(districts, out, config=CONFIG, min_db=more.pop("min_db", MIN_DB), **more)


def test_who_is_in_several_districts_is_one_cluster_with_provenance(districts, tmp_path):
    result = merged(districts, tmp_path / "m.parquet")
    rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
    clusters = {}
    for row in rows:
        clusters.setdefault(row["cluster"], []).append(row)
    found = {frozenset((row["district"], row["original_id"]) for row in some) for some in clusters.values()}
    wanted = {frozenset({("agam", f"a{i}"), ("bantul", f"b{i}")}) for i in (1, 2, 3, 4, 149)}
    wanted |= {
        frozenset({("agam", "a0"), ("bantul", "b0"), ("cimahi", "c0")}),
        frozenset({("agam", "s7"), ("bantul", "s7")}),
    }
    assert found == wanted
    assert all(sum(row["survivor"] for row in some) == 1 for some in clusters.values())
    assert [row["captures"] for row in rows] == [1] * 15
    pairs = pq.read_table(tmp_path / "m.pairs.parquet").to_pylist()
    assert {row["district_a"] for row in pairs} | {row["district_b"] for row in pairs} == {"agam", "bantul", "cimahi"}
    assert all(part["similarity"] > 0.7 for row in pairs if row["strength"] == "duplicate" for part in row["evidence"])
    assert result.summary["clusters_of_more_than_two"] == 1
    page = (tmp_path / "m.html").read_text()
    assert "Clusters of more than two records" in page and "agam/s7" in page and "<script" not in page


def test_an_id_of_two_districts_is_distinguished_by_its_district(districts, tmp_path):
    merged(districts, tmp_path / "m.parquet")
    rows = pq.read_table(tmp_path / "m.collisions.parquet").to_pylist()
    told = {(row["original_id"], row["district"]): (row["subject_id"], row["verdict"]) for row in rows}
    assert told == {
        ("s7", "agam"): ("agam/s7", None),
        ("s7", "bantul"): ("bantul/s7", "same_person"),
        ("x9", "agam"): ("agam/x9", None),
        ("x9", "bantul"): ("bantul/x9", "another_person"),
    }


def test_codes_are_copied_as_codes(districts, tmp_path):
    """Only the unsealed tail of `bantul` is rounded to eight bits on the way."""
    merged(districts, tmp_path / "m.parquet")
    staged = contents(tmp_path / "m.parquet.work" / "gallery")
    source = contents(districts[0])
    for name in ("a1", "a140"):
        assert np.array_equal(staged[name][1]["face"][1], source[name][1]["face"][1])
        assert staged[name][0] == {"roll", "district:agam"}
    assert not inspect(LocalStorage(), tmp_path / "m.parquet.work" / "gallery")


class Killed(Exception):
    pass


def killed_at(call: int):
    left = [call]

    def progress(stage, done, total):
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return progress


def test_a_merge_killed_anywhere_gives_the_same_bytes(districts, tmp_path):
    merged(districts, tmp_path / "m.parquet")
    whole = bytes_of(tmp_path)
    rng = random.Random(4)
    for number in range(3):
        folder = tmp_path / str(number)
        kills = 0
        while True:
            try:
                merged(districts, folder / "m.parquet", progress=killed_at(rng.randint(1, 3)))
                break
            except Killed:
                kills += 1
                assert not (folder / "m.parquet").exists()
        assert kills
        assert bytes_of(folder) == whole


def test_applied_and_undone_a_central_gallery_is_what_it_was(districts, tmp_path):
    first, *others = districts
    before = contents(first)
    out = tmp_path / "m.parquet"
    result = merged(others, out, into=first, prefer=["bantul"], apply=True)
    applied = result.applied
    assert (applied.added, applied.removed, applied.left_out) == (299, 7, 1)
    after = contents(first)
    assert len(after) == applied.subjects == 150 + 299 - 7
    assert "b1" in after and "a1" not in after and "bantul/s7" in after and "s7" not in after and "c0" not in after
    assert after["x9"][0] == {"roll"} and after["bantul/x9"][0] == {"roll", "district:bantul"}
    assert merged(others, out, into=first, prefer=["bantul"], apply=True) == result
    undone = jobs.undo(result.merge_id, first, CONFIG)
    assert (undone.restored, undone.withdrawn, undone.kept_changed) == (7, 299, ())
    assert_same(before, contents(first))
    assert jobs.undo(result.merge_id, first, CONFIG) == undone
    assert not inspect(LocalStorage(), first)


def test_apply_and_undo_killed_anywhere_go_on(districts, tmp_path):
    first, *others = districts
    before = contents(first)
    out = tmp_path / "m.parquet"
    merged(others, out, into=first, prefer=["bantul"])
    result, kills = until_it_lives(
        lambda storage: merged(others, out, into=first, prefer=["bantul"], apply=True, storage=storage)
    )
    assert kills > 4  # a fault while the journal is wiped is put off, and ends nothing
    assert len(contents(first)) == 442
    undone, kills = until_it_lives(lambda storage: jobs.undo(result.merge_id, first, CONFIG, storage=storage))
    assert kills > 4
    assert (undone.restored, undone.withdrawn) == (7, 299)
    assert_same(before, contents(first))
    assert not inspect(LocalStorage(), first)


def until_it_lives(work, step=7):
    """The result, and how often the disk failed before: at its 5th call, the 12th of the next run, ..."""
    for kills in range(200):
        try:
            return work(FailingStorage(Countdown(5 + step * kills))), kills
        except bd.StorageUnavailable:
            pass
    raise AssertionError("it never came through")


def test_a_staging_copy_on_a_failing_disk_goes_on(districts, tmp_path):
    merged(districts, tmp_path / "m.parquet")
    _, kills = until_it_lives(lambda storage: merged(districts, tmp_path / "k" / "m.parquet", storage=storage), 23)
    assert kills > 4
    assert bytes_of(tmp_path / "k") == bytes_of(tmp_path)


def test_a_central_gallery_that_changed_meanwhile_is_compared_again_first(districts, tmp_path):
    first, *others = districts

    def enrol_one_more(stage, done, total):
        if stage == "comparing":
            with bd.Engine.open(first, CONFIG) as engine:
                engine.add_templates(["late"], {"face": people(1, 77)})

    with pytest.raises(bd.InvalidInput, match="has changed since"):
        merged(others, tmp_path / "m.parquet", into=first, apply=True, progress=enrol_one_more)
    assert len(contents(first)) == 151
    assert merged(others, tmp_path / "m.parquet", into=first, apply=True).applied.subjects == 151 + 300 - 8


def test_a_merge_that_was_interrupted_is_finished_or_taken_back_before_another(districts, tmp_path):
    first, *others = districts

    def kill(stage, done, total):
        if stage == "applying" and done:
            raise Killed

    with pytest.raises(Killed):
        merged(others, tmp_path / "m.parquet", into=first, apply=True, progress=kill)
    with pytest.raises(bd.InvalidInput, match="was interrupted") as told:
        merged(others[:1], tmp_path / "n.parquet", into=first)
    merge_id = str(told.value).split("merge ")[1].split()[0]
    assert jobs.undo(merge_id, first, CONFIG).subjects == 150
    merged(others[:1], tmp_path / "n.parquet", into=first)


def test_what_is_only_extrapolated_is_left_to_a_person(districts, tmp_path):
    result = jobs.merge(districts, tmp_path / "m.parquet", into=tmp_path / "central", apply=True, config=CONFIG)
    assert result.summary["clusters"] == result.summary["clusters_to_adjudicate"] == 7
    assert result.applied.subjects == 450 and result.applied.left_out == 0
    assert set(pq.read_table(tmp_path / "m.parquet")["decision"].to_pylist()) == {"adjudicate"}


def test_a_new_central_gallery_is_empty_after_undo_and_can_be_filled_again(districts, tmp_path):
    central, out = tmp_path / "central", tmp_path / "m.parquet"
    one = merged(districts, out, into=central, apply=True)
    assert one.applied.subjects == 450 - 8
    assert jobs.undo(one.merge_id, central, CONFIG).subjects == 0
    two = merged(districts, out, into=central, apply=True)
    assert two.applied.subjects == 442 and two.merge_id != one.merge_id
    assert two.summary == one.summary


def test_what_cannot_be_merged_is_said_before_anything_is_copied(districts, tmp_path):
    register(tmp_path / "other", people(20, dimension=64), [f"o{i}" for i in range(20)])
    shutil.copytree(districts[0], tmp_path / "copy")
    out = tmp_path / "m.parquet"
    for sources, error, text in (
        ([*districts, tmp_path / "other"], bd.ModelMismatch, "district 'other'"),
        ([*districts, tmp_path / "copy"], bd.InvalidInput, "same gallery"),
        ([districts[0], f"agam={districts[1]}"], bd.InvalidInput, "same name"),
        ([f"a/b={districts[1]}"], bd.InvalidInput, "slash"),
        ([], bd.InvalidInput, "no gallery"),
        ([tmp_path / "absent"], bd.NotAGallery, "no gallery"),
    ):
        with pytest.raises(error, match=text):
            merged(sources, out)
    for more, text in (
        ({"rule": "loudest"}, "most_captures"),
        ({"prefer": ["nowhere"]}, "agam"),
        ({"rule": "district"}, "--prefer"),
        ({"apply": True}, "--into"),
    ):
        with pytest.raises(bd.InvalidInput, match=text):
            merged(districts, out, **more)
    with pytest.raises(bd.InvalidInput, match=r"m\.csv"):
        merged(districts, tmp_path / "m.csv")
    with pytest.raises(bd.InvalidInput, match="known merges: none"):
        jobs.undo("nothing", districts[0], CONFIG)
    assert not (tmp_path / "m.parquet.work" / "gallery").exists()


def test_a_prefixed_id_that_is_taken_is_refused(tmp_path):
    register(tmp_path / "a", people(3, 1), ["5", "a/5", "6"])
    register(tmp_path / "b", people(2, 2), ["5", "7"])
    with pytest.raises(bd.InvalidInput, match="another name"):
        merged([tmp_path / "a", tmp_path / "b"], tmp_path / "m.parquet")
    register(tmp_path / "c", people(2, 3), ["b/5", "8"])
    with pytest.raises(bd.SubjectExists, match="b/5"):
        merged([f"x={tmp_path / 'a'}", tmp_path / "b", tmp_path / "c"], tmp_path / "n.parquet")


def member(subject_id, district="a", **facts):
    return Member(subject_id, district, subject_id, **({"captures": 1, "order": 0} | facts))


@pytest.mark.parametrize(
    ("rule", "prefer", "stays"),
    [
        ("most_captures", [], "two"),
        ("most_captures", ["b"], "three"),
        ("newest", [], "one"),
        ("oldest", [], "three"),
        ("best_quality", [], "four"),
        ("district", ["c"], "four"),
    ],
)
def test_a_rule_chooses_who_stays_and_ties_go_by_district_and_id(rule, prefer, stays):
    members = [
        member("one", captures=1, enrolled_at=30.0),
        member("two", captures=5, quality=0.3),
        member("three", "b", captures=5, enrolled_at=10.0),
        member("four", "c", captures=2, quality=0.9),
    ]
    if (rule, prefer) == ("most_captures", []):
        members[2] = replace(members[2], subject_id="two-and-a-half")
    for order in (members, members[::-1]):
        assert survivor(order, rule, prefer).subject_id == stays
    tied = [member("b"), member("c", central=True), member("a")]
    assert survivor(tied, "newest").subject_id == "c"


def strewn(seed: int) -> bytes:
    """A record of 40 minutiae of nobody."""
    rng = np.random.default_rng(seed)
    rows = zip(*(rng.integers(0, high, 40).tolist() for high in (400, 400, 256, 101)), strict=True)
    minutiae = b"".join(struct.pack(">HHBB", 1 << 14 | x, y, angle, quality) for x, y, angle, quality in rows)
    return write_record(MinutiaeRecord(400, 400, minutiae), 1, 60)


def test_every_template_with_its_quality_and_time_comes_along(tmp_path):
    """Faces, finger embeddings and minutiae, enrolled by encounters; the one enrolled last stays."""
    faces, fingers = people(12, 5), people(12, 6)

    def fill(folder, which, now, shift):
        with bd.Engine.open(folder, CONFIG, clock=lambda: now) as engine:
            for i in which:
                templates = {
                    "face": again(faces[i : i + 1], 0.8, seed=100 * shift + i)[0],
                    "left_ring": bd.Template("left_ring", "external-128", fingers[i], quality=0.4 + i / 100),
                }
                if i % 7 == 0:
                    templates["right_thumb"] = strewn(i)
                engine.import_captures(
                    [bd.Encounter(f"{folder.name}{i}", templates=templates, encounter_id=f"e{i}", groups=["g"])]
                )

    fill(tmp_path / "a", range(8), 1000.0, 1)
    fill(tmp_path / "b", range(7, 12), 2000.0, 2)
    result = merged(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "m.parquet", rule="newest", into=tmp_path / "c", apply=True
    )
    rows = pq.read_table(tmp_path / "m.parquet").to_pylist()
    assert [(row["subject_id"], row["survivor"], row["enrolled_at"], row["captures"]) for row in rows] == [
        ("a7", False, 1000.0, 3),
        ("b7", True, 2000.0, 3),
    ]
    assert {row["quality"] for row in rows} == {0.47}
    assert {row["label"] for row in rows} == {"duplicate"}
    (pair,) = pq.read_table(tmp_path / "m.pairs.parquet").to_pylist()
    assert {part["column_a"] for part in pair["evidence"]} == {"face", "left_ring", "right_thumb"}
    source = {**contents(tmp_path / "a"), **contents(tmp_path / "b")}
    source.pop("a7")
    source["b7"] = (source["b7"][0] | {"district:a"}, source["b7"][1])  # it stands for a7
    wanted = {name: (groups | {f"district:{name[0]}"}, parts) for name, (groups, parts) in source.items()}
    assert_same(
        wanted, contents(tmp_path / "c"), atol=0.01
    )  # vectors of a journal are rounded to eight bits on the way
    undone = jobs.undo(result.merge_id, tmp_path / "c", CONFIG)
    assert (undone.subjects, undone.withdrawn) == (0, 12)


# what a survivor gets ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """A central gallery with c0 (face), c1 (face, enrolled last of all) and c9; a0 and b0 of two districts are c0, with fingers; a1 is
    c1; a2 and b2 are one person, whose record is newer in b; b7 is nobody else."""
    folder = tmp_path_factory.mktemp("visited")
    faces = people(10, 15)

    def fill(name: str, subjects: dict[str, tuple[int, dict[str, object]]], now: float) -> None:
        with bd.Engine.open(folder / name, CONFIG, clock=lambda: now) as engine:
            for i, (subject_id, (who, more)) in enumerate(subjects.items()):
                face = bd.Template("face", "external-128", again(faces[who : who + 1], 0.9, seed=int(now) + i)[0])
                encounter = bd.Encounter(subject_id, (), {"face": face} | more, f"e-{subject_id}", [f"office-{name}"])
                engine.import_captures([encounter])
            engine.compact()

    def ring(who: int, quality: float) -> bd.Template:
        return bd.Template("left_ring", EXTERNAL_MINUTIAE, None, strewn(who), quality)

    fill("central", {"c0": (0, {}), "c1": (1, {"left_ring": ring(1, 0.2)}), "c9": (9, {})}, 3000.0)
    fill("a", {"a0": (0, {"left_ring": ring(0, 0.4)}), "a1": (1, {"left_ring": ring(1, 0.9)}), "a2": (2, {})}, 1000.0)  # fmt: skip
    fill(
        "b",
        {
            "b0": (0, {"left_ring": ring(0, 0.7), "right_thumb": strewn(1)}),
            "b2": (2, {"right_thumb": strewn(2)}),
            "b7": (7, {}),
        },
        2000.0,
    )
    return folder


@pytest.fixture
def visits(visited, tmp_path):
    for name in ("central", "a", "b"):
        shutil.copytree(visited / name, tmp_path / name)
    return tmp_path


def brought(visits: Path, *names: str, out: str = "m.parquet", **more):
    return merged([visits / n for n in names], visits / out, into=visits / "central", apply=True, rule="newest", **more)


def test_a_survivor_keeps_its_templates_and_gets_those_it_lacks_and_the_groups_of_the_others(visits):
    before = {name: contents(visits / name) for name in ("central", "a", "b")}
    result = brought(visits, "a", "b")
    assert (result.applied.completed, result.summary["templates_to_survivors"]) == (3, 2)
    after = contents(visits / "central")
    assert set(after) == {"c0", "c1", "c9", "b2", "b7"}
    groups, templates = after["c0"]
    assert groups == {"office-central", "office-a", "office-b", "district:a", "district:b"}
    assert_same(
        {"c0": ((), templates)},
        {"c0": ((), before["central"]["c0"][1] | {column: before["b"]["b0"][1][column] for column in ("left_ring", "right_thumb")})},
        atol=0.01,
    )  # fmt: skip
    assert np.array_equal(templates["face"][1], before["central"]["c0"][1]["face"][1])
    assert after["c1"][1]["left_ring"][3] == 0.2  # its own, however good the other is
    assert after["b2"][0] == {"office-a", "office-b", "district:a", "district:b"}  # added, and stands for a2
    assert_same({"c9": after["c9"]}, {"c9": before["central"]["c9"]})
    with bd.Engine.open(visits / "central", CONFIG, read_only=True) as engine:
        mate = before["a"]["a0"][1]["face"][1]
        assert engine.search({"face": mate[None]}, k=1, groups=["district:a"]).ids.tolist() == [["c0"]]
        assert engine.problems() == []


def test_who_gave_what_is_in_the_result_and_in_the_log(visits):
    result = brought(visits, "a", "b")
    rows = pq.read_table(visits / "m.parquet").to_pylist()
    gives = {row["subject_id"]: row["gives"] for row in rows}
    assert gives == {"a0": [], "b0": ["right_thumb", "left_ring"], "c0": [], "a1": [], "c1": [], "a2": [], "b2": []}
    assert "gives right thumb, left ring" in (visits / "m.html").read_text()
    log = pq.read_table(visits / "central" / "merges" / f"{result.merge_id}.parquet").to_pylist()
    (told,) = [row for row in log if row["subject_id"] == "c0"]
    assert {(one["column"], one["subject_id"]) for one in told["gets"]} == {("left_ring", "b0"), ("right_thumb", "b0")}
    assert told["joins"] == ["district:a", "district:b", "office-a", "office-b"]
    assert [row["survivor"] for row in log if row["subject_id"] in ("a0", "b0")] == ["c0", "c0"]


def test_two_merges_taken_back_one_after_the_other_leave_what_was_there(visits):
    before = contents(visits / "central")
    first = brought(visits, "a")
    between = contents(visits / "central")
    second = brought(visits, "b", out="n.parquet")
    after = contents(visits / "central")
    assert "a2" in between and "a2" not in after  # b2 stands for it
    assert after["c0"][0] == {"office-central", "office-a", "office-b", "district:a", "district:b"}
    undone = jobs.undo(second.merge_id, visits / "central", CONFIG)
    assert (undone.restored, undone.reverted, undone.withdrawn) == (1, 1, 2)
    assert_same(between, contents(visits / "central"))
    with bd.Engine.open(visits / "central", CONFIG) as engine:
        engine.compact()
    undone = jobs.undo(first.merge_id, visits / "central", CONFIG)
    assert (undone.restored, undone.reverted, undone.withdrawn, undone.kept_changed) == (0, 2, 1, ())
    assert_same(before, contents(visits / "central"))


def test_a_survivor_that_was_updated_or_removed_since_is_left_as_it_is(visits):
    result = brought(visits, "a", "b")
    with bd.Engine.open(visits / "central", CONFIG) as engine:
        moved = bd.Encounter("c0", (), {"face": people(1, 99)[0]}, "later", ["moved"])
        engine.update(moved, replace=True, reason="a test")
        engine.remove("c1")
    undone = jobs.undo(result.merge_id, visits / "central", CONFIG)
    assert (undone.reverted, undone.kept_changed) == (0, ("c0",))
    left = contents(visits / "central")
    assert set(left) == {"c0", "c9"} and left["c0"][0] == {"moved"} and set(left["c0"][1]) == {"face"}


def test_a_merge_killed_at_any_stage_is_taken_back_whole_or_finished(visits):
    central, kept = visits / "central", visits / "kept"
    before = contents(central)
    merged([visits / "a", visits / "b"], visits / "m.parquet", into=central, rule="newest")
    shutil.copytree(central, kept)
    result = brought(visits, "a", "b")
    done = contents(central)
    stages = []
    for call in range(1, 5):
        shutil.rmtree(central)
        shutil.copytree(kept, central)
        with suppress(Killed):
            brought(visits, "a", "b", progress=killed_at(call))
        stages.append(stage_of(central, result.merge_id))
        shutil.copytree(central, visits / "other")
        assert jobs.undo(result.merge_id, central, CONFIG).kept_changed == ()
        assert_same(before, contents(central))
        shutil.rmtree(central)
        (visits / "other").rename(central)
        assert brought(visits, "a", "b").applied == result.applied
        assert_same(done, contents(central))
    assert stages == ["begun", "begun", "completed:0", "applied"]


def stage_of(folder: Path, merge_id: str) -> str:
    gallery = opened(folder)
    try:
        found = [""]
        for stage in ("begun", "completed:0", "removed", "applied"):
            found += [stage] * (gallery.snapshot().job_step(f"merge:{merge_id}:{stage}") is not None)
        return found[-1]
    finally:
        gallery.close()


def test_a_position_is_filled_by_the_best_quality_and_ties_go_to_the_smaller_id():
    stays = member("s", templates={"face": 0.1})
    others = [
        member("d", templates={"face": 0.9, "left_ring": None}),
        member("c", templates={"left_ring": 0.0, "left_thumb": 0.5}),
        member("b", templates={"left_thumb": 0.5}),
    ]
    found = {one.member.subject_id: one.gives for one in absorbed([*others, stays], stays)}
    assert found == {"d": (), "c": ("left_ring",), "b": ("left_thumb",)}


def test_from_the_shell_killed_by_the_system_and_started_again(districts, tmp_path):
    jobs.merge(districts, tmp_path / "m.parquet", config=bd.Config(), min_db=MIN_DB)
    folder = tmp_path / "k"
    command = ("merge", *districts, "--min-db", MIN_DB, "--out", folder / "m.parquet")
    killed = 0
    for sign in ("gallery/gallery.sqlite3", "join.notes"):
        process = subprocess.Popen(
            [sys.executable, "-m", "biodedup.cli", *map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (folder / "m.parquet.work" / sign).exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed
    code, out, _ = run(*command, "--into", "central", "--apply", "--json", cwd=tmp_path)
    told = json.loads(out)
    assert (code, told["applied"]["subjects"]) == (0, 442)
    assert bytes_of(folder) == bytes_of(tmp_path)
    code, out, _ = run("undo", told["merge_id"], "--gallery", "central", cwd=tmp_path)
    assert (code, out.strip()) == (0, "undone: 0 restored, 0 survivors reverted, 442 withdrawn; 0 subjects")
