"""The policy of a gallery: kept, versioned, the same for every opener, and changed by name and reason alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

import biodedup as bd
from biodedup import jobs
from biodedup.gallery import policies
from biodedup.gallery.catalogue.sqlite import row_checksum
from tests.support import GOLDEN
from tests.support.galleries import PEOPLE, enroll, small
from tests.support.vectors import again, people

STRICT = bd.Policy(fpir=1e-6)
NOW = 1_800_000_000.0


def opened(path: Path, policy: bd.Policy | None = None, **more) -> bd.Engine:
    return bd.Engine.open(path, bd.Config(policy=policy, gallery=small().gallery), clock=lambda: NOW, **more)


def test_a_gallery_keeps_the_policy_that_it_was_created_with(tmp_path):
    with opened(tmp_path / "g", STRICT) as engine:
        assert engine.policy == engine.config.policy == STRICT
        assert enroll(engine, 0).duplicate_db == pytest.approx(60)
    for read_only in (False, True):
        with opened(tmp_path / "g", read_only=read_only) as engine:
            assert (engine.policy, engine.config.policy) == (STRICT, STRICT)
            decision = engine.identify(bd.Encounter(templates={"face": PEOPLE[1]}))
            assert decision.duplicate_db == pytest.approx(60)
            assert engine.policies() == [bd.PolicyVersion(1, STRICT)]


@pytest.mark.slow
def test_another_policy_is_an_error_that_shows_each_difference(tmp_path):
    opened(tmp_path / "g", STRICT).close()
    for given, told in (
        (bd.Policy(), ["fpir is 1e-06 in the gallery, 0.001 as given"]),
        (
            replace(STRICT, duplicate_db=90.0, required=()),
            ["duplicate_db is none in the gallery, 90.0 as given", "required is sent in the gallery, none as given"],
        ),
    ):
        for read_only in (False, True):
            with pytest.raises(bd.PolicyMismatch) as error:
                opened(tmp_path / "g", given, read_only=read_only)
            for text in (*told, "version 1", "override_policy", "biodedup policy set"):
                assert text in str(error.value)
    opened(tmp_path / "g", bd.Policy(fpir=1e-6)).close()  # the same one; and the failed openings hold nothing


def test_an_overriding_policy_counts_for_its_process_and_is_not_stored(tmp_path):
    opened(tmp_path / "g", STRICT).close()
    with opened(tmp_path / "g", bd.Policy(), override_policy=True) as engine:
        assert (engine.policy, enroll(engine, 0).duplicate_db) == (bd.Policy(), pytest.approx(50))
        assert [one.policy for one in engine.policies()] == [STRICT]
    with opened(tmp_path / "g") as engine:
        assert engine.policy == STRICT


def test_a_new_version_says_who_when_and_why_and_decides_at_once(tmp_path):
    with opened(tmp_path / "g") as engine, opened(tmp_path / "g", read_only=True) as reader:
        enroll(engine, 0)
        version = engine.gallery_version
        stored = engine.set_policy(STRICT, by="A. Officer", reason="too many false alarms")
        assert stored == bd.PolicyVersion(2, STRICT, "A. Officer", NOW, "too many false alarms")
        assert (engine.policy, engine.gallery_version) == (STRICT, version + 1)
        assert enroll(engine, 1).duplicate_db == pytest.approx(60)
        assert engine.set_policy(STRICT, by="B", reason="again") == stored  # nothing changes
        assert engine.info()["policy"]["version"] == 2 and engine.info()["policy"]["fpir"] == 1e-6
        assert reader.policy == bd.Policy()
        reader.refresh()
        assert (reader.policy, reader.config.policy, len(reader.policies())) == (STRICT, STRICT, 2)
        with pytest.raises(bd.InvalidInput):
            reader.set_policy(bd.Policy(), by="A. Officer", reason="a reader")
    with opened(tmp_path / "g") as engine:
        assert [one.version for one in engine.policies()] == [1, 2]
        engine.set_policy(bd.Policy(), by="A. Officer", reason="back")
        assert [one.policy for one in engine.policies()] == [bd.Policy(), STRICT, bd.Policy()]
        assert engine.problems() == []


def test_a_change_wants_a_name_and_a_reason(engine):
    for by, reason in (("", "why"), ("A. Officer", " "), ("A. Officer", 3), ("A. Officer", "x" * 5000)):
        with pytest.raises(bd.InvalidInput):
            engine.set_policy(STRICT, by=by, reason=reason)
    with pytest.raises(bd.InvalidInput):
        engine.set_policy({"fpir": 1e-6}, by="A. Officer", reason="why")
    assert len(engine.policies()) == 1


@pytest.mark.slow
def test_a_policy_that_was_set_moves_calibrations_and_ends_an_override(tmp_path):
    vectors = people(40, dimension=128)
    with opened(tmp_path / "g") as engine:
        engine.add_templates([f"s{i}" for i in range(40)], {"face": vectors})
        probe = bd.Encounter(templates={"face": again(vectors[:1], 0.5)[0]})
        moved = engine.identify(probe).best.score_db
        engine.set_policy(bd.Policy(use_gallery_impostors=False), by="A", reason="the card's scores")
        card = engine.identify(probe).best.score_db
        assert moved != card
    with opened(tmp_path / "g", bd.Policy(), override_policy=True) as engine:
        assert engine.identify(probe).best.score_db == pytest.approx(moved)
        engine.set_policy(bd.Policy(use_gallery_impostors=False, fpir=1e-4), by="A", reason="stricter")
        assert engine.policy == bd.Policy(use_gallery_impostors=False, fpir=1e-4)
        assert engine.identify(probe).best.score_db == pytest.approx(card)


def test_a_backup_has_every_version(tmp_path):
    with opened(tmp_path / "g") as engine:
        engine.set_policy(STRICT, by="A. Officer", reason="stricter")
        engine.backup(tmp_path / "copy")
        versions = engine.policies()
    with opened(tmp_path / "copy", read_only=True) as copy:
        assert copy.policies() == versions


# galleries of earlier releases ----------------------------------------------------------------------------------------


def older(folder: Path, format_: int, policy: dict[str, object]) -> Path:
    """A gallery of an earlier release that was made with this policy."""
    shutil.copytree(GOLDEN / f"format-{format_}", folder)
    with sqlite3.connect(folder / "gallery.sqlite3") as database:
        (config,) = database.execute("SELECT value FROM meta WHERE key = 'config'").fetchone()
        text = json.dumps(json.loads(config) | {"policy": policy})
        database.execute("UPDATE meta SET value = ? WHERE key = 'config'", (text,))
        if format_ > 1:
            database.execute("UPDATE meta SET checksum = ? WHERE key = 'config'", (row_checksum(("config", text)),))
    database.close()
    return folder


@pytest.mark.parametrize("format_", [1, 2, 3])
def test_the_policy_that_made_an_older_gallery_is_its_first_version(tmp_path, format_):
    folder = older(tmp_path / "g", format_, {"duplicate_fpir": 1e-6, "review_fpir": 1e-5})  # as release 0.1.0 called it
    made_by = bd.Policy(fpir=1e-6, review_fpir=1e-5)
    if format_ > 1:  # a reader renews nothing
        before = (folder / "gallery.sqlite3").read_bytes()
        with opened(folder, read_only=True) as engine:
            assert engine.policies() == [bd.PolicyVersion(1, made_by)]
        assert (folder / "gallery.sqlite3").read_bytes() == before
        with pytest.raises(bd.PolicyMismatch):
            opened(folder, bd.Policy(), read_only=True)
    with opened(folder) as engine:
        assert engine.policies() == [bd.PolicyVersion(1, made_by)]
        engine.set_policy(STRICT, by="A. Officer", reason="the new rule")
    with opened(folder, read_only=True) as engine:
        assert [one.policy for one in engine.policies()] == [made_by, STRICT]
        assert engine.problems() == []


def test_a_policy_table_that_lost_rows_or_was_changed_is_damage(tmp_path):
    for statement in ("DELETE FROM policy WHERE version = 1", "DROP TABLE policy", "UPDATE policy SET set_by = 'B'"):
        folder = tmp_path / statement.split()[0]
        with opened(folder) as engine:
            engine.set_policy(STRICT, by="A", reason="why")
        with sqlite3.connect(folder / "gallery.sqlite3") as database:
            database.execute(statement)
        database.close()
        with pytest.raises(bd.GalleryDamaged, match="policy"):
            opened(folder, read_only=True)


# jobs -----------------------------------------------------------------------------------------------------------------


def district(folder: Path, start: int, policy: bd.Policy | None) -> Path:
    with opened(folder, policy) as engine:
        for i in range(start, start + 3):
            enroll(engine, i)
    return folder


@pytest.mark.slow
def test_a_merge_decides_by_the_central_policy_else_by_the_one_of_all_districts(tmp_path):
    a, b = district(tmp_path / "a", 0, STRICT), district(tmp_path / "b", 3, STRICT)
    merged = jobs.merge([a, b], tmp_path / "m.parquet")
    assert merged.summary["threshold_db"] == pytest.approx(STRICT.thresholds_db(6)[0], abs=0.01)
    other = district(tmp_path / "c", 6, bd.Policy())
    with pytest.raises(bd.InvalidInput, match=r"fpir is 1e-06 in a, 0\.001 in c"):
        jobs.merge([a, other], tmp_path / "n.parquet")
    stated = jobs.merge([a, other], tmp_path / "n.parquet", config=bd.Config(policy=bd.Policy(fpir=1e-5)))
    assert stated.summary["threshold_db"] == pytest.approx(bd.Policy(fpir=1e-5).thresholds_db(6)[0], abs=0.01)
    into = jobs.merge([a], tmp_path / "o.parquet", into=other)
    assert into.summary["threshold_db"] == pytest.approx(bd.Policy().thresholds_db(6)[0], abs=0.01)
    with pytest.raises(bd.PolicyMismatch):
        jobs.merge([a], tmp_path / "o.parquet", into=other, config=bd.Config(policy=STRICT))
    jobs.merge([a, b], tmp_path / "p.parquet", into=tmp_path / "centre", apply=True)
    with opened(tmp_path / "centre", read_only=True) as engine:
        assert engine.policy == STRICT


@pytest.mark.parametrize(
    "field", [{"fpir": "1e-3"}, {"trust_extrapolation": "no"}, {"use_gallery_impostors": 1}, {"duplicate_db": True}]
)
def test_a_policy_of_values_that_no_gallery_could_keep_is_refused(field):
    with pytest.raises(bd.InvalidInput, match=next(iter(field))):
        bd.Policy(**field)
    with pytest.raises(bd.InvalidInput, match="finite"):
        bd.Policy(duplicate_floor_db=float("inf"))


def test_the_reason_of_a_change_steers_no_terminal(engine):
    for reason in ("x\x1b[2J", "\u202ereversed", "\ud800"):
        with pytest.raises(bd.InvalidInput, match=r"U\+"):
            engine.set_policy(bd.Policy(fpir=1e-6), by="A. Officer", reason=reason)
    assert len(engine.policies()) == 1


def test_the_old_name_of_a_field_still_works_and_warns(tmp_path):
    with pytest.warns(DeprecationWarning, match="use_gallery_impostors"):
        policy = bd.Policy(own_strangers=False)
    assert policy == bd.Policy(use_gallery_impostors=False)
    with pytest.warns(DeprecationWarning, match="use_gallery_impostors"):
        assert policy.own_strangers is False
    settings = tmp_path / "settings.toml"
    settings.write_text("[policy]\nown_strangers = false\n")
    with pytest.warns(DeprecationWarning, match=r"policy\.own_strangers"):
        assert bd.Config.load(settings).policy == policy
    settings.write_text("[policy]\nown_strangers = false\nuse_gallery_impostors = true\n")
    with pytest.raises(bd.InvalidInput, match="name one setting"):
        bd.Config.load(settings)


def test_a_gallery_stores_the_renamed_field_as_earlier_releases_do():
    policy = bd.Policy(use_gallery_impostors=False)
    assert json.loads(policies.to_text(policy))["own_strangers"] is False
    assert policies.from_text(policies.to_text(policy), "it") == policy
    text = json.dumps(json.loads(policies.to_text(policy)), sort_keys=True)
    assert policies.policy_digest(policy) == hashlib.sha256(text.encode()).hexdigest()[:32]
