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
    key: Annotated[Path | None, typer.Option("--key", help="The key that signed the checkpoint (PEM).")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the hash chain, the rows that its commits wrote, and the heads of the segment files. Exit code 4 where something is wrong."""
    _refuse_url(gallery)
    found = jobs.verify_log(gallery, configured(gallery, config), checkpoint=checkpoint, key=key)
    lines = [f"checked {counted(found.links, 'link')}, {counted(found.rows, 'row')}, {counted(found.files, 'file')}"]
    lines[0] += f", commits {found.first_commit:,} to {found.commit:,}, {'with' if found.keyed else 'without'} a key"
    lines += [f"note: {note}" for note in found.notes] + [f"wrong: {problem}" for problem in found.problems]
    finish(found.to_dict(), lines, as_json)
    if found.problems:
        raise typer.Exit(Exit.DAMAGED)


@log.command()
def checkpoint(
    key: Annotated[Path, typer.Option("--key", help="The auditor's Ed25519 private key (PEM).")],
    to: Annotated[Path, typer.Option("--to", help="The file to write; it must not exist.")],
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the hash chain and sign its newest value. Keep the file outside: it shows a rollback or a fork later."""
    _refuse_url(gallery)
    made = jobs.log_checkpoint(gallery, key, to, configured(gallery, config))
    finish(made.to_dict(), f"commit {made.commit:,} is signed in {to}", as_json)


def _refuse_url(gallery: Path) -> None:
    if str(gallery).startswith(("postgresql:", "postgres:")):
        raise InvalidInput("a register in PostgreSQL has no hash chain yet; name a gallery in a folder")
