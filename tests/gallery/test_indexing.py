"""The FAISS indexes of a gallery: they follow its rows through sealing, merging, removal, damage and interruptions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup import jobs
from biodedup.cli.commands import run
from biodedup.embed.cards import load_card
from biodedup.gallery.files import index_codec
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.segments import indexing
from biodedup.index_spec import IndexSpec, parse_specs
from biodedup.search.shards import cells
from biodedup.search.shards import faiss as faiss_engine
from biodedup.testing import internals
from tests.support.vectors import SFACE, again, people

pytestmark = pytest.mark.slow
ROWS = 2_400
ENGINE = "faiss:IVF8,PQ64x4fs"
VECTORS = people(ROWS, seed=3)
NAMES = [f"s{row}" for row in range(ROWS)]
PROBES = np.concatenate([again(VECTORS[::40], 0.6), people(20, seed=8)])


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Few rows are indexed, trained on and searched by FAISS."""
    monkeypatch.setattr(indexing, "CELLS_MIN", 300)
    monkeypatch.setattr(cells, "EXACT_CELLS", 300)
    monkeypatch.setattr(faiss_engine, "_SHARE_MAX", 1.0)
    monkeypatch.setattr(faiss_engine, "ROWS_A_LIST_MIN", 0)
    monkeypatch.setattr(index_codec, "_PAIRS", 300)


def config(index: str | dict[str, str] | None = ENGINE, **more: object) -> bd.Config:
    settings = {"seal_rows": 400, "merge_fan": 8, "background": False, "index": index} | more
    return bd.Config(gallery=bd.GalleryConfig(**settings))


def fill(engine: bd.Engine, low: int = 0, high: int = ROWS, batch: int = 500) -> None:
    for at in range(low, high, batch):
        end = min(at + batch, high)
        engine.add_templates(NAMES[at:end], {"face": VECTORS[at:end]}, model_id=SFACE)


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[bd.Engine]:
    with bd.Engine.open(tmp_path / "g", config()) as engine:
        fill(engine)
        engine.maintain()
        yield engine


def index_files(engine: bd.Engine) -> list[list[str]]:
    """The index files of each segment, by the manifest."""
    return [[k for k in s.entry.files if ".index." in k] for s in internals(engine).gallery.snapshot().segments]


def found(engine: bd.Engine, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    result = engine.search({"face": PROBES}, k=k)
    assert not result.incomplete
    return result.ids, result.similarity


def assert_as_without_index(engine: bd.Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index finds what an exact search of the same stored rows finds."""
    ids, similarity = found(engine)
    with bd.Engine.open(folder, bd.Config(search=bd.SearchConfig(miss_risk=0)), read_only=True) as exact:
        expected, exactly = found(exact)
    assert np.mean(ids == expected) > 0.97
    assert np.array_equal(ids[:60, 0], expected[:60, 0])
    np.testing.assert_allclose(similarity[:60, 0], exactly[:60, 0], atol=2e-6)


def test_a_new_gallery_stores_the_engine_that_it_is_opened_with(tmp_path):
    with bd.Engine.open(tmp_path / "g", config()) as engine:
        assert engine.index("face") == ENGINE
    with bd.Engine.open(tmp_path / "g", config(index=None)) as engine:
        assert engine.index("face") == ENGINE
    with pytest.raises(bd.IndexMismatch, match="reindex"):
        bd.Engine.open(tmp_path / "g", config(index="native"))


def test_an_engine_can_be_chosen_by_column(tmp_path):
    with bd.Engine.open(tmp_path / "g", config(index={"face": ENGINE, "right_index": "faiss:IVF4,SQ8"})) as engine:
        assert [engine.index(c) for c in ("face", "right_index", "left_index")] == [ENGINE, "faiss:IVF4,SQ8", "native"]


@pytest.mark.parametrize(
    "text", ["FAISS:Flat", "faiss:", "faiss:IVF4,Flat,nprobe=0", "faiss:IVF4 Flat", "", "native,nprobe=3"]
)
def test_an_engine_that_is_none_is_refused_with_an_example(text):
    with pytest.raises(bd.InvalidInput, match="faiss:IVF2048,PQ64x4fs"):
        bd.GalleryConfig(index=text)


@pytest.mark.parametrize("factory", ["HNSW32", "PQ64x4fs", "Nonsense7"])
def test_no_gallery_is_created_with_an_index_that_faiss_cannot_have(tmp_path, factory):
    with pytest.raises(bd.InvalidInput, match=factory):
        bd.Engine.open(tmp_path / "g", config(index=f"faiss:{factory}"))
    assert not (tmp_path / "g").exists()


def test_an_unknown_column_is_refused():
    with pytest.raises(bd.InvalidInput, match="'thumb'"):
        bd.GalleryConfig(index={"thumb": "native"})


@given(st.from_regex(r"[A-Z][A-Za-z0-9_,.()]{0,30}", fullmatch=True), st.none() | st.integers(1, 9_999))
def test_the_text_of_an_engine_is_read_back(factory, nprobe):
    spec = IndexSpec(factory, nprobe)
    assert IndexSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("HNSW32", "depends on the gallery's size"),
        ("PQ64x4fs", "refuses a selection of rows"),
        ("IVF4,RaBitQfs", "range search"),
        ("IVF4,PQ64x4fs,Refine(Flat)", "depends on the gallery's size"),
        ("Nonsense7", "could not parse"),
        ("PQ60x4fs", "60"),
        ("Flat,nprobe=4", "no inverted lists"),
    ],
)
def test_an_index_that_faiss_cannot_search_soundly_is_refused_with_the_reason(gallery, factory, reason):
    with pytest.raises(bd.InvalidInput, match=reason):
        gallery.reindex(f"faiss:{factory}")
    assert gallery.index("face") == ENGINE


def test_an_index_that_loses_too_many_mates_is_refused_unless_forced(gallery):
    with pytest.raises(bd.InvalidInput, match="too few lists"):
        gallery.reindex(ENGINE + ",nprobe=1")
    assert gallery.index("face") == ENGINE
    gallery.reindex(ENGINE + ",nprobe=1", force=True)
    assert gallery.index("face") == ENGINE + ",nprobe=1"
    assert "a search reads 1 of 8 lists, so that further mates are lost" in gallery.plan().explain()


def test_segments_get_an_index_each_and_are_searched_by_it(gallery, tmp_path, monkeypatch):
    assert index_files(gallery) and all(len(files) == 1 for files in index_files(gallery))
    searched = []
    above = faiss_engine.FaissShard._above
    monkeypatch.setattr(faiss_engine.FaissShard, "_above", lambda self, *a: searched.append(1) or above(self, *a))
    assert_as_without_index(gallery, tmp_path / "g", monkeypatch)
    assert searched
    assert gallery.problems() == []


def test_rows_that_are_too_few_to_train_on_are_searched_without_an_index(tmp_path):
    with bd.Engine.open(tmp_path / "g", config()) as engine:
        fill(engine, 0, 250)
        engine.compact()
        assert index_files(engine) == [[]]
        assert "no segment has an index" in engine.plan().explain()
        assert engine.search({"face": VECTORS[:3]}, k=1).ids[:, 0].tolist() == NAMES[:3]


def test_removed_rows_vanish_at_once_and_after_compaction(gallery, tmp_path, monkeypatch):
    for name in NAMES[::80]:
        gallery.remove(name)
    gone = set(NAMES[::80])
    for _ in range(2):
        assert not gone & set(found(gallery)[0].ravel())
        assert_as_without_index(gallery, tmp_path / "g", monkeypatch)
        gallery.compact()
    assert len(index_files(gallery)) == 1
    assert gallery.problems() == []


def test_groups_are_searched_through_the_index(tmp_path):
    with bd.Engine.open(tmp_path / "g", config()) as engine:
        groups = [("north",) if row % 3 else ("south",) for row in range(ROWS)]
        engine.add_templates(NAMES, {"face": VECTORS}, groups=groups, model_id=SFACE)
        engine.maintain()
        ids = engine.search({"face": VECTORS[:30]}, k=3, groups=("south",)).ids
        assert all(int(name[1:]) % 3 == 0 for name in ids.ravel())
        assert ids[::3, 0].tolist() == NAMES[:30:3]


def test_merged_segments_have_the_index_that_building_it_anew_gives(gallery):
    gallery.compact()
    (segment,) = internals(gallery).gallery.snapshot().segments
    column = segment.columns["face"]
    codec = internals(gallery).gallery.snapshot().indexing.wanted("face")
    merged, anew = column.index.loaded(), indexing.built(column, codec)
    for index in (merged, anew):
        assert index.ntotal == ROWS
    of_merged, of_anew = (
        [set(ids[a:b].tolist()) for a, b in pairwise(limits.tolist())]
        for limits, ids, _ in (index_codec.in_range(index, codec.spec, PROBES, 0.1, None) for index in (merged, anew))
    )
    assert of_merged == of_anew


def test_a_reopened_gallery_answers_alike(gallery, tmp_path):
    before = found(gallery)
    gallery.close()
    with bd.Engine.open(tmp_path / "g", config(index=None)) as engine:
        after = found(engine)
    assert np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])


def test_reindexing_changes_the_engine_and_back(gallery, tmp_path, monkeypatch):
    done = []
    gallery.reindex("faiss:IVF4,SQ8", progress=lambda count, total: done.append((count, total)))
    assert done[-1] == (ROWS, ROWS)
    assert_as_without_index(gallery, tmp_path / "g", monkeypatch)
    codecs = internals(gallery).gallery.snapshot().indexing.codecs["face"]
    assert [str(codec.spec) for codec in codecs] == ["faiss:IVF4,SQ8"]
    gallery.reindex("native")
    assert not any(index_files(gallery))
    names = [path.name for path in (tmp_path / "g" / "segments").iterdir()]
    assert not [name for name in names if ".index." in name]
    assert_as_without_index(gallery, tmp_path / "g", monkeypatch)
    assert gallery.problems() == []


class _Stopped(Exception):
    pass


def test_an_interrupted_reindexing_searches_on_and_is_continued(gallery, tmp_path, monkeypatch):
    def stop(done: int, total: int) -> None:
        raise _Stopped

    with pytest.raises(_Stopped):
        gallery.reindex("faiss:IVF4,SQ8", progress=stop)
    kinds = {name for files in index_files(gallery) for name in files}
    assert len(kinds) == 2  # some segments have the new one
    assert_as_without_index(gallery, tmp_path / "g", monkeypatch)
    gallery.close()
    with bd.Engine.open(tmp_path / "g", config(index=None)) as engine:
        engine.maintain()
        assert len({name for files in index_files(engine) for name in files}) == 1
        assert engine.index("face") == "faiss:IVF4,SQ8"
        assert_as_without_index(engine, tmp_path / "g", monkeypatch)


def test_a_full_disk_while_indexing_leaves_the_gallery_as_it_was(gallery, tmp_path, monkeypatch):
    before, files = found(gallery), index_files(gallery)
    create = LocalStorage.create

    def full(self, path):
        if ".index." in path.name:
            raise OSError(28, "No space left on device")
        return create(self, path)

    monkeypatch.setattr(LocalStorage, "create", full)
    with pytest.raises(bd.StorageUnavailable):
        gallery.reindex("faiss:IVF4,SQ8")
    assert index_files(gallery) == files
    assert np.array_equal(found(gallery)[0], before[0])
    monkeypatch.undo()


def test_a_damaged_index_is_named_and_built_again(gallery, tmp_path, monkeypatch):
    before = found(gallery)
    gallery.close()
    path = next((tmp_path / "g" / "segments").glob("*.face.index.*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    report = jobs.examine(tmp_path / "g")
    assert any(path.name.partition(".")[2] in text for text in report.problems)
    with bd.Engine.open(tmp_path / "g", config(index=None)) as engine:
        assert engine.search({"face": PROBES}, k=5).incomplete
    report = jobs.examine(tmp_path / "g", mend=True)
    assert any("built again from face" in text for text in report.mended)
    assert report.problems == ()
    with bd.Engine.open(tmp_path / "g", config(index=None)) as engine:
        assert np.array_equal(found(engine)[0], before[0])


def test_an_index_of_another_segment_is_not_taken(gallery, tmp_path):
    gallery.close()
    first, second = sorted((tmp_path / "g" / "segments").glob("*.face.index.*"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(bd.GalleryDamaged):
        bd.Engine.open(tmp_path / "g", config(index=None))


def test_a_backup_has_the_indexes(gallery, tmp_path):
    gallery.backup(tmp_path / "copy")
    with bd.Engine.open(tmp_path / "copy", config(index=None)) as copy:
        assert index_files(copy) == index_files(gallery)
        assert np.array_equal(found(copy)[0], found(gallery)[0])


def test_the_files_of_indexes_are_private(gallery, tmp_path):
    paths = list((tmp_path / "g" / "segments").glob("*.index.*"))
    assert paths and all(path.stat().st_mode & 0o077 == 0 for path in paths)


@settings(max_examples=60)
@given(st.integers(1, 300), st.data())
def test_the_selected_cells_are_those_that_live_in_the_span(count, data):
    first = data.draw(st.integers(0, count))
    last = data.draw(st.integers(first, count))
    live = np.array(data.draw(st.none() | st.lists(st.booleans(), min_size=count, max_size=count)) or [True] * count)
    words = np.packbits(np.resize(np.append(live, np.zeros(64, bool)), -(-count // 64) * 64), bitorder="little").view(
        np.uint64
    )

    class Column:
        pass

    class Span:
        pass

    column, span = Column(), Span()
    column.count = count
    span.column, span.first, span.last = column, first, last
    span.unit = lambda number: type("Unit", (), {"live": words if not live.all() else np.zeros(0, np.uint64)})()
    scan = faiss_engine._IndexScan(span, None, None, None, 0.0, None, None)
    selected = scan.selected()
    expected = live & (np.arange(count) >= first) & (np.arange(count) < last)
    if selected is None:
        assert expected.all()
    else:
        assert np.array_equal(np.unpackbits(selected, bitorder="little")[:count].astype(bool), expected)
        assert not np.unpackbits(selected, bitorder="little")[count:].any()


# FAISS itself ------------------------------------------------------------------------------------------------------


def test_faiss_searches_the_sealed_rows_itself(gallery):
    gallery.remove(NAMES[40])
    fill(gallery, ROWS, ROWS)
    index = gallery.faiss_index("face")
    assert isinstance(index, faiss.IndexShards) and index.ntotal == ROWS - 1
    _, rows = index.search(again(VECTORS[::40], 0.8), 3)
    assert rows.dtype == np.int64
    expected = gallery.rows_of(NAMES[::40])
    assert np.array_equal(np.delete(rows[:, 0], 1), np.delete(expected, 1))
    assert gallery.subjects_of_rows(rows[[0, 2], 0]) == [NAMES[0], NAMES[80]]
    assert NAMES[40] not in gallery.subjects_of_rows(rows.ravel())


def test_faiss_gets_no_index_of_a_native_column(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine, pytest.raises(bd.InvalidInput, match="reindex"):
        engine.faiss_index("face")


@pytest.mark.parametrize("engine_text", [ENGINE, "faiss:SQ8", "faiss:PCA96,IVF4,PQ48x4fs"])
def test_exported_files_are_searched_by_plain_faiss_and_loaded_again(gallery, tmp_path, engine_text):
    gallery.reindex(engine_text)
    for name in NAMES[:100:10]:
        gallery.remove(name)
    result = jobs.export_faiss(gallery, tmp_path / "out")
    assert result.rows == ROWS - 10 and result.index == engine_text
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "out" / "ids.parquet")
    names = dict(zip(table.column("id").to_pylist(), table.column("subject_id").to_pylist(), strict=True))
    best, best_score = np.full(60, -1), np.full(60, -np.inf)
    for name in result.files:
        index = faiss.read_index(str(tmp_path / "out" / name))
        scores, ids = index.search(again(VECTORS[::40], 0.8), 1)
        better = scores[:, 0] > best_score
        best[better], best_score[better] = ids[better, 0], scores[better, 0]
    expected = [name for name in NAMES[::40] if int(name[1:]) % 10 or int(name[1:]) >= 100]
    assert set(expected) <= {names[row] for row in best.tolist()}

    with bd.Engine.open(tmp_path / "loaded", config(index=None)) as loaded:
        for name in result.files:
            done = jobs.load_faiss(loaded, tmp_path / "out" / name, tmp_path / "out" / "ids.parquet", model_id=SFACE)
            assert done.refused == 0
        assert len(loaded) == ROWS - 10
        ids = loaded.search({"face": VECTORS[100:130]}, k=1).ids[:, 0]
        assert ids.tolist() == NAMES[100:130]


def test_the_commands_make_change_export_and_load_an_index(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", VECTORS)
    np.save("ids.npy", np.array(NAMES))

    def command(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["biodedup", *words])
        with pytest.raises(SystemExit) as ended:
            run()
        shown = capsys.readouterr()
        assert ended.value.code == 0, shown.err
        return shown.out

    model = ("--model-id", SFACE)
    command("load", "v.npy", "--ids", "ids.npy", *model, "-g", "g", "--index", ENGINE)
    command("compact", "-g", "g")
    lines = command("reindex", "-g", "g", "--index", "face=faiss:IVF4,SQ8").splitlines()
    assert len(lines) == 3 and "2,400 rows have an index faiss:IVF4,SQ8" in lines[1]
    assert "2,400 rows of face are in out, 1 index file" in command("export", "--faiss", "out", "-g", "g")
    (file,) = (tmp_path / "out").glob("*.faiss")
    command("load", "--faiss", str(file), "--ids", "out/ids.parquet", *model, "-g", "other")
    with bd.Engine.open("other", read_only=True) as engine:
        assert engine.search({"face": VECTORS[:20]}, k=1).ids[:, 0].tolist() == NAMES[:20]


def test_vectors_without_a_subject_are_refused_one_by_one(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = faiss.IndexFlatIP(128)
    index.add(VECTORS[:10])
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    pq.write_table(pa.table({"id": list(range(9)), "subject_id": NAMES[:9]}), tmp_path / "ids.parquet")
    with bd.Engine.open(tmp_path / "g") as engine:
        done = jobs.load_faiss(engine, tmp_path / "x.faiss", tmp_path / "ids.parquet", model_id=SFACE)
        assert (done.added, done.refused, done.refused_rows) == (9, 1, (9,))


def test_a_file_that_is_no_index_is_refused(tmp_path):
    (tmp_path / "x.faiss").write_bytes(b"not an index")
    (tmp_path / "ids.parquet").write_bytes(b"")
    with bd.Engine.open(tmp_path / "g") as engine, pytest.raises(bd.InvalidInput, match=r"x\.faiss"):
        jobs.load_faiss(engine, tmp_path / "x.faiss", tmp_path / "ids.parquet", model_id=SFACE)


def test_several_columns_are_searched_one_after_the_other_and_the_plan_states_what_that_misses(tmp_path):
    with bd.Engine.open(tmp_path / "g", config()) as engine:
        fingers = people(ROWS, seed=4, dimension=256)
        engine.add_templates(
            NAMES,
            {"face": VECTORS, "right_index": fingers},
            model_id={"face": SFACE, "right_index": load_card("finger256").model_id},
        )
        engine.maintain()
        assert (
            internals(engine).searcher.multicolumn_query(internals(engine).gallery.snapshot(), ("face", "right_index"))
            is None
        )
        text = engine.plan(("face", "right_index")).explain()
        assert "searched one after the other, 100 candidates each" in text


def test_the_database_keeps_a_codec_as_it_was(gallery):
    kept = internals(gallery).gallery.snapshot().indexing
    codec = kept.wanted("face")
    again_read = index_codec.FaissCodec.from_card(str(codec.spec), codec.card(), codec.trained)
    assert again_read.codec_id == codec.codec_id and again_read.law == codec.law and again_read.lost == codec.lost
    assert parse_specs(ENGINE) == kept.specs


def test_readers_without_a_writer_search_by_the_index(gallery, tmp_path):
    expected = found(gallery)
    gallery.close()
    with bd.Engine.open(tmp_path / "g", read_only=True) as reader:
        assert np.array_equal(found(reader)[0], expected[0])


def test_an_index_with_few_rows_a_list_is_left_to_the_native_engine(gallery, monkeypatch):
    searched = []
    in_range = index_codec.in_range
    monkeypatch.setattr(index_codec, "in_range", lambda *given: searched.append(given) or in_range(*given))
    before = found(gallery)
    assert searched
    searched.clear()
    monkeypatch.setattr(faiss_engine, "ROWS_A_LIST_MIN", ROWS)
    native = found(gallery)
    assert not searched
    assert np.mean(native[0] == before[0]) > 0.99
