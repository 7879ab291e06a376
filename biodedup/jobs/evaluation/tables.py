"""Makes the tables of an evaluation: pairs, searches and encounters. Every figure of the evaluation can be recomputed from them.

Owns the columns, which `docs/reference/schemas.md` describes. Never writes a file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from biodedup.jobs.evaluation.comparisons import Comparisons, Pairs, Searches

Objects = NDArray[np.object_]


def tables_of(compared: Comparisons) -> dict[str, pa.Table]:
    """name of the table -> table: `pairs`, `searches`, `encounters`."""
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
    """The pairs, in the layout that `calibrate` reads. position, similarity and minutiae are null if several captures of a pair were compared."""
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
    for column, of_column in zip(positions, only, strict=True):
        position[of_column] = column
        for kind, values in single.items():
            if (column, kind) in pairs.raw:
                values[of_column] = pairs.raw[column, kind][of_column]
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
