"""`evaluate`: measures error rates on labelled captures or templates, in the terms of ISO/IEC 19795-1.

Owns the job from a labelled source to the result files, and the layout of the JSON. `rates.py` has the arithmetic; `comparisons.py` chooses
the pairs.

1. An *encounter* is what is compared: the captures that a manifest files under one encounter_id, or else one file or row.
2. Beside OUT.json lie OUT.pairs.parquet, OUT.searches.parquet and OUT.encounters.parquet, from which every figure can be counted again.
3. Rates are stated for what could be compared, and again with every failure to enrol counted as a miss.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from biodedup.common.described import Described
from biodedup.common.intervals import CONFIDENCE
from biodedup.config import Config, IsolationConfig, Policy
from biodedup.errors import InvalidInput
from biodedup.gallery.files.private import make_private_folder
from biodedup.jobs.evaluation import plots
from biodedup.jobs.evaluation.comparisons import Comparisons, Pairs, Searches, compare_all
from biodedup.jobs.evaluation.labelled import Labelled, extracted, read_labelled
from biodedup.jobs.evaluation.rates import (
    Rate,
    Resampling,
    bands_of,
    cmc,
    det,
    difference,
    equal_error_rate,
    threshold_at,
)
from biodedup.jobs.evaluation.report import write_report
from biodedup.jobs.manifests.options import DEFAULT_OPTIONS, TableOptions
from biodedup.jobs.shared.files import write_json
from biodedup.jobs.shared.output import write_table
from biodedup.jobs.shared.progress import Progress, silent

SCHEMA = 1
FMR_TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FPIR_TARGETS = (1e-1, 1e-2, 1e-3)
NOMINAL_DB = (10.0, 20.0, 30.0, 40.0, 50.0, 60.0)
GROUP_SUBJECTS_MIN = 20
GROUP_VALUES_MAX = 40
CMC_DEPTH = 20
WORST = 24
HISTOGRAM_DB = 2.0

Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]
Objects = NDArray[np.object_]


@dataclass(frozen=True, eq=False)
class Evaluation(Described):
    """document: what the JSON file holds; comparisons: what it was counted from."""

    document: dict[str, Any]
    comparisons: Comparisons

    def to_dict(self) -> dict[str, Any]:
        """The document."""
        return self.document


def evaluate(
    source: Path,
    out: Path,
    config: Config | None = None,
    *,
    report: Path | None = None,
    finger: bool = False,
    dpi: float | None = None,
    model_id: str | Mapping[str, str] | None = None,
    seed: int = 0,
    replicates: int = 1000,
    nonmated_max: int = 2_000_000,
    pictures: int = 12,
    options: TableOptions = DEFAULT_OPTIONS,
    progress: Progress = silent,
    clock: Callable[[], float] = time.time,
) -> Evaluation:
    """Writes `out` (.json) and its tables, and an HTML report where one is named.

    source: a folder per subject, a manifest, or a Parquet file of templates. finger: the folder's images are fingers. model_id: what made the
    vectors of the Parquet file, one for all or by column. pictures: how many
    of the worst pairs the report shows. Raises InvalidInput, StorageUnavailable.
    """
    if out.suffix != ".json":
        raise InvalidInput(f"the result cannot be named {out.name}; end the name with .json")
    if report is not None:
        plots.require()
    config = config or Config(isolation=IsolationConfig())
    found, left_out = read_labelled(source, config, finger=finger, dpi=dpi, model_id=model_id, options=options)
    make_private_folder(out.parent)
    found = extracted(found, config, out.with_name(out.name + ".work"), progress)
    result = evaluate_encounters(
        found,
        config,
        source=str(source),
        made_at=clock(),
        seed=seed,
        replicates=replicates,
        nonmated_max=nonmated_max,
        progress=progress,
    )
    result.document["left_out"] = left_out.to_dict()
    for name, table in _tables(result.comparisons).items():
        write_table(table, out.with_name(f"{out.stem}.{name}.parquet"))
    if report is not None:
        write_report(result.document, result.comparisons.encounters, report, config, pictures)
    write_json(result.document, out)
    return result


def evaluate_encounters(
    encounters: Sequence[Labelled],
    config: Config,
    *,
    source: str,
    made_at: float,
    seed: int = 0,
    replicates: int = 1000,
    nonmated_max: int = 2_000_000,
    progress: Progress = silent,
) -> Evaluation:
    """All figures of encounters that have their templates; writes nothing."""
    import biodedup

    rng = np.random.default_rng(seed)
    compared = compare_all(encounters, config, rng, nonmated_max=nonmated_max, progress=progress)
    counts = _Counts(compared, config.stated_policy, Resampling(int(compared.subject.max()) + 1, replicates, rng))
    document = {
        "kind": "biodedup-evaluation",
        "schema": SCHEMA,
        "biodedup": biodedup.__version__,
        "made_at": made_at,
        "source": source,
        "settings": {
            "models": dict(compared.models),
            "policy": asdict(config.stated_policy),
            "seed": seed,
            "replicates": replicates,
            "confidence": CONFIDENCE,
            "nonmated_max": nonmated_max,
        },
        "counts": counts.sizes(),
        "failure_to_enrol": counts.failure_to_enrol(),
        "verification": counts.verification(),
        "alone": counts.alone(),
        "calibration": counts.calibration(),
        "identification": counts.identification(),
        "groups": counts.groups(),
        "worst": counts.worst(),
    }
    progress("counting", 1, 1)
    return Evaluation(document, compared)


class _Counts:
    """Everything that is counted from one set of comparisons, JSON-ready."""

    def __init__(self, compared: Comparisons, policy: Policy, resampling: Resampling) -> None:
        self._c, self._pairs, self._s = compared, compared.pairs, compared.searches
        self._resampling = resampling
        mated = self._pairs.mated
        self._mated_db, self._nonmated_db = self._pairs.score_db[mated], self._pairs.score_db[~mated]
        self._mated_subject = compared.subject[self._pairs.a[mated]]
        self._impostor_pairs = resampling.impostor_pairs(*self._subjects(~mated))
        self._lost = self._lost_pairs()
        self._is_mated = self._s.enrolled & self._s.searched
        self._probe_subject = compared.subject[self._s.probe]
        self._size = int(compared.gallery.sum())
        self._verify_fmr, self._verify_db = policy.verify_fmr, -10 * math.log10(policy.verify_fmr)
        self._duplicate_db, self._review_db = policy.thresholds_db(self._size)

    def sizes(self) -> dict[str, Any]:
        c = self._c
        return {
            "subjects": int(c.subject.max()) + 1,
            "encounters": len(c.encounters),
            "captures": sum(len(one.captures) or len(one.templates) + len(one.refusals) for one in c.encounters),
            "encounters_enrolled": sum(one.enrolled for one in c.encounters),
            "mated_pairs": len(self._mated_db),
            "mated_pairs_lost": len(self._lost),
            "nonmated_pairs": len(self._nonmated_db),
            "nonmated_pairs_possible": c.nonmated_possible,
            "nonmated_pairs_sampled": c.sampled,
            "extrapolated_pairs": int(self._pairs.extrapolated.sum()),
        }

    def failure_to_enrol(self) -> dict[str, Any]:
        """Encounters without any template; and, of captures, why they were declined."""
        failed = np.array([not one.enrolled for one in self._c.encounters], bool)
        reasons = Counter((refusal.column, refusal.reason) for one in self._c.encounters for refusal in one.refusals)
        return {
            "rate": self._resampling.rate(failed, self._c.subject).to_dict(),
            "captures_declined": [
                {"column": column, "reason": reason, "count": count}
                for (column, reason), count in sorted(reasons.items(), key=lambda entry: (-entry[1], entry[0]))
            ],
        }

    def verification(self) -> dict[str, Any]:
        """1:1. Scores are score_db."""
        if not len(self._mated_db) or not len(self._nonmated_db):
            return {"at_policy": None, "at_fmr": [], "equal_error_rate": None, "det": None, "histogram": None}
        rate, at = equal_error_rate(self._mated_db, self._nonmated_db)
        threshold, fmr, fnmr = det(self._mated_db, self._nonmated_db)
        at_fmr = [
            {"target": target, **self._at(value)}
            for target in FMR_TARGETS
            if (value := threshold_at(self._nonmated_db, target)) is not None
        ]
        return {
            "at_policy": {"target": self._verify_fmr, **self._at(self._verify_db)},
            "at_fmr": at_fmr,
            "equal_error_rate": {"value": rate, **self._at(at)},
            "det": {"threshold_db": threshold.tolist(), "fmr": fmr.tolist(), "fnmr": fnmr.tolist()},
            "histogram": self._histogram(),
        }

    def alone(self) -> list[dict[str, Any]]:
        """Each raw score by itself, where several count: what one capture, or one kind of evidence, tells without the others."""
        found = []
        raw = self._pairs.raw
        for (column, kind), values in raw.items() if len(raw) > 1 else ():
            there = ~np.isnan(values)
            mated, nonmated = values[there & self._pairs.mated], values[there & ~self._pairs.mated]
            if not len(mated) or not len(nonmated):
                continue
            rate, _ = equal_error_rate(mated, nonmated)
            _, fmr, fnmr = det(mated, nonmated)
            at_fmr = []
            for target in FMR_TARGETS:
                threshold = threshold_at(nonmated, target)
                if threshold is not None:
                    missed = mated < threshold
                    subject = self._c.subject[self._pairs.a[there & self._pairs.mated]]
                    fnmr_there = self._resampling.rate(missed, subject).to_dict()
                    at_fmr.append({"target": target, "threshold": threshold, "fnmr": fnmr_there})
            found.append(
                {
                    "column": column,
                    "evidence": kind,
                    "mated_pairs": len(mated),
                    "nonmated_pairs": len(nonmated),
                    "equal_error_rate": rate,
                    "at_fmr": at_fmr,
                    "det": {"fmr": fmr.tolist(), "fnmr": fnmr.tolist()},
                }
            )
        return found

    def calibration(self) -> list[dict[str, Any]]:
        """Whether a score_db means what it says: the FMR that it states beside the one counted."""
        found = []
        for nominal_db in NOMINAL_DB:
            nominal = 10 ** (-nominal_db / 10)
            if nominal * len(self._nonmated_db) < 1:
                break  # not one false match is expected
            rate = self._impostor_pairs.rate(self._nonmated_db >= nominal_db)
            low, high = rate.interval
            verdict = "too_high" if low > nominal else "too_low" if high < nominal else "agrees"
            found.append({"nominal_db": nominal_db, "nominal_fmr": nominal, "fmr": rate.to_dict(), "fmr_is": verdict})
        return found

    def identification(self) -> dict[str, Any]:
        """1:N, every search compared with the whole gallery."""
        s = self._s
        nonmated = s.searched & (s.impostor >= 0)
        strongest = s.impostor_db[nonmated]
        later = int(s.later.sum())
        found: dict[str, Any] = {
            "gallery_subjects": self._size,
            "mated_searches": int(self._is_mated.sum()),
            "mated_searches_with_failures": later,
            "nonmated_searches": len(strongest),
            "nonmated": "leave one out: each probe is searched in the gallery without its own subject",
        }
        if not self._is_mated.any() or not len(strongest):
            return found | {"at_fpir": [], "at_policy": [], "cmc": None, "det": None}
        thresholds, fpir, fnir = det(np.maximum(s.mate_db[self._is_mated], -1.0), strongest)
        depth = min(CMC_DEPTH, self._size)
        ranks = s.rank[self._is_mated]
        first = self._resampling.rate(ranks == 1, self._probe_subject[self._is_mated])
        all_ranks = np.where(self._is_mated, s.rank, 0)[s.later]
        return found | {
            "at_fpir": [
                {"target": target, **self._searched_at(value)}
                for target in FPIR_TARGETS
                if (value := threshold_at(strongest, target)) is not None
            ],
            "at_policy": [
                {"outcome": "duplicate", **self._searched_at(self._duplicate_db)},
                {"outcome": "duplicate or review", **self._searched_at(self._review_db)},
            ],
            "cmc": {
                "rank": list(range(1, depth + 1)),
                "found": cmc(ranks, len(ranks), depth),
                "searches": len(ranks),
                "searches_with_failures": later,
                "rank_1": first.to_dict(),
                "rank_1_with_failures": self._resampling.rate(all_ranks == 1, self._probe_subject[s.later]).to_dict(),
            },
            "det": {"threshold_db": thresholds.tolist(), "fpir": fpir.tolist(), "fnir": fnir.tolist()},
        }

    def groups(self) -> dict[str, Any]:
        """By each further column of the source. A pair is of a group when both encounters are; a search is of its probe's group."""
        c = self._c
        columns = list(dict.fromkeys(name for one in c.encounters for name in one.groups))
        found: dict[str, Any] = {
            "threshold_db": self._verify_db,
            "search_threshold_db": self._review_db,
            "small_below_subjects": GROUP_SUBJECTS_MIN,
            "columns": {},
            "left_out": [],
        }
        for column in columns:
            named = bands_of([one.groups.get(column) for one in c.encounters])
            values = sorted(set(named), key=lambda name: (name == "not stated", _numbers_first(name)))
            if len(values) > GROUP_VALUES_MAX:
                found["left_out"].append({"column": column, "values": len(values)})
                continue
            number = {name: i for i, name in enumerate(values)}
            of = np.array([number[name] for name in named], np.int64)
            found["columns"][column] = self._groups_of(values, of)
        return found

    def worst(self) -> dict[str, Any]:
        """False matches that scored most, and mated pairs that scored least."""

        def told(at: int) -> dict[str, Any]:
            a, b = (self._c.encounters[int(side[at])] for side in (self._pairs.a, self._pairs.b))
            return {
                "encounter_a": a.encounter_id,
                "encounter_b": b.encounter_id,
                "subject_a": a.subject_id,
                "subject_b": b.subject_id,
                "score_db": float(self._pairs.score_db[at]),
            }

        order = np.lexsort((-self._pairs.llr_db, -self._pairs.score_db))
        mated = self._pairs.mated[order]
        return {
            "false_matches": [told(int(at)) for at in order[~mated][:WORST]],
            "misses": [told(int(at)) for at in order[mated][::-1][:WORST]],
        }

    def _groups_of(self, values: list[str], of: Int64) -> list[dict[str, Any]]:
        c, pairs, threshold_db, review_db = self._c, self._pairs, self._verify_db, self._review_db
        whole = self._resampling.rate(self._mated_db < threshold_db, self._mated_subject)
        whole_fmr = self._impostor_pairs.rate(self._nonmated_db >= threshold_db)
        whole_fnir = self._fnir(self._is_mated, review_db)
        same = of[pairs.a] == of[pairs.b]
        rows = []
        for number, name in [*enumerate(values), (-1, "two groups")]:
            inside = ~same if number < 0 else same & (of[pairs.a] == number)
            mated, nonmated = inside & pairs.mated, inside & ~pairs.mated
            members = len(np.unique(c.subject if number < 0 else c.subject[of == number]))
            fnmr = self._resampling.rate(pairs.score_db[mated] < threshold_db, c.subject[pairs.a[mated]])
            impostor_pairs = self._resampling.impostor_pairs(*self._subjects(nonmated))
            fmr = impostor_pairs.rate(pairs.score_db[nonmated] >= threshold_db)
            row: dict[str, Any] = {
                "group": name,
                "subjects": None if number < 0 else members,
                "encounters": None if number < 0 else int((of == number).sum()),
                "small": number >= 0 and members < GROUP_SUBJECTS_MIN,
                "fnmr": fnmr.to_dict() | {"difference": difference(fnmr, whole)},
                "fmr": fmr.to_dict() | {"difference": difference(fmr, whole_fmr)},
                "fnir": None,
                "failure_to_enrol": None,
            }
            if number >= 0:
                fnir = self._fnir(self._is_mated & (of[self._s.probe] == number), review_db)
                failed = np.array([not one.enrolled for one in c.encounters], bool)[of == number]
                row["fnir"] = fnir.to_dict() | {"difference": difference(fnir, whole_fnir)}
                row["failure_to_enrol"] = self._resampling.rate(failed, c.subject[of == number]).to_dict()
            elif not inside.any():
                continue
            rows.append(row)
        return rows

    def _subjects(self, some: Bool) -> tuple[Int64, Int64]:
        return self._c.subject[self._pairs.a[some]], self._c.subject[self._pairs.b[some]]

    def _lost_pairs(self) -> Int64:
        """The subject of each mated pair that could not be compared."""
        compared = np.bincount(self._mated_subject, minlength=int(self._c.subject.max()) + 1)
        each = np.bincount(self._c.subject)
        return np.repeat(np.arange(len(each)), each * (each - 1) // 2 - compared)

    def _at(self, threshold_db: float) -> dict[str, Any]:
        missed = self._mated_db < threshold_db
        with_failures = np.concatenate([missed, np.ones(len(self._lost), bool)])
        subject = np.concatenate([self._mated_subject, self._lost])
        return {
            "threshold_db": threshold_db,
            "fmr": self._impostor_pairs.rate(self._nonmated_db >= threshold_db).to_dict(),
            "fnmr": self._resampling.rate(missed, self._mated_subject).to_dict(),
            "fnmr_with_failures": self._resampling.rate(with_failures, subject).to_dict(),
        }

    def _fnir(self, some: Bool, threshold_db: float) -> Rate:
        return self._resampling.rate(self._s.mate_db[some] < threshold_db, self._probe_subject[some])

    def _searched_at(self, threshold_db: float) -> dict[str, Any]:
        s = self._s
        nonmated = s.searched & (s.impostor >= 0)
        missed = ~self._is_mated | (s.mate_db < threshold_db)
        return {
            "gallery_subjects": self._size,
            "threshold_db": threshold_db,
            "fpir": self._resampling.rate(
                s.impostor_db[nonmated] >= threshold_db, self._probe_subject[nonmated]
            ).to_dict(),
            "fnir": self._fnir(self._is_mated, threshold_db).to_dict(),
            "fnir_with_failures": self._resampling.rate(missed[s.later], self._probe_subject[s.later]).to_dict(),
        }

    def _histogram(self) -> dict[str, Any]:
        high = max(float(self._mated_db.max()), float(self._nonmated_db.max()))
        edges = np.arange(0.0, high + 2 * HISTOGRAM_DB, HISTOGRAM_DB)
        return {
            "edges_db": edges.tolist(),
            "mated": np.histogram(self._mated_db, edges)[0].tolist(),
            "nonmated": np.histogram(self._nonmated_db, edges)[0].tolist(),
        }


def _tables(compared: Comparisons) -> dict[str, pa.Table]:
    """The comparisons, searches and encounters that the figures were counted from."""
    encounters = compared.encounters
    names = np.array([encounter.encounter_id for encounter in encounters], object)
    subjects = np.array([encounter.subject_id for encounter in encounters], object)
    refusals = [[f"{refusal.column}: {refusal.reason}" for refusal in encounter.refusals] for encounter in encounters]
    return {
        "pairs": _pairs_table(compared.pairs, names, subjects),
        "searches": _searches_table(compared.searches, names, subjects),
        "encounters": pa.table(
            {
                "encounter": pa.array(names, pa.string()),
                "subject": pa.array(subjects, pa.string()),
                "in_gallery": compared.gallery,
                "enrolled": [encounter.enrolled for encounter in encounters],
                "columns": [list(encounter.templates) for encounter in encounters],
                "refusals": pa.array(refusals, pa.list_(pa.string())),
            }
        ),
    }


def _pairs_table(pairs: Pairs, names: Objects, subjects: Objects) -> pa.Table:
    """The layout that `calibrate` reads. position, similarity, minutiae: of pairs in which one capture a side was compared, else null."""
    columns: dict[str, Any] = {
        "encounter_a": pa.array(names[pairs.a], pa.string()),
        "encounter_b": pa.array(names[pairs.b], pa.string()),
        "subject_a": pa.array(subjects[pairs.a], pa.string()),
        "subject_b": pa.array(subjects[pairs.b], pa.string()),
        "mated": pairs.mated,
        "score_db": pairs.score_db,
        "llr_db": pairs.llr_db,
        "extrapolated": pairs.extrapolated,
    }
    positions = list(dict.fromkeys(column for column, _ in pairs.raw))
    compared = np.zeros((len(positions), len(pairs.a)), bool)
    for (column, _), values in pairs.raw.items():
        compared[positions.index(column)] |= ~np.isnan(values)
    only = compared & (compared.sum(axis=0) == 1)
    position = np.full(len(pairs.a), None, object)
    single = {kind: np.full(len(pairs.a), np.nan) for kind in ("similarity", "minutiae")}
    for column, mine in zip(positions, only, strict=True):
        position[mine] = column
        for kind, values in single.items():
            if (column, kind) in pairs.raw:
                values[mine] = pairs.raw[column, kind][mine]
    columns["position"] = pa.array(position, pa.string())
    columns |= {kind: pa.array(values, from_pandas=True) for kind, values in single.items()}  # NaN: null
    if len(positions) > 1:
        columns |= {f"{column}_{kind}": pa.array(v, from_pandas=True) for (column, kind), v in pairs.raw.items()}
    return pa.table(columns)


def _searches_table(searches: Searches, names: Objects, subjects: Objects) -> pa.Table:
    impostor = np.array([*names, None], object)[searches.impostor]
    return pa.table(
        {
            "encounter": pa.array(names[searches.probe], pa.string()),
            "subject": pa.array(subjects[searches.probe], pa.string()),
            "later": searches.later,
            "mate_enrolled": searches.enrolled,
            "searched": searches.searched,
            "mate_db": pa.array(searches.mate_db, mask=np.isinf(searches.mate_db)),
            "mate_rank": pa.array(searches.rank, mask=searches.rank == 0),
            "stranger_db": pa.array(searches.impostor_db, mask=np.isinf(searches.impostor_db)),
            "stranger_encounter": pa.array(impostor, pa.string()),
        }
    )


def _numbers_first(name: str) -> tuple[float, str]:
    """Bands of numbers in their order, names by the alphabet."""
    try:
        return float(name.split(" to ")[0]), name
    except ValueError:
        return math.inf, name
