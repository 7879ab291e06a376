"""Commands on the hash chain of a gallery: log verify, log checkpoint. Each runs one job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biodedup import jobs
from biodedup.cli.base import (
    DEFAULT_GALLERY,
    ConfigOption,
    Exit,
    GalleryOption,
    JsonOption,
    Panel,
    app,
    configured,
    counted,
    finish,
)
from biodedup.errors import InvalidInput

log = typer.Typer(no_args_is_help=True, help="Verify the hash chain of the commits, and sign checkpoints of it.")
app.add_typer(log, name="log", rich_help_panel=Panel.CARE)


@log.command()
def verify(
    gallery: GalleryOption = DEFAULT_GALLERY,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A checkpoint that has to be in this chain.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="The public key that the checkpoint is signed by (PEM).")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the hash chain, the rows of the database, and the heads of the segment files. Exit code 4 where something is wrong.

    `doctor` reads the blocks of the segment files, too.
    """
    _refuse_url(gallery)
    report = jobs.verify_log(gallery, configured(gallery, config), checkpoint=checkpoint, public_key=public_key)
    checked = ", ".join([counted(report.links, "link"), counted(report.rows, "row"), counted(report.files, "file")])
    lines = [f"checked {checked}; commits {report.first_commit:,} to {report.commit:,}"]
    if not report.keyed:
        lines.append("note: without a key the chain finds accidents; a forger can compute it again")
    lines += [f"note: {note}" for note in report.notes] + [f"wrong: {problem}" for problem in report.problems]
    finish(report.to_dict(), lines, as_json)
    if report.problems:
        raise typer.Exit(Exit.DAMAGED)


@log.command()
def checkpoint(
    key: Annotated[Path, typer.Option("--sign", help="The auditor's private key, of `biodedup log key`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; it must not exist.")],
    gallery: GalleryOption = DEFAULT_GALLERY,
    url: Annotated[str | None, typer.Option("--url", help="An address that gets the checkpoint by POST, too.")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the hash chain and sign its newest value. Keep the file outside: it shows a rollback or a fork later."""
    _refuse_url(gallery)
    made = jobs.log_checkpoint(gallery, key, out, configured(gallery, config), url=url)
    finish(made.to_dict(), f"commit {made.commit:,} is signed in {out}", as_json)


@log.command()
def key(
    file: Annotated[Path, typer.Argument(help="The file of the private key to make; it must not exist.")],
    as_json: JsonOption = False,
) -> None:
    """Make a key pair for checkpoints and receipts: FILE for its owner alone, and FILE.pub, with that ending, for everyone who checks them."""
    public = jobs.make_signing_key(file)
    finish(
        {"key": str(file), "public_key": public}, f"the public key {public} is in {file.with_suffix('.pub')}", as_json
    )


def _refuse_url(gallery: Path) -> None:
    if str(gallery).startswith(("postgresql:", "postgres:")):
        raise InvalidInput("a register in PostgreSQL has no hash chain yet; name a gallery in a folder")
