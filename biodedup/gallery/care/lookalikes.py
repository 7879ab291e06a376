"""Finds subject ids that a person could confuse: `JOSE-1` and `Jose 1`, or the same letters in another Unicode form.

Owns the definition of similar ids (equal after NFKC, case folding, and removal of spaces and hyphens) and the search for them. Never
changes an id.

Method: two passes over the ids, in pieces. The first pass sets a bit for the hash of each folded id, as in a Bloom filter with one hash,
and collects hashes whose bit was set before. These are all similar ids and, in a large gallery, one other id in twenty. The second pass
compares the 64-bit hashes of the collected ids. Memory: 0.5 GB for the bits of 200 million ids, and as much for the collected hashes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from biodedup.gallery.files import packed
from biodedup.gallery.files.packed import Packed
from biodedup.gallery.segments.part import Int64
from biodedup.gallery.snapshot import Snapshot

Hashes = NDArray[np.uint64]

_PIECE_ROWS = 1 << 16
_BITS_MAX = 1 << 32
_LEFT_OUT = r"[\s\p{Pd}\p{Zs}]+"


def look_alikes(snapshot: Snapshot, named_max: int = 20) -> tuple[int, list[tuple[str, ...]]]:
    """(the number of groups of enrolled subjects with similar ids, the first `named_max` groups)."""
    suspects = _suspects(snapshot)
    if not len(suspects):
        return 0, []
    alike, exact, rows = _gathered(snapshot, suspects)
    order = np.lexsort((exact, alike))
    alike, exact, rows = alike[order], exact[order], rows[order]
    other = (alike[1:] == alike[:-1]) & (exact[1:] != exact[:-1])  # not the rows of one subject, whose ids are equal
    shared = np.unique(alike[1:][other])
    first = sorted(shared.tolist(), key=lambda key: int(rows[np.searchsorted(alike, key)]))[:named_max]
    groups = []
    for key in first:
        some = np.sort(rows[np.searchsorted(alike, key) : np.searchsorted(alike, key, "right")])
        groups.append(tuple(dict.fromkeys(snapshot.subject_ids(some.tolist()))))
    return len(shared), groups


def key_of(subject_id: str) -> str:
    """The folded form of an id. Similar ids have the same folded form."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", subject_id).casefold())
    return re.sub(r"\s+", "", "".join(c for c in folded if unicodedata.category(c) != "Pd"))


def _suspects(snapshot: Snapshot) -> Hashes:
    """Hashes of folded ids that may occur twice, ascending. Some are false positives."""
    count = max(16 * snapshot.live_count, 1 << 16)
    width = min(count, _BITS_MAX).bit_length() - 1
    bits = np.zeros((1 << width) // 8, np.uint8)
    found: list[Hashes] = [np.zeros(0, np.uint64)]
    for ids, _ in _pieces(snapshot):
        keys = np.sort(_keys(ids))
        places = (keys >> np.uint64(64 - width)).astype(np.int64)
        masks = np.left_shift(np.uint8(1), (places & 7).astype(np.uint8), dtype=np.uint8)
        seen = (bits[places >> 3] & masks) != 0
        seen[1:] |= keys[1:] == keys[:-1]
        found.append(keys[seen])
        np.bitwise_or.at(bits, places >> 3, masks)
    return np.unique(np.concatenate(found))


def _gathered(snapshot: Snapshot, suspects: Hashes) -> tuple[Hashes, Hashes, Int64]:
    """(hash of the folded id, hash of the id, row) of each id whose folded hash is in `suspects`."""
    alike, exact, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for ids, at in _pieces(snapshot):
        keys = _keys(ids)
        places = np.minimum(np.searchsorted(suspects, keys), len(suspects) - 1)
        some = np.flatnonzero(suspects[places] == keys)
        if len(some):
            alike.append(keys[some])
            exact.append(packed.hashes(ids.take(pa.array(some))))
            rows.append(at[some])
    return np.concatenate(alike), np.concatenate(exact), np.concatenate(rows)


def _pieces(snapshot: Snapshot) -> Iterator[tuple[Packed, Int64]]:
    """(ids, rows) of the live rows, in pieces."""
    for part in snapshot.parts:
        mask = snapshot.mask(part)
        for low in range(0, part.count, _PIECE_ROWS):
            high = min(low + _PIECE_ROWS, part.count)
            at = np.arange(low, high) if mask is None else low + np.flatnonzero(mask[low:high])
            ids = part.subject_ids(low, high)
            if len(at):
                yield ids if mask is None else ids.filter(pa.array(mask[low:high])), part.rows(at)


def _keys(ids: Packed) -> Hashes:
    """The hash of `key_of` of each id, uint64 (n,)."""
    texts: Any = ids.cast(pa.large_string())
    plain = pc.string_is_ascii(texts).to_numpy(zero_copy_only=False)
    if plain.all():
        folded = pc.replace_substring_regex(pc.ascii_lower(texts), pattern=_LEFT_OUT, replacement="")
    else:
        folded = pa.array([key_of(text) for text in texts.to_pylist()], pa.large_string())
    return packed.hashes(folded.cast(pa.large_binary()))
