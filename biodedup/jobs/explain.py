"""`explain`: one page on one pair: what was captured, what was found in it, what agrees, and what that is worth.

Owns what stands on the page and where. Never compares itself: it extracts under a trace, asks the comparer for the evidence, and the
matcher for the minutiae that it paired. The page holds biometric data; it goes to the file that was asked for and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import atan2, cos, degrees, pi, sin
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from biodedup.capture.finger import DPI, MM_PER_PIXEL, resampled, ridge_blocks, ridge_period_share, scanner_dpi
from biodedup.capture.formats import decode, read
from biodedup.capture.minutiae_layouts import is_record
from biodedup.capture.minutiae_record import read_record
from biodedup.capture.wsq import is_wsq
from biodedup.config import Config
from biodedup.embed.cards import shipped_cards
from biodedup.embed.extractor import Extractor
from biodedup.engine import Engine, pair_comparer
from biodedup.errors import InvalidInput
from biodedup.jobs.dedup import IMAGE_SUFFIXES
from biodedup.jobs.results import picture, write_page
from biodedup.match.calibration import SCORE_DB_MAX
from biodedup.match.minutiae import matched
from biodedup.match.pairs import PairComparer
from biodedup.match.ranked import Comparison
from biodedup.match.verdict import Verdict, judge
from biodedup.trace import Step, Trace
from biodedup.trace import explain as traced
from biodedup.values import FINGER_POSITIONS, Evidence, Face, Finger, Missing, Refusal, Template

Side: TypeAlias = "str | Path | Sequence[Face | Finger | Missing] | Mapping[str, Template]"
"""A file or folder of captures, captures, or templates without pictures."""
Image: TypeAlias = NDArray[np.uint8]

_RECORDS = frozenset((".fmr", ".fmd", ".ist-fmr", ".min"))
_SIZES = (1_000, 1_000_000, 200_000_000)
"""Galleries whose thresholds the page tells, besides the one that is asked for."""
_GAP_PX, _FACE_PX, _FINGER_PX = 24, 640, 900


@dataclass(frozen=True, eq=False)
class Shown:
    """One capture, as the page shows it. image: of a face as it was turned, of a finger at 500 dpi; None where no picture is kept.
    checks: (reason, what, measured, limit, missed) of the quality gate. core, angle: where the finger network takes the core to be."""

    column: str
    source: str
    template: Template | None = None
    refusal: Refusal | None = None
    image: Image | None = field(default=None, repr=False)
    box: NDArray[np.float32] | None = field(default=None, repr=False)
    landmarks: NDArray[np.float64] | None = field(default=None, repr=False)
    aligned: Image | None = field(default=None, repr=False)
    core: tuple[float, float] | None = field(default=None, repr=False)
    angle: float = 0.0
    checks: tuple[tuple[str, str, float, float, bool], ...] = ()


@dataclass(frozen=True, eq=False)
class Explained:
    """What the page says. comparison: None where nothing was comparable; threshold_db: of `duplicate` at this size, or 1:1."""

    headline: str
    outcome: str
    comparison: Comparison | None
    verdict: Verdict
    size: int | None
    duplicate_db: float
    review_db: float
    refusals: tuple[tuple[Refusal, ...], tuple[Refusal, ...]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without biometric data."""
        compared = None if self.comparison is None else asdict(self.comparison)
        return {
            "headline": self.headline,
            "outcome": self.outcome,
            "kind": next(iter(self.verdict.kinds), ""),
            "gallery_size": self.size,
            "duplicate_db": self.duplicate_db,
            "review_db": self.review_db,
            "comparison": compared,
            "refusals": {name: [asdict(one) for one in some] for name, some in zip("ab", self.refusals, strict=True)},
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
    """Compares two sides and writes a page about it.

    size: subjects of the gallery whose thresholds count; None takes the engine's, and without one those of a 1:1 comparison. engine: whose
    calibrations count. Raises InvalidInput, ModelMismatch, StorageUnavailable.
    """
    config = config or Config()
    extractor = Extractor(config)
    sides = tuple(_shown(side, extractor) for side in (a, b))
    pairs = engine.pairs if engine is not None else pair_comparer([*shipped_cards(), *extractor.cards])
    size = len(engine) if size is None and engine is not None else size
    return _write(out, sides[0], sides[1], pairs, config, names, size, across_positions, extractor)


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
    """As `explain`, of templates in hand. images: column -> picture of each side, where somebody kept them: of fingers, grey at 500 dpi."""
    config = config or Config()
    extractor = Extractor(config)
    kept: tuple[Mapping[str, Image], Mapping[str, Image]] = images or ({}, {})
    sides = [
        [replace(shown, image=pictures.get(shown.column)) for shown in _shown(side, extractor)]
        for side, pictures in zip((a, b), kept, strict=True)
    ]
    pairs = engine.pairs if engine is not None else pair_comparer([*shipped_cards(), *extractor.cards])
    size = len(engine) if size is None and engine is not None else size
    return _write(out, sides[0], sides[1], pairs, config, names, size, across_positions, extractor)


def captures_at(path: Path, config: Config | None = None) -> list[Face | Finger]:
    """The captures of a file or folder. A finger's position is read from its file's name (`right_index`); what no name tells is
    a finger where it shows ridges, else a face. Raises InvalidInput."""
    suffixes = IMAGE_SUFFIXES | _RECORDS
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix.lower() in suffixes)
    if not files:
        raise InvalidInput(f"{path} is no file, and no folder of captures; name an image, or a folder of them")
    return [_capture(file, config or Config()) for file in files]


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
    ridges = ridge_blocks(grey)
    area_mm2 = np.count_nonzero(ridges) * (16 * MM_PER_PIXEL) ** 2
    enough = area_mm2 >= config.finger.area_mm2_min
    return bool(enough and ridge_period_share(grey, ridges) >= config.finger.ridge_share_min)


# what was found in the captures ---------------------------------------------------------------------------------------


def _shown(side: Side, extractor: Extractor) -> list[Shown]:
    """The captures of a side; the kept one of each column has its template, others a refusal."""
    if isinstance(side, Mapping):
        return [Shown(column, "a stored template", template) for column, template in side.items()]
    captures = captures_at(Path(side), extractor.config) if isinstance(side, (str, Path)) else list(side)
    with traced() as steps:
        results = extractor.extract(captures)
    shown = [
        _shown_capture(capture, result, steps, i)
        for i, (capture, result) in enumerate(zip(captures, results, strict=True))
    ]
    best: dict[str, int] = {}
    for i, one in enumerate(shown):
        if one.template is not None:
            kept = best.setdefault(one.column, i)
            if (one.template.quality or 0) > (getattr(shown[kept].template, "quality", None) or 0):
                best[one.column] = i
    return [
        one
        if one.template is None or best[one.column] == i
        else replace(
            one,
            template=None,
            refusal=Refusal(one.column, "superseded", "a better capture was kept", one.template.quality),
        )
        for i, one in enumerate(shown)
    ]


def _shown_capture(capture: Face | Finger | Missing, result: Template | Refusal, steps: Trace, item: int) -> Shown:
    def last(name: str) -> Step | Mapping[str, Any]:
        found = steps.of(name, item)
        return found[-1] if found else {}

    face, pose, ridges = last("face"), last("pose"), last("ridges")
    image = next((step["image"] for step in (face, last("faces"), ridges, last("pixels")) if step), None)
    data = getattr(capture, "data", None)
    return Shown(
        result.column,
        Path(data).name if isinstance(data, (str, Path)) else "not captured" if data is None else "in memory",
        result if isinstance(result, Template) else None,
        result if isinstance(result, Refusal) else None,
        image,
        face.get("box"),
        face.get("landmarks"),
        face.get("aligned"),
        pose.get("core"),
        pose.get("angle", 0.0),
        tuple(check for step in steps.of("quality", item) for check in step["checks"]),
    )


# the page -------------------------------------------------------------------------------------------------------------


def _write(
    out: Path,
    a: Sequence[Shown],
    b: Sequence[Shown],
    pairs: PairComparer,
    config: Config,
    names: tuple[str, str],
    size: int | None,
    across: bool,
    extractor: Extractor,
) -> Explained:
    import biodedup  # its version

    mine, theirs = ({one.column: one for one in side if one.template is not None} for side in (a, b))
    templates = [
        {column: one.template for column, one in side.items() if one.template is not None} for side in (mine, theirs)
    ]
    comparison = pairs.compare(templates[0], templates[1], across=across)
    verify_db = -10 * float(np.log10(config.policy.verify_fmr))
    duplicate_db, review_db = (verify_db, verify_db) if size is None else config.policy.thresholds_db(size)
    compared = [] if comparison is None else [comparison]
    verdict = judge(compared, duplicate_db, review_db, band_db=review_db, usable=bool(compared))
    evidence = () if comparison is None else comparison.evidence
    refusals = [tuple(one.refusal for one in side if one.refusal is not None) for side in (a, b)]
    told = Explained(
        _headline(comparison, verdict, duplicate_db, review_db, size),
        verdict.outcome,
        comparison,
        verdict,
        size,
        duplicate_db,
        review_db,
        (refusals[0], refusals[1]),
    )
    used = ({part.column for part in evidence}, {part.candidate_column for part in evidence})
    rows = sorted({*_SIZES, *(() if size is None else (size,))})
    laws = [pairs.law(templates[0][part.column], part) for part in evidence]
    write_page(
        out,
        "explain.html",
        told=told,
        names=names,
        verify_db=verify_db,
        policy=config.policy,
        comparison=comparison,
        reaches=None if comparison is None else _once_in(comparison.score_db),
        waterfall=None if comparison is None else _waterfall(comparison, duplicate_db, review_db),
        thresholds=[(row, *config.policy.thresholds_db(row), row == size) for row in rows],
        pairs=[
            {
                "title": _title(part),
                "part": part,
                "law": law,
                "readings": pairs.readings(templates[0][part.column], part),
                "sides": [_panel(mine[part.column]), _panel(theirs[part.candidate_column])],
                "matched": _matched(mine[part.column], theirs[part.candidate_column], part),
            }
            for part, law in zip(evidence, laws, strict=True)
        ],
        measured_db=max((law.measured_db for law in laws), default=0.0),
        others=[
            (name, _panel(one))
            for name, side, columns in zip(names, (a, b), used, strict=True)
            for one in side
            if one.template is None or one.column not in columns
        ],
        models=sorted({(t.column, t.model_id) for side in templates for t in side.values()}),
        cards=extractor.cards,
        version=biodedup.__version__,
        label=_label,
    )
    return told


def _headline(
    comparison: Comparison | None, verdict: Verdict, duplicate_db: float, review_db: float, size: int | None
) -> str:
    if comparison is None:
        return "Nothing to compare: no capture of one side has a usable counterpart on the other."
    score, once = f"{comparison.score_db:.0f} dB", _once_in(comparison.score_db)
    where = "a 1:1 comparison" if size is None else f"a gallery of {size:,}"
    reaches = f"a stranger reaches this once in {once} comparisons"
    kind = next(iter(verdict.kinds), "")
    if verdict.outcome == "duplicate":
        swapped = ", with fingers that are labelled differently" if kind == "swapped_fingers" else ""
        return f"Same person at {score}{swapped}: {reaches}; the threshold for {where} is {duplicate_db:.0f} dB."
    if kind in _KINDS:
        return f"For a person to judge: {_KINDS[kind]}; {score} in all, and {reaches}."
    if verdict.outcome == "review":
        return (
            f"For a person to judge: {score}; {reaches}. For {where}, review begins at {review_db:.0f} dB and the same person is "
            f"taken for granted from {duplicate_db:.0f} dB on."
        )
    return f"Not shown to be the same person: {score}; {reaches}; the threshold for {where} is {review_db:.0f} dB."


_KINDS = {
    "look_alike": "the faces agree and the fingers do not, as twins' do",
    "shared_finger": "one finger agrees and all else does not, as where an operator's finger got into a record",
}


def _once_in(score_db: float) -> str:
    """How many comparisons of strangers it takes, as a text."""
    if score_db >= SCORE_DB_MAX - 1e-6:
        return "more than 10" + str(round(SCORE_DB_MAX / 10)).translate(_RAISED)
    if score_db >= 60:
        return "10" + str(int(score_db / 10)).translate(_RAISED)
    count = 10 ** (score_db / 10)
    return f"{count:.1f}" if count < 10 else f"{float(f'{count:.2g}'):,.0f}"


_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _label(column: str) -> str:
    return "finger of unknown position" if column == "unknown" else column.replace("_", " ")


def _title(part: Evidence) -> str:
    if part.column == part.candidate_column:
        return _label(part.column)
    return f"{_label(part.column)} with {_label(part.candidate_column)}"


def _waterfall(comparison: Comparison, duplicate_db: float, review_db: float) -> dict[str, Any]:
    """Bars in dB: each capture's evidence from where the one before ended, what is charged, their sum, and the score it is worth."""
    bars: list[dict[str, Any]] = []
    total = 0.0
    steps = [(_title(part), part.llr_db) for part in comparison.evidence]
    if comparison.charge_db:
        steps.append(("readings of the labels that were tried", -comparison.charge_db))
    for name, value in steps:
        bars.append({"name": name, "from": total, "to": total + value, "value": value, "kind": "step"})
        total += value
    bars.append({"name": "evidence in all", "from": 0.0, "to": total, "value": total, "kind": "sum"})
    score = comparison.score_db
    bars.append({"name": "score: strangers' rarity", "from": 0.0, "to": score, "value": score, "kind": "score"})
    ends = [end for bar in bars for end in (bar["from"], bar["to"])] + [duplicate_db, review_db]
    low, high = min(0.0, *ends), max(*ends, 10.0)
    low, high = (low - 0.04 * (high - low) if low < 0 else low), high + 0.08 * (high - low)
    scale = 560 / (high - low)
    for bar in bars:
        bar["x"] = round((min(bar["from"], bar["to"]) - low) * scale, 1)
        bar["width"] = round(max(abs(bar["to"] - bar["from"]) * scale, 1.5), 1)
        bar["end"] = round((bar["to"] - low) * scale, 1)
    step = next(s for s in (5, 10, 20, 50, 100) if (high - low) / s <= 10)
    ticks = [(db, round((db - low) * scale, 1)) for db in range(int(low // step + 1) * step, int(high) + 1, step)]
    lines = [("duplicate", duplicate_db)] + ([("review", review_db)] if review_db < duplicate_db else [])
    return {
        "bars": bars,
        "ticks": ticks,
        "lines": [(name, db, round((db - low) * scale, 1)) for name, db in lines],
        "zero": round(-low * scale, 1),
    }


def _panel(one: Shown) -> dict[str, Any]:
    """One capture for the template: picture, size, marks."""
    finger = one.column != "face"
    size, src = (300, 300), None
    if one.image is not None:
        size = (one.image.shape[1], one.image.shape[0])
        src = picture(one.image, side_px_max=_FINGER_PX if finger else _FACE_PX)
    elif one.template is not None and one.template.minutiae is not None:
        record = read_record(one.template.minutiae)
        size = (record.width, record.height)
    pose = None
    if one.core is not None:
        (x, y), length = one.core, 45.0
        pose = {"x": x, "y": y, "up_x": x + length * sin(one.angle), "up_y": y - length * cos(one.angle)}
    return {
        "shown": one,
        "finger": finger,
        "width": size[0],
        "height": size[1],
        "src": src,
        "box": None if one.box is None else one.box.tolist(),
        "landmarks": [] if one.landmarks is None else one.landmarks.tolist(),
        "unit": max(size) / 250,  # of lines and dots in a face's picture
        "aligned": None if one.aligned is None else picture(one.aligned),
        "pose": pose,
        "turned": degrees(one.angle),
    }


def _matched(a: Shown, b: Shown, part: Evidence) -> dict[str, Any] | None:
    """The minutiae of both prints and which are one, numbered from the top."""
    records = [one.template.minutiae if one.template is not None else None for one in (a, b)]
    if part.minutiae is None or records[0] is None or records[1] is None:
        return None
    pairs, motion = matched(records[0], records[1])
    points = [_points(record) for record in records if record is not None]
    order = np.argsort(points[0][pairs[:, 0], 1], kind="stable")
    numbers: list[dict[int, int]] = [{}, {}]
    lines = []
    for number, (i, k) in enumerate(pairs[order].tolist(), start=1):
        numbers[0][i], numbers[1][k] = number, number
        lines.append({"number": number, "hue": _hue(number), "from": points[0][i], "to": points[1][k]})
    return {
        "marks": [
            [
                {"x": x, "y": y, "dx": dx, "dy": dy, "number": found.get(i), "hue": _hue(found.get(i, 0))}
                for i, (x, y, dx, dy, _) in enumerate(some.tolist())
            ]
            for some, found in zip(points, numbers, strict=True)
        ],
        "qualities": [round(float(some[:, 4].mean())) if len(some) else 0 for some in points],
        "lines": lines,
        "turn": degrees(atan2(motion[1], motion[0])),
        "gap": _GAP_PX,
    }


def _points(record: bytes) -> NDArray[np.float64]:
    """float64 (n, 5): x, y, the direction as a vector of 11 pixels, quality."""
    rows = np.frombuffer(read_record(record).body, np.uint8).reshape(-1, 6)
    x, y = (((rows[:, at] & 63).astype(int) << 8) | rows[:, at + 1] for at in (0, 2))
    angle = rows[:, 4] * (2 * pi / 256)  # ISO's: anticlockwise
    return np.column_stack([x, y, 11 * np.cos(angle), -11 * np.sin(angle), rows[:, 5]]).astype(np.float64)


def _hue(number: int) -> int:
    """Neighbouring numbers have hues far apart: steps of the golden angle."""
    return round(number * 137.508) % 360


def parse_side(texts: Iterable[str], config: Config | None = None) -> list[Face | Finger]:
    """Captures from texts: paths, and `face=PATH`, `finger=PATH`, `right_index=PATH`, several in one text with commas between."""
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
