"""`explain`: writes an HTML page about the comparison of two sides: their captures, the extracted features that agree, and the score.

Owns the content of the page. Never compares templates: it extracts under a trace, and takes the evidence from the comparer and the paired
minutiae from the matcher. The page holds biometric data, and is written only to the requested file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import biodedup
from biodedup.capture.fingers.one_pass import one_pass
from biodedup.capture.fingers.resampling import DPI, resampled, scanner_dpi
from biodedup.capture.minutiae.layouts import is_record
from biodedup.capture.pictures.formats import decode
from biodedup.capture.pictures.wsq import is_wsq
from biodedup.capture.reading import read
from biodedup.common.described import Described, document_of
from biodedup.config import Config, IsolationConfig, Policy
from biodedup.embed.cards import shipped_cards
from biodedup.embed.extractor import Extractor
from biodedup.engine import Engine
from biodedup.errors import InvalidInput
from biodedup.jobs.explanation.page import Image, ShownCapture, label, matched_minutiae, panel, title, waterfall
from biodedup.jobs.manifests.captures import IMAGE_SUFFIXES, is_image
from biodedup.jobs.shared.page import write_page
from biodedup.match.judgement import Judgement, judge
from biodedup.match.pairs import pair_comparer
from biodedup.match.ranked import Comparison
from biodedup.match.scores.calibration import SCORE_DB_MAX
from biodedup.required import keep_better, superseded
from biodedup.trace import Step, Trace
from biodedup.trace import explain as traced
from biodedup.values import FINGER_POSITIONS, Evidence, Face, Finger, Missing, Refusal, Template

Side: TypeAlias = "str | Path | Sequence[Face | Finger | Missing] | Mapping[str, Template]"
"""One side of the comparison: a file or folder of captures, or captures, or templates by column (without pictures)."""

_RECORDS = frozenset((".fmr", ".fmd", ".ist-fmr", ".min"))
_SIZES = (1_000, 1_000_000, 200_000_000)
"""The page shows the thresholds for galleries of these sizes, and of the requested size."""


@dataclass(frozen=True, eq=False)
class Explained(Described):
    """The result of `explain`. comparison: None if no captures could be compared; size: number of subjects of the gallery whose thresholds
    apply, None for a 1:1 comparison; duplicate_db, review_db: these thresholds."""

    headline: str
    outcome: str
    comparison: Comparison | None
    verdict: Judgement
    size: int | None
    duplicate_db: float
    review_db: float
    refusals: tuple[tuple[Refusal, ...], tuple[Refusal, ...]]

    def to_dict(self) -> dict[str, Any]:
        """The result, JSON-ready and without biometric data."""
        compared = None if self.comparison is None else document_of(self.comparison)
        return {
            "headline": self.headline,
            "outcome": self.outcome,
            "kind": next(iter(self.verdict.kinds), ""),
            "gallery_size": self.size,
            "duplicate_db": self.duplicate_db,
            "review_db": self.review_db,
            "comparison": compared,
            "refusals": {
                side: [refusal.to_dict() for refusal in refusals]
                for side, refusals in zip("ab", self.refusals, strict=True)
            },
        }


def explain(
    a: Side,
    b: Side,
    out: Path,
    config: Config | None = None,
    *,
    names: tuple[str, str] = ("A", "B"),
    size: int | None = None,
    across_positions: bool = False,
    engine: Engine | None = None,
) -> Explained:
    """Compares two sides and writes an HTML page about the comparison.

    out: path of the page; names: names of the sides on the page. engine: its calibrations and policy apply; None takes the calibrations of the
    models. size: the thresholds are those of a gallery with this number of subjects; None takes the engine's size, or the threshold of a 1:1
    comparison if there is no engine. across_positions: fingers of different positions are compared, too. Raises InvalidInput, ModelMismatch,
    StorageUnavailable.
    """
    with Extractor(config or Config(isolation=IsolationConfig())) as extractor:
        sides = _extract(a, extractor), _extract(b, extractor)
        return _write(out, sides, extractor, _Request(names, size, across_positions, engine))


def explain_templates(
    a: Mapping[str, Template],
    b: Mapping[str, Template],
    out: Path,
    config: Config | None = None,
    *,
    names: tuple[str, str] = ("A", "B"),
    images: tuple[Mapping[str, Image], Mapping[str, Image]] | None = None,
    size: int | None = None,
    across_positions: bool = False,
    engine: Engine | None = None,
) -> Explained:
    """`explain` for templates. images: for each side, column -> picture, if pictures were kept; pictures of fingers are grey, 500 dpi."""
    extractor = Extractor(config or Config())
    kept: tuple[Mapping[str, Image], Mapping[str, Image]] = images or ({}, {})
    sides = [
        [replace(shown, image=pictures.get(shown.column)) for shown in _extract(side, extractor)]
        for side, pictures in zip((a, b), kept, strict=True)
    ]
    return _write(out, (sides[0], sides[1]), extractor, _Request(names, size, across_positions, engine))


def captures_at(path: Path, config: Config | None = None) -> list[Face | Finger]:
    """The captures of a file or folder. A file name such as `right_index` states the position. A file whose name states nothing is a finger if
    it shows ridges, otherwise a face. Raises InvalidInput."""
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if _is_capture(p))
    if not files:
        raise InvalidInput(f"{path} is neither a file nor a folder of captures; name an image, or a folder of images")
    return [_capture(file, config or Config()) for file in files]


def _is_capture(path: Path) -> bool:
    suffix = path.suffix.lower()
    known = suffix in IMAGE_SUFFIXES | _RECORDS or is_image(path)
    return known and not path.name.startswith("._")  # macOS writes such a file beside each file


def _capture(path: Path, config: Config) -> Face | Finger:
    name = path.stem.lower().replace("-", "_").replace(" ", "_")
    for position in FINGER_POSITIONS[:-1]:
        if position in name:
            return Finger(path, position)
    return Finger(path) if "face" not in name and _shows_ridges(path, config) else Face(path)


def _shows_ridges(path: Path, config: Config) -> bool:
    content = read(path, "unknown", config.capture)
    if isinstance(content, Refusal):
        return False
    if is_record(content) or is_wsq(content):
        return True
    pixels = decode(content, "unknown", config.capture)
    if isinstance(pixels, Refusal) or (pixels.rgb[..., 0] != pixels.rgb[..., 2]).any():
        return False
    dpi = scanner_dpi(pixels.dpi)
    if max(pixels.grey.shape) * DPI / dpi > config.finger.side_px_max:
        return False
    grey = resampled(pixels.grey, dpi)
    measures = one_pass(grey).measures
    return measures.area_mm2 >= config.finger.area_mm2_min and measures.certainty >= config.finger.certainty_min


# captures and templates -----------------------------------------------------------------------------------------------


def _extract(side: Side, extractor: Extractor) -> list[ShownCapture]:
    """Extracts the captures of a side. In each column only the best capture has a template; other captures have a refusal."""
    if isinstance(side, Mapping):
        return [ShownCapture(column, "a stored template", template) for column, template in side.items()]
    captures = captures_at(Path(side), extractor.config) if isinstance(side, (str, Path)) else list(side)
    with traced() as steps:
        results = extractor.extract(captures)
    shown = [
        _shown_capture(capture, result, steps, i)
        for i, (capture, result) in enumerate(zip(captures, results, strict=True))
    ]
    best: dict[str, Template] = {}
    for capture in shown:
        if capture.template is not None:
            keep_better(best, capture.template)
    return [
        capture
        if capture.template is None or best[capture.column] is capture.template
        else replace(capture, template=None, refusal=superseded(capture.template))
        for capture in shown
    ]


def _shown_capture(
    capture: Face | Finger | Missing, result: Template | Refusal, steps: Trace, item: int
) -> ShownCapture:
    def last(name: str) -> Step | Mapping[str, Any]:
        of_item = steps.of(name, item)
        return of_item[-1] if of_item else {}

    face, pose, ridges = last("face"), last("pose"), last("ridges")
    image = next((step["image"] for step in (face, last("faces"), ridges, last("pixels")) if step), None)
    data = getattr(capture, "data", None)
    return ShownCapture(
        column=result.column,
        source=Path(data).name if isinstance(data, (str, Path)) else "not captured" if data is None else "in memory",
        template=result if isinstance(result, Template) else None,
        refusal=result if isinstance(result, Refusal) else None,
        image=image,
        box=face.get("box"),
        landmarks=face.get("landmarks"),
        aligned=face.get("aligned"),
        core=pose.get("core"),
        angle=pose.get("angle", 0.0),
        checks=tuple(check for step in steps.of("quality", item) for check in step["checks"]),
    )


# the page -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Request:
    """The arguments of `explain` that the page needs."""

    names: tuple[str, str]
    size: int | None
    across_positions: bool
    engine: Engine | None


def _write(
    out: Path, sides: tuple[Sequence[ShownCapture], Sequence[ShownCapture]], extractor: Extractor, request: _Request
) -> Explained:
    engine = request.engine
    size = len(engine) if request.size is None and engine is not None else request.size
    policy = extractor.config.stated_policy if engine is None else engine.policy
    pairs = engine.pairs if engine is not None else pair_comparer([*shipped_cards(), *extractor.cards])
    a, b = (_templates(side) for side in sides)
    comparison = pairs.compare(a, b, across=request.across_positions)
    explained = _explained(comparison, sides, policy, size)
    evidence = () if comparison is None else comparison.evidence
    laws = [pairs.calibration_of(a[part.column], part) for part in evidence]
    write_page(
        out,
        "explain.html",
        explained=explained,
        names=request.names,
        verify_db=_verify_db(policy),
        policy=policy,
        comparison=comparison,
        reaches=None if comparison is None else _once_in(comparison.score_db),
        waterfall=None if comparison is None else waterfall(comparison, explained.duplicate_db, explained.review_db),
        thresholds=[
            (row, *policy.thresholds_db(row), row == size)
            for row in sorted({*_SIZES, *([] if size is None else [size])})
        ],
        pairs=[
            {
                "law": law,
                "readings": pairs.raw_scores(a[part.column], part),
                **_compared_captures(part, sides),
            }
            for part, law in zip(evidence, laws, strict=True)
        ],
        measured_db=max((law.measured_db for law in laws), default=0.0),
        others=_others(request.names, sides, evidence),
        models=sorted({(t.column, t.model_id) for side in (a, b) for t in side.values()}),
        cards=extractor.cards,
        version=biodedup.__version__,
        label=label,
        once_in=_once_in,
    )
    return explained


def _templates(side: Sequence[ShownCapture]) -> dict[str, Template]:
    return {shown.column: shown.template for shown in side if shown.template is not None}


def _explained(
    comparison: Comparison | None,
    sides: tuple[Sequence[ShownCapture], Sequence[ShownCapture]],
    policy: Policy,
    size: int | None,
) -> Explained:
    """Decides by the thresholds of a gallery of this size, or of a 1:1 comparison."""
    verify_db = _verify_db(policy)
    duplicate_db, review_db = (verify_db, verify_db) if size is None else policy.thresholds_db(size)
    compared = (
        [] if comparison is None else [comparison if size is not None else replace(comparison, worst_case_db=None)]
    )
    verdict = judge(
        compared,
        duplicate_db,
        review_db,
        band_db=review_db,
        usable=bool(compared),
        trust_extrapolation=policy.trust_extrapolation,
    )
    refusals_a, refusals_b = (tuple(shown.refusal for shown in side if shown.refusal is not None) for side in sides)
    return Explained(
        headline=_headline(comparison, verdict, duplicate_db, review_db, size),
        outcome=verdict.outcome,
        comparison=comparison,
        verdict=verdict,
        size=size,
        duplicate_db=duplicate_db,
        review_db=review_db,
        refusals=(refusals_a, refusals_b),
    )


def _verify_db(policy: Policy) -> float:
    return -10 * float(np.log10(policy.verify_fmr))


def _compared_captures(part: Evidence, sides: tuple[Sequence[ShownCapture], Sequence[ShownCapture]]) -> dict[str, Any]:
    """The values of one compared pair of captures for the template, with both pictures."""
    a, b = (
        next(shown for shown in side if shown.column == column and shown.template is not None)
        for side, column in zip(sides, (part.column, part.candidate_column), strict=True)
    )
    return {"title": title(part), "part": part, "sides": [panel(a), panel(b)], "matched": matched_minutiae(a, b, part)}


def _others(
    names: tuple[str, str], sides: tuple[Sequence[ShownCapture], Sequence[ShownCapture]], evidence: Sequence[Evidence]
) -> list[tuple[str, Any]]:
    """The captures that were refused or not compared, as (name of the side, values for the template)."""
    used = ({part.column for part in evidence}, {part.candidate_column for part in evidence})
    return [
        (name, panel(shown))
        for name, side, columns in zip(names, sides, used, strict=True)
        for shown in side
        if shown.template is None or shown.column not in columns
    ]


def _headline(
    comparison: Comparison | None, verdict: Judgement, duplicate_db: float, review_db: float, size: int | None
) -> str:
    if comparison is None:
        return "Nothing to compare: the two sides have no usable capture of the same kind."
    score, once = f"{comparison.score_db:.0f} dB", _once_in(comparison.score_db)
    where = "a 1:1 comparison" if size is None else f"a gallery of {size:,}"
    reaches = f"another person reaches this once in {once} comparisons"
    kind = next(iter(verdict.kinds), "")
    if verdict.outcome == "duplicate":
        swapped = ", with fingers that are labelled differently" if kind == "swapped_fingers" else ""
        return f"Same person at {score}{swapped}: {reaches}; the threshold for {where} is {duplicate_db:.0f} dB."
    if kind in _KINDS:
        return f"For a person to judge: {_KINDS[kind]}; {score} in all, and {reaches}."
    if "uncalibrated" in verdict.reasons:
        return (
            f"For a person to judge: {score}, but {where} has not checked the calibration with enough of its own people; "
            f"the cautious score is {comparison.worst_case_db or 0.0:.0f} dB."
        )
    if "extrapolated" in verdict.reasons:
        return f"For a person to judge: {score}, but the score is extrapolated, and the policy does not trust this; {reaches}."
    if verdict.outcome == "review":
        return (
            f"For a person to judge: {score}; {reaches}. For {where}, review begins at {review_db:.0f} dB, and a pair counts as the same "
            f"person from {duplicate_db:.0f} dB on."
        )
    threshold = "the threshold" if size is None else "review"
    return f"Not shown to be the same person: {score}; {reaches}; {threshold} for {where} begins at {review_db:.0f} dB."


_KINDS = {
    "look_alike": "the faces agree but the fingers do not, as with twins",
    "shared_finger": "only one finger agrees, as if an operator's finger was recorded by mistake",
}


def _once_in(score_db: float) -> str:
    """The number of impostor comparisons of which one reaches the score, as a text."""
    if score_db >= SCORE_DB_MAX - 1e-6:
        return "more than 10" + str(round(SCORE_DB_MAX / 10)).translate(_SUPERSCRIPTS)
    if score_db >= 60:
        return "10" + str(int(score_db / 10)).translate(_SUPERSCRIPTS)
    count = 10 ** (score_db / 10)
    return f"{count:.1f}" if count < 10 else f"{float(f'{count:.2g}'):,.0f}"


_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def parse_side(texts: Iterable[str], config: Config | None = None) -> list[Face | Finger]:
    """The captures that texts name. A text is a path, or `face=PATH`, `finger=PATH`, `right_index=PATH`, several of them with commas between."""
    captures: list[Face | Finger] = []
    for text in texts:
        named = [piece.partition("=") for piece in text.split(",")]
        if not all(separator and name in _NAMED for name, separator, _ in named):
            captures += captures_at(Path(text), config)
            continue
        for name, _, path in named:
            captures.append(Face(path) if name == "face" else Finger(path, "unknown" if name == "finger" else name))
    return captures


_NAMED = frozenset(("face", "finger", *FINGER_POSITIONS))
