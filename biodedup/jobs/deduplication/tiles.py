"""Divides the join of a gallery with itself (N:N) into pieces of work for other processes. Each process opens the gallery itself.

Owns the description of the work, and the check that a process has the same version of the gallery. Never compares templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from biodedup.common.executors import Deferred, Executor, Pending, Work, in_order
from biodedup.config import Config
from biodedup.engine import Engine
from biodedup.engine.joining import JoinedTile, Joining, JoinStep
from biodedup.errors import InvalidInput, NotAGallery
from biodedup.jobs.shared.progress import Progress, warn
from biodedup.keys import KeyProvider

_State = tuple[str, int, int]
"""(gallery_id, version, sealed rows). Two processes with the same state have the same snapshot."""


class JoinWork(Work[JoinStep, JoinedTile | None]):
    """The join of a gallery's current version with itself."""

    def __init__(self, engine: Engine, threshold_db: float) -> None:
        self._engine, self._threshold_db = engine, threshold_db
        self.joining: Joining = engine.joining(threshold_db=threshold_db)

    def begin(self, piece: JoinStep) -> Pending[JoinedTile | None]:
        return Deferred(self.joining.tile, piece)

    def recipe(self) -> JoinRecipe:
        folder, config = sent_with(self._engine)
        return JoinRecipe(
            folder, config, _state_of(self._engine.info()["gallery_id"], self.joining), self._threshold_db
        )


@dataclass(frozen=True)
class JoinRecipe:
    """Describes the join, so that a process on another machine can start it (a `Recipe`). config: has the policy in force."""

    folder: Path
    config: Config
    state: _State
    threshold_db: float

    @property
    def threads(self) -> int:
        return self.config.threads

    @contextmanager
    def opened(self) -> Iterator[Callable[[JoinStep], JoinedTile | None]]:
        """Yields the function that compares a tile. It returns None if this process has another version of the gallery."""
        with opened_elsewhere(self.folder, self.config) as engine:
            joining = engine.joining(threshold_db=self.threshold_db)
            same = _state_of(engine.info()["gallery_id"], joining) == self.state
            yield joining.tile if same else lambda step: None


def sent_with(engine: Engine) -> tuple[Path, Config]:
    """What another process needs to open an engine's gallery. Raises InvalidInput where it cannot."""
    config, folder = engine.config, engine.folder
    if folder is None:
        raise InvalidInput(
            "the join of a register cannot use an executor; omit the executor, or export the register to a folder"
        )
    if config.keys is not None and not isinstance(config.keys, KeyProvider):
        raise InvalidInput(
            "keys is a function, which cannot be sent to other machines; pass a KeyProvider, and set up the key on each node"
        )
    return folder.absolute(), config


def opened_elsewhere(folder: Path, config: Config) -> Engine:
    """An engine that reads, in a process that does pieces. config: with the policy in force. Raises as `Engine.open`."""
    try:
        # the job is recorded, not each of its workers
        quiet = replace(config, log=Config().log, audit="none")
        return Engine.open(folder, quiet, read_only=True, override_policy=True)
    except NotAGallery as error:
        raise InvalidInput(
            f"a Ray node does not have the gallery {folder}; use a folder that all nodes share"
        ) from error


def _state_of(gallery_id: str, joining: Joining) -> _State:
    return gallery_id, joining.snapshot.version, joining.snapshot.parts[-1].first_row


def joined_tiles(
    engine: Engine, threshold_db: float, skip: int, executor: Executor, progress: Progress
) -> Iterator[JoinedTile]:
    """The tiles of a join, in order. skip: number of rows that are finished."""
    work = JoinWork(engine, threshold_db)
    steps, warned = list(work.joining.steps(skip)), False
    for step, tile in zip(steps, in_order(executor, work, steps), strict=True):
        if tile is None:
            if not warned:
                warn(
                    progress,
                    [
                        "the gallery changed since the job began; this machine compares the tiles that other machines cannot"
                    ],
                    step.done,
                )
            warned, tile = True, work.joining.tile(step)
        yield tile
        engine.check_open()
