"""Groups subjects into clusters of one person each, given links between pairs of subjects.

Owns the connected components of the links, how strongly each holds together, and which links of a large one are kept. Never scores.

1. n records of one person make n(n - 1)/2 links. Of a cluster with more than `LINKS_MAX` links a maximum spanning forest is kept, and its
   strongest and weakest links: memory grows with n. The number of the others is stated.
2. The forest is taken for each class of links (extrapolated or not, believed or not). So the clusters of the links that reach a higher
   threshold, or of some classes alone, are the same with all links and with the kept ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from biodedup.match.judgement import TRUSTED_KINDS
from biodedup.values import Cluster, Link

LINKS_MAX = 1_000
"""Links of a cluster of which all are kept: those of 45 subjects that are all alike."""
EXTREMES = 100
"""Of a larger cluster: so many of the strongest links and of the weakest ones are kept beside the forest."""
_THINNED_AT = 1 << 14


def kept_links(
    ends: NDArray[np.int64], score_db: NDArray[np.float64], classes: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(bool (n,), which links are kept; int64 (n,), the component of each). ends: int64 (n, 2), each pair once in a class; equally strong links
    count in the given order."""
    _, index = np.unique(ends, return_inverse=True)
    index = index.reshape(-1, 2)
    nodes = int(index.max(initial=-1)) + 1
    component = connected_components(_graph(index, np.ones(len(index)), nodes), directed=False)[1][index[:, 0]]
    large = np.bincount(component, minlength=1)[component] > LINKS_MAX
    keep = ~large
    order = np.lexsort((-score_db, component))
    order = order[large[order]]
    start = np.flatnonzero(np.diff(component[order], prepend=-1))
    length = np.diff(np.append(start, len(order)))
    rank = np.arange(len(order)) - np.repeat(start, length)
    keep[order[(rank < EXTREMES) | (rank >= np.repeat(length, length) - EXTREMES)]] = True
    for one in np.unique(classes[large]).tolist():
        links = np.flatnonzero(large & (classes == one))
        links = links[np.argsort(-score_db[links], kind="stable")]
        keep[links[_forest(index[links], nodes)[1]]] = True
    return keep, component.astype(np.int64)


def _graph(ends: NDArray[np.int64], weights: NDArray[np.float64], nodes: int) -> csr_array:
    return coo_array((weights, (ends[:, 0], ends[:, 1])), shape=(nodes, nodes)).tocsr()


def _forest(ends: NDArray[np.int64], nodes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(a node of each link, the links) of a maximum spanning forest. ends: of the links, strongest first, each pair once."""
    # the weights are ranks by descending score, so a minimum spanning forest over them is a maximum one over scores
    tree = minimum_spanning_tree(_graph(ends, np.arange(1.0, len(ends) + 1), nodes))
    return tree.nonzero()[0], tree.data.astype(np.int64) - 1


class Links:
    """The links of a join as they come: each pair once, those of large clusters thinned on the way."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], Link] = {}
        self._left_out = Counter[str]()
        self._thinned_at = _THINNED_AT

    def add(self, links: Iterable[Link], left_out: Mapping[str, int] | None = None) -> None:
        """links: a pair may have been found from both sides, the later one counts. left_out: subject_id -> links of its cluster that were not
        kept."""
        self._links.update((_names(link), link) for link in links)
        self._left_out.update(left_out or {})
        if len(self._links) >= self._thinned_at:
            self._links = {_names(link): link for link in self.kept()}
            self._thinned_at = max(2 * len(self._links), _THINNED_AT)

    def kept(self) -> list[Link]:
        """The links that are kept, strongest first."""
        ordered = sorted(self._links.values(), key=lambda link: (-link.score_db, link.subject_ids))
        if len(ordered) <= LINKS_MAX:
            return ordered
        index = _index(ordered)
        ends = np.array([[index[name] for name in link.subject_ids] for link in ordered], np.int64)
        scores = np.array([link.score_db for link in ordered])
        classes = np.array([link.extrapolated + 2 * (link.kind in TRUSTED_KINDS) for link in ordered], np.int64)
        keep, component = kept_links(ends, scores, classes)
        links = [link for link, kept in zip(ordered, keep.tolist(), strict=True) if kept]
        dropped = np.bincount(component[~keep])
        first: dict[int, str] = {}
        for number, link in zip(component[keep].tolist(), links, strict=True):
            first.setdefault(number, link.subject_ids[0])
        self._left_out.update({first[i]: int(dropped[i]) for i in np.flatnonzero(dropped).tolist()})
        self._links = {_names(link): link for link in links}
        return links

    @property
    def left_out(self) -> dict[str, int]:
        """A subject of a cluster -> how many of its links are not kept."""
        return dict(self._left_out)

    def clusters(self) -> list[Cluster]:
        """As `clusters_of`."""
        return clusters_of(self.kept(), self._left_out)


def clusters_of(links: Iterable[Link], left_out: Mapping[str, int] | None = None) -> list[Cluster]:
    """Connected components of the links, largest first, then by subject_id; links strongest first.

    weakest_db is the weakest link of the maximum spanning tree of the cluster: without it the cluster falls apart. left_out: subject_id ->
    links of its cluster that were not kept.
    """
    unique = {_names(link): link for link in links}  # a pair may have been found from both sides
    ordered = sorted(unique.values(), key=lambda link: (-link.score_db, link.subject_ids))
    if not ordered:
        return []
    index = _index(ordered)
    ends = np.array([[index[name] for name in link.subject_ids] for link in ordered])
    count, labels = connected_components(_graph(ends, np.ones(len(ends)), len(index)), directed=False)
    nodes, tree = _forest(ends, len(index))
    bottleneck = np.zeros(count, np.int64)
    np.maximum.at(bottleneck, labels[nodes], tree)
    members: list[list[str]] = [[] for _ in range(count)]
    for name, label in zip(index, labels, strict=True):
        members[label].append(name)
    inside: list[list[Link]] = [[] for _ in range(count)]
    for link, label in zip(ordered, labels[ends[:, 0]], strict=True):
        inside[label].append(link)
    missing = Counter[int]()
    for name, number in (left_out or {}).items():
        if name in index:
            missing[int(labels[index[name]])] += number
    clusters = [
        Cluster(tuple(members[i]), tuple(inside[i]), ordered[bottleneck[i]].score_db, missing[i]) for i in range(count)
    ]
    return sorted(clusters, key=lambda cluster: (-len(cluster.subject_ids), cluster.subject_ids))


def _names(link: Link) -> tuple[str, str]:
    a, b = link.subject_ids
    return (a, b) if a < b else (b, a)


def _index(links: Sequence[Link]) -> dict[str, int]:
    """subject_id -> its place among all, in order."""
    names = sorted({name for link in links for name in link.subject_ids})
    return {name: i for i, name in enumerate(names)}
