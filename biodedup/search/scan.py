"""The scan: one pass over the embeddings of a column, exact.

Owns top-k over float vectors. Never reads minutiae, never knows thresholds.

FAISS's exact k-nearest-neighbour kernel does the arithmetic. One scan runs at a time, with all the threads it was given:
callers that scan together would only take the cores from each other.
"""

from __future__ import annotations

import threading

import faiss
import numpy as np
from numpy.typing import NDArray

from biodedup.values import Float32

_one_scan = threading.Lock()


def top_k(
    vectors: Float32, probes: Float32, k: int, live: NDArray[np.bool_], threads: int
) -> tuple[NDArray[np.int64], Float32]:
    """The k most similar live cells of each probe.

    vectors: float32 (n, d); probes: float32 (q, d), both unit rows; live: bool (n,), false for cells to pass over.
    Returns cells int64 (q, k), -1 pads; similarity float32 (q, k), descending, -inf pads. Ties: the lower cell first.
    """
    cells = np.full((len(probes), k), -1, np.int64)
    similarity = np.full((len(probes), k), -np.inf, np.float32)
    wanted = min(k, int(np.count_nonzero(live)))
    if not wanted or not len(probes):
        return cells, similarity
    todo = np.arange(len(probes))
    reach = wanted
    while todo.size:
        with _one_scan:
            faiss.omp_set_num_threads(threads)
            near_similarity, near = faiss.knn(probes[todo], vectors, reach, metric=faiss.METRIC_INNER_PRODUCT)
        # k best of the live ones among the `reach` nearest: stable sorts keep FAISS's order and break ties by cell.
        alive = live[near]
        order = np.lexsort((near, -near_similarity, ~alive), axis=1)[:, :wanted]
        enough = (np.count_nonzero(alive, axis=1) >= wanted) | (reach == len(vectors))
        done = todo[enough]
        picked = order[enough]
        cells[done, :wanted] = np.take_along_axis(near[enough], picked, axis=1)
        similarity[done, :wanted] = np.take_along_axis(near_similarity[enough], picked, axis=1)
        todo = todo[~enough]
        reach = min(2 * reach, len(vectors))  # removed rows crowded out live ones: look further
    return cells, similarity
