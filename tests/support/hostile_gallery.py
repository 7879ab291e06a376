"""Galleries as someone would spoil them who knows the format, and computes every checksum anew.

Run as a program, since what it looks for may end the process: `python -m tests.support.hostile_gallery GALLERY SEED COUNT` spoils copies of a gallery and
uses them. It prints the seed of each try before it begins, and every error outside the tree, after which it ends with 1.
"""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import sys
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

import biodedup as bd
from biodedup.gallery.care.verify import inspect
from biodedup.gallery.catalogue import sqlite as catalogue
from biodedup.gallery.catalogue.chain import CHAIN_COLUMNS
from biodedup.gallery.files import column_file
from biodedup.gallery.files.filesystem import LocalStorage

NASTY = [-1, 0, 1, 2, 3, 7, 63, 64, 65, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, -(1 << 40), (1 << 62), 10**30]
ODD = [None, True, "", "x", [], {}, [[]], {"a": 1}, 1.5, float("inf"), float("nan"), "\ud800x", "1" * 5000]


class Opened:
    """A column file, in parts that can be changed."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        self.path = path
        _, _, size, end, _ = column_file._FIXED.unpack_from(content)
        table = json.loads(content[column_file._FIXED.size : size].rstrip(b"\0"))
        self.table: dict[str, Any] = table
        self.block_bytes = table.get("block_bytes", column_file.BLOCK_BYTES)
        blocks = -(-(end - size - 8) // (self.block_bytes + 8))
        self.body = bytearray(content[size : end - 8 - 8 * blocks])

    def array(self, name: str) -> np.ndarray:
        spec = self.table["arrays"][name]
        count = int(np.prod(spec["shape"]))
        return np.frombuffer(self.body, spec["dtype"], count, spec["offset"])

    def save(self) -> str:
        """With sound checksums. Returns the digest."""
        header = bytearray(
            column_file._header(self.table["about"], self.table["arrays"], len(self.body), self.block_bytes)
        )
        blocks = range(0, len(self.body), self.block_bytes)
        sums = [xxhash.xxh3_64_intdigest(bytes(self.body[at : at + self.block_bytes])) for at in blocks]
        table = np.array(sums, "<u8").tobytes()
        end = xxhash.xxh3_64_intdigest(table).to_bytes(8, "little")
        self.path.write_bytes(bytes(header) + self.body + table + end)
        return column_file._digest(bytes(header), table)


def name_anew(gallery: Path, file: str, digest: str) -> None:
    """The manifest names the spoilt file."""
    number, _, kind = file.partition(".")
    with closing(sqlite3.connect(gallery / "gallery.sqlite3")) as database:
        (row,) = database.execute(
            "SELECT number, first_row, end_row, files FROM segment WHERE number = ?", (int(number),)
        )
        files = json.dumps(json.loads(row[3]) | {kind: digest})
        change(database, "segment", "number", row[0], [*row[:3], files])


def change(database: sqlite3.Connection, table: str, key: str, value: object, row: list[Any]) -> None:
    marks = ",".join("?" * (len(row) + 1))
    database.execute(f"DELETE FROM {table} WHERE {key} IS ?", (value,))
    database.execute(f"INSERT INTO {table} VALUES ({marks})", (*row, catalogue.row_checksum(row)))
    forget_chain(database)
    database.commit()


def forget_chain(database: sqlite3.Connection) -> None:
    """The next writer takes the digests of the hash chain from the rows that are there, as if a forger had computed it anew."""
    tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in CHAIN_COLUMNS.keys() & set(tables):
        database.execute(f"DELETE FROM {table}")


def spoil_file(gallery: Path, chance: random.Random) -> str:
    path = chance.choice(sorted((gallery / "segments").iterdir()))
    file = Opened(path)
    how = chance.choice(["element", "element", "flip", "about", "place", "cut", "raw"])
    said = f"{path.name} {how}"
    if how in ("cut", "raw"):
        content = bytearray(path.read_bytes())
        if how == "cut":
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        return said
    if how == "element":
        name = chance.choice(sorted(file.table["arrays"]))
        array = file.array(name).copy()
        if array.size:
            bits = array.dtype.itemsize * 8
            for _ in range(chance.choice([1, 1, 3, 50])):
                value = chance.choice(NASTY) % (1 << bits)
                array.reshape(-1).view(f"<u{bits // 8}")[chance.randrange(array.size)] = value
            at = file.table["arrays"][name]["offset"]
            file.body[at : at + array.nbytes] = array.tobytes()
        said += f" {name}"
    elif how == "flip" and file.body:
        for _ in range(chance.choice([1, 20])):
            file.body[chance.randrange(len(file.body))] = chance.randrange(256)
    elif how == "about":
        said += spoil_json(file.table["about"], chance)
    elif how == "place":
        said += spoil_json(file.table["arrays"], chance)
    try:
        digest = file.save()
    except (TypeError, ValueError, OverflowError):
        return said + " (cannot be written)"
    name_anew(gallery, path.name, digest)
    return said


def spoil_json(value: Any, chance: random.Random) -> str:
    """Changes one place in it."""
    places: list[tuple[Any, Any]] = []

    def walk(one: Any) -> None:
        for key in list(one) if isinstance(one, dict) else range(len(one)):
            places.append((one, key))
            if isinstance(one[key], (dict, list)):
                walk(one[key])

    walk(value)
    if not places:
        return ""
    inside, key = chance.choice(places)
    if isinstance(inside, dict) and chance.random() < 0.2:
        del inside[key]
        return f" without {key}"
    inside[key] = chance.choice([*NASTY, *ODD])
    return f" {key}={inside[key]!r:.30}"


def spoil_table(gallery: Path, chance: random.Random) -> str:
    with closing(sqlite3.connect(gallery / "gallery.sqlite3")) as database:
        tables = [t for t in catalogue.COLUMNS_OF if database.execute(f"SELECT count(*) FROM {t}").fetchone()[0]]
        table = chance.choice(tables)
        rows = database.execute(f"SELECT * FROM {table}").fetchall()
        *row, _ = chance.choice(rows)
        key = catalogue.COLUMNS_OF[table].split()[0]
        before, at = row[0], chance.randrange(len(row))
        value: Any = chance.choice([*(n for n in NASTY if abs(n) < 1 << 63), None, "", "x", b"", b"\xff" * 9, 1.5])
        if isinstance(row[at], str) and row[at].startswith(("{", "[")) and chance.random() < 0.8:
            document = json.loads(row[at])
            said = spoil_json(document, chance)
            try:
                value = json.dumps(document)
                value.encode()
            except (TypeError, ValueError):
                value = "{"
        elif isinstance(row[at], bytes) and row[at] and chance.random() < 0.6:
            value = bytearray(row[at])
            value[chance.randrange(len(value))] = chance.randrange(256)
            value, said = bytes(value), " flipped"
        else:
            said = f" {value!r:.30}"
        row[at] = value
        try:
            change(database, table, key, before, row)
        except (sqlite3.Error, TypeError):
            return f"{table} cannot be written"
        return f"{table}[{at}]{said}"


def use(gallery: Path, probes: dict[str, Any], config: bd.Config) -> int:
    """Everything that reads. Returns how many calls ended with an error of the tree."""
    refused = 0

    def tried(call: Any) -> Any:
        nonlocal refused
        try:
            return call()
        except bd.BiodedupError as error:
            refused += isinstance(error, bd.DataDamaged)
            return None

    tried(lambda: inspect(LocalStorage(), gallery))
    engine = tried(lambda: bd.Engine.open(gallery, config, read_only=True))
    if engine is None:
        return refused
    with engine:
        tried(engine.info)
        tried(engine.subject_ids)
        tried(lambda: list(engine.cases()))
        tried(engine.verdicts)
        for name in ("s0", "s3", "s7", "s11", "nobody"):
            tried(lambda name=name: engine.templates(name))
            tried(lambda name=name: engine.decision("e" + name[1:]))
            tried(lambda name=name: engine.verify(bd.Encounter(templates=probes), name))
        tried(lambda: engine.identify(bd.Encounter(templates=probes)))
        tried(lambda: engine.identify(bd.Encounter(templates=probes), groups=["north"]))
        tried(lambda: engine.search({"face": np.stack([probes["face"]])}, k=5))
        tried(lambda: list(engine.join(threshold_db=0.0)))
        tried(lambda: engine.backup(gallery.parent / f"{gallery.name}-copy"))
    writing = tried(lambda: bd.Engine.open(gallery, config))
    if writing is not None:
        with writing:
            tried(lambda: writing.enroll(bd.Encounter("new", templates=probes, encounter_id="new")))
            tried(lambda: writing.remove("s3"))
            tried(writing.compact)
    return refused


def tell(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)).encode("ascii", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


def main() -> None:
    gallery, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    with np.load(gallery.parent / "probes.npz") as stored:
        probes = {"face": stored["face"], "right_index": stored["right_index"].tobytes()}
    config = bd.Config(gallery=bd.GalleryConfig(4, 9, False))
    refused = failed = 0
    for number in range(seed, seed + count):
        chance = random.Random(number)
        copy = gallery.parent / f"spoilt{seed}"
        for folder in (copy, gallery.parent / f"spoilt{seed}-copy"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(gallery, copy)
        said = (spoil_file if chance.random() < 0.65 else spoil_table)(copy, chance)
        tell(number, said)
        try:
            refused += use(copy, probes, config) > 0
        except Exception:
            failed += 1
            tell(traceback.format_exc())
    tell("refused", refused)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
