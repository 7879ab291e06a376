"""Reads model cards: TOML files that describe a model, its source, its input and its calibration.

Owns the fields of a card, and the check of weights against their digest. Never runs a model.

Another model needs another card: `FaceConfig(model="my-model.toml")`, with the weights beside it. A card without weights describes
ready-made embeddings of a model that runs elsewhere: model_id, dimension, calibration.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from biodedup.capture.reading import open_file
from biodedup.errors import InvalidInput, ModelCardError
from biodedup.values import Float32

KINDS = ("face-embedding", "face-detector", "finger-embedding", "minutiae", "pad")


_IN_DIGEST = {
    *(
        "model_id",
        "kind",
        "sha256",
        "dimension",
        "extractor",
        "channels",
        "scale",
        "offset",
        "mirror",
        "mean",
        "quality",
    ),
    *("replay", "calibration", "both"),
}


@dataclass(frozen=True, eq=False)
class ModelCard:
    """A model. The fields are those of the card.

    weights: None for a model that is code alone, or that runs elsewhere.
    extractor: of a `minutiae` card, its name in FingerConfig.
    channels, scale, offset: the network's input is (pixel + offset) * scale, with the channels in this order, float32 NCHW.
    mirror: whether the embedding is the sum of those of the image and its mirror image. mean: subtracted from the unit embedding.
    replay: the similarity from which two embeddings count as copies of one picture, or None.
    quality: (lengths of the network's output, ascending; for each the probability that a mated comparison passes at FMR 1e-4), or None.
    limit: of a `pad` card, the minimum score of a living face. live: the class of living faces; None if the network gives a single score.
    calibration: of raw scores. both: of a finger embedding's card, model_id of minutiae -> the calibration of the sum of both llr_db.
    """

    name: str
    model_id: str
    kind: str
    licence: str
    source: str
    path: Path
    weights: Path | None = None
    sha256: str | None = None
    dimension: int | None = None
    extractor: str | None = None
    channels: Literal["rgb", "bgr"] = "rgb"
    scale: float = 1.0
    offset: float = 0.0
    mirror: bool = False
    mean: Float32 | None = field(default=None, repr=False)
    quality: tuple[Float32, Float32] | None = field(default=None, repr=False)
    replay: float | None = None
    limit: float | None = None
    live: int | None = None
    calibration: Mapping[str, Any] | None = field(default=None, repr=False)
    both: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the fields that change templates or scores: weights, input, calibration. Name, licence and source are not in it."""
        fields = {name: value for name, value in vars(self).items() if name in _IN_DIGEST}
        text = json.dumps(fields, sort_keys=True, default=_plain)
        return hashlib.sha256(text.encode()).hexdigest()

    def quality_of(self, norm: float) -> float | None:
        """The quality, 0 to 1, of a face whose network output has this length; None if the card has no table."""
        return None if self.quality is None else float(np.interp(norm, *self.quality))

    def verify(self) -> None:
        """Raises ModelCardError unless the weights have the digest in the card."""
        if self.weights is not None:
            self.verified_weights()

    def verified_weights(self) -> bytes:
        """The content of the weights, which has the digest in the card. The file is read once, so that no other file can take its place between the check
        and the use. Raises ModelCardError."""
        assert self.weights is not None, "the caller needs weights"
        try:
            with open_file(self.weights) as file:
                content = file.read()
        except OSError as error:
            raise ModelCardError(
                f"{self.path.name}: weights {self.weights.name} cannot be read ({error.strerror}); put them beside the card"
            ) from None
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise ModelCardError(
                f"{self.path.name}: weights have sha256 {digest}, the card states {self.sha256}; fetch the right file"
            )
        return content


def models_folder() -> Path:
    """The folder of the shipped cards: inside the installed package, or beside it in a source tree."""
    installed = Path(str(files("biodedup"))) / "models"
    return installed if installed.is_dir() else installed.parent.parent / "models"


def shipped_cards() -> list[ModelCard]:
    """All cards in the package, by name."""
    return [_read(path) for path in sorted(models_folder().glob("*.toml"))]


def load_card(name: str, folder: Path | None = None) -> ModelCard:
    """The card with this name or path. folder: of the named cards; None: the shipped cards. Raises ModelCardError."""
    path = Path(name) if name.endswith(".toml") else (folder or models_folder()) / f"{name}.toml"
    return _read(path.absolute())


def minutiae_card(extractor: str, name: str | None = None) -> ModelCard:
    """The card of a minutiae extractor. name: the card's name or path; None: the shipped card. Raises ModelCardError, and InvalidInput for an
    unknown extractor."""
    cards = {card.extractor: card for card in shipped_cards() if card.kind == "minutiae"}
    if extractor not in cards:
        raise InvalidInput(
            f"minutiae extractor {extractor!r} is not known; use one of {', '.join(sorted(map(str, cards)))}"
        )
    card = cards[extractor] if name is None else load_card(name)
    if card.extractor != extractor:
        raise ModelCardError(
            f"{card.path.name} is of the extractor {card.extractor!r}, the config names {extractor!r}; set `minutiae` to the card's extractor"
        )
    return card


def joint_id(embedding: ModelCard, minutiae: ModelCard) -> str:
    """The model_id of templates that hold an embedding and minutiae."""
    return f"{embedding.model_id}+{minutiae.model_id}"


@cache
def _read(path: Path) -> ModelCard:
    try:
        with open_file(path) as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ModelCardError(
            f"model card {path.name} cannot be read ({error.strerror}); name a card that exists"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ModelCardError(f"model card {path.name} is not TOML ({error}); see models/sface.toml") from error
    try:
        weights, given = table.get("weights"), table.get("input", {})
        if weights is None and table.keys() & {"model_id", "calibration"} == {"model_id", "calibration"}:
            elsewhere = {"name": table["model_id"], "kind": "face-embedding", "licence": "", "source": ""}
            table = elsewhere | table
        mean = table.get("measured", {}).get("mean")
        card = ModelCard(
            **{key: str(table[key]) for key in ("name", "model_id", "kind", "licence", "source")},
            path=path,
            weights=None if weights is None else path.parent / weights["file"],
            sha256=None if weights is None else str(weights["sha256"]),
            dimension=table.get("dimension"),
            extractor=table.get("extractor"),
            channels=given.get("channels", "rgb"),
            scale=float(given.get("scale", 1.0)),
            offset=float(given.get("offset", 0.0)),
            mirror=bool(given.get("mirror", False)),
            mean=None if mean is None else np.array(mean, np.float32),
            quality=_quality(table.get("quality")),
            replay=None if "replay" not in table else float(table["replay"]["similarity"]),
            limit=None if "pad" not in table else float(table["pad"]["limit"]),
            live=None if table.get("pad", {}).get("live") is None else int(table["pad"]["live"]),
            calibration=table.get("calibration"),
            both=table.get("both", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelCardError(f"model card {path.name} lacks or mistypes {error}; see models/sface.toml") from error
    _check(card)
    return card


def _plain(value: object) -> object:
    """A value for JSON: arrays as lists, dates as text."""
    return value.tolist() if isinstance(value, np.ndarray) else str(value)


def _quality(table: Mapping[str, Any] | None) -> tuple[Float32, Float32] | None:
    if table is None:
        return None
    norms, shares = (np.array(table[name], np.float32) for name in ("norm", "probability"))
    if norms.shape != shares.shape or norms.ndim != 1 or len(norms) < 2 or not (np.diff(norms) > 0).all():
        raise ValueError("quality: norm and probability are lists of one length, norm ascending")
    if (np.diff(shares) < 0).any() or shares[0] < 0 or shares[-1] > 1:
        raise ValueError("quality: probability ascends from 0 to 1")
    return norms, shares


def _check(card: ModelCard) -> None:
    if card.kind not in KINDS:
        raise ModelCardError(f"model card {card.path.name}: kind is {card.kind!r}, wanted one of {', '.join(KINDS)}")
    if card.channels not in ("rgb", "bgr"):
        raise ModelCardError(f"model card {card.path.name}: channels is {card.channels!r}, wanted rgb or bgr")
    if card.kind.endswith("-embedding") and (card.dimension is None and card.weights is not None):
        raise ModelCardError(f"model card {card.path.name}: a network needs its dimension; see models/sface.toml")
    if card.kind.endswith("-embedding") and card.weights is None and card.calibration is None:
        raise ModelCardError(
            f"model card {card.path.name} has neither weights nor a calibration; add one: `biodedup calibrate` writes calibrations"
        )
    if card.kind == "face-detector" and card.weights is None:
        raise ModelCardError(f"model card {card.path.name}: a detector needs weights; see models/yunet.toml")
    if card.kind == "pad" and (card.weights is None or card.limit is None or not np.isfinite(card.limit)):
        raise ModelCardError(
            f"model card {card.path.name}: a pad card needs weights, and a number as limit in the table pad"
        )
    if card.mean is not None and card.mean.shape != (card.dimension,):
        raise ModelCardError(
            f"model card {card.path.name}: mean has {card.mean.size} numbers, dimension is {card.dimension}"
        )
