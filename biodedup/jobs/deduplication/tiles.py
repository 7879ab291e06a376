"""The steps of an N:N join as pieces of work, which other processes can do: each opens the gallery for itself.

Owns what such a process needs to know, and how it sees that it has another version of the gallery. Never compares itself.
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
"""gallery_id, version, sealed rows: a process that has the same has the same snapshot."""


class JoinWork(Work[JoinStep, JoinedTile | None]):
    """The join of a gallery with itself, as the gallery is now."""

    def __init__(self, engine: Engine, threshold_db: float) -> None:
        self._engine, self._threshold_db = engine, threshold_db
        self.joining: Joining = engine.joining(threshold_db=threshold_db)

    def begin(self, piece: JoinStep) -> Pending[JoinedTile | None]:
        return Deferred(self.joining.tile, piece)

    def recipe(self) -> JoinRecipe:
        config, folder = self._engine.config, self._engine.folder
        if folder is None:
            raise InvalidInput(
                "a register's join runs in this process; leave the executor out, or export the register to a folder"
            )
        if config.keys is not None and not isinstance(config.keys, KeyProvider):
            raise InvalidInput(
                "keys is a function, which is not sent to other machines; pass a KeyProvider, and set the key up on each node"
            )
        return JoinRecipe(
            folder.absolute(), config, _state_of(self._engine.info()["gallery_id"], self.joining), self._threshold_db
        )


@dataclass(frozen=True)
class JoinRecipe:
    """A `Recipe`. config: with the policy in force."""

    folder: Path
    config: Config
    state: _State
    threshold_db: float

    @property
    def threads(self) -> int:
        return self.config.threads

    @contextmanager
    def opened(self) -> Iterator[Callable[[JoinStep], JoinedTile | None]]:
        """The function returns None where this process has another version of the gallery."""
        try:
            engine = Engine.open(
                self.folder,
                replace(self.config, log=Config().log, audit="none"),  # the job is recorded, not each of its workers
                read_only=True,
                override_policy=True,
            )
        except NotAGallery as error:
            raise InvalidInput(
                f"a Ray node does not have the gallery {self.folder}; use a folder that all nodes share"
            ) from error
        with engine:
            joining = engine.joining(threshold_db=self.threshold_db)
            same = _state_of(engine.info()["gallery_id"], joining) == self.state
            yield joining.tile if same else _nothing


def _nothing(step: JoinStep) -> None:
    return None


def _state_of(gallery_id: str, joining: Joining) -> _State:
    return gallery_id, joining.snapshot.version, joining.snapshot.parts[-1].first_row


def joined_tiles(
    engine: Engine, threshold_db: float, skip: int, executor: Executor, progress: Progress
) -> Iterator[JoinedTile]:
    """The tiles of a join, in order. skip: rows that are done already."""
    work = JoinWork(engine, threshold_db)
    steps, told = list(work.joining.steps(skip)), False
    for step, tile in zip(steps, in_order(executor, work, steps), strict=True):
        if tile is None:
            if not told:
                warn(
                    progress,
                    ["the gallery changed since the job began; what other machines cannot see any more is done here"],
                    step.done,
                )
            told, tile = True, work.joining.tile(step)
        yield tile
        engine.check_open()
