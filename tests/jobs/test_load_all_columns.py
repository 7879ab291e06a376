"""A face and fingers of many subjects, loaded together from Arrow: the same gallery as through the captures' path, and bad rows told."""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.embed.cards import joint_id, load_card, minutiae_card
from biodedup.engine.arrow.templates import read_templates
from biodedup.gallery.files import codec
from biodedup.gallery.segments import writer
from biodedup.testing import internals
from tests.support.faults import Countdown, FailingStorage
from tests.support.galleries import small
from tests.support.minutiae import moved, record, strewn
from tests.support.vectors import people


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch):
    """A new rotation is measured on few pairs."""
    monkeypatch.setattr(codec, "_PAIRS", 200)


FACE = load_card("sface").model_id
FINGER = joint_id(load_card("finger256"), minutiae_card(bd.FingerConfig().minutiae))
COUNT, FINGERS = 40, ("right_index", "left_thumb")


def unit(seed, dimension):
    rows = np.random.default_rng(seed).standard_normal((COUNT, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


PRINTS = [strewn(30, seed=i) for i in range(COUNT)]
VECTORS = {"face": people(COUNT, seed=3), "right_index": unit(4, 256), "left_thumb": unit(5, 256)}


def templates(i):
    """What subject i is enrolled with: some lack a finger, some its minutiae, some a quality."""
    found = {"face": bd.Template("face", FACE, VECTORS["face"][i], quality=None if i % 5 == 0 else 0.25 + i / 100)}
    for at, finger in enumerate(FINGERS):
        if (i + at) % 7 == 3:
            continue
        minutiae = None if (i + at) % 6 == 2 else record(moved(PRINTS[i], at * 30.0))
        found[finger] = bd.Template(finger, FINGER, VECTORS[finger][i], minutiae, quality=0.25 + i / 100)
    return found


def arrow(rows, **changed):
    """The record batch of these subjects. changed: column -> {index: value}."""
    given = [templates(i) for i in rows]
    columns = {"subject_id": [f"s{i}" for i in rows], "groups": [["north"] if i % 2 else [] for i in rows]}
    types = {"subject_id": pa.string(), "groups": pa.list_(pa.string())}
    models = {}
    for column in ("face", *FINGERS):
        cells = [each.get(column) for each in given]
        columns[column] = [None if cell is None else cell.embedding.tolist() for cell in cells]
        columns[f"{column}_quality"] = [None if cell is None else cell.quality for cell in cells]
        types |= {column: pa.list_(pa.float32()), f"{column}_quality": pa.float32()}
        models[column] = {"model_id": FACE if column == "face" else FINGER}
        if column != "face":
            columns[f"{column}_minutiae"] = [None if cell is None else cell.minutiae for cell in cells]
            types[f"{column}_minutiae"] = pa.binary()
    for name, values in changed.items():
        for at, value in values.items():
            columns[name][at] = value
    fields = [pa.field(name, types[name], metadata=models.get(name)) for name in columns]
    return pa.RecordBatch.from_arrays([pa.array(columns[f.name], f.type) for f in fields], schema=pa.schema(fields))


def slowly(engine, rows):
    """The same subjects one encounter each."""
    groups = {i: ["north"] if i % 2 else [] for i in rows}
    decisions = engine.import_captures([bd.Encounter(f"s{i}", templates=templates(i), groups=groups[i]) for i in rows])
    assert {decision.outcome for decision in decisions} == {"unique"}


def contents(engine):
    """subject_id -> its templates and groups, as plain values."""
    snapshot = internals(engine).gallery.snapshot()
    found = {}
    for i in range(COUNT):
        row = snapshot.row_of(f"s{i}")
        if row is not None:
            kept = snapshot.templates(row)
            about = {c: (t.model_id, t.minutiae, t.quality and round(t.quality, 4)) for c, t in kept.items()}
            vectors = {c: t.embedding for c, t in kept.items()}
            found[f"s{i}"] = about, tuple(engine.subject(f"s{i}").encounters[0].groups), vectors
    return found


def same_contents(one, other):
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    for name, (about, groups, vectors) in one.items():
        assert (about, groups) == other[name][:2], name
        for column, vector in vectors.items():
            # a code of eight bits may fall on the other side of a half
            np.testing.assert_allclose(vector, other[name][2][column], atol=0.006)


def answers(engine):
    said = []
    for i in range(0, COUNT, 6):
        vectors = {c: t for c, t in templates(i).items()}
        decision = engine.identify(bd.Encounter(templates=vectors))
        said.append((decision.outcome, decision.best.subject_id, round(decision.best.score_db)))
    return said


@pytest.mark.slow
@pytest.mark.parametrize("seal_rows", [8, 1000], ids=["as segments", "through the journal"])
def test_loaded_columns_are_those_of_the_captures_path_and_give_the_same_answers(tmp_path, seal_rows):
    config = small(seal_rows=seal_rows)
    with bd.Engine.open(tmp_path / "fast", config) as fast, bd.Engine.open(tmp_path / "slow", config) as slow:
        result = jobs.load(fast, [arrow(range(COUNT))], batch_rows=15)
        slowly(slow, range(COUNT))
        assert (result.added, result.refused) == (COUNT, 0)
        if seal_rows < COUNT:
            assert fast.info()["segments"] and not internals(fast).gallery.snapshot().parts[-1].count
            slow.seal()
        same_contents(fast, slow)
        assert answers(fast) == answers(slow)
        assert fast.problems() == []
    with bd.Engine.open(tmp_path / "fast", config) as again, bd.Engine.open(tmp_path / "slow", config) as slow:
        same_contents(again, slow)


@pytest.mark.slow
def test_an_engine_takes_a_batch_whole_or_not_at_all(tmp_path):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=8)) as engine:
        with pytest.raises(bd.InvalidInput, match="row 3 cannot be used: face is a vector of zeros"):
            engine.add_templates(arrow(range(20), face={3: [0.0] * 128}))
        assert len(engine) == 0
        assert engine.add_templates(arrow(range(20)), encounter_id="b1") == 20
        assert engine.add_templates(arrow(range(20)), encounter_id="b1") == 0
        with pytest.raises(bd.SubjectExists, match="s19"):
            engine.add_templates(arrow(range(19, 30)))
        assert len(engine) == 20


BAD = {
    "face": ([0.5] * 128, "face is not a unit vector"),
    "right_index": ([1.0, 0.0], "right_index has another number of numbers than 256"),
    "left_thumb": ([float("nan")] * 256, "left_thumb is not a unit vector"),
    "right_index_minutiae": (b"FMR\0 20\0 and more than that, but no record", "right_index is not a sound minutiae record"),
    "right_index_quality": (float("inf"), "right_index_quality is not a finite number"),
    "face_quality": (40.0, "face_quality is not from 0 to 1"),
    "left_thumb_quality": (101.0, "left_thumb_quality is not from 0 to 1"),
    "subject_id": ("s1", "subject_id is repeated"),
    "groups": (["two\nlines"], "groups: unusable id"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("column", BAD)
def test_a_bad_row_is_refused_with_its_number_and_reason_and_the_others_are_loaded(tmp_path, column):
    value, reason = BAD[column]
    with bd.Engine.open(tmp_path / "g", small(seal_rows=99)) as engine:
        result = jobs.load(engine, [arrow(range(9), **{column: {4: value}})], batch_rows=5)
        assert (result.added, result.refused, result.refused_rows, result.reasons) == (8, 1, (4,), {reason: 1})
        assert "s4" not in engine and "s5" in engine
        assert engine.load_templates(arrow(range(9), **{column: {4: value}})).refused == ((4, reason),)


def test_what_stands_beside_no_template_is_refused_and_not_dropped(tmp_path):
    without = {"right_index": {0: None, 2: None}, "right_index_quality": {0: None}}
    rows = arrow(range(4), **without, left_thumb_quality={3: None})
    with bd.Engine.open(tmp_path / "g", small(seal_rows=99)) as engine:
        loaded = engine.load_templates(rows)
        assert dict(loaded.refused)[0] == "right_index has minutiae and no vector"
        assert dict(loaded.refused)[2] in (
            "right_index has minutiae and no vector",
            "right_index_quality is stated without a template",
        )
        assert loaded.added == 2


def test_columns_that_nobody_knows_and_models_that_differ_stop_the_load(tmp_path):
    rows = arrow(range(4))
    with bd.Engine.open(tmp_path / "g", small(seal_rows=99)) as engine:
        with pytest.raises(bd.InvalidInput, match="notes"):
            engine.load_templates(rows.append_column("notes", pa.array(["a"] * 4)))
        with pytest.raises(bd.InvalidInput, match="has face twice"):
            engine.load_templates(rows.append_column("face", rows.column("face")))
        with pytest.raises(bd.InvalidInput, match="face_quality without face"):
            engine.load_templates(rows.select(["subject_id", "face_quality", "right_index"]))
        with pytest.raises(bd.ModelMismatch, match="states the model"):
            engine.load_templates(rows, model_id={"face": "another-1"})
        with pytest.raises(bd.InvalidInput, match="leave templates and groups out"):
            engine.load_templates(rows, {"face": VECTORS["face"]})
        assert len(engine) == 0


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("face", pa.list_(pa.float64())),
        ("face", pa.large_list(pa.float32())),
        ("face", pa.list_(pa.float32(), 128)),
        ("right_index_minutiae", pa.large_binary()),
        ("left_thumb_quality", pa.float64()),
        ("subject_id", pa.large_string()),
    ],
    ids=str,
)
def test_a_column_of_another_arrow_type_says_the_same_also_in_the_middle_of_a_longer_one(column, kind):
    plain = arrow(range(9))
    at = plain.schema.get_field_index(column)
    field = plain.schema.field(at).with_type(kind)
    longer = pa.Table.from_batches([arrow(range(20, 26)), plain])
    longer = longer.set_column(at, field, longer.column(at).cast(kind)).combine_chunks().to_batches()[0].slice(6)
    one, other = read_templates(plain), read_templates(longer)
    assert other.subject_ids.to_pylist() == one.subject_ids.to_pylist()
    assert one.groups == other.groups
    for name, cells in one.cells.items():
        np.testing.assert_array_equal(cells.positions, other.cells[name].positions)
        np.testing.assert_array_equal(cells.vectors, other.cells[name].vectors)
        np.testing.assert_array_equal(cells.quality, other.cells[name].quality)
        assert cells.minutiae.equals(other.cells[name].minutiae)


def test_a_table_of_several_chunks_is_one_batch(tmp_path):
    table = pa.Table.from_batches([arrow(range(5)), arrow(range(5, 9))])
    with bd.Engine.open(tmp_path / "g", small(seal_rows=99)) as engine:
        assert engine.load_templates(table).added == 9
        assert engine.load_templates(table.slice(0, 0)).added == 0


def test_minutiae_of_a_model_without_a_calibration_are_not_taken(tmp_path):
    rows = arrow(range(4))
    schema = pa.schema(
        [field.with_metadata({"model_id": "mine-1"}) if "index" in field.name else field for field in rows.schema]
    )
    with (
        bd.Engine.open(tmp_path / "g", small(seal_rows=99)) as engine,
        pytest.raises(bd.InvalidInput, match="no calibration"),
    ):
        engine.load_templates(pa.RecordBatch.from_arrays(rows.columns, schema=schema))


@pytest.mark.slow
def test_a_batch_that_is_sent_again_adds_nothing_and_other_minutiae_are_told(tmp_path):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=8)) as engine:
        assert engine.load_templates(arrow(range(20))).added == 20
        version = engine.gallery_version
        again = engine.load_templates(arrow(range(20)))
        assert (again.added, again.present, again.conflicting, engine.gallery_version) == (0, 20, (), version)
        other = record(strewn(30, seed=99))
        changed = engine.load_templates(
            arrow(range(20, -1, -1), right_index_minutiae={20 - 6: other}, subject_id={0: ""})
        )
        assert (changed.added, changed.present, changed.conflicting) == (0, 19, (14,))
        assert changed.refused == ((0, "subject_id is not usable: it is empty"),)


@pytest.mark.slow
def test_an_exported_table_of_rows_is_loaded_as_it_is(tmp_path):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=8)) as engine:
        engine.load_templates(arrow(range(20)))
        jobs.export_gallery(tmp_path / "g", tmp_path / "out")
        with bd.Engine.open(tmp_path / "again", small(seal_rows=8)) as again:
            assert jobs.check_load(small(), tmp_path / "out" / "rows.parquet").refused == ()
            assert jobs.load(again, tmp_path / "out" / "rows.parquet").added == 20
            same_contents(again, engine)
    table = pq.read_table(tmp_path / "out" / "rows.parquet")
    waiting = table.set_column(
        table.schema.get_field_index("state"), "state", pa.array(["waiting"] + ["enrolled"] * 19)
    )
    with bd.Engine.open(tmp_path / "third", small(seal_rows=99)) as third:
        result = jobs.load(third, waiting.to_batches())
        assert (result.added, result.refused_rows) == (19, (0,))
        assert list(result.reasons) == ["state is waiting: it is of a case, and not enrolled"]


@pytest.mark.slow
def test_a_fault_while_columns_are_written_side_by_side_leaves_all_of_a_batch_or_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PIECE_ROWS", 4)  # so that few rows are written by several threads
    rows, config = arrow(range(20, 32)), small(seal_rows=8, merge_fan=9)
    with bd.Engine.open(tmp_path / "before", config) as engine:
        engine.load_templates(arrow(range(12)))  # the rotations are there now
    stored = set()
    for n in itertools.count(1, 7):
        shutil.copytree(tmp_path / "before", tmp_path / f"g{n}")
        countdown = Countdown(10**9)
        with bd.Engine.open(tmp_path / f"g{n}", config, storage=FailingStorage(countdown)) as engine:
            countdown.left = n
            try:
                engine.load_templates(rows)
                passed = countdown.left > 0
            except bd.StorageUnavailable:
                passed = False
            countdown.left = 10**9
            in_memory = len(engine)
        with bd.Engine.open(tmp_path / f"g{n}", config) as engine:
            assert len(engine) == in_memory
            assert engine.problems() == []
            named = {s.entry.number for s in internals(engine).gallery.snapshot().segments}
            files = {int(path.name.partition(".")[0]) for path in (tmp_path / f"g{n}" / "segments").iterdir()}
            assert files == named
            stored.add(len(engine))
        if passed:
            break
    assert stored == {12, 24}


@pytest.mark.slow
def test_two_threads_that_load_the_same_subjects_add_each_once(tmp_path):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=8)) as engine:
        batches = [arrow(range(low, low + 20)) for low in (0, 10, 0, 10)]
        with ThreadPoolExecutor(4) as pool:
            loaded = list(pool.map(engine.load_templates, batches))
        assert sum(one.added for one in loaded) == len(engine) == 30
        assert [one.added + one.present for one in loaded] == [20] * 4
        assert engine.problems() == []
