"""Parses the text that names a column's index engine: `native`, or `faiss:` and a factory string of FAISS.

Owns the grammar of this text. Never loads FAISS: FAISS itself checks the factory string when an index is trained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from biodedup.errors import InvalidInput
from biodedup.values import COLUMNS

NATIVE = "native"
EVERY_COLUMN = "*"
"""Key for all columns that are not named."""
_FAISS, _NPROBE = "faiss:", ",nprobe="
_FACTORY = re.compile(r"[A-Za-z0-9_,()\[\]+.]{1,200}")


@dataclass(frozen=True)
class IndexSpec:
    """The index engine of a column.

    factory: FAISS's factory string, as in `faiss.index_factory`, or "" for the native engine. nprobe: how many inverted lists a search
    reads; None reads all.
    """

    factory: str = ""
    nprobe: int | None = None

    @classmethod
    def parse(cls, text: object, name: str = "index") -> IndexSpec:
        """Raises InvalidInput for any other text."""
        if text == NATIVE:
            return cls()
        if isinstance(text, str) and text.startswith(_FAISS):
            factory, has_nprobe, number = text.removeprefix(_FAISS).partition(_NPROBE)
            is_valid = number.isascii() and number.isdigit() and 0 < int(number) < 1 << 31 if has_nprobe else True
            if _FACTORY.fullmatch(factory) and is_valid:
                return cls(factory, int(number) if has_nprobe else None)
        raise InvalidInput(
            f"{name} is {text!r:.200}, wanted `native` or `faiss:FACTORY`, such as faiss:IVF2048,PQ64x4fs; add ,nprobe=N to read "
            "only N inverted lists a search"
        )

    @property
    def is_native(self) -> bool:
        return not self.factory

    def __str__(self) -> str:
        if self.is_native:
            return NATIVE
        return f"{_FAISS}{self.factory}" + ("" if self.nprobe is None else f"{_NPROBE}{self.nprobe}")


def parse_specs(given: str | Mapping[str, str]) -> dict[str, IndexSpec]:
    """Column -> its engine; the key `*` stands for all columns that are not named. given: one text for all columns, or column -> text.
    Raises InvalidInput."""
    if not isinstance(given, Mapping):
        return {EVERY_COLUMN: IndexSpec.parse(given)}
    if unknown := [name for name in given if name not in (*COLUMNS, EVERY_COLUMN)]:
        raise InvalidInput(
            f"index names column {unknown[0]!r}; columns are {', '.join(COLUMNS)}, or {EVERY_COLUMN} for all others"
        )
    return {column: IndexSpec.parse(text, f"index of {column}") for column, text in given.items()}


def spec_of(specs: Mapping[str, IndexSpec], column: str) -> IndexSpec:
    """The engine of a column; the native engine if the specs do not cover it."""
    return specs.get(column, specs.get(EVERY_COLUMN, IndexSpec()))
