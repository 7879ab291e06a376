"""Defines the commands on receipts of decisions: receipt write, receipt verify. Each runs one job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.exits import Exit
from biodedup.cli.opening import configured, looked_into
from biodedup.cli.options import DEFAULT_GALLERY, ConfigOption, GalleryOption, JsonOption, PersonOption, PurposeOption
from biodedup.cli.printing import finish


class _Receipts(TyperGroup):
    """Reads `receipt ENCOUNTER_ID` as `receipt write ENCOUNTER_ID`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args and args[0] in self.commands else ["write", *args])


receipt = typer.Typer(cls=_Receipts, no_args_is_help=True, help="Write signed receipts of decisions, and check them.")
app.add_typer(receipt, name="receipt", rich_help_panel=Panel.CARE)


@receipt.command()
def write(
    encounter_id: str,
    key: Annotated[Path, typer.Option("--sign", help="The signer's private key (`biodedup log key`).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; it must not exist.")],
    by: PersonOption = "",
    purpose: PurposeOption = "",
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a signed receipt of a decision: outcome, thresholds, policy, models, examined rows, and its place in the log. No biometric data."""
    with looked_into(gallery, configured(gallery, config), by, purpose) as engine:
        document = jobs.write_receipt(engine, encounter_id, key, out)
    finish(document, f"{document['outcome']}: the receipt of {encounter_id} is in {out}", as_json)


@receipt.command()
def verify(
    file: Annotated[Path, typer.Argument(help="The receipt.")],
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="The public key of the receipt's signer (PEM).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the signature of a receipt, without the gallery. Exit code 4: the receipt is not valid."""
    check = jobs.verify_receipt(file, public_key)
    fields = check.receipt
    where = "" if fields["commit"] is None else f", commit {fields['commit']:,}"
    lines = [f"gallery {fields['gallery_id']}{where}: encounter {fields['encounter_id']}, {fields['outcome']}"]
    lines = [f"wrong: {problem}" for problem in check.problems] + lines + [f"note: {note}" for note in check.notes]
    finish(check.to_dict(), lines, as_json)
    if check.problems:
        raise typer.Exit(Exit.DAMAGED)
