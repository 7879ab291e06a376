"""From an encounter to a probe: templates that can be compared with a gallery's, and the captures that were declined.

Owns what is checked of captures, templates and bare embeddings before anything is searched or stored. Never searches, never
stores.

1. A column holds templates of one model; one of another model is refused before they meet. Bare vectors do not say what made them:
   their model_id is given with them, unless the column has a model.
2. Of two captures of one column the better one is kept, and the other is declined as superseded.
3. One bad record never stops a batch: its encounter comes out as the error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.capture.reading import absent, held
from biodedup.completeness import keep_better
from biodedup.config import CaptureConfig, Config
from biodedup.embed.cards import ModelCard, joint_id, shipped_cards
from biodedup.embed.extractor import Extractor
from biodedup.errors import CallerError, CaptureUnavailable, InvalidInput, ModelMismatch
from biodedup.gallery.catalogue.sqlite import ColumnModel
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.transaction import mismatch
from biodedup.match.calibrations import EXTERNAL, Calibrations
from biodedup.values import (
    COLUMNS,
    FINGER_POSITIONS,
    Column,
    Encounter,
    Float32,
    Missing,
    Refusal,
    Template,
    check_id,
    model_of,
    unit_rows,
)


@dataclass(frozen=True)
class Probe:
    """An encounter after extraction, without its images. refusals: captures that were declined."""

    encounter: Encounter
    templates: Mapping[str, Template]
    refusals: tuple[Refusal, ...] = ()

    @property
    def subject_id(self) -> str:
        """Of an encounter that `require_subject` has seen."""
        assert self.encounter.subject_id is not None, "require_subject has seen to it"
        return self.encounter.subject_id

    @property
    def missing(self) -> tuple[Missing, ...]:
        return tuple(capture for capture in self.encounter.captures if isinstance(capture, Missing))


@dataclass(frozen=True, eq=False)
class Preparer:
    """Prepares probes for one gallery, and the columns of templates that are loaded into it. Thread-safe."""

    gallery: Gallery
    extractor: Extractor
    calibrations: Calibrations
    config: Config

    def probe(self, encounter: Encounter) -> Probe:
        """Raises InvalidInput and other mistakes of the caller."""
        (probe,) = self.probes([encounter])
        if isinstance(probe, CallerError):
            raise probe
        return probe

    def probes(self, encounters: Sequence[Encounter]) -> list[Probe | CallerError]:
        """Templates of each encounter. Captures of all of them are extracted together."""
        captures = [c for encounter in encounters for c in encounter.captures if not isinstance(c, Missing)]
        results: list[Template | Refusal | CallerError] = []
        try:
            results.extend(self.extractor.extract(captures))
        except CallerError:
            for capture in captures:  # one bad record never stops a batch: find it
                try:
                    results.extend(self.extractor.extract([capture]))
                except CallerError as error:
                    results.append(error)
        extracted = iter(results)
        return [self._probe(encounter, extracted) for encounter in encounters]

    def _probe(
        self, encounter: Encounter, extracted: Iterator[Template | Refusal | CallerError]
    ) -> Probe | CallerError:
        mine = [next(extracted) for capture in encounter.captures if not isinstance(capture, Missing)]
        templates: dict[str, Template] = {}
        refusals = []
        try:
            for column, given in encounter.templates.items():
                templates[column] = self._given(column, given, model_of(column, encounter.model_id))
            for result in mine:
                if isinstance(result, CallerError):
                    return result
                if isinstance(result, Refusal):
                    refusals.append(result)
                    continue
                if (worse := keep_better(templates, result)) is not None:
                    refusals.append(worse)
        except CallerError as error:
            return error
        missing = tuple(capture for capture in encounter.captures if isinstance(capture, Missing))
        return Probe(replace(encounter, captures=missing), templates, (*encounter.declined, *refusals))

    def _given(self, column: str, given: Float32 | bytes | Template, model_id: str | None) -> Template:
        if isinstance(given, bytes):
            given = Template(column, self.config.finger.record_model_id, minutiae=given)
        if isinstance(given, Template):
            if given.column != column:
                raise InvalidInput(
                    f"the template under {column!r} is one of {given.column!r}; file it under its column"
                )
            check_id(given.model_id, "model_id")
            if given.embedding is not None:
                self._check_dimension(given.model_id, len(given.embedding))
            return self.calibrations.sound(given)
        model, rows = self.embeddings(column, np.asarray(given)[None], model_id)
        return Template(column, model, rows[0])

    def column(
        self, column: str, cells: NDArray[Any] | Sequence[bytes | None], given: str | None
    ) -> tuple[str, Column]:
        """(model_id, unit rows) of bare embeddings, or (model_id, records as galleries store them). given: what made bare
        embeddings."""
        if isinstance(cells, np.ndarray) or not all(cell is None or isinstance(cell, bytes) for cell in cells):
            return self.embeddings(column, np.asarray(cells), given)
        if column not in FINGER_POSITIONS:
            raise InvalidInput(f"column {column!r} cannot hold minutiae; use a finger position")
        model_id = self.config.finger.record_model_id
        return model_id, [
            self.calibrations.sound(Template(column, model_id, minutiae=cell)).minutiae or b"" if cell else b""
            for cell in cells
        ]

    def embeddings(self, column: str, vectors: NDArray[Any], given: str | None) -> tuple[str, Float32]:
        """(model_id, unit rows) of bare embeddings: the column's model, or else the one that is given. Raises ModelMismatch where
        these differ, InvalidInput where there is neither."""
        check_column(column)
        rows = unit_rows(vectors, what=f"the {column} vectors")
        known = self.gallery.snapshot().models.get(column)
        if known is not None:
            if known.dimension != rows.shape[1] or given not in (None, known.model_id):
                raise mismatch(column, known, ColumnModel(given or "given vectors", rows.shape[1]))
            return known.model_id, rows
        model_id = given or self._unnamed(column, rows.shape[1])
        self._check_dimension(model_id, rows.shape[1])
        return model_id, rows

    def probes_of(self, column: str, vectors: NDArray[Any], given: str | None) -> Float32:
        """Unit rows to search a column with. An empty column takes any."""
        known = column in self.gallery.snapshot().models
        return self.embeddings(column, vectors, given or (None if known else "any"))[1]

    def _check_dimension(self, model_id: str, dimension: int) -> None:
        """Raises ModelMismatch where a card says that the model makes something else."""
        known = _dimensions((*shipped_cards(), *self.extractor.cards))
        if known.get(model_id, dimension) not in (dimension, None):
            makes = f"{known[model_id]} numbers" if known[model_id] else "no embeddings"
            raise ModelMismatch(f"{model_id} makes {makes}, got {dimension}; name the model that made the vectors")

    def _unnamed(self, column: str, dimension: int) -> str:
        """The model of vectors of which nobody says it: it is never guessed."""
        mine = self.extractor.model_ids["face" if column == "face" else "finger"]
        likely = mine if _dimensions(self.extractor.cards).get(mine) == dimension else "my-model-1"
        raise InvalidInput(
            f"the {column} vectors do not say what made them, and the gallery has none there yet; pass their model_id, as "
            f"model_id={likely!r}"
        )


def _dimensions(cards: Sequence[ModelCard]) -> dict[str, int | None]:
    """model_id -> how many numbers an embedding has; 0 for a model that makes none, None where the card does not say."""
    found = {card.model_id: 0 if card.kind == "minutiae" else card.dimension for card in cards}
    for card in cards:
        for minutiae in cards:
            if card.kind == "finger-embedding" and minutiae.kind == "minutiae":
                found[joint_id(card, minutiae)] = card.dimension
    return found


def in_memory(encounter: Encounter, limits: CaptureConfig) -> Encounter:
    """The encounter with its files' bytes in place of paths, so that its digest and its templates are of the same bytes.

    Raises CaptureUnavailable for a file that may come later: to record the encounter without it would refuse it for ever.
    """
    captures = held(encounter.captures, limits)
    late = absent(captures)
    if late is not None:
        raise CaptureUnavailable(
            f"{late.path} cannot be read ({late.refusal.detail}); nothing was recorded: supply the file, and send the encounter again",
            late.refusal.reason,
        )
    return replace(encounter, captures=captures)


def require_subject(encounter: Encounter) -> None:
    if encounter.subject_id is None:
        raise InvalidInput("the encounter has no subject_id; enrolment needs one, identify does not")


def check_column(column: str) -> None:
    if column not in _COLUMN_SET:
        raise InvalidInput(f"column {column!r} is not known; use face or a finger position")


def check_models(templates: Mapping[str, Template], models: Mapping[str, ColumnModel]) -> None:
    """models: of the gallery's columns. Raises ModelMismatch."""
    for column, template in templates.items():
        known = models.get(column)
        got = ColumnModel(template.model_id, None if template.embedding is None else len(template.embedding))
        if known is not None and known != got:
            raise mismatch(column, known, got)


def refuse_other_models(gallery: Gallery, extractor: Extractor) -> None:
    """Raises ModelMismatch where a column holds templates that another configuration makes of captures. Templates that came ready,
    of a model that no shipped card makes, tie a gallery to no configuration."""
    cards = (*shipped_cards(), *extractor.cards)
    made = {card.model_id for card in cards if card.kind in ("face-embedding", "minutiae")}
    made |= _dimensions(cards).keys() - {card.model_id for card in cards}
    for column, known in gallery.snapshot().models.items():
        mine = extractor.model_ids["face" if column == "face" else "finger"]
        if known.model_id != mine and known.model_id in made and not known.model_id.startswith(EXTERNAL):
            raise ModelMismatch(
                f"{gallery.folder}: column {column} holds templates of {known.model_id}, the config names {mine}; "
                "open it with the config that made it, or enrol anew into another folder"
            )


_COLUMN_SET = frozenset(COLUMNS)
