"""The result of a search for canaries: its values, and its sentences for `doctor`.

Owns the sentences. Never searches and never judges.
"""

from __future__ import annotations

from dataclasses import dataclass

from biodedup.common.described import Described
from biodedup.common.renamed import renamed
from biodedup.gallery.files.names import CANARIES_NAME
from biodedup.jobs.health.canary_file import Canaries, Standing

REMAKE = f"remove the file `{CANARIES_NAME}` from the gallery's folder and run again: it is made anew"


@dataclass(frozen=True)
class Watched(Described):
    """One column's canaries, or those identified by all their columns (column `all`).

    found: among the first `among`, and first; expected_min, expected_first_min: so many at least in all but one of `1 /
    FALSE_ALARM` runs; p_found, p_first: probability of as few by the distribution of impostors. lost: should have been found and were not;
    p_lost: probability of as many in a sound gallery; certain: lost with nothing left to chance, too. lost_in: (segment, lost
    ones, canaries there). changed: whose stored template is not the one enrolled; miscomputed: found with a wrong similarity.
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
    """What the canaries say. made, removed, gone: of this run; kept_in_file: False where they could not be written."""

    columns: tuple[Watched, ...] = ()
    made: int = 0
    removed: int = 0
    gone: int = 0
    kept_in_file: bool = True
    checked: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def line_of(one: Watched) -> str:
    """Of a column that is sound."""
    start = f"canaries {'by all their columns' if one.column == 'all' else one.column}:"
    if not one.among:
        return f"{start} {one.found} of {one.canaries} stored records are as they were enrolled"
    text = f"{start} {one.found} of {one.canaries} found (expected at least {one.expected_min})"
    text += f", {one.first} of them first (at least {one.expected_first_min})"
    if one.found < one.expected_min or one.first < one.expected_first_min:
        text += "; fewer than the similarities of impostors let expect, but numpy finds no more among the stored rows"
    if one.lost:
        text += f"; {one.lost} missed within the risk that the search was given"
    return text


def problems_of(one: Watched) -> list[str]:
    """What is wrong with a column, a line each."""
    start = f"canaries {'by all their columns' if one.column == 'all' else one.column}:"
    found = []
    if one.changed:
        found.append(
            f"{start} the stored templates of {one.changed} of {one.canaries} are not those that were enrolled, in "
            f"{', '.join(one.changed_in)}; their checksums do not see it; restore from a backup of before"
        )
    if one.miscomputed:
        found.append(
            f"{start} {one.miscomputed} of {one.found} found with a similarity that is not that of the stored rows; search on "
            "another machine, and trust no answer of this one until then"
        )
    if one.alarm:
        where = ", ".join(f"{place} ({lost} of {there})" for place, lost, there in one.lost_in[:8])
        by = "1:1 verification accepts" if one.column == "all" else "numpy finds among the stored rows"
        sure = f"; {one.certain} of them with nothing left to chance, too" if one.certain else ""
        found.append(
            f"{start} {one.found} of {one.canaries} found, expected at least {one.expected_min} (p = {one.p_lost:.2g}); the search "
            f"loses {one.lost} that {by}{sure}: {where}; trust no `unique` of this machine, and run this again on another: if it says the same, the search is at "
            "fault and not the processor"
        )
    return found


def vanished(now: Standing, known: Canaries | None, version: int) -> list[str]:
    """Of subjects that should be there. version: of the gallery."""
    found = []
    if known is not None and known.version > version:
        found.append(
            f"canaries: they were looked through at version {known.version:,}, and the gallery is at {version:,}: it was taken back to an "
            f"earlier state, in which {len(now.ahead)} of their subjects are not enrolled; if a backup was restored on purpose, {REMAKE}"
        )
    if now.lost:
        found.append(
            f"canaries: {len(now.lost)} subjects are in no segment any more, and nothing was removed since they were last seen; "
            "restore from a backup of before"
        )
    if now.misfiled:
        found.append(
            f"canaries: {len(now.misfiled)} subjects' rows are there and not found by their ids; run `biodedup doctor --repair`"
        )
    return found


def of_themselves(made: int, now: Standing, known: Canaries | None, is_kept: bool, searched: Canaries) -> list[str]:
    """What became of the canaries themselves."""
    lines = []
    if made:
        lines.append(f"canaries: {made} {'made' if known is None else 'more made'}, {len(searched.each)} subjects now")
    if now.removed:
        lines.append(f"canaries: {len(now.removed)} dropped, whose subjects were removed")
    if now.gone and known is not None:
        share = len(now.gone) / max(len(known.each), 1)
        lines.append(
            f"canaries: {len(now.gone)} dropped, whose subjects are in no segment any more: removed and merged away, or lost, of which no "
            f"record tells; it is {share:.1%} of the canaries, to be compared with the share of subjects removed since version {known.version:,}"
        )
    if not is_kept:
        lines.append("canaries: they could not be written beside the gallery, and were searched for all the same")
    return lines
