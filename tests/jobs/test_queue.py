"""The backlog: statuses, ages, rates, and how long the queue will take."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import biodedup as bd
from biodedup import jobs
from biodedup.gallery.files.names import BACKLOG_NAME
from biodedup.jobs.enrolment.queue import STATUSES, Arrival, Backlog, Finished

NOW = 1_800_000_000.0
HOUR = 3600.0


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    bd.Engine.open(tmp_path / "gallery").close()
    return tmp_path / "gallery"


def arrivals(first: int, last: int) -> list[Arrival]:
    return [Arrival(f"e{i}", f"s{i}") for i in range(first, last)]


def finish(backlog: Backlog, first: int, last: int, at: float, status: str = "enrolled") -> None:
    backlog.finish(Finished(f"e{i}", status, at, "{}") for i in range(first, last))


def test_an_encounter_goes_through_its_life(gallery):
    with Backlog.open(gallery) as backlog:
        backlog.announce([Arrival("e", "s", captured_at=NOW - 50)], NOW)
        assert backlog.status(NOW).lines["captured"].oldest_s == 50
        steps = (
            ("received", lambda: backlog.enqueue([Arrival("e", "s")], NOW)),
            ("received", lambda: backlog.receive([Arrival("e", "s", digest=b"d")], NOW + 1)),
            ("searching", lambda: backlog.search([("e", "{}")], NOW + 2)),
            ("adjudicate", lambda: backlog.finish([Finished("e", "adjudicate", NOW + 3, "{}")])),
        )
        for status, step in steps:
            step()
            counts = {name: line.count for name, line in backlog.status(NOW + 10).lines.items() if line.count}
            assert counts == {status: 1}
        backlog.enqueue([Arrival("e", "s")], NOW + 4)
        backlog.announce([Arrival("e", "s")], NOW + 4)
        entry = backlog.entry("e")
        assert entry is not None
        assert (entry.status, entry.digest) == ("adjudicate", b"d")
        assert backlog.entry("another") is None


def test_ages_are_those_of_the_oldest_and_of_the_middle_one(gallery):
    with Backlog.open(gallery) as backlog:
        for i, age in enumerate((10, 20, 300)):
            backlog.enqueue(arrivals(i, i + 1), NOW - age)
        line = backlog.status(NOW).lines["received"]
    assert (line.count, line.oldest_s, line.median_s) == (3, 300, 20)


def test_the_time_to_clear_the_queue_follows_the_present_rate(gallery):
    with Backlog.open(gallery) as backlog:
        backlog.enqueue(arrivals(0, 700), NOW - 30 * HOUR)
        finish(backlog, 0, 50, NOW - 1800)
        finish(backlog, 50, 100, NOW)
        status = backlog.status(NOW)
    assert status.waiting == 600
    assert status.decided_hour == 200  # a hundred since the first of them, half an hour ago
    assert status.clear_s == 3 * HOUR
    assert (status.intake_hour, status.intake_day) == (0, 0)
    assert status.warning == ""


def test_a_queue_that_is_slower_than_the_intake_is_warned_of(gallery):
    with Backlog.open(gallery) as backlog:
        for hour in range(24):  # a hundred an hour come, ninety are decided
            at = NOW - (23.5 - hour) * HOUR
            backlog.enqueue(arrivals(100 * hour, 100 * hour + 100), at)
            finish(backlog, 100 * hour, 100 * hour + 90, at + 60)
        status = backlog.status(NOW)
        assert status.waiting == 240
        finish(backlog, 0, 2_400, NOW)
        assert backlog.status(NOW).warning == ""
    assert "the queue grows: " in status.warning


def test_a_start_seconds_ago_gives_no_rate_of_thousands_and_no_warning(gallery):
    with Backlog.open(gallery) as backlog:
        backlog.enqueue(arrivals(0, 114), NOW - 26)
        assert (backlog.status(NOW).clear_s, backlog.status(NOW).warning) == (None, "")
        finish(backlog, 0, 36, NOW - 20)
        assert backlog.status(NOW).decided_hour == 36 * 6  # as if they took ten minutes
        assert backlog.status(NOW).warning == ""


def test_a_queue_that_stands_still_is_warned_of(gallery):
    with Backlog.open(gallery) as backlog:
        backlog.enqueue(arrivals(0, 5), NOW - 3 * 24 * HOUR)
        status = backlog.status(NOW)
    assert status.clear_s is None
    assert "nothing was decided within a day" in status.warning


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(STATUSES), st.floats(0, 30 * 24 * HOUR), st.floats(0, 30 * 24 * HOUR)), max_size=20
    )
)
def test_counts_and_rates_are_those_of_a_plain_count(tmp_path_factory, encounters):
    folder = tmp_path_factory.mktemp("g")
    (folder / "gallery.sqlite3").touch()
    with Backlog.open(folder) as backlog:
        for i, (status, received_ago, decided_ago) in enumerate(encounters):
            if status == "captured":
                backlog.announce(arrivals(i, i + 1), NOW)
                continue
            backlog.enqueue(arrivals(i, i + 1), NOW - received_ago)
            if status == "searching":
                backlog.search([(f"e{i}", "{}")], NOW)
            elif status != "received":
                finish(backlog, i, i + 1, NOW - decided_ago, status)
        got = backlog.status(NOW)
    names = [status for status, _, _ in encounters]
    assert {name: line.count for name, line in got.lines.items()} == {name: names.count(name) for name in STATUSES}
    assert got.waiting == names.count("received") + names.count("searching")
    came = [ago for status, ago, _ in encounters if status != "captured"]
    assert got.intake_hour == sum(ago < HOUR for ago in came)
    assert got.intake_day == round(sum(ago < 24 * HOUR for ago in came) / 24, 1)
    ends = [ago for status, _, ago in encounters if status in ("adjudicate", "duplicate", "enrolled", "refused")]
    for window, rate in ((HOUR, got.decided_hour), (24 * HOUR, got.decided_day)):
        within = [ago for ago in ends if ago < window]
        assert rate == pytest.approx(len(within) * HOUR / max(max(within), 600) if within else 0, abs=0.06)


def test_a_change_that_fails_changes_nothing(gallery):
    with Backlog.open(gallery) as backlog:
        backlog.enqueue(arrivals(0, 2), NOW)

        def breaking_off():
            yield from (Finished("e0", "enrolled", NOW, "{}"),)
            raise ValueError("in the middle")

        with pytest.raises(ValueError, match="middle"):
            backlog.finish(breaking_off())
        assert backlog.status(NOW).lines["received"].count == 2


def test_it_commits_with_a_rollback_journal_and_full_syncs(gallery):
    with Backlog.open(gallery) as backlog:
        backlog.enqueue(arrivals(0, 1), NOW)
        mode, synchronous = (
            backlog._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
        )
    assert (mode, synchronous) == ("persist", 2)
    with sqlite3.connect(gallery / BACKLOG_NAME) as connection:
        assert connection.execute("SELECT count(*) FROM backlog").fetchone() == (1,)
    connection.close()


def test_status_of_a_gallery_without_bulk_enrolments_is_empty_and_of_no_gallery_a_mistake(gallery, tmp_path):
    status = jobs.queue_status(gallery, NOW)
    assert (status.waiting, status.clear_s, status.warning) == (0, 0, "")
    assert not (gallery / BACKLOG_NAME).exists()
    with pytest.raises(bd.NotAGallery, match="holds no gallery"):
        jobs.queue_status(tmp_path / "nowhere", NOW)
    assert not (tmp_path / "nowhere").exists()


def test_the_page_says_when_the_queue_will_be_empty(gallery, tmp_path):
    with Backlog.open(gallery) as backlog:
        backlog.enqueue(arrivals(0, 30), NOW)
        finish(backlog, 0, 10, NOW - 600)
        jobs.write_status_page(tmp_path / "s.html", backlog.status(NOW))
    page = (tmp_path / "s.html").read_text()
    assert "20 encounters wait" in page and "the queue is empty in 20 min" in page
    assert "<script" not in page
    assert "<td>unique</td>" in page and "<td>review</td>" in page and "adjudicate" not in page


def test_a_verdict_takes_an_encounter_out_of_adjudication_and_touches_no_other(gallery):
    with bd.Engine.open(gallery) as engine:
        decision = engine.identify(bd.Encounter(templates={"face": np.eye(1, 64, dtype=np.float32)[0]}))
    with Backlog.open(gallery) as backlog:
        backlog.enqueue(arrivals(0, 3), NOW)
        finish(backlog, 0, 2, NOW, "adjudicate")
        finish(backlog, 2, 3, NOW, "refused")
    for number, outcome in ((0, "duplicate"), (1, "review"), (2, "unique")):
        jobs.note_verdict(gallery, replace(decision, encounter_id=f"e{number}", outcome=outcome), NOW + 5)
    with Backlog.open(gallery) as backlog:
        assert [backlog.entry(f"e{i}").status for i in range(3)] == ["duplicate", "adjudicate", "refused"]
        assert backlog.status(NOW + 9).lines["duplicate"].oldest_s == 4


def test_the_state_is_read_in_one_view_while_another_process_writes(gallery, monkeypatch):
    with Backlog.open(gallery) as backlog:
        backlog.enqueue(arrivals(0, 4), NOW)
        row, seen = Backlog._row, []

        def reading(self, query, *values):
            seen.append(self._connection.in_transaction)
            return row(self, query, *values)

        monkeypatch.setattr(Backlog, "_row", reading)
        backlog.status(NOW + 10)
        assert seen and all(seen)
        assert not backlog._connection.in_transaction
