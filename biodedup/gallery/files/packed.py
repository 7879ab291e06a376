"""Stores many byte strings (ids, minutiae records, answers) as two arrays, offsets and bytes, and hashes them.

Owns the conversion between Arrow arrays (which slice, filter and take in C++) and the numpy arrays of a column file. Never loops over
strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Packed: TypeAlias = Any
"""A pyarrow.LargeBinaryArray without nulls: n byte strings."""


def pack(values: Sequence[bytes]) -> Packed:
    return pa.array(values, pa.large_binary())


def empties(count: int) -> Packed:
    """`count` empty strings."""
    return from_whole(np.zeros(count + 1, np.int64), np.zeros(0, np.uint8))


def pack_text(values: Sequence[str] | Any) -> Packed:
    """Packs texts as UTF-8. values: strings, or an Arrow array of strings."""
    if not isinstance(values, pa.Array):
        values = pa.array(values, pa.large_string())
    return values.cast(pa.large_string()).cast(pa.large_binary())


def text(packed: Packed) -> list[str]:
    strings: list[str] = packed.cast(pa.large_string()).to_pylist()
    return strings


def is_text(packed: Packed) -> bool:
    """Whether all strings are valid UTF-8."""
    try:
        packed.cast(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return True


def to_arrays(packed: Packed) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """(offsets int64 (n + 1,), beginning at 0; all bytes, uint8)."""
    count = len(packed)
    if not count:
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    _, offset_buffer, data_buffer = packed.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64, count + 1, 8 * packed.offset)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    return offsets - offsets[0], data[offsets[0] : offsets[-1]]


def from_arrays(offsets: NDArray[np.int64], data: NDArray[np.uint8]) -> Packed:
    """The strings of two arrays. offsets: int64 (n + 1,), beginning at any value; data: the bytes from offsets[0] on."""
    return from_whole(np.ascontiguousarray(offsets - offsets[0]), data)


def from_whole(offsets: NDArray[np.int64], data: NDArray[np.uint8]) -> Packed:
    """As `from_arrays`, for offsets that begin at 0. Copies nothing."""
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio
_MIX_1, _MIX_2 = (
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)  # the finalizer of splitmix64 (Steele 2014)


def hashes(packed: Packed) -> NDArray[np.uint64]:
    """A 64-bit hash of each string, uint64 (n,). It is not cryptographic: look-ups compare the strings as well."""
    offsets, data = to_arrays(packed)
    starts, lengths = offsets[:-1], np.diff(offsets)
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    words = np.ndarray(len(data) + 1, "<u8", padded, strides=(1,))  # overlapping: eight bytes from each position on
    state = lengths.astype(np.uint64) * _ODD
    rest = np.flatnonzero(lengths)
    for done in range(0, int(lengths.max(initial=0)), 8):
        rest = rest[lengths[rest] > done]
        left = np.minimum(lengths[rest] - done, 8).astype(np.uint64)
        word = words[starts[rest] + done] & (np.uint64(2**64 - 1) >> (np.uint64(64) - np.uint64(8) * left))
        state[rest] = _mixed(state[rest] ^ word)
    return _mixed(state)


def hash_of(string: str) -> np.uint64:
    """The hash of one string, equal to that of `hashes`."""
    data = string.encode("utf-8", "surrogatepass")  # an undecodable file name must not raise; it is not found
    state = len(data) * int(_ODD) % 2**64
    for start in range(0, len(data), 8):
        state = _mixed_int(state ^ int.from_bytes(data[start : start + 8], "little"))
    return np.uint64(_mixed_int(state))


def _mixed_int(x: int) -> int:
    x = (x ^ (x >> 30)) * int(_MIX_1) % 2**64
    x = (x ^ (x >> 27)) * int(_MIX_2) % 2**64
    return x ^ (x >> 31)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
