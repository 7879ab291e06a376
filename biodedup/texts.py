"""Escapes hidden characters in text from outside, and checks ids and notes.

Owns the set of hidden characters (control characters, changes of the writing direction, invisible characters) and their escapes.
Never raises and never prints.

1. `shown(text)` is one line that a terminal, a log and a page can show; text without hidden characters is unchanged.
2. `json_text` is valid JSON of the same document, without raw hidden characters.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

ID_LENGTH_MAX = 256

_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff"
    "\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Unicode's Default_Ignorable_Code_Point and the blank Braille pattern. `str.isprintable` is True for some of them."""
_NOT_PLAIN = re.compile(r"[^ -~\n]")
_JOINERS = "\u200c\u200d"  # Persian and Indian scripts need them
_JOINED = re.compile(f"(?<=[^\0-\x7f{_JOINERS}])[{_JOINERS}](?=[^\0-\x7f{_JOINERS}])")


class KnownId(str):
    """An id that the library made, or that a gallery already holds. The rules for new ids do not apply to it."""

    __slots__ = ()


def shown(value: object, *, keep: str = "") -> str:
    """The text with hidden characters as escapes: `\\x1b`, `\\u202e`; an undecodable byte of a file name as `\\xe9`.

    keep: characters to leave as they are, such as line ends in a text of several lines.
    """
    text = str(value)
    if text.isprintable() and not _UNSEEN.search(text):
        return text
    joined = {match.start() for match in _JOINED.finditer(text)}
    return "".join(
        letter if i in joined or letter in keep or not is_hidden(letter) else _escaped(letter)
        for i, letter in enumerate(text)
    )


def is_hidden(letter: str) -> bool:
    """Whether a character must be escaped. Spaces of all widths are not hidden."""
    return _UNSEEN.match(letter) is not None or not (letter.isprintable() or unicodedata.category(letter) == "Zs")


def json_text(document: Any) -> str:
    """The document as indented JSON, readable, with a line end."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    if text.isascii() and "\x7f" not in text:  # json escapes the control characters below the space
        return text + "\n"
    return _NOT_PLAIN.sub(lambda match: _in_json(match[0]), text) + "\n"


def json_line(document: Any) -> str:
    """The document as one line of JSON, readable, without a line end."""
    text = json.dumps(document, ensure_ascii=False)
    return text if text.isascii() and "\x7f" not in text else _NOT_PLAIN.sub(lambda match: _in_json(match[0]), text)


def _in_json(letter: str) -> str:
    if not is_hidden(letter):
        return letter
    return "\\u007f" if letter == "\x7f" else json.dumps(letter)[1:-1]


def writable(text: str) -> str:
    """The text with undecodable bytes of a file name as `\\xe9`, so that a table in UTF-8 can hold it."""
    return text if text.isascii() else "".join(_escaped(c) if "\ud800" <= c <= "\udfff" else c for c in text)


def id_problem(text: str) -> str | None:
    """Says why a text is not a valid id, or returns None. An id has 1 to 256 visible characters, in Unicode's form NFC, without spaces around
    it."""
    kind = id_problem_kind(text)
    if kind in ("is empty", "is too long"):
        return f"has {len(text)} characters; wanted 1 to {ID_LENGTH_MAX}, all of them printable"
    if kind == "has hidden characters":
        hidden = next(c for c in text if not c.isprintable() or _UNSEEN.match(c))
        return f"holds {_named(hidden)}; wanted characters that are all printable and can be seen"
    if kind == "has spaces around it":
        return "begins or ends with a space; remove it, ids are compared letter by letter"
    if kind == "is not in form NFC":
        return "is not in Unicode's form NFC: its accents are letters of their own; normalise it, ids are compared letter by letter"
    return None


def id_problem_kind(text: str) -> str:
    """The kind of problem, one of a fixed set of short texts; '' for a valid id."""
    if not 1 <= len(text) <= ID_LENGTH_MAX:
        return "is too long" if text else "is empty"
    if not text.isprintable() or _UNSEEN.search(text):
        return "has hidden characters"
    if text != text.strip():
        return "has spaces around it"
    return "" if unicodedata.is_normalized("NFC", text) else "is not in form NFC"


def text_problem(text: str, length_max: int) -> str | None:
    """Says why a note or a reason is not valid, or returns None. It may have several lines, but no hidden characters."""
    if len(text) > length_max:
        return f"has {len(text):,} characters; wanted up to {length_max:,}, shorten it"
    hidden = next((c for c in text if is_hidden(c) and c not in f"\t\n{_JOINERS}"), None)
    return None if hidden is None else f"holds {_named(hidden)}; wanted text that can be seen"


def _named(letter: str) -> str:
    return f"U+{ord(letter):04X} ({unicodedata.name(letter, 'a control or reserved character').lower()})"


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: one byte
        return f"\\x{code - 0xDC00:02x}"
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(letter)
    return named or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")
