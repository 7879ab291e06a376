"""The public face: names, errors, and the README's example."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup import errors
from biodedup.synthetic import draw_impression, draw_master

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_public_names_are_pinned():
    assert sorted(bd.__all__) == sorted(
        """
        COLUMNS FINGER_POSITIONS BiodedupError CallerError Candidate CaptureConfig CaptureUnavailable Case Cluster Config DataDamaged Decision
        Encounter EncounterConflict EnrolledEncounter Engine EngineClosed Evidence Extractor Face FaceConfig Finger FingerConfig GalleryBusy GalleryConfig
        GalleryDamaged InvalidInput IsolationConfig Link Missing ModelCardError ModelMismatch NotAGallery OutOfMemory Policy PolicyMismatch PolicyVersion Refusal RetryableError
        Score SearchConfig SearchResult StorageUnavailable SubjectExists Template Trace UnknownSubject Verdict Verification __version__
        compare explain read_minutiae write_minutiae
        """.split()
    )
    assert all(hasattr(bd, name) for name in bd.__all__)


def test_every_exception_lies_on_one_of_three_branches():
    branches = (bd.CallerError, bd.RetryableError, bd.DataDamaged)
    defined = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(defined) > 10
    for error in defined:
        assert error is bd.BiodedupError or sum(issubclass(error, branch) for branch in branches) == 1


def test_settings_are_frozen_and_checked():
    with pytest.raises(AttributeError):
        bd.Config().threads = 3
    for wrong in ({"fpir": 0}, {"review_fpir": 1e-4}, {"duplicate_db": 10, "review_db": 20}):
        with pytest.raises(bd.InvalidInput):
            bd.Policy(**wrong)
    with pytest.raises(bd.InvalidInput):
        bd.Config(threads=0)
    assert bd.Policy(duplicate_db=50, review_db=40).thresholds_db(10**6) == (50, 40)


def test_the_readmes_examples_run(tmp_path, monkeypatch, portrait):
    from conftest import jpeg

    example, decided, explained = re.findall(r"```python\n(.*?)```", README, re.S)
    monkeypatch.chdir(tmp_path)
    for name, image in (("face.jpg", portrait), ("again.jpg", portrait[:, ::-1])):
        Path(name).write_bytes(jpeg(image))
    scope: dict[str, object] = {}
    exec(example, scope)
    assert scope["decision"].outcome == "duplicate"
    exec(decided, scope)
    print_ = draw_impression(np.random.default_rng(1), draw_master(np.random.default_rng(0))).image
    captures = [bd.Face("face.jpg"), bd.Finger(print_, position="right_index")]
    with bd.Engine.open("another") as engine:
        engine.enroll(bd.Encounter("anna", captures))
        exec(explained, scope | {"engine": engine, "encounter": bd.Encounter(captures=captures)})


def test_the_changes_name_this_version():
    assert f"### {bd.__version__}" in README


def test_methods_of_the_engine_that_were_renamed_work_and_warn(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine:
        vector = np.eye(1, 128, dtype=np.float32)[0]
        with pytest.warns(DeprecationWarning, match="import_captures"):
            (decision,) = engine.admit([bd.Encounter("anna", templates={"face": vector}, model_id="m-1")])
        assert decision.outcome == "unique"
        with pytest.warns(DeprecationWarning, match="maintain"):
            engine.tidy()
