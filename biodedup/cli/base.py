"""What all commands share: options, printing, exit codes.

Owns how results and errors are shown. Never decides anything. Results go to standard output (`--json`: one JSON document);
progress and errors go to standard error.

Ids, notes, file names and error texts are data: `say`, `complain` and `show_table` print them without markup, and with hidden characters
as escapes. Commands print with these functions alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperGroup

import biodedup as bd
from biodedup import jobs
from biodedup.config import Config, IsolationConfig, LabelConfig
from biodedup.errors import BiodedupError, CallerError, DataDamaged, GalleryBusy, InvalidInput, RetryableError
from biodedup.gallery.files.names import LOCK_NAME
from biodedup.jobs.shared.progress import WARNING
from biodedup.outcomes import MEANINGS
from biodedup.settings import Settings, settings_for
from biodedup.texts import json_text, shown
from biodedup.values import COLUMNS, Capture, Decision, Evidence, Face, Finger, Missing, Refusal


class Panel(StrEnum):
    """Headings of `biodedup --help`, in this order."""

    SUBJECTS = "Enrol and search"
    GALLERY = "A gallery"
    JOBS = "Jobs"
    KITS = "Field kits"
    CARE = "Quality and care"
    SETTINGS = "Settings"


class _Commands(TyperGroup):
    """The commands in the order of their panels."""

    def list_commands(self, ctx: Any) -> list[str]:
        panels = list(Panel)
        return sorted(
            super().list_commands(ctx),
            key=lambda name: panels.index(Panel(getattr(self.commands[name], "rich_help_panel", Panel.GALLERY))),
        )

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(Exit.INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Finds a person enrolled twice.\n\nExit codes: 0 done, unique or accepted; 1 unexpected failure; 2 your mistake; "
    "3 try again later; 4 data damaged; 10 duplicate, or duplicates found; 11 review; 12 refused; 13 not accepted; "
    "130 interrupted.",
)
_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)


class Exit(IntEnum):
    """What the exit codes mean."""

    DONE = 0
    CALLER = 2
    RETRY = 3
    DAMAGED = 4
    DUPLICATE = 10
    REVIEW = 11
    REFUSED = 12
    NOT_ACCEPTED = 13
    INTERRUPTED = 130


_REASON_MEANS = {"unique": "note", "duplicate": "note", "review": "a person has to look", "refused": "not enrolled"}
"""What the reasons of a decision are for, by its outcome."""


class RegisterUrl(str):
    """The URL of a register in PostgreSQL, in the place of a gallery's folder."""


def gallery_of(given: str | Path) -> Path | RegisterUrl:
    """What `--gallery` names. given: a Path where it is the default."""
    is_register = isinstance(given, str) and given.startswith(("postgresql:", "postgres:"))
    return RegisterUrl(given) if is_register else Path(given)


def refuse_register(gallery: Any) -> Any:
    """A callback of options that take a folder alone."""
    if isinstance(gallery, RegisterUrl):
        raise InvalidInput(
            "this command works on files in a gallery's folder, and a register in PostgreSQL was named; copy it to a folder by "
            "`biodedup gallery export URL --to FOLDER`, and name that"
        )
    return gallery


FolderOption = Annotated[
    Path,
    typer.Option(
        "--gallery",
        "-g",
        envvar="BIODEDUP_GALLERY",
        metavar="FOLDER",
        parser=gallery_of,
        callback=refuse_register,
        help="The gallery's folder; enroll and load create it.",
    ),
]
GalleryOption = Annotated[
    Any,  # a Path or a RegisterUrl
    typer.Option(
        "--gallery",
        "-g",
        envvar="BIODEDUP_GALLERY",
        metavar="FOLDER|URL",
        parser=gallery_of,
        help="The gallery's folder, which enroll and load create; or a register, postgresql://user@host/database?gallery=NAME, with the table `cluster` in the settings.",
    ),
]
PersonOption = Annotated[
    str, typer.Option("--by", help="The person who does it: one of `identities`, where the settings name any.")
]
PurposeOption = Annotated[
    str,
    typer.Option(
        "--purpose",
        help="Why, in words for the audit log; needs --by. With --by a command that only reads opens the gallery for writing, so that its "
        "call is recorded and counted under that name.",
    ),
]
SignOption = Annotated[
    Path | None,
    typer.Option(
        "--sign", help="The private key of --by (`biodedup log key`), which signs requests and approvals of two people."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads for extraction and search.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Settings in TOML. They override the file named in BIODEDUP_CONFIG, and biodedup.toml next to the gallery.",
    ),
]
FaceOption = Annotated[list[Path] | None, typer.Option("--face", help="A face image.")]
FingerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--finger", metavar="[POSITION=]PATH", help="A finger image or minutiae record, as right_index=ri.wsq."
    ),
]
MissingOption = Annotated[
    list[str] | None,
    typer.Option("--missing", metavar="POSITION=REASON", help="A capture that cannot be taken, and why."),
]
DpiOption = Annotated[
    float | None, typer.Option("--dpi", help="Resolution of the finger images, where the files state none.")
]
EncounterOption = Annotated[
    str | None,
    typer.Option(
        "--encounter-id", help="Names the encounter: sent again with the same content, it gets the same decision."
    ),
]
GroupOption = Annotated[
    list[str] | None, typer.Option("--group", help="A group that the subject belongs to, or to search in. Repeatable.")
]
WaitOption = Annotated[
    float,
    typer.Option(
        "--wait", metavar="SECONDS", min=0, help="How long to wait while another process holds the gallery for writing."
    ),
]
AcrossOption = Annotated[
    bool,
    typer.Option(
        "--across-positions", help="Compare each finger with fingers of all positions, because labels may be wrong."
    ),
]
ModelIdOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-id",
        metavar="[COLUMN=]ID",
        help="The model that made the vectors (lists of floats), such as arcface-r50-1; needed where the gallery has no model for the column yet.",
    ),
]
IndexOption = Annotated[
    list[str] | None,
    typer.Option(
        "--index",
        metavar="[COLUMN=]ENGINE",
        help="The index engine of a new gallery: native, or faiss:FACTORY, such as faiss:IVF2048,PQ64x4fs. Repeatable by column.",
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Have a Ray cluster do the work: host:port, or auto for the one that this machine belongs to. The result is the same.",
    ),
]
DEFAULT_GALLERY = Path("gallery")
WAIT_STEP_S = 0.2
LINE_S = 10.0
"""Seconds between two lines of progress where there is no terminal."""


def say(*lines: str) -> None:
    """Prints lines of a result."""
    for line in lines:
        _out.print(_plain(line), soft_wrap=True)


def complain(*lines: str) -> None:
    """Prints lines to standard error."""
    for line in lines:
        _err.print(_plain(line), soft_wrap=True)


def show_table(rows: Iterable[Sequence[object]], header: Sequence[str] = (), title: str | None = None) -> None:
    """Prints a table, with or without a header."""
    table = Table(
        *(Column(_plain(name)) for name in header),
        show_header=bool(header),
        title=None if title is None else _plain(title),
    )
    for row in rows:
        table.add_row(*map(_plain, row))
    _out.print(table)


def _plain(value: object) -> Text:
    """The value as text in which rich looks for no markup."""
    return Text(shown(value))


def print_summary(summary: Mapping[str, object], as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    show_table((key.replace("_", " "), _cell(value)) for key, value in summary.items())


def _cell(value: object) -> object:
    """A value of a summary in words; counts by name in one line."""
    if isinstance(value, Mapping):
        lines = [f"{str(name).replace('_', ' ')}: {_cell(count)}" for name, count in value.items()]
        return ", ".join(lines) or "none"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else value


def model_ids(texts: list[str] | None) -> str | dict[str, str] | None:
    """One model_id for all columns, or by column."""
    by_column = {}
    for text in texts or ():
        column, separator, model_id = text.partition("=")
        if not separator or column not in COLUMNS:
            if len(texts or ()) > 1:
                raise InvalidInput(f"--model-id {text} is one of several; write each as COLUMN=ID, as face={text}")
            return text
        by_column[column] = model_id
    return by_column or None


def index_engines(texts: list[str] | None) -> str | dict[str, str] | None:
    """One index engine for all columns, or by column."""
    by_column = {}
    for text in texts or ():
        column, separator, spec = text.partition("=")
        if not separator or column not in (*COLUMNS, "*"):
            if len(texts or ()) > 1:
                raise InvalidInput(f"--index {text} is one of several; write each as COLUMN=ENGINE, as face={text}")
            return text
        by_column[column] = spec
    return by_column or None


def exit_code(error: BiodedupError) -> int:
    branches = ((CallerError, Exit.CALLER), (RetryableError, Exit.RETRY), (DataDamaged, Exit.DAMAGED))
    return next((code for branch, code in branches if isinstance(error, branch)), 1)


def settings(
    gallery: Path | RegisterUrl | None,
    file: Path | None,
    *,
    threads: int | None = None,
    across_positions: bool = False,
    more: Mapping[str, Any] | None = None,
    usual: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings in effect for a command. file: of --config; more: other options by dotted names, None where they are not given; usual:
    defaults of the command itself."""
    given = {"threads": threads, "search.across_positions": across_positions or None, **(more or {})}
    folder = None if isinstance(gallery, RegisterUrl) else gallery
    return settings_for(folder, file, given=given, usual=usual)


def configured(gallery: Path | RegisterUrl | None, file: Path | None, **options: Any) -> Config:
    """The configuration of `settings`. Captures are decoded in worker processes, because files come from untrusted sources."""
    chosen = settings(gallery, file, **options).config
    if isinstance(gallery, RegisterUrl) and chosen.cluster is None:
        raise InvalidInput(
            "the settings do not say where the register's segments are; name a file with [cluster] segments by --config"
        )
    return replace(chosen, isolation=chosen.isolation or IsolationConfig())


def opened(gallery: Path | RegisterUrl, config: Config) -> bd.Engine:
    """Opens a gallery or a register to look into it: read-only, and without Ray's actors, which only searches need."""
    if config.cluster is not None:
        config = replace(config, cluster=replace(config.cluster, ray_address=None))
    return bd.Engine.open(gallery, config, read_only=True)


@contextmanager
def existing(gallery: Path | RegisterUrl, config: Config, wait_s: float | None = None) -> Iterator[bd.Engine]:
    """Opens a gallery for writing, and raises where there is none: a mistyped path must not create an empty gallery.

    wait_s: how long to wait for another writer to end; None where the command has no option for it.
    """
    if isinstance(gallery, RegisterUrl):
        if config.cluster is not None:
            from biodedup.cluster.opening import require_register  # galleries in folders need no psycopg

            require_register(gallery, config.cluster)
        with bd.Engine.open(gallery, config) as engine:
            yield engine
        return
    bd.Engine.open(gallery, config, read_only=True).close()
    with _opened_in_turn(gallery, config, wait_s) as engine:
        yield engine


def acting(engine: bd.Engine, by: str, sign: Path | None = None, purpose: str = "") -> bd.Engine:
    """The engine for the person of `--by`, where the settings name identities or a purpose is given; otherwise the engine itself.
    sign: of `--sign`."""
    if engine.config.identities is not None:
        return engine.as_principal(by, purpose=purpose, key=sign)
    if not purpose:
        return engine
    if not by:
        raise InvalidInput("--purpose needs the name of the caller; add --by NAME")
    return engine.as_principal(bd.Principal(by, bd.ROLES), purpose=purpose)


@contextmanager
def looked_into(
    gallery: Path | RegisterUrl, config: Config, by: str, purpose: str, *, searched: bool = False
) -> Iterator[bd.Engine]:
    """Opens a gallery to read it, for the person of `--by`. Without one it is opened read-only, and the call is recorded under the operating
    system's user. searched: as in a search, with Ray's actors where the settings name them."""
    if not (by or purpose):
        with bd.Engine.open(gallery, config, read_only=True) if searched else opened(gallery, config) as engine:
            yield engine
        return
    with existing(gallery, config) as engine:
        if engine.config.audited != "all":
            complain(f'note: the settings say audit = "{engine.config.audited}"; this call is not recorded')
        yield acting(engine, by, purpose=purpose)


def _opened_in_turn(gallery: Path, config: Config, wait_s: float | None) -> bd.Engine:
    until, told = time.monotonic() + (wait_s or 0), False
    while True:
        try:
            return bd.Engine.open(gallery, config)
        except GalleryBusy as error:
            left = until - time.monotonic()
            if left <= 0:
                if wait_s is None:
                    raise
                waited = f"after {wait_s:g} s it was still held" if wait_s else "--wait SECONDS waits for it"
                raise GalleryBusy(f"{error}; {holder(gallery)}; {waited}") from None
            if not told:
                complain(f"{gallery} is held for writing; {holder(gallery)}; waiting up to {wait_s:g} s")
                told = True
            time.sleep(min(left, WAIT_STEP_S))


def holder(gallery: Path) -> str:
    """The process that holds a gallery for writing, in words. Names no argument of it: they may hold ids."""
    try:
        number = int((gallery / LOCK_NAME).read_text("ascii"))
        about = Path(f"/proc/{number}")
        name, age = (about / "comm").read_text("utf-8").strip(), time.time() - about.stat().st_mtime
        return f"the holder is process {number}, {name}, running for {span(age)}"
    except (OSError, ValueError):  # it has just ended, or the system has no /proc
        return "the holder is not known"


def span(seconds: float | None) -> str:
    """A time span in one suitable unit."""
    if seconds is None:
        return ""
    for unit, length in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def captures_of(
    faces: list[Path] | None, fingers: list[str] | None, missing: list[str] | None, dpi: float | None
) -> list[Capture]:
    captures: list[Capture] = [Face(path) for path in faces or ()]
    for text in fingers or ():
        position, separator, path = text.partition("=")
        captures.append(Finger(path, position, dpi) if separator else Finger(text, dpi=dpi))
    for text in missing or ():
        position, _, reason = text.partition("=")
        captures.append(Missing(position, reason or "not stated"))
    if all(isinstance(capture, Missing) for capture in captures):
        raise InvalidInput("no capture was given; pass --face PATH or --finger POSITION=PATH")
    return captures


@contextmanager
def progress_bar(*, lines: bool = False) -> Iterator[jobs.Progress]:
    """A progress bar on standard error, one a stage. lines: where standard error is no terminal, a line each ten seconds instead."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, disable=not _err.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}
        lines = lines and not _err.is_terminal
        told_at = time.monotonic()

        def show(stage: str, done: int, total: int) -> None:
            if stage.startswith(WARNING):
                complain(stage)
                return
            if stage not in tasks:
                tasks[stage] = bar.add_task(shown(stage), total=total)
            bar.update(tasks[stage], completed=done, total=total)
            nonlocal told_at
            if lines and time.monotonic() - told_at >= LINE_S:
                told_at = time.monotonic()
                complain(f"{stage}: {done:,} of {total:,}")

        try:
            yield show
        except KeyboardInterrupt:
            complain("interrupted; start the same command again to resume")
            raise typer.Exit(Exit.INTERRUPTED) from None


def counted(count: int, noun: str) -> str:
    """`1 subject`, `2 subjects`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def finish(facts: dict[str, Any], text: str | Sequence[str], as_json: bool) -> None:
    """text: a line, or several."""
    if as_json:
        print_json(facts)
    else:
        say(*([text] if isinstance(text, str) else text))


def finish_decision(
    decision: Decision,
    as_json: bool,
    captures: Sequence[Capture] = (),
    note: str = "",
    *,
    labels: LabelConfig,
) -> None:
    """captures: what was sent, so that a refusal names its file; note: printed where the outcome is unique; labels: the words for it."""
    from biodedup.match.judgement import texts_of  # here, so that help texts need not load the matcher

    if as_json:
        document = decision.to_dict()
        for shown, candidate in zip(document["candidates"], decision.candidates, strict=True):
            shown["swaps"] = candidate.swaps
        print_json(document)
    else:
        best = ""
        if decision.best is not None:
            kind = f", {decision.best.kind.replace('_', ' ')}" if decision.best.kind else ""
            marked = ", extrapolated" if decision.best.extrapolated else ""
            best = f"; strongest {decision.best.subject_id} at {decision.best.score_db:.1f} dB{kind}{marked}"
        say(
            f"{labels.of(decision.outcome)}{best}; {counted(decision.gallery_size, 'subject')}, duplicate from {decision.duplicate_db:.1f} dB, "
            f"review from {decision.review_db:.1f} dB"
        )
        for text in texts_of(decision):
            say(f"  {_REASON_MEANS[decision.outcome]}: {text}")
        if decision.attainable_db is not None and decision.expected_fnir is not None:
            say(
                f"  with these captures 19 of 20 mates score below {decision.attainable_db:.0f} dB, and "
                f"{decision.expected_fnir:.1%} below the review threshold"
            )
        if decision.best is not None and decision.outcome != "unique":
            print_evidence(decision.best.evidence)
        print_refusals(decision.refusals, captures)
        for column, advice in decision.recaptures.items():
            say(f"  take {column} again: {advice}")
        if note and decision.outcome == "unique":
            say(f"  {note}")
        if decision.encounter_id is not None:
            say(f"  encounter_id: {decision.encounter_id}")
    raise typer.Exit(MEANINGS[decision.outcome].exit_code)


def print_evidence(evidence: tuple[Evidence, ...]) -> None:
    for part in evidence:
        raw = [] if part.similarity is None else [f"similarity {part.similarity:.3f}"]
        raw += [] if part.minutiae is None else [f"minutiae score {part.minutiae:.0f}"]
        other = "" if part.column == part.candidate_column else f", enrolled as {part.candidate_column}"
        swapped = "; a swapped label" if part.swapped else ""
        copied = "; probably a copy of the enrolled capture" if part.replay else ""
        say(f"  {part.column}{other}: {part.score_db:.1f} dB ({', '.join(raw)}){swapped}{copied}")


def print_refusals(refusals: tuple[Refusal, ...], captures: Sequence[Capture] = ()) -> None:
    for refusal in refusals:
        files = [str(c.data) for c in captures if isinstance(c, (Face, Finger)) and c.column == refusal.column]
        measured = "" if refusal.measured is None else f", measured {refusal.measured:.4g}"
        limit = "" if refusal.limit is None else f", limit {refusal.limit:.4g}"
        detail = f" ({refusal.detail})" if refusal.detail else ""
        of = f" ({', '.join(files)})" if files else ""
        say(f"  refused {refusal.column}{of}: {refusal.reason}{measured}{limit}{detail}")


def print_json(document: Any) -> None:
    """Prints one JSON document, in which control characters are escapes."""
    sys.stdout.write(json_text(document))
