"""The registers of a merge: districts' galleries, opened for reading, and their copy in one gallery beside the result.

Owns the districts' names, the ids that two districts both gave, and the staging gallery. A subject keeps its id there unless another district
has it, too; then it is `NAME/subject_id`. Never compares templates, and never writes to a register.
"""

from __future__ import annotations

import json
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
from biodedup.gallery.policies import PolicyVersion, mismatch, told
from biodedup.gallery.segments.part import Int64
from biodedup.gallery.snapshot import Snapshot
from biodedup.jobs.shared.progress import Progress
from biodedup.values import check_id

GROUP = "district:"
_RANGE_ROWS = 1 << 20  # hashes of ids sorted at once
_ID_LENGTH_MAX = 256


@dataclass(frozen=True, eq=False)
class Register:
    """A district's gallery as of one version, and its policy. central: the one that the others join; its subjects keep their ids."""

    name: str
    gallery_id: str
    snapshot: Snapshot
    policy: PolicyVersion
    central: bool = False

    @property
    def key(self) -> dict[str, object]:
        """What it is, JSON-ready."""
        return {
            "name": self.name,
            "gallery_id": self.gallery_id,
            "version": self.snapshot.version,
            "subjects": self.snapshot.live_count,
            "central": self.central,
        }

    @property
    def step(self) -> str:
        """Under what its copy is noted in the staging gallery."""
        return step_of(self.key)


def step_of(key: Mapping[str, object]) -> str:
    """As `Register.step`, of what `Register.key` said."""
    return f"stage:{key['name']}:{key['gallery_id']}:{key['version']}"


def named(source: str | Path) -> tuple[str, Path]:
    """(district's name, folder) of `NAME=FOLDER`, or of a folder, whose own name it is then."""
    name, separator, folder = str(source).partition("=")
    if not separator or Path(source).exists():
        name, folder = Path(source).resolve().name, str(source)
    check_id(name, "a district's name")
    if "/" in name:
        raise InvalidInput(
            f"district {name!r} has a slash in its name, which ends the name in an id; name it otherwise"
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
    """The galleries, for reading. Raises InvalidInput for one that is named twice, NotAGallery, ModelMismatch."""
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
    """Raises InvalidInput, ModelMismatch where they cannot be merged."""
    seen: dict[str, Register] = {}
    for register in registers:
        for what, value in (("name", register.name), ("gallery", register.gallery_id)):
            if (other := seen.setdefault(f"{what}:{value}", register)) is not register:
                raise InvalidInput(
                    f"{register.name!r} and {other.name!r} have the same {what}; "
                    + (
                        "write NAME=FOLDER"
                        if what == "name"
                        else "each gallery is merged once, not beside its own copy"
                    )
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
    """What a merge decides by: the central gallery's policy, else the one that is given, else the one that all districts have.

    Raises PolicyMismatch where another one is given than the central gallery's, InvalidInput where districts have different ones.
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
                f"districts decide by different policies: {told(changes, f'in {first.name}', f'in {other.name}')}; state the policy "
                "that is to count ([policy] in the settings file), with which --apply creates the central gallery; or name a central "
                "gallery that exists already, whose policy counts then"
            )
    return first.policy.policy


# ids that several districts gave --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SharedId:
    """One of the subjects whose id another district gave, too. owner: index of its register."""

    subject_id: str
    owner: int
    merged_id: str


def colliding_hashes(registers: Sequence[Register]) -> NDArray[np.uint64]:
    """Hashes of the ids that live in two registers or more, ascending; range by range, so that memory is bounded.

    A hash that two different ids have by chance (once in a thousand merges of 200 million) costs them a prefix, and no more.
    """
    lookups = [
        (owner, register.snapshot.mask(part), *part.lookup())
        for owner, register in enumerate(registers)
        for part in register.snapshot.parts
    ]
    total = sum(len(hashes) for *_, hashes, _ in lookups)
    bounds = np.linspace(0, 2.0**64, total // _RANGE_ROWS + 2)[1:-1].astype(np.uint64)
    cuts = [[0, *np.searchsorted(hashes, bounds).tolist(), len(hashes)] for *_, hashes, _ in lookups]
    found = [np.zeros(0, np.uint64)]
    for i in range(len(bounds) + 1):
        keys, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for (owner, mask, hashes, positions), cut in zip(lookups, cuts, strict=True):
            some = hashes[cut[i] : cut[i + 1]]
            some = some if mask is None else some[mask[positions[cut[i] : cut[i + 1]]]]
            keys.append(some)
            owners.append(np.full(len(some), owner))
        key, owner_of = np.concatenate(keys), np.concatenate(owners)
        order = np.lexsort((owner_of, key))
        key, owner_of = key[order], owner_of[order]
        found.append(np.unique(key[1:][(key[1:] == key[:-1]) & (owner_of[1:] != owner_of[:-1])]))
    return np.concatenate(found)


def shared_ids(registers: Sequence[Register], colliding: NDArray[np.uint64]) -> list[SharedId]:
    """The registers that have these ids, by id, then in the order of the registers."""
    found: list[SharedId] = []
    known: set[tuple[str, int]] = set()
    for owner, register in enumerate(registers):
        rename = renaming(register, colliding)
        for part in register.snapshot.parts:
            hashes, positions = part.lookup()
            mask = register.snapshot.mask(part)
            at = np.sort(positions[_contains(colliding, hashes)].astype(np.int64))
            at = at if mask is None else at[mask[at]]
            ids = part.subject_ids_at(at)
            merged = ids if rename is None else packed.text(rename(packed.pack_text(ids)))
            each = dict(zip(ids, merged, strict=True))  # a subject may have several rows
            found += [SharedId(one, owner, other) for one, other in each.items() if (one, owner) not in known]
            known.update((one, owner) for one in each)
    found.sort(key=lambda shared: (shared.subject_id, shared.owner))
    times: dict[str, int] = {}
    for shared in found:
        times[shared.subject_id] = times.get(shared.subject_id, 0) + 1
    return [shared for shared in found if times[shared.subject_id] > 1]


def renaming(register: Register, colliding: NDArray[np.uint64]) -> Rename | None:
    """How a register's ids read in the merged one; None where they stay. The function raises InvalidInput for a name that is
    taken."""
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
                f"district {register.name!r}: an id with its district before it has more than {_ID_LENGTH_MAX} characters; "
                "give the district a shorter name, as NAME=FOLDER"
            )
        taken = np.flatnonzero(register.snapshot.rows_of(new) >= 0)
        if len(taken):
            raise InvalidInput(
                f"district {register.name!r} has a subject {texts[int(taken[0])]!r} already, which is what another of its "
                "subjects would be called; give the district another name, as NAME=FOLDER"
            )
        return pa.compute.if_else(pa.array(shared), longer, ids)

    return rename


def _contains(ascending: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(values), bool)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[at] == values)


# the copy -------------------------------------------------------------------------------------------------------------


def stage(
    registers: Sequence[Register],
    colliding: NDArray[np.uint64],
    folder: Path,
    config: Config,
    storage: Storage,
    progress: Progress,
) -> None:
    """Copies every register into the gallery in `folder`, block by block; what is there already is not copied again.

    What is there at the end depends on the registers alone, not on where a copy was interrupted: segments are merged between
    two registers, and at the end.
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
    """Where the rows of the staging gallery come from."""

    def __init__(self, staged: Snapshot, names: Sequence[str]) -> None:
        """names: of each register's steps."""
        steps = sorted(
            (step.first_row, owner, step.from_row)
            for owner, name in enumerate(names)
            for step in steps_done(staged, name)
        )
        self._first, self._owner, self._from = np.array(steps, np.int64).reshape(-1, 3).T

    def of(self, rows: Int64) -> tuple[Int64, Int64]:
        """(index of the register, row in it) of each row."""
        step = np.searchsorted(self._first, rows, "right") - 1
        return self._owner[step], rows - self._first[step] + self._from[step]
