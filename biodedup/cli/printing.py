"""Prints the results, errors and progress of commands.

Owns how they are shown. Never decides anything. Results go to standard output (`--json`: one JSON document); progress and errors go to
standard error.

Commands print only with these functions. Ids, notes, file names and error texts are data: they are printed without markup, and with hidden
characters as escapes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from biodedup import jobs
from biodedup.cli.exits import Exit
from biodedup.config import LabelConfig
from biodedup.jobs.shared.progress import WARNING
from biodedup.outcomes import MEANINGS
from biodedup.texts import json_text, shown
from biodedup.values import Capture, Decision, Evidence, Face, Finger, Refusal

_out = Console(highlight=False)


_err = Console(stderr=True, highlight=False)


_REASON_HEADING = {"unique": "note", "duplicate": "note", "review": "a person has to look", "refused": "not enrolled"}
"""outcome -> the word before each reason of a decision."""


LINE_S = 10.0
"""Seconds between two lines of progress if standard error is not a terminal."""


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
    for column in table.columns:
        column.overflow = "fold"  # an id that does not fit is broken, never cut
    _out.print(table)


def _plain(value: object) -> Text:
    """The value as text that rich does not parse as markup."""
    return Text(shown(value))


def print_summary(summary: Mapping[str, object], as_json: bool) -> None:
    """Prints a summary as a JSON document or a table."""
    if as_json:
        print_json(summary)
        return
    show_table((key.replace("_", " "), _cell(value)) for key, value in summary.items())


def _cell(value: object) -> object:
    """A value of a summary as text. A mapping becomes one line, `name: value, ...`."""
    if isinstance(value, Mapping):
        lines = [f"{str(name).replace('_', ' ')}: {_cell(count)}" for name, count in value.items()]
        return ", ".join(lines) or "none"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else value


def span(seconds: float | None) -> str:
    """A duration as text, in a suitable unit; '' for None."""
    if seconds is None:
        return ""
    for unit, length in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def progress_bar(*, lines: bool = False) -> Iterator[jobs.Progress]:
    """Yields a job's progress callback, which shows a bar for each stage on standard error. lines: if standard error is not a terminal, prints a
    line every ten seconds instead."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, disable=not _err.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}
        lines = lines and not _err.is_terminal
        printed_at = time.monotonic()

        def show(stage: str, done: int, total: int) -> None:
            if stage.startswith(WARNING):
                complain(stage)
                return
            if stage not in tasks:
                tasks[stage] = bar.add_task(shown(stage), total=total)
            bar.update(tasks[stage], completed=done, total=total)
            nonlocal printed_at
            if lines and time.monotonic() - printed_at >= LINE_S:
                printed_at = time.monotonic()
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
    """Prints the result of a command: as a JSON document, or as text (a line, or several)."""
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
    """Prints a decision and exits with its code. captures: the sent captures, so that a refusal can name its file; note: printed if the outcome
    is unique; labels: the words for outcomes."""
    from biodedup.match.judgement import texts_of  # imported here, so that --help does not load the matcher

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
            say(f"  {_REASON_HEADING[decision.outcome]}: {text}")
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
        swapped = "; the label is probably swapped" if part.swapped else ""
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
