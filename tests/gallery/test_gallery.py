"""The gallery as a storage engine: sealing, merging, look-ups, groups, readers, loading."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup import jobs
from biodedup.capture.minutiae.record import MinutiaeRecord, write_record
from biodedup.gallery.files import packed
from biodedup.gallery.files.codec import make_codec
from biodedup.gallery.files.codes import dequantise, low_nibbles, quantise
from biodedup.gallery.segments.compaction import due
from biodedup.testing import internals
from tests.support.galleries import PEOPLE, enroll, nearest, small
from tests.support.vectors import SFACE, again, people

# against a model -------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["enroll", "add", "remove", "update", "seal", "compact", "reopen"]),
        st.integers(0, 15),
        st.sampled_from([(), ("north",), ("north", "south")]),
    ),
    max_size=25,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_is_done_in_whatever_order_the_gallery_holds_what_a_dictionary_would(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("g") / "g"
    model: dict[str, tuple[int, tuple[str, ...]]] = {}  # subject_id -> (its person, its groups)
    engine = bd.Engine.open(folder, small())
    try:
        for step, (operation, i, groups) in enumerate(steps):
            name = f"s{i}"
            taken = {person for person, _ in model.values()}
            match operation:
                case "enroll" if name not in model:
                    encounter = bd.Encounter(name, templates={"face": PEOPLE[i]}, groups=groups)
                    expected = "duplicate" if i in taken else "unique"
                    assert engine.enroll(encounter).outcome == expected
                    if expected == "unique":
                        model[name] = (i, groups)
                case "add" if name not in model and i not in taken:
                    engine.add_templates([name], {"face": PEOPLE[i : i + 1]}, groups=[groups])
                    model[name] = (i, groups)
                case "remove" if name in model:
                    engine.remove(name)
                    del model[name]
                case "update" if name in model:
                    person = 16 + step
                    encounter = bd.Encounter(name, templates={"face": PEOPLE[person]}, groups=groups)
                    engine.update(encounter, replace=True, reason="a test")
                    model[name] = (person, groups)
                case "seal":
                    engine.maintain()
                case "compact":
                    engine.compact()
                case "reopen":
                    engine.close()
                    engine = bd.Engine.open(folder, small())
        assert sorted(engine.subject_ids()) == sorted(model)
        assert len(engine) == len(model)
        assert engine.problems() == []
        if model:
            persons = [person for person, _ in model.values()]
            ids, similarity = engine.search({"face": PEOPLE[persons]}, k=1)
            assert list(ids[:, 0]) == list(model)
            assert (similarity > 0.999).all()
            in_north = {name for name, (_, groups) in model.items() if "north" in groups}
            found = engine.search({"face": PEOPLE[:1]}, k=40, groups=["north"]).ids[0]
            assert set(found) - {""} == in_north
    finally:
        engine.close()


# segments --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sealed_and_merged_rows_answer_as_before(tmp_path):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=8)) as engine:
        for i in range(40):
            assert enroll(engine, i).outcome == "unique"
            if i % 8 == 7:
                engine.maintain()
        assert 1 <= engine.info()["segments"] <= 4
        decisions = [engine.decision(f"e{i}") for i in range(40)]
        engine.compact()
        assert engine.info()["segments"] == 1
        assert [engine.decision(f"e{i}") for i in range(40)] == decisions
        assert [nearest(engine, i) for i in range(40)] == [f"s{i}" for i in range(40)]
        assert enroll(engine, 3) == decisions[3]
        duplicate = engine.enroll(bd.Encounter("other", templates={"face": again(PEOPLE[3], 0.9)}))
        assert (duplicate.outcome, duplicate.best.subject_id) == ("duplicate", "s3")
        assert engine.info()["encounters"] == {"duplicate": 1, "unique": 40}
        assert engine.info()["columns"]["face"]["subjects"] == 40


@pytest.mark.slow
def test_fingers_and_quality_survive_sealing(tmp_path):
    record = write_record(MinutiaeRecord(100, 100, bytes([64, 10, 0, 20, 7, 50]) * 3), 2, 50)
    templates = {
        "face": bd.Template("face", "external-128", PEOPLE[0], quality=0.75),
        "right_index": bd.Template("right_index", bd.Extractor(bd.Config()).model_ids["finger"], minutiae=record),
    }
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        engine.enroll(bd.Encounter("s0", templates=templates))
        engine.add_templates(["s1", "s2"], {"face": PEOPLE[1:3]})
        engine.compact()
        stored = internals(engine).gallery.snapshot().templates(0)
        assert stored["right_index"].minutiae == record
        assert stored["face"].quality == pytest.approx(0.75)
        assert np.allclose(stored["face"].embedding, PEOPLE[0], atol=0.003)
        assert engine.info()["columns"]["right_index"]["subjects"] == 1
        assert engine.problems() == []


@pytest.mark.slow
def test_removed_templates_are_gone_from_the_disk_after_compaction(tmp_path):
    folder = tmp_path / "g"
    codes, _ = make_codec(PEOPLE.shape[1], []).encode(PEOPLE[2:3])
    code = low_nibbles(codes, codes.shape[1])
    with bd.Engine.open(folder, small()) as engine:
        engine.add_templates([f"s{i}" for i in range(8)], {"face": PEOPLE[:8]})
        engine.remove("s2")
        assert "s2" not in engine
        assert nearest(engine, 2) != "s2"
        assert any(code.tobytes() in file.read_bytes() for file in folder.rglob("*.face.rest"))
        engine.compact()
        assert len(engine) == 7
    for file in folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert code.tobytes() not in content, file.name
        assert PEOPLE[2].tobytes() not in content, file.name


@pytest.mark.slow
def test_a_removed_subject_can_be_enrolled_again_and_removed_again(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        for round_ in range(5):
            assert engine.enroll(bd.Encounter("s", templates={"face": PEOPLE[round_]})).outcome == "unique"
            engine.maintain()
            assert nearest(engine, round_) == "s"
            engine.remove("s")
            with pytest.raises(bd.UnknownSubject):
                engine.remove("s")
        assert len(engine) == 0


@pytest.mark.slow
def test_opening_reads_no_column(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        engine.add_templates([f"s{i}" for i in range(64)], {"face": PEOPLE})
    with bd.Engine.open(tmp_path / "g", small(), read_only=True) as engine:
        (part, _) = internals(engine).gallery.snapshot().parts
        assert not any(file._checked.any() for file in part.files.values())
        assert nearest(engine, 5) == "s5"
        assert part.files["face"]._checked.all()


@pytest.mark.slow
def test_enrolments_searches_and_background_merges_go_on_together(tmp_path):
    vectors = people(400, seed=9)
    failures: list[str] = []
    sealing = bd.GalleryConfig(seal_rows=16, merge_fan=3)
    strict = bd.Policy(duplicate_db=85, review_db=85)  # of 80,000 non-mated pairs none is a false match
    with bd.Engine.open(tmp_path / "g", bd.Config(gallery=sealing, policy=strict)) as engine:
        stop = threading.Event()

        def look() -> None:
            while not stop.is_set():
                size = len(engine)
                i = size // 8 * 4  # of thread 0: about half of its own so far
                known = f"s{i}" in engine  # before the search: it may be enrolled in between
                ids, _ = engine.search({"face": vectors[i : i + 1]}, k=1)
                if known and ids[0, 0] != f"s{i}":
                    failures.append(f"s{i} was not found among {size}")

        def work(thread: int) -> None:
            for i in range(thread, 400, 4):
                decision = engine.enroll(bd.Encounter(f"s{i}", templates={"face": vectors[i]}, encounter_id=f"e{i}"))
                if decision.outcome != "unique":
                    failures.append(f"s{i} came out {decision.outcome}")

        threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
        watcher = threading.Thread(target=look)
        for thread in [watcher, *threads]:
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        watcher.join()
        assert failures == []
        assert engine.info()["segments"] >= 1
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        assert engine.problems() == []
        assert sorted(engine.subject_ids()) == sorted(f"s{i}" for i in range(400))
        ids, _ = engine.search({"face": vectors}, k=1)
        assert list(ids[:, 0]) == [f"s{i}" for i in range(400)]


def test_a_batch_is_one_commit_and_waiting_threads_share_one(tmp_path):
    with bd.Engine.open(tmp_path / "g", bd.Config(batch_size=16)) as engine:
        before = internals(engine).commits
        assert (
            len(list(engine.enroll_many([bd.Encounter(f"s{i}", templates={"face": PEOPLE[i]}) for i in range(16)])))
            == 16
        )
        assert internals(engine).commits == before + 1
        threads = [threading.Thread(target=enroll, args=(engine, i)) for i in range(16, 32)]
        with internals(engine).gallery.lock:  # all of them come to the lock before one gets it
            for thread in threads:
                thread.start()
            while len(internals(engine).enrolment._waiting) < 16:
                pass
        for thread in threads:
            thread.join()
        assert internals(engine).commits == before + 2
        assert len(engine) == 32


@given(st.lists(st.integers(1, 5000), max_size=60), st.integers(1, 100), st.integers(2, 9))
def test_merging_ends_with_few_segments_and_rewrites_neighbours_only(counts, seal_rows, fan):
    steps = 0
    while (run := due(counts, [0] * len(counts), seal_rows, fan, 1 << 24)) is not None:
        assert run.stop - run.start >= fan
        counts[run] = [sum(counts[run])]
        steps += 1
    assert steps <= 60
    levels = 1 + np.log(max(sum(counts) / seal_rows, 1)) / np.log(fan)
    assert len(counts) <= (levels + 1) * fan


def test_a_segment_with_many_removed_rows_is_written_anew():
    assert due([100, 100], [0, 26], 10, 8, 1000) == slice(1, 2)
    assert due([100, 100], [0, 25], 10, 8, 1000) is None


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 20), st.integers(2, 9), st.integers(100, 2000))
def test_no_merged_segment_is_larger_than_allowed(counts, seal_rows, fan, rows_max):
    while (run := due(counts, [0] * len(counts), seal_rows, fan, rows_max)) is not None:
        assert run.stop - run.start >= 2
        assert sum(counts[run]) <= rows_max
        counts[run] = [sum(counts[run])]


# codes and look-ups ----------------------------------------------------------------------------------------------


@given(st.integers(1, 600), st.integers(0, 2**32 - 1))
def test_eight_bit_codes_are_unit_vectors_close_to_what_they_stand_for(dimension, seed):
    vectors = people(5, seed=seed, dimension=dimension)
    decoded = dequantise(*quantise(vectors))
    assert np.allclose(np.linalg.norm(decoded, axis=1), 1, atol=1e-5)
    assert (np.sum(decoded * vectors, axis=1) > 0.9995).all()


@pytest.mark.slow
@given(st.lists(st.text(max_size=40)))
def test_the_hash_of_one_string_is_that_of_many(strings):
    assert packed.hashes(packed.pack_text(strings)).tolist() == [int(packed.hash_of(s)) for s in strings]


def test_hashes_of_similar_ids_differ():
    ids = [f"{prefix}{i:012d}" for prefix in ("", "a", "aaaaaaaa") for i in range(20000)]
    assert len(np.unique(packed.hashes(packed.pack_text(ids)))) == len(ids)


@pytest.mark.slow
def test_look_ups_compare_the_strings_when_all_hashes_are_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "hashes", lambda strings: np.full(len(strings), 7, np.uint64))
    monkeypatch.setattr("biodedup.gallery.segments.tail.hashes", packed.hashes)
    monkeypatch.setattr(packed, "hash_of", lambda string: np.uint64(7))
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        for i in range(8):
            enroll(engine, i)
        engine.maintain()
        assert [f"s{i}" in engine for i in range(10)] == [True] * 8 + [False] * 2
        assert [engine.decision(f"e{i}") is not None for i in range(10)] == [True] * 8 + [False] * 2
        result = engine.load_templates([f"s{i}" for i in range(5, 10)], {"face": PEOPLE[5:10]})
        assert (result.added, result.present, result.conflicting) == (2, 3, ())


# groups and updates ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_restricted_to_groups_sees_only_their_subjects(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        engine.add_templates(
            [f"s{i}" for i in range(12)], {"face": PEOPLE[:12]}, groups=[["a"] if i % 2 else [] for i in range(12)]
        )
        enroll(engine, 12, groups=["a", "b"])
        assert nearest(engine, 3, groups=["a"]) == "s3"
        assert nearest(engine, 4, groups=["a"]) != "s4"
        assert nearest(engine, 4) == "s4"
        assert set(engine.search({"face": PEOPLE[:1]}, k=20, groups=["b"]).ids[0]) == {"s12", ""}
        assert set(engine.search({"face": PEOPLE[:1]}, k=5, groups=["nowhere"]).ids[0]) == {""}
        probe = bd.Encounter(templates={"face": again(PEOPLE[4], 0.9)})
        assert engine.identify(probe).outcome == "duplicate"
        assert engine.identify(probe, groups=["a"]).outcome == "unique"
        assert engine.info()["groups"] == ["a", "b"]
        engine.compact()
        assert nearest(engine, 12, groups=["b"]) == "s12"
        with pytest.raises(bd.InvalidInput, match="groups is a sequence"):
            engine.search({"face": PEOPLE[:1]}, groups="a")


@pytest.mark.slow
def test_an_update_that_says_why_replaces_the_subjects_templates(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        engine.add_templates([f"s{i}" for i in range(6)], {"face": PEOPLE[:6]})
        encounter = bd.Encounter("s2", templates={"face": PEOPLE[20]}, encounter_id="u", groups=["moved"])
        decision = engine.update(encounter, replace=True, reason="a wrong face")
        assert decision.outcome == "unique"
        assert all(candidate.subject_id != "s2" for candidate in decision.candidates)
        assert (len(engine), nearest(engine, 20)) == (6, "s2")
        assert engine.search({"face": PEOPLE[2:3]}, k=1).similarity[0, 0] < 0.5
        assert nearest(engine, 20, groups=["moved"]) == "s2"
        version = engine.gallery_version
        assert engine.update(encounter, replace=True, reason="a wrong face") == decision
        assert engine.gallery_version == version
        with pytest.raises(bd.EncounterConflict):
            engine.update(encounter)
        with pytest.raises(bd.EncounterConflict):
            engine.enroll(encounter)


@pytest.mark.slow
def test_an_update_with_another_subjects_templates_changes_nothing(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        engine.add_templates([f"s{i}" for i in range(6)], {"face": PEOPLE[:6]})
        decision = engine.update(bd.Encounter("s2", templates={"face": again(PEOPLE[4], 0.9)}))
        assert (decision.outcome, decision.best.subject_id) == ("duplicate", "s4")
        assert nearest(engine, 2) == "s2"
        with pytest.raises(bd.UnknownSubject, match="nothing to update"):
            engine.update(bd.Encounter("nobody", templates={"face": PEOPLE[30]}))


# readers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reader_keeps_its_version_while_the_writer_seals_merges_and_removes(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as writer:
        for i in range(6):
            enroll(writer, i)
        writer.maintain()
        with bd.Engine.open(tmp_path / "g", small(), read_only=True) as reader:
            version = reader.gallery_version
            for i in range(6, 12):
                enroll(writer, i)
            writer.remove("s1")
            writer.compact()
            assert (reader.gallery_version, len(reader), nearest(reader, 1)) == (version, 6, "s1")
            assert reader.decision("e5") is not None
            assert reader.decision("e7") is None
            assert reader.refresh() == writer.gallery_version
            assert (len(reader), nearest(reader, 1) == "s1", nearest(reader, 7)) == (11, False, "s7")
            assert reader.decision("e7") is not None
            with pytest.raises(bd.InvalidInput, match="read_only"):
                reader.remove("s3")


@pytest.mark.slow
def test_a_second_writer_is_refused_with_the_holders_name(tmp_path):
    bd.Engine.open(tmp_path / "g").close()
    script = "import sys, biodedup as bd\ne = bd.Engine.open(sys.argv[1])\nprint('open', flush=True)\nsys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "g")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(bd.GalleryBusy, match=f"process {holder.pid}"):
        bd.Engine.open(tmp_path / "g")
    bd.Engine.open(tmp_path / "g", read_only=True).close()
    holder.communicate("")
    bd.Engine.open(tmp_path / "g").close()


# bulk load -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_templates_are_loaded_from_parquet_arrow_numpy_and_streams(tmp_path):
    ids = [f"s{i}" for i in range(64)]
    table = pa.table(
        {"subject_id": ids, "face": PEOPLE.tolist(), "groups": [["a"] if i % 2 else None for i in range(64)]}
    )
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    with pa.ipc.new_stream(tmp_path / "t.ipc", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    np.save(tmp_path / "t.npy", PEOPLE)
    np.save(tmp_path / "ids.npy", np.array(ids))
    (tmp_path / "ids.txt").write_text("\n".join(ids))
    sources = {
        "parquet": (tmp_path / "t.parquet", None), "arrow": (tmp_path / "t.arrow", None), "stream": (tmp_path / "t.ipc", None),
        "batches": (table.to_batches(max_chunksize=9), None), "npy": (tmp_path / "t.npy", tmp_path / "ids.npy"),
        "text": (tmp_path / "t.npy", tmp_path / "ids.txt"),
    }  # fmt: skip
    for name, (source, names) in sources.items():
        with bd.Engine.open(tmp_path / name, small(seal_rows=20)) as engine:
            result = jobs.load(engine, source, ids=names, batch_rows=25)
            assert (result.added, result.refused) == (64, 0), name
            assert engine.subject_ids() == ids
            assert [nearest(engine, i) for i in (0, 30, 63)] == ["s0", "s30", "s63"]
            if name not in ("npy", "text"):
                assert nearest(engine, 5, groups=["a"]) == "s5"
    done = subprocess.run(
        [sys.executable, "-m", "biodedup.cli", "load", "-", "-g", tmp_path / "piped", "--model-id", SFACE],
        input=(tmp_path / "t.ipc").read_bytes(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    with bd.Engine.open(tmp_path / "piped", read_only=True) as engine:
        assert engine.subject_ids() == ids


@pytest.mark.slow
def test_a_load_is_idempotent_whatever_the_batches_and_distinguishes_other_templates(tmp_path):
    table = pa.table({"subject_id": [f"s{i}" for i in range(40)], "face": PEOPLE[:40].tolist()})
    with bd.Engine.open(tmp_path / "g", small(seal_rows=8)) as engine:
        assert jobs.load(engine, table.slice(0, 30).to_batches(), batch_rows=10).added == 30
        version = engine.gallery_version
        again_ = jobs.load(engine, table.slice(0, 30).to_batches(), batch_rows=10)
        assert (again_.added, again_.present, engine.gallery_version) == (0, 30, version)
        result = jobs.load(engine, table.to_batches(), batch_rows=7)
        assert (result.added, result.present, result.refused) == (10, 30, 0)
        engine.remove("s3")
        other = pa.table({"subject_id": ["s1", "s3", "s1", "", None], "face": PEOPLE[[50, 51, 52, 53, 54]].tolist()})
        result = jobs.load(engine, other.to_batches())
        assert (result.added, result.refused_rows) == (1, (0, 2, 3, 4))
        assert result.reasons == {
            "enrolled with other templates": 1, "subject_id is not usable: it is empty": 2, "subject_id is repeated": 1,
        }  # fmt: skip
        assert (nearest(engine, 1), nearest(engine, 51), len(engine)) == ("s1", "s3", 40)


@pytest.mark.slow
def test_a_bulk_write_that_meets_an_enrolled_subject_leaves_nothing_behind(tmp_path):
    with bd.Engine.open(tmp_path / "g", small()) as engine:
        enroll(engine, 9)
        with pytest.raises(bd.SubjectExists, match="s9"):
            engine.add_templates([f"s{i}" for i in range(5, 12)], {"face": PEOPLE[5:12]})
        assert engine.subject_ids() == ["s9"]
        assert list((tmp_path / "g" / "segments").iterdir()) == []
