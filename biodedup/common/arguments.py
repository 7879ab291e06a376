"""Checks the types of arguments and dataclass fields by their annotations.

Owns the rule for each kind of annotation, and the text of the error. Never checks ranges, and never checks the items of a sequence or a
mapping; the called function does.

1. The error names the argument, the type that it got (not the value, which may be biometric), the wanted type, and the remedy.
2. A str is converted to a `Path` if a `Path` is wanted. Nothing else is converted.
3. An annotation of an unknown kind accepts every value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from biodedup.errors import InvalidInput

_F = TypeVar("_F", bound=Callable[..., Any])
_C = TypeVar("_C")
Rule = Callable[[Any], Any]
"""Returns the value, converted if necessary. Raises TypeError for a value of a wrong type."""

_NEXT = {
    "Backlog": "open it, as jobs.Backlog.open(gallery)",
    "Case": "ask for it, as engine.case(encounter_id)",
    "CaptureConfig": "write bd.CaptureConfig(...)",
    "Config": "write bd.Config(...), or bd.Config.load(file) for a settings file",
    "Encounter": "write bd.Encounter(subject_id, [bd.Face(path)])",
    "Engine": "open it, as bd.Engine.open(folder)",
    "FaceConfig": "write bd.FaceConfig(...)",
    "FingerConfig": "write bd.FingerConfig(...)",
    "Gallery": "open it, as bd.Engine.open(folder)",
    "GalleryConfig": "write bd.GalleryConfig(...)",
    "IsolationConfig": "write bd.IsolationConfig(...)",
    "KeyProvider": "write bd.KeyProvider(file=...), or pass a function that returns the key",
    "Path": "write it as a str or a pathlib.Path",
    "Policy": "write bd.Policy(...)",
    "Principal": "write bd.Principal(name, roles)",
    "SearchConfig": "write bd.SearchConfig(...)",
    "TableOptions": "write jobs.TableOptions(...)",
    "Template": "make it by bd.Extractor().extract([capture]), or write bd.Template(column, model_id, vector)",
    "bytes": "read the file, as Path(name).read_bytes()",
    "callable": "pass a function, without calling it",
    "float": "state it as a number",
    "int": "state it as a whole number",
    "mapping": "write {name: value}",
    "sequence": "put it in a list, as [value]",
    "str": "convert it, as str(value)",
}
_WORDS = {
    NoneType: "None",
    Path: "a path",
    bool: "True or False",
    bytes: "bytes",
    float: "a number",
    int: "a whole number",
    str: "a str",
}


def checked(function: _F) -> _F:
    """A decorator that checks the arguments by their annotations. The function then raises InvalidInput for wrong types."""
    rules: tuple[list[tuple[str, _Hint]], dict[str, _Hint]] | None = None

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        nonlocal rules
        if rules is None:  # at the first call, because annotations may refer to names that are defined later
            rules = _rules_of(function)
        values = list(given)
        by_place, by_name = rules
        for at, (name, hint) in enumerate(by_place[: len(values)]):
            values[at] = hint.value(name, values[at])
        for name in named:
            if name in by_name:
                named[name] = by_name[name].value(name, named[name])
        return function(*values, **named)

    return cast(_F, call)


def checked_methods(cls: type[_C]) -> type[_C]:
    """A class decorator that checks the arguments of public methods and of the constructor."""
    for name, method in list(vars(cls).items()):
        if (name.startswith("_") and name != "__init__") or isinstance(method, property):
            continue
        if isinstance(method, classmethod):
            setattr(cls, name, classmethod(checked(method.__func__)))
        elif callable(method):
            setattr(cls, name, checked(method))
    return cls


def check_fields(instance: Any) -> None:
    """Checks the fields of a frozen dataclass in its `__post_init__`. Raises InvalidInput."""
    hints = _hints_of(type(instance))
    for field in fields(instance):
        before = getattr(instance, field.name)
        value = hints[field.name].value(field.name, before)
        if value is not before:
            object.__setattr__(instance, field.name, value)


_KNOWN: dict[Any, dict[str, _Hint]] = {}


def _hints_of(cls: Any) -> dict[str, _Hint]:
    if cls not in _KNOWN:
        _KNOWN[cls] = {name: _Hint(hint) for name, hint in get_type_hints(cls).items()}
    return _KNOWN[cls]


def _rules_of(function: Callable[..., Any]) -> tuple[list[tuple[str, _Hint]], dict[str, _Hint]]:
    """(rules of the positional parameters, in order; name -> rule of the parameters that can be passed by name)."""
    hints, by_place, by_name = get_type_hints(function), [], {}
    for parameter in signature(function).parameters.values():
        rule = _Hint(hints.get(parameter.name, Any))
        if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD):
            by_place.append((parameter.name, rule))
        if parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
            by_name[parameter.name] = rule
    return by_place, by_name


class _Hint:
    """The rules of an annotation, one for each member of a union."""

    def __init__(self, hint: Any) -> None:
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        self._rules = [_rule(kind) for kind in kinds]
        self._words = " or ".join(
            dict.fromkeys(_words(kind) for kind in kinds if kind is not NoneType or len(kinds) == 1)
        )
        names = sorted(
            (_name(kind) for kind in kinds), key=lambda name: name in ("str", "float", "int")
        )  # classes first
        self._next = next((_NEXT[name] for name in names if name in _NEXT), "see its documentation")
        self._classes = tuple(kind for kind in kinds if type(kind) is type)

    def value(self, name: str, value: Any) -> Any:
        """The value, converted if necessary. name: of the argument. Raises InvalidInput."""
        if type(value) in self._classes:  # the usual case
            return value
        for rule in self._rules:
            try:
                return rule(value)
            except TypeError:
                continue
        remedy = "it is required" if value is None else self._next
        raise InvalidInput(f"{name} is {self._words}, got {type(value).__name__}; {remedy}")


def _rule(kind: Any) -> Rule:
    origin = get_origin(kind) or kind
    if kind in (Any, object):
        return lambda value: value
    if kind is None or origin is NoneType:
        return _accept(lambda value: value is None)
    if origin is Literal:
        return _accept(lambda value: isinstance(value, str))
    if origin is Path:
        return _path
    if origin is bool:
        return _accept(lambda value: isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"))
    if origin is int:
        return _accept(lambda value: isinstance(value, Integral) and not isinstance(value, bool))
    if origin is float:
        return _accept(lambda value: isinstance(value, Real) and not isinstance(value, bool))
    if origin is PathLike:
        return _accept(lambda value: isinstance(value, PathLike))
    if not isinstance(origin, type):
        return _accept(callable) if origin is Callable else lambda value: value
    if issubclass(origin, Mapping):
        return _accept(lambda value: isinstance(value, Mapping))
    if origin is not tuple and issubclass(origin, Iterable) and origin.__module__ == "collections.abc":
        return _accept(_is_collection if issubclass(origin, Collection) else _is_iterable)
    if getattr(origin, "_is_protocol", False):
        return _accept(callable) if "__call__" in vars(origin) else lambda value: value
    if origin.__module__ == "numpy":
        return _accept(
            lambda value: _is_collection(value) or hasattr(value, "__array__")
        )  # the function checks the shape
    if origin is tuple:
        return lambda value: value
    if origin.__module__ == "collections.abc":
        return _accept(callable) if origin.__name__ == "Callable" else lambda value: value
    return _accept(lambda value: isinstance(value, origin))


def _accept(test: Callable[[Any], bool]) -> Rule:
    def rule(value: Any) -> Any:
        if not test(value):
            raise TypeError
        return value

    return rule


def _path(value: Any) -> Path:
    if isinstance(value, (str, PathLike)):
        return value if isinstance(value, Path) else Path(value)
    raise TypeError


def _is_iterable(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes, Mapping))


def _is_collection(value: Any) -> bool:
    """True for a list, a tuple, a set, an array of numpy or Arrow, a column of pandas. False for str, bytes and mappings."""
    return _is_iterable(value) and hasattr(value, "__len__")


def _name(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if isinstance(origin, type) and origin.__module__ == "collections.abc":
        if origin.__name__ == "Callable":
            return "callable"
        return "mapping" if issubclass(origin, Mapping) else "sequence"
    if getattr(origin, "_is_protocol", False):
        return "callable"
    return getattr(origin, "__name__", "")


def _words(kind: Any) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    name, named = _name(kind), {"mapping": "a mapping", "sequence": "a sequence", "callable": "a function"}
    if name in named:
        return named[name]
    if get_origin(kind) is Literal:
        return "a str"
    if name == "ndarray":
        return "an array"
    return f"{'an' if name[:1] in 'AEIO' else 'a'} {name}"
