"""Defines the commands on the keys of field kits: kit keys, centre-key, trust, revoke. Each runs one job.

A passphrase comes from a file descriptor, an environment variable, or the terminal. It is never printed, and never an argument, because every
process on the machine can read arguments.
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.opening import settings
from biodedup.cli.options import JsonOption
from biodedup.cli.printing import finish
from biodedup.errors import InvalidInput
from biodedup.jobs.kits.format.keys import LIFETIME_DAYS

if TYPE_CHECKING:
    from biodedup.jobs.kits.trust import TrustedKey

kit = typer.Typer(
    no_args_is_help=True, help="Pack and ingest batches of teams that work without a network, and manage their keys."
)
app.add_typer(kit, name="kit", rich_help_panel=Panel.KITS)

TrustedOption = Annotated[
    Path, typer.Option("--trusted", help="Folder with the .pub files of trusted kits, and the rights of each.")
]
NoPassphrase = Annotated[
    bool, typer.Option("--no-passphrase", help="Do not encrypt the private key; then its disk must be encrypted.")
]
KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="A .pub file; or the kit id or fingerprint of a key in the folder.")
]
PassphraseFd = Annotated[
    int | None,
    typer.Option("--passphrase-fd", metavar="N", help="Read the passphrase from this file descriptor, its first line."),
]
KIT_VARIABLE, CENTRE_VARIABLE = "BIODEDUP_KIT_PASSPHRASE", "BIODEDUP_CENTRE_PASSPHRASE"
_BYTES_MAX = 4096
DateOption = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], metavar="DATE")]


def passphrase(what: str, variable: str, fd: int | None, *, confirm: bool = False) -> str:
    """Reads a passphrase. what: the key that it protects, for the prompt; variable: name of the environment variable; fd: file descriptor;
    confirm: the passphrase is new, so that the prompt asks for it twice. Raises InvalidInput."""
    if fd is not None:
        try:
            with os.fdopen(os.dup(fd), "rb") as file:
                return file.readline(_BYTES_MAX).rstrip(b"\r\n").decode()
        except (OSError, UnicodeDecodeError):
            raise InvalidInput(
                f"no passphrase could be read from file descriptor {fd}; open it, as in `--passphrase-fd 3 3<file`"
            ) from None
    if variable in os.environ:
        return os.environ[variable]
    if sys.stdin.isatty():
        return str(typer.prompt(f"Passphrase of {what}", hide_input=True, confirmation_prompt=confirm, err=True))
    raise InvalidInput(f"{what} needs a passphrase; set {variable}, or name a file descriptor with --passphrase-fd")


@kit.command()
def keys(
    kit_id: Annotated[str, typer.Option("--kit-id", help="The kit's name: letters, digits, dots, hyphens.")],
    result: Annotated[
        Path, typer.Option("--out", "-o", help="Private key, .key; the .pub file is written beside it.")
    ] = Path("kit.key"),
    days: Annotated[int, typer.Option("--days", help="Days until the key expires.")] = LIFETIME_DAYS,
    no_passphrase: NoPassphrase = False,
    passphrase_fd: PassphraseFd = None,
    as_json: JsonOption = False,
) -> None:
    """Make a kit's keys, once, on the kit. The .pub file goes to the centre."""
    secret = None if no_passphrase else passphrase(f"kit {kit_id}", KIT_VARIABLE, passphrase_fd, confirm=True)
    public = jobs.make_keys(kit_id, result, passphrase=secret, days=days)
    fingerprint = public.fingerprint.hex()[:16]
    finish(
        {
            "kit_id": kit_id,
            "key": str(result),
            "public": str(result.with_suffix(".pub")),
            "fingerprint": fingerprint,
            "encrypted": secret is not None,
            "expires": _date(public.expires_at),
        },
        f"{result} is private and stays on this kit; take {result.with_suffix('.pub')} to the centre, which trusts it with "
        f"`biodedup kit trust`, fingerprint {fingerprint}; it expires on {_date(public.expires_at)}",
        as_json,
    )


@kit.command()
def centre_key(
    result: Annotated[
        Path, typer.Option("--out", "-o", help="Private key, .key; the .pub file is written beside it.")
    ] = Path("centre.key"),
    no_passphrase: NoPassphrase = False,
    passphrase_fd: PassphraseFd = None,
    as_json: JsonOption = False,
) -> None:
    """Make the centre's key, once, at the centre. The .pub file goes to every kit, which encrypts batches for it."""
    secret = None if no_passphrase else passphrase("the centre's key", CENTRE_VARIABLE, passphrase_fd, confirm=True)
    public = jobs.make_centre_key(result, passphrase=secret)
    fingerprint = public.fingerprint.hex()[:16]
    finish(
        {
            "key": str(result),
            "public": str(result.with_suffix(".pub")),
            "fingerprint": fingerprint,
            "encrypted": secret is not None,
        },
        f"{result} is private: without it and its passphrase no batch can be read, so keep a copy in a safe. Copy "
        f"{result.with_suffix('.pub')} beside each kit's key, as centre.pub, fingerprint {fingerprint}",
        as_json,
    )


@kit.command()
def trust(
    key: KeyArgument,
    trusted: TrustedOption = Path("trusted"),
    group: Annotated[
        list[str] | None,
        typer.Option(
            "--group", help="A group that the kit may write; repeatable. '*': any. Replaces the earlier list."
        ),
    ] = None,
    batch_max: Annotated[
        int | None, typer.Option("--batch-max", min=0, help="The largest number of encounters in a batch.")
    ] = None,
    day_max: Annotated[
        int | None, typer.Option("--day-max", min=0, help="The largest number of new encounters in 24 hours.")
    ] = None,
    void_max: Annotated[
        int | None,
        typer.Option("--void-max", min=0, help="How many sequence numbers the kit may declare void, in total."),
    ] = None,
    since: DateOption = None,
    until: DateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Trust a kit's key, and state its rights: groups, numbers of encounters, the first day (--since) and the last day (--until)."""
    changes: dict[str, Any] = {
        "groups": None if group is None else tuple(group),
        "encounters_batch_max": batch_max,
        "encounters_day_max": day_max,
        "void_max": void_max,
        "not_before": None if since is None else since.replace(tzinfo=UTC).timestamp(),
        "not_after": None if until is None else until.replace(tzinfo=UTC, hour=23, minute=59, second=59).timestamp(),
    }
    known = jobs.set_trust(key, trusted, **{name: value for name, value in changes.items() if value is not None})
    _finish(known, as_json)


@kit.command()
def revoke(
    key: KeyArgument,
    by: Annotated[str, typer.Option("--by", help="The person who revokes it.")],
    reason: Annotated[str, typer.Option("--reason", help="The reason.")],
    trusted: TrustedOption = Path("trusted"),
    as_json: JsonOption = False,
) -> None:
    """Revoke a kit's key permanently: batches that it signed are no longer accepted. Records that were ingested remain."""
    chosen = settings(None, None).config
    if chosen.identities is not None:
        chosen.identity(by).require("administer")
    _finish(jobs.revoke(key, trusted, by=by, reason=reason), as_json)


def _finish(known: TrustedKey, as_json: bool) -> None:
    """Prints the rights of a key."""
    trust, fingerprint = known.trust, known.fingerprint.hex()[:16]
    until = known.expires_at if trust.not_after is None else trust.not_after
    facts = {
        "kit_id": known.kit_id,
        "fingerprint": fingerprint,
        "groups": list(trust.groups),
        "encounters_batch_max": trust.encounters_batch_max,
        "encounters_day_max": trust.encounters_day_max,
        "void_max": trust.void_max,
        "not_before": None if trust.not_before is None else _date(trust.not_before),
        "not_after": _date(until),
        "revoked_at": None if trust.revoked_at is None else _date(trust.revoked_at),
        "revoked_by": trust.revoked_by,
        "revoked_reason": trust.revoked_reason,
    }
    text = f"kit {known.kit_id}, key {fingerprint}: "
    if trust.revoked_at is not None:
        text += f"revoked on {_date(trust.revoked_at)} by {trust.revoked_by} ({trust.revoked_reason})"
    else:
        text += (
            f"groups {', '.join(trust.groups) or 'none'}; at most {trust.encounters_batch_max:,} encounters a batch, "
            f"{trust.encounters_day_max:,} a day, {trust.void_max:,} void sequences; until {_date(until)}"
        )
    finish(facts, text, as_json)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
