"""Forgeries of an encrypted gallery: the attacker reads and writes its files and knows their format, but has no key.

Owns the kinds of forgeries (`FORGERIES`) for tamper.py. Never opens a gallery.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

PAGE, HEAD, TAG = 4096, 128, 16
DATABASE, JOURNAL, KEY = "gallery.sqlite3", "gallery.sqlite3-journal", "gallery.key"
ALL = "all files"


class Forger:
    """now: the gallery; times: its copies of earlier times, oldest first; others: other galleries, by name. Each forgery changes a copy of
    `now`, and returns (the file, what was done)."""

    def __init__(self, now: Path, times: list[Path], others: dict[str, Path], rng: random.Random) -> None:
        self.now, self.times, self.others, self.rng = now, times, others, rng

    # from an earlier time -----------------------------------------------------------------------------------------

    def pages_put_back(self, gallery: Path) -> tuple[str, str]:
        """Some pages of the database as they were at an earlier time."""
        then = self.rng.randrange(len(self.times))
        differing = _differing(self.times[then] / DATABASE, gallery / DATABASE)
        chosen = self.rng.sample(differing, self.rng.choice([1, 1, 2, 3]) if len(differing) > 3 else 1)
        _copy_pages(self.times[then] / DATABASE, gallery / DATABASE, chosen)
        return DATABASE, f"pages {chosen} of time {then}"

    def commit_undone(self, gallery: Path) -> tuple[str, str]:
        """The pages that one step changed, such as a verdict or a removal, as they were before it."""
        step = self.rng.randrange(len(self.times) - 1)
        differing = _differing(self.times[step] / DATABASE, self.times[step + 1] / DATABASE)
        _copy_pages(self.times[step] / DATABASE, gallery / DATABASE, differing)
        return DATABASE, f"step {step + 1} undone"

    def database_put_back(self, gallery: Path) -> tuple[str, str]:
        then = self.rng.randrange(len(self.times))
        shutil.copy(self.times[then] / DATABASE, gallery / DATABASE)
        return DATABASE, f"the database of time {then}"

    def gallery_put_back(self, gallery: Path) -> tuple[str, str]:
        then = self.rng.randrange(len(self.times))
        shutil.rmtree(gallery)
        shutil.copytree(self.times[then], gallery)
        return ALL, f"the whole gallery of time {then}"

    def segment_put_back(self, gallery: Path) -> tuple[str, str]:
        """A file of a segment that a merge has replaced, under the name of one that is there."""
        then = self.rng.choice(self.times)
        name = self.rng.choice(_segments(gallery))
        kind = name.partition(".")[2]
        old = [path for path in _segments(then) if path.partition(".")[2] == kind and path != name]
        if old:
            shutil.copy(then / self.rng.choice(old), gallery / name)
        return name, f"of {then.name}"

    def journal_replayed(self, gallery: Path) -> tuple[str, str]:
        """SQLite's rollback journal, copied in the middle of an earlier transaction, whole or its first part: the next opening puts the pages
        back that it holds."""
        then = self.rng.choice(self.times)
        data = then.with_suffix(".journal").read_bytes()
        size = self.rng.choice([len(data), self.rng.randrange(2 * PAGE, len(data))])
        (gallery / JOURNAL).write_bytes(data[:size])
        return JOURNAL, f"{size} of {len(data)} bytes of time {then.name}"

    # within the gallery -------------------------------------------------------------------------------------------

    def rows_swapped(self, gallery: Path) -> tuple[str, str]:
        """Two blocks of a file, or of two files of one kind."""
        name = self.rng.choice([name for name in _segments(gallery) if name.endswith((".face", ".face.rest"))])
        other = self.rng.choice([one for one in _segments(gallery) if one.partition(".")[2] == name.partition(".")[2]])
        mine, theirs = bytearray((gallery / name).read_bytes()), bytearray((gallery / other).read_bytes())
        stride = int.from_bytes(mine[8:12], "little") + TAG
        i, j = (HEAD + stride * self.rng.randrange(-(-(len(data) - HEAD) // stride)) for data in (mine, theirs))
        if name == other:
            mine[i : i + stride], mine[j : j + stride] = mine[j : j + stride], mine[i : i + stride]
        else:
            mine[i : i + stride], theirs[j : j + stride] = theirs[j : j + stride], mine[i : i + stride]
            (gallery / other).write_bytes(theirs)
        (gallery / name).write_bytes(mine)
        return name, f"block at {i} and that at {j} of {other}"

    def pages_swapped(self, gallery: Path) -> tuple[str, str]:
        """Two pages of the database, or one twice."""
        data = bytearray((gallery / DATABASE).read_bytes())
        i, j = (PAGE * self.rng.randrange(len(data) // PAGE) for _ in range(2))
        first = data[i : i + PAGE]
        data[i : i + PAGE] = data[j : j + PAGE]
        if self.rng.random() < 0.7:
            data[j : j + PAGE] = first
        (gallery / DATABASE).write_bytes(data)
        return DATABASE, f"pages {i // PAGE} and {j // PAGE}"

    def files_swapped(self, gallery: Path) -> tuple[str, str]:
        """Two files of segments: of one kind, or any; or one in two places."""
        name, other = self.rng.sample(_segments(gallery), 2)
        mine, theirs = ((gallery / one).read_bytes() for one in (name, other))
        (gallery / name).write_bytes(theirs)
        if self.rng.random() < 0.7:
            (gallery / other).write_bytes(mine)
        return name, f"and {other}"

    def head_swapped(self, gallery: Path) -> tuple[str, str]:
        """The head of a sealed file, with its wrapped key, from another one."""
        name, other = self.rng.sample(_segments(gallery), 2)
        data = (gallery / name).read_bytes()
        (gallery / name).write_bytes((gallery / other).read_bytes()[:HEAD] + data[HEAD:])
        return name, f"the head of {other}"

    def file_cut(self, gallery: Path) -> tuple[str, str]:
        """A file that is shorter, longer, empty or gone."""
        name = self.rng.choice(
            [*_segments(gallery), *_segments(gallery), DATABASE, KEY, "sentinels", "backlog.sqlite3"]
        )
        data = (gallery / name).read_bytes()
        how = self.rng.choice(["cut", "cut at a block", "longer", "empty", "gone"])
        if how == "gone" and name not in ("sentinels", "backlog.sqlite3"):  # without these two a gallery is whole
            (gallery / name).unlink()
            return name, how
        stride = int.from_bytes(data[8:12], "little") + TAG if name.startswith("segments/") else PAGE
        size = {"cut": self.rng.randrange(1, len(data)), "cut at a block": max(len(data) - stride, HEAD)}.get(how, 0)
        content = data + self.rng.choice([data[-stride:], bytes(PAGE)]) if how == "longer" else data[:size]
        (gallery / name).write_bytes(content)
        return name, f"{how}, {len(content)} of {len(data)} bytes"

    # from elsewhere -----------------------------------------------------------------------------------------------

    def foreign_file(self, gallery: Path) -> tuple[str, str]:
        """A file of another gallery, of the same register's key, of another one, or in the clear."""
        origin = self.rng.choice(sorted(self.others))
        name = self.rng.choice([*_segments(gallery), DATABASE, KEY, "sentinels", "backlog.sqlite3"])
        if (self.others[origin] / name).exists():
            shutil.copy(self.others[origin] / name, gallery / name)
        return name, f"of the gallery of {origin}"

    def foreign_gallery(self, gallery: Path) -> tuple[str, str]:
        """Another gallery in its place: as a whole, or all but one file."""
        origin = self.rng.choice(sorted(self.others))
        shutil.rmtree(gallery)
        shutil.copytree(self.others[origin], gallery)
        if (kept := self.rng.choice([None, KEY, DATABASE])) is not None:
            shutil.copy(self.now / kept, gallery / kept)
        return ALL, f"the gallery of {origin}, without {kept}"

    def key_file_forged(self, gallery: Path) -> tuple[str, str]:
        """Fields of `gallery.key` of another gallery, edited, or the newest one left out."""
        mine = json.loads((gallery / KEY).read_bytes())
        theirs = json.loads((self.others[self.rng.choice(["same key", "another key"])] / KEY).read_bytes())
        name = self.rng.choice(sorted(set(mine) & set(theirs)))
        values = [theirs[name], str(mine[name])[::-1], None, 7]
        mine[name] = self.rng.choice([value for value in values if str(value) != str(mine[name])])
        (gallery / KEY).write_text(json.dumps(mine))
        return KEY, f"field {name}"


FORGERIES: dict[str, Callable[[Forger, Path], tuple[str, str]]] = {
    "pages put back": Forger.pages_put_back,
    "commit undone": Forger.commit_undone,
    "database put back": Forger.database_put_back,
    "gallery put back": Forger.gallery_put_back,
    "segment put back": Forger.segment_put_back,
    "journal replayed": Forger.journal_replayed,
    "rows swapped": Forger.rows_swapped,
    "pages swapped": Forger.pages_swapped,
    "files swapped": Forger.files_swapped,
    "head swapped": Forger.head_swapped,
    "file cut": Forger.file_cut,
    "foreign file": Forger.foreign_file,
    "foreign gallery": Forger.foreign_gallery,
    "key file forged": Forger.key_file_forged,
}


def _segments(gallery: Path) -> list[str]:
    return sorted(str(path.relative_to(gallery)) for path in (gallery / "segments").iterdir())


def _differing(then: Path, now: Path) -> list[int]:
    """Numbers of the pages that both have, and that are not alike."""
    old, new = then.read_bytes(), now.read_bytes()
    pages = range(min(len(old), len(new)) // PAGE)
    return [n for n in pages if old[n * PAGE : (n + 1) * PAGE] != new[n * PAGE : (n + 1) * PAGE]]


def _copy_pages(source: Path, target: Path, pages: list[int]) -> None:
    old, new = source.read_bytes(), bytearray(target.read_bytes())
    for n in pages:
        new[n * PAGE : (n + 1) * PAGE] = old[n * PAGE : (n + 1) * PAGE]
    target.write_bytes(new)
