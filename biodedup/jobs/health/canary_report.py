"""Defines the result of a search for canaries (synthetic mates of enrolled subjects), and its sentences for `doctor`.

Owns the sentences. Never searches, and never judges.
"""

from __future__ import annotations

from dataclasses import dataclass

from biodedup.common.described import Described
from biodedup.common.renamed import renamed
from biodedup.gallery.files.names import CANARIES_NAME
from biodedup.jobs.health.canary_file import Canaries, Standing

REMAKE = f"remove the file `{CANARIES_NAME}` from the gallery's folder and run again, which makes a new one"


@dataclass(frozen=True)
class Watched(Described):
    """The result for one column, or for canaries that were identified with all their columns (column `all`).

    canaries: number of canaries; found: how many were among the first `among` candidates; first: how many were the first candidate.
    expected_min, expected_first_min: lower bounds of found and first, which all but one of `1 / FALSE_ALARM` runs reach; p_found, p_first:
    probabilities of so few, by the distribution of impostors. lost: canaries that should have been found, but were not; p_lost: probability of
    so many in a sound gallery; certain: lost canaries that a search with a miss risk of zero does not find either; lost_in: (segment, lost
    canaries, all canaries in it). changed: canaries whose subject has a changed template; changed_in: their segments; miscomputed: canaries
    that were found with a wrong similarity.
    """

    column: str
    canaries: int
    found: int
    first: int
    among: int
    expected_min: int
    expected_first_min: int
    p_found: float
    p_first: float
    lost: int = 0
    p_lost: float = 1.0
    certain: int = 0
    lost_in: tuple[tuple[str, int, int], ...] = ()
    changed: int = 0
    changed_in: tuple[str, ...] = ()
    miscomputed: int = 0
    alarm: bool = False

    @property
    def sentinels(self) -> int:
        """Deprecated: `canaries`."""
        renamed("Watched.sentinels", "Watched.canaries")
        return self.canaries


@dataclass(frozen=True)
class Watch(Described):
    """The result of a search for canaries. made: new canaries; removed, gone: deleted canaries (`Standing`); kept_in_file: False if the canaries
    could not be written."""

    columns: tuple[Watched, ...] = ()
    made: int = 0
    removed: int = 0
    gone: int = 0
    kept_in_file: bool = True
    checked: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def line_of(watched: Watched) -> str:
    """The sentence on a column without problems."""
    start = _start(watched)
    if not watched.among:
        return f"{start} {watched.found} of {watched.canaries} stored records are unchanged since enrolment"
    text = f"{start} {watched.found} of {watched.canaries} found (expected at least {watched.expected_min})"
    text += f", {watched.first} of them first (at least {watched.expected_first_min})"
    if watched.found < watched.expected_min or watched.first < watched.expected_first_min:
        text += (
            "; fewer than expected from the similarities of impostors, but numpy finds no more among the stored rows"
        )
    if watched.lost:
        text += f"; {watched.lost} missed, which the search's miss risk allows"
    return text


def problems_of(watched: Watched) -> list[str]:
    """The problems of a column, one sentence each."""
    start = _start(watched)
    problems = []
    if watched.changed:
        problems.append(
            f"{start} the stored templates of {watched.changed} of {watched.canaries} have changed since enrolment, in "
            f"{', '.join(watched.changed_in)}; their checksums do not show this; restore from an earlier backup"
        )
    if watched.miscomputed:
        problems.append(
            f"{start} {watched.miscomputed} of {watched.found} were found with a similarity that differs from that of the stored rows; "
            "search on another machine, and do not trust this machine until then"
        )
    if watched.alarm:
        where = ", ".join(f"{place} ({lost} of {count})" for place, lost, count in watched.lost_in[:8])
        reference = "1:1 verification accepts" if watched.column == "all" else "numpy finds among the stored rows"
        certain = f"; a miss risk of zero does not find {watched.certain} of them either" if watched.certain else ""
        problems.append(
            f"{start} {watched.found} of {watched.canaries} found, expected at least {watched.expected_min} (p = {watched.p_lost:.2g}); the "
            f"search loses {watched.lost} that {reference}{certain}: {where}; do not trust `unique` of this machine, and run the test on "
            "another machine: if the result is the same, the search is at fault and not the processor"
        )
    return problems


def _start(watched: Watched) -> str:
    return f"canaries {'by all their columns' if watched.column == 'all' else watched.column}:"


def vanished(now: Standing, known: Canaries | None, version: int) -> list[str]:
    """The problems of canaries whose subjects should be enrolled, but are not. version: of the gallery."""
    problems = []
    if known is not None and known.version > version:
        problems.append(
            f"canaries: they were last checked at version {known.version:,}, but the gallery is at {version:,}: it was taken back to an "
            f"earlier state, in which {len(now.ahead)} of their subjects are not enrolled; if a backup was restored on purpose, {REMAKE}"
        )
    if now.lost:
        problems.append(
            f"canaries: {len(now.lost)} subjects are no longer in any segment, although nothing was removed since the last check; "
            "restore from an earlier backup"
        )
    if now.misfiled:
        problems.append(
            f"canaries: the rows of {len(now.misfiled)} subjects exist, but their ids do not lead to them; run `biodedup doctor --repair`"
        )
    return problems


def changes_of(made: int, now: Standing, known: Canaries | None, is_kept: bool, searched: Canaries) -> list[str]:
    """The sentences on new and deleted canaries. made: number of new canaries; searched: the canaries after the run."""
    lines = []
    if made:
        lines.append(f"canaries: {made} {'made' if known is None else 'more made'}, {len(searched.each)} subjects now")
    if now.removed:
        lines.append(f"canaries: {len(now.removed)} deleted, because their subjects were removed")
    if now.gone and known is not None:
        share = len(now.gone) / max(len(known.each), 1)
        lines.append(
            f"canaries: {len(now.gone)} deleted, because their subjects are no longer in any segment: they were removed, or lost, which "
            f"cannot be distinguished. These are {share:.1%} of the canaries: compare this with the share of subjects that were removed since "
            f"version {known.version:,}"
        )
    if not is_kept:
        lines.append(
            "canaries: their file could not be written beside the gallery; they were searched for nevertheless"
        )
    return lines
