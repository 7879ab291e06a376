"""Defines the command `explain`, which runs one job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import biodedup as bd
from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.exits import Exit
from biodedup.cli.opening import configured
from biodedup.cli.options import AcrossOption, ConfigOption, JsonOption, ThreadsOption, gallery_of
from biodedup.cli.printing import finish, print_refusals
from biodedup.config import Config
from biodedup.errors import InvalidInput
from biodedup.values import Face, Finger, Template

if TYPE_CHECKING:
    from biodedup.jobs.explanation.explain import Side

_SIDE_HELP = (
    "an image, a minutiae record, a folder of these, COLUMN=PATH with commas between, or with --gallery a subject_id."
)


@app.command(rich_help_panel=Panel.CARE)
def explain(
    a: Annotated[str | None, typer.Argument(help=f"One side: {_SIDE_HELP}")] = None,
    b: Annotated[str | None, typer.Argument(help="The other side, in the same form.")] = None,
    more_a: Annotated[
        list[str] | None,
        typer.Option("--a", metavar="[COLUMN=]PATH", help="A capture of A, such as face=a.jpg or right_index=ri.wsq."),
    ] = None,
    more_b: Annotated[list[str] | None, typer.Option("--b", metavar="[COLUMN=]PATH", help="A capture of B.")] = None,
    result: Annotated[Path, typer.Option("--out", "-o", help="The page. It holds biometric data.")] = Path("pair.html"),
    gallery: Annotated[
        Any,  # a Path or a RegisterUrl
        typer.Option(
            "--gallery",
            "-g",
            metavar="FOLDER|URL",
            parser=gallery_of,
            help="The gallery that holds the subjects' templates. Its size sets the thresholds.",
        ),
    ] = None,
    encounter: Annotated[
        str | None,
        typer.Option(
            "--encounter",
            metavar="ENCOUNTER_ID",
            help="With --gallery: compare the subject of this encounter with its strongest candidate.",
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="State the thresholds of a gallery with this many subjects.")
    ] = None,
    across_positions: AcrossOption = False,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an HTML page about one comparison: the captures, the extracted features that agree, and the score."""
    chosen = configured(gallery, config, threads=threads)
    with ExitStack() as opened:
        engine = None if gallery is None else opened.enter_context(bd.Engine.open(gallery, chosen, read_only=True))
        if encounter is not None:
            if engine is None or a is not None or b is not None:
                raise InvalidInput("--encounter takes both sides from the gallery; pass --gallery, and no captures")
            names, sides = _sides_of(engine, encounter)
        else:
            given = [[*([] if side is None else [side]), *(more or ())] for side, more in ((a, more_a), (b, more_b))]
            sides = _side(given[0], engine, chosen), _side(given[1], engine, chosen)
            names = _name(given[0], "A"), _name(given[1], "B")
        explained = jobs.explain(
            *sides, result, chosen, names=names, size=size, across_positions=across_positions, engine=engine
        )
    finish(explained.to_dict() | {"page": str(result)}, (explained.headline, str(result)), as_json)
    if not as_json:
        print_refusals((*explained.refusals[0], *explained.refusals[1]))
    raise typer.Exit(Exit.DONE if explained.comparison is not None else Exit.REFUSED)


def _side(
    texts: Sequence[str], engine: bd.Engine | None, config: Config
) -> Sequence[Face | Finger] | Mapping[str, Template]:
    if not texts:
        raise InvalidInput("a side has no captures; pass A and B, or --a and --b")
    if engine is not None and len(texts) == 1 and texts[0] in engine:
        return engine.templates(texts[0])
    from biodedup.jobs.explanation.explain import parse_side

    return parse_side(texts, config)


def _sides_of(engine: bd.Engine, encounter_id: str) -> tuple[tuple[str, str], tuple[Side, Side]]:
    """The subjects of an encounter and its strongest candidate, and their templates."""
    decision = engine.decision(encounter_id)
    if decision is None or decision.best is None or decision.subject_id is None:
        raise InvalidInput(f"encounter {encounter_id!r} has no candidate in this gallery; name both sides as A and B")
    subject_id, candidate_id = decision.subject_id, decision.best.subject_id
    names = subject_id, candidate_id
    if decision.outcome == "review":
        return names, (engine.case(encounter_id).templates, engine.templates(candidate_id))
    if subject_id not in engine:
        raise InvalidInput(
            f"subject {subject_id!r} of encounter {encounter_id!r} is not enrolled ({decision.outcome}), and a gallery keeps no captures; "
            f"pass the captures as A and {candidate_id!r} as B"
        )
    return names, (engine.templates(subject_id), engine.templates(candidate_id))


def _name(texts: Sequence[str], default: str) -> str:
    """The name of a side on the page: of its file, folder or subject, if the side is a single one."""
    if len(texts) != 1 or "=" in texts[0]:
        return default
    return Path(texts[0]).name or default
