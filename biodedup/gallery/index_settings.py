"""The index settings of a gallery: the configured index engine of each column, and the trained FAISS codecs.

Owns the form of these settings in the database. Never trains a codec and never builds an index.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from biodedup.errors import GalleryDamaged, InvalidInput
from biodedup.gallery.files.encryption.transform import Transform, transform_id_of
from biodedup.gallery.files.filesystem import MALFORMED
from biodedup.gallery.files.index_codec import FaissCodec
from biodedup.index_spec import IndexSpec, parse_specs, spec_of


@dataclass(frozen=True)
class IndexSettings:
    """specs: column -> its engine, `*` for all other columns; forced: use a codec even if it misses more than the miss risk; codecs: column
    -> its codecs, of the present engine and of earlier engines whose indexes some segments may still have; transform_id: the transform of
    new embeddings."""

    specs: Mapping[str, IndexSpec] = field(default_factory=dict)
    forced: bool = False
    codecs: Mapping[str, tuple[FaissCodec, ...]] = field(default_factory=dict, repr=False)
    transform_id: str = ""

    def spec(self, column: str) -> IndexSpec:
        """The configured engine of a column."""
        return spec_of(self.specs, column)

    def wanted(self, column: str) -> FaissCodec | None:
        """The codec of a column's configured engine; None before it is trained, and for the native engine."""
        wanted = self.spec(column), self.transform_id
        return next((c for c in self.codecs.get(column, ()) if (c.spec, transform_id_of(c.transform)) == wanted), None)

    def wanted_codecs(self) -> dict[str, FaissCodec]:
        """column -> its wanted codec, for the columns that have one."""
        wanted = {column: self.wanted(column) for column in self.codecs}
        return {column: codec for column, codec in wanted.items() if codec is not None}

    def codec(self, column: str, codec_id: str) -> FaissCodec | None:
        """A codec of a column by its id, or None."""
        return next((codec for codec in self.codecs.get(column, ()) if codec.codec_id == codec_id), None)

    def to_json(self) -> str:
        """The engines as JSON, without the codecs."""
        return json.dumps({"specs": {column: str(spec) for column, spec in self.specs.items()}, "forced": self.forced})


def read_settings(
    text: str | None,
    codecs: Iterable[tuple[str, str, str, bytes]],
    transforms: Callable[[str], Transform] | None = None,
    transform_id: str = "",
) -> IndexSettings:
    """The settings from their stored form. text: from `to_json`, or None; codecs: (column, engine, card, trained) each; transforms: id ->
    the secret transform. Raises GalleryDamaged."""
    by_column: dict[str, tuple[FaissCodec, ...]] = {}
    try:
        stored: Any = json.loads(text) if text is not None else {"specs": {}, "forced": False}
        for column, spec, card, trained in codecs:
            table = json.loads(card)
            transform = transforms(table["turn"]).of(column) if transforms is not None and table.get("turn") else None
            codec = FaissCodec.from_card(spec, table, trained, transform)
            by_column[column] = (*by_column.get(column, ()), codec)
        return IndexSettings(parse_specs(stored["specs"]), bool(stored["forced"]), by_column, transform_id)
    except (InvalidInput, *MALFORMED) as error:
        raise GalleryDamaged("the index settings in the database are damaged; run `biodedup doctor`") from (
            None if isinstance(error, MemoryError) else error
        )


def asked_in(config: str) -> IndexSettings:
    """The index settings in the configuration of a new gallery (JSON)."""
    index = json.loads(config).get("gallery", {}).get("index")
    return IndexSettings({} if index is None else parse_specs(index))
