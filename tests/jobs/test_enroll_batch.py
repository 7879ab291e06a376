"""Bulk enrolment: statuses, broken manifests, resumption, and what officials get."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

import biodedup as bd
from biodedup import jobs
from biodedup.cli import app
from biodedup.gallery.files.names import BACKLOG_NAME
from biodedup.jobs.manifests.encounters import Manifest
from biodedup.jobs.shared.workers import Workers
from tests.support.images import finger, jpeg
from tests.support.records import encoded, fir_2011, itl, tagged, type_4
from tests.support.vectors import SFACE, again, people
from tests.support.workers import InProcess, told

CONFIG = bd.Config(batch_size=8, gallery=bd.GalleryConfig(background=False))
LENIENT = replace(CONFIG, policy=bd.Policy(required=()))
NOW = 1_800_000_000.0


def rows(path: Path) -> list[dict]:
    return pa.parquet.read_table(path).to_pylist()


def run(
    folder: Path, manifest: Path, *, gallery: str = "gallery", out: str = "out.parquet", config=CONFIG, now=NOW, **more
) -> tuple[jobs.BatchResult, list[dict]]:
    with (
        bd.Engine.open(folder / gallery, config, clock=lambda: now) as engine,
        jobs.Backlog.open(folder / gallery) as backlog,
    ):
        more.setdefault("pool", InProcess(config, 1))
        result = jobs.enroll_batch(engine, backlog, manifest, folder / out, clock=lambda: now, **more)
    return result, rows(folder / out)


def write(path: Path, columns: dict[str, object]) -> Path:
    pa.parquet.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def population(tmp_path: Path) -> Path:
    """Thirty encounters of embeddings: 20 people, of whom five come again under other names and five cannot be compared."""
    vectors = people(20)
    cells = [*vectors, *again(vectors[:5], 0.95), *(vectors[:5] * 3)]
    return write(
        tmp_path / "m.parquet",
        {
            "subject_id": [f"s{i:02d}" for i in range(30)],
            "encounter_id": [f"e{i:02d}" for i in range(30)],
            "face": [cell.tolist() for cell in cells],
            "groups": [["north"] if i % 2 else ["south", "west"] for i in range(30)],
            "village": [f"village {i % 3}" for i in range(30)],
            "age": list(range(30)),
        },
    )


def test_each_record_gets_its_status_and_its_metadata_is_carried(tmp_path, population):
    result, got = run(tmp_path, population, report=tmp_path / "r.html")
    assert result.statuses == {"enrolled": 20, "duplicate": 5, "adjudicate": 0, "refused": 5}
    assert [row["status"] for row in got] == ["enrolled"] * 20 + ["duplicate"] * 5 + ["refused"] * 5
    assert [row["duplicate_of"] for row in got[20:25]] == [f"s{i:02d}" for i in range(5)]
    assert {row["reason"] for row in got[25:]} == {"invalid_input"}
    assert [(row["village"], row["age"]) for row in got] == [(f"village {i % 3}", i) for i in range(30)]
    with bd.Engine.open(tmp_path / "gallery", read_only=True) as engine:
        assert len(engine) == 20
        assert engine.search({"face": people(20)[1:2]}, k=1, groups=["north"]).ids[0, 0] == "s01"
        for row in got[:25]:
            decision = engine.decision(row["encounter_id"])
            assert decision is not None
            assert (row["gallery_version"], row["gallery_size"]) == (decision.gallery_version, decision.gallery_size)
            assert row["decided_at"].timestamp() == decision.decided_at == NOW
    status = jobs.queue_status(tmp_path / "gallery", NOW + 60)
    assert {name: line.count for name, line in status.lines.items() if line.count} == {
        "enrolled": 20,
        "duplicate": 5,
        "refused": 5,
    }
    page = (tmp_path / "r.html").read_text()
    assert "Doubles found" in page and "s20" in page and "<script" not in page and "http" not in page


def test_run_again_nothing_changes_and_the_table_is_the_same_to_the_byte(tmp_path, population):
    run(tmp_path, population)
    first = (tmp_path / "out.parquet").read_bytes()
    with bd.Engine.open(tmp_path / "gallery", read_only=True) as engine:
        version = engine.gallery_version
    result, _ = run(tmp_path, population, now=NOW + 1000)
    assert (result.decided_now, result.extracted) == (0, 0)
    assert (tmp_path / "out.parquet").read_bytes() == first
    with bd.Engine.open(tmp_path / "gallery", read_only=True) as engine:
        assert engine.gallery_version == version


def test_the_backlog_is_for_its_owner_alone(tmp_path, population):
    run(tmp_path, population)
    assert (tmp_path / "gallery" / BACKLOG_NAME).stat().st_mode & 0o777 == 0o600


def test_a_lost_backlog_costs_no_decision(tmp_path, population):
    run(tmp_path, population)
    first = rows(tmp_path / "out.parquet")
    (tmp_path / "gallery" / BACKLOG_NAME).unlink()
    _, second = run(tmp_path, population)
    assert second == first


class Stop(BaseException):
    """Stands for a process that ends."""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["announced", "received", "searching", "committed", "finished"])
def test_stopped_anywhere_it_goes_on_and_the_table_is_that_of_a_run_without_a_stop(
    tmp_path, population, monkeypatch, place
):
    whole, _ = run(tmp_path, population, gallery="other", out="other.parquet")
    assert whole.statuses["duplicate"] == 5
    calls = {
        "announced": "enqueue",
        "received": "receive",
        "searching": "search",
        "committed": "finish",
        "finished": "finish",
    }
    original = getattr(jobs.Backlog, calls[place])
    left = [1 if place == "announced" else 2]

    def stopping(self, *args):
        left[0] -= 1
        if left[0] == 0 and place != "finished":
            raise Stop
        original(self, *args)
        if left[0] == 0:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(jobs.Backlog, calls[place], stopping)
        with pytest.raises(Stop):
            run(tmp_path, population)
    assert not list(tmp_path.glob("out*"))
    run(tmp_path, population)
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "other.parquet").read_bytes()


def test_a_declined_capture_is_reported_even_if_the_job_stopped_right_behind_the_commit(tmp_path, monkeypatch):
    face = people(1)[0]
    write(
        tmp_path / "m.parquet",
        {"subject_id": ["a"], "encounter_id": ["e"], "face": [face.tolist()], "right_index": ["empty.wsq"]},
    )
    (tmp_path / "empty.wsq").touch()

    def stopping(self, finished):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(jobs.Backlog, "finish", stopping)
        with pytest.raises(Stop):
            run(tmp_path, tmp_path / "m.parquet", config=LENIENT)
    assert jobs.queue_status(tmp_path / "gallery", NOW).lines["searching"].count == 1
    result, got = run(tmp_path, tmp_path / "m.parquet", config=LENIENT)
    assert [refusal["reason"] for refusal in json.loads(got[0]["refusals"])] == ["empty_file"]
    assert (got[0]["status"], result.extracted) == ("enrolled", 0)
    assert jobs.queue_status(tmp_path / "gallery", NOW).waiting == 0


@pytest.mark.slow
def test_killed_in_the_middle_the_command_goes_on(tmp_path):
    count = 400
    vectors = people(count, seed=3)
    vectors[300:] = again(vectors[:100], 0.95)
    write(
        tmp_path / "m.parquet",
        {
            "subject_id": [f"s{i}" for i in range(count)],
            "encounter_id": [f"e{i}" for i in range(count)],
            "face": vectors.tolist(),
        },
    )
    command = [sys.executable, "-m", "biodedup.cli", "enroll-batch", "m.parquet", "--batch", "4", "--json"]
    command += ["--model-id", SFACE]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.02)
        try:
            status = jobs.queue_status(tmp_path / "gallery", time.time())
        except bd.BiodedupError:
            continue  # in the making
        if status.lines["enrolled"].count >= 40:
            process.kill()
            break
    assert process.wait() == -signal.SIGKILL, "it was too quick to be killed"
    assert status.waiting
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 10, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["enrolled"], summary["duplicate"]) == (300, 100)
    assert summary["decided now"] < count
    first = (tmp_path / "outcomes.parquet").read_bytes()
    run(tmp_path, tmp_path / "m.parquet", out="outcomes.parquet", config=bd.Config(batch_size=4))
    assert (tmp_path / "outcomes.parquet").read_bytes() == first
    with bd.Engine.open(tmp_path / "gallery", read_only=True) as engine:
        assert sorted(engine.subject_ids()) == sorted(f"s{i}" for i in range(300))
        assert engine.problems() == []


def test_a_broken_listedcosts_its_broken_records_alone(tmp_path):
    vectors = people(12)
    for i, vector in enumerate(vectors):
        (tmp_path / f"{i}.bin").write_bytes(vector.tobytes())
    (tmp_path / "empty.bin").touch()
    (tmp_path / "m.csv").write_bytes(
        b"subject_id,encounter_id,path,position,dpi,village\n"
        b"0001,e1,0.bin,face,,Sukabumi\n"
        b"0002,e2,absent.bin,face,,\n"
        b"0003,e3,1.bin,nose,,\n"
        b"0004,e4,2.bin,face,many,\n"
        b",e5,3.bin,face,,\n"
        b"0006,e1,4.bin,face,,other content under a number that is taken\n"
        b"0001,e1,0.bin,face,,\n"
        b"0007,e7,5.bin\n"
        b"0008,e8,empty.bin,face,,\n"
        b"00\xff9,e9,6.bin,face,,\n"
        b"0010,e10,,face,,\n"
        b"0011,,7.bin,,,no number of its own\n"
        b"0012,e12,8.bin,face,,\xff\n"
        b"0013,e13,0.bin,face,,the first once more\n"
        b"0014,e14,m.csv,face,,not an image\n"
    )
    result, got = run(tmp_path, tmp_path / "m.csv")
    by_row = {row["row"]: (row["status"], row["reason"]) for row in got}
    assert by_row == {
        1: ("enrolled", None),  # its second line lies apart
        2: ("refused", "missing_file"),
        3: ("refused", "unknown_position"),
        4: ("refused", "wrong_type"),
        5: ("refused", "no_subject_id"),
        6: ("refused", "encounter_conflict"),
        8: ("refused", "malformed_row"),
        9: ("refused", "empty_file"),
        10: ("refused", "not_utf8"),
        11: ("refused", "no_capture"),
        12: ("enrolled", None),
        13: ("enrolled", None),
        14: ("duplicate", None),
        15: ("refused", "blurred"),
    }
    assert got[0]["subject_id"] == "0001", "zeros stay"
    assert next(row for row in got if row["row"] == 15)["limit"] == 0.2
    assert result.records == len(got) == 14
    first = (tmp_path / "out.parquet").read_bytes()
    assert run(tmp_path, tmp_path / "m.csv")[0].decided_now == 0
    assert (tmp_path / "out.parquet").read_bytes() == first


def test_what_is_no_table_is_a_mistake_and_leaves_nothing(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"\x89PNG" * 50)
    (tmp_path / "b.csv").write_bytes(b"")
    (tmp_path / "c.csv").write_text("name,photo\nAnna,a.jpg\n")
    (tmp_path / "d.doc").write_text("subject_id,path\n1,a.jpg\n")
    for name in ("a.parquet", "b.csv", "c.csv", "d.doc", "absent.csv"):
        with pytest.raises(bd.InvalidInput, match=name):
            run(tmp_path, tmp_path / name)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(bd.InvalidInput, match="end the name with"):
        run(tmp_path, tmp_path / "c.csv", out="out.xlsx")


def test_a_missing_file_that_was_supplied_is_enrolled_under_the_same_encounter(tmp_path):
    vectors = people(2)
    (tmp_path / "0.bin").write_bytes(vectors[0].tobytes())
    write(
        tmp_path / "m.parquet",
        {"subject_id": ["a", "b"], "encounter_id": ["e0", "e1"], "path": ["0.bin", "1.bin"], "position": ["face"] * 2},
    )
    assert [row["status"] for row in run(tmp_path, tmp_path / "m.parquet")[1]] == ["enrolled", "refused"]
    (tmp_path / "1.bin").write_bytes(vectors[1].tobytes())
    result, got = run(tmp_path, tmp_path / "m.parquet")
    assert [row["status"] for row in got] == ["enrolled", "enrolled"]
    assert result.decided_now == 1
    (tmp_path / "0.bin").write_bytes(vectors[1].tobytes())  # what was decided is not decided anew
    _, got = run(tmp_path, tmp_path / "m.parquet")
    assert [(row["status"], row["reason"]) for row in got] == [("refused", "encounter_conflict"), ("enrolled", None)]


def test_a_tenth_of_unreadable_images_stops_no_other_record(tmp_path):
    vectors = people(40)
    content = [b"\xff\xd8 broken" if i % 10 == 3 else vector.tobytes() for i, vector in enumerate(vectors)]
    write(tmp_path / "m.parquet", {"subject_id": [f"s{i}" for i in range(40)], "face": content})
    result, got = run(tmp_path, tmp_path / "m.parquet")
    assert result.statuses == {"enrolled": 36, "duplicate": 0, "adjudicate": 0, "refused": 4}
    assert len({row["encounter_id"] for row in got}) == 40
    assert run(tmp_path, tmp_path / "m.parquet")[1] == got


def test_an_enrolled_subject_who_comes_again_is_verified(tmp_path):
    vectors = people(3)
    faces = [vectors[0], again(vectors[:1], 0.95)[0], vectors[1], vectors[1]]
    write(
        tmp_path / "m.parquet",
        {
            "subject_id": ["anna", "anna", "anna", "bella"],
            "encounter_id": ["e0", "e1", "e2", "e3"],
            "face": [face.tolist() for face in faces],
        },
    )
    for _ in range(2):
        result, got = run(tmp_path, tmp_path / "m.parquet")
        assert [(row["status"], row["reason"], row["strongest"]) for row in got[:3]] == [
            ("enrolled", None, None),
            ("enrolled", "already_enrolled", "anna"),
            ("adjudicate", "another_person", "anna"),
        ]
        assert got[3]["status"] == "enrolled"
        assert result.already == 1
    with bd.Engine.open(tmp_path / "gallery", read_only=True) as engine:
        assert engine.subject_ids() == ["anna", "bella"]


def anna_and_somebody_else(folder: Path) -> Path:
    vectors = people(2)
    columns = {"subject_id": ["anna", "anna"], "encounter_id": ["e0", "e1"], "face": vectors.tolist()}
    return write(folder / "m.parquet", columns)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ruling, status, reason",
    [
        ("same", "enrolled", "already_enrolled"),
        ("different", "refused", "another_person"),
        ("recapture", "refused", "recapture"),
    ],
)
def test_another_person_under_an_enrolled_id_is_a_case_until_it_is_judged(tmp_path, ruling, status, reason):
    manifest, gallery = anna_and_somebody_else(tmp_path), tmp_path / "gallery"

    def standing() -> dict[str, int]:
        with bd.Engine.open(gallery, CONFIG, read_only=True) as engine:
            waiting = [case.encounter_id for case in engine.cases()]
            assert len(waiting) == engine.info()["open_cases"]
        lines = jobs.queue_status(gallery, NOW).lines
        assert waiting == ["e1"] * lines["adjudicate"].count, "status and the queue of cases agree"
        return {name: line.count for name, line in lines.items() if line.count}

    _, before = run(tmp_path, manifest)
    assert (before[1]["status"], before[1]["reason"]) == ("adjudicate", "another_person")
    assert standing() == {"enrolled": 1, "adjudicate": 1}
    decide = ["cases", "decide", "e1", ruling, "--by", "A. Officer", "--gallery", str(gallery)]
    for _ in range(2):
        assert CliRunner().invoke(app, decide).exit_code == 0
        assert standing() == ({"enrolled": 2} if status == "enrolled" else {"enrolled": 1, status: 1})
    result, after = run(tmp_path, manifest)
    assert [(row["status"], row["reason"]) for row in after] == [("enrolled", None), (status, reason)]
    assert (result.extracted, result.decided_now, result.already) == (0, 0, ruling == "same")
    (gallery / BACKLOG_NAME).unlink()
    assert run(tmp_path, manifest)[1] == after
    assert "adjudicate" not in standing()


def test_another_person_that_is_only_in_the_backlog_becomes_a_case(tmp_path):
    manifest = anna_and_somebody_else(tmp_path)
    with bd.Engine.open(tmp_path / "older", CONFIG) as engine:
        engine.enroll(bd.Encounter("anna", templates={"face": people(1)[0]}))
    shutil.copytree(tmp_path / "older", tmp_path / "gallery")
    run(tmp_path, manifest)
    shutil.copy(tmp_path / "gallery" / BACKLOG_NAME, tmp_path / "older")  # as the release before left it
    run(tmp_path, manifest, gallery="older")
    with bd.Engine.open(tmp_path / "older", CONFIG, read_only=True) as engine:
        assert [case.encounter_id for case in engine.cases()] == ["e1"]


def test_a_record_that_is_repeated_gets_the_same_outcome_and_counts_once(tmp_path):
    face = people(1)[0].tolist()
    columns = {"subject_id": ["a", "a", "a"], "encounter_id": ["e", "e", "e"], "face": [face] * 3}
    write(tmp_path / "m.parquet", columns)
    result, got = run(tmp_path, tmp_path / "m.parquet")
    assert [row["status"] for row in got] == ["enrolled"] * 3
    assert (result.statuses["enrolled"], result.repeated) == (1, 2)
    del columns["encounter_id"]  # then it is derived of subject and content
    write(tmp_path / "n.parquet", columns)
    result, got = run(tmp_path, tmp_path / "n.parquet", gallery="other")
    assert (result.statuses["enrolled"], result.repeated) == (1, 2)


def test_rows_of_an_encounter_that_lie_apart_are_one_encounter(tmp_path):
    vectors = people(2)
    for i, vector in enumerate(vectors):
        (tmp_path / f"{i}.bin").write_bytes(vector.tobytes())
    write(
        tmp_path / "m.parquet",
        {
            "subject_id": ["a", "b", "a", "b"],
            "encounter_id": ["e", "f", "e", "f"],
            "path": ["0.bin", "1.bin", None, "empty.bin"],
            "position": ["face", "face", "left_thumb", "right_index"],
            "missing": [None, None, "amputated", None],
        },
    )
    (tmp_path / "empty.bin").touch()
    manifest = Manifest(tmp_path / "m.parquet")
    assert manifest.survey().count == 2
    first, second = manifest.records()
    assert (len(first.cells), first.missing[0].reason, len(second.cells)) == (1, "amputated", 2)
    _, got = run(tmp_path, tmp_path / "m.parquet", config=LENIENT)
    assert [row["status"] for row in got] == ["enrolled", "enrolled"]
    assert json.loads(got[1]["refusals"])[0]["reason"] == "empty_file"
    with bd.Engine.open(tmp_path / "gallery", read_only=True) as engine:
        decision = engine.decision("e")
        assert decision is not None
        assert decision.missing == (bd.Missing("left_thumb", "amputated"),)


def test_announced_encounters_are_captured_until_they_come(tmp_path, population):
    with bd.Engine.open(tmp_path / "gallery", CONFIG), jobs.Backlog.open(tmp_path / "gallery") as backlog:
        assert jobs.announce(backlog, population, clock=lambda: NOW) == 30
        assert backlog.status(NOW + 5).lines["captured"].count == 30
    run(tmp_path, population)
    assert jobs.queue_status(tmp_path / "gallery", NOW).lines["captured"].count == 0


@pytest.mark.slow
def test_a_worker_that_hangs_or_dies_costs_its_capture_two_tries_and_then_a_refusal(tmp_path):
    content = [*(vector.tobytes() for vector in people(6)), b"HANG", b"KILL"]
    names = [f"e{i}" for i in range(8)]
    write(tmp_path / "m.parquet", {"subject_id": names, "encounter_id": names, "face": content})
    with Workers(CONFIG, 1, told, capture_s_max=0.5) as pool:
        result, got = run(tmp_path, tmp_path / "m.parquet", pool=pool)
    assert result.statuses == {"enrolled": 6, "duplicate": 0, "adjudicate": 0, "refused": 2}
    each = "in each try"
    assert [(row["encounter_id"], row["reason"], row["detail"]) for row in got[6:]] == [
        ("e6", "too_slow", f"face: not done after 0.5 s of processor time, {each}"),
        ("e7", "decoder_failed", f"face: the process that decoded it ended (exit code -9), {each}"),
    ]
    assert run(tmp_path, tmp_path / "m.parquet")[0].extracted == 0


def test_a_limit_in_time_is_above_nothing_and_at_most_a_day():
    for wrong in (0, -1, float("nan"), float("inf"), 86_401):
        with pytest.raises(bd.InvalidInput, match="capture_s_max"):
            Workers(CONFIG, 1, capture_s_max=wrong)


def test_what_failed_or_took_too_long_is_tried_again_when_asked_to(tmp_path):
    class Failing(InProcess):
        def submit(self, encounters):
            future = Future()
            reasons = iter(["too_slow", "timed_out", "decoder_failed", "too_much_memory", "failed", "blurred"])
            future.set_result([[bd.Refusal("face", next(reasons), "")] for _ in encounters])
            return future

    content = [vector.tobytes() for vector in people(6)]
    write(tmp_path / "m.parquet", {"subject_id": list("abcdef"), "encounter_id": list("abcdef"), "face": content})
    run(tmp_path, tmp_path / "m.parquet", pool=Failing(CONFIG, 1))
    assert run(tmp_path, tmp_path / "m.parquet")[0].extracted == 0
    result, got = run(tmp_path, tmp_path / "m.parquet", retry_failed=True)
    assert (result.extracted, [row["status"] for row in got]) == (5, [*["enrolled"] * 5, "refused"])


@pytest.mark.slow
def test_images_from_the_shell_to_a_page(tmp_path, portrait):
    (tmp_path / "a.jpg").write_bytes(jpeg(portrait))
    (tmp_path / "b.jpg").write_bytes(jpeg(portrait[:, ::-1], 60))
    (tmp_path / "dark.jpg").write_bytes(jpeg((portrait * 0.05).astype(np.uint8)))
    (tmp_path / "m.csv").write_text(
        "subject_id,encounter_id,path,groups,name\nanna,e1,a.jpg,north,<b>Anna</b>\nbella,e2,b.jpg,north;south,Bella\ncarla,e3,dark.jpg,,\n"
    )

    def shell(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "biodedup.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=250,
            cwd=tmp_path,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout

    code, out = shell("enroll-batch", "m.csv", "--report", "r.html", "--out", "o.csv", "--workers", "1", "--json")
    assert code == 10
    summary = json.loads(out)
    assert (summary["enrolled"], summary["duplicate"], summary["refused"]) == (1, 1, 1)
    table = pa.csv.read_csv(tmp_path / "o.csv").to_pylist()
    assert [(row["status"], row["reason"] or "") for row in table] == [
        ("enrolled", ""),
        ("duplicate", ""),
        ("refused", "too_dark"),
    ]
    page = (tmp_path / "r.html").read_text()
    assert "recapture with more light" in page and "anna" in page
    code, out = shell("status", "--json", "--report", "s.html")
    status = json.loads(out)
    assert (code, status["waiting"], status["lines"]["refused"]["count"], status["warning"]) == (0, 0, 1, "")
    assert "No encounter waits" in (tmp_path / "s.html").read_text()


@pytest.mark.slow
def test_a_row_may_name_a_file_of_ansi_nist_and_brings_all_its_captures(tmp_path, portrait):
    face = tagged(10, {2: 1, 3: "FACE", 6: 512, 7: 512, 8: 0, 11: "JPEGB", 12: "YCC"}, jpeg(portrait))
    prints = [encoded(finger(seed), "PNG") for seed in (3, 4)]
    (tmp_path / "anna.an2").write_bytes(
        itl([type_4(2, prints[0], (320, 320), 1), type_4(7, prints[1], (320, 320), 1), face])
    )
    (tmp_path / "bert.fir").write_bytes(fir_2011([(3, prints[1])]))
    (tmp_path / "cut.an2").write_bytes((tmp_path / "anna.an2").read_bytes()[:2000])
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        "subject_id,path,position\nanna,anna.an2,unknown\nbert,bert.fir,right_middle\ncarl,cut.an2,unknown\n"
    )
    listed = Manifest(manifest)
    assert listed.survey().count == 3
    anna, bert, carl = (listed.read(record, CONFIG.capture) for record in listed.records())
    assert [capture.column for capture in anna.captures] == ["right_index", "left_index", "face"]
    assert [capture.column for capture in bert.captures] == ["right_middle"]
    assert (carl.captures, [refusal.reason for refusal in carl.refusals]) == ((), ["unsound_record"])
    pool = Workers(CONFIG, 1)
    with pool:
        (templates,) = pool.submit([anna.captures]).result()
    assert [template.column for template in templates] == ["right_index", "left_index", "face"]
    assert all(isinstance(template, bd.Template) for template in templates)
