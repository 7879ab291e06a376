"""Defines the commands on batches of field kits: kit pack, ingest, inspect. Each runs one job. `kit_keys.py` has the commands on keys."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from biodedup import jobs
from biodedup.cli.exits import Exit
from biodedup.cli.kits.kit_keys import CENTRE_VARIABLE, KIT_VARIABLE, PassphraseFd, TrustedOption, kit, passphrase
from biodedup.cli.opening import configured, in_turn
from biodedup.cli.options import DEFAULT_GALLERY, ConfigOption, FolderOption, JsonOption, ThreadsOption, WaitOption
from biodedup.cli.printing import complain, finish, print_summary, progress_bar, say
from biodedup.cli.table_options import (
    CheckOption,
    ColumnsOption,
    DateFormatOption,
    EncodingOption,
    IgnoreColumnsOption,
    finish_check,
    table_options,
)

if TYPE_CHECKING:
    from biodedup.jobs.kits.format.keys import CentreKey
    from biodedup.jobs.kits.outcomes import BatchOutcome, Examined

ReportOption = Annotated[Path | None, typer.Option("--report", help="HTML report; default: beside the result.")]
CentreKeyOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--centre-key",
        help="The centre's private key; repeatable, for old and new keys. Default: centre.key, if it exists.",
    ),
]
UnencryptedOption = Annotated[
    bool, typer.Option("--allow-unencrypted", help="Read batch files of earlier versions, which are not encrypted.")
]


@kit.command()
def pack(
    manifest: Annotated[
        Path, typer.Argument(help="CSV or Parquet with one row for each capture: subject_id, path, position, dpi, ...")
    ],
    result: Annotated[Path, typer.Option("--out", "-o", help="The batch file.")] = Path("batch.kit"),
    key: Annotated[Path, typer.Option("--key", help="The kit's private key.")] = Path("kit.key"),
    centre: Annotated[
        Path | None, typer.Option("--centre", help="The centre's .pub file. Default: centre.pub beside the kit's key.")
    ] = None,
    passphrase_fd: PassphraseFd = None,
    only_good: Annotated[
        bool, typer.Option("--only-good", help="Leave out captures that the quality gate refuses.")
    ] = False,
    templates: Annotated[bool, typer.Option("--templates", help="Pack templates instead of images.")] = False,
    report: ReportOption = None,
    check: CheckOption = False,
    encoding: EncodingOption = None,
    columns: ColumnsOption = None,
    date_format: DateFormatOption = None,
    ignore_columns: IgnoreColumnsOption = False,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check captures, find duplicates among them, and pack, sign and encrypt them.

    Packing the same manifest again changes nothing.
    """
    options = table_options(manifest, encoding, columns, date_format, ignore_columns)
    if check:
        finish_check(jobs.check_kit_manifest(manifest, configured(None, config), options), as_json)
    secret = passphrase(str(key), KIT_VARIABLE, passphrase_fd) if jobs.needs_passphrase(key) else None
    with progress_bar(lines=not as_json) as progress:
        packed = jobs.pack_batch(
            manifest,
            result,
            key,
            configured(None, config, threads=threads),
            centre=centre,
            passphrase=secret,
            only_good=only_good,
            as_templates=templates,
            report=report,
            options=options,
            progress=progress,
        )
    print_summary(packed.summary() | {"report": str(report or result.with_name(f"{result.stem}.html"))}, as_json)
    if not as_json:
        _print_packed(packed)
    if packed.key_expires_at < time.time():
        complain("by this machine's clock, the kit's key has expired: the centre may refuse the batch")
    if packed.doubles:
        raise typer.Exit(Exit.DUPLICATE)
    raise typer.Exit(Exit.REFUSED if packed.recaptures or packed.broken else Exit.DONE)


def _print_packed(packed: jobs.PackResult) -> None:
    """Prints the records that need attention: captures to take again, records that were not packed, and duplicates."""
    for record in packed.recaptures[:20]:
        refused = ", ".join(f"{refusal.column} {refusal.reason}" for refusal in record.refusals)
        say(f"capture again: {record.subject_id}: {refused}")
    for broken in packed.broken[:20]:
        say(f"not packed: {broken.subject_id}: {broken.problem}")
    for pair in packed.doubles[:20]:
        score = "same subject_id" if pair.score_db is None else f"{pair.score_db:.1f} dB"
        say(f"{score}: {pair.subject_ids[0]}  =  {pair.subject_ids[1]}")


@kit.command()
def ingest(
    batches: Annotated[list[Path], typer.Argument(metavar="BATCH...", help="Batch files of kits.")],
    gallery: FolderOption = DEFAULT_GALLERY,
    trusted: TrustedOption = Path("trusted"),
    result: Annotated[Path, typer.Option("--out", "-o", help="Outcomes, .parquet or .csv.")] = Path("outcome.parquet"),
    report: ReportOption = None,
    centre_key: CentreKeyOption = None,
    passphrase_fd: PassphraseFd = None,
    allow_unencrypted: UnencryptedOption = False,
    wait: WaitOption = 0,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Enrol the records of batch files, each record once.

    An interrupted run resumes when the same command is started again.
    """
    centre = _centre(centre_key, passphrase_fd)
    with progress_bar(lines=not as_json) as progress:
        work = partial(
            jobs.ingest_batches,
            batches,
            gallery,
            trusted,
            result,
            configured(gallery, config, threads=threads),
            centre=centre,
            allow_unencrypted=allow_unencrypted,
            report=report,
            progress=progress,
        )
        taken = in_turn(gallery, wait, work)
    summary = taken.summary()
    problems = summary["problems"] if as_json else summary.pop("problems")
    page = str(report or result.with_suffix(".html")) if taken.written else None
    print_summary(summary | ({"report": page} if page or as_json else {}), as_json)
    if not taken.written:
        complain(f"no batch was accepted; the earlier result {result} was not changed")
    for problem in problems:
        complain(problem)
    for gap in taken.gaps[:20]:
        complain(f"kit {gap.kit_id}: sequences {gap.first}-{gap.last} never arrived")
    code = _trouble(taken.batches)
    if code is None and summary["duplicate"]:
        code = Exit.DUPLICATE
    if code is None and summary["review"]:
        code = Exit.REVIEW
    if code is None and summary["refused"] + summary["conflict"] + summary["subject_exists"]:
        code = Exit.REFUSED
    raise typer.Exit(Exit.DONE if code is None else code)


@kit.command()
def inspect(
    batches: Annotated[list[Path], typer.Argument(metavar="BATCH...", help="Batch files of kits.")],
    trusted: TrustedOption = Path("trusted"),
    centre_key: CentreKeyOption = None,
    passphrase_fd: PassphraseFd = None,
    allow_unencrypted: UnencryptedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check the signatures of batch files and the rights of their keys. Enrols nothing.

    --trusted may be one .pub file.
    """
    known, centre = jobs.load_trusted(trusted), _centre(centre_key, passphrase_fd)
    examined = [jobs.examine_batch(path, known, centre, allow_unencrypted=allow_unencrypted) for path in batches]
    for problem in known.problems:
        complain(problem)
    facts = [
        {
            "batch": str(file.path),
            "state": file.state,
            "kit_id": file.public.kit_id if file.public else None,
            "records": len(file.entries),
            "records_not_allowed": sum(bool(entry.refused) for entry in file.entries),
            "first_sequence": min((entry.sequence for entry in file.entries), default=None),
            "last_sequence": max((entry.sequence for entry in file.entries), default=None),
            "void_sequences": len(file.void),
            "digest": file.digest,
            "problem": file.problem,
        }
        for file in examined
    ]
    text = [file.problem or f"{file.path}: whole, {len(file.entries):,} records of kit {f['kit_id']}, sequences {f['first_sequence']} to {f['last_sequence']}" for file, f in zip(examined, facts, strict=True)]  # fmt: skip
    finish({"batches": facts}, text, as_json)
    raise typer.Exit(_trouble(examined) or Exit.DONE)


def _centre(paths: list[Path] | None, passphrase_fd: int | None) -> list[CentreKey]:
    """The centre's private keys: the named ones, or the default key if it exists."""
    paths = paths if paths is not None else [path for path in [Path("centre.key")] if path.exists()]
    secret: str | None = None
    loaded = []
    for path in paths:
        if jobs.needs_passphrase(path) and secret is None:
            secret = passphrase("the centre's key", CENTRE_VARIABLE, passphrase_fd)
        loaded.append(jobs.load_centre_key(path, secret))
    return loaded


def _trouble(batches: Sequence[BatchOutcome | Examined]) -> Exit | None:
    """The exit code of the worst batch; None if all are in order."""
    states = {batch.state for batch in batches}
    return Exit.DAMAGED if states & {"damaged", "cut"} else Exit.CALLER if "refused" in states else None
