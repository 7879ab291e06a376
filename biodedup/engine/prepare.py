"""Turns an encounter into a probe: the templates to search with, and the refusals of unusable captures.

Owns the checks of captures, templates and bare embeddings before a search or a commit. Never searches and never stores.

1. A gallery column holds templates of one model. A template of another model raises ModelMismatch. Bare vectors need a model_id if the
   column has no model yet.
2. If an encounter has two captures of one column, the capture of higher quality is kept. The other capture is refused as `superseded`.
3. An error in one encounter never stops a batch. The error becomes the result of that encounter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biodedup.capture.minutiae.batch import standard_records
from biodedup.capture.reading import absent, held
from biodedup.config import EXTERNAL_MINUTIAE, CaptureConfig, Config, Policy
from biodedup.embed.cards import ModelCard, joint_id, shipped_cards
from biodedup.embed.extractor import Extractor
from biodedup.errors import CallerError, CaptureUnavailable, InvalidInput, ModelMismatch
from biodedup.gallery.catalogue.sqlite import ColumnModel
from biodedup.gallery.files.packed import from_whole, pack, to_arrays
from biodedup.gallery.gallery import Gallery
from biodedup.gallery.segments.new_cells import NewCells, records_alone, vectors_alone
from biodedup.gallery.transaction import mismatch
from biodedup.match.scores.calibrations import EXTERNAL, Calibrations
from biodedup.required import keep_better
from biodedup.values import (
    COLUMNS,
    FINGER_POSITIONS,
    LIVE,
    Capture,
    Encounter,
    Face,
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
    """An encounter with templates instead of images. refusals: of the declined captures."""

    encounter: Encounter
    templates: Mapping[str, Template]
    refusals: tuple[Refusal, ...] = ()

    @property
    def subject_id(self) -> str:
        """The encounter's subject_id. Call `require_subject` first."""
        assert self.encounter.subject_id is not None, "call require_subject first"
        return self.encounter.subject_id

    @property
    def missing(self) -> tuple[Missing, ...]:
        return tuple(capture for capture in self.encounter.captures if isinstance(capture, Missing))


@dataclass(frozen=True, eq=False)
class Preparer:
    """Prepares the probes of one gallery, and the columns of templates to load into the gallery. Thread-safe."""

    gallery: Gallery
    extractor: Extractor
    calibrations: Calibrations
    config: Config
    policy: Callable[[], Policy]
    clock: Callable[[], float]
    """Returns the time in seconds since 1970. Verdicts of capture devices expire."""

    @cached_property
    def _cards(self) -> tuple[ModelCard, ...]:
        """The shipped cards and the configured cards, read once."""
        return (*shipped_cards(), *self.extractor.cards)

    @cached_property
    def _makes(self) -> dict[str, int | None]:
        """The result of `_dimensions` for all cards."""
        return _dimensions(self._cards)

    def probe(self, encounter: Encounter) -> Probe:
        """Returns the probe of one encounter. Raises CallerError."""
        (probe,) = self.probes([encounter])
        if isinstance(probe, CallerError):
            raise probe
        return probe

    def probes(self, encounters: Sequence[Encounter]) -> list[Probe | CallerError]:
        """Returns the probe of each encounter, or its error. The captures of all encounters are extracted together."""
        captures = [c for encounter in encounters for c in encounter.captures if not isinstance(c, Missing)]
        results: list[Template | Refusal | CallerError] = []
        try:
            results.extend(self.extractor.extract(captures))
        except CallerError:
            for capture in captures:  # one by one, to find the capture that raises
                try:
                    results.extend(self.extractor.extract([capture]))
                except CallerError as error:
                    results.append(error)
        extracted = iter(results)
        return [self._probe(encounter, extracted) for encounter in encounters]

    def _probe(
        self, encounter: Encounter, extracted: Iterator[Template | Refusal | CallerError]
    ) -> Probe | CallerError:
        results = [
            self._in_time(capture, next(extracted))
            for capture in encounter.captures
            if not isinstance(capture, Missing)
        ]
        templates: dict[str, Template] = {}
        refusals = []
        try:
            for column, given in encounter.templates.items():
                if column == "face" and self.policy().require_liveness:
                    refusals.append(Refusal("face", "liveness_unproved", "a ready-made template"))
                    continue
                templates[column] = self._given(column, given, model_of(column, encounter.model_id))
            for result in results:
                if isinstance(result, CallerError):
                    return result
                if isinstance(result, Template) and (unproved := self._unproved(result)) is not None:
                    result = unproved
                if isinstance(result, Refusal):
                    refusals.append(result)
                    continue
                if (worse := keep_better(templates, result)) is not None:
                    refusals.append(worse)
        except CallerError as error:
            return error
        missing = tuple(capture for capture in encounter.captures if isinstance(capture, Missing))
        return Probe(replace(encounter, captures=missing), templates, (*encounter.declined, *refusals))

    def _in_time(self, capture: Capture, result: Template | Refusal | CallerError) -> Template | Refusal | CallerError:
        """Returns the result, or the refusal of a face if the verdict of its capture device has expired."""
        verdict = capture.device if isinstance(capture, Face) else None
        if verdict is None or verdict.valid_until is None or not isinstance(result, Template):
            return result
        if self.clock() < verdict.valid_until:
            return result
        return Refusal("face", "untrusted_device", "the verdict has ended")

    def _unproved(self, template: Template) -> Refusal | None:
        """Returns the refusal of a face that lacks the proof of liveness that the policy requires, else None."""
        wanted = self.policy().require_liveness
        if template.column != "face" or not wanted:
            return None
        proofs = [text.removeprefix(LIVE) for text in template.provenance if text.startswith(LIVE)]
        by_device = any(proof.startswith("device ") for proof in proofs)
        by_network = len(proofs) > by_device
        proved = {"device": by_device, "pad": by_network, "either": by_device or by_network}[wanted]
        return None if proved else Refusal("face", "liveness_unproved", f"the policy wants a proof by: {wanted}")

    def _given(self, column: str, given: Float32 | bytes | Template, model_id: str | None) -> Template:
        if isinstance(given, bytes):
            given = Template(column, self.config.finger.record_model_id, minutiae=given)
        if isinstance(given, Template):
            if given.column != column:
                raise InvalidInput(
                    f"the template under {column!r} is one of {given.column!r}; file it under its column"
                )
            check_id(given.model_id, "model_id")
            self._check_modality(column, given.model_id)
            if given.embedding is not None:
                self._check_dimension(given.model_id, len(given.embedding))
            return self.calibrations.sound(given)
        model, rows = self.embeddings(column, np.asarray(given)[None], model_id)
        return Template(column, model, rows[0])

    def column(self, column: str, cells: NDArray[Any] | Sequence[bytes | None], given: str | None) -> NewCells:
        """Checks a column of bare embeddings or minutiae records. given: the embeddings' model_id. Raises InvalidInput, ModelMismatch."""
        if isinstance(cells, (str, bytes)) or not hasattr(cells, "__len__") or not hasattr(cells, "__iter__"):
            raise InvalidInput(
                f"column {column} is {type(cells).__name__}, wanted vectors (n, d) or n minutiae records; write {{column: vectors}}"
            )
        if isinstance(cells, np.ndarray) or not all(cell is None or isinstance(cell, bytes) for cell in cells):
            return vectors_alone(*self.embeddings(column, np.asarray(cells), given))
        if column not in FINGER_POSITIONS:
            raise InvalidInput(f"column {column!r} cannot hold minutiae; use a finger position")
        model_id = self.config.finger.record_model_id
        if any(cells):
            self.calibrations.require_minutiae(model_id)
        offsets, data, bad = standard_records(*to_arrays(pack([cell or b"" for cell in cells])), column)
        if bad.any():
            self.calibrations.sound(
                Template(column, model_id, minutiae=cells[int(np.argmax(bad))])
            )  # raises InvalidInput with the fault
        return records_alone(model_id, from_whole(offsets, data))

    def modelled(self, column: str, cells: NewCells, given: str | None) -> NewCells:
        """Returns checked templates with a model_id. given: the caller's model_id of the vectors. Raises InvalidInput, ModelMismatch."""
        check_column(column)
        stated = cells.model_id or None
        if cells.dimension is None:
            model_id = stated or self.config.finger.record_model_id
            self._check_modality(column, model_id)
        else:
            if None not in (stated, given) and stated != given:
                raise ModelMismatch(
                    f"column {column} states the model {stated}, got {given}; leave model_id out, or name its model"
                )
            model_id = self.model_of_vectors(column, cells.dimension, stated or given)
        if cells.has_minutiae:
            self.calibrations.require_minutiae(model_id)
        return replace(cells, model_id=model_id)

    def embeddings(self, column: str, vectors: NDArray[Any], given: str | None) -> tuple[str, Float32]:
        """Returns (model_id, float32 (n, d) unit rows) for bare embeddings. Raises InvalidInput, ModelMismatch."""
        check_column(column)
        rows = unit_rows(vectors, what=f"the {column} vectors")
        return self.model_of_vectors(column, rows.shape[1], given), rows

    def model_of_vectors(self, column: str, dimension: int, given: str | None) -> str:
        """Returns the model_id of bare embeddings: the column's model_id, or else the given model_id.

        Raises ModelMismatch if the two differ. Raises InvalidInput if both are absent.
        """
        known = self.gallery.snapshot().models.get(column)
        if known is not None:
            if known.dimension != dimension or given not in (None, known.model_id):
                raise mismatch(column, known, ColumnModel(given or "given vectors", dimension))
            return known.model_id
        model_id = given or self._unnamed(column, dimension)
        self._check_modality(column, model_id)
        self._check_dimension(model_id, dimension)
        return model_id

    def probes_of(self, column: str, vectors: NDArray[Any], given: str | None) -> Float32:
        """Returns the probes of a search of one column: float32 (q, d), unit rows. An empty column accepts vectors of any model."""
        known = column in self.gallery.snapshot().models
        return self.embeddings(column, vectors, given or (None if known else "any"))[1]

    def _check_modality(self, column: str, model_id: str) -> None:
        """Raises ModelMismatch for a finger model in the face column, or a face model in a finger column. Its scores have no meaning."""
        cards = self._cards
        faces = {card.model_id for card in cards if card.kind == "face-embedding"}
        networks = {card.model_id for card in cards if card.weights is not None}  # without weights, kind may be absent
        if column != "face" and model_id in faces & networks:
            raise ModelMismatch(f"{model_id} is a model of faces, the column is {column}; name the model that made it")
        if column == "face" and (model_id == EXTERNAL_MINUTIAE or model_id in self._makes.keys() - faces):
            raise ModelMismatch(f"{model_id} is a model of fingers, the column is face; name the model that made it")

    def _check_dimension(self, model_id: str, dimension: int) -> None:
        """Raises ModelMismatch if the model's card states another dimension."""
        known = self._makes
        if known.get(model_id, dimension) not in (dimension, None):
            makes = f"{known[model_id]} numbers" if known[model_id] else "no embeddings"
            raise ModelMismatch(f"{model_id} makes {makes}, got {dimension}; name the model that made the vectors")

    def _unnamed(self, column: str, dimension: int) -> str:
        """Raises InvalidInput for vectors without a model_id. The model is never guessed."""
        configured = self.extractor.model_ids["face" if column == "face" else "finger"]
        likely = configured if _dimensions(self.extractor.cards).get(configured) == dimension else "my-model-1"
        raise InvalidInput(
            f"the {column} vectors have no model_id, and the gallery has no {column} templates yet that would tell it; pass their "
            f"model_id, as model_id={likely!r}, or on the command line --model-id {likely}"
        )


def _dimensions(cards: Sequence[ModelCard]) -> dict[str, int | None]:
    """Returns model_id -> dimension of its embeddings; 0 for a model that only makes minutiae, None if the card states no dimension."""
    found: dict[str, int | None] = {EXTERNAL_MINUTIAE: 0}
    found |= {card.model_id: 0 if card.kind == "minutiae" else card.dimension for card in cards}
    for card in cards:
        for minutiae in cards:
            if card.kind == "finger-embedding" and minutiae.kind == "minutiae":
                found[joint_id(card, minutiae)] = card.dimension
    return found


def in_memory(encounter: Encounter, limits: CaptureConfig) -> Encounter:
    """Reads the files of an encounter, and returns the encounter with their content instead of paths. The digest and the templates are then
    made from the same bytes.

    Raises CaptureUnavailable for a file that may become readable later. The caller then records nothing, because a record is permanent.
    """
    captures = held(encounter.captures, limits)
    unread = absent(captures)
    if unread is not None:
        raise CaptureUnavailable(
            f"{unread.path} cannot be read ({unread.refusal.detail}); nothing was recorded: supply the file, and send the encounter again",
            unread.refusal.reason,
        )
    return replace(encounter, captures=captures)


def require_subject(encounter: Encounter) -> None:
    """Raises InvalidInput for an encounter without a subject_id."""
    if encounter.subject_id is None:
        raise InvalidInput("the encounter has no subject_id; enrolment needs one, identify does not")


def check_column(column: str) -> None:
    """Raises InvalidInput for an unknown column."""
    if column not in _COLUMN_SET:
        raise InvalidInput(f"column {column!r} is not known; use face or a finger position")


def check_models(templates: Mapping[str, Template], models: Mapping[str, ColumnModel]) -> None:
    """Raises ModelMismatch if a template's model differs from the model of its column. models: column -> model of the gallery."""
    for column, template in templates.items():
        known = models.get(column)
        got = ColumnModel(template.model_id, None if template.embedding is None else len(template.embedding))
        if known is not None and known != got:
            raise mismatch(column, known, got)


def refuse_other_models(gallery: Gallery, extractor: Extractor) -> None:
    """Raises ModelMismatch if a column holds templates that were extracted with another configuration.

    Ready-made templates may be of a model without a card. Their column fits every configuration.
    """
    cards = (*shipped_cards(), *extractor.cards)
    made = {card.model_id for card in cards if card.kind in ("face-embedding", "minutiae")}
    made |= _dimensions(cards).keys() - {card.model_id for card in cards}
    for column, known in gallery.snapshot().models.items():
        configured = extractor.model_ids["face" if column == "face" else "finger"]
        if known.model_id != configured and known.model_id in made and not known.model_id.startswith(EXTERNAL):
            raise ModelMismatch(
                f"{gallery.name}: column {column} holds templates of {known.model_id}, the config names {configured}; "
                "open it with the config that made it, or enrol anew into another folder"
            )


_COLUMN_SET = frozenset(COLUMNS)
