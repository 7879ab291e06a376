"""Manages the field kits' keys that the centre trusts, with the groups, limits, dates and revocation of each.

Owns the trusted folder. `NAME.pub` is the public key that a kit made. `FINGERPRINT.toml` is the centre's record of the key; its name is the first
16 digits of the fingerprint, so that it applies to every copy of the key. Never reads a batch file.

1. A key without a record may only send encounters without groups, within the default limits.
2. An unreadable record bars only its own key. An unreadable public key does not bar any other key.
3. A revoked key stays revoked, even if its file returns under another name.

    # 3f2a90bb12345678.toml
    groups = ["north"]              # the groups that its encounters may have; ["*"]: any
    encounters_batch_max = 2000
    encounters_day_max = 2000       # in 24 hours, by the centre's clock
    void_max = 100                  # the number of sequence numbers that it may declare void, in total
    not_before = 2026-11-01T00:00:00Z
    not_after = 2027-11-01T00:00:00Z
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from biodedup.errors import InvalidInput
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.private import replace_private
from biodedup.jobs.kits.format.keys import PublicKey, load_public, require_cryptography
from biodedup.jobs.shared.files import read_bounded
from biodedup.values import check_groups, check_id

_RECORD_BYTES_MAX = 64 << 10
_NAME_DIGITS = 16
_TIMES = ("not_before", "not_after", "revoked_at")
_COUNTS = ("encounters_batch_max", "encounters_day_max", "void_max")


@dataclass(frozen=True)
class Trust:
    """The rights of a key. Times: seconds since 1970. not_after: None means until the key expires. broken: the reason why its record cannot be
    read, or ''."""

    groups: tuple[str, ...] = ()
    encounters_batch_max: int = 5_000
    encounters_day_max: int = 10_000
    void_max: int = 1_000
    not_before: float | None = None
    not_after: float | None = None
    revoked_at: float | None = None
    revoked_by: str = ""
    revoked_reason: str = ""
    broken: str = ""

    def forbidden(self, groups: tuple[str, ...]) -> tuple[str, ...]:
        """The given groups that the key may not write."""
        return () if "*" in self.groups else tuple(group for group in groups if group not in self.groups)


@dataclass(frozen=True, eq=False)
class TrustedKey(PublicKey):
    """A kit's key in the trusted folder, with the centre's record of it."""

    trust: Trust = field(default_factory=Trust)

    def barred(self, now: float) -> str:
        """The reason why the key may not send at this time; '' if it may."""
        trust, until = self.trust, self.expires_at if self.trust.not_after is None else self.trust.not_after
        if trust.broken:
            return trust.broken
        if trust.revoked_at is not None:
            return f"was revoked on {_day(trust.revoked_at)} by {trust.revoked_by} ({trust.revoked_reason})"
        if trust.not_before is not None and now < trust.not_before:
            return f"is not valid before {_day(trust.not_before)}"
        if now > until:
            return f"expired on {_day(until)}; make new keys on the kit, or extend this one with `biodedup kit trust --until`"
        return ""


class Trusted(Mapping[bytes, TrustedKey]):
    """fingerprint -> key. problems: a sentence for each unusable file in the folder."""

    def __init__(self, keys: Mapping[bytes, TrustedKey], problems: tuple[str, ...] = ()) -> None:
        self._keys = dict(keys)
        self.problems = problems

    def __getitem__(self, fingerprint: bytes) -> TrustedKey:
        return self._keys[fingerprint]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def load_trusted(source: Path) -> Trusted:
    """Loads the keys of a folder's `*.pub` files, or of one such file. A kit may have several keys, old and new.

    Raises InvalidInput if there is no usable key.
    """
    require_cryptography()
    folder = source if source.is_dir() else source.parent
    keys: dict[bytes, TrustedKey] = {}
    problems: list[str] = []
    for path in sorted(source.glob("*.pub")) if source.is_dir() else [source]:
        try:
            key = load_public(path)
        except InvalidInput as error:
            problems.append(str(error))
            continue
        known = keys.get(key.fingerprint)
        if known is not None and known.kit_id != key.kit_id:
            problems.append(
                f"{path} is the key of kit {known.kit_id} under the name {key.kit_id}; it counts as a key of {known.kit_id}"
            )
        if known is None:
            keys[key.fingerprint] = TrustedKey(**_own(key), trust=_record(_path(folder, key)))
    if not keys:
        reason = "; ".join(problems) or "copy the .pub file of every kit that may send batches to it"
        raise InvalidInput(f"{source} holds no .pub files that can be used: {reason}")
    if source.is_dir():
        named = {_path(folder, key).name for key in keys.values()}
        problems += [
            f"{path} is not used: it is not the record of a key in this folder; a record is named by its key's fingerprint, such as {min(named)}"
            for path in sorted(folder.glob("*.toml"))
            if path.name not in named and not _is_name(path.stem)
        ]
        problems += [key.trust.broken for key in keys.values() if key.trust.broken]
    return Trusted(keys, tuple(problems))


def set_trust(key: Path | str, trusted: Path, **changes: Any) -> TrustedKey:
    """Changes the rights of a key (fields of `Trust`), and trusts it. key: a .pub file, which is copied into the folder, or the kit id or
    fingerprint of a key in the folder. Raises InvalidInput, also for a revoked key, and StorageUnavailable."""
    public = _found(key, trusted)
    path = _path(trusted, public)
    before = _record(path)
    if before.broken:
        raise InvalidInput(before.broken)
    if before.revoked_at is not None:
        raise InvalidInput(f"the key of kit {public.kit_id} was revoked, which is permanent; make new keys on the kit")
    trust = replace(before, **changes)
    trust = _checked(trust)
    with translated(f"writing {trusted}"):
        trusted.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(path, trust, public)
    if not any(
        known.fingerprint == public.fingerprint for known in _keys(trusted)
    ):  # then `key` is a file outside the folder
        replace_private(trusted / f"{public.kit_id}-{public.fingerprint.hex()[:8]}.pub", Path(key).read_bytes())
    return TrustedKey(**_own(public), trust=trust)


def revoke(
    key: Path | str, trusted: Path, *, by: str, reason: str, clock: Callable[[], float] = time.time
) -> TrustedKey:
    """Revokes a key permanently. Enrolled batches remain. If the key is already revoked, nothing changes. An unreadable record is replaced.

    by: the person; reason: a printable text. Raises InvalidInput, StorageUnavailable.
    """
    check_id(by, "by")
    if not reason.strip() or len(reason) > 500 or not reason.isprintable():
        raise InvalidInput("a revocation needs a reason, a printable text of up to 500 characters; state why")
    public = _found(key, trusted)
    path = _path(trusted, public)
    trust = _record(path)
    if trust.revoked_at is None:
        trust = replace(trust, revoked_at=round(clock(), 3), revoked_by=by, revoked_reason=reason.strip(), broken="")
        _write(path, trust, public)
    return TrustedKey(**_own(public), trust=trust)


# the folder -------------------------------------------------------------------------------------------------------


def _own(key: PublicKey) -> dict[str, Any]:
    return {field.name: getattr(key, field.name) for field in fields(PublicKey)}


def _path(folder: Path, key: PublicKey) -> Path:
    return folder / f"{key.fingerprint.hex()[:_NAME_DIGITS]}.toml"


def _is_name(stem: str) -> bool:
    return len(stem) == _NAME_DIGITS and not set(stem) - set("0123456789abcdef")


def _keys(trusted: Path) -> list[PublicKey]:
    try:
        return list(load_trusted(trusted).values())
    except InvalidInput:
        return []


def _found(key: Path | str, trusted: Path) -> PublicKey:
    if Path(key).is_file():
        return load_public(Path(key))
    name = str(key)
    found = [
        key_of_kit
        for key_of_kit in _keys(trusted)
        if name == key_of_kit.kit_id or (len(name) >= 8 and key_of_kit.fingerprint.hex().startswith(name.lower()))
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InvalidInput(
            f"{name} is neither a .pub file, nor the kit id or fingerprint (8 digits or more) of a key in {trusted}"
        )
    fingerprints = ", ".join(key_of_kit.fingerprint.hex()[:_NAME_DIGITS] for key_of_kit in found)
    raise InvalidInput(f"kit {name} has {len(found)} keys in {trusted}; name one by its fingerprint: {fingerprints}")


# records ----------------------------------------------------------------------------------------------------------


def _record(path: Path) -> Trust:
    """The centre's record of a key; the default rights if there is none."""
    try:
        content = tomllib.loads(read_bounded(path, _RECORD_BYTES_MAX).decode())
        unknown = content.keys() - {field.name for field in fields(Trust)} - {"kit_id"} | content.keys() & {"broken"}
        if unknown:
            raise InvalidInput(f"unknown entries {sorted(unknown)}")
        content.pop("kit_id", None)
        times = {name: _seconds(content[name], late=name == "not_after") for name in _TIMES if name in content}
        return _checked(Trust(**content | times))
    except FileNotFoundError:
        return Trust()
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return Trust(
            broken=f"{path} is not a valid record of a key ({error}); batches of this key are refused until it is repaired"
        )


def _checked(trust: Trust) -> Trust:
    """The rights, validated, with groups as a tuple. Raises InvalidInput."""
    for name in _COUNTS:
        value = getattr(trust, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InvalidInput(f"{name} is {value!r}, wanted a whole number from 0")
    for name in _TIMES:
        if not isinstance(getattr(trust, name), float | int | None):
            raise InvalidInput(f"{name} is {getattr(trust, name)!r}, wanted a time")
    if not all(isinstance(getattr(trust, name), str) for name in ("revoked_by", "revoked_reason")):
        raise InvalidInput("revoked_by and revoked_reason are texts")
    return replace(trust, groups=check_groups(trust.groups))


def _write(path: Path, trust: Trust, key: PublicKey) -> None:
    """Writes a record as TOML."""
    lines = [f"# The centre's record of a key of kit {key.kit_id}, fingerprint {key.fingerprint.hex()}"]
    lines.append(f"kit_id = {json.dumps(key.kit_id)}")
    for name, value in asdict(trust).items():
        if name in _TIMES:
            if value is not None:
                lines.append(f"{name} = {datetime.fromtimestamp(value, UTC).isoformat(timespec='milliseconds')}")
        elif name != "broken" and value != "":
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    replace_private(path, ("\n".join(lines) + "\n").encode())


def _seconds(moment: object, *, late: bool = False) -> float:
    """A TOML date or time as seconds since 1970. late: a date without a time means the end of the day."""
    if isinstance(moment, date) and not isinstance(moment, datetime):
        moment = datetime(
            moment.year, moment.month, moment.day, 23 if late else 0, 59 if late else 0, 59 if late else 0
        )
    if not isinstance(moment, datetime):
        raise InvalidInput(f"{moment!r} is not a time; write it such as 2027-11-01T00:00:00Z")
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"
