"""Commands of field kits: kit keys, pack, ingest, inspect.

A thin mirror of the jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from biodedup import jobs
from biodedup.cli.base import (
    DEFAULT_GALLERY,
    Exit,
    GalleryOption,
    JsonOption,
    ThreadsOption,
    app,
    complain,
    finish,
    print_summary,
    progress_bar,
    say,
)
from biodedup.config import Config
from biodedup.jobs.kit_ingest import BatchOutcome, Examined

kit = typer.Typer(no_args_is_help=True, help="Field kits: batches from teams that work without a network.")
app.add_typer(kit, name="kit")

TrustedOption = Annotated[Path, typer.Option("--trusted", help="Folder of the .pub files of the kits that may send.")]
ReportOption = Annotated[Path | None, typer.Option("--report", help="HTML report; default: beside the result.")]


@kit.command()
def keys(
    kit_id: Annotated[str, typer.Option("--kit-id", help="The kit's name: letters, digits, dots, hyphens.")],
    result: Annotated[Path, typer.Option("--out", "-o", help="Private key, .key; .pub goes beside it.")] = Path(
        "kit.key"
    ),
    as_json: JsonOption = False,
) -> None:
    """Make a kit's keys, once, on the kit. The .pub file goes to the centre."""
    public = jobs.make_keys(kit_id, result)
    fingerprint = public.fingerprint.hex()[:16]
    finish(
        {"kit_id": kit_id, "key": str(result), "public": str(result.with_suffix(".pub")), "fingerprint": fingerprint},
        f"{result} is private and stays on this kit; copy {result.with_suffix('.pub')} into the centre's trusted folder, "
        f"fingerprint {fingerprint}",
        as_json,
    )


@kit.command()
def pack(
    manifest: Annotated[
        Path, typer.Argument(help="CSV or Parquet: subject_id, path, position, dpi, ... a row a capture.")
    ],
    result: Annotated[Path, typer.Option("--out", "-o", help="The batch file.")] = Path("batch.kit"),
    key: Annotated[Path, typer.Option("--key", help="The kit's private key.")] = Path("kit.key"),
    only_good: Annotated[
        bool, typer.Option("--only-good", help="Leave out captures that the quality gate refuses.")
    ] = False,
    templates: Annotated[bool, typer.Option("--templates", help="Pack templates instead of images.")] = False,
    report: ReportOption = None,
    threads: ThreadsOption = Config.threads,
    as_json: JsonOption = False,
) -> None:
    """Check captures, search them for doubles, and pack and sign them. The same manifest again makes the same file."""
    with progress_bar() as progress:
        packed = jobs.pack_batch(
            manifest,
            result,
            key,
            Config(threads=threads),
            only_good=only_good,
            as_templates=templates,
            report=report,
            progress=progress,
        )
    print_summary(packed.summary() | {"report": str(report or result.with_name(f"{result.stem}.html"))}, as_json)
    if not as_json:
        for record in packed.recaptures[:20]:
            refused = ", ".join(f"{refusal.column} {refusal.reason}" for refusal in record.refusals)
            say(f"capture again: {record.subject_id}: {refused}")
        for one in packed.broken[:20]:
            say(f"not packed: {one.subject_id}: {one.problem}")
        for pair in packed.doubles[:20]:
            score = "same subject_id" if pair.score_db is None else f"{pair.score_db:.1f} dB"
            say(f"{score}: {pair.subject_ids[0]}  =  {pair.subject_ids[1]}")
    if packed.doubles:
        raise typer.Exit(Exit.DUPLICATE)
    raise typer.Exit(Exit.REFUSED if packed.recaptures or packed.broken else Exit.DONE)


@kit.command()
def ingest(
    batches: Annotated[list[Path], typer.Argument(metavar="BATCH...", help="Batch files of kits.")],
    gallery: GalleryOption = DEFAULT_GALLERY,
    trusted: TrustedOption = Path("trusted"),
    result: Annotated[Path, typer.Option("--out", "-o", help="Outcomes, .parquet or .csv.")] = Path("outcome.parquet"),
    report: ReportOption = None,
    threads: ThreadsOption = Config.threads,
    as_json: JsonOption = False,
) -> None:
    """Take batches into the gallery, each record once. Interrupted, it goes on where it was."""
    with progress_bar() as progress:
        taken = jobs.ingest_batches(
            batches, gallery, trusted, result, Config(threads=threads), report=report, progress=progress
        )
    summary = taken.summary()
    problems = summary["problems"] if as_json else summary.pop("problems")
    print_summary(summary | {"report": str(report or result.with_suffix(".html"))}, as_json)
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
    as_json: JsonOption = False,
) -> None:
    """Check every signature of batch files; take nothing. --trusted may be one .pub file."""
    keys_by_fingerprint = jobs.load_trusted(trusted)
    examined = [jobs.examine_batch(path, keys_by_fingerprint) for path in batches]
    facts = [
        {
            "batch": str(one.path),
            "state": one.state,
            "kit_id": one.public.kit_id if one.public else None,
            "records": len(one.entries),
            "first_sequence": min((sequence for sequence, _ in one.entries), default=None),
            "last_sequence": max((sequence for sequence, _ in one.entries), default=None),
            "void_sequences": len(one.void),
            "digest": one.digest,
            "problem": one.problem,
        }
        for one in examined
    ]
    text = [one.problem or f"{one.path}: whole, {len(one.entries):,} records of kit {f['kit_id']}, sequences {f['first_sequence']} to {f['last_sequence']}" for one, f in zip(examined, facts, strict=True)]  # fmt: skip
    finish({"batches": facts}, text, as_json)
    raise typer.Exit(_trouble(examined) or Exit.DONE)


def _trouble(batches: Sequence[BatchOutcome | Examined]) -> Exit | None:
    states = {batch.state for batch in batches}
    return Exit.DAMAGED if states & {"damaged", "cut"} else Exit.CALLER if "refused" in states else None
