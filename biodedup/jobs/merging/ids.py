"""Compares 1:1 the subjects whose id several districts gave, as pieces of work that other processes can do.

Owns the notes of these comparisons, and what such a process needs to know. Never decides who is whom: that is the join's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from biodedup.common.executors import Deferred, Executor, Pending, Work, in_order
from biodedup.config import Config
from biodedup.engine import Engine
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.packed import pack_text
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.deduplication.tiles import opened_elsewhere, sent_with
from biodedup.jobs.merging.model import Checked, Settings
from biodedup.jobs.merging.registers import SharedId
from biodedup.jobs.shared.checkpoint import CheckpointFile
from biodedup.jobs.shared.progress import Progress
from biodedup.values import Encounter

_CHECKPOINT_IDS = 200
"""Number of shared ids that are compared between two checkpoints."""

_Pairs = list[tuple[str, str]]
_Scores = list[float | None]


class IdWork(Work[_Pairs, _Scores]):
    """Comparisons of a staging gallery's subjects. A piece: pairs of subject ids; its result: score_db, None where nothing is comparable."""

    def __init__(self, engine: Engine, staged: Snapshot) -> None:
        self._engine, self._staged = engine, staged

    def begin(self, piece: _Pairs) -> Pending[_Scores]:
        return Deferred(lambda pairs: compared(self._engine, self._staged, pairs), piece)

    def recipe(self) -> IdRecipe:
        return IdRecipe(*sent_with(self._engine))


@dataclass(frozen=True)
class IdRecipe:
    """A `Recipe`. folder: of the staging gallery, which all nodes share; config: with the policy in force."""

    folder: Path
    config: Config

    @property
    def threads(self) -> int:
        return 1

    @contextmanager
    def opened(self) -> Iterator[Callable[[_Pairs], _Scores]]:
        storage = LocalStorage(self.config.keys)
        with (
            opened_elsewhere(self.folder, self.config) as engine,
            closing(Gallery.open_to_read(self.folder, storage, self.config.gallery)) as staging,
        ):
            staged = staging.snapshot()
            yield lambda pairs: compared(engine, staged, pairs)


def compared(engine: Engine, staged: Snapshot, pairs: Sequence[tuple[str, str]]) -> _Scores:
    """The score_db of each pair of subjects, 1:1; None where they have no column in common."""
    rows = staged.rows_of(pack_text([first for first, _ in pairs])).tolist()
    verified = [
        engine.unrestricted().verify(Encounter(None, templates=staged.templates(row)), second)
        for row, (_, second) in zip(rows, pairs, strict=True)
    ]
    return [verification.score_db if verification.evidence else None for verification in verified]


def check_shared(
    engine: Engine,
    staged: Snapshot,
    shared: Sequence[SharedId],
    notes_path: Path,
    settings: Settings,
    progress: Progress,
    executor: Executor,
) -> list[Checked]:
    """Compares subjects of different districts that have the same id, 1:1: each with the subject of the first district that has the id."""
    first: dict[str, SharedId] = {}
    later = [entry for entry in shared if first.setdefault(entry.subject_id, entry) is not entry]
    info = engine.info()
    key = {"gallery": info["gallery_id"], "version": info["gallery_version"], "verify_db": settings.verify_db}
    scores: _Scores = []
    with CheckpointFile(notes_path, key, engine.config.keys) as notes:
        for saved in notes.entries:
            scores += saved
        pairs = [(first[entry.subject_id].merged_id, entry.merged_id) for entry in later[len(scores) :]]
        batches = [pairs[low : low + _CHECKPOINT_IDS] for low in range(0, len(pairs), _CHECKPOINT_IDS)]
        for batch_scores in in_order(executor, IdWork(engine, staged), batches):
            notes.append(batch_scores)
            scores += batch_scores
            progress("checking ids", len(scores), len(later))
    score_of = dict(zip((id(entry) for entry in later), scores, strict=True))
    return [_checked(entry, first[entry.subject_id], score_of, settings) for entry in shared]


def _checked(entry: SharedId, first: SharedId, score_of: dict[int, float | None], settings: Settings) -> Checked:
    if id(entry) not in score_of:
        return Checked(entry, None, None, None)
    score_db = score_of[id(entry)]
    verdict = "same_person" if score_db is not None and score_db >= settings.verify_db else "another_person"
    return Checked(entry, first.owner, score_db, "not_comparable" if score_db is None else verdict)
