"""A gallery moves from a folder into PostgreSQL and back, and gives the same answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import biodedup as bd
from biodedup.cluster import moving
from tests.support.shell import run_here as run
from tests.support.vectors import again, people

CONFIG = bd.Config(gallery=bd.GalleryConfig(background=False))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A gallery with a segment, a journal, an update, a removal, groups, a case and a verdict."""
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        vectors = people(30)
        engine.add_templates([f"p{i}" for i in range(20)], {"face": vectors[:20]}, groups=[("north",)] * 20)
        engine.seal()
        for i in range(20, 30):
            engine.enroll(
                bd.Encounter(f"p{i}", templates={"face": vectors[i]}, encounter_id=f"e{i}", groups=("south",))
            )
        engine.update(bd.Encounter("p3", templates={"face": again(vectors[3], 0.9)}, encounter_id="u3"))
        engine.remove("p4")
        for name in ("c1", "c2"):
            engine.dispute(bd.Encounter("p5", templates={"face": people(40)[39]}, encounter_id=name))
        engine.adjudicate("c2", "different", "clerk")
    return tmp_path / "g"


def contents(engine: bd.Engine) -> dict[str, object]:
    probes = [bd.Encounter(templates={"face": again(vector, 0.8)}) for vector in people(30)]
    return {
        "info": engine.info(),
        "subjects": list(engine.subjects()),
        "answers": [engine.identify(probe) for probe in probes],
        "decisions": list(engine.decisions()),
        "verdicts": engine.verdicts(),
        "cases": [(case.encounter_id, case.decision) for case in engine.cases()],
        "policies": engine.policies(),
    }


@pytest.mark.slow
def test_a_register_answers_as_the_folder_it_was_imported_from_and_so_does_its_export(register, folder, tmp_path):
    config = bd.Config(gallery=CONFIG.gallery)
    clock = {"clock": lambda: 7.0}
    with bd.Engine.open(folder, config, **clock) as engine:
        before = contents(engine)
    cluster = bd.ClusterConfig(segments=f"file://{tmp_path}/store")
    moved = moving.import_gallery(folder, register.url, cluster)
    assert (moved.segments, moved.version) == (1, before["info"]["gallery_version"])
    with register(config, **clock) as engine:
        assert contents(engine) == before
        assert engine.problems() == []
        again_sent = bd.Encounter("p25", templates={"face": people(30)[25]}, encounter_id="e25", groups=("south",))
        assert engine.enroll(again_sent) == engine.decision("e25")
    moving.export_gallery(register.url, tmp_path / "back", cluster)
    with bd.Engine.open(tmp_path / "back", config, **clock) as engine:
        assert contents(engine) == before
        assert engine.problems() == []
        assert engine.enroll(bd.Encounter("new", templates={"face": people(50)[49]})).outcome == "unique"


@pytest.mark.slow
def test_a_register_that_is_there_is_not_overwritten_nor_is_a_folder(register, folder, tmp_path):
    cluster = bd.ClusterConfig(segments=f"file://{tmp_path}/store")
    with register() as engine:
        engine.enroll(bd.Encounter("anna", templates={"face": people(1)[0]}))
    with pytest.raises(bd.InvalidInput, match="name another one"):
        moving.import_gallery(folder, register.url, cluster)
    with pytest.raises(bd.InvalidInput, match="not empty"):
        moving.export_gallery(register.url, folder, cluster)
    assert register().subject_ids() == ["anna"]


@pytest.mark.slow
def test_an_import_waits_for_no_writer(register, folder, tmp_path):
    with bd.Engine.open(folder, CONFIG), pytest.raises(bd.GalleryBusy):
        moving.import_gallery(folder, register.url, bd.ClusterConfig(segments=f"file://{tmp_path}/store"))


@pytest.mark.slow
def test_an_import_that_fails_leaves_no_register(register, folder, tmp_path, monkeypatch):
    cluster = bd.ClusterConfig(segments=f"file://{tmp_path}/store")
    with monkeypatch.context() as patched:
        patched.setattr(moving, "_copy_rows", lambda source, target: (_ for _ in ()).throw(OSError("the disk failed")))
        with pytest.raises(bd.StorageUnavailable):
            moving.import_gallery(folder, register.url, cluster)
    moving.import_gallery(folder, register.url, cluster)
    assert len(register(CONFIG)) == 29


def test_a_folder_without_a_gallery_and_a_register_that_is_not_there_are_named(register, tmp_path):
    cluster = bd.ClusterConfig(segments=f"file://{tmp_path}/store")
    with pytest.raises(bd.NotAGallery):
        moving.import_gallery(tmp_path / "none", register.url, cluster)
    with pytest.raises(bd.NotAGallery):
        moving.export_gallery(register.url, tmp_path / "back", cluster)
    assert not (tmp_path / "back").exists()


@pytest.mark.slow
def test_the_commands_move_a_gallery_there_and_back(register, folder, tmp_path):
    store = ["--segments", f"file://{tmp_path}/store"]
    code, out, error = run("gallery", "import", folder, "--to", register.url, *store, "--json", cwd=tmp_path)
    assert (code, json.loads(out)["segments"]) == (0, 1), error
    code, out, error = run("gallery", "export", register.url, "--to", tmp_path / "back", *store, cwd=tmp_path)
    assert code == 0, error
    assert "exported to" in out
    code, _, error = run("gallery", "export", register.url, "--to", tmp_path / "back", *store, cwd=tmp_path)
    assert code == 2, error
    assert "not empty" in error
