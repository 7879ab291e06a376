"""Encodes and decodes a record of a batch file: an encounter as one row of an Arrow IPC stream.

Owns the columns of a record, and the limits of its content. Never signs or encrypts, and never reads a batch file.

1. The same record gives the same bytes.
2. Decoding needs at most a few times the memory of the bytes, whatever they state: one row, no compression, limited counts and texts.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from biodedup.common import quality as quality_scale
from biodedup.errors import InvalidInput
from biodedup.texts import shown
from biodedup.values import COLUMNS, Capture, Encounter, Face, Finger, Float32, Missing, Refusal, Template

RECORD_BYTES_MAX = 32 << 20
"""The largest record. A face and ten fingers, uncompressed, are smaller."""
ID_CHARACTERS_MAX = 200
"""The longest encounter_id of a kit. The centre's id is longer by a prefix that names the kit's key."""
_TEXT_CHARACTERS_MAX = 500
_DIMENSION_MAX = 8192
_COUNTS_MAX = {"groups": 64, "captures": 64, "templates": 16, "missing": 16, "refusals": 128}

_TEMPLATE = [("column", pa.string()), ("model_id", pa.string()), ("embedding", pa.list_(pa.float32())), ("minutiae", pa.binary()), ("quality", pa.float64())]  # fmt: skip
_REFUSAL = [("column", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("measured", pa.float64()), ("limit", pa.float64())]  # fmt: skip
_SCHEMA = pa.schema(
    [
        ("subject_id", pa.string()),
        ("encounter_id", pa.string()),
        ("captured_at", pa.float64()),
        ("packed_at", pa.float64()),
        ("groups", pa.list_(pa.string())),
        ("captures", pa.list_(pa.struct([("position", pa.string()), ("data", pa.binary()), ("dpi", pa.float64())]))),
        ("templates", pa.list_(pa.struct(_TEMPLATE))),
        ("missing", pa.list_(pa.struct([("position", pa.string()), ("reason", pa.string())]))),
        ("refusals", pa.list_(pa.struct(_REFUSAL))),
    ]
)


@dataclass(frozen=True, eq=False)
class Record:
    """An encounter of a field kit. sequence: the kit's number of the record; captured_at, packed_at: seconds since 1970 by the kit's clock, which
    may be wrong; refusals: of the kit's quality gate, also for captures that are packed."""

    encounter: Encounter
    sequence: int
    captured_at: float | None
    packed_at: float
    refusals: tuple[Refusal, ...] = ()

    @property
    def byte_count(self) -> int:
        """The total size of its images."""
        images = [c.data for c in self.encounter.captures if isinstance(c, Face | Finger)]
        return sum(len(data) for data in images if isinstance(data, bytes))


def encode(record: Record) -> bytes:
    """The record as an Arrow IPC stream; the same bytes for the same record. Captures are bytes, or paths whose files are read."""
    encounter = record.encounter
    row = {
        "subject_id": encounter.subject_id,
        "encounter_id": encounter.encounter_id,
        "captured_at": record.captured_at,
        "packed_at": record.packed_at,
        "groups": list(encounter.groups),
        "captures": [
            {"position": capture.column, "data": _content(capture), "dpi": getattr(capture, "dpi", None)}
            for capture in encounter.captures
            if not isinstance(capture, Missing)
        ],
        "templates": [_template_row(column, given) for column, given in sorted(encounter.templates.items())],
        "missing": [{"position": c.position, "reason": c.reason} for c in encounter.captures if isinstance(c, Missing)],
        "refusals": [vars(refusal) for refusal in record.refusals],
    }
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _SCHEMA) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist([row], schema=_SCHEMA))
    return bytes(sink.getvalue().to_pybytes())


def decode(payload: bytes, sequence: int) -> Record:
    """The record of a payload. Raises the errors of Arrow, struct.error and InvalidInput."""
    row = _row(payload)
    _check_limits(row)
    captures: list[Capture] = [
        Face(c["data"]) if c["position"] == "face" else Finger(c["data"], c["position"], c["dpi"])
        for c in row["captures"]
    ]
    captures += [Missing(**missing) for missing in row["missing"]]
    templates = {given["column"]: _template_of(given) for given in row["templates"]}
    encounter = Encounter(row["subject_id"], captures, templates, row["encounter_id"], row["groups"])
    refusals = tuple(_refusal_of(**refusal) for refusal in row["refusals"])
    return Record(encounter, checked_sequence(sequence), row["captured_at"], row["packed_at"], refusals)


def _refusal_of(column: str, reason: str, detail: str, measured: float | None, limit: float | None) -> Refusal:
    """A refusal of another machine. Its texts are shortened and only shown: they influence no decision."""
    known = column if column in COLUMNS else "unknown"
    return Refusal(known, shown(reason)[:_TEXT_CHARACTERS_MAX], shown(detail)[:_TEXT_CHARACTERS_MAX], measured, limit)


def checked_sequence(number: int) -> int:
    """The number, if it is a valid sequence number. Raises InvalidInput."""
    if not (isinstance(number, int) and 1 <= number < 1 << 63):
        raise InvalidInput(f"a sequence is {number!r}, wanted a whole number from 1")
    return number


def _row(payload: bytes) -> dict[str, Any]:
    """The row of a stream that consists of a schema and one record batch. Raises InvalidInput for any other stream."""
    messages = list(pa.ipc.MessageReader.open_stream(payload))
    if [message.type for message in messages] != ["schema", "record batch"]:
        raise InvalidInput("a record is not one row of an Arrow stream")
    schema = pa.ipc.read_schema(messages[0])
    if schema != _SCHEMA:
        raise InvalidInput(f"a record has the columns {schema.names}; wanted {_SCHEMA.names}")
    if _is_compressed(messages[1].metadata.to_pybytes()):
        raise InvalidInput("a record is compressed; records are written as they are")
    batch = pa.ipc.read_record_batch(messages[1], schema)
    batch.validate(full=True)
    if batch.num_rows != 1:
        raise InvalidInput(f"a record has {batch.num_rows} rows, wanted 1")
    for name, most in _COUNTS_MAX.items():
        count = len(batch.column(name).flatten())
        if count > most:
            raise InvalidInput(f"a record has {count} {name}, wanted at most {most}")
    numbers = len(batch.column("templates").flatten().field("embedding").flatten())
    if numbers > _COUNTS_MAX["templates"] * _DIMENSION_MAX:
        raise InvalidInput(f"a record's embeddings have {numbers:,} numbers, wanted at most {_DIMENSION_MAX:,} each")
    (row,) = batch.to_pylist()
    return dict(row)


def _is_compressed(metadata: bytes) -> bool:
    """Whether the metadata of a record batch state that its buffers are compressed: field 3 of its table in the message (Arrow's Message.fbs).
    A compressed buffer may state any size, and Arrow would allocate it before decompression."""

    def field(table: int, number: int) -> int:
        """The position of a field of a FlatBuffers table, 0 if the table does not have it."""
        layout = table - struct.unpack_from("<i", metadata, table)[0]
        (size,) = struct.unpack_from("<H", metadata, layout)
        at = 4 + 2 * number
        offset = struct.unpack_from("<H", metadata, layout + at)[0] if at + 2 <= size else 0
        return int(table + offset) if offset else 0

    header = field(struct.unpack_from("<I", metadata)[0], 2)
    return bool(field(header + struct.unpack_from("<I", metadata, header)[0], 3))


def _check_limits(row: Mapping[str, Any]) -> None:
    texts = [row["subject_id"], row["encounter_id"], *row["groups"]]
    for part in (*row["missing"], *row["refusals"], *row["templates"]):
        texts += [value for value in part.values() if isinstance(value, str)]
    if any(len(text or "") > _TEXT_CHARACTERS_MAX for text in texts):
        raise InvalidInput(f"a text of a record has more than {_TEXT_CHARACTERS_MAX} characters")
    if not row["encounter_id"]:
        raise InvalidInput("a record has no encounter_id")


def _content(capture: Capture) -> bytes:
    assert isinstance(capture, Face | Finger) and not isinstance(capture.data, np.ndarray), "only files are packed"
    return capture.data if isinstance(capture.data, bytes) else Path(capture.data).read_bytes()


def _template_row(column: str, given: Float32 | bytes | Template) -> dict[str, Any]:
    """The row of a template. A vector or a minutiae record without a model_id counts as made by the column's model, as in the engine."""
    if isinstance(given, Template):
        vector = None if given.embedding is None else given.embedding.tolist()
        quality = quality_scale.as_stored(given.column, given.quality)
        return {"column": column, "model_id": given.model_id, "embedding": vector, "minutiae": given.minutiae, "quality": quality}  # fmt: skip
    return {"column": column, "minutiae": given} if isinstance(given, bytes) else {"column": column, "embedding": given.tolist()}  # fmt: skip


def _template_of(row: dict[str, Any]) -> Float32 | bytes | Template:
    vector = None if row["embedding"] is None else np.array(row["embedding"], np.float32)
    if row["model_id"] is not None:
        quality = quality_scale.from_stored(row["column"], row["quality"])
        return Template(row["column"], row["model_id"], vector, row["minutiae"], quality)
    if vector is not None:
        return vector
    if not isinstance(row["minutiae"], bytes):
        raise InvalidInput(f"the {row['column']} template is empty; it needs an embedding or minutiae")
    return row["minutiae"]
