"""Keeps the state of a field kit: the sequence numbers that it has assigned, and the content of its batch files.

Owns `NAME.state.json` beside the kit's key, and `batches.json` in the working folder of a batch file. A batch file is encrypted for the centre,
so that the kit cannot read it: `batches.json` has its content, by the SHA-256 of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from biodedup.errors import BiodedupError, InvalidInput
from biodedup.gallery.answers import digest_of
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import replace_private
from biodedup.jobs.kits.format.batch_file import BatchReader
from biodedup.jobs.kits.format.keys import KitKey
from biodedup.jobs.kits.manifest import Planned
from biodedup.jobs.shared.files import open_regular
from biodedup.values import Encounter

_NOTES = "batches.json"


@dataclass(frozen=True)
class Packed:
    """The content of a batch file. digest: of its records; entries: (sequence, encounter_id, subject_id); void: void sequences."""

    digest: str
    entries: tuple[tuple[int, str, str], ...]
    void: tuple[int, ...]


def save_state(state: dict[str, Any], kit: KitKey) -> None:
    """Writes the state file. Raises StorageUnavailable."""
    replace_private(kit.state, json.dumps(state).encode())


def load_state(kit: KitKey) -> dict[str, Any]:
    """Reads the state file. Raises InvalidInput."""
    try:
        state = json.loads(kit.state.read_text())
        if state["kit_id"] == kit.public.kit_id and state["next_sequence"] > max(
            (sequence for sequence, _ in state["records"].values()), default=0
        ):
            return dict(state)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise InvalidInput(
        f"{kit.state} is missing or is not the state of kit {kit.public.kit_id}, and sequence numbers must not be assigned twice; "
        "restore it, or make new keys with `biodedup kit keys` and send the new .pub file to the centre"
    )


def numbered(state: dict[str, Any], content: Encounter, clock: Callable[[], float]) -> tuple[int, float]:
    """(sequence, packed_at) of a record: its earlier ones if it was packed before, otherwise new ones."""
    digest = digest_of(replace(content, encounter_id=content.encounter_id or "-"))
    name = hashlib.sha256(digest + (content.encounter_id or "").encode()).hexdigest()
    if name not in state["records"]:
        state["records"][name] = [state["next_sequence"], round(clock(), 3)]
        state["next_sequence"] += 1
    sequence, packed_at = state["records"][name]
    return sequence, packed_at


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises OSError, InvalidInput."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def packed_before(out: Path, work: Path, kit: KitKey) -> Packed | None:
    """The content of the batch file that will be replaced; None if there is none. Raises InvalidInput if `out` is another file."""
    if not out.exists():
        return None
    try:
        with translated(f"reading {out}"):
            noted = _notes(work).get(file_digest(out))
        if noted is not None and noted["kit"] == kit.public.fingerprint.hex():
            entries = tuple((int(n), str(encounter), str(subject)) for n, encounter, subject in noted["entries"])
            return Packed(noted["digest"], entries, tuple(noted["void"]))
        with BatchReader(out, {kit.public.fingerprint: kit.public}, allow_unencrypted=True) as batch:
            found = tuple((r.sequence, r.encounter.encounter_id or "", r.encounter.subject_id or "") for r in batch)
            return Packed(batch.digest.hex(), found, batch.void)
    except (BiodedupError, ValueError, TypeError, KeyError, OSError):
        raise InvalidInput(
            f"{out} exists, but {work / _NOTES} does not list it as a batch of this kit; name another file"
        ) from None


def note_packed(new: Path, out: Path, work: Path, kit: KitKey, packed: Packed) -> None:
    """Stores the content of the new file that will replace `out`. The entry of the present file is kept. Raises StorageUnavailable."""
    with translated(f"reading {out}"):
        known = _notes(work)
        present = {file_digest(out): None} if out.exists() else {}
        notes = {name: known[name] for name in present if name in known}
        notes[file_digest(new)] = {
            "kit": kit.public.fingerprint.hex(),
            "digest": packed.digest,
            "entries": packed.entries,
            "void": packed.void,
        }
    replace_private(work / _NOTES, json.dumps(notes).encode())


def replaced_sequences(before: Packed, out: Path, kit: KitKey, planned: Sequence[Planned]) -> set[int]:
    """The sequence numbers of the batch file that will be replaced, and its void ones. Raises InvalidInput if records of it would be lost."""
    own = f"{kit.public.kit_id}-{kit.public.fingerprint.hex()[:6]}-"
    subjects = {record.encounter.subject_id for record in planned if record.encounter.encounter_id is None}
    encounters = {record.encounter.encounter_id for record in planned}
    lost = sum(
        name not in encounters and not (name.startswith(own) and subject_id in subjects)
        for _, name, subject_id in before.entries
    )
    if lost:
        raise InvalidInput(
            f"{out} holds {lost} records that this manifest does not name, or names in unusable rows; they would be lost: name another file"
        )
    return {sequence for sequence, _, _ in before.entries} | set(before.void)


def _notes(work: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((work / _NOTES).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}
