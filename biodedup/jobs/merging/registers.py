"""Opens the registers of a merge (districts' galleries) and copies them into one staging gallery beside the result.

Owns the names of the districts, the ids that several districts use, and the staging gallery. In it, a subject keeps its id; if another district
uses the same id, it becomes `NAME/subject_id`. Never compares templates, and never writes to a register.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import xxhash
from numpy.typing import NDArray

from biodedup.common.tables import differences
from biodedup.config import Config, Policy
from biodedup.errors import InvalidInput, ModelMismatch
from biodedup.gallery.care.copying import Rename, copy_rows, steps_done
from biodedup.gallery.files import packed
from biodedup.gallery.files.filesystem import Storage
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.policies import PolicyVersion, differences_in_words, mismatch
from biodedup.gallery.segments.part import Int64
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.shared.progress import Progress
from biodedup.values import check_id

GROUP = "district:"
_RANGE_ROWS = 1 << 20  # hashes of ids sorted at once
_ID_LENGTH_MAX = 256


@dataclass(frozen=True, eq=False)
class Register:
    """One version of a district's gallery, and its policy. central: the gallery into which the others are merged; its subjects keep their ids."""

    name: str
    gallery_id: str
    snapshot: Snapshot
    policy: PolicyVersion
    central: bool = False

    @property
    def key(self) -> dict[str, object]:
        """The identity of the register and version, JSON-ready."""
        return {
            "name": self.name,
            "gallery_id": self.gallery_id,
            "version": self.snapshot.version,
            "subjects": self.snapshot.live_count,
            "central": self.central,
        }

    @property
    def step(self) -> str:
        """The name of the step under which the staging gallery records its copy."""
        return step_of(self.key)


def step_of(key: Mapping[str, object]) -> str:
    """`Register.step` of the register with this `Register.key`."""
    return f"stage:{key['name']}:{key['gallery_id']}:{key['version']}"


def named(source: str | Path) -> tuple[str, Path]:
    """(name of the district, folder) of `NAME=FOLDER`, or of a folder, whose name is then the district's."""
    name, separator, folder = str(source).partition("=")
    if not separator or Path(source).exists():
        name, folder = Path(source).resolve().name, str(source)
    check_id(name, "a district's name")
    if "/" in name:
        raise InvalidInput(
            f"the district's name {name!r} has a slash, which separates the name and the id in merged ids; name it without a slash"
        )
    return name, Path(folder)


def refuse_sealed(config: Config | None) -> None:
    """Raises InvalidInput where the settings name keys of subjects: a merge copies records as they are stored, and each gallery has its own."""
    if config is not None and config.subject_keys is not None:
        raise InvalidInput(
            "minutiae that are sealed by keys of their subjects cannot be merged; leave subject_keys out"
        )


@contextmanager
def opened(sources: Sequence[str | Path], storage: Storage, config: Config) -> Iterator[list[Register]]:
    """Opens the galleries for reading. Raises InvalidInput if one is named twice, NotAGallery, ModelMismatch."""
    with ExitStack() as stack:
        registers: list[Register] = []
        for source in sources:
            name, folder = named(source)
            gallery = Gallery.open_to_read(folder, storage, config.gallery)
            stack.callback(gallery.close)
            snapshot = gallery.snapshot().enrolled
            registers.append(Register(name, gallery.gallery_id, snapshot, gallery.policies[-1]))
        check_registers(registers)
        yield registers


def check_registers(registers: Sequence[Register]) -> None:
    """Raises InvalidInput or ModelMismatch if the registers cannot be merged."""
    seen: dict[str, Register] = {}
    for register in registers:
        for what, value in (("name", register.name), ("gallery", register.gallery_id)):
            if (other := seen.setdefault(f"{what}:{value}", register)) is not register:
                raise InvalidInput(
                    f"{register.name!r} and {other.name!r} have the same {what}; "
                    + ("write NAME=FOLDER" if what == "name" else "name each gallery only once, and no copy of it")
                )
    first: dict[str, Register] = {}
    for register in registers:
        for column, model in register.snapshot.models.items():
            other = first.setdefault(column, register)
            known = other.snapshot.models[column]
            if model != known:
                raise ModelMismatch(
                    f"column {column}: district {register.name!r} holds templates of {model.model_id} (dimension "
                    f"{model.dimension}), {other.name!r} of {known.model_id} (dimension {known.dimension}), which do not compare; "
                    "extract the captures of one of them again with the other's model"
                )


def policy_of(registers: Sequence[Register], central: Register | None, given: Policy | None) -> Policy:
    """The policy of a merge: that of the central gallery; otherwise the given policy; otherwise the common policy of all districts.

    Raises PolicyMismatch if the given policy differs from the central gallery's, InvalidInput if the districts' policies differ.
    """
    if central is not None:
        if given is not None and given != central.policy.policy:
            raise mismatch(central.name, central.policy, given)
        return central.policy.policy
    if given is not None:
        return given
    first = registers[0]
    for other in registers[1:]:
        if changes := differences(first.policy.policy, other.policy.policy):
            raise InvalidInput(
                f"districts have different policies: {differences_in_words(changes, f'in {first.name}', f'in {other.name}')}; state the policy of the merge "
                "([policy] in the settings file), with which --apply creates the central gallery; or name an existing central gallery, "
                "whose policy then applies"
            )
    return first.policy.policy


# ids that several districts use ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SharedId:
    """A subject whose id another district uses, too. owner: index of its register; merged_id: its id in the merged register."""

    subject_id: str
    owner: int
    merged_id: str


def colliding_hashes(registers: Sequence[Register]) -> NDArray[np.uint64]:
    """The hashes of ids that two or more registers use, uint64, ascending. Works in ranges of hashes, so that memory is bounded.

    If two different ids have the same hash (once in a thousand merges of 200 million subjects), both only get a prefix.
    """
    lookups = [
        (owner, register.snapshot.mask(part), *part.lookup())
        for owner, register in enumerate(registers)
        for part in register.snapshot.parts
    ]
    total = sum(len(hashes) for *_, hashes, _ in lookups)
    bounds = np.linspace(0, 2.0**64, total // _RANGE_ROWS + 2)[1:-1].astype(np.uint64)
    cuts = [[0, *np.searchsorted(hashes, bounds).tolist(), len(hashes)] for *_, hashes, _ in lookups]
    colliding = [np.zeros(0, np.uint64)]
    for i in range(len(bounds) + 1):
        keys, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for (owner, mask, hashes, positions), cut in zip(lookups, cuts, strict=True):
            in_range = hashes[cut[i] : cut[i + 1]]
            in_range = in_range if mask is None else in_range[mask[positions[cut[i] : cut[i + 1]]]]
            keys.append(in_range)
            owners.append(np.full(len(in_range), owner))
        key, owner_of = np.concatenate(keys), np.concatenate(owners)
        order = np.lexsort((owner_of, key))
        key, owner_of = key[order], owner_of[order]
        colliding.append(np.unique(key[1:][(key[1:] == key[:-1]) & (owner_of[1:] != owner_of[:-1])]))
    return np.concatenate(colliding)


def shared_ids(registers: Sequence[Register], colliding: NDArray[np.uint64]) -> list[SharedId]:
    """The subjects whose ids several registers use, ordered by id, then by register. colliding: `colliding_hashes`."""
    found: list[SharedId] = []
    known: set[tuple[str, int]] = set()
    for owner, register in enumerate(registers):
        rename = renaming(register, colliding)
        for part in register.snapshot.parts:
            hashes, positions = part.lookup()
            mask = register.snapshot.mask(part)
            indices = np.sort(positions[_contains(colliding, hashes)].astype(np.int64))
            indices = indices if mask is None else indices[mask[indices]]
            ids = part.subject_ids_at(indices)
            merged = ids if rename is None else packed.text(rename(packed.pack_text(ids)))
            merged_id_of = dict(zip(ids, merged, strict=True))  # a subject may have several rows
            found += [
                SharedId(name, owner, merged_id)
                for name, merged_id in merged_id_of.items()
                if (name, owner) not in known
            ]
            known.update((name, owner) for name in merged_id_of)
    found.sort(key=lambda shared: (shared.subject_id, shared.owner))
    uses = Counter(shared.subject_id for shared in found)
    return [shared for shared in found if uses[shared.subject_id] > 1]


def renaming(register: Register, colliding: NDArray[np.uint64]) -> Rename | None:
    """A function from a register's ids to their ids in the merged register; None if all ids stay the same. The function raises InvalidInput if
    a new id is taken or too long."""
    if register.central or not len(colliding):
        return None
    prefix = pa.scalar(f"{register.name}/".encode(), pa.large_binary())
    nothing = pa.scalar(b"", pa.large_binary())

    def rename(ids: Packed) -> Packed:
        shared = _contains(colliding, packed.hashes(ids))
        if not shared.any():
            return ids
        longer = pa.compute.binary_join_element_wise(prefix, ids, nothing)
        new = longer.filter(pa.array(shared))
        texts = packed.text(new)
        if max(map(len, texts)) > _ID_LENGTH_MAX:
            raise InvalidInput(
                f"district {register.name!r}: an id with the district's name before it has more than {_ID_LENGTH_MAX} characters; "
                "give the district a shorter name, as NAME=FOLDER"
            )
        taken = np.flatnonzero(register.snapshot.rows_of(new) >= 0)
        if len(taken):
            raise InvalidInput(
                f"district {register.name!r} has a subject {texts[int(taken[0])]!r}, but another of its subjects needs this id in "
                "the merged register; give the district another name, as NAME=FOLDER"
            )
        return pa.compute.if_else(pa.array(shared), longer, ids)

    return rename


def _contains(ascending: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(values), bool)
    nearest = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[nearest] == values)


# the copy -------------------------------------------------------------------------------------------------------------


def stage(
    registers: Sequence[Register],
    colliding: NDArray[np.uint64],
    folder: Path,
    config: Config,
    storage: Storage,
    progress: Progress,
) -> None:
    """Copies every register into the gallery in `folder`, block by block. Blocks that an earlier run copied are not copied again.

    The result depends only on the registers, not on interruptions: segments are merged only between two registers, and at the end.
    """
    gallery_id = "staging-" + xxhash.xxh3_64_hexdigest(json.dumps([register.key for register in registers]).encode())
    quiet = replace(config.gallery, background=False)
    gallery = Gallery.open(folder, storage=storage, config=quiet, settings=config.to_dict(), gallery_id=gallery_id)
    try:
        total = sum(register.snapshot.live_count for register in registers)
        done = 0
        for register in registers:
            before = steps_done(gallery.snapshot(), register.step)
            if not before:
                gallery.maintain()
            done += sum(step.added for step in before)
            copied = copy_rows(
                register.snapshot,
                gallery,
                register.step,
                lambda part: None,
                rename=renaming(register, colliding),
                groups=frozenset([GROUP + register.name]),
            )
            for step in copied:
                done += step.added
                progress("copying", done, total)
        gallery.maintain()
    finally:
        gallery.close()


class Origins:
    """Maps the rows of the staging gallery to the registers that they come from."""

    def __init__(self, staged: Snapshot, names: Sequence[str]) -> None:
        """names: the `Register.step` of each register."""
        steps = sorted(
            (step.first_row, owner, step.from_row)
            for owner, name in enumerate(names)
            for step in steps_done(staged, name)
        )
        self._first, self._owner, self._from = np.array(steps, np.int64).reshape(-1, 3).T

    def of(self, rows: Int64) -> tuple[Int64, Int64]:
        """(index of the register, row in that register) of each row, int64 (n,)."""
        step = np.searchsorted(self._first, rows, "right") - 1
        return self._owner[step], rows - self._first[step] + self._from[step]
