"""Finds how a CSV file is written: its encoding, what separates its columns, and which lines come before the header.

Owns the detection, and a stream that gives any encoding as UTF-8. Never parses a row.

1. A byte order mark counts. Without one, a file of UTF-8 text is UTF-8, also where some cells are damaged: these are refused one by one.
2. A file in which no line with other letters is UTF-8 may be Windows-1252, in which Excel saves. It is taken for that if five lines or more
   have such letters and charset-normalizer agrees. Fewer are no evidence: a wrong guess gives a person another name. They are refused,
   and the caller names the encoding.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from biodedup.errors import InvalidInput

SEPARATORS = ",;\t|"
GUESSED_LINES_MIN = 5
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MARKED = {"utf-16": ("utf-16-le", "utf-16-be"), "utf-32": ("utf-32-le", "utf-32-be")}
"""Encodings that begin with a mark, and what they are without one."""
_CANDIDATES = ["cp1252", "cp1250", "cp1251", "cp1254", "mac_roman", "cp850", "gb18030", "shift_jis"]
_TURKISH = frozenset(b"\xd0\xdd\xde\xf0\xfd\xfe")
"""Letters in which Windows-1252 (Icelandic) and Windows-1254 (Turkish) differ."""
_CHUNK = 1 << 18
_SAMPLE_LINES = 500
_HEADER_BYTES = 1 << 20
_TITLES_MAX = 20
"""Lines at the start of a file among which the header is looked for."""
_SEP_LINE = re.compile(r"\ufeff?sep=(.)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class TextForm:
    """encoding: a codec's name, `utf-8` with or without a byte order mark; guessed: whether it was found by its letters alone; lines_before:
    the header: `sep=;` as Excel writes it, empty ones and titles; titles: how many of these are titles of the sheet; header: the first line
    after them."""

    encoding: str
    delimiter: str
    header: str
    lines_before: int = 0
    guessed: bool = False
    titles: int = 0

    @property
    def is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig", "ascii")


def text_form(path: Path, encoding: str | None = None) -> TextForm:
    """encoding: as the caller declared it, None detects it. Raises OSError; InvalidInput for what is no text with a header."""
    guessed = False
    if encoding is None:
        encoding, guessed = detected(path)
    elif (both := _MARKED.get(codecs.lookup(encoding).name)) is not None:
        encoding = _ordered(path, encoding, *both)
    with open_text(path, encoding) as file:
        first = [file.readline(_HEADER_BYTES) for _ in range(_TITLES_MAX)]
    sep = _SEP_LINE.fullmatch(first[0])
    before = 0 if sep is None else 1
    while before < len(first) - 1 and first[before] and not first[before].strip():
        before += 1
    titles = 0
    if _is_title(first[before]):
        after = [at for at in range(before, len(first)) if first[at].strip() and not _is_title(first[at])]
        if after and _cells(first[after[0]]) > 1:  # otherwise a table of one column
            titles = sum(bool(line.strip()) for line in first[before : after[0]])
            before = after[0]
    header = first[before].removeprefix("\ufeff").rstrip("\r\n")
    return TextForm(encoding, _delimiter(header) if sep is None else sep[1], header, before, guessed, titles)


def _ordered(path: Path, encoding: str, little: str, big: str) -> str:
    """A declared encoding of two or four bytes a character as the file has it: with a mark, or in the order that its zeros show."""
    with path.open("rb") as file:
        head = file.read(1024)
    if any(head.startswith(mark) for mark, _ in _MARKS):
        return encoding
    return big if head[:1] == b"\0" else little


def _is_title(line: str) -> bool:
    """Whether a line may be the title of a sheet: words in one cell, all others empty. Names of columns have no spaces, or stand in several."""
    return _cells(line) == 1 and " " in line.strip(SEPARATORS + '"\ufeff \r\n')


def _cells(line: str) -> int:
    """How many cells of a line hold something, by the separator that makes most of them."""
    return max(sum(map(bool, map(str.strip, cells))) for cells in _by_separator(line).values())


def _by_separator(line: str) -> dict[str, list[str]]:
    return {mark: next(csv.reader([line.rstrip("\r\n")], delimiter=mark), []) for mark in SEPARATORS}


def header_of(path: Path, form: TextForm) -> list[str]:
    """The names of the columns; a quoted one may hold several lines. Raises OSError, InvalidInput."""
    with open_text(path, form.encoding) as file:
        for _ in range(form.lines_before):
            file.readline(_HEADER_BYTES)
        try:
            names = next(csv.reader(file, delimiter=form.delimiter), [])
        except csv.Error as error:
            raise InvalidInput(f"{path} has a header that cannot be read ({error}); save it as CSV UTF-8") from error
    if not names:
        raise InvalidInput(f"{path} has no header line; the first line names the columns, as subject_id,path")
    return [names[0].removeprefix("\ufeff"), *names[1:]]


def open_text(path: Path, encoding: str, *, errors: str = "replace") -> IO[str]:
    return path.open(encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors=errors, newline="")


def open_utf8(path: Path, form: TextForm) -> Any:
    """A binary stream of the file in UTF-8; characters that its encoding does not have are U+FFFD."""
    return io.BufferedReader(_Transcoded(path, form.encoding))


def detected(path: Path) -> tuple[str, bool]:
    """(encoding, whether it is a guess). Raises OSError."""
    with path.open("rb") as file:
        head = file.read(1024)
        for mark, encoding in _MARKS:
            if head.startswith(mark):
                return encoding, False
        zeros = [head[parity::2].count(0) for parity in (0, 1)]
        if max(zeros) > len(head) // 4 and not min(zeros):  # every second byte of letters of Latin script
            return ("utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"), False
        file.seek(0)
        utf8, others = 0, []
        for line in _lines_with_letters(file):
            try:
                line.decode()
                utf8 += 1
            except UnicodeDecodeError:
                others.append(line)
            if utf8 or len(others) >= _SAMPLE_LINES:
                break
    if utf8 or len(others) < GUESSED_LINES_MIN:
        return "utf-8", False
    return ("cp1252", True) if _is_windows_1252(b"".join(others)) else ("utf-8", False)


def _lines_with_letters(file: Any) -> Any:
    """The lines that are not ASCII."""
    while lines := file.readlines(_CHUNK):
        if not b"".join(lines).isascii():
            yield from (line for line in lines if not line.isascii())


def _is_windows_1252(sample: bytes) -> bool:
    from charset_normalizer import from_bytes  # here: most files are UTF-8

    if not _TURKISH.isdisjoint(sample):
        return False
    found = from_bytes(sample, cp_isolation=_CANDIDATES)
    best, western = found.best(), [match for match in found if match.encoding == "cp1252"]
    # where it is as likely as another code page: Excel saves in it in most countries
    return best is not None and any((one.chaos, -one.coherence) <= (best.chaos, -best.coherence) for one in western)


def _delimiter(header: str) -> str:
    """The separator by which the header has most names; quoted ones may hold others. csv.Sniffer is used where two are alike."""
    counts = {mark: len(cells) for mark, cells in _by_separator(header).items()}
    most = max(counts.values())
    alike = [mark for mark, count in counts.items() if count == most]
    if most > 1 and len(alike) > 1:
        try:
            return csv.Sniffer().sniff(header, "".join(alike)).delimiter
        except csv.Error:
            pass
    return alike[0]


class _Transcoded(io.RawIOBase):
    """A file in UTF-8, whatever its encoding."""

    def __init__(self, path: Path, encoding: str) -> None:
        self._file = path.open("rb")
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        self._rest = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and not self._ended:
            chunk = self._file.read(_CHUNK)
            self._ended = not chunk
            self._rest = self._decoder.decode(chunk, final=self._ended).encode("utf-8", "replace")
        some = self._rest[: len(buffer)]
        buffer[: len(some)] = some
        self._rest = self._rest[len(some) :]
        return len(some)

    def close(self) -> None:
        self._file.close()
        super().close()


def refuse_no_text(form: TextForm, path: Path) -> None:
    """Raises InvalidInput where the header is no text, or there is none."""
    if "\0" in form.header or "\ufffd" in form.header:
        raise InvalidInput(
            f"{path} has a header that is not {form.encoding.upper()} text; name its encoding, as --encoding cp1252, or save it as CSV UTF-8"
        )
