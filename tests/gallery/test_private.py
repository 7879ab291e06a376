"""Files on the disk: for their owner alone, none of others touched, and nothing of a removed subject left."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli import app
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.jobs.health import canary_file
from biodedup.jobs.shared.checkpoint import CheckpointFile
from biodedup.testing import internals
from tests.support.galleries import PEOPLE, enroll, nearest, small


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    with bd.Engine.open(tmp_path / "g", small(merge_fan=9)) as engine:
        for i in range(6):
            enroll(engine, i)
        engine.maintain()
        enroll(engine, 6)
    return tmp_path / "g"


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, str]:
    """Of everything in it that group or others have a right to."""
    found = {path: stat.S_IMODE(path.lstat().st_mode) for path in (folder, *folder.rglob("*"))}
    return {str(path): oct(mode) for path, mode in found.items() if mode & 0o077}


def run(*arguments: object) -> int:
    """The exit code of a command."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    return result.exit_code


# private by default ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whatever_is_written_is_for_its_owner_alone(tmp_path, open_umask):
    home = tmp_path / "home"
    with bd.Engine.open(home / "g", small()) as engine:
        for i in range(6):
            enroll(engine, i)
        engine.maintain()
        engine.enroll(
            bd.Encounter(
                "x", templates={"face": (PEOPLE[9] + PEOPLE[10]) / np.float32(np.sqrt(2))}, encounter_id="open"
            )
        )
        engine.compact()
        engine.backup(home / "backup")
        jobs.find_duplicates(engine, home / "out" / "pairs.parquet", threshold_db=0.0)
        with CheckpointFile(home / "job.notes", {"job": 1}) as notes:
            notes.append({"done": 1})
    with jobs.Backlog.open(home / "g") as backlog:
        backlog.announce([], 0.0)
    jobs.examine(home / "g", canaries=True)
    assert modes(home) == {}


@pytest.mark.slow
def test_doctor_reports_what_is_open_to_others_and_repair_closes_it(gallery):
    assert jobs.examine(gallery).exposed == ()
    for path in (gallery, gallery / "gallery.sqlite3", gallery / "segments" / "1.face"):
        path.chmod(0o755)
    (gallery / "notes of the user").touch(0o644)
    (said,) = jobs.examine(gallery).exposed
    assert "3 of its files" in said
    assert f"chmod -R go= {gallery}" in said
    assert run("doctor", "--gallery", gallery) == 0
    with bd.Engine.open(gallery, small(merge_fan=9)) as engine:
        assert nearest(engine, 3) == "s3"  # opens as it is
    report = jobs.examine(gallery, mend=True)
    assert report.exposed == ()
    assert "closed to other users" in report.mended[0]
    assert set(modes(gallery)) == {str(gallery / "notes of the user")}


# files of others ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_backup_into_a_foreign_folder_is_refused_and_deletes_nothing(gallery, tmp_path):
    foreign = tmp_path / "foreign"
    (foreign / "segments").mkdir(parents=True)
    for name in ("thesis.pdf", "1.face.pdf", "12", "0.face", "1.faces"):
        (foreign / "segments" / name).write_bytes(b"mine")
    with bd.Engine.open(gallery, small(merge_fan=9)) as engine:
        with pytest.raises(bd.InvalidInput, match="other files"):
            engine.backup(foreign)
        (foreign / "gallery.sqlite3").write_bytes(b"no database of ours")
        with pytest.raises((bd.NotAGallery, bd.GalleryDamaged)):
            engine.backup(foreign)
        with pytest.raises(bd.InvalidInput, match="gallery itself"):
            engine.backup(gallery)
        with pytest.raises(bd.InvalidInput, match="gallery itself"):
            engine.backup(gallery / "segments" / "b")
    assert len(list((foreign / "segments").iterdir())) == 5
    assert {path.read_bytes() for path in (foreign / "segments").iterdir()} == {b"mine"}


@pytest.mark.slow
def test_only_names_of_our_own_form_are_deleted(gallery, tmp_path):
    kept = ("thesis.pdf", "1.face.pdf", "x.subject", "01.face", "7.face.bak")
    with bd.Engine.open(gallery, small(merge_fan=9)) as engine:
        engine.backup(tmp_path / "b")
    for folder in (gallery, tmp_path / "b"):
        for name in kept:
            (folder / "segments" / name).write_bytes(b"mine")
    with bd.Engine.open(gallery, small(merge_fan=9)) as engine:
        engine.remove("s1")
        engine.compact()
        engine.backup(tmp_path / "b")
    (gallery / "gallery.sqlite3").write_bytes(b"")
    assert jobs.examine(gallery, mend=True, backup=tmp_path / "b").problems == ()
    for folder in (gallery, tmp_path / "b"):
        assert {name for name in kept if (folder / "segments" / name).read_bytes() == b"mine"} == set(kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segments", "writer.lock", "gallery.sqlite3", "gallery.sqlite3-journal"])
def test_a_symbolic_link_in_a_gallery_leads_to_nothing_that_is_written(gallery, tmp_path, name):
    mine = tmp_path / "mine"
    path = gallery / name
    if path.is_dir():
        shutil.move(path, mine)
        (mine / "9.face").write_bytes(b"mine")
    elif name == "gallery.sqlite3":
        shutil.move(path, mine)
    else:
        mine.write_bytes(b"mine" * 10)
        path.unlink(missing_ok=True)
    path.symlink_to(mine)
    before = {p: p.read_bytes() for p in (mine, *mine.rglob("*")) if p.is_file()}
    for write in (
        lambda: bd.Engine.open(gallery, small()).close(),
        lambda: jobs.examine(gallery, mend=True),
    ):
        try:
            write()
        except bd.BiodedupError:
            pass
        assert {p: p.read_bytes() for p in before} == before


@pytest.mark.slow
def test_a_lock_that_is_a_file_of_the_users_is_refused_and_stays(tmp_path, gallery):
    (tmp_path / "letter").write_text("dear aunt")
    for make in (os.link, shutil.copy):
        (gallery / "writer.lock").unlink()
        make(tmp_path / "letter", gallery / "writer.lock")
        with pytest.raises(bd.NotAGallery, match="not a lock"):
            bd.Engine.open(gallery, small())
        assert (tmp_path / "letter").read_text() == (gallery / "writer.lock").read_text() == "dear aunt"


@pytest.mark.slow
def test_a_symlinked_segments_folder_of_a_backup_is_refused(gallery, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.face").write_bytes(b"mine")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "segments").symlink_to(tmp_path / "mine")
    with bd.Engine.open(gallery, small(merge_fan=9)) as engine, pytest.raises(bd.NotAGallery, match="symbolic link"):
        engine.backup(tmp_path / "b")
    assert (tmp_path / "mine" / "1.face").read_bytes() == b"mine"


def test_a_result_in_the_making_does_not_write_through_a_link(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    from biodedup.jobs.shared.files import write_text

    for name in ("r.json.tmp", ".r.new.json"):
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_text("{}", tmp_path / "r.json")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    with pytest.raises(bd.NotAGallery, match="symbolic link"):
        (tmp_path / "r.notes").symlink_to(tmp_path / "mine")
        CheckpointFile(tmp_path / "r.notes", {})
    assert (tmp_path / "mine").read_bytes() == b"mine"


# erasure -----------------------------------------------------------------------------------------------------------


def occurrences(folder: Path, needles: dict[str, bytes]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for name, needle in needles.items():
                if needle in content:
                    found.setdefault(name, []).append(path.name)
    return found


def needle(engine: bd.Engine, i: int) -> dict[str, bytes]:
    """Of a row of the journal, as it is stored there."""
    row = engine.rows_of([f"s{i}"])[0]
    (cell,) = (cell for cell in internals(engine).catalogue.cells() if cell.row == row)
    assert cell.vector is not None
    return {f"s{i}": cell.vector[:64]}


@pytest.mark.slow
def test_of_removed_subjects_nothing_is_left_in_any_file(tmp_path):
    config = small(seal_rows=8, merge_fan=3)
    with bd.Engine.open(tmp_path / "g", config) as engine:
        needles: dict[str, bytes] = {}
        for i in range(40):
            enroll(engine, i)
            needles |= needle(engine, i)
            assert occurrences(tmp_path / "g", needle(engine, i))
            if i in (4, 25):
                engine.remove(f"s{i}")
                assert occurrences(tmp_path / "g", {"": needles[f"s{i}"]}) == {}, "at once, while it is in the journal"
            if i % 10 == 9:
                engine.maintain()
        for i in (i for i in range(0, 40, 2) if i != 4):
            engine.remove(f"s{i}")
        engine.enroll(bd.Encounter("x", templates={"face": PEOPLE[41]}))
        codes = {f"codes of s{i}": codes_of(engine, i) for i in (0, 2)}
        assert occurrences(tmp_path / "g", codes)
        engine.compact()
        gone = {**needles, **codes}
        assert occurrences(tmp_path / "g", gone) == {}
    with bd.Engine.open(tmp_path / "g", config) as engine:
        engine.backup(tmp_path / "b")
        assert engine.problems() == []
    assert occurrences(tmp_path, gone) == {}


def codes_of(engine: bd.Engine, i: int) -> bytes:
    """The low nibbles of a sealed row's codes, as they lie in a file."""
    snapshot = internals(engine).gallery.snapshot()
    for part in snapshot.parts[:-1]:
        positions = [p for p in range(part.count) if part.subject_ids_at(np.array([p])) == [f"s{i}"]]
        if positions:
            return part.columns["face"]._rest.read("rest")[positions[0]].tobytes()
    raise AssertionError(i)


def test_the_templates_of_a_closed_case_are_erased(tmp_path):
    with bd.Engine.open(tmp_path / "g", bd.Config(policy=bd.Policy(duplicate_db=60, review_db=10))) as engine:
        enroll(engine, 0)
        between = (0.45 * PEOPLE[0] + np.sqrt(1 - 0.45**2) * PEOPLE[20]).astype(np.float32)
        decision = engine.enroll(bd.Encounter("y", templates={"face": between}, encounter_id="case"))
        assert decision.outcome == "review"
        held = internals(engine).gallery.case("case").templates["face"].embedding.astype("<f4").tobytes()[:64]
        assert occurrences(tmp_path / "g", {"held": held})
        engine.adjudicate("case", "recapture", "judge")
        assert occurrences(tmp_path / "g", {"held": held}) == {}


def test_what_a_killed_writer_left_in_the_journal_is_wiped_by_the_next(tmp_path, monkeypatch):

    def refuse(self, path):
        raise OSError(5, "input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(LocalStorage, "wipe", refuse)
        with bd.Engine.open(tmp_path / "g", small(seal_rows=50)) as engine:
            for i in range(8):
                enroll(engine, i)
            removed = needle(engine, 3)
            engine.remove("s3")
        assert occurrences(tmp_path / "g", removed) == {"s3": ["gallery.sqlite3-journal"]}
    bd.Engine.open(tmp_path / "g", small(seal_rows=50)).close()
    assert occurrences(tmp_path / "g", removed) == {}


@pytest.mark.slow
def test_compacting_erases_the_canaries_of_removed_subjects(tmp_path):
    with bd.Engine.open(tmp_path / "g", small(seal_rows=50)) as engine:
        for i in range(12):
            enroll(engine, i)
    jobs.examine(tmp_path / "g", canaries=True)
    canary = canary_file.load(LocalStorage(), tmp_path / "g").each[0]
    needle = {"canary": canary.mates["face"].embedding.astype("<f4").tobytes()[:64]}
    assert occurrences(tmp_path / "g", needle) == {"canary": ["sentinels"]}
    with bd.Engine.open(tmp_path / "g", small(seal_rows=50)) as engine:
        engine.remove(canary.subject_id)
    assert run("compact", "--gallery", tmp_path / "g") == 0
    assert occurrences(tmp_path / "g", needle) == {}
