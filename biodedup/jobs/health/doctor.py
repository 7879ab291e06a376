"""`doctor`: checks the installed models and a gallery, and repairs a gallery.

Owns the list of checks. Never reads or writes a file of a gallery: `gallery/care/verify.py` and `repair.py` do, and `canaries.py` searches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from biodedup.common.described import Described
from biodedup.common.renamed import renamed
from biodedup.config import Config
from biodedup.embed.cards import shipped_cards
from biodedup.engine import Engine
from biodedup.errors import BiodedupError
from biodedup.gallery.care.exposure import advice_on_exposure, exposed, tighten
from biodedup.gallery.care.repair import repair
from biodedup.gallery.care.subject_keys import check_subject_keys
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.gallery import Gallery
from biodedup.jobs.health.canaries import watch
from biodedup.jobs.health.canary_report import Watch
from biodedup.jobs.shared.progress import Progress, silent

_ADVICE = "; run `biodedup doctor`"
"""What errors of damage advise; omitted in the report of that command."""


@dataclass(frozen=True)
class Report(Described):
    """The result of a check, in sentences. checked: sound parts; problems: remaining damage; mended: repaired damage; exposed: files that other
    users of the machine can read; notes: unusual facts that are no damage, such as ids that look alike. canaries: None if they were not
    searched for."""

    checked: tuple[str, ...]
    problems: tuple[str, ...]
    mended: tuple[str, ...] = ()
    canaries: Watch | None = None
    exposed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sentinels(self) -> Watch | None:
        """Deprecated: `canaries`."""
        renamed("Report.sentinels", "Report.canaries")
        return self.canaries

    def to_dict(self) -> dict[str, Any]:
        """The report, JSON-ready. In JSON, canaries keep their name of earlier releases, `sentinels`."""
        document = asdict(self)
        canaries = document.pop("canaries")
        for column in canaries["columns"] if canaries else ():
            column["sentinels"] = column.pop("canaries")
        return document | {"sentinels": canaries}


def examine(
    gallery: Path | None,
    config: Config | None = None,
    *,
    mend: bool = False,
    backup: Path | None = None,
    canaries: bool = False,
    progress: Progress = silent,
    clock: Callable[[], float] = time.time,
    sentinels: bool | None = None,
) -> Report:
    """Verifies the digest of every shipped model and, if a gallery is given, every database page, checksum and invariant.

    mend: rebuilds derived files and counters, removes other users' access to files, and restores damaged exact files from `backup` (or
    everything, if the database is lost). canaries: also searches for the gallery's canaries, unless the gallery is damaged. sentinels: the
    deprecated name of canaries. With `Config.subject_keys`, the minutiae of all enrolled rows are opened, too. Raises the errors of reading a gallery: NotAGallery, StorageUnavailable, GalleryBusy.
    """
    if sentinels is not None:
        renamed("examine(sentinels=...)", "examine(canaries=...)")
        canaries = sentinels
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
        storage = LocalStorage(None if config is None else config.keys)
        if mend:
            mended = repair(storage, gallery, backup)
            if count := tighten(gallery):
                mended.append(f"gallery {gallery}: removed other users' access to {count} files and folders")
        damage = inspect(storage, gallery)
        if exposed_files := exposed(gallery):
            reachable.append(advice_on_exposure(gallery, exposed_files))
        if damage:
            problems.extend(f"gallery {gallery}: {str(problem).removesuffix(_ADVICE)}" for problem in damage)
            if backup is None:
                notes.append(
                    f"`biodedup doctor --gallery {gallery} --repair --backup COPY` restores damaged files from a backup"
                )
        else:
            with Engine.open(gallery, config, read_only=True) as engine:
                checked.append(
                    f"gallery {gallery}: {len(engine):,} subject{'' if len(engine) == 1 else 's'}, version {engine.gallery_version}"
                )
                notes = engine.notes(clock())
            if config is not None and config.subject_keys is not None:
                with closing(Gallery.open_to_read(gallery, storage, config.gallery, config.subject_keys)) as opened:
                    of_keys, more = check_subject_keys(opened.snapshot())
                problems += (f"gallery {gallery}: {problem}" for problem in of_keys)
                notes += more
            if canaries:
                watched = watch(gallery, config, progress=progress)
                checked += watched.checked
                problems += watched.problems
    return Report(tuple(checked), tuple(problems), tuple(mended), watched, tuple(reachable), tuple(notes))
