"""Defines the commands on the log of a gallery: log verify, show, archive, checkpoint, key. Each runs one job, or calls one method of the
engine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

import biodedup as bd
from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.exits import Exit
from biodedup.cli.opening import acting, configured, existing
from biodedup.cli.options import DEFAULT_GALLERY, ConfigOption, GalleryOption, JsonOption, PersonOption, WaitOption
from biodedup.cli.printing import counted, finish, print_json, say, show_table
from biodedup.errors import InvalidInput
from biodedup.gallery.catalogue.audit import AuditRecord, chosen

log = typer.Typer(
    no_args_is_help=True, help="Verify the hash chain of the commits, sign its checkpoints, and show the audit log."
)
app.add_typer(log, name="log", rich_help_panel=Panel.CARE)


@log.command()
def verify(
    gallery: GalleryOption = DEFAULT_GALLERY,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A checkpoint that must be in this chain.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="The public key of the checkpoint's signer (PEM).")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the hash chain, the rows of the database, and the headers of the segment files. Exit code 4: something is wrong.

    `doctor` also reads the blocks of the segment files.
    """
    report = jobs.verify_log(gallery, configured(gallery, config), checkpoint=checkpoint, public_key=public_key)
    counts = [(report.links, "link"), (report.rows, "row"), (report.files, "file"), (report.calls, "recorded call")]
    checked = ", ".join(counted(count, noun) for count, noun in counts)
    lines = [f"checked {checked}; commits {report.first_commit:,} to {report.commit:,}"]
    if not report.keyed:
        lines.append(
            "note: without a key, the chain reveals accidents but no forgery: a forger can compute the chain again"
        )
    lines += [f"note: {note}" for note in report.notes] + [f"wrong: {problem}" for problem in report.problems]
    finish(report.to_dict(), lines, as_json)
    if report.problems:
        raise typer.Exit(Exit.DAMAGED)


@log.command()
def show(
    since: Annotated[
        str | None, typer.Option("--since", help="From this day or time on, such as 2026-11-30T08:00; UTC.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", help="Before this day or time.")] = None,
    principal: Annotated[str | None, typer.Option("--principal", help="Only calls of this principal.")] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="Only calls that name this subject.")] = None,
    archive: Annotated[
        Path | None, typer.Option("--archive", help="Show the records of a file of `log archive`, and check them.")
    ] = None,
    by: PersonOption = "",
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the audit log: who called what, when, why, about whom, and the outcome. Needs the role audit if the settings name identities.

    `log verify` checks that no record was dropped or changed.
    """
    limits = {"since": _seconds("--since", since), "until": _seconds("--until", until)}
    with bd.Engine.open(gallery, configured(gallery, config), read_only=True) as engine:
        caller = acting(engine, by)
        if archive is None:
            records = list(caller.audit_records(**limits, principal=principal, subject_id=subject))
        else:
            kept = chosen((), caller.archived_audit(archive), **limits)
            records = [r for r in kept if principal in (None, r.principal) and subject in (None, r.subject_id)]
    if as_json:
        print_json({"records": [record.to_dict() for record in records]})
        return
    if records:
        show_table(
            map(_cells, records), ("number", "time (UTC)", "principal", "purpose", "call", "about", "count", "outcome")
        )
    say(f"{counted(len(records), 'call')}")


@log.command()
def archive(
    before: Annotated[
        str, typer.Option("--before", help="Move records before this day or time, such as 2026-11-30; UTC.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, unencrypted; it must not exist.")],
    by: PersonOption = "",
    wait: WaitOption = 0,
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move old records of the audit log to a file. The gallery keeps their proof, with which `log show --archive FILE` checks the file."""
    seconds = _seconds("--before", before)
    assert seconds is not None, "the option is required"
    with existing(gallery, configured(gallery, config), wait) as engine:
        moved = acting(engine, by).archive_audit(out, before=seconds)
    text = f"{counted(moved, 'record')} moved to {out}" if moved else "no packed record is that old; nothing was moved"
    finish({"moved": moved, "archive": str(out) if moved else None}, text, as_json)


def _cells(record: AuditRecord) -> tuple[object, ...]:
    about = " ".join(filter(None, (record.subject_id, record.encounter_id)))
    time = f"{datetime.fromtimestamp(record.at, UTC):%Y-%m-%d %H:%M:%S}"
    return record.number, time, record.principal, record.purpose, record.call, about, record.count, record.outcome


def _seconds(option: str, text: str | None) -> float | None:
    """A day or a time as seconds since 1970. Raises InvalidInput."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(
            f"{option} is {text!r}, wanted a day or a time, such as 2026-11-30 or 2026-11-30T08:00"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


@log.command()
def checkpoint(
    key: Annotated[Path, typer.Option("--sign", help="The auditor's private key (`biodedup log key`).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; it must not exist.")],
    gallery: GalleryOption = DEFAULT_GALLERY,
    url: Annotated[str | None, typer.Option("--url", help="Also send the checkpoint to this address by POST.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the hash chain and sign its newest value. Keep the file on another system: it can later prove a rollback or a fork."""
    made = jobs.log_checkpoint(gallery, key, out, configured(gallery, config), url=url)
    finish(made.to_dict(), f"commit {made.commit:,} is signed in {out}", as_json)


@log.command()
def key(
    file: Annotated[Path, typer.Argument(help="The file of the private key to make; it must not exist.")],
    as_json: JsonOption = False,
) -> None:
    """Make a key pair for checkpoints and receipts: FILE has the private key, and the same name with the ending .pub the public key."""
    public = jobs.make_signing_key(file)
    finish(
        {"key": str(file), "public_key": public}, f"the public key {public} is in {file.with_suffix('.pub')}", as_json
    )
