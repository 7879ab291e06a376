"""Everything that an engine says of a gallery, as values that can be compared."""

from __future__ import annotations

import numpy as np

import biodedup as bd


def template(stored: bd.Template) -> tuple:
    vector = None if stored.embedding is None else stored.embedding.tobytes()
    return stored.column, stored.model_id, vector, stored.minutiae, stored.quality


def templates(stored) -> dict:
    return {column: template(held) for column, held in stored.items()}


def case(stored: bd.Case) -> dict:
    return vars(stored) | {"templates": templates(stored.templates)}


def said(engine: bd.Engine, encounter_ids=()) -> dict:
    """encounter_ids: those of which the decisions are asked."""
    info = engine.info()
    for derived in ("removed_not_erased", "segments"):  # how the gallery is stored
        del info[derived]
    ids = engine.subject_ids()
    decisions = {name: engine.decision(name) for name in encounter_ids}
    reviewed = [name for name, stored in decisions.items() if stored is not None and is_case(engine, name)]
    return {
        "info": info,
        "subjects": ids,
        "rows": engine.rows_of(ids).tolist(),
        "encounters": {
            name: [(e.row, e.encounter_id, e.groups, templates(e.templates)) for e in engine.encounters(name)]
            for name in ids
        },
        "best": {name: templates(engine.templates(name)) for name in ids},
        "decisions": decisions,
        "cases": {name: case(engine.case(name)) for name in reviewed},
        "open": [stored.encounter_id for stored in engine.cases()],
        "verdicts": engine.verdicts(),
        "policies": engine.policies(),
        "problems": engine.problems(),
    }


def is_case(engine: bd.Engine, encounter_id: str) -> bool:
    try:
        engine.case(encounter_id)
    except bd.InvalidInput:
        return False
    return True


def found_by(engine: bd.Engine, probes: np.ndarray) -> list:
    """What searches of these faces answer."""
    return [engine.identify(bd.Encounter(templates={"face": probe})) for probe in probes]
