"""Registers of several districts brought together, and taken apart again."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import again, people

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.health import inspect
from biodedup.gallery.storage import LocalStorage

CONFIG = bd.Config(gallery=bd.GalleryConfig(seal_rows=64, merge_fan=2, background=False))
FILES = ("m.parquet", "m.pairs.parquet", "m.collisions.parquet", "m.summary.json", "m.html")
MIN_DB = 70.0


def register(folder: Path, vectors, names, *, compact=True, groups=None) -> Path:
    with bd.Engine.open(folder, CONFIG) as engine:
        for low in range(0, len(names), 40):
            some = slice(low, low + 40)
            engine.add_templates(
                names[some], {"face": vectors[some]}, groups=groups[some] if groups else [["roll"]] * len(names[some])
            )
            engine.tidy()
        if compact:
            engine.compact()
    return folder


@pytest.fixture
def districts(tmp_path):
    """Three districts of 150; five of the first are in the second again, one of them in the third, too; and `s7` is one person in
    the first two, `x9` two persons."""
    a, b, c = (people(150, seed) for seed in (1, 2, 3))
    b[:5], c[0] = again(a[:5], 0.9), again(a[:1], 0.9, seed=9)[0]
    b[7] = again(a[7:8], 0.9)[0]
    names = [[f"{letter}{i}" for i in range(150)] for letter in "abc"]
    names[0][7] = names[1][7] = "s7"
    names[0][9] = names[1][9] = "x9"
    return [
        register(tmp_path / folder, vectors, ids, compact=folder != "bantul")
        for folder, vectors, ids in zip(("agam", "bantul", "cimahi"), (a, b, c), names, strict=True)
    ]


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


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, (groups, templates) in one.items():
        assert groups == other[name][0]
        assert templates.keys() == other[name][1].keys()
        for column, (model_id, vector, *rest) in templates.items():
            theirs = other[name][1][column]
            assert (model_id, *rest) == (theirs[0], *theirs[2:])
            assert vector is None or np.allclose(vector, theirs[1], atol=1e-6)


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
    wanted = {frozenset({("agam", f"a{i}"), ("bantul", f"b{i}")}) for i in range(1, 5)}
    wanted |= {
        frozenset({("agam", "a0"), ("bantul", "b0"), ("cimahi", "c0")}),
        frozenset({("agam", "s7"), ("bantul", "s7")}),
    }
    assert found == wanted
    assert all(sum(row["survivor"] for row in some) == 1 for some in clusters.values())
    assert [row["captures"] for row in rows] == [1] * 13
    pairs = pq.read_table(tmp_path / "m.pairs.parquet").to_pylist()
    assert {row["district_a"] for row in pairs} | {row["district_b"] for row in pairs} == {"agam", "bantul", "cimahi"}
    assert all(part["similarity"] > 0.7 for row in pairs if row["strength"] == "duplicate" for part in row["evidence"])
    assert result.summary["clusters_of_more_than_two"] == 1
    page = (tmp_path / "m.html").read_text()
    assert "Clusters of more than two records" in page and "agam/s7" in page and "<script" not in page


def test_an_id_of_two_districts_is_told_apart_by_whose_it_is(districts, tmp_path):
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
    assert (applied.added, applied.removed, applied.left_out) == (299, 6, 1)
    after = contents(first)
    assert len(after) == applied.subjects == 150 + 299 - 6
    assert "b1" in after and "a1" not in after and "bantul/s7" in after and "s7" not in after and "c0" not in after
    assert after["x9"][0] == {"roll"} and after["bantul/x9"][0] == {"roll", "district:bantul"}
    assert merged(others, out, into=first, prefer=["bantul"], apply=True) == result
    undone = jobs.undo(result.merge_id, first, CONFIG)
    assert (undone.restored, undone.withdrawn, undone.kept_changed) == (6, 299, ())
    assert_same(before, contents(first))
    assert jobs.undo(result.merge_id, first, CONFIG) == undone
    assert not inspect(LocalStorage(), first)


def test_apply_and_undo_killed_anywhere_go_on(districts, tmp_path):
    first, *others = districts
    before = contents(first)
    out = tmp_path / "m.parquet"
    merged(others, out, into=first, prefer=["bantul"])
    kills = 0
    while True:
        try:
            result = merged(others, out, into=first, prefer=["bantul"], apply=True, storage=Dying(11 + 13 * kills))
            break
        except bd.StorageUnavailable:
            kills += 1
    assert kills > 3
    assert len(contents(first)) == 443
    kills = 0
    while True:
        try:
            jobs.undo(result.merge_id, first, CONFIG, storage=Dying(7 + 9 * kills))
            break
        except bd.StorageUnavailable:
            kills += 1
    assert kills > 1
    assert_same(before, contents(first))


class Dying(LocalStorage):
    """From the nth change of a file's name or folder on, the disk refuses everything."""

    def __init__(self, n: int) -> None:
        self._left = n

    def _change(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise OSError(5, "input/output error")

    def create(self, path):
        self._change()
        return super().create(path)

    def replace(self, source, target):
        self._change()
        super().replace(source, target)

    def sync_folder(self, folder):
        self._change()
        super().sync_folder(folder)

    def connect(self, path, *, read_only):
        self._change()
        return super().connect(path, read_only=read_only)
