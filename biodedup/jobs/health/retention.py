"""Erases the decisions and cases that the policy keeps no longer, verifies that they are gone, and signs a receipt.

Owns the verification and the receipt. `gallery/care/retention.py` says what is due and erases it.
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
    """refused, cases: encounter_ids of refused decisions and of closed cases that are due; waiting: of open cases that are older than
    `Policy.keep_cases_days`, which are kept until a person judges them."""

    refused: tuple[str, ...]
    cases: tuple[str, ...]
    waiting: tuple[str, ...]


@dataclass(frozen=True)
class Retained(Described):
    """What a run erased. refused, cases: how many; segments: written anew; number: of the run in the gallery's log, None where nothing was
    due; erased: SHA-256 of the encounter_ids; problems: what was still there when the gallery was read again, empty for nothing."""

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
    """What is due now by the gallery's policy; erases nothing. Raises NotAGallery, GalleryDamaged, StorageUnavailable."""
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
    """Erases what is due, and reads the gallery again to see that it is gone. Interrupted, the next run goes on.

    key, receipt: an Ed25519 private key (PEM) and the new file for the signed receipt, which names no encounter. by: the person, one of
    `Config.identities` where these are configured, with the role `administer`. Backups that were made before keep what was erased, until
    they are brought up to date. Raises InvalidInput, NotAGallery, NotAllowed, GalleryBusy, StorageUnavailable.
    """
    actor = Actor(by)
    actor.principal(config or Config(), "administer")
    if (key is None) != (receipt is None):
        raise InvalidInput(
            "key and receipt go together: name the private key that signs, and the new file of the receipt"
        )
    if receipt is not None and receipt.exists():
        raise InvalidInput(f"{receipt} exists, and a receipt is never replaced; name a new file")
    if key is not None:
        sign_document(_TITLE, {}, key)  # a wrong key is told before anything is erased
    Engine.open(gallery, config, read_only=True, clock=clock).close()  # raises where there is none
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
        problems=tuple(_still_there(gallery, config, clock, due)),
    )
    if key is not None and receipt is not None:
        document = sign_document(_TITLE, {"format": _FORMAT, **result.to_dict()}, key)
        replace_private(receipt, json.dumps(document, indent=2).encode() + b"\n")
    return result


def _still_there(gallery: Path, config: Config | None, clock: Callable[[], float], due: Due) -> list[str]:
    """Reads the gallery from the disk, and the names of its files."""
    problems: list[str] = []
    with Engine.open(gallery, config, read_only=True, clock=clock) as engine:
        if found := engine.retention_due():
            problems.append(f"{len(found.refused) + len(found.cases)} encounters are still due; run it again")
        if known := sum(engine.decision(name) is not None for name in due.cases):
            problems.append(f"{known} erased cases are still answered; run `biodedup doctor`")
    with connected(LocalStorage((config or Config()).keys), gallery) as catalogue:
        named = {file_name(entry.number, kind) for entry in catalogue.segments() for kind in entry.files}
    if left := [path.name for path in (gallery / SEGMENT_FOLDER).iterdir() if path.name not in named]:
        problems.append(
            f"{len(left)} replaced files are still there, such as {left[0]}; open the gallery for writing once"
        )
    return problems
