"""Checkpoint files of long jobs in an encrypted gallery."""

from __future__ import annotations

from pathlib import Path

from biodedup.jobs.shared.checkpoint import CheckpointFile


def written(path: Path, work: dict[str, object], *entries: str) -> list[bytes]:
    with CheckpointFile(path, work, lambda: b"k" * 32) as notes:
        for entry in entries:
            notes.append(entry)
    return path.read_bytes().splitlines(keepends=True)


def read(path: Path, work: dict[str, object]) -> list[str]:
    with CheckpointFile(path, work, lambda: b"k" * 32) as notes:
        return notes.entries


def test_a_line_of_another_job_under_the_same_key_is_not_taken(tmp_path):
    first, second = tmp_path / "a" / "notes", tmp_path / "b" / "notes"
    for path in (first, second):
        path.parent.mkdir()
    theirs = written(first, {"gallery": "one"}, "pairs", "more")
    ours = written(second, {"gallery": "two"}, "none", "none")
    assert read(second, {"gallery": "two"}) == ["none", "none"]
    second.write_bytes(b"".join([*ours[:2], theirs[2]]))
    assert read(second, {"gallery": "two"}) == ["none"]


def test_lines_of_one_job_are_taken_in_their_order_alone(tmp_path):
    key, *lines = written(tmp_path / "notes", {"gallery": "one"}, "a", "b", "c")
    (tmp_path / "notes").write_bytes(b"".join([key, lines[0], lines[2], lines[1]]))
    assert read(tmp_path / "notes", {"gallery": "one"}) == ["a"]
