"""Detects the form of a CSV file: its encoding, its separator, and the lines before its header.

Owns the detection, and a stream that converts any encoding to UTF-8. Never parses a row.

1. A byte order mark decides. Without one, a file is UTF-8 if at least one non-ASCII line is valid UTF-8. Damaged cells are refused one by one.
2. A file without any valid non-ASCII line may be Windows-1252, which Excel writes. It is read so if it has at least five non-ASCII lines and
   charset-normalizer agrees. Fewer lines are not enough evidence, and a wrong guess would change a person's name: their cells are refused,
   and the caller must name the encoding.
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
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CANDIDATES = ["cp1252", "cp1250", "cp1251", "cp1254", "mac_roman", "cp850", "gb18030", "shift_jis"]
_TURKISH = frozenset(b"\xd0\xdd\xde\xf0\xfd\xfe")
"""The bytes that mean different letters in Windows-1252 (Icelandic) and Windows-1254 (Turkish)."""
_CHUNK = 1 << 18
_SAMPLE_LINES = 500
_HEADER_BYTES = 1 << 20
_TITLES_MAX = 20
"""The header is looked for in this many lines at the start of a file."""
_SEP_LINE = re.compile(r"\ufeff?sep=(.)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class TextForm:
    """The form of a CSV file. encoding: a codec's name; `utf-8` also stands for UTF-8 with a byte order mark; header: the header line;
    lines_before: number of lines before the header: Excel's `sep=;`, empty lines and titles; guessed: the encoding was guessed from the
    letters; titles: how many of the lines before the header are titles of the sheet."""

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
    """Detects the form of a CSV file. encoding: the declared encoding; None detects it. Raises OSError."""
    guessed = False
    if encoding is None:
        encoding, guessed = detected(path)
    with open_text(path, encoding) as file:
        first = [file.readline(_HEADER_BYTES) for _ in range(_TITLES_MAX)]
    sep = _SEP_LINE.fullmatch(first[0])
    before = 0 if sep is None else 1
    while before < len(first) - 1 and first[before] and not first[before].strip():
        before += 1
    titles = 0
    if _is_title(first[before]):
        headers = [i for i in range(before, len(first)) if first[i].strip() and not _is_title(first[i])]
        if headers and _cells(first[headers[0]]) > 1:  # otherwise it is a table with one column
            titles = sum(bool(line.strip()) for line in first[before : headers[0]])
            before = headers[0]
    header = first[before].removeprefix("\ufeff").rstrip("\r\n")
    return TextForm(encoding, _delimiter(header) if sep is None else sep[1], header, before, guessed, titles)


def _is_title(line: str) -> bool:
    """Whether a line may be the title of a sheet: exactly one cell has text, and the text has a space. A header has several cells, or one name
    without spaces."""
    return _cells(line) == 1 and " " in line.strip(SEPARATORS + '"\ufeff \r\n')


def _cells(line: str) -> int:
    """The number of non-empty cells of a line, with the separator that gives the most."""
    return max(sum(map(bool, map(str.strip, cells))) for cells in _by_separator(line).values())


def _by_separator(line: str) -> dict[str, list[str]]:
    return {mark: next(csv.reader([line.rstrip("\r\n")], delimiter=mark), []) for mark in SEPARATORS}


def header_of(path: Path, form: TextForm) -> list[str]:
    """The names of the columns. A quoted name may span several lines. Raises OSError, InvalidInput."""
    with open_text(path, form.encoding) as file:
        for _ in range(form.lines_before):
            file.readline(_HEADER_BYTES)
        try:
            names = next(csv.reader(file, delimiter=form.delimiter), [])
        except csv.Error as error:
            raise InvalidInput(f"the header of {path} cannot be read ({error}); save it as CSV UTF-8") from error
    if not names:
        raise InvalidInput(f"{path} has no header line; the first line names the columns, such as subject_id,path")
    return [names[0].removeprefix("\ufeff"), *names[1:]]


def open_text(path: Path, encoding: str, *, errors: str = "replace") -> IO[str]:
    return path.open(encoding="utf-8-sig" if encoding == "utf-8" else encoding, errors=errors, newline="")


def open_utf8(path: Path, form: TextForm) -> Any:
    """A binary stream of the file, converted to UTF-8. Bytes that cannot be decoded become U+FFFD."""
    return io.BufferedReader(_Transcoded(path, form.encoding))


def detected(path: Path) -> tuple[str, bool]:
    """Detects an encoding. Returns (encoding, whether it was guessed from the letters). Raises OSError."""
    with path.open("rb") as file:
        head = file.read(1024)
        for mark, encoding in _MARKS:
            if head.startswith(mark):
                return encoding, False
        zeros = [head[parity::2].count(0) for parity in (0, 1)]
        if max(zeros) > len(head) // 4 and not min(zeros):  # in UTF-16, every second byte of Latin letters is zero
            return ("utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"), False
        file.seek(0)
        valid, invalid = 0, []
        for line in _non_ascii_lines(file):
            try:
                line.decode()
                valid += 1
            except UnicodeDecodeError:
                invalid.append(line)
            if valid or len(invalid) >= _SAMPLE_LINES:
                break
    if valid or len(invalid) < GUESSED_LINES_MIN:
        return "utf-8", False
    return ("cp1252", True) if _is_windows_1252(b"".join(invalid)) else ("utf-8", False)


def _non_ascii_lines(file: Any) -> Any:
    while lines := file.readlines(_CHUNK):
        if not b"".join(lines).isascii():
            yield from (line for line in lines if not line.isascii())


def _is_windows_1252(sample: bytes) -> bool:
    from charset_normalizer import from_bytes  # a slow import, and most files are UTF-8

    if not _TURKISH.isdisjoint(sample):
        return False
    found = from_bytes(sample, cp_isolation=_CANDIDATES)
    best, western = found.best(), [match for match in found if match.encoding == "cp1252"]
    # a tie with another code page counts for Windows-1252, in which Excel saves in most countries
    return best is not None and any((each.chaos, -each.coherence) <= (best.chaos, -best.coherence) for each in western)


def _delimiter(header: str) -> str:
    """The separator that splits the header into the most names. `csv.Sniffer` decides a tie."""
    counts = {separator: len(cells) for separator, cells in _by_separator(header).items()}
    most = max(counts.values())
    tied = [separator for separator, count in counts.items() if count == most]
    if most > 1 and len(tied) > 1:
        try:
            return csv.Sniffer().sniff(header, "".join(tied)).delimiter
        except csv.Error:
            pass
    return tied[0]


class _Transcoded(io.RawIOBase):
    """A raw stream that converts a file to UTF-8."""

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
        part = self._rest[: len(buffer)]
        buffer[: len(part)] = part
        self._rest = self._rest[len(part) :]
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()


def refuse_undecodable_header(form: TextForm, path: Path) -> None:
    """Raises InvalidInput if the header is not text in the file's encoding."""
    if "\0" in form.header or "\ufffd" in form.header:
        raise InvalidInput(
            f"the header of {path} is not {form.encoding.upper()} text; name its encoding, such as --encoding cp1252, or save it as CSV UTF-8"
        )
