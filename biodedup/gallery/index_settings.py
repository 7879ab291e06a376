"""Which index engine each column of a gallery asks for, and the FAISS codecs that it has.

Owns the form of these settings in the database. Never trains and never builds an index.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from biodedup.errors import GalleryDamaged, InvalidInput
from biodedup.gallery.files.encryption.turning import Turn, turn_id_of
from biodedup.gallery.files.filesystem import ODD_CONTENT
from biodedup.gallery.files.index_codec import FaissCodec
from biodedup.index_spec import IndexSpec, parse_specs, spec_of


@dataclass(frozen=True)
class IndexSettings:
    """specs: column -> its engine, `*` for all others; forced: a codec is used even where it misses more than the miss risk; codecs:
    column -> the codecs that it has, of its present engine and of earlier ones, of which some segments may still have indexes; turn_id: of the
    transform that embeddings are stored with from now on."""

    specs: Mapping[str, IndexSpec] = field(default_factory=dict)
    forced: bool = False
    codecs: Mapping[str, tuple[FaissCodec, ...]] = field(default_factory=dict, repr=False)
    turn_id: str = ""

    def spec(self, column: str) -> IndexSpec:
        """The engine that a column asks for."""
        return spec_of(self.specs, column)

    def wanted(self, column: str) -> FaissCodec | None:
        """The codec of the engine that a column asks for; None before it is trained, and for the native engine."""
        wanted = self.spec(column), self.turn_id
        return next((c for c in self.codecs.get(column, ()) if (c.spec, turn_id_of(c.turn)) == wanted), None)

    def wanted_codecs(self) -> dict[str, FaissCodec]:
        """Those of all columns."""
        wanted = {column: self.wanted(column) for column in self.codecs}
        return {column: codec for column, codec in wanted.items() if codec is not None}

    def codec(self, column: str, codec_id: str) -> FaissCodec | None:
        """A codec that a column has."""
        return next((codec for codec in self.codecs.get(column, ()) if codec.codec_id == codec_id), None)

    def to_json(self) -> str:
        """The engines, without the codecs."""
        return json.dumps({"specs": {column: str(spec) for column, spec in self.specs.items()}, "forced": self.forced})


def read_settings(
    text: str | None,
    codecs: Iterable[tuple[str, str, str, bytes]],
    turns: Callable[[str], Turn] | None = None,
    turn_id: str = "",
) -> IndexSettings:
    """text: as `to_json` made it, or None; codecs: (column, engine, card, trained) each; turns: the transform of an id. Raises
    GalleryDamaged."""
    by_column: dict[str, tuple[FaissCodec, ...]] = {}
    try:
        stored: Any = json.loads(text) if text is not None else {"specs": {}, "forced": False}
        for column, spec, card, trained in codecs:
            table = json.loads(card)
            turn = turns(table["turn"]).of(column) if turns is not None and table.get("turn") else None
            codec = FaissCodec.from_card(spec, table, trained, turn)
            by_column[column] = (*by_column.get(column, ()), codec)
        return IndexSettings(parse_specs(stored["specs"]), bool(stored["forced"]), by_column, turn_id)
    except (InvalidInput, *ODD_CONTENT) as error:
        raise GalleryDamaged("what the database says of the index engines; run `biodedup doctor`") from (
            None if isinstance(error, MemoryError) else error
        )


def asked_in(config: str) -> IndexSettings:
    """Those that the settings of a new gallery ask for (JSON)."""
    index = json.loads(config).get("gallery", {}).get("index")
    return IndexSettings({} if index is None else parse_specs(index))
