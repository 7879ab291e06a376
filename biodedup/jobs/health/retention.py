"""Erases decisions and cases whose retention period has ended, verifies that they are gone, and signs a receipt.

Owns the verification and the receipt. `gallery/care/retention.py` selects and erases the records.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from biodedup.common.described import Described
from biodedup.config import Config
from biodedup.engine.engine import Engine
from biodedup.errors import InvalidInput
from biodedup.gallery.care.retention import Due
from biodedup.gallery.care.verify import connected
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.files.names import SEGMENT_FOLDER
from biodedup.gallery.files.private import replace_private
from biodedup.gallery.segments.layout import file_name
from biodedup.jobs.shared.acting import Actor
from biodedup.jobs.shared.signing import sign_document

_TITLE, _FORMAT = "retention", 1


@dataclass(frozen=True)
class RetentionPlan(Described):
    """The records that are due to be erased. refused, cases: encounter_ids of refused decisions and of closed cases; waiting: encounter_ids of
    open cases older than `Policy.keep_cases_days`, which are kept until a person judges them."""

    refused: tuple[str, ...]
    cases: tuple[str, ...]
    waiting: tuple[str, ...]


@dataclass(frozen=True)
class Retained(Described):
    """The result of a run. refused, cases: numbers of erased records; segments: number of segments that were written again; number: of the run
    in the gallery's log, None if nothing was due; erased: SHA-256 of the erased encounter_ids; problems: records that the verification still
    found, empty if there are none."""

    gallery_id: str
    refused: int
    cases: int
    waiting: int
    segments: int
    number: int | None
    erased: str | None
    gallery_version: int
    policy_version: int
    commit: int | None
    chain: str | None
    run_at: float
    problems: tuple[str, ...]


def retention_plan(
    gallery: Path, config: Config | None = None, *, clock: Callable[[], float] = time.time
) -> RetentionPlan:
    """The records that are due now by the gallery's policy. Erases nothing. Raises NotAGallery, GalleryDamaged, StorageUnavailable."""
    with Engine.open(gallery, config, read_only=True, clock=clock) as engine:
        found = engine.retention_due()
    return RetentionPlan(found.refused, found.cases, found.waiting)


def run_retention(
    gallery: Path,
    config: Config | None = None,
    *,
    key: Path | None = None,
    receipt: Path | None = None,
    clock: Callable[[], float] = time.time,
    by: str = "",
) -> Retained:
    """Erases the records that are due, and reads the gallery again to verify that they are gone. The next run resumes an interrupted run.

    key, receipt: an Ed25519 private key (PEM), and the new file of the signed receipt, which names no encounter. by: the person, who needs the
    role `administer` if identities are configured. Backups keep the records until they are updated. Raises InvalidInput, NotAGallery,
    NotAllowed, GalleryBusy, StorageUnavailable.
    """
    actor = Actor(by)
    actor.principal(config or Config(), "administer")
    if (key is None) != (receipt is None):
        raise InvalidInput(
            "key and receipt must be given together: name the signer's private key, and the new file of the receipt"
        )
    if receipt is not None and receipt.exists():
        raise InvalidInput(f"{receipt} exists, and a receipt is never overwritten; name a new file")
    if key is not None:
        sign_document(_TITLE, {}, key)  # raises for a wrong key before anything is erased
    Engine.open(gallery, config, read_only=True, clock=clock).close()  # raises NotAGallery before a gallery is created
    with Engine.open(gallery, config, clock=clock) as engine:
        due, segments, number, link = actor.engine(engine).run_retention()
        version, gallery_id = engine.gallery_version, engine.info()["gallery_id"]
        policy_version = engine.policies()[-1].version
    result = Retained(
        gallery_id=gallery_id,
        refused=len(due.refused),
        cases=len(due.cases),
        waiting=len(due.waiting),
        segments=segments,
        number=number,
        erased=due.digest if due else None,
        gallery_version=version,
        policy_version=policy_version,
        commit=None if link is None else link.commits,
        chain=None if link is None else link.value.hex(),
        run_at=round(float(clock()), 3),
        problems=tuple(_remaining(gallery, config, clock, due)),
    )
    if key is not None and receipt is not None:
        document = sign_document(_TITLE, {"format": _FORMAT, **result.to_dict()}, key)
        replace_private(receipt, json.dumps(document, indent=2).encode() + b"\n")
    return result


def _remaining(gallery: Path, config: Config | None, clock: Callable[[], float], due: Due) -> list[str]:
    """Reads the gallery and the names of its files from the disk. Returns a sentence for each kind of remaining records."""
    problems: list[str] = []
    with Engine.open(gallery, config, read_only=True, clock=clock) as engine:
        if found := engine.retention_due():
            problems.append(f"{len(found.refused) + len(found.cases)} encounters are still due; run it again")
        if known := sum(engine.decision(name) is not None for name in due.cases):
            problems.append(f"{known} erased cases still have a decision; run `biodedup doctor`")
    with connected(LocalStorage((config or Config()).keys), gallery) as catalogue:
        named = {file_name(entry.number, kind) for entry in catalogue.segments() for kind in entry.files}
    if left := [path.name for path in (gallery / SEGMENT_FOLDER).iterdir() if path.name not in named]:
        problems.append(f"{len(left)} replaced files still exist, such as {left[0]}; open the gallery for writing once")
    return problems
