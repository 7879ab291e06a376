"""Temporary folders of copies: those of processes that were killed do not stay."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from biodedup.cluster.scratch import make_scratch, remove_scratch
from biodedup.cluster.shards.ray_actors import ShardActor
from tests.support import ROOT

KIND = "biodedup-shard-"
HOLDS = f"""
import time
from biodedup.cluster.scratch import make_scratch
folder = make_scratch({KIND!r})
(folder / "copy").write_text("of a segment")
print(folder, flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_is_private_and_removed_when_it_is_closed(temporary):
    folder = make_scratch(KIND)
    assert folder.parent == temporary and folder.stat().st_mode & 0o777 == 0o700
    remove_scratch(folder)
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_the_folder_of_a_killed_process_is_removed_by_the_next_one_and_that_of_a_running_one_stays(temporary):
    with subprocess.Popen([sys.executable, "-c", HOLDS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        held = Path(process.stdout.readline().strip())
        remove_scratch(make_scratch(KIND))
        assert (held / "copy").exists()
        process.send_signal(signal.SIGKILL)
    assert held.exists()
    mine = make_scratch(KIND)
    assert list(temporary.iterdir()) == [mine]
    remove_scratch(mine)


def test_what_is_no_folder_of_ours_stays(temporary):
    (temporary / f"{KIND}other").mkdir()
    (temporary / "elsewhere").mkdir()
    (temporary / "elsewhere" / "lock").touch()
    (temporary / f"{KIND}link").symlink_to(temporary / "elsewhere")
    remove_scratch(make_scratch(KIND))
    assert {path.name for path in temporary.iterdir()} == {f"{KIND}other", f"{KIND}link", "elsewhere"}


def test_an_actor_without_a_cache_folder_ends_without_copies(temporary, monkeypatch):
    monkeypatch.setattr("biodedup.cluster.shards.ray_actors._IDLE_S", 0.0)
    ended = []

    class Ray:
        def get_runtime_context(self):
            return type("Context", (), {"current_actor": None})

        def kill(self, actor: object, no_restart: bool) -> None:
            ended.append(list(temporary.glob(f"{KIND}*")))

    monkeypatch.setattr("os.nice", lambda by: 0)
    monkeypatch.setattr("biodedup.cluster.shards.ray_actors._imported", Ray)
    actor = ShardActor(None, f"file://{temporary}/store", "r", 1 << 20, 1, None)
    actor._watching.join()
    assert ended == [[]]
