"""Ray's head is killed and comes back with its state in Redis: the register goes on, and nothing is started twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import biodedup as bd
from tests.support import ROOT
from tests.support.redis import server
from tests.support.shell import run

pytest.importorskip("ray", reason="the extra `cluster` is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.skipif(server() is None, reason="no redis-server: Debian's package redis-server is not installed"),
]


@pytest.fixture
def head() -> Iterator[Any]:
    from tests.support.ray_head import RayHead

    made = RayHead()
    yield made
    made.close()


class Told:
    """The lines of a front-end's process as they come."""

    def __init__(self, *given: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.head", *given],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(json.loads(line))

    def more(self, count: int) -> list[dict[str, Any]]:
        """The next lines, which begin after this call."""
        seen = len(self.lines) + 1  # one may have begun before
        until(lambda: len(self.lines) >= seen + count, self.is_running)
        return self.lines[seen : seen + count]

    def is_running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.wait(60)
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def until(holds: Callable[[], bool], may: Callable[[], bool] = lambda: True, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert may() and time.monotonic() < end
        time.sleep(0.2)


def test_a_register_goes_on_while_the_head_is_away_and_the_head_finds_its_actors_again(register, head, tmp_path: Path):
    from tests.cluster.head import FIRST_NEW, NODES, PEOPLE

    with register(bd.Config(gallery=bd.GalleryConfig(background=False))) as engine:
        engine.add_templates([f"s{i}" for i in range(FIRST_NEW)], {"face": PEOPLE[:FIRST_NEW]})
        engine.seal()
    (tmp_path / "settings.toml").write_text(f'[cluster]\nsegments = "file://{tmp_path}/store"\n')

    def status() -> dict[str, Any]:
        asked = ("cluster", "status", register.url, "--ray", head.address, "--config", "settings.toml", "--json")
        code, out, error = run(*asked, cwd=tmp_path)
        assert code == 0, error
        return json.loads(out)

    def actors(told: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(one["node"], one["slot"], one["process_id"], one["state"]) for one in told["replicas"]}

    front_end = Told(register.url, f"file://{tmp_path}/store", str(tmp_path / "cache"), head.address)
    try:
        said = front_end.more(2)
        before = actors(status())
        assert len(before) == 2 and {state for *_, state in before} == {"serving"}
        head.kill()
        said += front_end.more(5)
        head.start()
        said += front_end.more(5)

        def is_back() -> bool:
            told = status()
            alive = sum(node["is_alive"] for node in told["nodes"])
            return alive == NODES and {state for *_, state in actors(told)} == {"serving"}

        until(is_back, front_end.is_running)
        said += front_end.more(5)
        assert actors(status()) == before  # the same processes at the same places, and no others
        killed = next(iter(before))
        os.kill(killed[2], signal.SIGKILL)  # the new head starts it again
        until(lambda: len(actors(status()) - before) == 1 and is_back(), front_end.is_running)
        said += front_end.more(2)
        for line in said:
            assert line["ids"] == ["s5", "s8"] and not line["incomplete"]
            assert line["outcomes"] == ["unique", "duplicate"]
    finally:
        front_end.close()
    enrolled = register(read_only=True).subject_ids()
    assert len(enrolled) == FIRST_NEW + sum(name.startswith("new") for name in enrolled)
    assert not any(name.startswith("twin") for name in enrolled)
