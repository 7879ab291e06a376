"""FAISS index codecs: trains an empty FAISS index for a column, and measures how many mates a search with it misses.

Owns the creation, training, filling, reading and searching of FAISS indexes. Never reads or writes files of a gallery.

A codec is trained once for a column. The index of each segment is a filled copy of the codec, so that the estimates of all segments are
comparable. The id of a cell in the index is its number in the segment. Rows are never deleted from an index: a selector excludes removed
rows.

The misses are measured when the codec is trained, with planted mates: vectors of the column, each mixed with another one to a known cosine.
A mate in an inverted list that is not read is missed (`lost`). For mates in the other lists, the error of the estimate is measured (`law`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from biodedup.common.intervals import upper_bound
from biodedup.errors import InvalidInput
from biodedup.gallery.files.codec import LEVELS, ErrorLaw, law_from_card, measured_law
from biodedup.gallery.files.encryption.transform import ColumnTransform
from biodedup.index_spec import IndexSpec
from biodedup.values import Float32

faiss: Any = _faiss  # Any, because its type stubs lack the functions of its Python layer

MATED_SIMILARITY = 0.5
"""A codec must keep the miss risk for mates with at least this cosine. For lower cosines it depends on the number of lists that are
read."""
_LOST_SHARE_MAX = 0.9  # the share of the miss risk that lists which are not read may use
_POINTS_PER_CENTROID = 39
"""The number of training vectors per centroid below which FAISS warns."""
_TRAINING_ROWS_MAX = 1 << 17
_PAIRS = 3_000  # pairs at each similarity
_CHUNK = 512  # pairs whose estimates one search computes
_READ_BYTES = 1 << 20
_THREADED_ROWS = 1 << 15
_CHECKED_ROWS = 2_000
_USUAL_DIMENSIONS = (512, 128, 256, 480, 96)

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FaissCodec:
    """A trained, empty index. trained: serialized by FAISS; law: the error of estimates for mates in lists that are read; lost: the share
    of mates in other lists, at each of LEVELS; checked: the number of mates behind each share; training_rows: the number of training
    vectors; transform: of the vectors in the index, None for plain vectors (encryption/transform.py)."""

    spec: IndexSpec
    dimension: int
    trained: bytes
    law: ErrorLaw
    lost: tuple[float, ...]
    checked: int
    training_rows: int
    transform: ColumnTransform | None = None

    def transformed(self, vectors: Float32) -> Float32:
        """The vectors in the form that the index stores, float32 (n, d)."""
        return vectors if self.transform is None else self.transform.apply(vectors)

    @cached_property
    def codec_id(self) -> str:
        return xxhash.xxh3_64_hexdigest(str(self.spec).encode() + b"\0" + self.trained)

    @property
    def lost_bound(self) -> float:
        """The upper 95 % confidence bound of the probability that a mate with at least MATED_SIMILARITY is in a list that is not read."""
        at = [i for i, level in enumerate(LEVELS) if level >= MATED_SIMILARITY]
        misses = round(sum(self.lost[i] * self.checked for i in at))
        if not misses and self.spec.nprobe is None:
            return 0.0  # every list is read
        return float(upper_bound(misses, self.checked * len(at)))

    def keeps(self, miss_risk: float) -> bool:
        """Whether mates with at least MATED_SIMILARITY are missed with at most this probability."""
        return miss_risk > 0 and self.lost_bound <= _LOST_SHARE_MAX * miss_risk

    def tail_risk(self, miss_risk: float) -> float:
        """The part of a miss risk that remains for the error of estimates."""
        return miss_risk - self.lost_bound if self.keeps(miss_risk) else miss_risk

    @cached_property
    def lists(self) -> tuple[int, int] | None:
        """(the number of inverted lists that a search reads, the number of all lists); None for a flat index."""
        index = self.empty()
        base = _base(index)
        return (_nprobe(base, self.spec), int(base.nlist)) if isinstance(base, faiss.IndexIVF) else None

    def empty(self) -> Any:
        """A new index without rows."""
        return faiss.deserialize_index(np.frombuffer(self.trained, np.uint8))

    def card(self) -> dict[str, Any]:
        """All fields but `spec` and `trained`, for JSON."""
        return ({} if self.transform is None else {"turn": self.transform.transform_id}) | {
            "dimension": self.dimension,
            "law": vars(self.law),
            "lost": self.lost,
            "checked": self.checked,
            "training_rows": self.training_rows,
        }

    @classmethod
    def from_card(
        cls, spec: str, card: dict[str, Any], trained: bytes, transform: ColumnTransform | None = None
    ) -> FaissCodec:
        """The codec of a stored card. Raises ValueError, TypeError or KeyError for invalid values."""
        counts = (card["dimension"], card["checked"], card["training_rows"])
        lost = tuple(float(share) for share in card["lost"])
        if not all(type(count) is int and count > 0 for count in counts) or len(lost) != len(LEVELS):
            raise ValueError("the values of an index codec are invalid")
        law = law_from_card(card["law"])
        return cls(
            spec=IndexSpec.parse(spec),
            dimension=card["dimension"],
            trained=trained,
            law=law,
            lost=lost,
            checked=card["checked"],
            training_rows=card["training_rows"],
            transform=transform,
        )


# making --------------------------------------------------------------------------------------------------------------


def new_index(spec: IndexSpec, dimension: int) -> Any:
    """An untrained index. Raises InvalidInput if FAISS does not know the factory string, or this program cannot use the index."""
    try:
        index = faiss.index_factory(dimension, spec.factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InvalidInput(
            f"FAISS cannot make index {spec.factory!r} for dimension {dimension} ({_reason(error)}); see its factory strings"
        ) from None
    _refuse_unsuited(index, spec)
    return index


def refuse_unknown(spec: IndexSpec) -> None:
    """Raises InvalidInput for an engine that cannot be used with any usual dimension. For a new gallery, whose dimension is not known
    yet."""
    refusals = []
    for dimension in _USUAL_DIMENSIONS if not spec.is_native else ():
        try:
            new_index(spec, dimension)
            return
        except InvalidInput as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def _refuse_unsuited(index: Any, spec: IndexSpec) -> None:
    base = _base(index)
    if isinstance(base, faiss.IndexFastScan) and not isinstance(base, faiss.IndexIVF):
        raise _unusable(spec, "it refuses a selection of rows, which removed rows and groups need")
    if not isinstance(base, (faiss.IndexIVF, faiss.IndexFlatCodes)):
        raise InvalidInput(
            f"index faiss:{spec.factory} ({type(base).__name__}) misses a share of mates that depends on the gallery's size, and cannot be "
            "measured in advance; use an inverted file (IVF...) or a flat index"
        )
    if spec.nprobe is not None and not isinstance(base, faiss.IndexIVF):
        raise InvalidInput(f"index {spec} has no inverted lists; leave nprobe out")


@cache
def training_rows_min(spec: IndexSpec, dimension: int) -> int:
    """The least number of training vectors."""
    index = new_index(spec, dimension)
    base = _base(index)
    centroids = [base.nlist] if isinstance(base, faiss.IndexIVF) else [1]
    quantizer = getattr(base, "pq", None)
    centroids.append(1 << base.nbits if hasattr(base, "nbits") else 0)
    centroids.append(quantizer.ksub if quantizer is not None else 0)
    return _POINTS_PER_CENTROID * max(centroids)


def training_rows_max(spec: IndexSpec, dimension: int) -> int:
    """The greatest number of training vectors."""
    return max(training_rows_min(spec, dimension) * 2, min(_TRAINING_ROWS_MAX, 1 << 15))


def train(spec: IndexSpec, vectors: Float32, transform: ColumnTransform | None = None) -> FaissCodec:
    """A codec trained on these vectors, float32 (n, d), unit rows, n at least `training_rows_min`. transform: of the stored vectors. Raises
    InvalidInput."""
    index = new_index(spec, vectors.shape[1])
    vectors = np.ascontiguousarray(vectors if transform is None else transform.apply(vectors), np.float32)
    index.train(vectors)
    base = _base(index)
    if isinstance(base, faiss.IndexIVF):
        base.nprobe = _nprobe(
            base, spec
        )  # for users who load the index into FAISS; our searches pass it with each call
    trained = faiss.serialize_index(index).tobytes()
    codec = FaissCodec(
        spec=spec,
        dimension=vectors.shape[1],
        trained=trained,
        law=_NO_LAW,
        lost=(0.0,) * len(LEVELS),
        checked=1,
        training_rows=len(vectors),
        transform=transform,
    )
    _check_answers(codec, vectors[-_CHECKED_ROWS:])
    missing: list[int] = []

    def estimate(one: Float32, other: Float32) -> Float32:
        estimates = np.concatenate(
            [
                _own_estimates(codec, one[low : low + _CHUNK], other[low : low + _CHUNK])
                for low in range(0, len(one), _CHUNK)
            ]
        )
        absent = np.isnan(estimates)
        missing.append(int(np.count_nonzero(absent)))
        estimates[absent] = np.nanmean(estimates) if not absent.all() else 0
        return estimates

    law = measured_law(estimate, vectors, "sample", np.random.default_rng(_SEED), _PAIRS)
    checked = len(missing) and _PAIRS
    return replace(codec, law=law, lost=tuple(count / checked for count in missing), checked=checked)


_SEED = 20_263
_NO_LAW = ErrorLaw((0.0, 1.0), (0.0, 1.0), (1.0, 1.0), 0, (), "sample")


def _own_estimates(codec: FaissCodec, probes: Float32, mates: Float32) -> Float32:
    """The estimate of each probe's own mate, float32 (n,); NaN if the mate's list is not read."""
    index = codec.empty()
    index.add(mates)
    estimates, ids = index.search(probes, len(mates), params=parameters(index, codec.spec))
    own = ids == np.arange(len(mates))[:, None]
    return np.where(own.any(axis=1), np.where(own, estimates, 0).sum(axis=1), np.nan).astype(np.float32)


def _check_answers(codec: FaissCodec, vectors: Float32) -> None:
    """Raises InvalidInput if range searches or selectors disagree with k-nearest searches. Some index types of FAISS ignore one of them."""
    index = codec.empty()
    index.add(vectors)
    even = np.packbits(np.arange(len(vectors)) % 2 == 0, bitorder="little")
    probes, k = np.ascontiguousarray(vectors[:16]), min(32, len(vectors) // 2)
    try:
        estimates, ids = index.search(probes, k, params=parameters(index, codec.spec, even))
        radius = float(np.median(estimates[ids >= 0])) if (ids >= 0).any() else 0.0
        limits, near, _ = in_range(index, codec.spec, probes, radius, even)
    except RuntimeError as error:
        why = f"it refuses a selection of rows, which removed rows and groups need ({_reason(error)})"
        raise _unusable(codec.spec, why) from None
    for i, (own, similarity) in enumerate(zip(ids, estimates, strict=True)):
        expected = set(own[(own >= 0) & (similarity > radius + 1e-4)].tolist())
        reached = set(near[limits[i] : limits[i + 1]].tolist())
        full = (own >= 0).all() and similarity[-1] > radius - 1e-4  # rows beyond the k nearest may be in range as well
        allowed = reached if full else set(own[similarity > radius - 1e-4].tolist())
        if any(number % 2 for number in reached) or not expected <= reached or not reached <= allowed:
            raise _unusable(codec.spec, "its range search returns other rows than its k-nearest search")


def _reason(error: RuntimeError) -> str:
    """The message of FAISS, without the location in its source code."""
    return re.sub(r"^Error in .*?\.(?:cpp|h):\d+: (?:Error: )?", "", str(error), flags=re.DOTALL).strip()[:160]


def _unusable(spec: IndexSpec, why: str) -> InvalidInput:
    return InvalidInput(f"index faiss:{spec.factory} cannot be used: {why}; use another one, such as IVF256,PQ64x4fs")


def filled(codec: FaissCodec, pieces: Iterable[Float32]) -> Any:
    """An index with these vectors, in their order. pieces: float32 (n, d) each."""
    index = codec.empty()
    for piece in pieces:
        index.add(np.ascontiguousarray(codec.transformed(piece), np.float32))
    return index


# reading and searching -----------------------------------------------------------------------------------------------


def to_bytes(index: Any) -> NDArray[np.uint8]:
    """The index, serialized by FAISS."""
    serialized: NDArray[np.uint8] = faiss.serialize_index(index)
    return serialized


def read_index(read: Callable[[int, int], NDArray[np.uint8]], size: int) -> Any:
    """Reads a serialized index. read: returns its bytes [low, high). Raises RuntimeError for invalid content."""
    at = 0

    def following(wanted: int) -> bytes:
        nonlocal at
        low, at = at, min(at + wanted, size)
        return read(low, at).tobytes()

    return faiss.read_index(faiss.PyCallbackIOReader(following, _READ_BYTES))


def parameters(index: Any, spec: IndexSpec, selected: NDArray[np.uint8] | None = None) -> Any:
    """Parameters of one search. selected: one bit for each id, the lowest bit first; None for all ids. Parameters are passed with each
    call, because all threads share the settings of an index."""
    selector = None if selected is None else faiss.IDSelectorBitmap(selected)
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = parameters(index.index, spec, selected)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=_nprobe(index, spec))
    return faiss.SearchParameters(sel=selector)


def in_range(
    index: Any, spec: IndexSpec, probes: Float32, least: float, selected: NDArray[np.uint8] | None
) -> tuple[Ids, Ids, Float32]:
    """All rows whose estimate is above `least`: (limits (q + 1,), ids, estimates). The rows of probe i are limits[i] to limits[i + 1]."""
    limits, estimates, ids = index.range_search(probes, least, params=parameters(index, spec, selected))
    return limits.astype(np.int64), ids, estimates


@contextmanager
def threads(count: int, rows: int = _THREADED_ROWS) -> Iterator[None]:
    """Inside the context, FAISS uses `count` threads in calls of this thread, and one thread for few rows, for which more are slower."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count if rows >= _THREADED_ROWS else 1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _base(index: Any) -> Any:
    """The inner index, behind vector transforms. The caller keeps `index`, because FAISS frees the inner index with it."""
    base = faiss.downcast_index(index)
    return faiss.downcast_index(base.index) if isinstance(base, faiss.IndexPreTransform) else base


def _nprobe(ivf: Any, spec: IndexSpec) -> int:
    """nprobe, limited to the number of lists: FAISS allocates memory for nprobe lists even if there are fewer."""
    return int(ivf.nlist if spec.nprobe is None else min(spec.nprobe, ivf.nlist))


# export to FAISS, import from FAISS ----------------------------------------------------------------------------------------------------


def in_the_clear(index: Any, codec: FaissCodec, *, shared: bool = False) -> Any:
    """An index for plain vectors: applies the secret transform first. shared: do not change `index`; otherwise it may be changed in
    place."""
    if codec.transform is None:
        return index
    transform = faiss.LinearTransform(codec.dimension, codec.dimension, False)
    faiss.copy_array_to_vector(codec.transform.matrix(codec.dimension).astype(np.float32).ravel(), transform.A)
    transform.is_trained = True
    transform.set_is_orthonormal()
    outer = faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexPreTransform) and not shared:
        if outer.own_fields:
            transform.this.disown()  # FAISS frees it with the index
        outer.prepend_transform(transform)
        index.referenced_objects = [*getattr(index, "referenced_objects", []), transform]
        return index  # not `outer`, which is freed with `index`
    view = faiss.IndexPreTransform(transform, outer)
    view.referenced_objects = [transform, index]
    return view


def numbered(index: Any, codec: FaissCodec, ids: Ids) -> Any:
    """A view of an index that returns these ids instead of 0, 1, ... It shares the index."""
    view = faiss.IndexIDMap2(codec.empty())  # FAISS refuses a filled index here
    view.index, view.own_fields, view.ntotal = index, False, index.ntotal
    view.referenced_objects = [index]
    faiss.copy_array_to_vector(ids, view.id_map)
    return view


def renumbered(index: Any, codec: FaissCodec, ids: Ids, live: NDArray[np.bool_] | None) -> Any:
    """The index with these ids, without the rows that are not live. The index is changed. Rows must not be added to it afterwards."""
    if live is not None:
        removed = np.packbits(~live, bitorder="little")
        index.remove_ids(faiss.IDSelectorBitmap(removed))
    base = _base(index)
    if not isinstance(base, faiss.IndexIVF):
        view = numbered(index, codec, ids if live is None else ids[live])
        view.construct_rev_map()
        return view
    index.ntotal = base.ntotal
    for number in range(base.nlist):
        size = base.invlists.list_size(number)
        if size:
            own = faiss.rev_swig_ptr(base.invlists.get_ids(number), size)
            own[:] = ids[own]
    return index


def sharded(indexes: list[Any], dimension: int) -> Any:
    """One index over several indexes, which keep their ids."""
    together = faiss.IndexShards(dimension, True, False)
    for index in indexes:
        together.add_shard(index)
    return together


def vectors_of(index: Any, low: int, high: int) -> Float32:
    """The vectors [low, high) of an index, reconstructed: float32 (n, d), unit rows. Raises InvalidInput if the index cannot
    reconstruct."""
    try:
        vectors: Float32 = index.reconstruct_n(low, high - low)
    except RuntimeError as error:
        raise InvalidInput(
            f"an index of type {type(index).__name__} cannot reconstruct vectors ({_reason(error)})"
        ) from None
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Float32 = np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
    return unit


def opened(path: Path) -> tuple[Any, Ids]:
    """(the index in a FAISS file, prepared for `vectors_of`; the id of each vector). Raises InvalidInput."""
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise InvalidInput(f"{path} is not an index that FAISS can read ({_reason(error)})") from None
    ids: Ids = np.arange(index.ntotal)
    if isinstance(index, (faiss.IndexIDMap, faiss.IndexIDMap2)):
        ids = faiss.vector_to_array(index.id_map)
        outer, index = index, faiss.downcast_index(index.index)
        index.referenced_objects = [outer]
    base = _base(index)
    if isinstance(base, faiss.IndexIVF):
        lists = [
            faiss.rev_swig_ptr(base.invlists.get_ids(n), base.invlists.list_size(n)).copy() for n in range(base.nlist)
        ]
        stored = np.concatenate([np.zeros(0, np.int64), *lists])
        order = np.argsort(stored, kind="stable")
        if not np.array_equal(
            stored[order], np.arange(len(stored))
        ):  # ids of the caller: number the vectors by ascending id
            ids = stored[order]
            starts = np.zeros(len(stored), np.int64)
            starts[order] = np.arange(len(stored))
            at = 0
            for number, own in enumerate(lists):
                if len(own):
                    view = faiss.rev_swig_ptr(base.invlists.get_ids(number), len(own))
                    view[:] = starts[at : at + len(own)]
                at += len(own)
        if isinstance(base, faiss.IndexIVFPQFastScan):
            base.fine_quantizer = (
                base.pq
            )  # FAISS 1.15 does not set it when it reads a file, and crashes when it decodes
        base.make_direct_map(True)
    return index, ids
