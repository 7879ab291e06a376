"""Writes the HTML report of an evaluation: one file without scripts, which can be read offline.

Owns the content of the page. Never counts. The page holds captures of the worst pairs, which are biometric data, unless no pictures are
requested.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from biodedup.capture.pictures.formats import decode
from biodedup.config import Config
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.evaluation import plots
from biodedup.jobs.evaluation.labelled import Labelled
from biodedup.jobs.shared.page import drawing, picture, write_page
from biodedup.values import Refusal

CAPTURES_MAX = 3
"""The page shows at most this many captures of an encounter."""


def write_report(
    document: dict[str, Any], encounters: Sequence[Labelled], path: Path, config: Config, pictures: int
) -> None:
    """Writes the page. document: the content of the JSON file; pictures: number of worst pairs of each type of error. Raises
    StorageUnavailable."""
    by_name = {encounter.encounter_id: encounter for encounter in encounters}
    worst = {
        kind: [
            pair | {side: _pictures(by_name[pair[f"encounter_{side}"]], config) for side in ("a", "b")}
            for pair in document["worst"][kind][:pictures]
        ]
        for kind in ("false_matches", "misses")
    }
    make_private_folder(path.parent)
    write_page(path, "evaluate.html", found=document, figures=_figures(document), worst=worst)


def _figures(document: dict[str, Any]) -> dict[str, Markup]:
    """name -> inline SVG, for each plot that has data."""
    verification, identification = document["verification"], document["identification"]
    figures: dict[str, Any] = {}
    if verification["det"]:
        policy = [("1:1", verification["at_policy"]["threshold_db"])]
        policy += [(row["outcome"], row["threshold_db"]) for row in identification["at_policy"]]
        figures["histogram"] = plots.histogram(verification["histogram"], policy)
        whole = [("all evidence (score_db)", verification["det"]["fmr"], verification["det"]["fnmr"])]
        alone = [
            (f"{capture['column']}, {capture['evidence']} alone", capture["det"]["fmr"], capture["det"]["fnmr"])
            for capture in document["alone"]
        ]
        points = [(row["fmr"], row["fnmr"]) for row in verification["at_fmr"]]
        figures["det"] = plots.trade_off(
            whole + alone, points, "FMR: two people accepted as one", "FNMR: one person not recognised"
        )
    if identification["det"]:
        size = identification["gallery_subjects"]
        curve = [(f"N = {size}", identification["det"]["fpir"], identification["det"]["fnir"])]
        points = [(row["fpir"], row["fnir"]) for row in identification["at_fpir"]]
        figures["search_det"] = plots.trade_off(
            curve, points, f"FPIR at N = {size}: false alarms", f"FNIR at N = {size}: mates missed"
        )
        figures["cmc"] = plots.ranks(identification["cmc"])
    return {name: drawing(figure) for name, figure in figures.items()}


def _pictures(encounter: Labelled, config: Config) -> list[Markup]:
    """The images of an encounter's captures. Templates, and files that no longer exist, have none."""
    pictures = []
    for capture in encounter.captures[:CAPTURES_MAX]:
        pixels = decode(capture.data, capture.column, config.capture)
        if not isinstance(pixels, Refusal):
            pictures.append(picture(pixels.rgb_or_grey))
    return pictures
