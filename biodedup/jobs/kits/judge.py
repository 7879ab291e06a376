"""Runs the quality gate on the captures that a field kit packs, and finds files that are not captures.

Owns the reading of each file, and a cache of verdicts in a folder beside the batch: if a manifest is packed again after a recapture, only the
new captures are extracted. Never packs.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from biodedup.config import Config
from biodedup.embed.extractor import Extractor
from biodedup.embed.isolation import FAILURES
from biodedup.errors import GalleryDamaged, InvalidInput
from biodedup.gallery.answers import digest_of
from biodedup.gallery.files.faults import translated
from biodedup.gallery.files.filesystem import LocalStorage, whole, write_whole
from biodedup.gallery.files.private import private_folder
from biodedup.jobs.kits.format.record import RECORD_BYTES_MAX, Record, decode, encode
from biodedup.jobs.kits.manifest import Broken, Planned
from biodedup.jobs.shared.files import read_bounded
from biodedup.required import keep_better
from biodedup.values import Capture, Encounter, Face, Finger, Missing, Refusal, Template

PASSED = ""
"""The reason in the verdict on a capture that passed the gate."""
_NO_CAPTURE = frozenset(
    ("not_an_image", "pixel_format", "truncated", "too_many_pixels", "too_large_file", "empty_file", "unreadable", "not_a_file", "missing_file", "unsound_record", "several_pictures", "too_many_scans", "too_complex", *FAILURES)
)  # fmt: skip
"""Reasons that mean that a decoder could not open the file: a truncated image, or not a capture at all."""
Judged: TypeAlias = tuple[Planned, tuple[Capture, ...], tuple[Refusal, ...], Mapping[str, Template]]
_OTHER_BYTES_MAX = 1 << 20  # of a record, beside its images


class Judge:
    """Judges captures with the extractor. Verdicts are cached in a folder, by a hash of the captures' content and the gate's settings."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._storage = LocalStorage(config.keys)
        self._extractor: Extractor | None = None
        settings = {name: config.to_dict()[name] for name in ("face", "finger", "capture")}
        self._settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
        private_folder(folder)

    def close(self) -> None:
        """Ends the extractor's processes."""
        if self._extractor is not None:
            self._extractor.close()

    def judged(self, chunk: Sequence[Planned]) -> Iterator[Judged]:
        """(record, captures as bytes, a verdict for each capture that is not missing, its best templates) for each record, in order."""
        bytes_max = self._config.capture.bytes_max
        captures = [
            tuple(_in_memory(capture, bytes_max) for capture in planned.encounter.captures) for planned in chunk
        ]
        paths = [self._path(of_record) for of_record in captures]
        known = [_cached(self._storage, path) for path in paths]
        fresh = [i for i, verdict in enumerate(known) if verdict is None]
        todo = [[c for c in captures[i] if not isinstance(c, Missing)] for i in fresh]
        if any(todo) and self._extractor is None:
            self._extractor = Extractor(self._config)
        flat = [capture for of_record in todo for capture in of_record]
        results = iter(self._extractor.extract(flat) if self._extractor is not None and flat else ())
        for i, of_record in zip(fresh, todo, strict=True):
            extracted = [next(results) for _ in of_record]
            verdicts = tuple(
                result if isinstance(result, Refusal) else Refusal(result.column, PASSED) for result in extracted
            )
            best: dict[str, Template] = {}
            for result in extracted:
                if isinstance(result, Template):
                    keep_better(best, result)
            known[i] = verdicts, best
            failed = any(verdict.reason in FAILURES for verdict in verdicts)
            if of_record and not failed:  # a failure of the program is no verdict on the captures, and is not cached
                cached = Record(Encounter("-", templates=best, encounter_id="-"), 0, None, 0.0, verdicts)
                with translated(f"writing {paths[i]}"):
                    write_whole(self._storage, paths[i], encode(cached))
        for planned, of_planned, judged in zip(chunk, captures, known, strict=True):
            assert judged is not None, "every record was judged"
            yield planned, of_planned, *judged

    def _path(self, captures: Sequence[Capture]) -> Path:
        digest = digest_of(Encounter("-", captures, encounter_id="-"))
        return self._folder / f"{hashlib.sha256(self._settings + digest).hexdigest()}.record"


def _cached(storage: LocalStorage, path: Path) -> tuple[tuple[Refusal, ...], Mapping[str, Template]] | None:
    try:
        if path.stat().st_size > 2 * RECORD_BYTES_MAX:
            return None
        with whole(storage, path) as content:
            record = decode(content[:], 1)
    except (OSError, GalleryDamaged, ValueError, TypeError, KeyError, struct.error, pa.ArrowException):
        return None  # not judged before, or its file was lost in a power cut
    templates = {c: given for c, given in record.encounter.templates.items() if isinstance(given, Template)}
    return record.refusals, templates


def _in_memory(capture: Capture, bytes_max: int) -> Capture:
    """The capture as bytes, so that the same bytes are judged and packed. A file that cannot be read gives no bytes, which the gate refuses."""
    if isinstance(capture, Missing):
        return capture
    assert isinstance(capture.data, Path), "the manifest names files"
    try:
        content = read_bounded(capture.data, bytes_max, follow=False)
    except (OSError, InvalidInput):
        content = b""
    return replace(capture, data=content)


def no_record(planned: Planned, captures: Sequence[Capture], verdicts: Sequence[Refusal]) -> Broken | None:
    """The reason why a record cannot be packed: a file is not a capture that the decoders can open, or the record is too large. None if it can be
    packed. captures: as bytes; verdicts: one for each capture that is not missing."""
    images = [
        (capture, row)
        for capture, row in zip(captures, planned.capture_rows, strict=True)
        if not isinstance(capture, Missing)
    ]
    problems = [
        f"row {row}: its file cannot be opened as a {verdict.column} capture ({verdict.reason}); name an image or a minutiae record"
        for (_, row), verdict in zip(images, verdicts, strict=True)
        if verdict.reason in _NO_CAPTURE
    ]
    size = sum(len(c.data) for c, _ in images if isinstance(c, Face | Finger) and isinstance(c.data, bytes))
    if size > RECORD_BYTES_MAX - _OTHER_BYTES_MAX:
        problems.append(
            f"its captures have {size:,} bytes, wanted at most {RECORD_BYTES_MAX - _OTHER_BYTES_MAX:,}; save them smaller"
        )
    return Broken(planned.rows, planned.encounter.subject_id or "", "; ".join(problems)) if problems else None
