"""Defines the commands on a whole gallery: load, reindex, export, compact, backup, info, doctor, demo. Each runs one job, or calls one method
of the engine."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import biodedup as bd
from biodedup import jobs
from biodedup.cli.base import Panel, app
from biodedup.cli.exits import Exit
from biodedup.cli.opening import acting, configured, created, existing, in_turn, opened
from biodedup.cli.options import (
    DEFAULT_GALLERY,
    ConfigOption,
    FolderOption,
    GalleryOption,
    IndexOption,
    JsonOption,
    ModelIdOption,
    PersonOption,
    SignOption,
    ThreadsOption,
    WaitOption,
    gallery_of,
    index_engines,
    model_ids,
    refuse_register,
)
from biodedup.cli.printing import complain, counted, finish, print_json, progress_bar, say, show_table
from biodedup.cli.table_options import (
    CheckOption,
    EncodingOption,
    IgnoreColumnsOption,
    finish_check,
    table_options,
)
from biodedup.errors import InvalidInput
from biodedup.gallery.files.names import MERGES_FOLDER

TemplatesArgument = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A folder that `export --to` wrote, for a new gallery; or Parquet or Arrow with subject_id, face (lists of floats), "
        "fingers by position (binary minutiae records, or lists of floats) and optionally groups; - for an Arrow stream; "
        "or vectors.npy with --ids.",
    ),
]
LoadColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="NAME[=HEADER]",
        help="Column of a .npy file; default: face. With HEADER: a column's name in a table, such as subject_id=NIK. Repeatable.",
    ),
]
FromFaissOption = Annotated[
    bool,
    typer.Option(
        "--faiss", help="FILE is an index that faiss.write_index wrote; --ids is Parquet with id and subject_id."
    ),
]


@app.command(rich_help_panel=Panel.GALLERY)
def load(
    source: TemplatesArgument,
    ids: Annotated[
        Path | None, typer.Option(help="subject_ids of a .npy file: .npy, or text with one id per line.")
    ] = None,
    column: LoadColumnOption = None,
    model_id: ModelIdOption = None,
    record_model_id: Annotated[
        str | None,
        typer.Option(
            help="The model_id of the minutiae records: the program that extracted them; skeleton-1, to compare captures with them."
        ),
    ] = None,
    index: IndexOption = None,
    from_faiss: FromFaissOption = False,
    check: CheckOption = False,
    encoding: EncodingOption = None,
    ignore_columns: IgnoreColumnsOption = False,
    wait: WaitOption = 0,
    gallery: FolderOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add existing templates without a search, or restore an exported gallery.

    An interrupted run resumes when the same command is started again. Exit code 12: some rows were refused.
    """
    given: dict[str, Any]
    if jobs.is_export(source):
        given = {"--ids": ids, "--column": column, "--model-id": model_id, "--record-model-id": record_model_id}
        given |= {"--index": index, "--encoding": encoding}
        given |= {"--faiss": from_faiss or None, "--ignore-columns": ignore_columns or None}
        _load_export(source, gallery, {k for k, v in given.items() if v is not None}, check, config, as_json)
        return
    more = {"finger.record_model_id": record_model_id, "gallery.index": index_engines(index)}
    chosen = configured(gallery, config, more=more)
    mapped = [text for text in column or () if "=" in text]
    vectors_columns = [text for text in column or () if "=" not in text] or ["face"]
    if len(vectors_columns) > 1:
        raise InvalidInput(f"--column names {vectors_columns}; a .npy file has one column")
    if from_faiss and ids is None:
        raise InvalidInput(f"{source} holds only vectors; name the table of their subjects, such as --ids ids.parquet")
    options = table_options(ids or source, encoding, mapped, ignore_columns=ignore_columns)
    given = {
        "ids": ids,
        "column": vectors_columns[0],
        "model_id": model_ids(model_id),
        "options": options,
    }
    if check:
        finish_check(jobs.check_load(chosen, source, **given), as_json)
    # the source is checked first, so that no gallery is created for a wrong one
    if from_faiss and ids is not None:
        vectors = jobs.faiss_batches(source, ids, vectors_columns[0])
        with created(gallery, chosen, wait) as engine, progress_bar(lines=not as_json) as progress:
            _finish_load(
                jobs.load(engine, vectors, model_id=model_ids(model_id), progress=progress), len(engine), as_json
            )
    accepted = source if jobs.is_gallery(gallery) else jobs.accept_load(chosen, source, **given)
    with created(gallery, chosen, wait) as engine, progress_bar(lines=not as_json) as progress:
        _finish_load(jobs.load(engine, accepted, **given, progress=progress), len(engine), as_json)


def _load_export(
    source: Path, gallery: Path, options: set[str], check: bool, config: Path | None, as_json: bool
) -> None:
    """Restores a gallery that `export --to` wrote. options: the given options, of which none is allowed."""
    if options:
        raise InvalidInput(f"omit {', '.join(sorted(options))}, which are for tables; {source} is an exported gallery")
    if check:
        finish_check(jobs.check_export(source), as_json)
    with progress_bar(lines=not as_json) as progress:
        loaded = jobs.load_gallery(source, gallery, configured(gallery, config), progress=progress)
    text = f"{gallery} holds {counted(loaded.subjects, 'subject')}, {counted(loaded.rows, 'row')} and {counted(loaded.decisions, 'decision')}"
    finish(asdict(loaded), text, as_json)


def _finish_load(result: jobs.LoadResult, size: int, as_json: bool) -> NoReturn:
    finish(asdict(result) | {"subjects": size}, _loaded(result, size), as_json)
    raise typer.Exit(Exit.REFUSED if result.refused else Exit.DONE)


def _loaded(result: jobs.LoadResult, size: int) -> str:
    """The result of a load, as one line."""
    text = f"added {result.added:,}, present already {result.present:,}, refused {result.refused:,}; {counted(size, 'subject')}"
    for reason, count in result.reasons.items():
        text += f"; {reason}: {count:,}"
    if result.refused_rows:
        named = zip(result.refused_rows, result.refused_ids, strict=True)
        text += f"; refused rows: {', '.join(f'{row} {subject_id}'.strip() for row, subject_id in named)}"
    return text


@app.command(rich_help_panel=Panel.GALLERY)
def reindex(
    index: Annotated[
        list[str],
        typer.Option(
            "--index", metavar="[COLUMN=]ENGINE", help="native, or faiss:FACTORY[,nprobe=N]. Repeatable by column."
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Accept an index that misses more mates than the miss risk allows.")
    ] = False,
    by: PersonOption = "",
    sign: SignOption = None,
    wait: WaitOption = 0,
    gallery: FolderOption = DEFAULT_GALLERY,
    threads: ThreadsOption = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change the index engine of a gallery, and build its indexes.

    An interrupted run resumes when the same command is started again. Meanwhile searches use the present index of each segment.
    """
    engines = index_engines(index)
    assert engines is not None, "the option is required"
    with existing(gallery, configured(gallery, config, threads=threads), wait) as engine:
        with progress_bar(lines=not as_json) as progress:
            acting(engine, by, sign).reindex(
                engines, force=force, progress=lambda done, total: progress("indexing", done, total)
            )
        columns = list(engine.info()["columns"])
        plan = engine.plan(columns).explain().splitlines() if columns else []
        facts = {"index": {column: engine.index(column) for column in columns}, "plan": plan}
    empty = "the gallery is empty; an index is built when there are enough rows to train it"
    finish(facts, plan or empty, as_json)


@app.command("accept-models", rich_help_panel=Panel.GALLERY)
def accept_models(
    by: PersonOption = "",
    sign: SignOption = None,
    wait: WaitOption = 0,
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Record in the gallery that the cards of its models have changed: other weights, or another calibration.

    Needed if the policy requires two people for `model`; otherwise the next change of the gallery records it.
    """
    with existing(gallery, configured(gallery, config), wait) as engine:
        models = acting(engine, by, sign).accept_models()
    finish({"accepted": models}, f"accepted: {', '.join(models)}" if models else "no card has changed", as_json)


@app.command(rich_help_panel=Panel.GALLERY)
def export(
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="DIR",
            help="A new folder for the whole gallery as Parquet; `load DIR` restores the gallery.",
        ),
    ] = None,
    faiss: Annotated[
        Path | None,
        typer.Option("--faiss", metavar="DIR", help="A new folder for the .faiss files of one column and ids.parquet."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of --faiss; default: face.")] = None,
    wait: WaitOption = 0,
    gallery: FolderOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the whole gallery as Parquet (--to), or a column as plain FAISS files (--faiss).

    --to works while another process writes the gallery. --faiss first seals rows. The files hold biometric data.
    """
    if (to is None) == (faiss is None):
        raise InvalidInput("pass either --to DIR, for the whole gallery, or --faiss DIR, for the index of a column")
    if to is not None:
        if column is not None:
            raise InvalidInput(f"--column {column} is for --faiss; --to writes all columns")
        with progress_bar(lines=not as_json) as progress:
            exported = jobs.export_gallery(gallery, to, configured(gallery, config), progress=progress)
        facts = asdict(exported) | {"folder": str(to)}
        text = (
            f"{counted(exported.subjects, 'subject')}, {counted(exported.rows, 'row')} and {counted(exported.decisions, 'decision')} "
            f"are in {to} ({exported.byte_count:,} bytes); `biodedup load {to} --gallery NEW` restores the gallery"
        )
        finish(facts, text, as_json)
        return
    assert faiss is not None, "exactly one of to and faiss is given"
    name = column or "face"
    with existing(gallery, configured(gallery, config), wait) as engine, progress_bar(lines=not as_json) as progress:
        engine.seal()
        result = jobs.export_faiss(engine, faiss, column=name, progress=progress)
    text = f"{result.rows:,} rows of {name} are in {faiss}, {counted(len(result.files), 'index file')} of {result.index}, with ids.parquet"
    finish(asdict(result), text, as_json)


@app.command(rich_help_panel=Panel.GALLERY)
def compact(
    by: PersonOption = "",
    wait: WaitOption = 0,
    gallery: FolderOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge all segments into one, and erase the templates of removed subjects.

    Needs free disk space of the gallery's size.
    """
    chosen = configured(gallery, config)
    with existing(gallery, chosen, wait) as engine:
        if chosen.identities is not None:
            chosen.identity(by).require("administer")  # checked before anything is erased
        jobs.forget_removed(gallery, chosen)
        acting(engine, by).compact()
        size = len(engine)
    logs = len(list((gallery / MERGES_FOLDER).glob("*.parquet")))
    text = f"compacted; {counted(size, 'subject')}"
    if logs:
        text += (
            f"; {logs} logs in {gallery / MERGES_FOLDER} keep templates of removed records, so that `biodedup undo` can undo merges: delete "
            "them when these merges are final"
        )
    finish({"subjects": size, "merge_logs": logs}, text, as_json)


@app.command(rich_help_panel=Panel.GALLERY)
def backup(
    target: Annotated[Path, typer.Argument(help="An empty folder, or an earlier backup, which is updated.")],
    gallery: FolderOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the gallery while it is in use. The copy is a gallery, consistent at one version.

    Files that jobs keep in the gallery's folder are copied, too. The next backup into the same folder copies only new segments.
    """
    with bd.Engine.open(gallery, configured(gallery, config), read_only=True) as engine:
        copied = engine.backup(target)
    text = (
        f"version {copied.version} is in {target}: {counted(copied.databases, 'database')} and {counted(copied.files_copied, 'file')} copied "
        f"({copied.byte_count:,} bytes), "
        f"{copied.files_kept} were there"
    )
    if copied.left_out:
        text += f"; not copied, because damaged: {', '.join(copied.left_out)}"
    finish(asdict(copied), text, as_json)


@app.command(rich_help_panel=Panel.GALLERY)
def info(
    gallery: GalleryOption = DEFAULT_GALLERY,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show facts about a gallery: its subjects, columns, models, files and version."""
    with opened(gallery, configured(gallery, config)) as engine:
        facts = engine.info()
    if as_json:
        print_json(facts)
        return
    rows = []
    for key, value in facts.items():
        for name, text in value.items() if isinstance(value, dict) else [("", value)]:
            shown = ", ".join(f"{k} {v}" for k, v in text.items()) if isinstance(text, dict) else _fact(text)
            rows.append((key.replace("_", " "), name, shown))
    show_table(rows)


def _fact(value: object) -> str:
    """A fact as text, as `policy show` and `config` print it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@app.command(rich_help_panel=Panel.CARE)
def doctor(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[GALLERY]", help="The gallery's folder; default: ./gallery, if it is one.")
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(
            "--gallery",
            "-g",
            envvar="BIODEDUP_GALLERY",
            parser=gallery_of,
            callback=refuse_register,
            help="The gallery's folder, as an option.",
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Rebuild damaged files that can be derived from others; restore the rest from --backup."
        ),
    ] = False,
    backup: Annotated[
        Path | None,
        typer.Option(
            "--backup", help="A backup of this gallery. If the database is lost, the whole backup is restored."
        ),
    ] = None,
    canaries: Annotated[
        bool,
        typer.Option(
            "--canaries",
            help="Search for canaries: synthetic mates of some enrolled subjects, which are kept beside the gallery. If too few are found, "
            "that is an alarm.",
        ),
    ] = False,
    sentinels: Annotated[bool, typer.Option("--sentinels", hidden=True)] = False,  # the name of --canaries before 0.3
    wait: WaitOption = 0,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the installed models and every checksum of a gallery. With --repair, repair it."""
    canaries = canaries or sentinels
    gallery = folder or gallery
    if gallery is None and jobs.is_gallery(DEFAULT_GALLERY):
        gallery = DEFAULT_GALLERY
        complain(f"no gallery was named; checking ./{gallery}")
    if (repair or backup is not None or canaries) and gallery is None:
        raise InvalidInput("--repair, --backup and --canaries need a gallery; name it with --gallery FOLDER")
    with progress_bar(lines=not as_json) as progress:
        mend = repair or backup is not None
        work = partial(
            jobs.examine,
            gallery,
            configured(gallery, config),
            mend=mend,
            backup=backup,
            canaries=canaries,
            progress=progress,
        )
        report = in_turn(gallery, wait, work) if mend and gallery is not None else work()
    if as_json:
        print_json(report.to_dict())
    else:
        _print_health(report)
    raise typer.Exit(Exit.DAMAGED if report.problems else Exit.DONE)


def _print_health(report: jobs.Report) -> None:
    for word, lines in (
        ("mended", report.mended),
        ("sound", report.checked),
        ("exposed", report.exposed),
        ("note", report.notes),
        ("damaged", report.problems),
    ):
        for line in lines:
            say(f"{word:<8} {line}")


@app.command(rich_help_panel=Panel.CARE)
def demo(
    subjects: Annotated[int, typer.Option(min=1000, help="Synthetic subjects.")] = 100_000,
    as_json: JsonOption = False,
) -> None:
    """Demonstrate: enrol synthetic subjects and a real portrait, detect its re-captures, and measure searches."""
    with tempfile.TemporaryDirectory() as folder:
        result = jobs.demo(Path(folder) / "gallery", subjects=subjects, say=(lambda text: None) if as_json else say)
    if as_json:
        print_json(result.to_dict())
