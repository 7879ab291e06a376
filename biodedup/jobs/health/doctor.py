"""`doctor`: can the installation and a gallery be trusted, and what can be mended?

Owns the list of checks. The gallery's `health` does the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from biodedup.config import Config
from biodedup.embed.cards import shipped_cards
from biodedup.engine import Engine
from biodedup.errors import BiodedupError
from biodedup.gallery.care.exposure import exposed, tighten, told
from biodedup.gallery.care.repair import repair
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.jobs.health.canaries import watch
from biodedup.jobs.health.canary_report import Watch
from biodedup.jobs.shared.progress import Progress, silent


@dataclass(frozen=True)
class Report:
    """checked: what was found sound; problems: what was not; mended: what was done about it; sentinels: None where they were
    not searched for; notes: what is odd and no damage, as ids that look alike; exposed: what other users of the machine can reach, which is
    no damage either."""

    checked: tuple[str, ...]
    problems: tuple[str, ...]
    mended: tuple[str, ...] = ()
    sentinels: Watch | None = None
    exposed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def examine(
    gallery: Path | None,
    config: Config | None = None,
    *,
    mend: bool = False,
    backup: Path | None = None,
    sentinels: bool = False,
    progress: Progress = silent,
    clock: Callable[[], float] = time.time,
) -> Report:
    """Verifies the digest of every shipped model and, with a gallery, every page, every checksum and every rule.

    mend: rebuild derived files and counters, close files to other users, and take damaged exact ones (or, where the database is lost, everything) from a backup.
    sentinels: search for the gallery's sentinels, too, unless it is damaged. problems are those that remain. Raises what reading a gallery raises: NotAGallery, StorageUnavailable, GalleryBusy.
    """
    checked: list[str] = []
    problems: list[str] = []
    mended: list[str] = []
    reachable: list[str] = []
    notes: list[str] = []
    watched: Watch | None = None
    for card in shipped_cards():
        try:
            card.verify()
            checked.append(f"model {card.model_id}")
        except BiodedupError as error:
            problems.append(str(error))
    if gallery is not None:
        if mend:
            mended = repair(LocalStorage(), gallery, backup)
            if count := tighten(gallery):
                mended.append(f"gallery {gallery}: {count} files and folders closed to other users")
        found = inspect(LocalStorage(), gallery)
        if open_ones := exposed(gallery):
            reachable.append(told(gallery, open_ones))
        if found:
            problems.extend(f"gallery {gallery}: {problem}" for problem in found)
        else:
            with Engine.open(gallery, config, read_only=True) as engine:
                checked.append(f"gallery {gallery}: {len(engine):,} subjects, version {engine.gallery_version}")
                notes = engine.notes(clock())
            if sentinels:
                watched = watch(gallery, config, progress=progress)
                checked += watched.checked
                problems += watched.problems
    return Report(tuple(checked), tuple(problems), tuple(mended), watched, tuple(reachable), tuple(notes))
