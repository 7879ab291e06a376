"""Minutiae that are sealed by a key of their row: read as before, and not to be read from a backup once the row was removed."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.gallery import transaction as transactions
from biodedup.gallery.files.encryption import subject_keys
from biodedup.gallery.files.encryption.subject_keys import SubjectKeys
from biodedup.testing import internals
from biodedup.values import COLUMNS
from tests.support.galleries import PEOPLE
from tests.support.minutiae import record, strewn
from tests.support.vectors import SFACE

KEY = bytes(range(1, 33))
FINGER = bd.Extractor(bd.Config()).model_ids["finger"]
RECORDS = [record(strewn(40, seed=i)) for i in range(8)]
BODIES = [one[30:] for one in RECORDS]
"""Without the head, which says the finger's position once it is stored."""


def config(tmp_path: Path, *, keys: bool = True, encrypted: bool = False) -> bd.Config:
    return bd.Config(
        gallery=bd.GalleryConfig(seal_rows=1000, background=False),
        keys=(lambda: KEY) if encrypted else None,
        subject_keys=tmp_path / "keys" if keys else None,
    )


def enroll(engine: bd.Engine, i: int) -> bd.Decision:
    """Each person has a face and another finger, so that no two resemble each other."""
    templates = {
        "face": bd.Template("face", SFACE, PEOPLE[i]),
        COLUMNS[i + 1]: bd.Template(COLUMNS[i + 1], FINGER, minutiae=RECORDS[i]),
    }
    return engine.enroll(bd.Encounter(f"s{i}", templates=templates, encounter_id=f"e{i}"))


def held(engine: bd.Engine, i: int, column: str = "") -> bytes | None:
    found = engine.templates(f"s{i}").get(column or COLUMNS[i + 1])
    return None if found is None else found.minutiae[30:]


def bytes_in(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def body(i: int) -> bytes:
    return RECORDS[i][40:100]


@pytest.mark.parametrize("encrypted", [False, True], ids=["clear", "encrypted"])
@pytest.mark.parametrize("sealed", [False, True], ids=["journal", "segment"])
def test_a_backup_from_before_a_removal_does_not_yield_the_minutiae_and_does_all_others(tmp_path, encrypted, sealed):
    settings = config(tmp_path, encrypted=encrypted)
    with bd.Engine.open(tmp_path / "g", settings) as engine:
        for i in range(4):
            enroll(engine, i)
        if sealed:
            engine.seal()
        assert [held(engine, i) for i in range(4)] == BODIES[:4]
        engine.backup(tmp_path / "copy")
        engine.remove("s1")
    assert not any(body(i) in bytes_in(tmp_path / "copy") for i in range(4)), "no record is in the clear"
    with bd.Engine.open(tmp_path / "copy", settings) as engine:
        assert [held(engine, i) for i in (0, 2, 3)] == [BODIES[0], BODIES[2], BODIES[3]]
        assert held(engine, 1) is None
        assert np.allclose(engine.templates("s1")["face"].embedding, PEOPLE[1], atol=0.01)  # embeddings are not erased


def test_searches_and_decisions_are_those_of_a_gallery_without_such_keys(tmp_path):
    found = []
    for keys in (False, True):
        settings = config(tmp_path, keys=keys)
        with bd.Engine.open(tmp_path / f"g{keys}", settings) as engine:
            decisions = [enroll(engine, i) for i in range(4)]
            engine.seal()
            probe = bd.Encounter(templates={COLUMNS[3]: bd.Template(COLUMNS[3], FINGER, minutiae=RECORDS[2])})
            verified = engine.verify(probe, "s2")
            found.append(([decision.outcome for decision in decisions], verified.accepted, verified.score_db))
            engine.compact()
            assert engine.problems() == [] and [held(engine, i) for i in range(4)] == BODIES[:4]
    assert found[0] == found[1]


@pytest.mark.parametrize("many", [2, 6], ids=["journal", "segment"])
def test_what_is_loaded_without_a_search_is_sealed_as_well(tmp_path, many):
    settings = bd.Config(gallery=bd.GalleryConfig(seal_rows=4, background=False), subject_keys=tmp_path / "keys")
    with bd.Engine.open(tmp_path / "g", settings) as engine:
        names = [f"s{i}" for i in range(many)]
        engine.load_templates(names, {"right_index": RECORDS[:many]}, model_id=FINGER)
        assert [held(engine, i, "right_index") for i in range(many)] == BODIES[:many]
        engine.seal()
        engine.backup(tmp_path / "copy")
        engine.remove("s0")
        assert held(engine, 1, "right_index") == BODIES[1]
    assert not any(body(i) in bytes_in(tmp_path / "g") + bytes_in(tmp_path / "copy") for i in range(many))
    with bd.Engine.open(tmp_path / "copy", settings) as engine:
        assert engine.templates("s0") == {} and held(engine, 1, "right_index") == BODIES[1]


def test_keys_of_a_removal_that_a_crash_interrupted_are_destroyed_at_the_next_opening(tmp_path, monkeypatch):
    settings = config(tmp_path)
    with bd.Engine.open(tmp_path / "g", settings) as engine:
        enroll(engine, 0)
        enroll(engine, 1)
        engine.backup(tmp_path / "copy")
        with monkeypatch.context() as patched:
            patched.setattr(transactions, "destroy_doomed", lambda keys, slots: None)
            engine.remove("s1")
    with bd.Engine.open(tmp_path / "copy", settings, read_only=True) as engine:
        assert held(engine, 1) == BODIES[1]
    with bd.Engine.open(tmp_path / "g", settings):
        pass
    with bd.Engine.open(tmp_path / "copy", settings, read_only=True) as engine:
        assert held(engine, 1) is None and held(engine, 0) == BODIES[0]


def test_a_removal_that_was_not_committed_destroys_nothing(tmp_path):
    settings = config(tmp_path)
    with bd.Engine.open(tmp_path / "g", settings) as engine:
        enroll(engine, 0)
        with pytest.raises(KeyError), internals(engine).gallery.transaction() as transaction:
            transaction.remove("s0")
            raise KeyError
        assert held(engine, 0) == BODIES[0]
    with bd.Engine.open(tmp_path / "g", settings) as engine:
        assert held(engine, 0) == BODIES[0]


def test_without_the_folder_of_keys_the_gallery_does_not_open(tmp_path):
    with bd.Engine.open(tmp_path / "g", config(tmp_path)) as engine:
        enroll(engine, 0)
    for read_only in (False, True):
        with pytest.raises(bd.KeyMismatch, match="subject_keys"):
            bd.Engine.open(tmp_path / "g", config(tmp_path, keys=False), read_only=read_only)
    shutil.rmtree(tmp_path / "keys")
    with pytest.raises(bd.GalleryDamaged, match="is missing"):
        bd.Engine.open(tmp_path / "g", config(tmp_path))


def test_a_merge_of_sealed_minutiae_is_refused(tmp_path):
    settings = config(tmp_path)
    with bd.Engine.open(tmp_path / "g", settings) as engine:
        enroll(engine, 0)
    for known in (settings, config(tmp_path, keys=False)):
        with pytest.raises((bd.InvalidInput, bd.KeyMismatch), match="sealed"):
            jobs.merge([tmp_path / "g"], tmp_path / "m.parquet", into=tmp_path / "centre", config=known)


def test_keys_in_the_gallery_itself_are_refused(tmp_path):
    with pytest.raises(bd.InvalidInput, match="in the gallery itself"):
        bd.Engine.open(tmp_path / "g", bd.Config(subject_keys=tmp_path / "g" / "keys"))


def test_a_gallery_that_begins_late_keeps_what_it_has_and_seals_what_comes(tmp_path):
    with bd.Engine.open(tmp_path / "g", config(tmp_path, keys=False)) as engine:
        enroll(engine, 0)
    with bd.Engine.open(tmp_path / "g", config(tmp_path)) as engine:
        enroll(engine, 1)
        assert [held(engine, i) for i in range(2)] == BODIES[:2]
    content = bytes_in(tmp_path / "g")
    assert body(0) in content and body(1) not in content


def test_an_export_has_the_minutiae_of_whom_it_has(tmp_path):
    settings = config(tmp_path)
    with bd.Engine.open(tmp_path / "g", settings) as engine:
        enroll(engine, 0)
    jobs.export_gallery(tmp_path / "g", tmp_path / "out", settings)
    plain = config(tmp_path, keys=False)
    jobs.load_gallery(tmp_path / "out", tmp_path / "again", plain)
    with bd.Engine.open(tmp_path / "again", plain) as engine:
        assert held(engine, 0) == BODIES[0]


@pytest.mark.parametrize("sealed", [False, True], ids=["journal", "segment"])
def test_an_export_that_is_loaded_with_keys_is_sealed_by_new_ones(tmp_path, sealed):
    with bd.Engine.open(tmp_path / "g", config(tmp_path, keys=False)) as engine:
        for i in range(3):
            enroll(engine, i)
        if sealed:
            engine.seal()
    jobs.export_gallery(tmp_path / "g", tmp_path / "out")
    settings = config(tmp_path)
    jobs.load_gallery(tmp_path / "out", tmp_path / "again", settings)
    assert not any(body(i) in bytes_in(tmp_path / "again") for i in range(3)), "no record is in the clear"
    with pytest.raises(bd.KeyMismatch):
        bd.Engine.open(tmp_path / "again", config(tmp_path, keys=False))
    with bd.Engine.open(tmp_path / "again", settings) as engine:
        assert [held(engine, i) for i in range(3)] == BODIES[:3]
        engine.backup(tmp_path / "copy")
        engine.remove("s1")
        assert engine.problems() == []
    with bd.Engine.open(tmp_path / "copy", settings, read_only=True) as engine:
        assert [held(engine, i) for i in range(3)] == [BODIES[0], None, BODIES[2]]
    with pytest.raises(bd.InvalidInput, match="in the gallery itself"):
        inside = bd.Config(subject_keys=tmp_path / "other" / "keys")
        jobs.load_gallery(tmp_path / "out", tmp_path / "other", inside)


@pytest.mark.parametrize("sealed", [False, True], ids=["journal", "segment"])
def test_doctor_names_keys_that_were_overwritten_swapped_or_cut(tmp_path, sealed):
    settings = config(tmp_path)
    with bd.Engine.open(tmp_path / "g", settings) as engine:
        for i in range(3):
            enroll(engine, i)
        engine.remove("s0")
        if sealed:
            engine.seal()
    (file,) = (tmp_path / "keys").glob("*.keys")
    sound = file.read_bytes()

    def told() -> tuple[tuple[str, ...], tuple[str, ...]]:
        report = jobs.examine(tmp_path / "g", settings)
        return report.problems, report.notes

    assert told() == ((), ())
    file.write_bytes(sound[:64] + bytes(32) + sound[96:])
    assert told()[0] == () and "of 1 enrolled row (the first: subject 's1') are destroyed" in told()[1][0]
    file.write_bytes(sound[:64] + sound[96:128] + sound[64:96])
    assert "minutiae of 2 enrolled rows (the first: subject 's1') do not open" in told()[0][0]
    file.write_bytes(sound[:96])
    assert "minutiae of 1 enrolled row (the first: subject 's2') do not open" in told()[0][0]


def test_two_openings_of_one_file_of_keys_never_take_one_slot(tmp_path, monkeypatch):
    def slowly(count: int) -> bytes:
        time.sleep(0.002)
        return os.urandom(count)

    monkeypatch.setattr(subject_keys.secrets, "token_bytes", slowly)
    both = [SubjectKeys(tmp_path, "g", read_only=False, new=True) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(lambda i: list(both[i % 2].allocate(3)), range(20)))
    slots = [slot for some in taken for slot in some]
    assert len(slots) == len(set(slots)) == 60
    for keys in both:
        keys.close()


def test_a_record_is_bound_to_its_slot_and_column(tmp_path):
    keys = SubjectKeys(tmp_path, "g", read_only=False, new=True)
    one, two = keys.allocate(2)
    sealed = keys.seal(one, 3, b"FMR one")
    assert keys.opened(3, [sealed, b"FMR plain", b""]) == [b"FMR one", b"FMR plain", b""]
    moved = sealed[:4] + two.to_bytes(8, "little") + sealed[12:]
    for column, wrong in ((4, sealed), (3, moved), (3, sealed[:-1] + b"x")):
        with pytest.raises(bd.GalleryDamaged, match="do not open"):
            keys.opened(column, [wrong])
    keys.destroy([one])
    assert keys.opened(3, [sealed]) == [b""]
    assert (tmp_path / "g.keys").stat().st_mode & 0o777 == 0o600
    keys.close()
