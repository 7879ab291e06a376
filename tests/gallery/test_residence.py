"""What a gallery keeps in memory, and what it lets the system forget."""

import mmap

import numpy as np
import pytest

import biodedup as bd
from biodedup.gallery import snapshot
from biodedup.gallery.files import column_file
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.search.shards import cells
from biodedup.testing import internals

CONFIG = bd.Config(gallery=bd.GalleryConfig(seal_rows=20_000, background=False))


class Watched(LocalStorage):
    def __init__(self):
        self.forgotten = []

    def forget(self, path):
        self.forgotten.append(path.name)
        super().forget(path)


def people(count, seed):
    vectors = np.random.default_rng(seed).standard_normal((count, 128), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1)[:, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two segments of 20,000 people, 2.0 MB each that a scan reads and 1.3 MB beside."""
    folder = tmp_path_factory.mktemp("residence") / "g"
    with bd.Engine.open(folder, CONFIG) as engine:
        for seed in (0, 1):
            engine.add_templates([f"{seed}-{i}" for i in range(20_000)], {"face": people(20_000, seed)})
            internals(engine).gallery.seal()
    return folder


@pytest.fixture
def opened(folder):
    storage = Watched()
    with bd.Engine.open(folder, CONFIG, storage=storage) as engine:
        yield engine, storage


def streamed(engine):
    held = internals(engine).gallery.snapshot()
    return [part.columns["face"] in held.streamed for part in held.parts if part.count]


@pytest.mark.slow
@pytest.mark.parametrize(("megabytes", "wanted"), [(100, [False, False]), (8.2, [False, True]), (2, [True, True])])
def test_what_memory_cannot_hold_beside_all_that_is_scanned_is_streamed(opened, monkeypatch, megabytes, wanted):
    monkeypatch.setattr(snapshot, "memory_bytes", lambda: int(megabytes * 1e6))
    assert streamed(opened[0]) == wanted


@pytest.mark.slow
def test_a_large_search_has_the_system_forget_what_it_read_through(opened, monkeypatch):
    engine, storage = opened
    monkeypatch.setattr(snapshot, "memory_bytes", lambda: 8_200_000)
    monkeypatch.setattr(cells, "_READ_THROUGH_PAIRS", 100)
    probes = people(20_000, 1)[:64]
    found = engine.search({"face": probes}, k=5)
    assert [names[0] for names in found.ids] == [f"1-{i}" for i in range(64)]
    assert {name.partition(".")[2] for name in storage.forgotten} == {"face.rest"}
    assert len(set(storage.forgotten)) == 1, "the other fits"
    again = engine.search({"face": probes}, k=5)
    assert np.array_equal(again.similarity, found.similarity)


@pytest.mark.slow
def test_a_search_that_reads_little_or_fits_leaves_all_in_the_system_s_memory(opened, monkeypatch):
    engine, storage = opened
    engine.search({"face": people(20_000, 1)[:64]}, k=5)
    monkeypatch.setattr(cells, "_READ_THROUGH_PAIRS", 100)
    engine.search({"face": people(20_000, 1)[:64]}, k=5)
    assert not storage.forgotten


def test_single_rows_near_each_other_are_asked_for_together(opened, monkeypatch):
    engine, _ = opened
    asked = []
    real = column_file._advise
    monkeypatch.setattr(column_file, "_advise", lambda *given: asked.append(given[1:3]) or real(*given))
    column = next(part.columns["face"] for part in internals(engine).gallery.snapshot().parts if part.count)
    column._rest.check_rows("rest", np.array([0, 900, 5_000, 6_000, 19_000]))  # 64 bytes each
    ((starts, sizes),) = asked
    assert len(starts) == 3, "gaps of 57 kB are read over, not one of 262 or 832"
    assert (sizes >= 4096).all() and (starts % 4096 == 0).all()


def test_what_is_read_as_a_whole_is_asked_for_once_a_minute(opened, monkeypatch):
    engine, _ = opened
    asked, now = [], [1_000.0]
    real = column_file._advise
    monkeypatch.setattr(column_file, "_advise", lambda *given: asked.append(given[1:3]) or real(*given))
    monkeypatch.setattr(column_file.time, "monotonic", lambda: now[0])
    column = next(part.columns["face"] for part in internals(engine).gallery.snapshot().parts if part.count)
    column._file.read("high", 0, 20_000)  # checked now
    column._file._advised[:] = -np.inf
    counts = []
    for seconds in (0, 30, 31):
        now[0] += seconds
        asked.clear()
        column._file.read("high", 0, 20_000)
        counts.append(len(asked))
    assert counts == [1, 0, 1]


def test_a_machine_s_memory_is_known():
    assert 1 << 28 < snapshot.memory_bytes() < 1 << 50


def test_a_long_span_is_asked_for_in_pieces_since_the_system_reads_no_more_of_one(monkeypatch):
    asked = []
    monkeypatch.setattr(column_file, "_madvise", lambda *given: asked.append(given))
    column_file._advise_each(1 << 30, np.array([0, 1 << 20]), np.array([300_000, 4096]), mmap.MADV_WILLNEED)
    (*long, short) = asked
    assert max(size for _, size, _ in long) <= 1 << 17
    ends = [start + size for start, size, _ in long]
    assert [start for start, _, _ in long] == [1 << 30, *ends[:-1]] and ends[-1] == (1 << 30) + 300_000
    assert short[:2] == ((1 << 30) + (1 << 20), 4096)
