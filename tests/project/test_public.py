"""The public face: names, errors, and the version. The examples of the README and the docs run in test_docs.py."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

import biodedup as bd
from biodedup import errors

ROOT = Path(__file__).parents[2]


def test_the_public_names_are_pinned():
    assert sorted(bd.__all__) == sorted(
        """
        COLUMNS FINGER_POSITIONS BiodedupError CallerError Candidate CaptureConfig CaptureUnavailable Case Cluster ClusterConfig Config DataDamaged Decision DeviceVerdict
        Encounter EncounterConflict EnrolledEncounter Engine EngineClosed Evidence Extractor Face FaceConfig Finger FingerConfig GalleryBusy GalleryConfig
        GalleryDamaged IndexMismatch InvalidInput IsolationConfig KeyMismatch KeyProvider LabelConfig Link LogConfig Missing ModelCardError ModelMismatch NotAGallery OutOfMemory Policy PolicyMismatch PolicyVersion Refusal RetryableError
        Score SearchConfig SearchResult StorageUnavailable Subject SubjectExists Template Trace UnknownSubject Verdict Verification __version__
        ApprovalNeeded BudgetExhausted LockedOut NotAllowed Principal ROLES
        compare explain read_captures read_minutiae write_minutiae
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


def test_versions_agree():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["version"] == bd.__version__
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None and newest[1] == bd.__version__
    assert f"Version {bd.__version__}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", [".ci/run", ".ci/release"])
def test_the_scripts_of_a_release_parse(script):
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_methods_of_the_engine_that_were_renamed_work_and_warn(tmp_path):
    with bd.Engine.open(tmp_path / "g") as engine:
        vector = np.eye(1, 128, dtype=np.float32)[0]
        with pytest.warns(DeprecationWarning, match="import_captures"):
            (decision,) = engine.admit([bd.Encounter("anna", templates={"face": vector}, model_id="m-1")])
        assert decision.outcome == "unique"
        with pytest.warns(DeprecationWarning, match="maintain"):
            engine.tidy()
