"""The command line: a thin mirror of the engine and the jobs.

Owns arguments, printing and exit codes. Never decides anything itself.

Results go to standard output (`--json`: one JSON document), progress and errors to standard error.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

import biodedup
from biodedup import jobs
from biodedup.config import EXTERNAL_MINUTIAE, Config, FingerConfig, SearchConfig
from biodedup.engine import Engine
from biodedup.errors import BiodedupError, CallerError, DataDamaged, InvalidInput, RetryableError
from biodedup.values import Capture, Decision, Encounter, Evidence, Face, Finger, Missing, Refusal

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Finds a person enrolled twice.\n\nExit codes: 0 done, unique or accepted; 1 unexpected failure; 2 your mistake; "
    "3 try again later; 4 data damaged; 10 duplicate, or duplicates found; 11 review; 12 refused; 13 not accepted; "
    "130 interrupted.",
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


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


_OUTCOME_EXIT = {
    "unique": Exit.DONE,
    "duplicate": Exit.DUPLICATE,
    "review": Exit.REVIEW,
    "refused": Exit.REFUSED,
}

GalleryOption = Annotated[
    Path,
    typer.Option("--gallery", "-g", envvar="BIODEDUP_GALLERY", help="The gallery's folder; enroll and load create it."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Threads for extraction and search.")]
FaceOption = Annotated[list[Path] | None, typer.Option("--face", help="A face image.")]
FingerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--finger", metavar="[POSITION=]PATH", help="A finger image or minutiae record, as right_index=ri.wsq."
    ),
]
MissingOption = Annotated[
    list[str] | None, typer.Option("--missing", metavar="POSITION=REASON", help="A capture that cannot be had.")
]
DpiOption = Annotated[
    float | None, typer.Option("--dpi", help="Resolution of the finger images, where the files state none.")
]
EncounterOption = Annotated[
    str | None, typer.Option("--encounter-id", help="Sent again with the same content, it gets the same decision.")
]
GroupOption = Annotated[
    list[str] | None, typer.Option("--group", help="A group: that the subject belongs to, or to search in. Repeatable.")
]
AcrossOption = Annotated[
    bool,
    typer.Option("--across-positions", help="Compare each finger with fingers of all positions: labels may be wrong."),
]
DEFAULT_GALLERY = Path("gallery")


@app.command()
def enroll(
    subject_id: str,
    face: FaceOption = None,
    finger: FingerOption = None,
    missing: MissingOption = None,
    dpi: DpiOption = None,
    encounter_id: EncounterOption = None,
    group: GroupOption = None,
    across_positions: AcrossOption = False,
    gallery: GalleryOption = DEFAULT_GALLERY,
    threads: ThreadsOption = Config.threads,
    as_json: JsonOption = False,
) -> None:
    """Enrol a subject, unless somebody in the gallery is the same person."""
    captures = _captures(face, finger, missing, dpi)
    encounter = Encounter(subject_id, captures, encounter_id=encounter_id, groups=group or ())
    with Engine.open(gallery, Config(threads=threads)) as engine:
        _finish_decision(engine.enroll(encounter, across_positions=across_positions), as_json)


@app.command()
def identify(
    face: FaceOption = None,
    finger: FingerOption = None,
    dpi: DpiOption = None,
    group: GroupOption = None,
    across_positions: AcrossOption = False,
    gallery: GalleryOption = DEFAULT_GALLERY,
    threads: ThreadsOption = Config.threads,
    as_json: JsonOption = False,
) -> None:
    """Search the gallery for the person of these captures; write nothing."""
    encounter = Encounter(None, _captures(face, finger, None, dpi))
    with Engine.open(gallery, Config(threads=threads), read_only=True) as engine:
        decision = engine.identify(encounter, groups=group or None, across_positions=across_positions)
        _finish_decision(decision, as_json)


@app.command()
def verify(
    subject_id: str,
    face: FaceOption = None,
    finger: FingerOption = None,
    dpi: DpiOption = None,
    gallery: GalleryOption = DEFAULT_GALLERY,
    threads: ThreadsOption = Config.threads,
    as_json: JsonOption = False,
) -> None:
    """Compare captures with one enrolled subject."""
    encounter = Encounter(None, _captures(face, finger, None, dpi))
    with Engine.open(gallery, Config(threads=threads), read_only=True) as engine:
        result = engine.verify(encounter, subject_id)
    if as_json:
        _print_json(asdict(result))
    else:
        word = "accepted" if result.accepted else "not accepted"
        out.print(f"{word}: {result.score_db:.1f} dB, threshold {result.threshold_db:.1f} dB")
        _print_evidence(result.evidence)
        _print_refusals(result.refusals)
    raise typer.Exit(Exit.DONE if result.accepted else Exit.NOT_ACCEPTED)


@app.command()
def remove(
    subject_ids: Annotated[list[str], typer.Argument(metavar="SUBJECT_ID...")],
    gallery: GalleryOption = DEFAULT_GALLERY,
    as_json: JsonOption = False,
) -> None:
    """Remove subjects; the next search does not see them."""
    with _existing(gallery) as engine:
        for subject_id in subject_ids:
            engine.remove(subject_id)
        size = len(engine)
    _finish({"removed": subject_ids, "subjects": size}, f"removed {len(subject_ids)}, {size:,} remain", as_json)


@app.command()
def dedup(
    source: Annotated[
        Path, typer.Argument(help="Folder of images (a folder per subject), a CSV or Parquet manifest, or a gallery.")
    ],
    result: Annotated[Path, typer.Option("--out", "-o", help="Result, .parquet or .csv.")] = Path("dedup.parquet"),
    threshold_db: Annotated[
        float | None, typer.Option(help="Link pairs from this score on; default: the policy's.")
    ] = None,
    across_positions: AcrossOption = False,
    threads: ThreadsOption = Config.threads,
    as_json: JsonOption = False,
) -> None:
    """Find the images, or the subjects of a manifest or of a gallery, that are the same person. Interrupted, it goes on where
    it was."""
    config = Config(search=SearchConfig(across_positions=across_positions), threads=threads)
    if jobs.is_gallery(source):
        # reading only: enrolment goes on beside it, for hours
        with Engine.open(source, config, read_only=True) as engine, _progress() as progress:
            joined = jobs.find_duplicates(engine, result, threshold_db=threshold_db, progress=progress)
        _print_summary(joined.summary() | {"result": str(result)}, as_json)
        for cluster in joined.clusters[:20] if not as_json else ():
            names = "  =  ".join(cluster.subject_ids[:8]) + ("  ..." if len(cluster.subject_ids) > 8 else "")
            out.print(f"weakest link {cluster.weakest_db:6.1f} dB  {names}", soft_wrap=True)
        raise typer.Exit(Exit.DUPLICATE if joined.clusters else Exit.DONE)
    with _progress() as progress:
        found = jobs.dedup(source, result, config, threshold_db=threshold_db, progress=progress)
    _print_summary(found.summary() | {"result": str(result)}, as_json)
    if not as_json:
        label_of = {unit.unit_id: unit.label for unit in found.units}
        links = [link for cluster in found.clusters for link in cluster.links]
        across = [link for link in links if label_of[link.subject_ids[0]] != label_of[link.subject_ids[1]]]
        for link in sorted(across, key=lambda link: -link.score_db)[:20]:
            out.print(f"{link.score_db:6.1f} dB  {link.subject_ids[0]}  =  {link.subject_ids[1]}", soft_wrap=True)
    raise typer.Exit(Exit.DUPLICATE if found.clusters else Exit.DONE)


def _print_summary(summary: dict[str, object], as_json: bool) -> None:
    if as_json:
        _print_json(summary)
        return
    table = Table(show_header=False)
    for key, value in summary.items():
        table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    out.print(table)


@app.command()
def update(
    subject_id: str,
    face: FaceOption = None,
    finger: FingerOption = None,
    missing: MissingOption = None,
    dpi: DpiOption = None,
    encounter_id: EncounterOption = None,
    group: GroupOption = None,
    across_positions: AcrossOption = False,
    gallery: GalleryOption = DEFAULT_GALLERY,
    threads: ThreadsOption = Config.threads,
    as_json: JsonOption = False,
) -> None:
    """Replace an enrolled subject's templates, unless the new ones are somebody else's."""
    captures = _captures(face, finger, missing, dpi)
    encounter = Encounter(subject_id, captures, encounter_id=encounter_id, groups=group or ())
    with _existing(gallery, Config(threads=threads)) as engine:
        _finish_decision(engine.update(encounter, across_positions=across_positions), as_json)


@app.command()
def load(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Parquet or Arrow with subject_id, face (lists of floats), fingers by position (binary minutiae records, or "
            "lists of floats) and optionally groups; - for an Arrow stream; or vectors.npy with --ids.",
        ),
    ],
    ids: Annotated[Path | None, typer.Option(help="subject_ids of a .npy file: .npy, or text, one a line.")] = None,
    column: Annotated[str, typer.Option(help="Column of a .npy file.")] = "face",
    record_model_id: Annotated[
        str,
        typer.Option(help="What extracted the minutiae records; mindtct-1 if captures are to be compared with them."),
    ] = EXTERNAL_MINUTIAE,
    gallery: GalleryOption = DEFAULT_GALLERY,
    as_json: JsonOption = False,
) -> None:
    """Add ready templates without a search. Interrupted, it goes on where it was."""
    config = Config(finger=FingerConfig(record_model_id=record_model_id))
    with Engine.open(gallery, config) as engine, _progress() as progress:
        result = jobs.load(engine, source, ids=ids, column=column, progress=progress)
        size = len(engine)
    text = f"added {result.added:,}, present already {result.present:,}, refused {result.refused:,}; {size:,} subjects"
    for reason, count in result.reasons.items():
        text += f"; {reason}: {count:,}"
    if result.refused_rows:
        text += f"; refused rows: {', '.join(map(str, result.refused_rows))}"
    _finish(asdict(result) | {"subjects": size}, text, as_json)


@app.command()
def compact(gallery: GalleryOption = DEFAULT_GALLERY, as_json: JsonOption = False) -> None:
    """Merge what is stored into one segment; templates of removed subjects are erased. Needs free disk of the same size."""
    with _existing(gallery) as engine:
        engine.compact()
        size = len(engine)
    _finish({"subjects": size}, f"compacted; {size:,} subjects", as_json)


@app.command()
def backup(
    target: Annotated[Path, typer.Argument(help="An empty folder, or an earlier backup, which is brought up to date.")],
    gallery: GalleryOption = DEFAULT_GALLERY,
    as_json: JsonOption = False,
) -> None:
    """Copy the gallery, consistent, while it is in use; again, only new segments are copied. The copy is a gallery."""
    with Engine.open(gallery, read_only=True) as engine:
        copied = engine.backup(target)
    text = (
        f"version {copied.version} is in {target}: {copied.files_copied} files copied ({copied.byte_count:,} bytes), "
        f"{copied.files_kept} were there"
    )
    _finish(asdict(copied), text, as_json)


@app.command()
def info(gallery: GalleryOption = DEFAULT_GALLERY, as_json: JsonOption = False) -> None:
    """What a gallery holds."""
    with Engine.open(gallery, read_only=True) as engine:
        facts = engine.info()
    if as_json:
        _print_json(facts)
        return
    table = Table(show_header=False)
    for key, value in facts.items():
        for name, text in value.items() if isinstance(value, dict) else [("", value)]:
            shown = ", ".join(f"{k} {v}" for k, v in text.items()) if isinstance(text, dict) else str(text)
            table.add_row(key.replace("_", " "), name, shown)
    out.print(table)


@app.command()
def doctor(
    gallery: Annotated[Path | None, typer.Option("--gallery", "-g", envvar="BIODEDUP_GALLERY")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Rebuild derived files; take damaged exact ones from --backup.")
    ] = False,
    backup: Annotated[
        Path | None, typer.Option("--backup", help="A backup of this gallery; with a lost database, restored whole.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the installation's models, and every checksum of a gallery; mend it if asked."""
    if (repair or backup is not None) and gallery is None:
        raise InvalidInput("nothing to repair; name the gallery, as --gallery FOLDER")
    report = jobs.examine(gallery, mend=repair or backup is not None, backup=backup)
    if as_json:
        _print_json(asdict(report))
    else:
        for word, lines in (("mended", report.mended), ("sound", report.checked), ("damaged", report.problems)):
            for line in lines:
                out.print(f"{word:<8} {line}", markup=False, soft_wrap=True)
    raise typer.Exit(Exit.DAMAGED if report.problems else Exit.DONE)


@app.command()
def demo(
    subjects: Annotated[int, typer.Option(min=1000, help="Synthetic subjects.")] = 100_000,
    as_json: JsonOption = False,
) -> None:
    """Enrol a population and a real portrait, block its re-captures, and measure searches."""
    with tempfile.TemporaryDirectory() as folder:
        say = (lambda text: None) if as_json else (lambda text: out.print(text, soft_wrap=True))
        result = jobs.demo(Path(folder) / "gallery", subjects=subjects, say=say)
    if as_json:
        _print_json(result.to_dict())


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(biodedup.__version__)
        raise typer.Exit()


def main() -> None:
    """The entry point: runs a command and turns the error tree into exit codes."""
    as_json = "--json" in sys.argv
    try:
        app()
    except BiodedupError as error:
        if as_json:
            _print_json({"error": {"type": type(error).__name__, "text": str(error)}})
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(_exit_code(error))


def _exit_code(error: BiodedupError) -> int:
    branches = ((CallerError, Exit.CALLER), (RetryableError, Exit.RETRY), (DataDamaged, Exit.DAMAGED))
    return next((code for branch, code in branches if isinstance(error, branch)), 1)


@contextmanager
def _existing(gallery: Path, config: Config | None = None) -> Iterator[Engine]:
    """Opens for writing, but creates nothing: a mistyped path is not an empty gallery."""
    Engine.open(gallery, read_only=True).close()
    with Engine.open(gallery, config) as engine:
        yield engine


def _captures(
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
def _progress() -> Iterator[jobs.Progress]:
    """A progress bar on standard error, one a stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        try:
            yield show
        except KeyboardInterrupt:
            err.print("interrupted; start the same command again to go on")
            raise typer.Exit(Exit.INTERRUPTED) from None


def _finish(facts: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        _print_json(facts)
    else:
        out.print(text, soft_wrap=True)


def _finish_decision(decision: Decision, as_json: bool) -> None:
    if as_json:
        document = asdict(decision)
        for shown, candidate in zip(document["candidates"], decision.candidates, strict=True):
            shown["swaps"] = candidate.swaps
        _print_json(document)
    else:
        best = (
            ""
            if decision.best is None
            else f"; strongest {decision.best.subject_id} at {decision.best.score_db:.1f} dB"
        )
        out.print(
            f"{decision.outcome}{best}; {decision.gallery_size:,} subjects, duplicate from {decision.duplicate_db:.1f} dB, "
            f"review from {decision.review_db:.1f} dB",
            soft_wrap=True,
        )
        if decision.best is not None and decision.outcome != "unique":
            _print_evidence(decision.best.evidence)
        _print_refusals(decision.refusals)
    raise typer.Exit(_OUTCOME_EXIT[decision.outcome])


def _print_evidence(evidence: tuple[Evidence, ...]) -> None:
    for part in evidence:
        raw = [] if part.similarity is None else [f"similarity {part.similarity:.3f}"]
        raw += [] if part.minutiae is None else [f"minutiae score {part.minutiae:.0f}"]
        other = "" if part.column == part.candidate_column else f", enrolled as {part.candidate_column}"
        swapped = "; a swapped label" if part.swapped else ""
        out.print(f"  {part.column}{other}: {part.score_db:.1f} dB ({', '.join(raw)}){swapped}", soft_wrap=True)


def _print_refusals(refusals: tuple[Refusal, ...]) -> None:
    for refusal in refusals:
        measured = "" if refusal.measured is None else f", measured {refusal.measured:.4g}"
        limit = "" if refusal.limit is None else f", limit {refusal.limit:.4g}"
        detail = f" ({refusal.detail})" if refusal.detail else ""
        out.print(
            f"  refused {refusal.column}: {refusal.reason}{measured}{limit}{detail}", markup=False, soft_wrap=True
        )


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
