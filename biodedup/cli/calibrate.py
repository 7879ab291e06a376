"""The command `calibrate`, which runs one job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from biodedup import jobs
from biodedup.cli.base import JsonOption, Panel, app, print_json, progress_bar, say, show_table


@app.command(rich_help_panel=Panel.CARE)
def calibrate(
    pairs: Annotated[
        Path,
        typer.Argument(
            help="Parquet or CSV with similarity, minutiae or both, and mated; if known subject_a, subject_b, position. Or a gallery, whose "
            "subjects are taken for different people."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="The model: a model_id, finger256-3+mindtct-1 for both, or the path of a card. Any other model_id gets a card without weights.",
        ),
    ],
    card: Annotated[Path, typer.Option("--out", help="Where to write the card (.toml).")],
    dimension: Annotated[
        int | None, typer.Option("--dimension", min=1, help="Numbers of an embedding, for a card without weights.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the held-out half and of the interval.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit a model's calibration on your own labelled pairs, or on a gallery's impostor pairs, and write its card."""
    with progress_bar(lines=not as_json) as show:
        result = jobs.calibrate(pairs, model, card, dimension=dimension, seed=seed, progress=show)
    if as_json:
        print_json(result.summary())
        return
    for name, rows in result.held_out.items():
        cells = []
        for row in rows:
            before = "" if "fmr_before" not in row else f"{row['fmr_before']:.2g}"
            bounds = f"{row['fmr_low']:.2g} to {row['fmr_high']:.2g}"
            cells.append((f"{row['nominal_fmr']:g}", before, f"{row['fmr']:.2g}", bounds))
        show_table(
            cells,
            ("nominal FMR", "card before", "fitted", "95 %"),
            title=f"{name}, measured on the half that was not fitted",
        )
    if not result.held_out:
        say("too few pairs to hold half of them out: what the fit is worth was not measured")
    for row in result.positions:
        if row["differs"]:
            say(f"{row['position']}: FMR {row['fmr']:.2g} where {row['nominal_fmr']:g} is nominal")
    say(f"{result.card}: fitted on {result.nonmated:,} non-mated and {result.mated:,} mated pairs")
