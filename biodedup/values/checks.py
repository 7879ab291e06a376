"""Checks of ids, texts, groups and vectors that come from a caller.

Owns the rules and the texts of their errors. Never repairs an id or a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from biodedup.errors import InvalidInput
from biodedup.texts import KnownId, id_problem, text_problem
from biodedup.values.columns import COLUMNS, check_position

Float32: TypeAlias = NDArray[np.float32]

RESERVED_PREFIXES = ("batch:", "load:", "merge:", "stage:")
"""Prefixes of the encounter_ids that the library makes: for records without an id, for batches of templates, for the steps of a merge."""

REASON_LENGTH_MAX, NOTE_LENGTH_MAX = 1_000, 4_000
CAPTURES_MAX, GROUPS_MAX = 100, 100
"""Limits of one encounter."""


def check_id(value: object, name: str) -> None:
    """Raises InvalidInput unless value is a valid id: 1 to 256 visible characters in form NFC, without spaces around them.

    An invalid id is never repaired, because the caller's register would not recognise it. A `KnownId` may be older than these rules, and
    passes.
    """
    if not isinstance(value, str):
        raise InvalidInput(f"{name} is a str, got {type(value).__name__}; convert it, as str(value)")
    if not isinstance(value, KnownId) and (problem := id_problem(value)) is not None:
        raise InvalidInput(f"{name} {problem}")


def check_encounter_id(value: object) -> None:
    """As `check_id`. Also raises InvalidInput for an id with one of the RESERVED_PREFIXES."""
    check_id(value, "encounter_id")
    if isinstance(value, str) and not isinstance(value, KnownId) and value.startswith(RESERVED_PREFIXES):
        prefix = value[: value.index(":") + 1]
        raise InvalidInput(
            f"encounter_id {value!r} begins with {prefix!r}, which is reserved for ids that the library makes; put something before it"
        )


def check_text(value: object, name: str, length_max: int) -> None:
    """Raises InvalidInput unless value is a text of at most length_max characters, without hidden characters except line ends and tabs."""
    if not isinstance(value, str):
        raise InvalidInput(f"{name} is a str, got {type(value).__name__}; convert it, as str(value)")
    if not isinstance(value, KnownId) and (problem := text_problem(value, length_max)) is not None:
        raise InvalidInput(f"{name} {problem}")


def check_model_ids(model_id: object) -> None:
    """Raises InvalidInput unless model_id is a model_id, a mapping column -> model_id, or None."""
    if isinstance(model_id, Mapping):
        for column, of_column in model_id.items():
            check_position(column, COLUMNS)
            check_id(of_column, f"the model_id of {column}")
    elif model_id is not None:
        check_id(model_id, "model_id")


def model_of(column: str, model_id: str | Mapping[str, str] | None) -> str | None:
    """The model_id that the caller states for a column's bare vectors, or None."""
    return model_id.get(column) if isinstance(model_id, Mapping) else model_id


def check_groups(groups: object) -> tuple[str, ...]:
    """The groups, sorted, without repetitions. Raises InvalidInput unless `groups` is a sequence of at most 100 valid ids."""
    if isinstance(groups, str) or not isinstance(groups, Sequence | Set):
        raise InvalidInput(f"groups is a sequence of str, got {type(groups).__name__}; write groups=[name]")
    if len(groups) > GROUPS_MAX and not all(isinstance(group, KnownId) for group in groups):
        raise InvalidInput(f"{len(groups):,} groups were named; wanted at most {GROUPS_MAX}")
    for group in groups:
        check_id(group, "a group")
    return tuple(sorted(set(groups)))


def unit_rows(vectors: NDArray[Any], *, what: str = "vectors") -> Float32:
    """vectors: (n, d) floating. Returns float32 (n, d), C-order, rows scaled to exactly unit length.

    Raises InvalidInput for another shape or dtype, for NaN or infinity, and for rows whose length differs from 1 by more than 1 %: they
    are probably raw network output.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.shape[1] == 0 or not np.issubdtype(vectors.dtype, np.floating):
        raise InvalidInput(f"{what}: shape {vectors.shape}, dtype {vectors.dtype}; wanted float32 (n, d)")
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    norms = np.linalg.norm(rows, axis=1)
    bad = np.flatnonzero(~np.isfinite(norms))
    if bad.size:
        raise InvalidInput(f"{what}: row {bad[0]} holds NaN or infinity ({bad.size} such rows); drop or repair them")
    bad = np.flatnonzero(np.abs(norms - 1) > 0.01)
    if bad.size:
        raise InvalidInput(
            f"{what}: row {bad[0]} has length {norms[bad[0]]:.4g}, wanted 1 ({bad.size} such rows); "
            "divide each row by its norm"
        )
    return np.asarray(rows / norms[:, None], np.float32)
