"""Canaries: a sound gallery keeps still, and whatever loses rows raises an alarm that says where."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli import app
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.names import CANARIES_NAME
from biodedup.gallery.segments.reader import SegmentColumn
from biodedup.jobs.health import canaries, canary_file
from biodedup.match.prints.minutiae import CylinderMatcher
from biodedup.search.native.scanner import Scanner
from biodedup.search.scope import Scope
from biodedup.search.shards import cells, native
from biodedup.synthetic.vectors import mates_of
from biodedup.testing import internals
from tests.support.faults import Countdown, FailingStorage
from tests.support.minutiae import record, strewn
from tests.support.vectors import SFACE, again, people

pytestmark = pytest.mark.slow

DIMENSION = 64
CONFIG = bd.Config(gallery=bd.GalleryConfig(seal_rows=1_000, background=False))
FACES = people(3_100, dimension=DIMENSION)


def grow(folder: Path, low: int, high: int) -> None:
    with bd.Engine.open(folder, CONFIG) as engine:
        for start in range(low, high, 500):
            some = slice(start, min(start + 500, high))
            engine.add_templates([f"s{i}" for i in range(high)][some], {"face": FACES[some]})
            engine.maintain()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Rows 0 to 999 in segment 1, to 1,999 in segment 2, to 2,999 in segment 3, and fifty in the journal; and its canaries."""
    folder = tmp_path_factory.mktemp("made") / "g"
    grow(folder, 0, 3_050)
    return folder, jobs.watch(folder)


@pytest.fixture
def gallery(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "g")
    return tmp_path / "g"


@pytest.fixture
def shell(gallery):
    return lambda *arguments: CliRunner().invoke(app, [*arguments, "-g", str(gallery)], catch_exceptions=False)


def kept(gallery: Path) -> canary_file.Canaries:
    found = canary_file.load(LocalStorage(), gallery)
    assert found is not None
    return found


def losing(monkeypatch, rows, among=lambda plan: True) -> None:
    """A search that never returns some rows."""
    search = native.NativeShard.search

    def lossy(self, probes, plan):
        answer = search(self, probes, plan)
        left = ~(np.isin(answer.rows, rows) & among(plan))
        return replace(answer, which=answer.which[left], rows=answer.rows[left], similarity=answer.similarity[left])

    monkeypatch.setattr(native.NativeShard, "search", lossy)


# sound galleries --------------------------------------------------------------------------------------------------


def test_a_sound_gallery_raises_nothing_and_every_part_has_canaries(made):
    gallery, watch = made
    face, everything = watch.columns
    assert watch.problems == ()
    assert (face.canaries, face.found, face.lost) == (watch.made, watch.made, 0)
    assert face.expected_first_min <= face.first <= face.found
    assert (
        f"canaries face: {face.found} of {face.canaries} found (expected at least {face.expected_min})"
        in (watch.checked[0])
    )
    assert everything.found == everything.canaries > 10
    rows = np.array([one.row for one in kept(gallery).each])
    assert np.histogram(rows, [0, 1_000, 2_000, 3_000, 3_050])[0].tolist() == [66, 66, 66, 4]
    for one in kept(gallery).each:
        mate = one.mates["face"]
        assert one.subject_id == f"s{one.row}"
        assert mate.embedding @ FACES[one.row] == pytest.approx(mate.cosine, abs=0.003)
    assert {round(one.mates["face"].cosine, 2) for one in kept(gallery).each} == set(canary_file.COSINES)


def test_the_probes_stay_as_they_were_made_and_the_same_seed_makes_the_same_file(gallery):
    file = gallery / CANARIES_NAME
    before = file.read_bytes()
    watch = jobs.watch(gallery)
    assert (watch.made, file.read_bytes()) == (0, before)
    file.unlink()
    jobs.watch(gallery)
    assert file.read_bytes() == before
    file.unlink()
    jobs.watch(gallery, seed=1)
    assert file.read_bytes() != before


def test_a_gallery_that_has_grown_gets_more_and_merging_changes_nothing(gallery):
    first = {one.row: one.mates["face"].embedding.tobytes() for one in kept(gallery).each}
    with bd.Engine.open(gallery, CONFIG) as engine:
        engine.add_templates([f"late{i}" for i in range(1_200)], {"face": people(1_200, 9, DIMENSION)})
        engine.maintain()
    watch = jobs.watch(gallery)
    now = {one.row: one.mates["face"].embedding.tobytes() for one in kept(gallery).each}
    assert watch.problems == ()
    assert watch.made == len(now) - len(first) > 40
    assert first.items() <= now.items()
    with bd.Engine.open(gallery, CONFIG) as engine:
        engine.compact()
        assert engine.info()["segments"] == 1
    watch = jobs.watch(gallery)
    assert (watch.problems, watch.made) == ((), 0)


def test_an_empty_gallery_has_none(tmp_path):
    bd.Engine.open(tmp_path / "g").close()
    watch = jobs.watch(tmp_path / "g")
    assert (watch.columns, watch.problems, watch.made) == ((), (), 0)


def test_a_crowd_of_look_alikes_is_no_loss(tmp_path):
    """Thirty templates of each person: mates come behind twins, where numpy sees them, too."""
    one_each = people(40, dimension=DIMENSION)
    crowd = np.repeat(one_each, 30, axis=0)
    with bd.Engine.open(tmp_path / "g", CONFIG) as engine:
        engine.add_templates([f"s{i}" for i in range(len(crowd))], {"face": crowd})
        engine.maintain()
    watch = jobs.watch(tmp_path / "g")
    assert watch.problems == ()
    assert watch.columns[0].first < watch.columns[0].expected_first_min
    assert "numpy finds no more among the stored rows" in watch.checked[0]


# losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_rows_of_a_segment_that_the_search_never_returns_raise_an_alarm_that_names_it(gallery, monkeypatch, share):
    losing(monkeypatch, np.arange(1_000, 1_000 + int(1_000 * share)))
    watch = jobs.watch(gallery)
    face = watch.columns[0]
    assert face.alarm
    assert [place for place, *_ in face.lost_in] == ["segment 2"]
    assert face.lost == sum(1_000 <= one.row < 1_000 + 1_000 * share for one in kept(gallery).each)
    assert any("face" in text and f"segment 2 ({face.lost} of 66)" in text for text in watch.problems)


def test_codes_that_a_kernel_does_not_see_raise_an_alarm(gallery, monkeypatch):
    monkeypatch.setattr(cells, "EXACT_CELLS", 0)
    monkeypatch.setattr(native, "_SHARE_MAX", 1.0)
    assert jobs.watch(gallery).problems == ()
    above = Scanner.above

    def blind(self, whole, probes, cuts, **options):
        return above(self, [unit for unit in whole if unit.number != 2], probes, cuts, **options)

    monkeypatch.setattr(Scanner, "above", blind)
    face = jobs.watch(gallery).columns[0]
    assert face.alarm
    assert face.p_lost < 1e-30
    assert face.lost_in == (("segment 3", 66, 66),)


def test_one_lost_row_is_within_the_risk_unless_nothing_left_to_chance_loses_it_too(gallery, monkeypatch):
    monkeypatch.setattr(cells, "EXACT_CELLS", 0)
    victim = next(one for one in kept(gallery).each if one.mates["face"].cosine > 0.7 and one.row < 3_000)
    with monkeypatch.context() as patch:
        losing(patch, [victim.row], lambda plan: plan.miss_risk > 0)
        watch = jobs.watch(gallery)
        assert (watch.columns[0].lost, watch.columns[0].certain, watch.problems) == (1, 0, ())
        assert "1 missed, which the search's miss risk allows" in watch.checked[0]
    losing(monkeypatch, [victim.row])
    watch = jobs.watch(gallery)
    assert (watch.columns[0].lost, watch.columns[0].certain) == (1, 1)
    assert "a miss risk of zero does not find" in watch.problems[0]


def test_stored_templates_that_have_changed_under_sound_checksums_are_reported(gallery, monkeypatch):
    vectors_at = SegmentColumn.vectors_at

    def damaged(self, cells):
        found = vectors_at(self, cells)
        return np.roll(found, 1, axis=1) if "2.face" in self._file.name else found

    monkeypatch.setattr(SegmentColumn, "vectors_at", damaged)
    watch = jobs.watch(gallery)
    assert (watch.columns[0].changed, watch.columns[0].changed_in) == (66, ("segment 2",))
    assert "the stored templates of 66 of 202 have changed since enrolment, in segment 2" in watch.problems[0]


def test_a_similarity_that_is_miscomputed_is_reported(gallery, monkeypatch):
    search = native.NativeShard.search
    monkeypatch.setattr(
        native.NativeShard,
        "search",
        lambda *args: (answer := search(*args)) and replace(answer, similarity=answer.similarity * np.float32(0.9)),
    )
    watch = jobs.watch(gallery)
    assert watch.columns[0].miscomputed == watch.columns[0].found
    assert "differs from that of the stored rows" in watch.problems[0]


# removals ---------------------------------------------------------------------------------------------------------


def test_who_was_removed_is_no_loss(gallery):
    gone = [one.subject_id for one in kept(gallery).each[::4]]
    with bd.Engine.open(gallery, CONFIG) as engine:
        for name in gone:
            engine.remove(name)
    watch = jobs.watch(gallery)
    assert (watch.problems, watch.removed, watch.gone) == ((), len(gone), 0)
    assert not {one.subject_id for one in kept(gallery).each} & set(gone)


def test_a_canary_that_was_removed_and_merged_away_is_reported_without_an_alarm(gallery):
    gone = [one.subject_id for one in kept(gallery).each[:10]]
    with bd.Engine.open(gallery, CONFIG) as engine:
        for name in gone:
            engine.remove(name)
        engine.compact()
    watch = jobs.watch(gallery)
    assert (watch.problems, watch.removed, watch.gone) == ((), 0, 10)
    assert any("5.0% of the canaries" in line for line in watch.checked)


def test_who_is_gone_though_nothing_was_removed_is_a_loss_and_stays_one(gallery):
    with bd.Engine.open(gallery, CONFIG) as engine:
        engine.remove(kept(gallery).each[0].subject_id)
        engine.compact()
        version = engine.gallery_version
    # as if a merge had lost the row: it was not removed since the last check of the canaries
    canary_file.save(LocalStorage(), gallery, replace(kept(gallery), version=version), None)
    for _ in range(2):
        assert (
            "1 subjects are no longer in any segment, although nothing was removed" in jobs.watch(gallery).problems[0]
        )


def test_an_updated_subject_is_no_loss(gallery):
    one = kept(gallery).each[0]
    with bd.Engine.open(gallery, CONFIG) as engine:
        new = people(1, 77, DIMENSION)[0]
        encounter = bd.Encounter(one.subject_id, templates={"face": new})
        assert engine.update(encounter, replace=True, reason="a test").outcome == "unique"
    watch = jobs.watch(gallery)
    assert (watch.problems, watch.removed) == ((), 1)


def test_compacting_from_the_shell_erases_canaries_of_removed_subjects(gallery, shell):
    name = kept(gallery).each[0].subject_id
    with bd.Engine.open(gallery, CONFIG) as engine:
        engine.remove(name)
    assert shell("compact").exit_code == 0
    assert name not in {one.subject_id for one in kept(gallery).each}


@pytest.mark.parametrize("more", [1, 400])
def test_a_gallery_that_was_taken_back_is_reported(gallery, tmp_path, more):
    with bd.Engine.open(gallery, CONFIG) as engine:
        engine.backup(tmp_path / "old")
        engine.add_templates([f"late{i}" for i in range(more)], {"face": people(more, 9, DIMENSION)})
    jobs.watch(gallery)
    (tmp_path / "old" / CANARIES_NAME).write_bytes((gallery / CANARIES_NAME).read_bytes())
    ahead = sum(one.row >= 3_050 for one in kept(gallery).each)
    assert (ahead > 0) == (more > 1)
    (problem,) = jobs.watch(tmp_path / "old").problems
    assert f"earlier state, in which {ahead} of their subjects are not enrolled" in problem


# the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [20, 200, 5_000, -3])
def test_a_damaged_file_is_a_problem_that_says_how_to_make_it_anew(gallery, at):
    file = gallery / CANARIES_NAME
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    (problem,) = jobs.watch(gallery).problems
    assert f"remove the file `{CANARIES_NAME}`" in problem
    assert file.read_bytes() == content
    file.unlink()
    assert jobs.watch(gallery).problems == ()


def test_a_file_of_another_gallery_is_a_problem(gallery, tmp_path):
    grow(tmp_path / "other", 0, 100)
    jobs.watch(tmp_path / "other")
    (gallery / CANARIES_NAME).write_bytes((tmp_path / "other" / CANARIES_NAME).read_bytes())
    assert "belongs to another gallery" in jobs.watch(gallery).problems[0]


def test_a_backup_takes_them_along_and_is_searched_without_writing(gallery, tmp_path, monkeypatch):
    with bd.Engine.open(gallery, CONFIG, read_only=True) as engine:
        engine.backup(tmp_path / "copy")
    copy = tmp_path / "copy" / CANARIES_NAME
    assert copy.read_bytes() == (gallery / CANARIES_NAME).read_bytes()
    copy.unlink()

    def refused(self, path):
        raise PermissionError(13, "read-only file system", str(path))

    monkeypatch.setattr(LocalStorage, "create", refused)
    watch = jobs.watch(tmp_path / "copy")
    assert (watch.problems, watch.kept_in_file, copy.exists()) == ((), False, False)
    assert watch.columns[0].found == watch.columns[0].canaries
    assert any("could not be written" in line for line in watch.checked)


def test_a_disk_that_fails_leaves_the_old_file_or_the_new_one(gallery):
    before = kept(gallery)
    after = replace(before, version=before.version + 1)
    for n in range(1, 40):
        try:
            canary_file.save(FailingStorage(Countdown(n)), gallery, after, None)
        except bd.StorageUnavailable:
            assert kept(gallery).version in (before.version, after.version)
        else:
            break
    assert n > 3
    assert kept(gallery).version == after.version


# fingers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_fingers(tmp_path):
    """Sixty subjects with a face and two fingers, of which one is minutiae alone; the last twenty have this one alone."""
    records = [record(strewn(40, seed)) for seed in range(60)]
    with bd.Engine.open(tmp_path / "f", CONFIG) as engine:
        both = {"face": FACES[:40], "left_index": FACES[100:140], "right_index": records[:40]}
        engine.add_templates([f"s{i}" for i in range(40)], both)
        engine.compact()
        engine.add_templates([f"s{i}" for i in range(40, 60)], {"right_index": records[40:]})
    return tmp_path / "f"


def test_minutiae_are_identified_and_records_that_have_changed_are_reported(with_fingers):
    watch = jobs.watch(with_fingers, count=20)
    columns = {one.column: one for one in watch.columns}
    assert watch.problems == ()
    assert set(columns) == {"face", "left_index", "right_index", "all"}
    assert columns["all"].found == columns["all"].canaries > 15
    with_records = {one.subject_id for one in kept(with_fingers).each if "right_index" in one.mates}
    assert columns["right_index"].found == len(with_records) >= 20
    one = kept(with_fingers).each[0]
    other = replace(one, mates=one.mates | {"right_index": replace(one.mates["right_index"], record_hash=1)})
    changed = replace(kept(with_fingers), each=(other, *kept(with_fingers).each[1:]))
    canary_file.save(LocalStorage(), with_fingers, changed, None)
    watch = jobs.watch(with_fingers, count=20)
    assert "right_index: the stored templates of 1 of" in watch.problems[0]


def test_minutiae_that_are_never_compared_raise_an_alarm(with_fingers, monkeypatch):
    jobs.watch(with_fingers, count=20)
    monkeypatch.setattr(Scope, "rows_with", lambda self, bits, *, without: np.zeros(0, np.int64))
    watch = jobs.watch(with_fingers, count=20)
    assert watch.columns[-1].alarm
    assert [place for place, *_ in watch.columns[-1].lost_in] == ["the journal"]


def test_another_impression_is_a_mate_and_no_copy():
    matcher = CylinderMatcher()
    content = [record(strewn(40, seed)) for seed in range(20)]
    made = [
        canary_file.another_impression(one, "right_index", np.random.default_rng(i)) for i, one in enumerate(content)
    ]
    scores = np.array([matcher.compare(one, content) for one in made])
    own = np.diag(scores)
    assert own.min() > 3 * scores[~np.eye(20, dtype=bool)].max()
    assert own.max() < matcher.compare(content[0], content[:1])[0]
    for count in (0, 1, 3):
        canary_file.another_impression(record(strewn(count)), "left_thumb", np.random.default_rng(0))


# what is expected -------------------------------------------------------------------------------------------------


def test_the_exact_rank_is_that_of_a_sorted_list(gallery):
    with bd.Engine.open(gallery, CONFIG) as engine:
        engine.remove("s5")
        snapshot = internals(engine).gallery.snapshot()
        stored = snapshot.embeddings(range(3_050), "face")
        rows = [7, 1_500, 3_049]
        probes = mates_of(stored[rows], np.full(3, 0.35), seed=3)
        similarity = probes @ stored.T
        similarity[:, 5] = -1
        oracle = [(-line).argsort().tolist().index(row) + 1 for line, row in zip(similarity, rows, strict=True)]
        cosine = similarity[range(3), rows]
        assert max(oracle) > 1
        assert canaries._exact_rank(snapshot, "face", probes, cosine, rows).tolist() == oracle


def test_expected_counts_are_those_of_the_binomial_law():
    chances = np.full(200, 0.98)
    least, p = canaries._least(190, chances, 1e-4)
    assert p == pytest.approx(binom.cdf(190, 200, 0.98))
    assert binom.cdf(least - 1, 200, 0.98) < 1e-4 <= binom.cdf(least, 200, 0.98)
    assert canaries._least(0, np.zeros(0), 1e-4) == (0, 1.0)


def test_the_law_of_impostors_foresees_how_many_are_first(gallery):
    with bd.Engine.open(gallery, CONFIG) as engine:
        snapshot = internals(engine).gallery.snapshot()
        rows = np.arange(0, 3_000, 3)
        for cosine in (0.4, 0.45, 0.5):
            probes = mates_of(FACES[rows], np.full(len(rows), cosine), seed=int(100 * cosine))
            place = (probes @ FACES[:3_050].T > cosine + 1e-3).sum(axis=1)
            first, among = canaries._expected(snapshot, "face", probes, np.full(len(rows), cosine, np.float32), 3_050)
            assert first.mean() == pytest.approx((place == 0).mean(), abs=0.04)
            assert among.mean() == pytest.approx((place < canaries.FIRST).mean(), abs=0.02)


# the command line -------------------------------------------------------------------------------------------------


def test_doctor_says_it_in_words_and_json_and_by_its_exit_code(gallery, shell):
    assert "name it with --gallery" in str(CliRunner().invoke(app, ["doctor", "--canaries"]).exception)
    said = shell("doctor", "--canaries")
    assert said.exit_code == 0
    assert "sound    canaries face: 202 of 202 found" in said.stdout
    (gallery / CANARIES_NAME).write_bytes(b"")
    said = shell("doctor", "--canaries", "--json")
    report = json.loads(said.stdout)
    assert said.exit_code == 4
    assert "their file is damaged" in report["problems"][0]
    assert report["sentinels"]["columns"] == []


def test_the_names_of_the_first_release_work_and_warn(gallery, shell):
    assert "canaries face: " in shell("doctor", "--sentinels").stdout
    with pytest.warns(DeprecationWarning, match="canaries"):
        report = jobs.examine(gallery, sentinels=True)
    with pytest.warns(DeprecationWarning, match=r"Report\.canaries"):
        assert report.sentinels is report.canaries
    column = report.canaries.columns[0]
    with pytest.warns(DeprecationWarning, match=r"Watched\.canaries"):
        assert column.sentinels == column.canaries
    assert report.to_dict()["sentinels"]["columns"][0]["sentinels"] == column.canaries


def few(folder: Path) -> bd.Config:
    """Thirty enrolled subjects, so that every row of the journal is a canary."""
    policy = bd.Policy(duplicate_db=60, review_db=50)
    settings = bd.Config(policy=policy, gallery=bd.GalleryConfig(background=False))
    with bd.Engine.open(folder, settings) as engine:
        engine.add_templates([f"s{i}" for i in range(30)], {"face": people(32)[:30]}, model_id=SFACE)
    return settings


def test_a_subject_with_a_further_row_is_no_loss(tmp_path):
    settings = few(tmp_path / "g")
    assert jobs.watch(tmp_path / "g", settings).problems == ()
    with bd.Engine.open(tmp_path / "g", settings) as engine:
        for i in range(3):
            further = {"face": bd.Template("face", SFACE, again(people(32)[i], 0.8))}
            assert engine.update(bd.Encounter(f"s{i}", templates=further)).outcome == "unique"
        assert len(engine.encounters("s0")) == 2
    for _ in range(2):
        assert jobs.watch(tmp_path / "g", settings).problems == ()


def test_an_open_case_is_no_canary_and_no_loss(tmp_path):
    settings = few(tmp_path / "g")
    with bd.Engine.open(tmp_path / "g", settings) as engine:
        vector = again(people(32)[30], 1.0)
        engine.dispute(bd.Encounter("s5", templates={"face": bd.Template("face", SFACE, vector)}, encounter_id="visit"))
        row = internals(engine).gallery.snapshot().pending_rows.tolist()
    for _ in range(2):
        assert jobs.watch(tmp_path / "g", settings).problems == ()
    canaries_now = kept(tmp_path / "g")
    assert not set(row) & {canary.row for canary in canaries_now.each} and row
    # a file of an earlier release may hold the row of a case
    of_case = replace(canaries_now.each[0], row=row[0], subject_id="s5")
    each = (*canaries_now.each, of_case)
    canary_file.save(LocalStorage(), tmp_path / "g", replace(canaries_now, each=each), None)
    assert jobs.watch(tmp_path / "g", settings).problems == ()
