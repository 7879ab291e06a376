"""Converts between frozen dataclasses and tables of TOML or JSON, and checks types by the dataclass's annotations.

Owns which names and types a table may hold, and the texts of errors about them. Never knows which settings exist, and never looks for
files.

1. An error names the place (a file, for example), the setting, the value it got and the value it wanted.
2. Types are checked here, ranges by the dataclass itself.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from biodedup.common.renamed import old_names, renamed
from biodedup.errors import InvalidInput

T = TypeVar("T")
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file. Raises InvalidInput for a file that cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidInput(f"{path} does not exist; name a settings file (TOML)") from None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read ({type(error).__name__}); name a settings file (TOML)") from None
    except ValueError as error:  # neither UTF-8 nor TOML
        raise InvalidInput(f"{path} is not TOML: {error}") from None


def typed(cls: type, table: object, where: str, folder: Path | None = None) -> dict[str, Any]:
    """dotted name -> value of a table, each of the type that the dataclass states. where: the table's place, for errors; folder: where
    relative paths start. Raises InvalidInput for an unknown name or a wrong type."""
    return dict(_typed(cls, table, where, folder, ""))


def made(cls: type[T], values: Mapping[str, Any], where: str = "", prefix: str = "") -> T:
    """The dataclass with these values, by dotted names, and defaults for the others. Raises InvalidInput for a value out of range."""
    given: dict[str, Any] = {}
    for name, hint in hints(cls).items():
        inner, full = table_of(hint), prefix + name
        if inner is None:
            if full in values:
                given[name] = values[full]
        elif any(key.startswith(f"{full}.") for key in values):
            given[name] = made(inner, values, where, f"{full}.")
    try:
        return cls(**given)
    except InvalidInput as error:  # its text begins with the name
        raise InvalidInput(f"{where}: {prefix}{error}" if where else f"{prefix}{error}") from None


def flat(instance: Any, prefix: str = "") -> dict[str, Any]:
    """dotted name -> value of a dataclass; a nested dataclass that is None has no entry."""
    values: dict[str, Any] = {}
    for field in fields(instance):
        value = getattr(instance, field.name)
        if is_dataclass(value):
            values |= flat(value, f"{prefix}{field.name}.")
        elif table_of(hints(type(instance))[field.name]) is None:
            values[prefix + field.name] = value
    return values


def plain(value: Any) -> Any:
    """A value as TOML and JSON can hold it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def differences(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """dotted name -> (before, after), for the fields in which two dataclasses of one class differ."""
    a, b = flat(before), flat(after)
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def hints(cls: Any) -> dict[str, Any]:
    """field -> its type, in the order of the fields."""
    known = get_type_hints(cls)
    return {field.name: known[field.name] for field in fields(cls)}


def table_of(hint: Any) -> Any | None:
    """The dataclass that a field holds, or None."""
    return next((kind for kind in _kinds(hint) if is_dataclass(kind)), None)


def _typed(cls: type, table: object, where: str, folder: Path | None, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(table, Mapping):
        raise InvalidInput(f"{where}: {prefix.removesuffix('.')} is {table!r}, wanted a table")
    known, old = hints(cls), old_names(cls)
    for name, value in table.items():
        if name in old:
            if old[name] in table:
                raise InvalidInput(
                    f"{where}: {prefix}{name} and {prefix}{old[name]} name one setting; state {old[name]} alone"
                )
            renamed(f"{where}: {prefix}{name}", old[name])
            name = old[name]
        full = f"{prefix}{name}"
        if name not in known:
            raise InvalidInput(f"{where}: {full} is not known; {_hint(name, known, prefix)}")
        inner = table_of(known[name])
        if inner is not None:
            yield from _typed(inner, value, where, folder, f"{full}.")
        else:
            yield full, _value(known[name], value, f"{where}: {full}", folder)


def _hint(name: object, known: Mapping[str, Any], prefix: str) -> str:
    near = difflib.get_close_matches(str(name), known, 1)
    return f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(prefix + one for one in known)}"


def _value(hint: Any, value: object, what: str, folder: Path | None) -> Any:
    kinds = _kinds(hint)
    if NoneType in kinds and (value is None or value == ""):  # TOML has no null
        return None
    for kind in kinds:
        if get_origin(kind) is tuple:
            if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
                return tuple(value)
        elif get_origin(kind) is dict:
            if isinstance(value, Mapping) and all(isinstance(text, str) for pair in value.items() for text in pair):
                return dict(value)
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
                return float(value)
        elif kind is Path:
            if isinstance(value, str) and value:
                return _placed(Path(value), folder)
        elif kind is not NoneType and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            is_card = isinstance(value, str) and value.endswith(".toml")
            return str(_placed(Path(value), folder)) if is_card else value
    wanted = [_WANTED.get(kind, "a list of texts") for kind in kinds if kind is not NoneType]
    none = ', or "" for none' if NoneType in kinds else ""
    raise InvalidInput(f"{what} is {value!r}, wanted {' or '.join(wanted)}{none}")


def _placed(path: Path, folder: Path | None) -> Path:
    return path if folder is None or path.is_absolute() else folder / path


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
