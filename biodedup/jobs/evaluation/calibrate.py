"""`calibrate`: fits the calibration of a model on labelled pairs of captures, or on the impostor pairs of a gallery.

The result is a model card: of a shipped model, or of an external model, which has no weights here. Owns the table of pairs that it reads and
the card that it writes. Never extracts templates: `evaluate` writes such a table.

A table of pairs (Parquet or CSV) has the raw scores `similarity`, `minutiae` or both, and `mated`; and if known `subject_a`, `subject_b` and
`position`.

1. The reported error rates are measured on held-out pairs. Then the card is fitted on all pairs.
2. If subjects are stated, the held-out pairs are of other subjects, and intervals account for pairs that share a subject.
3. Without mated pairs, as from a gallery, only the non-mated distribution is fitted, and the likelihood ratio is derived from it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
import tomli_w
from numpy.typing import NDArray

from biodedup.common.described import Described
from biodedup.common.executors import LOCAL, Executor
from biodedup.config import Config
from biodedup.embed.cards import ModelCard, joint_id, load_card, shipped_cards
from biodedup.engine.arrow.ids import WAS_ROUNDED, were_rounded
from biodedup.errors import InvalidInput
from biodedup.gallery.files.filesystem import LocalStorage
from biodedup.gallery.gallery import Gallery
from biodedup.jobs.deduplication.gallery import is_gallery
from biodedup.jobs.evaluation.impostors import impostor_pairs
from biodedup.jobs.manifests.tables import CSV_SUFFIXES
from biodedup.jobs.manifests.text_form import open_utf8, text_form
from biodedup.jobs.shared.files import write_text
from biodedup.jobs.shared.progress import Progress, silent
from biodedup.keys import KeySource
from biodedup.match.scores.calibration import Calibration
from biodedup.match.scores.fitting import COSINE_POWER, MATED_MIN, NONMATED_MIN, Nonmates, fit, measured_fmr, refit
from biodedup.values import check_id

NOMINAL_DB = (20, 30, 40)
Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Labelled pairs of captures. scores: name of the raw score -> float64 (n,); mated: bool (n,); a, b: numbers of the subjects, int64 (n,),
    or None; position: str (n,), or None."""

    scores: Mapping[str, Float64] = field(repr=False)
    mated: NDArray[np.bool_] = field(repr=False)
    a: NDArray[np.int64] | None = field(default=None, repr=False)
    b: NDArray[np.int64] | None = field(default=None, repr=False)
    position: NDArray[np.str_] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.mated)

    def of(self, rows: NDArray[Any]) -> Pairs:
        """Some of the pairs. rows: indices, or bool (n,)."""
        a, b, position = (None if each is None else each[rows] for each in (self.a, self.b, self.position))
        return Pairs({name: values[rows] for name, values in self.scores.items()}, self.mated[rows], a, b, position)

    def halves(self, rng: np.random.Generator) -> tuple[Pairs, Pairs]:
        """Two disjoint random parts. No subject is in both parts; if subjects are unknown, no pair is."""
        if self.a is None or self.b is None:
            first = rng.random(len(self)) < 0.5
            return self.of(first), self.of(~first)
        chosen = rng.random(1 + max(int(self.a.max()), int(self.b.max()))) < 0.5
        return self.of(chosen[self.a] & chosen[self.b]), self.of(~chosen[self.a] & ~chosen[self.b])


@dataclass(frozen=True)
class CalibrateResult(Described):
    """The result of a fit. mated, nonmated: numbers of pairs; subjects: their number, None if unknown. held_out: fitted table -> rows with the
    nominal and the measured FMR on held-out pairs, before and after the fit. positions: the same rows after the fit for all pairs, by position.
    `differs` in a row: nominal and measured FMR differ by more than a factor of two, and not by chance."""

    card: str
    mated: int
    nonmated: int
    subjects: int | None
    held_out: Mapping[str, list[dict[str, Any]]]
    positions: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """The result, JSON-ready."""
        return {
            "card": self.card,
            "mated_pairs": self.mated,
            "nonmated_pairs": self.nonmated,
            "subjects": self.subjects,
            "held_out": dict(self.held_out),
            "positions": self.positions,
        }


def calibrate(
    pairs: Path,
    model_id: str,
    out: Path,
    *,
    dimension: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    config: Config | None = None,
    executor: Executor = LOCAL,
) -> CalibrateResult:
    """Fits the calibration of a model on pairs, and writes the model's card to `out` (.toml). The card is used in `FaceConfig(model=...)`,
    `FingerConfig(model=...)` or `FingerConfig(minutiae_model=...)`.

    pairs: a table of pairs, or the folder of a gallery. model_id: a shipped model, the name of its card, or the path of a card;
    `finger256-3+mindtct-1` fits the embedding, and its combination with minutiae; any other model_id is an external model, whose card has no
    weights. dimension: dimension of an external model's embeddings; None takes it from a gallery, or does not state it. config: needed for the
    key of an encrypted gallery. executor: where the minutiae of a gallery are compared (`jobs.ray_executor`).

    Raises InvalidInput for a table without the needed columns or pairs, ModelCardError, StorageUnavailable.
    """
    if out.suffix != ".toml":
        raise InvalidInput(f"the card cannot be named {out.name}; end the name with .toml")
    card, minutiae = _cards(model_id, out)
    keys = None if config is None else config.keys
    found = (
        pairs_of_gallery(pairs, card, minutiae, seed, progress, keys=keys, executor=executor)
        if is_gallery(pairs)
        else read_pairs(pairs, _columns(card, minutiae))
    )
    mates = int(found.mated.sum())
    _check_enough(pairs.name, mates, len(found) - mates, card, minutiae)
    rng = np.random.default_rng(seed)
    fitted, tested = found.halves(rng)
    held_out: dict[str, list[dict[str, Any]]] = {}
    before = {"calibration": card.calibration, "both": card.both.get(minutiae.model_id) if minutiae else None}
    before = {name: table for name, table in before.items() if table}
    enough = not mates or fitted.mated.sum() >= MATED_MIN
    if enough and (~fitted.mated).sum() >= NONMATED_MIN and not tested.mated.all():
        progress("fitting", 0, 2)
        after = _fitted(fitted, card, minutiae, pairs.name, seed)
        for name in after:
            old = _score_db(tested, name, before, minutiae) if name in before else None
            held_out[name] = _rows(_score_db(tested, name, after, minutiae), old)
    progress("fitting", 1, 2)
    tables = _fitted(found, card, minutiae, pairs.name, seed)
    document = _document(card, pairs, dimension, found, keys)
    if card.weights is not None:
        document["weights"]["file"] = str(card.weights.absolute())
    document["calibration"] = tables["calibration"]
    if minutiae is not None:
        document.setdefault("both", {})[minutiae.model_id] = tables["both"]
    write_text(card_text(document), out)
    progress("fitting", 2, 2)
    subjects = None if found.a is None or found.b is None else len(np.union1d(found.a, found.b))
    positions = _positions(found, tables, minutiae)
    return CalibrateResult(out.name, mates, len(found) - mates, subjects, held_out, positions)


def _check_enough(name: str, mates: int, nonmates: int, card: ModelCard, minutiae: ModelCard | None) -> None:
    """Raises InvalidInput if there are too few pairs for a calibration. name: of their file, for the message."""
    if 0 < mates < MATED_MIN or nonmates < NONMATED_MIN:
        raise InvalidInput(
            f"{name} has {mates} mated and {nonmates} non-mated pairs with a score; a calibration needs at least {NONMATED_MIN} non-mated "
            f"pairs, 10 / FMR of them to measure an FMR (1,000,000 for 1e-5), and either no mated pairs or at least {MATED_MIN}"
        )
    if not mates and not (card.calibration and (minutiae is None or minutiae.model_id in card.both)):
        raise InvalidInput(
            f"{name} has no mated pairs, and {card.model_id} has no earlier calibration to start from; pass mated pairs"
        )


def pairs_of_gallery(
    gallery: Path,
    card: ModelCard,
    minutiae: ModelCard | None,
    seed: int,
    progress: Progress = silent,
    *,
    keys: KeySource | None = None,
    executor: Executor = LOCAL,
) -> Pairs:
    """Impostor pairs of a gallery (`impostors.py`). Raises InvalidInput."""
    models = {card.model_id}
    if card.kind == "minutiae":  # with any embedding beside them
        models |= {joint_id(other, card) for other in shipped_cards() if other.kind == "finger-embedding"}
    elif card.kind == "finger-embedding":
        models = {
            joint_id(card, other) for other in shipped_cards() if other.kind == "minutiae" and minutiae in (None, other)
        }
        models |= {card.model_id} if minutiae is None else set()
    columns = _columns(card, minutiae)
    scores, a, b, position = impostor_pairs(
        gallery,
        frozenset(models),
        minutiae="minutiae" in columns,
        seed=seed,
        progress=progress,
        keys=keys,
        executor=executor,
    )
    scores = {name: scores[name] for name in columns}
    whole = np.isfinite(np.array(list(scores.values()))).all(axis=0)
    a, b = np.unique(np.stack([a, b]), return_inverse=True)[1].reshape(2, -1)  # subjects are numbered from 0
    return Pairs(scores, np.zeros(len(a), bool), a, b, position).of(whole)


def read_pairs(path: Path, columns: tuple[str, ...]) -> Pairs:
    """Reads a table of pairs. columns: the raw scores that it must have; rows without one of them are skipped. Raises InvalidInput."""
    try:
        table = _read_csv(path) if path.suffix.lower() in CSV_SUFFIXES else pa.parquet.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InvalidInput(
            f"pairs cannot be read from {path} ({type(error).__name__}); pass Parquet, CSV, or the folder of a gallery"
        ) from None
    lacking = [name for name in (*columns, "mated") if name not in table.column_names]
    if lacking:
        raise InvalidInput(
            f"{path.name} has columns {', '.join(table.column_names)}; wanted also {', '.join(lacking)} for this model"
        )
    try:
        scores = {name: table[name].cast(pa.float64()).to_numpy() for name in columns}
        mated = pc.fill_null(table["mated"].cast(pa.bool_()), False).to_numpy()
    except pa.ArrowInvalid:
        raise InvalidInput(f"{path.name}: {', '.join(columns)} must be numbers, and mated true or false") from None
    a = b = None
    _refuse_rounded(table, path)
    if {"subject_a", "subject_b"} <= set(table.column_names):
        both = pa.chunked_array(
            [*(table[name].cast(pa.string()).combine_chunks() for name in ("subject_a", "subject_b"))]
        )
        codes = both.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
        a, b = codes[: len(table)], codes[len(table) :]
    position = None
    if "position" in table.column_names:
        position = pc.fill_null(table["position"].cast(pa.string()), "").to_numpy().astype(np.str_)
    whole = np.isfinite(np.array(list(scores.values()))).all(axis=0)
    return Pairs(scores, mated, a, b, position).of(whole)


def _read_csv(path: Path) -> pa.Table:
    form = text_form(path)
    names = dict.fromkeys(("subject_a", "subject_b", "position"), pa.string())  # ids are texts, not numbers
    return pa.csv.read_csv(
        path if form.is_utf8 else open_utf8(path, form),
        read_options=pa.csv.ReadOptions(skip_rows=form.lines_before),
        parse_options=pa.csv.ParseOptions(delimiter=form.delimiter),
        convert_options=pa.csv.ConvertOptions(column_types=names),
    )


def _refuse_rounded(table: pa.Table, path: Path) -> None:
    """Raises InvalidInput if a spreadsheet rounded an id, so that several subjects share it."""
    for name in {"subject_a", "subject_b"} & set(table.column_names):
        rounded = np.flatnonzero(were_rounded(table[name].cast(pa.string())))
        if len(rounded):
            raise InvalidInput(
                f"{path.name}: in row {rounded[0] + 1} and {len(rounded) - 1:,} more, {name} {WAS_ROUNDED}, and write it again"
            )


def _document(
    card: ModelCard, pairs: Path, dimension: int | None, found: Pairs, keys: KeySource | None
) -> dict[str, Any]:
    """The content of the new card without its tables: the content of the old card, or the known facts about an external model."""
    if card.path.exists():
        return tomllib.loads(card.path.read_text(encoding="utf-8"))
    if is_gallery(pairs):
        with closing(Gallery.open_to_read(pairs, LocalStorage(keys), Config().gallery)) as opened:
            models = opened.snapshot().models.values()
        dimension = next(model.dimension for model in models if model.model_id == card.model_id)
    fingers = found.position is not None and len(found.position) and "face" not in found.position
    kind = "finger-embedding" if fingers else "face-embedding"
    known = {"name": card.name, "model_id": card.model_id, "kind": kind, "licence": "", "source": "runs elsewhere"}
    return known | ({} if dimension is None else {"dimension": dimension})


def _cards(model_id: str, out: Path) -> tuple[ModelCard, ModelCard | None]:
    """(the card of the model, the card of the minutiae that are combined with it or None). out: the path of the new card."""
    if model_id.endswith(".toml"):
        return load_card(model_id), None
    known = {name: card for card in shipped_cards() for name in (card.name, card.model_id)}
    parts = [known.get(part) for part in model_id.split("+")]
    match parts:
        case [ModelCard(kind="face-embedding" | "finger-embedding" | "minutiae") as card]:
            return card, None
        case [ModelCard(kind="finger-embedding") as card, ModelCard(kind="minutiae") as minutiae]:
            return card, minutiae
    if not any(parts):
        check_id(model_id, "model_id")
        external = ModelCard(model_id, model_id, "face-embedding", "", "", out.with_name(f"{out.name}.new").absolute())
        return external, None
    names = sorted(card.model_id for card in shipped_cards() if card.kind != "face-detector")
    raise InvalidInput(
        f"model {model_id!r} is not known; pass one of {', '.join(names)}, two of them as embedding+minutiae, the path of a card, or "
        "the model_id of an external model"
    )


def _columns(card: ModelCard, minutiae: ModelCard | None) -> tuple[str, ...]:
    if card.kind == "minutiae":
        return ("minutiae",)
    return ("similarity",) if minutiae is None else ("similarity", "minutiae")


def _raw(pairs: Pairs, name: str, tables: Mapping[str, Any], minutiae: ModelCard | None) -> Float64:
    """The values that a table calibrates: a raw score (`calibration`), or the sum of two llr_db (`both`)."""
    if name == "calibration":
        return next(iter(pairs.scores.values()))
    assert minutiae is not None and minutiae.calibration is not None
    embedding, records = Calibration.from_card(tables["calibration"]), Calibration.from_card(minutiae.calibration)
    return embedding.llr_db(pairs.scores["similarity"]) + records.llr_db(pairs.scores["minutiae"])


def _fitted(
    pairs: Pairs, card: ModelCard, minutiae: ModelCard | None, name: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Fits the tables of the new card, at the knots of the old tables if there are any. name: of the source of the pairs."""
    tables: dict[str, dict[str, Any]] = {}
    earlier = {"calibration": card.calibration, "both": card.both.get(minutiae.model_id) if minutiae else None}
    nonmated = pairs.of(~pairs.mated)
    for table in ("calibration",) if minutiae is None else ("calibration", "both"):
        raw, old = _raw(pairs, table, tables, minutiae), earlier[table]
        knots = np.linspace(raw.min(), raw.max(), 65) if old is None else np.array(old["score"], np.float64)
        source = f"{name}, {len(nonmated)} non-mated and {len(pairs) - len(nonmated)} mated pairs"
        nonmates = Nonmates(name, raw[~pairs.mated], nonmated.a, nonmated.b)
        power = COSINE_POWER if table == "calibration" and card.kind != "minutiae" else 1.0
        if pairs.mated.any():
            tables[table] = fit([raw[pairs.mated]], [nonmates], knots, source=source, power=power, seed=seed)
        else:
            assert old is not None, "_check_enough requires an earlier table"
            tables[table] = refit(old, [nonmates], source=source, power=power, seed=seed)
    return tables


def _score_db(pairs: Pairs, name: str, tables: Mapping[str, Any], minutiae: ModelCard | None) -> Float64:
    """The score_db of the non-mated pairs."""
    raw = _raw(pairs, name, tables, minutiae)
    return Calibration.from_card(tables[name]).score_db(raw[~pairs.mated])


def _rows(after: Float64, before: Float64 | None = None) -> list[dict[str, Any]]:
    """The nominal and the measured FMR at each of NOMINAL_DB. after, before: score_db of non-mated pairs after and before the fit."""
    rows: list[dict[str, Any]] = []
    for nominal_db in NOMINAL_DB:
        found = measured_fmr(after, nominal_db)
        row: dict[str, Any] = {
            "nominal_db": nominal_db,
            "nominal_fmr": found.nominal,
            "pairs": found.pairs,
            "fmr": found.measured,
        }
        row |= {"fmr_low": found.low, "fmr_high": found.high, "differs": found.differs}
        if before is not None:
            row["fmr_before"] = measured_fmr(before, nominal_db).measured
        rows.append(row)
    return rows


def _positions(pairs: Pairs, tables: Mapping[str, Any], minutiae: ModelCard | None) -> list[dict[str, Any]]:
    """The FMR of each position that has enough pairs, with the calibration that was fitted on all positions."""
    if pairs.position is None:
        return []
    score_db = _score_db(pairs, "calibration" if minutiae is None else "both", tables, minutiae)
    positions = pairs.position[~pairs.mated]
    names, counts = np.unique(positions, return_counts=True)
    enough = names[counts >= NONMATED_MIN].tolist()
    return [{"position": name} | row for name in enough for row in _rows(score_db[positions == name])]


def card_text(document: Mapping[str, Any]) -> str:
    """A card as TOML. Numbers have six significant digits, and numbers in lists five."""
    return tomli_w.dumps(_rounded(document))


def _rounded(value: Any, digits: int = 6) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    return value if isinstance(value, (str, int)) else [_rounded(each, digits - 1) for each in value]
